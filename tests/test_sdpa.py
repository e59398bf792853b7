"""``fa.scaled_dot_product_attention`` against torch's own function, under the error rule."""

import pytest
import torch

import fused_attn as fa
from tests.torch_reference import ORIGINAL, compare, ours, qkv, randn, run

BACKENDS = ("auto", "eager")


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
