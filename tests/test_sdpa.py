"""``fa.scaled_dot_product_attention`` and the patch against torch's own function, under the error rule."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_attn as fa
from fused_attn.functional import torch_attention
from fused_attn.integrations import sdpa
from fused_attn.testing import excess

BACKENDS = ("auto", "eager")
ORIGINAL = F.scaled_dot_product_attention
DEFAULTS = {"dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def ours(backend):
    def call(q, k, v, attn_mask=None, **options):
        return torch_attention((q, k, v), attn_mask, DEFAULTS | options, backend)

    return call


def run(function, tensors, mask, options):
    """Output and gradients of q, k, v and a float mask, all through a fixed incoming gradient."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in (*tensors, *([] if mask is None else [mask]))]
    out = function(*leaves[:3], attn_mask=leaves[3] if mask is not None else None, **options)
    incoming = torch.cos(torch.arange(out.numel(), dtype=torch.float64)).view(out.shape).to(out.dtype)
    wanted = [t for t in leaves if t.requires_grad]
    grads = torch.autograd.grad(out, wanted, incoming)
    return {"out": out.detach()} | {f"d{n}": g for n, g in zip(("q", "k", "v", "mask"), grads, strict=False)}


def summed_magnitude(tensors, mask, options):
    """A broadcast mask's gradient, summed with the signs taken away: what its rounding is relative to."""
    full = (*torch.broadcast_shapes(*(t.shape[:-2] for t in tensors), mask.shape[:-2]), tensors[0].shape[-2], tensors[1].shape[-2])
    return run(ORIGINAL, tensors, mask.expand(full).contiguous(), options)["dmask"].abs().sum_to_size(mask.shape)


def compare(tensors, mask=None, backend="auto", **options):
    """|ours - float64| <= 2 * |torch - float64| + rounding of the terms that are summed, for the output and every gradient."""
    wide = [t.double() for t in tensors]
    wide_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    with sdpa_kernel(SDPBackend.MATH):  # torch's CPU flash backward is wrong on rows masked with finite fills
        exact = run(ORIGINAL, wide, wide_mask, options)
        plain = run(ORIGINAL, tensors, mask, options)
    got = run(ours(backend), tensors, mask, options)
    # What summing that many rounded terms may add at six standard deviations (see testing's Rounding): float64 has no finer judge.
    step = (
        torch.finfo(tensors[0].dtype).eps
        * (tensors[0].shape[-1] + tensors[2].shape[-1] + tensors[0].shape[-2] + tensors[1].shape[-2]) ** 0.5
    )
    for name, value in exact.items():
        assert got[name].dtype == plain[name].dtype
        magnitude = value if name != "dmask" else summed_magnitude(wide, wide_mask, options)
        band = torch.full_like(value, step * float(magnitude.abs().max() if magnitude.numel() else 0.0))
        assert (message := excess(name, got[name], plain[name], value, band)) is None, message


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def qkv(q_len=7, kv_len=11, dim=8, value_dim=8, lead=(2, 4), kv_lead=None, dtype=torch.float32):
    kv_lead = lead if kv_lead is None else kv_lead
    return [
        randn(*lead, q_len, dim, dtype=dtype),
        randn(*kv_lead, kv_len, dim, dtype=dtype, seed=1),
        randn(*kv_lead, kv_len, value_dim, dtype=dtype, seed=2),
    ]


@pytest.mark.quick
@pytest.mark.parametrize("lead", [(), (3,), (2, 4), (2, 3, 2), (2, 1, 3, 2)], ids=lambda lead: f"{len(lead) + 2}d")
@pytest.mark.parametrize("route", BACKENDS)
def test_every_rank(lead, route):
    compare(qkv(lead=lead), backend=route)


BROADCASTS = {
    "batch-of-one": ((2, 4), (1, 4)), "one-head": ((2, 4), (2, 1)), "missing-heads": ((2, 4), (4,)), "no-lead": ((2, 4), ()),
    "one-query-batch": ((1, 4), (2, 4)), "lower-rank-query": ((4,), (2, 4)), "5d": ((2, 1, 4), (3, 1)),
}  # fmt: skip


@pytest.mark.parametrize(("lead", "kv_lead"), [pytest.param(*v, id=k) for k, v in BROADCASTS.items()])
def test_leading_dimensions_broadcast(lead, kv_lead):
    compare(qkv(lead=lead, kv_lead=kv_lead))


MASK_SHAPES = [
    (7, 11),
    (1, 11),
    (7, 1),
    (1, 1),
    (4, 7, 11),
    (1, 7, 11),
    (4, 1, 1),
    (2, 4, 7, 11),
    (2, 1, 7, 11),
    (1, 4, 7, 11),
    (2, 1, 1, 11),
    (2, 4, 1, 11),
    (1, 1, 7, 1),
]


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_bool_masks_of_every_broadcast_shape(shape, route):
    compare(qkv(), randn(*shape) > -0.3, route)


@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_float_masks_of_every_broadcast_shape_with_gradient(shape, route):
    compare(qkv(), randn(*shape), route)


@pytest.mark.parametrize(
    ("lead", "shape"),
    [
        ((), (7, 11)),
        ((3,), (3, 7, 11)),
        ((3,), (1, 7, 1)),
        ((2, 3, 2), (2, 1, 2, 7, 11)),
        ((2, 3, 2), (1, 1, 1, 1, 11)),
        ((2, 3, 2), (3, 1, 7, 11)),
    ],
    ids=str,
)
def test_masks_of_other_ranks(lead, shape):
    compare(qkv(lead=lead), randn(*shape) > -0.3)
    compare(qkv(lead=lead), randn(*shape))


@pytest.mark.quick
@pytest.mark.parametrize("route", BACKENDS)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_fully_masked_rows_give_zeros_and_zero_gradients(kind, route):
    keep = randn(2, 1, 7, 11) > -0.3
    keep[0, 0, 3] = False
    mask = keep if kind == "bool" else torch.zeros(keep.shape).masked_fill(~keep, -torch.inf)
    compare(qkv(), mask, route)
    got = run(ours(route), qkv(), mask, {})
    assert not got["out"][0, :, 3].any()
    assert not got["dq"][0, :, 3].any()


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9, -1e4], ids=["finfo-min", "1e9", "1e4"])
@pytest.mark.parametrize("route", BACKENDS)
def test_rows_masked_with_finite_fills_are_uniform(fill, route):
    keep = randn(2, 1, 7, 11) > -0.3
    keep[1, 0, 5] = False
    compare(qkv(), torch.zeros(keep.shape).masked_fill(~keep, fill), route)


@pytest.mark.quick
@pytest.mark.parametrize("lengths", [(7, 7), (7, 11), (11, 7), (1, 9), (9, 1)], ids=str)
@pytest.mark.parametrize("route", BACKENDS)
def test_is_causal_is_top_left(lengths, route):
    compare(qkv(*lengths), is_causal=True, backend=route)


@pytest.mark.parametrize("scale", [0.3, 1.0, 0.0, -0.5, 3], ids=str)
def test_scale(scale):
    compare(qkv(), scale=scale)


GROUPS = {
    "gqa": ((2, 6), (2, 2)),
    "mqa": ((2, 6), (2, 1)),
    "3d": ((6,), (2,)),
    "5d": ((2, 1, 6), (2, 3, 2)),
    "batch-broadcast": ((2, 6), (1, 3)),
}


@pytest.mark.parametrize(("lead", "kv_lead"), [pytest.param(*v, id=k) for k, v in GROUPS.items()])
def test_grouped_heads(lead, kv_lead):
    compare(qkv(lead=lead, kv_lead=kv_lead), enable_gqa=True)


def test_grouped_heads_with_different_key_and_value_heads():
    q, k, _ = qkv(lead=(2, 6), kv_lead=(2, 2))
    compare([q, k, qkv(lead=(2, 3))[2]], enable_gqa=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"mask": True}], ids=["plain", "causal", "mask"])
def test_dtypes(dtype, options):
    mask = randn(7, 11) > 0 if "mask" in options else None
    compare(qkv(dtype=dtype), mask, is_causal=options.get("is_causal", False))


@pytest.mark.parametrize("sizes", [(0, 5, 8, 8), (5, 0, 8, 8), (5, 5, 8, 3), (5, 5, 8, 0), (1, 1, 1, 1)], ids=str)
def test_empty_and_odd_sizes(sizes):
    compare(qkv(*sizes))


def test_dropout_removes_the_asked_share_and_keeps_the_mean():
    q, k = torch.zeros(2, 4, 64, 8), torch.zeros(2, 4, 256, 8)
    torch.manual_seed(0)
    out = fa.scaled_dot_product_attention(q, k, torch.eye(256).expand(2, 4, -1, -1), dropout_p=0.25)
    kept, n = (out > 0).double().mean(), out.numel()
    assert abs(kept - 0.75) < 6 * (0.25 * 0.75 / n) ** 0.5  # six standard deviations
    assert out[out > 0].unique().numel() == 1
    assert (out[out > 0][0] * 256 * 0.75 - 1).abs() <= torch.finfo(out.dtype).eps * 4


def test_dropout_obeys_manual_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return fa.scaled_dot_product_attention(*qkv(), dropout_p=0.5)

    assert draw(1).equal(draw(1))
    assert not draw(1).equal(draw(2))


def test_dropout_of_everything_and_nothing():
    assert not fa.scaled_dot_product_attention(*qkv(), dropout_p=1.0).any()
    assert fa.scaled_dot_product_attention(*qkv(), dropout_p=0).equal(fa.scaled_dot_product_attention(*qkv()))


@pytest.mark.quick
def test_signature_is_torchs():
    with pytest.raises(TypeError):
        fa.scaled_dot_product_attention(*qkv(), None, 0.0, False, 0.5)
    with pytest.raises(TypeError):
        ORIGINAL(*qkv(), None, 0.0, False, 0.5)
    named = dict(zip(("query", "key", "value"), qkv(), strict=True))
    assert fa.scaled_dot_product_attention(**named, attn_mask=None, dropout_p=0.0, is_causal=True, scale=None, enable_gqa=False).shape == (
        2,
        4,
        7,
        8,
    )


# The patch


class Counting:
    """A backend that counts its attention calls and passes them on to a built-in one."""

    name = "counting"

    def __init__(self, inner):
        self.inner, self.calls = inner, 0

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def reluctance(self, problem):
        return None

    def attention_fwd(self, call):
        self.calls += 1
        return self.inner.attention_fwd(call)


@pytest.fixture
def counting():
    from fused_attn import backends

    backend = Counting(backends.get("cpu"))
    backends.register(backend)
    yield backend
    backends.unregister("counting")


@pytest.mark.quick
def test_patched_routes_and_restores(counting):
    with sdpa.patched():
        assert F.scaled_dot_product_attention is not ORIGINAL
        assert torch.nn.functional.scaled_dot_product_attention(*qkv()).shape == (2, 4, 7, 8)
        assert counting.calls == 1
    assert F.scaled_dot_product_attention is ORIGINAL
    F.scaled_dot_product_attention(*qkv())
    assert counting.calls == 1


def test_patched_restores_after_an_error():
    with pytest.raises(ZeroDivisionError), sdpa.patched():
        raise ZeroDivisionError
    assert F.scaled_dot_product_attention is ORIGINAL


def test_patched_is_a_decorator(counting):
    @sdpa.patched(backend="counting")
    def model(x):
        return F.scaled_dot_product_attention(x, x, x)

    for calls in (1, 2):
        model(randn(1, 2, 3, 4))
        assert counting.calls == calls
        assert F.scaled_dot_product_attention is ORIGINAL


def test_innermost_backend_counts(counting):
    with sdpa.patched("eager"):
        with sdpa.patched("counting"):
            F.scaled_dot_product_attention(*qkv())
        assert counting.calls == 1
        F.scaled_dot_product_attention(*qkv())
        assert counting.calls == 1
        assert F.scaled_dot_product_attention is not ORIGINAL
    assert F.scaled_dot_product_attention is ORIGINAL


def test_install_is_idempotent_and_survives_patched(counting):
    for _ in range(2):
        sdpa.install("counting")
    with sdpa.patched("eager"):
        F.scaled_dot_product_attention(*qkv())
    assert counting.calls == 0
    F.scaled_dot_product_attention(*qkv())
    assert counting.calls == 1
    sdpa.uninstall()
    assert F.scaled_dot_product_attention is ORIGINAL
    sdpa.uninstall()
    assert F.scaled_dot_product_attention is ORIGINAL


def test_another_patch_over_ours_is_left_alone(monkeypatch):
    with sdpa.patched():
        inner = F.scaled_dot_product_attention
        theirs = lambda *a, **k: inner(*a, **k)  # noqa: E731
        monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    assert F.scaled_dot_product_attention is theirs
    assert theirs(*qkv()).equal(ORIGINAL(*qkv()))
    monkeypatch.undo()
    F.scaled_dot_product_attention = ORIGINAL
    sdpa._displaced.clear()


def test_threads_that_overlap_restore_the_original():
    barrier, failures = threading.Barrier(4), []

    def work():
        try:
            for _ in range(20):
                with sdpa.patched("eager"):
                    F.scaled_dot_product_attention(*qkv())
                    barrier.wait(30)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert F.scaled_dot_product_attention is ORIGINAL


def test_explicit_backend_does_not_fall_back():
    with sdpa.patched(backend="tpu"), pytest.raises(ValueError, match="backend must be"):
        F.scaled_dot_product_attention(*qkv())


class Tagged(torch.Tensor):
    """A tensor subclass, as another library would bring one."""


@pytest.mark.parametrize("kind", ["nested", "subclass", "meta"])
def test_other_than_plain_tensors_go_to_torch(kind, counting):
    x = {
        "nested": lambda: torch.nested.nested_tensor([randn(3, 2, 4), randn(5, 2, 4)], layout=torch.jagged).transpose(1, 2),
        "subclass": lambda: randn(1, 2, 3, 4).as_subclass(Tagged),
        "meta": lambda: torch.empty(1, 2, 3, 4, device="meta"),
    }[kind]()
    expected = ORIGINAL(x, x, x)
    with sdpa.patched():
        out = F.scaled_dot_product_attention(x, x, x)
    assert type(out) is type(expected)
    assert counting.calls == 0


def test_a_backend_that_calls_torchs_function_does_not_recurse():
    with sdpa.patched():
        for options in ({}, {"is_causal": True}):
            compare(qkv(64, 64), **options)


# Modules of torch under the patch


def parameters_and_grads(module, call):
    module.zero_grad()
    out = call(module)
    # Not out.sum(): behind a layer norm its gradient is zero, and only rounding would be compared.
    out.backward(randn(*out.shape, dtype=out.dtype, seed=1))
    return {"out": out.detach()} | {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def compare_module(make, call):
    """Output and parameter gradients of a module under the patch, held to the error rule."""
    torch.manual_seed(0)
    module = make()
    plain = parameters_and_grads(module, lambda m: call(m, torch.float32))
    with sdpa.patched():
        got = parameters_and_grads(module, lambda m: call(m, torch.float32))
    exact = parameters_and_grads(module.double(), lambda m: call(m, torch.float64))
    for name, value in exact.items():
        band = torch.full_like(value, torch.finfo(torch.float32).eps * float(value.abs().max()))
        assert (message := excess(name, got[name], plain[name], value, band)) is None, message


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True, "attn_mask": True}, {"key_padding_mask": True}], ids=["plain", "causal", "padding"]
)
def test_torchs_multihead_attention(options, counting):
    def call(module, dtype):
        x = randn(2, 6, 16, dtype=dtype)
        arguments = dict(options)
        if "attn_mask" in arguments:
            arguments["attn_mask"] = torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=dtype)
        if "key_padding_mask" in arguments:
            arguments["key_padding_mask"] = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
        return module(x, x, x, need_weights=False, **arguments)[0]

    compare_module(lambda: torch.nn.MultiheadAttention(16, 4, batch_first=True), call)
    assert counting.calls == 1


def test_torchs_encoder_layer(counting):
    def call(module, dtype):
        return module(randn(2, 6, 16, dtype=dtype), src_key_padding_mask=torch.tensor([[False] * 6, [False] * 4 + [True] * 2]))

    compare_module(lambda: torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), call)
    assert counting.calls == 1


def test_compiled_function_follows_the_patch():
    torch._dynamo.reset()

    def model(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    x, compiled = randn(1, 2, 5, 8), torch.compile(model, backend="aot_eager", fullgraph=True)
    with sdpa.patched("eager"):
        expected = model(x)
        assert compiled(x).equal(expected)
    assert compiled(x).equal(ORIGINAL(x, x, x, is_causal=True))


def test_compiled_layer_under_the_patch(counting):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    x = randn(2, 6, 16)
    with sdpa.patched():
        expected = layer(x)
        calls = counting.calls
        out = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
        assert counting.calls > calls
    assert out.allclose(expected, rtol=0, atol=float(torch.finfo(x.dtype).eps * expected.abs().max() * 16**0.5))
