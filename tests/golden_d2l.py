"""Runs this package's layers on the golden cases of their namesakes."""

from __future__ import annotations

from tests.golden_cases import Runner

RUNNERS: dict[str, Runner] = {}
