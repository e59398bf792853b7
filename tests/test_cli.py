"""``python -m fused_attn``: what it prints, and one clear sentence with status 2 for every mistake of its user."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fused_attn.__main__ import COMMANDS, main
from fused_attn.cli import errors, grammar

pytestmark = pytest.mark.quick


def test_bare_call_prints_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS)


def test_runs_as_a_module_without_the_optional_packages() -> None:
    """``info`` must work where only torch is installed, and without Triton being imported."""
    absent = ("rich", "matplotlib", "transformers", "safetensors", "triton")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({absent}));"
    code = f"{blocked} from fused_attn.__main__ import main; sys.exit(main(['info']))"
    ran = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ran.returncode == 0, ran.stderr
    assert "Traceback" not in ran.stderr


def test_info_lists_versions_devices_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from fused_attn import backends

    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and f"{torch.get_num_threads()} threads" in printed
    for name in backends.names():
        assert f"\n  {name} " in printed
    assert "chosen by auto" in printed


def test_explain_needs_no_memory_for_its_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    wide = "64,128,1048576,256"
    assert main(["explain", "--q", wide, "--dtype", "bfloat16", "--mask", "causal & window(128, 0)", "--requires-grad"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("backend: ") and "double backward" in printed


@pytest.mark.parametrize(
    "arguments",
    [
        "--mask causal&window(128,None)&documents(64)&padding(1000)",
        "--mask Sliding_Window(left=3,right=0)&lengths(17)&dense&band(5)&prefix(2)",
        "--mods softcap(30),alibi,bias,bias(1,1,1,1024),decay --requires-grad q,bias,alibi,decay",
        "--q 1,8,1,64 --k 1,2,4096,64 --v 1,2,4096,32 --mask causal --q-offset 4095",
        "--dropout 0.1 --sinks --aux probs,scores,lse,max_scores,column_sums,entropy --requires-grad sinks --scale 0.5",
        "--dtype float64 --q 0,8,0,64",
    ],
)
def test_explain_reads_the_whole_vocabulary(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments.split()]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--mask", "diagonal(3)"], "there is no mask 'diagonal'; known are causal"),
        (["--mask", "causal + window(1, 0)"], "cannot read 'causal + window(1, 0)'"),
        (["--mask", "causal &"], "cannot read"),
        (["--mask", "__import__('os').system('true')"], "cannot read"),
        (["--mask", "window(True, 0)"], "cannot read"),
        (["--mask", "window(-1, 0)"], "must be >= 0"),
        (["--mask", "window(1)"], "right"),
        (["--mask", "documents(0)"], "length must be >= 1"),
        (["--mods", "softcap(0)"], "positive"),
        (["--mods", "cap(3)"], "there is no score modification 'cap'"),
        (["--q", "1,4,8,8", "--k", "1,3,8,8"], "kv_heads must divide heads"),
        (["--q", "1,4,8,8", "--k", "1,4,9,8", "--mask", "causal"], "q_offset must be given"),
        (["--dropout", "1.5"], "Dropout p must be in [0, 1]"),
        (["--aux", "weights"], "--aux takes any of probs"),
        (["--requires-grad", "q,w"], "--requires-grad takes any of q"),
        (["--device", "tpu"], "--device must be"),
        (["--device", "cuda:99"], "CUDA devices"),
        (["--scale", "nan"], "scale"),
    ],
)
def test_explain_answers_mistakes_with_one_sentence(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", *arguments]) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize(
    "arguments", [["nope"], ["explain", "--q", "1,2,3"], ["explain", "--q", "a,b,c,d"], ["explain", "--dtype", "int8"]]
)
def test_argparse_refuses_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert 'pip install "fused-attn[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    [
        "(" * 300 + ")" * 300,
        "a(" + "-" * 5000 + "1)",
        "a(**{})",
        "a.b(1)",
        "a([1])",
        "a('x')",
        "a(1)(2)",
        "",
        "a(1e999999j)",
    ],
)
def test_the_grammar_refuses_everything_but_names_and_numbers(text: str) -> None:
    for separator in (ast.BitAnd, None):
        with pytest.raises(errors.CommandError):
            grammar.parse_calls(text, separator)


@pytest.mark.quick
def test_explain_knows_scorings_normalizers_and_empty_rows(capsys):
    asked = ["explain", "--mask", "causal", "--on", "sm_90"]
    for more, said in (
        (["--scoring", "additive(0.5)"], "-> triton"),
        (["--normalizer", "topk(4)"], "TopK takes whole rows"),
        (["--normalizer", "sigmoid(-6)"], "-> triton"),
        (["--empty-rows", "uniform"], "second pass"),
        (["--mods", "softcap(30), selective"], "blocks of queries"),
    ):
        assert main([*asked, *more]) == 0
        assert said in capsys.readouterr().out
    assert main(["explain", "--normalizer", "softmin"]) == 2
    assert "there is no normalizer 'softmin'" in capsys.readouterr().err
