"""The patch: what is routed, what comes back, torch's modules under it."""

import doctest
import functools
import re
import threading
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from fused_attn.integrations import sdpa
from fused_attn.testing import excess
from tests.torch_reference import ORIGINAL, compare, qkv, randn


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
    compiled = torch.compile(lambda q, k, v: F.relu(F.scaled_dot_product_attention(q, k, v)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*qkv()), ORIGINAL(*qkv()).relu())
    monkeypatch.undo()
    assert F.scaled_dot_product_attention(*qkv()).equal(ORIGINAL(*qkv())), "they put back what hands everything to torch"
    with sdpa.patched():
        pass
    assert F.scaled_dot_product_attention is ORIGINAL


def wrapper_of(inner):
    return lambda *args, **options: inner(*args, **options)


def test_another_patch_between_two_of_ours_is_gone_when_it_has_ended(counting):
    with sdpa.patched():
        theirs = wrapper_of(F.scaled_dot_product_attention)
        with mock.patch.object(F, "scaled_dot_product_attention", theirs):
            with sdpa.patched():
                F.scaled_dot_product_attention(*qkv())
                assert F.scaled_dot_product_attention is not theirs
            assert F.scaled_dot_product_attention is theirs
            F.scaled_dot_product_attention(*qkv())
        F.scaled_dot_product_attention(*qkv())
    assert counting.calls == 3
    assert F.scaled_dot_product_attention is ORIGINAL


def test_the_patch_below_another_may_end_first():
    first = sdpa.patched()
    first.__enter__()
    with mock.patch.object(F, "scaled_dot_product_attention", wrapper_of(F.scaled_dot_product_attention)):
        with sdpa.patched():
            first.__exit__(None, None, None)
        assert F.scaled_dot_product_attention(*qkv()).equal(ORIGINAL(*qkv()))
    assert F.scaled_dot_product_attention(*qkv()).equal(ORIGINAL(*qkv()))
    with sdpa.patched():
        pass
    assert F.scaled_dot_product_attention is ORIGINAL


@pytest.mark.parametrize("dress", [lambda f: f, functools.wraps(ORIGINAL)], ids=["plain", "wraps"])
def test_another_patch_below_ours_waits(dress, monkeypatch, counting):
    theirs = dress(wrapper_of(ORIGINAL))
    monkeypatch.setattr(F, "scaled_dot_product_attention", theirs)
    with sdpa.patched():
        F.scaled_dot_product_attention(*qkv())
    assert counting.calls == 1
    assert F.scaled_dot_product_attention is theirs


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


def test_unknown_backends_are_found_on_entering():
    for enter in (lambda: sdpa.patched(backend="tpu").__enter__(), lambda: sdpa.install("tpu")):
        with pytest.raises(ValueError, match="backend must be"):
            enter()
        assert F.scaled_dot_product_attention is ORIGINAL


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


@pytest.mark.quick
def test_the_page_in_docs_says_what_is_so():
    page = Path(__file__).parents[1] / "docs" / "replacing-sdpa.md"
    text = page.read_text().replace("```", "")
    session = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    assert len(session.examples) > 10
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session).failed == 0


def test_torchs_caches_of_compiled_graphs_are_told_and_told_off():
    config = torch.compiler.config
    with config.patch(cache_key_tag="of the user"):
        with sdpa.patched():
            assert re.fullmatch(r"of the user\[fused_attn auto [0-9a-f]{12}\]", config.cache_key_tag)
            with sdpa.patched("cpu"):
                assert config.cache_key_tag.count("fused_attn") == 1
                assert "fused_attn cpu" in config.cache_key_tag
            assert "fused_attn auto" in config.cache_key_tag
            config.cache_key_tag = "changed meanwhile"
        assert config.cache_key_tag == "changed meanwhile"
    assert config.cache_key_tag == ""


def test_the_mark_is_the_processs():
    """Whoever enters or leaves, in whatever thread; each look is a new thread's, without a tag of its own."""

    def seen(function=lambda: None):
        tags = []
        thread = threading.Thread(target=lambda: (function(), tags.append(torch.compiler.config.cache_key_tag)))
        thread.start()
        thread.join()
        return tags[0]

    with sdpa.patched("cpu"):
        assert "fused_attn cpu" in seen()
        with sdpa.patched("eager"):
            assert "fused_attn eager" in seen()
        assert "fused_attn cpu" in seen()
    assert seen(sdpa.install) == seen() != ""
    assert seen(sdpa.uninstall) == seen() == ""
    sdpa.install()
    assert seen().count("fused_attn") == 1
    seen(sdpa.uninstall)
    assert seen() == ""
