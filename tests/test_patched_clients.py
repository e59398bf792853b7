"""Code that looks for torch's function while the patch is in force: modes, subclasses, torch.jit, sdpa_kernel, recorded graphs."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import fused_attn as fa
from fused_attn.integrations import sdpa
from tests import scripted
from tests.torch_reference import ORIGINAL, qkv, randn


def pieces():
    """A call whose output shows who computed it: torch's flash kernel, its math kernel and ours round differently in float32."""
    return qkv(33, 65, 40, 40)


# Function modes and tensor subclasses


class Watching(TorchFunctionMode):
    """Keeps what it is shown."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.quick
def test_a_mode_sees_the_function_once_and_nothing_else(counting):
    tensors = (*qkv(), randn(7, 11) > 0)
    with sdpa.patched(), Watching() as outer, Watching() as inner:
        F.scaled_dot_product_attention(*tensors)
        assert outer.seen == inner.seen == [F.scaled_dot_product_attention]
    assert counting.calls == 1


def test_a_mode_may_answer_or_change_the_call(counting):
    class Causal(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                return func(*args, **{**(kwargs or {}), "is_causal": True})
            return func(*args, **(kwargs or {}))

    with sdpa.patched(), Causal():
        out = F.scaled_dot_product_attention(*qkv())
    assert out.equal(fa.scaled_dot_product_attention(*qkv(), is_causal=True))
    assert counting.calls == 2


def test_a_default_device_is_a_mode_and_changes_nothing(counting):
    tensors = qkv()
    with sdpa.patched(), torch.device("meta"):
        out = F.scaled_dot_product_attention(*tensors, dropout_p=0.5)
    assert out.device.type == "cpu" and counting.calls == 1


@pytest.mark.parametrize("mode", [lambda: torch.device("cpu"), Watching], ids=["default-device", "watching"])
def test_modes_around_a_compiled_function(mode, counting):
    torch._dynamo.reset()
    x = randn(2, 4, 6, 8)
    compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), backend="aot_eager", fullgraph=True)
    with sdpa.patched(), mode():
        out = compiled(x)
    torch.testing.assert_close(out, ORIGINAL(x, x, x, is_causal=True))
    assert counting.calls == 1


def test_patched_inside_a_compiled_function():
    torch._dynamo.reset()

    def inside(x):
        with sdpa.patched():
            return F.scaled_dot_product_attention(x, x, x) + 1

    x = randn(2, 4, 6, 8)
    torch.testing.assert_close(torch.compile(inside, backend="aot_eager")(x), ORIGINAL(x, x, x) + 1)
    assert F.scaled_dot_product_attention is ORIGINAL


def test_a_compiled_mistake_is_a_runtime_error():
    torch._dynamo.reset()
    x = randn(2, 4, 6, 8)
    compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x[:, :3], x[:, :3]), backend="aot_eager")
    with sdpa.patched(), pytest.raises(RuntimeError):
        compiled(x)


class ByName(torch.Tensor):
    """Reads torch's function when it is called, as CausalBias does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "handled" if func is F.scaled_dot_product_attention else super().__torch_function__(func, types, args, kwargs or {})


class ByTable(torch.Tensor):
    """Looked torch's function up on import, as NestedTensor does."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is ORIGINAL:
            with torch._C.DisableTorchFunctionSubclass():  # by name again, below its own handling
                return "handled", F.scaled_dot_product_attention(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_that_looks_by_name_or_on_import_is_found(counting):
    q, k, v = qkv()
    with sdpa.patched():
        assert F.scaled_dot_product_attention(q.as_subclass(ByName), k, v) == "handled"
        handled, out = F.scaled_dot_product_attention(q, k, v.as_subclass(ByTable))
    assert handled == "handled"
    torch.testing.assert_close(out.as_subclass(torch.Tensor), ORIGINAL(q, k, v))
    assert counting.calls == 0


def test_a_subclass_switched_off_stays_off():
    q, k, v = qkv()
    with sdpa.patched(), torch._C.DisableTorchFunctionSubclass():
        out = F.scaled_dot_product_attention(q.as_subclass(ByTable), k, v)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), ORIGINAL(q, k, v))


# Restricted kernels


ALL = [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.OVERRIDEABLE]


@pytest.mark.quick
@pytest.mark.parametrize("kernels", [ALL[:1], ALL[:2], ALL[1:], ALL[:4], [ALL[1], ALL[0]]], ids=lambda k: "+".join(str(int(b)) for b in k))
@pytest.mark.parametrize("ranked", [False, True], ids=["set", "ranked"])
def test_a_subset_of_torchs_kernels_means_torch(kernels, ranked, counting):
    with sdpa.patched(), sdpa_kernel(kernels, set_priority=ranked):
        got = F.scaled_dot_product_attention(*pieces())
        assert got.equal(ORIGINAL(*pieces()))
    assert counting.calls == 0


@pytest.mark.parametrize("ranked", [False, True], ids=["set", "ranked"])
def test_all_of_torchs_kernels_restrict_nothing(ranked, counting):
    with sdpa.patched(), sdpa_kernel(ALL[::-1], set_priority=ranked):
        F.scaled_dot_product_attention(*qkv())
    assert counting.calls == 1


@pytest.mark.parametrize("kernel", ["flash", "math", "mem_efficient", "cudnn"])
def test_a_kernel_switched_off_means_torch(kernel, counting):
    enable = getattr(torch.backends.cuda, f"enable_{kernel}_sdp")
    with sdpa.patched():
        try:
            enable(False)
            F.scaled_dot_product_attention(*qkv())
            assert counting.calls == 0
        finally:
            enable(True)
        F.scaled_dot_product_attention(*qkv())
    assert counting.calls == 1


def with_math(q, k, v):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v), F.scaled_dot_product_attention(q + 0, k, v)


def test_restricted_inside_a_compiled_function(counting):
    torch._dynamo.reset()
    with sdpa_kernel(SDPBackend.MATH):
        wanted = ORIGINAL(*pieces())
    with sdpa.patched():
        outs = torch.compile(with_math, backend="aot_eager", fullgraph=True)(*pieces())
    torch.testing.assert_close(outs, (wanted, wanted))
    assert counting.calls == 0


def test_a_compiled_function_called_in_both_states(counting):
    torch._dynamo.reset()
    with sdpa.patched():
        for restricted in (True, False):
            compiled = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), backend="aot_eager", fullgraph=True)
            with sdpa_kernel(ALL[0] if restricted else ALL):
                compiled(*qkv())
            assert (counting.calls == 0) == restricted
            torch._dynamo.reset()


# torch.jit


def attend(a, b, mask):
    return F.scaled_dot_product_attention(a, b, b, attn_mask=mask)


@pytest.mark.quick
def test_a_trace_holds_torchs_operator_and_runs_everywhere():
    q, k, _ = qkv()
    keep = randn(7, 11) > -0.3
    with sdpa.patched():
        traced = torch.jit.trace(attend, (q, k, keep))
        inside = traced(q, k, keep)
    assert {node.kind() for node in traced.graph.nodes()} == {"prim::Constant", "aten::scaled_dot_product_attention"}
    assert inside.equal(ORIGINAL(q, k, k, keep))
    longer = randn(2, 4, 13, 8)
    assert traced(q, longer, randn(7, 13) > -0.3).equal(ORIGINAL(q, longer, longer, randn(7, 13) > -0.3))


@pytest.mark.quick
def test_a_script_holds_torchs_operator_and_runs_everywhere(counting):
    x, keep = randn(2, 4, 6, 8), randn(6, 6) > -0.3
    with sdpa.patched():
        plain, masked = torch.jit.script(scripted.plain), torch.jit.script(scripted.masked)
        assert plain(x).equal(ORIGINAL(x, x, x))
    assert "aten::scaled_dot_product_attention" in str(plain.graph)
    assert plain(x).equal(ORIGINAL(x, x, x))
    assert masked(x, keep).equal(ORIGINAL(x, x, x, keep, scale=0.5))
    assert counting.calls == 0


class Wrapped(torch.nn.Module):
    """A module of torch's as a function of one tensor."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


MODULES = {
    "attention": (lambda: torch.nn.MultiheadAttention(16, 4, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0]),
    "encoder": (lambda: torch.nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), lambda m, x: m(x)),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("recorder", ["script", "trace"])
@pytest.mark.parametrize("name", MODULES)
def test_torchs_modules_are_scripted_and_traced(name, recorder):
    make, call = MODULES[name]
    module, x = make(), randn(2, 6, 16)
    with sdpa.patched():
        recorded = Wrapped(torch.jit.script(module), call) if recorder == "script" else torch.jit.trace(Wrapped(module, call), (x,))
        inside = recorded(x)
    wanted = call(module, x)
    torch.testing.assert_close(inside, wanted)
    torch.testing.assert_close(recorded(x), wanted)


def test_the_entry_for_scripts_goes_with_the_last_patch():
    from torch.jit._builtins import _find_builtin

    with sdpa.patched():
        with sdpa.patched():
            function = F.scaled_dot_product_attention
        assert _find_builtin(function) == "aten::scaled_dot_product_attention"
    assert _find_builtin(function) is None


# Recorded graphs, pickles


def test_a_symbolic_trace_holds_torchs_function(counting):
    with sdpa.patched():
        graph = torch.fx.symbolic_trace(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True))
        assert ORIGINAL in {n.target for n in graph.graph.nodes}
    x = randn(2, 4, 6, 8)
    assert graph(x).equal(ORIGINAL(x, x, x, is_causal=True))
    assert counting.calls == 0


class Attention(torch.nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_an_export_holds_our_operator(strict, counting):
    x = randn(2, 4, 6, 8)
    with sdpa.patched():
        program = torch.export.export(Attention(), (x,), strict=strict)
    assert any("fused_attn" in str(n.target) for n in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), ORIGINAL(x, x, x, is_causal=True))


def test_a_pickled_name_passes_through_once_the_patch_is_gone(counting):
    with sdpa.patched():
        text = pickle.dumps(F.scaled_dot_product_attention)
        pickle.loads(text)(*qkv())
        assert counting.calls == 1
    assert pickle.loads(text)(*qkv()).equal(ORIGINAL(*qkv()))
    assert counting.calls == 1


def test_a_distributed_tensor_goes_to_torch(tmp_path):
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this build of torch has no torch.distributed")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Replicate

        x = randn(1, 2, 4, 8)
        distributed = DTensor.from_local(x, init_device_mesh("cpu", (1,)), [Replicate()])
        with sdpa.patched():
            out = F.scaled_dot_product_attention(distributed, distributed, distributed)
        assert isinstance(out, DTensor)
        torch.testing.assert_close(out.to_local(), ORIGINAL(x, x, x))
        for call in (fa.attention, fa.scaled_dot_product_attention):
            torch.testing.assert_close(call(distributed, distributed, distributed).to_local(), ORIGINAL(x, x, x))
    finally:
        dist.destroy_process_group()
