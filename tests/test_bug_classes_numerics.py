"""Historical bugs of other libraries, parts B and C: numerics, shape bands, large sizes."""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn import dropout as dropout_module
from fused_attn.kernel_dropout import KernelDropout
from fused_attn.lowering import Grid
from fused_attn.testing import DIFFERENTIABLE, EVERYTHING, Case, SoftmaxCase, check, check_inputs, check_softmax, inputs_of

quick = pytest.mark.quick


@quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_17_huge_equal_logits(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """pytorch#121558, FlashMLA#68: x * scale - max * scale with a fused multiply-add gave NaN at 133120."""
    value = 133120.0 if dtype != torch.float16 else 60000.0
    out = fa.masked_softmax(torch.full((2, 70), value, dtype=dtype, device=device), scale=0.0883883, backend=backend)
    torch.testing.assert_close(out, torch.full_like(out, 1 / 70))
    q = torch.full((1, 1, 5, 16), value**0.5, dtype=dtype, device=device)
    v = torch.randn(1, 1, 70, 16, dtype=dtype, device=device)
    out, aux = fa.attention(q, q[:, :, :1].expand(1, 1, 70, 16), v, return_aux=EVERYTHING, backend=backend)
    assert out.isfinite().all()
    torch.testing.assert_close(aux.probs, torch.full_like(aux.probs, 1 / 70))


@quick
@pytest.mark.parametrize("power", [28, 31, 126])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_17_equal_and_neighbouring_logits_of_any_size(dtype: torch.dtype, power: int, backend: str, device: torch.device) -> None:
    """The rounding of a row's base is in all of its weights where an exponent is one fused multiply-add: a small factor up to 2^26 alone."""
    level = (torch.tensor([1.3, -1.7, 1.0], device=device) * 2.0**power)[:, None]
    below = level.nextafter(torch.full_like(level, -torch.inf))
    bias = torch.where(torch.arange(70, device=device) % 3 == 0, below, level)
    q, k, v = torch.zeros(1, 1, 3, 16, device=device), *torch.randn(2, 1, 1, 70, 16, device=device)
    leaves = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    out = fa.attention(*leaves, score_mods=(fa.Bias(bias),), backend=backend)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    right = torch.softmax(exact[0] @ exact[1].mT / 4 + bias.double(), -1) @ exact[2]
    dout = torch.randn_like(right)
    got = (out, *torch.autograd.grad(out, leaves, dout.to(dtype)))
    for a, b in zip(got, (right, *torch.autograd.grad(right, exact, dout)), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=8 * torch.finfo(dtype).eps * float(b.abs().max()))


@quick
@pytest.mark.parametrize(("level", "keys"), [(97333952.0, 200), (96853784.0, 200), (-1.3e8, 250), (-1.2e8, 2), (1.5e8, 60)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_17_gradients_of_huge_equal_logits(dtype: torch.dtype, level: float, keys: int, backend: str, device: torch.device) -> None:
    """The roundings of a base and of the sum's logarithm beside it are up to 2^16 in a weight that is normalised too late for float16."""
    bias = torch.full((4, keys), level, device=device)
    for size in (300.0, 1e-3):
        leaves = [torch.randn(1, 1, n, 16, device=device).to(dtype).requires_grad_() for n in (4, keys, keys)]
        q, k, v = (t.detach().double() for t in leaves)
        dout = (torch.randn(1, 1, 4, 16, device=device) * size).to(dtype)
        out = fa.attention(*leaves, q_offset=0, score_mods=(fa.Bias(bias),), backend=backend)
        got = (out, *torch.autograd.grad(out, leaves, dout))
        # Beside the bias float32 has no room for q k^T: all weights are equal.
        weights = torch.full((4, keys), 1 / keys, dtype=torch.float64, device=device)
        dp = dout.double() @ v.mT
        ds = weights * (dp - (dp * weights).sum(-1, keepdim=True)) / 4
        for a, b in zip(got, (weights @ v, ds @ k, ds.mT @ q, weights.mT @ dout.double()), strict=True):
            # And three steps of the smallest numbers, which float16's gradients of 1e-4 are near.
            atol = torch.finfo(dtype).eps * (8 * float(b.abs().max()) + 3 * torch.finfo(dtype).smallest_normal)
            torch.testing.assert_close(a.double(), b, rtol=0, atol=atol)


@quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_17_thousands_of_keys_one_step_below_the_top(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Beyond 2^28 a step of float32 is 2^-23 in weight, which thousands of keys make 2^-11."""
    top = torch.tensor(2.0**28 / 1.4426950408889634 * 1.00001)
    bias = torch.full((1, 4000), float(top.nextafter(torch.tensor(-torch.inf))), device=device)
    bias[:, 0] = float(top)
    q, k, v = (torch.zeros(1, 1, n, 16, dtype=dtype, device=device) for n in (1, 4000, 4000))
    v[:, :, 1:] = 1.0
    right = torch.softmax(bias.double(), -1)[0, 1:].sum()
    out = fa.attention(q, k, v, score_mods=(fa.Bias(bias),), backend=backend)
    # A weight of 2^-23 is two steps of float16's smallest number; bfloat16 rounds it, and float32 its exponent of 23 (1.4e-5 in eager).
    rtol = {torch.float16: 0.1, torch.bfloat16: 8 * torch.finfo(dtype).eps, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(out.double(), right.expand_as(out), rtol=rtol, atol=0)


@quick
def test_18_constant_large_inputs_many_steps(backend: str, device: torch.device) -> None:
    """pytorch#119320, #125674: NaN gradients in float32 with constant inputs of 1000."""
    leaves = [torch.full((1, 2, 70, 16), 1000.0, device=device, requires_grad=True) for _ in range(3)]
    for _ in range(3):
        out = fa.attention(*leaves, mask=fa.Causal(), backend=backend)
        torch.testing.assert_close(out, leaves[2].mean(2, keepdim=True).expand_as(out), rtol=1e-4, atol=0)
        grads = torch.autograd.grad(out.mean(), leaves)
        assert all(g.isfinite().all() for g in grads)
        leaves = [(t - g).detach().requires_grad_() for t, g in zip(leaves, grads, strict=True)]


@quick
@pytest.mark.parametrize("lengths", list(itertools.product((1, 2, 3), repeat=2)), ids=str)
def test_19_20_tiny_lengths(lengths: tuple[int, int], backend: str, device: torch.device) -> None:
    """FlashAttention#334, #443: NaN dQ at one query, or with a key segment of length one."""
    check(Case((1, 2, 1), lengths, (16, 16)), backend, device, DIFFERENTIABLE)
    check(Case((1, 2, 1), lengths, (16, 16), torch.float16, ("Causal0",), offset="bottom"), backend, device, DIFFERENTIABLE)
    ids = torch.arange(lengths[1], device=device)  # documents of one key each
    q, k, v = (torch.randn(1, 2, n, 16, device=device) for n in (lengths[0], lengths[1], lengths[1]))
    check_inputs(inputs_of(q, k, v, mask=fa.Documents(ids), q_offset=0), backend)


@quick
def test_21_float32_products_are_float32(backend: str, device: torch.device) -> None:
    """triton_docs_tutorials#6: tl.dot's TF32 default on float32 made gradient errors of 0.72. The error rule catches TF32 (see test_definition)."""
    check(Case((1, 2, 2), (128, 128), (64, 64)), backend, device, DIFFERENTIABLE)


@quick
def test_22_softmax_of_every_length(backend: str, device: torch.device) -> None:
    """Megatron-LM#132, PR#133: the fused masked softmax was wrong below 128. Every length from 1 to 260, forward and backward."""
    for length in range(1, 261):
        scores = torch.randn(2, length, device=device, requires_grad=True)
        out, want = fa.masked_softmax(scores, backend=backend), scores.softmax(-1)
        torch.testing.assert_close(out, want, msg=lambda m, n=length: f"length {n}: {m}")
        incoming = torch.randn_like(out)
        grad, expected = (torch.autograd.grad(o, scores, incoming)[0] for o in (out, want))
        torch.testing.assert_close(grad, expected, msg=lambda m, n=length: f"gradient at length {n}: {m}")


@quick
@pytest.mark.parametrize("power", range(1, 15))
def test_23_bands_around_powers_of_two(power: int, backend: str, device: torch.device) -> None:
    """torch-xpu-ops#4772: wrong from 2^k + 1 on, to the end of the band."""
    for length in sorted({2**power - 1, 2**power, 2**power + 1, 2**power + 2 ** (power - 1) + 1}):
        check_softmax(
            SoftmaxCase((2, length), mask="bool", full=(0, 1), dtype=torch.float16 if power % 2 else torch.float32), backend, device
        )


@pytest.mark.parametrize("length", [65537, 131072])
def test_24_long_rows_and_which_kernel_runs(length: int, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger-Kernel#1252: the path above 65536 columns was never reached by the test that meant it, and did not compile."""
    if backend == "triton":
        calls = []
        module = importlib.import_module("fused_attn.backends.triton.softmax")
        monkeypatch.setattr(module, "softmax_fwd", lambda c, _f=module.softmax_fwd: (calls.append(c.shape), _f(c))[1])
        fa.masked_softmax(torch.randn(1, length, device=device), backend=backend)
        assert calls and calls[0][3] == length
        monkeypatch.undo()
    check_softmax(SoftmaxCase((1, length), mask="ValidLengths0"), backend, device)
    check_softmax(SoftmaxCase((1, length), log=True, bias=True, full=(1,)), backend, device)


@quick
@pytest.mark.parametrize("cols", range(1, 9))
def test_25_rows_narrower_than_a_warp(cols: int, backend: str, device: torch.device) -> None:
    """torch-mojo-backend#319: threads that saw no element made NaN of narrow rows."""
    for rows in (1, 3, 130):
        check_softmax(SoftmaxCase((rows, cols), mask="ValidLengths1"), backend, device)


@pytest.mark.parametrize("dim", [*range(1, 18), 31, 33, 47, 63, 65, 72, 100, 127, 129, 144, 200, 224, 255, 256])
def test_26_every_head_size(dim: int, backend: str, device: torch.device) -> None:
    """triton#621: head size 128 silently used its first 64 columns. The last column decides the result here."""
    value_dim = max(1, dim * 2 // 3)
    check(Case((1, 2, 1), (17, 19), (dim, value_dim)), backend, device)
    q, k, v = (
        torch.zeros(1, 1, 1, dim, device=device),
        torch.zeros(1, 1, 2, dim, device=device),
        torch.zeros(1, 1, 2, value_dim, device=device),
    )
    q[..., -1], k[0, 0, 1, -1], v[0, 0, 1, -1] = 100.0, 1.0, 5.0
    out = fa.attention(q, k, v, scale=1.0, backend=backend)
    assert out.flatten()[-1] == 5.0


@quick
@pytest.mark.parametrize("q_len", [1, 2, 15, 17, 31, 33, 63, 65, 100])
def test_27_ragged_query_lengths(q_len: int, backend: str, device: torch.device) -> None:
    """triton#2059, triton-lang/kernels#6, kernl#73: wrong or failing where q_len is tiny or no multiple of the tile."""
    check(Case((1, 2, 2), (q_len, 70), (16, 16), masks=("SlidingWindow0",), offset="bottom"), backend, device)


def test_28_no_hidden_length_limit(backend: str, device: torch.device) -> None:
    """apex#916, Megatron-LM#260, TransformerEngine#636: hard caps at 1024 or 2048."""
    check(Case((1, 1, 1), (5, 4097), (8, 8), masks=("Causal0",), offset="bottom"), backend, device)
    check_softmax(SoftmaxCase((1, 2, 4097), mask="Causal0"), backend, device)


@pytest.mark.cuda("more than 2^31 elements need tens of gigabytes")
def test_29_more_than_2_31_elements(backend: str, device: torch.device) -> None:
    """FlashAttention#1500, #2260, #1311, #767, #2214: 32-bit offsets in the backward at batches of 8300 to 28800."""
    if backend == "eager":
        pytest.skip("eager would need the whole score array besides")
    # Eight 16-bit tensors of 4 GiB with dout, and float32 sums of dq on Hopper.
    skip_without((8 * 4 + 8) * 2**30, device)
    batch = 2**31 // (16 * 64 * 64) + 3
    leaves = [torch.randn(batch, 16, 64, 64, device=device, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    out = fa.attention(*leaves, backend=backend)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    last = [t[-1:].detach().requires_grad_() for t in leaves]
    want = fa.attention(*last, backend=backend)
    assert torch.equal(out[-1:], want)
    for got, expected in zip(grads, torch.autograd.grad(want, last, torch.ones_like(want)), strict=True):
        torch.testing.assert_close(got[-1:], expected)


def skip_without(size: int, device: torch.device) -> None:
    """Skips where a GPU, which gives every byte memory, has less than ``size`` free: so it is where other processes share it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if free < size + 2**29:
            pytest.skip(f"needs {size / 2**30:.0f} GiB and half a GiB of memory for all else; {free / 2**30:.1f} GiB are free")


def far_apart(values: Tensor, dim: int = 2) -> Tensor:
    """The values as a view whose stride along ``dim`` spans more than 2^31 bytes from the first to the last element.

    Untouched pages of the storage cost no memory. bfloat16 alone reaches 2^31 elements in 4 GiB of address space.
    """
    skip_without(4 * 2**30, values.device)
    step = 2**31 // max(1, values.shape[dim] - 1) + 64
    step -= step % 8
    others = [d for d in range(values.dim()) if d != dim]
    strides, run = [0] * values.dim(), 1
    for d in reversed(others):
        strides[d], run = run, run * values.shape[d]
    strides[dim] = step
    storage = torch.UntypedStorage(((values.shape[dim] - 1) * step + run) * values.element_size(), device=values.device)
    view = torch.tensor([], dtype=values.dtype, device=values.device).set_(storage, 0, values.shape, strides)
    view.copy_(values)
    return view


@pytest.mark.parametrize("place", ["q", "k", "v", "dout"])
def test_30_views_with_huge_strides(place: str, backend: str, device: torch.device) -> None:
    """FlashAttention#2611: cu_seqlens * stride overflowed when dout was a slice of a wide tensor. Small views, 2^31 elements apart."""
    tensors = {n: torch.randn(1, 2, 5, 8, device=device).bfloat16() for n in ("q", "k", "v", "dout")}
    results = []
    for wide in (False, True):
        t = {n: far_apart(x) if wide and n == place else x.clone() for n, x in tensors.items()}
        leaves = [t[n].detach().requires_grad_() for n in "qkv"]
        out = fa.attention(*leaves, mask=fa.Causal(), backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, t["dout"])])
    for narrow, wide_result in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide_result)


@pytest.mark.parametrize("kind", ["keep", "bias"])
@pytest.mark.parametrize("dim", [1, 2])
def test_31_mask_and_bias_with_huge_strides(dim: int, kind: str, backend: str, device: torch.device) -> None:
    """alexzhang13/flashattention2-custom-mask#2, xformers#788, pytorch#162588: mask offsets beyond 2^31 wrapped."""
    q, k, v = (torch.randn(1, 3, n, 8, device=device) for n in (5, 7, 7))
    values = torch.randn(1, 3, 5, 7, device=device).bfloat16()
    results = []
    for tensor in (
        (values, far_apart(values, dim))
        if kind == "bias"
        else (values > 0, far_apart((values > 0).view(torch.uint8), dim).view(torch.bool))
    ):
        options = {"score_mods": (fa.Bias(tensor.detach().requires_grad_()),)} if kind == "bias" else {"mask": tensor}
        out = fa.attention(q, k, v, backend=backend, **options)
        results.append([out.detach(), *(torch.autograd.grad(out.square().sum(), options["score_mods"][0].bias) if kind == "bias" else ())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dim", [0, 1])
def test_32_softmax_rows_far_apart(dim: int, backend: str, device: torch.device) -> None:
    """pytorch PR#192007, onnxruntime#32299, Paddle#71935, FastFold#20: row * stride overflowed 32 bits."""
    values, incoming = (torch.randn(3, 5, device=device).bfloat16() for _ in range(2))
    results = []
    for scores, gradient in ((values, incoming), (far_apart(values, dim), far_apart(incoming, dim))):
        leaf = scores.detach().requires_grad_()
        out = fa.masked_softmax(leaf, backend=backend)
        results.append((out.detach(), *torch.autograd.grad(out, leaf, gradient)))
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide)
    torch.testing.assert_close(results[1][0], values.float().softmax(-1).bfloat16())


@quick
def test_33_dropout_offsets_beyond_2_32() -> None:
    """pytorch PR#188015, #192138: the generator's offset wrapped at 2^32, and heads shared masks. Regions of a huge grid, in isolation."""
    grid = Grid((1 << 20, 64, 1 << 12, 1 << 12), torch.device("cpu"))
    lowered = KernelDropout(0.5, torch.tensor(3))
    seen = set()
    for b in (0, 1, 4, 2**14, 2**18, 2**20 - 1):
        for h in (0, 1, 63):
            part = dropout_module.keep_factor(lowered, grid.at((b, b + 1), (h, h + 1), (7, 8), (64, 192)), torch.float32)
            seen.add(tuple(part.flatten().tolist()))
            assert 30 < int((part != 0).sum()) < 98
    assert len(seen) == 18, "two heads or sequences share a mask"


@pytest.mark.parametrize("shape", [(65537, 1), (1, 65537), (257, 256)], ids=str)
def test_34_more_than_65535_heads(shape: tuple[int, int], backend: str, device: torch.device) -> None:
    """pytorch#142228, DeepSpeed#1239, fla#172, MagiAttention#40, flashinfer#3125: grid y or z above 65535, launches silently skipped."""
    if device.type == "cpu" and backend == "triton":
        pytest.skip("65537 programs take minutes in the interpreter, which has no grid limits; runs with --device cuda")
    if device.type == "cpu" and backend == "cuda" and shape != (65537, 1):
        pytest.skip("the simulator takes minutes for each shape; all run with --device cuda")
    leaves = [torch.randn(*shape, 2, 4, device=device, requires_grad=True) for _ in range(3)]
    out = fa.attention(*leaves, mask=fa.Causal(), backend=backend)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    want = fa.attention(*leaves, mask=fa.Causal(), backend="eager")
    torch.testing.assert_close(out, want)
    for got, expected in zip(grads, torch.autograd.grad(want, leaves, torch.ones_like(want)), strict=True):
        torch.testing.assert_close(got, expected)


@quick
def test_34_grid_limits_of_the_launchers(device: torch.device) -> None:
    """The same where no GPU is: no launcher may put something unbounded on grid axes y or z (65535 at most)."""
    if device.type == "cuda":
        pytest.skip("watches the interpreter's launches; the test above launches for real")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    import triton

    grids: list[tuple[int, ...]] = []
    interpreter = importlib.import_module("triton.runtime.interpreter")
    original = interpreter.GridExecutor.__call__

    def record(self: object, *args: object, **kwargs: object) -> None:
        grid = self.grid  # type: ignore[attr-defined]
        grids.append(tuple(grid(kwargs) if callable(grid) else grid))
        original(self, *args, **kwargs)

    assert triton.__version__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", record)
        batch, heads, length = 3, 2, 20
        q = torch.randn(batch, heads, length, 8, requires_grad=True)
        out, aux = fa.attention(q, q, q, mask=fa.Causal(), return_aux=EVERYTHING, backend="triton")
        (out.sum() + aux.probs.sum()).backward()
        scores = torch.randn(batch * heads, 5, length, requires_grad=True)
        fa.masked_softmax(scores, backend="triton").sum().backward()
    assert len(grids) >= 5, "nothing was launched"
    for grid in grids:
        assert all(n < batch for n in grid[1:]), f"an axis that can exceed 65535 is not the first one of {grid}"


@pytest.mark.parametrize("lengths", [(1, 1), (63, 65), (129, 127), (257, 3)], ids=str)
def test_35_materialised_outputs_stay_inside_their_memory(
    lengths: tuple[int, int], backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention#1054: return_softmax wrote outside at some lengths. Every allocation gets a guard zone that must stay untouched."""
    guards: list[tuple[Tensor, float]] = []
    if device.type == "cpu" and backend == "eager":
        pytest.skip("eager allocates through torch's own operations")
    if backend == "cuda":
        pytest.skip("the library allocates below Python; the simulator and compute-sanitizer check its every access")
    plain = torch.Tensor.new_empty

    def guarded(self: Tensor, *size: object, **kwargs: object) -> Tensor:
        shape = tuple(size[0]) if isinstance(size[0], (tuple, list, torch.Size)) else tuple(size)
        count = int(torch.Size(shape).numel())
        room = plain(self, (count + 512,), **kwargs)
        guards.append((room[:256], 1.0))
        guards.append((room[256 + count :], 1.0))
        for guard, _ in guards[-2:]:
            guard.fill_(1)
        return room[256 : 256 + count].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setattr(
        torch,
        "empty",
        lambda *size, **kw: guarded(torch.tensor([], dtype=kw.get("dtype") or torch.float32, device=kw.get("device")), *size),
    )
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **kw: guarded(t, tuple(t.shape), **({"dtype": kw["dtype"]} if kw.get("dtype") else {}))
    )
    q, k, v = (torch.randn(1, 2, n, 20, device=device, requires_grad=True) for n in (lengths[0], lengths[1], lengths[1]))
    out, aux = fa.attention(q, k, v, return_aux=EVERYTHING, backend=backend)
    torch.autograd.grad(out.sum() + aux.probs.square().sum() + aux.lse.sum(), (q, k, v))
    assert guards, "the backend allocates in a way this test does not see"
    assert all(bool((guard == value).all()) for guard, value in guards)
