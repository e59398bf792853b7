"""The default torch.compile, from README's first example to a training step, and AOTInductor: what users run, not what we tuned for."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn as fa
from fused_attn import fingerprint
from fused_attn.backends.cpu import blocked
from fused_attn.integrations.sdpa import patched
from fused_attn.nn import MultiheadAttention, d2l

pytestmark = [pytest.mark.slow, pytest.mark.peers]
README = Path(fa.__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in [name for name in vars(blocked) if name.startswith("EAGER_")]:
        monkeypatch.setattr(blocked, limit, 0)  # uncompiled calls this small would run on eager, with other bits
    torch._dynamo.reset()


def same(got: Any, want: Any, roundings: int = 64) -> None:
    """Equal but for the rounding of elementwise parts that inductor fuses."""
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert (a - b).abs().max() <= roundings * torch.finfo(b.dtype).eps * (1 + b.abs().max())


def first_example() -> tuple[dict[str, Any], Callable[..., tuple[Tensor, ...]]]:
    """README's block under "Any of these": what stands before its second blank line, run, and the rest as a function of q, k, v and lengths."""
    block = re.search(r"## Any of these.*?```python\n(.*?)```", README.read_text(), re.S)[1]
    setup, calls = re.split(r"\n\n(?=out = )", block, maxsplit=1)
    names: dict[str, Any] = {}
    exec(setup, names)
    body = "\n".join(f"    {line}" for line in calls.replace("\nout, aux =", "\nmore, aux =").splitlines())
    exec(f"def example(q, k, v, lengths):\n{body}\n    return out, more, aux.probs, aux.lse", names)
    return names, names["example"]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_the_first_example_of_the_readme(gradients: bool, dynamic: bool) -> None:
    names, example = first_example()
    inputs = [names[name].detach().clone().requires_grad_(gradients) for name in "qkv"]
    want = example(*inputs, names["lengths"])
    got = torch.compile(example, fullgraph=True, dynamic=dynamic)(*inputs, names["lengths"])
    same(got, want)
    if gradients:
        dout = [torch.randn(t.shape) for t in want]
        same(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout))


@pytest.mark.parametrize("changed", [False, True], ids=["same-code", "changed-code"])
def test_graphs_kept_on_disk_are_of_the_code_that_runs(changed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward from the cache calls the ops as the code of that day did, so code that has changed may not find it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    hits = []
    for code in ("before", "after" if changed else "before"):
        monkeypatch.setattr(fingerprint, "PACKAGE", code)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        out = torch.compile(lambda q: fa.attention(q, q, q, mask=fa.Causal()), fullgraph=True)(q)
        same(torch.autograd.grad(out.sum(), q), torch.autograd.grad(fa.attention(q, q, q, mask=fa.Causal()).sum(), q))
        hits.append(torch._dynamo.utils.counters["inductor"]["fxgraph_cache_hit"])
    assert hits == [0, 0 if changed else 2]  # forward and backward


def test_graphs_kept_on_disk_tell_patched_from_unpatched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of ``nn.MultiheadAttention`` reads the same with both, and with this package's code of another day."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layer, x = nn.MultiheadAttention(24, 3, batch_first=True), torch.randn(2, 5, 24)
    hits = []

    def run() -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        out = torch.compile(lambda x: layer(x, x, x, need_weights=False)[0])(x)
        same([out], [layer(x, x, x, need_weights=False)[0]])
        out.sum().backward()  # what has a backward is kept once that is compiled
        hits.append(torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"])

    for code in ("before", "before", "after"):
        monkeypatch.setattr(fingerprint, "PACKAGE", code)
        with patched():
            run()
    run()
    with patched("eager"):
        run()
    run()
    assert hits == [0, 1, 0, 0, 0, 1]


def merged(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    return fa.attention(q, k, v, mask=fa.Causal()).transpose(1, 2).reshape(batch, length, heads * dim)


def patched_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2.0


@pytest.mark.parametrize("function", [merged, patched_function], ids=["merged-heads", "patched"])
def test_lengths_may_change(function: Callable[..., Tensor]) -> None:
    compiled = torch.compile(function, fullgraph=True)
    with patched():
        for length in (9, 17, 40):
            inputs = [torch.randn(2, 3, length, 16).requires_grad_() for _ in range(3)]
            got, want = compiled(*inputs), function(*inputs)
            same([got], [want])
            dout = torch.randn(want.shape)
            same(torch.autograd.grad(got, inputs, dout), torch.autograd.grad(want, inputs, dout))


@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "training"])
def test_multihead_attention(gradients: bool) -> None:
    layer = nn.MultiheadAttention(24, 3, batch_first=True).train(gradients)
    x, padding = torch.randn(2, 11, 24).requires_grad_(gradients), torch.arange(11).expand(2, 11) > torch.tensor([[10], [6]])

    def run(x: Tensor) -> Tensor:
        out: Tensor = layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return out

    with patched():
        got, want = torch.compile(run, fullgraph=True)(x), run(x)
    same([got], [want])
    if gradients:
        leaves, dout = [x, *layer.parameters()], torch.randn(want.shape)
        same(torch.autograd.grad(got, leaves, dout), torch.autograd.grad(want, leaves, dout))


def test_a_training_step_of_a_transformer_encoder() -> None:
    """Two layers, patched and compiled, after one step of SGD: the weights that the uncompiled step of torch's own attention gives."""
    x, target = torch.randn(2, 11, 24), torch.randn(2, 11, 24)
    padding = torch.arange(11).expand(2, 11) > torch.tensor([[10], [6]])
    weights = []
    for is_ours in (True, False):
        torch.manual_seed(1)
        layer = nn.TransformerEncoderLayer(24, 3, 32, dropout=0.0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        optimiser = torch.optim.SGD(encoder.parameters(), lr=0.1)

        def step(encoder: nn.Module = encoder) -> Tensor:
            return F.mse_loss(encoder(x, src_key_padding_mask=padding), target)

        if is_ours:
            with patched():
                torch.compile(step, fullgraph=True)().backward()
        else:
            step().backward()
        optimiser.step()
        weights.append([p.detach() for p in encoder.parameters()])
    same(*weights)


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out, aux = fa.attention(q, k, v, score_mods=(fa.SoftCap(4.0), fa.Bias(bias)), return_aux=fa.AuxRequest(probs=True, lse=True))
        return fa.attention(q, k, v, mask=fa.Causal()), out, aux.probs, aux.lse, fa.masked_softmax(bias, fa.Causal())


def test_aot_inductor() -> None:
    """It hands an empty list of modifications' tensors over as None."""
    inputs = (*(torch.randn(2, 3, 16, 8) for _ in range(3)), torch.randn(3, 16, 16))
    with tempfile.TemporaryDirectory() as folder:
        program = torch.export.export(Attend(), inputs)
        package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/attend.pt2")
        same(torch._inductor.aoti_load_package(package)(*inputs), Attend()(*inputs))


@pytest.mark.parametrize("name", ["nn.MultiheadAttention", "d2l.MultiHeadAttention", "d2l.AdditiveAttention"])
def test_layers_with_a_sequence_without_keys(name: str) -> None:
    """Heads are views of a projection, so that q lies in another order than its shape says."""
    padding = torch.arange(6) >= torch.tensor([[0], [4]])
    layer: nn.Module = {
        "nn.MultiheadAttention": lambda: MultiheadAttention(16, 4, batch_first=True),
        "d2l.MultiHeadAttention": lambda: d2l.MultiHeadAttention(16, 16, 16, 16, 4),
        "d2l.AdditiveAttention": lambda: d2l.AdditiveAttention(16, 16, 8),
    }[name]()
    options = {"key_padding_mask": padding} if "nn" in name else {"valid_lens": torch.tensor([0, 4])}
    x = torch.randn(2, 6, 16, requires_grad=True)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True)):
        out = call(x, x, x, **options)
        outputs = out if isinstance(out, tuple) else (out,)
        leaves = [x, *layer.parameters()]
        results.append([*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(t).cumsum(-1) for t in outputs])])
    same(results[1], results[0])
