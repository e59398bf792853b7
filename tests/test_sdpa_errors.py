"""Errors and odd numbers of torch's function: the same classes as torch's, in our words, and the same numbers taken."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fused_attn as fa
from fused_attn.integrations import sdpa
from tests.torch_reference import ORIGINAL, qkv, randn

pytestmark = pytest.mark.quick


def patched(*tensors, **options):
    with sdpa.patched():
        return F.scaled_dot_product_attention(*tensors, **options)


CALLS = {"patched": patched, "direct": fa.scaled_dot_product_attention}


def bad(q=None, k=None, v=None, **options):
    """Arguments of a valid call (q_len 6, kv_len 9) with some replaced."""
    given = (randn(2, 4, 6, 8), randn(2, 4, 9, 8), randn(2, 4, 9, 8))
    return tuple(t if new is None else new for t, new in zip(given, (q, k, v), strict=True)), options


ERRORS = {
    "query-list": bad([1.0]), "key-array": bad(k=np.zeros((2, 4, 9, 8), np.float32)), "value-number": bad(v=1.0),
    "query-0d": bad(torch.tensor(1.0)), "query-1d": bad(randn(8)), "key-1d": bad(k=randn(8)),
    "query-int": bad(randn(2, 4, 6, 8).long()), "all-int": bad(*(randn(2, 4, 6, 8).long(),) * 3), "all-complex": bad(*(randn(2, 4, 6, 8) + 0j,) * 3),
    "query-double": bad(randn(2, 4, 6, 8).double()), "key-half": bad(k=randn(2, 4, 9, 8).half()), "value-bfloat16": bad(v=randn(2, 4, 9, 8).bfloat16()),
    "query-meta": bad(torch.empty(2, 4, 6, 8, device="meta")), "key-meta": bad(k=torch.empty(2, 4, 9, 8, device="meta")),
    "query-sparse": bad(randn(2, 4, 6, 8).to_sparse()), "value-sparse": bad(v=randn(2, 4, 9, 8).to_sparse()),
    "batches": bad(randn(3, 4, 6, 8)), "heads": bad(k=randn(2, 2, 9, 8), v=randn(2, 2, 9, 8)), "value-heads": bad(v=randn(2, 2, 9, 8)),
    "gqa-not-divisible": bad(k=randn(2, 3, 9, 8), v=randn(2, 3, 9, 8), enable_gqa=True),
    "gqa-more-key-heads": bad(k=randn(2, 8, 9, 8), v=randn(2, 8, 9, 8), enable_gqa=True),
    "head-dim": bad(randn(2, 4, 6, 9)),
    "mask-list": bad(attn_mask=[[True]]), "mask-number": bad(attn_mask=1.0), "mask-int": bad(attn_mask=torch.ones(6, 9, dtype=torch.int64)),
    "mask-complex": bad(attn_mask=randn(6, 9) + 0j), "mask-sparse": bad(attn_mask=randn(6, 9).to_sparse()),
    "mask-shape": bad(attn_mask=randn(5, 9)), "mask-rank": bad(attn_mask=randn(1, 1, 1, 6, 9)), "mask-too-wide": bad(randn(1, 4, 6, 8), randn(1, 4, 9, 8), randn(1, 4, 9, 8), attn_mask=randn(2, 4, 6, 9)),
    "dropout-above-1": bad(dropout_p=1.5), "dropout-negative": bad(dropout_p=-0.5), "dropout-nan": bad(dropout_p=float("nan")),
    "dropout-string": bad(dropout_p="no"), "dropout-none": bad(dropout_p=None), "dropout-1d": bad(dropout_p=torch.tensor([0.5])),
    "dropout-wants-gradient": bad(dropout_p=torch.tensor(0.5, requires_grad=True)), "dropout-tensor-above-1": bad(dropout_p=torch.tensor(1.5)),
    "causal-string": bad(is_causal="yes"), "causal-int": bad(is_causal=1), "causal-none": bad(is_causal=None), "causal-tensor": bad(is_causal=torch.tensor(True)),
    "gqa-int": bad(enable_gqa=1), "gqa-numpy": bad(enable_gqa=np.bool_(True)),
    "scale-string": bad(scale="x"), "scale-complex": bad(scale=1j), "scale-1d": bad(scale=torch.tensor([0.5])), "scale-complex-tensor": bad(scale=torch.tensor(0.5j)),
    "scale-parameter": bad(scale=torch.nn.Parameter(torch.tensor(0.5))), "scale-meta": bad(scale=torch.tensor(0.5, device="meta")),
    "unknown-keyword": bad(window=3),
}  # fmt: skip


def error_of(call, tensors, options):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(*tensors, **options)
    return caught.value


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", ERRORS)
def test_class_is_torchs(name, call):
    theirs, ours = error_of(ORIGINAL, *ERRORS[name]), error_of(CALLS[call], *ERRORS[name])
    # torch's RuntimeErrors are also the ValueError or TypeError of the rest of this package; its TypeErrors are nothing else.
    wanted = TypeError if isinstance(theirs, TypeError) else RuntimeError
    assert isinstance(theirs, wanted)
    assert isinstance(ours, wanted)
    assert isinstance(ours, RuntimeError) == isinstance(theirs, RuntimeError)


def test_missing_and_doubled_arguments_are_type_errors():
    q = randn(2, 4, 6, 8)
    with sdpa.patched():
        for call in (ORIGINAL, F.scaled_dot_product_attention, fa.scaled_dot_product_attention):
            for arguments, keywords in (((q, q), {}), ((q, q, q), {"query": q}), ((q, q, q, None, 0.0, False, 0.5), {})):
                assert type(error_of(call, arguments, keywords)) is TypeError


def test_a_mask_with_is_causal_is_torchs_error():
    with pytest.raises(RuntimeError, match="attn_mask should not be set when is_causal=True; got both") as caught:
        patched(*qkv(), attn_mask=randn(7, 11), is_causal=True)
    assert type(caught.value) is RuntimeError


NUMBERS = {
    "tensor": torch.tensor(0.5), "float64": torch.tensor(0.5, dtype=torch.float64), "half": torch.tensor(0.5).half(), "numpy": np.float32(0.5),
    "int-tensor": torch.tensor(1), "bool-tensor": torch.tensor(True), "bool": True, "int": 1, "numpy-int": np.int64(1),
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_torch_takes_for_scale(name, call):
    number = NUMBERS[name]
    assert CALLS[call](*qkv(), scale=number).equal(CALLS[call](*qkv(), scale=float(number)))
    torch.testing.assert_close(CALLS[call](*qkv(), scale=number), ORIGINAL(*qkv(), scale=number))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("number", [torch.tensor(0.5), np.float32(0.5), torch.tensor(0), torch.tensor(False), False, True, 1], ids=repr)
def test_numbers_that_torch_takes_for_dropout(number, call):
    def draw(p):
        torch.manual_seed(5)
        return CALLS[call](*qkv(), dropout_p=p)

    assert draw(number).equal(draw(float(number)))


def test_a_scale_in_a_tensor_compiles_as_far_as_torchs_does():
    torch._dynamo.reset()
    x, scale = randn(2, 4, 6, 8), torch.tensor(0.5)
    compiled = torch.compile(lambda x, s: F.scaled_dot_product_attention(x, x, x, scale=s) + 1, backend="aot_eager")
    with sdpa.patched():
        torch.testing.assert_close(compiled(x, scale), ORIGINAL(x, x, x, scale=0.5) + 1)
