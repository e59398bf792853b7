"""Limits per case: which of a file's patterns decides, and what is wrong with a file in one sentence."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from fused_attn_bench.commands.compare import warn_of_idle
from fused_attn_bench.limits import Limits, read

pytestmark = pytest.mark.quick
CASE = "softmax/masked/fwd/float32/1x1x8x8"


def test_the_last_match_decides_key_by_key(tmp_path: Path) -> None:
    path = tmp_path / "limits.toml"
    path.write_text(
        '["*"]\ntime = "5%"\nhost = "20 us"\n["softmax/*"]\ntime = "10%"\nmemory = "32 MiB"\n["attention/*"]\ntime = "1%"\nerror = 2\n'
    )
    rules = read(path, Limits(time=0.03))
    assert rules(CASE) == Limits(time=pytest.approx(0.10), memory=2**25, host=pytest.approx(20e-6))
    assert rules("attention/plain/fwd/float32/1x1x8x8") == Limits(time=pytest.approx(0.01), host=pytest.approx(20e-6), error=2.0)
    path.write_text("")
    assert read(path, Limits(time=0.07))(CASE) == Limits(time=0.07)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["*"]\ntime = 3', r'limits.toml, \["\*"\], time must be a number with one of %, like "3%"; got 3'),
        ('["*"]\ntime = "-3%"', r"time must be a number with one of %"),
        ('["*"]\nhost = "20 s"', r'host must be a number with one of us, µs, ms, like "20 us"; got \'20 s\''),
        ('["*"]\nerror = 0.5', r"error must be a factor of at least 1, like 2.0; got 0.5"),
        ('["*"]\nerror = true', r"error must be a factor"),
        ('["*"]\nspeed = "3%"', r'\["\*"\]: a limit must be one of time, memory, host, error; got speed'),
        ('time = "3%"', r"must have each limit in a table named after cases, .*; got time = '3%' outside of any"),
        ("[", r"limits.toml must be a TOML file of limits; got: "),
    ],
)
def test_a_bad_file_is_explained(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "limits.toml", Limits())


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent.toml must be a TOML file of limits; got: .*No such file"):
        read(tmp_path / "absent.toml", Limits())


def test_a_pattern_that_matches_nothing_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "l.toml").write_text('["softmax/*"]\ntime = "10%"\n["sofmax/*"]\ntime = "20%"\n')
    warn_of_idle(argparse.Namespace(fail_on=0.03, limits=tmp_path / "l.toml"), [CASE])
    assert capsys.readouterr().err == f'warning: {tmp_path / "l.toml"}, ["sofmax/*"] matches none of the cases\n'
