"""``torch.nn.attention.bias.CausalBias``, a tensor without values: right as an ``attn_mask``, refused where values would be read."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right, causal_upper_left

import fused_attn as fa
from fused_attn.integrations import sdpa
from tests.torch_reference import ORIGINAL, compare, qkv, randn

pytestmark = pytest.mark.filterwarnings("ignore:Lower right causal bias will produce NaNs")

VARIANTS = {"upper-left": causal_upper_left, "lower-right": causal_lower_right}
LENGTHS = [(7, 7), (7, 11), (11, 7), (1, 9), (9, 1)]


def patched(*tensors, **options):
    with sdpa.patched():
        return F.scaled_dot_product_attention(*tensors, **options)


CALLS = {"patched": patched, "direct": fa.scaled_dot_product_attention}


@pytest.mark.quick
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [{}, {"scale": 0.3, "enable_gqa": True}], ids=["plain", "scale-gqa"])
def test_values_and_gradients(variant, lengths, call, options):
    bias = VARIANTS[variant](*lengths)
    tensors = qkv(*lengths, kv_lead=(2, 2) if "enable_gqa" in options else None)
    compare(tensors, bias._materialize(), call=lambda *t, attn_mask, **o: CALLS[call](*t, attn_mask=bias, **o), **options)


@pytest.mark.quick
def test_it_becomes_an_interval_and_no_dense_mask(counting, monkeypatch):
    seen = []
    monkeypatch.setattr(
        type(counting), "attention_fwd", lambda self, call: (seen.append(call.terms.mask), self.inner.attention_fwd(call))[1]
    )
    patched(*qkv(), attn_mask=causal_lower_right(7, 11))
    assert len(seen) == 1 and seen[0].keep is None and seen[0].right == 0


def test_rows_without_keys_are_zero():
    out = patched(*qkv(11, 7), attn_mask=causal_lower_right(11, 7))
    assert not out[:, :, :4].any() and out[:, :, 4:].any(-1).all()


def test_an_upper_left_bias_fits_every_length_as_in_torch():
    tensors, bias = qkv(5, 7), causal_upper_left(64, 64)
    assert patched(*tensors, attn_mask=bias).equal(fa.scaled_dot_product_attention(*tensors, is_causal=True))
    torch.testing.assert_close(patched(*tensors, attn_mask=bias), ORIGINAL(*tensors, attn_mask=bias))


def test_dropout():
    def draw(**options):
        torch.manual_seed(3)
        return patched(*qkv(9, 9), dropout_p=0.5, **options)

    assert draw(attn_mask=causal_lower_right(9, 9)).equal(draw(is_causal=True))
    assert not draw(attn_mask=causal_lower_right(9, 9)).equal(patched(*qkv(9, 9), attn_mask=causal_lower_right(9, 9)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_is_causal_is_a_runtime_error(variant):
    with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal"):
        patched(*qkv(), attn_mask=VARIANTS[variant](7, 11), is_causal=True)


def attend(x, y, bias):
    return F.scaled_dot_product_attention(x, y, y, attn_mask=bias)


def attend_with_math(x, y, bias):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(x, y, y, attn_mask=bias)


@pytest.mark.parametrize("function", [attend, attend_with_math], ids=["free", "restricted"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled(variant, function):
    torch._dynamo.reset()
    x, y, bias = randn(2, 4, 7, 8), randn(2, 4, 11, 8), VARIANTS[variant](7, 11)
    with sdpa.patched():
        out = torch.compile(function, backend="aot_eager", fullgraph=True)(x, y, bias)
    torch.testing.assert_close(out, ORIGINAL(x, y, y, attn_mask=bias._materialize()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchs_own_function_takes_it_while_the_patch_is_in_force(variant, counting):
    x, y, bias = randn(2, 4, 7, 8), randn(2, 4, 11, 8), VARIANTS[variant](7, 11)
    with sdpa.patched():
        kept = F.scaled_dot_product_attention
        restricted = attend_with_math(x, y, bias)
    assert counting.calls == 0
    for out in (restricted, kept(x, y, y, attn_mask=bias)):
        torch.testing.assert_close(out, ORIGINAL(x, y, y, attn_mask=bias._materialize()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_traced(variant):
    x, y = randn(2, 4, 7, 8), randn(2, 4, 11, 8)
    with sdpa.patched():
        traced = torch.jit.trace(lambda x, y: attend(x, y, VARIANTS[variant](7, 11)), (x, y))
    torch.testing.assert_close(traced(x, y), ORIGINAL(x, y, y, attn_mask=VARIANTS[variant](7, 11)))


def test_autocast():
    x, y, bias = randn(2, 4, 7, 8), randn(2, 4, 11, 8), causal_lower_right(7, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = patched(x, y, y, attn_mask=bias)
    assert out.dtype == torch.bfloat16
    assert out.equal(fa.attention(x.bfloat16(), y.bfloat16(), y.bfloat16(), mask=fa.Causal(), q_offset=4))


BIAS = causal_lower_right(5, 5)
READERS = {
    "Bias": lambda x: fa.Bias(BIAS),
    "Dense": lambda x: fa.Dense(BIAS),
    "attention-mask": lambda x: fa.attention(x, x, x, mask=BIAS),
    "and": lambda x: fa.Causal() & BIAS,
    "and-of-tensor": lambda x: BIAS & fa.Causal(),
    "key-padding": lambda x: fa.KeyPadding(BIAS),
    "lengths": lambda x: fa.ValidLengths(BIAS),
    "sinks": lambda x: fa.attention(x, x, x, sinks=BIAS),
    "query": lambda x: fa.attention(BIAS[None], x, x),
    "query-of-sdpa": lambda x: fa.scaled_dot_product_attention(BIAS[None], x, x),
    "softmax-mask": lambda x: fa.masked_softmax(x[0], BIAS),
    "softmax-bias": lambda x: fa.masked_softmax(x[0], bias=BIAS),
    "softmax-scores": lambda x: fa.masked_softmax(BIAS),
}


@pytest.mark.quick
@pytest.mark.parametrize("reader", READERS)
def test_its_values_are_never_read(reader):
    with pytest.raises(TypeError, match=r"must hold its values; got a CausalBias, which holds none\. Write Causal\(\)"):
        READERS[reader](randn(1, 2, 5, 5))


def test_subclasses_of_it_are_it():
    class Mine(CausalBias):
        pass

    bias = Mine(causal_lower_right(7, 11).variant, 7, 11)
    assert patched(*qkv(), attn_mask=bias).equal(patched(*qkv(), attn_mask=causal_lower_right(7, 11)))


@pytest.mark.quick
def test_a_name_bound_before_the_patch_still_knows_the_bias():
    """torch's class compares with the attribute, which the patch replaced; its storage must not be read as a mask for that."""
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 7, 8)
    for bias in (causal_lower_right(5, 7), causal_upper_left(5, 7)):
        want = ORIGINAL(q, k, k, attn_mask=bias)
        with sdpa.patched():
            assert ORIGINAL(q, k, k, attn_mask=bias).allclose(want, atol=1e-5)
        assert ORIGINAL(q, k, k, attn_mask=bias).equal(want)
