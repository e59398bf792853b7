"""The compiler boundary: ops, fakes, torch.compile without graph breaks, checkpointing, torch.func, make_fx."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fused_attn as fa
from fused_attn import fingerprint
from fused_attn.backends.cpu import blocked
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem, SoftmaxProblem
from fused_attn.score_mods import ScoreMod
from fused_attn.testing import EVERYTHING, vocabulary

SHAPE = (2, 4, 6, 9)
GRID = Grid(SHAPE, torch.device("cpu"), 3)
MASKS = vocabulary(Mask, GRID)
MODS = vocabulary(ScoreMod, GRID)
OPTIONS = {"mask": None, "scale": None, "q_offset": 3, "score_mods": (), "sinks": None, "dropout": None, "return_aux": None}
SOFTMAX_OPTIONS = {"mask": None, "scale": 1.5, "bias": None, "dim": -1, "log": False, "dropout": None, "empty_rows": "zero", "q_offset": 3}


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    """The boundary is the subject, so nothing may go around it: uncompiled calls this small would run on eager, with other bits."""
    for limit in [name for name in vars(blocked) if name.startswith("EAGER_")]:
        monkeypatch.setattr(blocked, limit, 0)
    torch._dynamo.reset()
    torch.manual_seed(0)


def qkv(q_len=6, kv_len=9, dtype=torch.float32, grad=True):
    shapes = ((2, 4, q_len, 8), (2, 2, kv_len, 8), (2, 2, kv_len, 5))
    return [torch.randn(s, dtype=dtype).requires_grad_(grad) for s in shapes]


def compiled(function, **options):
    return torch.compile(function, backend="aot_eager", fullgraph=True, **options)


def results(function, arguments):
    """All outputs of a function, then the gradients of all arguments that require grad."""
    out = function(*arguments)
    out = [t for t in (out if isinstance(out, (tuple, list)) else (out,)) if t is not None]
    leaves = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    through = [t for t in out if t.requires_grad]
    grads = torch.autograd.grad([t.nan_to_num(0, 0, 0).sin().sum() for t in through], leaves, allow_unused=True) if through else []
    return [t.detach() for t in out] + list(grads)


def same_when_compiled(function, arguments, **options):
    """aot_eager runs the same kernels on the same values, so the results are the same bits."""
    for got, expected in zip(results(compiled(function, **options), arguments), results(function, arguments), strict=True):
        assert (got is None) == (expected is None)
        assert got is None or (got.dtype == expected.dtype and bool(((got == expected) | (got.isnan() & expected.isnan())).all()))


# The ops

TERMS = {
    "plain": {},
    "window": {"mask": fa.Causal() & fa.SlidingWindow(2, 0)},
    "intervals-and-keep": {"mask": MASKS["ValidLengths1"] & MASKS["KeyPadding0"]},
    "offset-tensor": {"mask": fa.Causal(), "q_offset": torch.tensor([3, 1])},
    "mods": {"score_mods": (MODS["SoftCap0"], MODS["ALiBi0"], MODS["Bias3"]), "sinks": torch.zeros(4)},
    "dropout": {"dropout": fa.Dropout(0.3, seed=7)},
}


def opcheck(name, arguments):
    torch.library.opcheck(
        getattr(torch.ops.fused_attn, name), arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static")
    )


@pytest.mark.quick
def test_a_graph_names_the_code_that_captured_it(tmp_path):
    x = torch.randn(1, 2, 3, 2, requires_grad=True)
    graph = make_fx(lambda x: torch.autograd.grad(fa.masked_softmax(fa.attention(x, x, x)).square().sum(), x))(x)
    ops = [node for node in graph.graph.nodes if str(node.target).startswith("fused_attn")]
    assert [node.target.name().removeprefix("fused_attn::") for node in ops] == [
        "attention_fwd",
        "softmax_fwd",
        "softmax_bwd",
        "attention_bwd",
    ]
    assert {node.args[-1] for node in ops} == {f"cpu@{fingerprint.PACKAGE}"}
    seen = set()
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", ""), ("deep/a.py", "x = 1")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        seen |= {fingerprint.fingerprint(tmp_path), fingerprint.fingerprint(tmp_path)}
    assert len(seen) == 4


@pytest.mark.quick
@pytest.mark.parametrize("options", TERMS.values(), ids=TERMS.keys())
def test_attention_ops(options):
    call = AttentionProblem.check(*qkv(grad=False), OPTIONS | options).lower()
    inputs = (call.q, call.k, call.v, *call.terms.flatten())
    opcheck("attention_fwd", (*inputs, "cpu"))
    forward = torch.ops.fused_attn.attention_fwd(*inputs, "cpu")
    opcheck("attention_aux", (*inputs, *forward, list(EVERYTHING.flags), "cpu"))
    opcheck("attention_aux", (*inputs, *forward, [False] * 5 + [True], "cpu"))
    probs = torch.ops.fused_attn.attention_aux(*inputs, *forward, list(EVERYTHING.flags), "cpu")[0]
    dout, dlse = torch.randn_like(forward[0]), torch.randn_like(forward[1])
    needs = [True] * (3 + len(call.terms.parameters))
    needs[3] = call.terms.sinks is not None
    opcheck("attention_bwd", (*inputs, *forward, dout, *[None] * 7, needs, "cpu"))
    opcheck(
        "attention_bwd",
        (
            *inputs,
            *forward,
            None,
            dlse,
            torch.randn_like(probs),
            torch.randn_like(probs),
            probs,
            torch.randn_like(dlse),
            torch.randn(call.shape[0], call.shape[1], call.shape[3], dtype=dlse.dtype),
            torch.randn_like(dlse),
            [False, True, *[False] * (len(needs) - 2)],
            "cpu",
        ),
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "options",
    [{}, {"mask": fa.Causal(), "log": True}, {"bias": torch.randn(6, 1)}, {"dropout": fa.Dropout(0.3, seed=7)}],
    ids=["plain", "log", "bias", "dropout"],
)
def test_softmax_ops(options):
    call = SoftmaxProblem.check(torch.randn(2, 3, 6, 9), SOFTMAX_OPTIONS | options).lower()
    switches = [call.log, call.uniform_empty]
    inputs = (call.scores, *call.terms.flatten())
    opcheck("softmax_fwd", (*inputs, switches, "cpu"))
    out, probs = torch.ops.fused_attn.softmax_fwd(*inputs, switches, "cpu")
    needs = [True] * (1 + len(call.terms.parameters[1:]))
    opcheck("softmax_bwd", (*inputs, probs if call.terms.dropout else out, torch.randn_like(out), switches, needs, "cpu"))


# torch.compile


@pytest.mark.parametrize("name", MASKS)
def test_masks_given_to_a_compiled_function(name):
    mask = MASKS[name]
    same_when_compiled(lambda q, k, v: fa.attention(q, k, v, mask=mask, q_offset=3), qkv())


@pytest.mark.parametrize("name", MODS)
def test_mods_given_to_a_compiled_function(name):
    mod = MODS[name]
    same_when_compiled(
        lambda q, k, v, *params: fa.attention(q, k, v, score_mods=(mod.with_tensors(params),), q_offset=3),
        [*qkv(), *(t.clone().requires_grad_() for t in mod.tensors)],
    )


@pytest.mark.quick
def test_masks_and_mods_constructed_inside():
    lens, keep, ids = torch.tensor([4, 9]), torch.rand(2, 9) > 0.3, torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2])

    def run(q, k, v, bias, slopes, sinks):
        mask = (
            fa.Causal()
            & fa.SlidingWindow(5, 0)
            & fa.Band(6)
            & fa.ValidLengths(lens)
            & fa.KeyPadding(keep)
            & fa.Documents(ids)
            & fa.PrefixLM(2)
            & fa.Dense(bias > -9)
        )
        mods = (fa.SoftCap(3.0), fa.ALiBi(slopes), fa.Bias(bias), fa.DecayBias(slopes[:, None] * torch.ones(9)))
        out, aux = fa.attention(
            q, k, v, mask=mask, score_mods=mods, sinks=sinks, q_offset=k.shape[2] - q.shape[2], scale=0.3, return_aux=EVERYTHING
        )
        return out, aux.probs, aux.scores, aux.lse, aux.max_scores, aux.column_sums, aux.entropy

    params = [torch.randn(4, 6, 9), torch.rand(4), torch.randn(4)]
    same_when_compiled(run, [*qkv(), *(t.requires_grad_() for t in params)])


def test_documents_from_cu_seqlens_inside():
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    same_when_compiled(lambda q, k, v: fa.attention(q, k, v, mask=fa.Documents.from_cu_seqlens(cu, total=k.shape[2]), q_offset=3), qkv())


@pytest.mark.quick
@pytest.mark.parametrize("request_", [fa.AuxRequest(lse=True), fa.AuxRequest(probs=True), EVERYTHING], ids=["lse", "probs", "everything"])
def test_aux_outputs(request_):
    def run(q, k, v):
        out, aux = fa.attention(q, k, v, mask=fa.Causal(), q_offset=3, return_aux=request_)
        return out, aux.probs, aux.scores, aux.lse, aux.max_scores, aux.column_sums, aux.entropy

    same_when_compiled(run, qkv())


SOFTMAX = {
    "plain": lambda s, b: fa.masked_softmax(s, scale=0.5),
    "causal": lambda s, b: fa.masked_softmax(s, fa.Causal(), q_offset=3),
    "lengths": lambda s, b: fa.masked_softmax(s, fa.ValidLengths(torch.tensor([3, 0]))),
    "bool-mask": lambda s, b: fa.masked_softmax(s, b > 0),
    "bias": lambda s, b: fa.masked_softmax(s, bias=b),
    "log": lambda s, b: fa.masked_softmax(s, b > -1, log=True),
    "dim": lambda s, b: fa.masked_softmax(s, dim=1),
    "uniform": lambda s, b: fa.masked_softmax(s, fa.ValidLengths(torch.tensor([3, 0])), empty_rows="uniform"),
    "dropout": lambda s, b: fa.masked_softmax(s, dropout=fa.Dropout(0.4, seed=3)),
}


@pytest.mark.parametrize("run", SOFTMAX.values(), ids=SOFTMAX.keys())
def test_masked_softmax(run):
    same_when_compiled(run, [torch.randn(2, 3, 6, 9).requires_grad_(), torch.randn(6, 9).requires_grad_()])


SDPA = {
    "plain": lambda q, k, v: fa.scaled_dot_product_attention(q, k, v, enable_gqa=True),
    "causal": lambda q, k, v: fa.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True),
    "bool-mask": lambda q, k, v: fa.scaled_dot_product_attention(q, k, v, torch.ones(6, 9).tril().bool(), enable_gqa=True),
    "float-mask": lambda q, k, v: fa.scaled_dot_product_attention(q, k, v, torch.ones(6, 9), enable_gqa=True),
    "broadcast": lambda q, k, v: fa.scaled_dot_product_attention(q, k[0, 0], v[:, :1]),
}


@pytest.mark.parametrize("run", SDPA.values(), ids=SDPA.keys())
def test_sdpa(run):
    same_when_compiled(run, qkv())


@pytest.mark.quick
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_lengths_recompile_at_most_once(dynamic):
    graphs = []

    def count(graph, example):
        graphs.append(graph)
        return graph.forward

    def run(q, k, v, lens):
        return fa.attention(q, k, v, mask=fa.Causal() & fa.ValidLengths(lens), q_offset=k.shape[2] - q.shape[2])

    function = torch.compile(run, backend=count, fullgraph=True, dynamic=dynamic)
    for q_len, kv_len in ((6, 9), (7, 12), (8, 20), (33, 50), (5, 70)):
        arguments = (*qkv(q_len, kv_len), torch.tensor([3, kv_len]))
        assert function(*arguments).equal(run(*arguments))
    assert len(graphs) <= 2


def test_dynamic_shapes_with_gradients():
    def run(q, k, v, slopes):
        out, aux = fa.attention(
            q,
            k,
            v,
            mask=fa.Causal(),
            score_mods=(fa.SoftCap(2.0), fa.ALiBi(slopes)),
            q_offset=k.shape[2] - q.shape[2],
            return_aux=fa.AuxRequest(probs=True, lse=True),
        )
        return out, aux.probs, aux.lse

    function = compiled(run, dynamic=True)
    for q_len, kv_len in ((6, 9), (11, 17), (3, 40)):
        arguments = [*qkv(q_len, kv_len), torch.rand(4)]
        for got, expected in zip(results(function, arguments), results(run, arguments), strict=True):
            assert got.equal(expected)


def test_dynamic_softmax():
    def run(s):
        return fa.masked_softmax(s, fa.Causal(), q_offset=0)

    function = compiled(run, dynamic=True)
    for shape in ((2, 3, 6, 9), (3, 2, 5, 7)):
        scores = torch.randn(shape).requires_grad_()
        for got, expected in zip(results(function, [scores]), results(run, [scores]), strict=True):
            assert got.equal(expected)


@pytest.mark.quick
def test_dropout_with_a_seed_draws_the_same_mask():
    same_when_compiled(lambda q, k, v: fa.attention(q, k, v, dropout=fa.Dropout(0.4, seed=3)), qkv())


def test_dropout_without_a_seed_draws_anew_and_obeys_manual_seed():
    function = compiled(lambda q, k, v: fa.attention(q, k, v, dropout=fa.Dropout(0.4)))
    arguments = qkv()
    torch.manual_seed(1)
    first, second = function(*arguments), function(*arguments)
    torch.manual_seed(1)
    assert function(*arguments).equal(first)
    assert not first.equal(second)


def test_autocast_inside():
    def run(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return fa.attention(q, k, v, mask=fa.Causal(), q_offset=3)

    arguments = qkv()
    narrow = fa.attention(*(t.bfloat16() for t in arguments), mask=fa.Causal(), q_offset=3)
    assert run(*arguments).equal(narrow)
    same_when_compiled(run, arguments)


def test_backward_under_autocast_keeps_its_precision():
    arguments = qkv()
    expected = torch.autograd.grad(causal(*arguments).sum(), arguments)
    out = causal(*arguments).sum()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(a.equal(b) for a, b in zip(torch.autograd.grad(out, arguments), expected, strict=True))


def test_eager_backend_compiles():
    def run(q, k, v):
        return fa.attention(q, k, v, mask=fa.Causal(), score_mods=(fa.SoftCap(3.0),), q_offset=3, backend="eager")

    arguments = qkv(dtype=torch.float64)
    for got, expected in zip(results(compiled(run), arguments), results(run, arguments), strict=True):
        assert (got - expected).abs().max() <= 32 * torch.finfo(torch.float64).eps  # decompositions may order sums of 9 terms otherwise


@pytest.mark.peers
def test_compiles_with_inductor():
    weight, x = torch.randn(8, 24).requires_grad_(), torch.randn(1, 1, 6, 8)

    def run(x, weight):
        return fa.attention(*(x @ weight).chunk(3, -1), mask=fa.Causal())

    eps, (expected, reference) = torch.finfo(torch.float32).eps, results(run, [x, weight])
    out, grad = results(torch.compile(run, fullgraph=True), [x, weight])
    assert (out - expected).abs().max() <= eps * 8 * expected.abs().max()
    assert (grad - reference).abs().max() <= eps * 8 * 6 * reference.abs().max()


# Checkpointing, torch.func, tracing


@pytest.mark.quick
@pytest.mark.parametrize("reentrant", [False, True], ids=["saved-hooks", "reentrant"])
@pytest.mark.parametrize("seed", [None, 7], ids=["drawn", "given"])
def test_checkpointing_draws_the_same_dropout_mask(reentrant, seed):
    def run(q, k, v):
        return fa.attention(q, k, v, dropout=fa.Dropout(0.4, seed=seed))

    arguments = qkv()
    torch.manual_seed(5)
    expected = results(run, arguments)
    torch.manual_seed(5)
    got = (
        results(lambda *a: checkpoint(run, *a, use_reentrant=reentrant), arguments) if not reentrant else reentrant_results(run, arguments)
    )
    assert all(a.equal(b) for a, b in zip(got, expected, strict=True))


def reentrant_results(run, arguments):
    """As ``results``; the reentrant kind supports ``backward`` only."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    out = checkpoint(run, *leaves, use_reentrant=True)
    out.nan_to_num(0, 0, 0).sin().sum().backward()
    return [out.detach(), *(t.grad for t in leaves)]


def test_checkpointing_inside_compile():
    def run(q, k, v):
        return checkpoint(
            lambda *a: fa.attention(*a, mask=fa.Causal(), q_offset=3, dropout=fa.Dropout(0.4, seed=7)), q, k, v, use_reentrant=False
        )

    same_when_compiled(run, qkv())


def close(a, b):
    return bool(((a - b).abs() <= 64 * torch.finfo(torch.float64).eps * (1 + b.abs())).all())


def causal(q, k, v):
    return fa.attention(q, k, v, mask=fa.Causal(), score_mods=(fa.SoftCap(3.0),), q_offset=3)


@pytest.mark.quick
def test_func_grad():
    arguments = qkv(dtype=torch.float64)
    expected = torch.autograd.grad(causal(*arguments).sum(), arguments)
    got = torch.func.grad(lambda *a: causal(*a).sum(), argnums=(0, 1, 2))(*(t.detach() for t in arguments))
    assert all(close(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.quick
def test_func_vmap():
    batches = [torch.stack(ts) for ts in zip(*(qkv(dtype=torch.float64, grad=False) for _ in range(3)), strict=True)]
    expected = torch.stack([causal(*(t[i] for t in batches)) for i in range(3)])
    assert close(torch.func.vmap(causal)(*batches), expected)
    scores = batches[0][..., 0]
    assert close(
        torch.func.vmap(lambda s: fa.masked_softmax(s, fa.Causal(), q_offset=2))(scores), fa.masked_softmax(scores, fa.Causal(), q_offset=2)
    )


@pytest.mark.quick
def test_func_jvp_and_forward_mode():
    arguments = tuple(qkv(dtype=torch.float64, grad=False))
    tangents = tuple(torch.randn_like(t) for t in arguments)
    out, tangent = torch.func.jvp(causal, arguments, tangents)
    assert close(out, causal(*arguments))
    step = 1e-6
    ahead, behind = (causal(*(t + s * step * d for t, d in zip(arguments, tangents, strict=True))) for s in (1, -1))
    assert (tangent - (ahead - behind) / (2 * step)).abs().max() <= 100 * step**2 + 10 * torch.finfo(torch.float64).eps / step
    with torch.autograd.forward_ad.dual_level():
        dual = causal(*(torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(arguments, tangents, strict=True)))
        assert close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangent)


def test_func_inside_compile():
    arguments = qkv(dtype=torch.float64, grad=False)
    expected = torch.func.grad(lambda *a: causal(*a).sum())(*arguments)
    assert close(compiled(lambda *a: torch.func.grad(lambda *b: causal(*b).sum())(*a))(*arguments), expected)


def test_an_explicit_kernel_backend_refuses_transforms_with_the_reason():
    with pytest.raises(fa.UnsupportedError, match=r"torch\.func transform"):
        torch.func.vmap(lambda q, k, v: fa.attention(q, k, v, backend="cpu"))(*(t[None] for t in qkv(grad=False)))


@pytest.mark.quick
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_make_fx_records_the_op(mode):
    arguments = qkv(grad=False)
    graph = make_fx(causal, tracing_mode=mode)(*arguments)
    assert "fused_attn.attention_fwd" in graph.code
    assert graph(*arguments).equal(causal(*arguments))


@pytest.mark.quick
def test_fake_tensors_get_shapes_and_gradients():
    with torch._subclasses.FakeTensorMode():
        q, k, v = qkv(dtype=torch.bfloat16)
        out, aux = fa.attention(q, k, v, mask=fa.Causal(), q_offset=3, return_aux=EVERYTHING)
        grads = torch.autograd.grad(out.sum() + aux.lse.sum(), (q, k, v))
    assert out.shape == (2, 4, 6, 5)
    assert aux.probs.shape == (2, 4, 6, 9)
    assert aux.lse.dtype == torch.float32
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.quick
def test_a_backward_op_takes_tensors_that_require_grad_and_differentiates_once():
    x = torch.randn(1, 2, 3, 2, requires_grad=True)
    inputs = (x, x, x, *(None,) * 6, [], [-1, -1, 0], [0.7, 0.0], "")
    forward = [t.detach() for t in torch.ops.fused_attn.attention_fwd(*inputs, "cpu")]
    dq, *_ = torch.ops.fused_attn.attention_bwd(*inputs, *forward, torch.ones(1, 2, 3, 2), *[None] * 7, [1, 1, 1, 0], "cpu")
    with pytest.raises(fa.UnsupportedError, match="create_graph=True"):
        dq.sum().backward()
