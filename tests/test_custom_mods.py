"""Score modifications of the user's own: every field as the author filled it, on every backend that runs ``apply``, against float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.backends.cpu import tiles
from fused_attn.lowering import Grid, KernelScore, Terms
from fused_attn.score_mods import SCORE_MODS, ScoreMod, in_own_shape, on_device

WIDTH = 4
APPLYING = ("eager", "cpu")


@dataclass(frozen=True, eq=False)
class Relative(ScoreMod):
    """T5: a learned value per head and clipped distance, table [heads, 2 * WIDTH + 1]."""

    table: Tensor
    name: ClassVar[str] = "test_relative"
    positional: ClassVar[bool] = True

    def apply(self, scores, grid):
        return scores + self.table[:, (grid.q_pos.reshape(-1, 1) - grid.kv_idx).clamp(-WIDTH, WIDTH) + WIDTH]


@dataclass(frozen=True, eq=False)
class Temperature(ScoreMod):
    """A factor per head, log_t [heads]."""

    log_t: Tensor
    name: ClassVar[str] = "test_temperature"

    def apply(self, scores, grid):
        return scores * self.log_t.exp()[:, None, None]


@dataclass(frozen=True, eq=False)
class Learned(ScoreMod):
    """One learned factor, 0-d."""

    factor: Tensor
    name: ClassVar[str] = "test_learned"

    def apply(self, scores, grid):
        return scores * self.factor


@dataclass(frozen=True, eq=False)
class PerSequence(ScoreMod):
    """A factor per sequence and head, [batch, heads]."""

    factor: Tensor
    name: ClassVar[str] = "test_per_sequence"

    def apply(self, scores, grid):
        return scores * self.factor[:, :, None, None]


@dataclass(frozen=True, eq=False)
class PerKey(ScoreMod):
    """A factor per key, [kv_len]."""

    factor: Tensor
    name: ClassVar[str] = "test_per_key"

    def apply(self, scores, grid):
        return scores * self.factor[grid.kv_idx]


@dataclass(frozen=True, eq=False)
class CroppedPerKey(ScoreMod):
    """A term per query and key, [heads, q_len, kv_len], cut by ``grid.crop``."""

    term: Tensor
    name: ClassVar[str] = "test_cropped"

    def apply(self, scores, grid):
        return scores + grid.crop(self.term[None]).tanh()


MODS = {
    "table": (Relative, lambda b, h, q, k: (h, 2 * WIDTH + 1)),
    "per_head": (Temperature, lambda b, h, q, k: (h,)),
    "scalar": (Learned, lambda b, h, q, k: ()),
    "per_sequence": (PerSequence, lambda b, h, q, k: (b, h)),
    "per_key": (PerKey, lambda b, h, q, k: (k,)),
    "cropped": (CroppedPerKey, lambda b, h, q, k: (h, q, k)),
}


def brute(q, k, v, mods, mask=None):
    """float64 (or the inputs' own float64 graph), every modification on the whole array."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    offset = k.shape[2] - q.shape[2]
    row, col = torch.arange(q.shape[2])[:, None] + offset, torch.arange(k.shape[2])
    for mod in mods:
        (t,) = mod.tensors
        if isinstance(mod, Relative):
            scores = scores + t[:, (row - col).clamp(-WIDTH, WIDTH) + WIDTH]
        elif isinstance(mod, CroppedPerKey):
            scores = scores + t.tanh()
        else:
            factor = t.exp()[:, None, None] if isinstance(mod, Temperature) else t[:, :, None, None] if isinstance(mod, PerSequence) else t
            scores = scores * factor
    if mask is not None:
        scores = scores.masked_fill(col > row, -torch.inf)
    return scores.softmax(-1) @ v


def leaves(shape, names, dtype=torch.float32, dim=8, kv_heads=None):
    """q, k, v and one tensor per modification, all leaves."""
    batch, heads, q_len, kv_len = shape
    kv_heads = heads if kv_heads is None else kv_heads
    sizes = [(batch, heads, q_len, dim), (batch, kv_heads, kv_len, dim), (batch, kv_heads, kv_len, dim)]
    sizes += [MODS[name][1](*shape) for name in names]
    return [torch.randn(size, dtype=dtype).mul_(0.5).requires_grad_() for size in sizes]


def run(tensors, names, backend, **options):
    q, k, v, *params = tensors
    mods = tuple(MODS[name][0](t) for name, t in zip(names, params, strict=True))
    return fa.attention(q, k, v, score_mods=mods, q_offset=int(k.shape[2]) - int(q.shape[2]), backend=backend, **options)


def check(tensors, names, backend, mask=None):
    """Output and every gradient against float64."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    mods = tuple(MODS[name][0](t) for name, t in zip(names, wide[3:], strict=True))
    expected, out = brute(*wide[:3], mods, mask), run(tensors, names, backend, mask=mask)
    weights = torch.linspace(0.5, 1.5, expected.numel(), dtype=torch.float64).view(expected.shape)
    grads = torch.autograd.grad(out, tensors, weights.to(out.dtype))
    exact = torch.autograd.grad(expected, wide, weights)
    for got, right in zip((out, *grads), (expected, *exact), strict=True):
        assert got.shape == right.shape
        assert (got.double() - right).abs().max() <= 2e-5 * (1 + right.abs().max())


@pytest.mark.quick
@pytest.mark.parametrize("applying", APPLYING)
@pytest.mark.parametrize("shape", [(2, 3, 5, 9), (1, 1, 4, 4), (3, 3, 6, 6)], ids=str)
@pytest.mark.parametrize("name", MODS)
def test_every_shape_of_tensor(name, shape, applying):
    check(leaves(shape, (name,)), (name,), applying)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODS)
def test_many_tiles(name, monkeypatch):
    """Rows in blocks, a mask that is cut, grouped heads, unequal lengths."""
    monkeypatch.setattr(tiles, "TILE", 1 << 11)
    shape = (2, 4, 40, 57)
    check(leaves(shape, (name,), kv_heads=2), (name,), "cpu", fa.Causal())


@pytest.mark.parametrize("names", [("table", "per_head"), ("per_sequence", "table"), ("per_key", "scalar")], ids="-".join)
def test_long_rows(names):
    check(leaves((2, 4, 300, 560), names, kv_heads=1), names, "auto", fa.Causal())


@pytest.mark.quick
@pytest.mark.parametrize("applying", APPLYING)
def test_two_modifications_and_one_tensor_twice(applying):
    names = ("per_head", "table", "scalar", "per_sequence")
    check(leaves((2, 2, 7, 7), names), names, applying, fa.Causal())
    q, k, v, log_t = leaves((2, 2, 7, 7), ("per_head",))
    out = fa.attention(q, k, v, score_mods=(Temperature(log_t), Temperature(log_t)), backend=applying)
    (grad,) = torch.autograd.grad(out.sin().sum(), log_t)
    twice = log_t.detach().double().requires_grad_()
    expected = brute(*(t.detach().double() for t in (q, k, v)), (Temperature(2 * twice),)).sin().sum()
    assert torch.allclose(grad.double(), torch.autograd.grad(expected, twice)[0], atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("applying", APPLYING)
def test_auxiliary_outputs(applying):
    tensors = leaves((2, 3, 5, 9), ("table",))
    request = fa.AuxRequest(probs=True, scores=True, lse=True, max_scores=True, column_sums=True, entropy=True)
    _, aux = run(tensors, ("table",), applying, return_aux=request)
    _, exact = run([t.detach().double() for t in tensors], ("table",), "eager", return_aux=request)
    for name in ("probs", "scores", "lse", "max_scores", "column_sums", "entropy"):
        assert torch.allclose(getattr(aux, name).double(), getattr(exact, name), atol=1e-5), name
    grads = torch.autograd.grad(aux.probs.sin().sum() + aux.scores.cos().sum() + aux.lse.sum(), tensors, allow_unused=True)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    _, exact = run(wide, ("table",), "eager", return_aux=request)
    rights = torch.autograd.grad(exact.probs.sin().sum() + exact.scores.cos().sum() + exact.lse.sum(), wide, allow_unused=True)
    for got, right in zip((*grads[:2], grads[3]), (*rights[:2], rights[3]), strict=True):
        assert torch.allclose(got.double(), right, atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODS)
def test_gradients_and_their_gradients(name):
    tensors = leaves((2, 2, 3, 4), (name,), torch.float64, dim=3, kv_heads=1)
    call = lambda *tensors: run(tensors, (name,), "cpu")  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.peers
@pytest.mark.parametrize("name", MODS)
def test_compiled_and_exported(name):
    torch._dynamo.reset()  # one function of the package is compiled anew for every class
    tensors = leaves((2, 2, 5, 7), (name,))
    run_cpu = lambda *tensors: run(tensors, (name,), "cpu")  # noqa: E731
    expected = run_cpu(*tensors)
    grads = torch.autograd.grad(expected.sin().sum(), tensors)
    for backend in APPLYING:
        compiled = torch.compile(lambda *tensors, b=backend: run(tensors, (name,), b), backend="aot_eager", fullgraph=True)(*tensors)
        assert torch.allclose(compiled, expected, atol=1e-5)
        for got, right in zip(torch.autograd.grad(compiled.sin().sum(), tensors), grads, strict=True):
            assert torch.allclose(got, right, atol=1e-5)

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(tensors[3].detach().clone())

        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return run((q, k, v, self.table), (name,), "cpu")

    exported = torch.export.export(Module(), tuple(tensors[:3])).module()
    assert exported(*tensors[:3]).equal(expected)
    (grad,) = torch.autograd.grad(exported(*tensors[:3]).sin().sum(), [exported.table])
    assert torch.allclose(grad, grads[3], atol=1e-6)
    traced = torch.jit.trace(run_cpu, tuple(tensors), check_trace=False)
    assert traced(*tensors).equal(expected)


@pytest.mark.quick
@pytest.mark.parametrize("name", MODS)
def test_batched_gradients(name):
    tensors = leaves((2, 2, 3, 4), (name,))
    out = run(tensors, (name,), "cpu")
    arriving = torch.randn(3, *out.shape)
    one_by_one = [torch.autograd.grad(out, tensors, g, retain_graph=True) for g in arriving]
    for batched in (
        torch.autograd.grad(out, tensors, arriving, is_grads_batched=True, retain_graph=True),
        torch.vmap(lambda g: torch.autograd.grad(out, tensors, g, retain_graph=True))(arriving),
    ):
        for got, parts in zip(batched, zip(*one_by_one, strict=True), strict=True):
            assert torch.allclose(got, torch.stack(parts), atol=1e-6)
    per_q = torch.autograd.grad(out, tensors[:1], arriving, is_grads_batched=True)[0]
    assert torch.allclose(per_q, torch.stack([parts[0] for parts in one_by_one]), atol=1e-6)


@dataclass(frozen=True, eq=False)
class Everything(ScoreMod):
    """Every kind of field, and one that the constructor made."""

    table: Tensor
    count: int
    scale: float
    signed: bool
    plain: bool
    missing: Tensor | None
    index: Tensor
    learned: torch.nn.Parameter
    doubled: Tensor = field(init=False)
    name: ClassVar[str] = "test_everything"

    def __post_init__(self):
        object.__setattr__(self, "doubled", self.table * 2)

    def apply(self, scores, grid):
        assert type(self.count) is int
        assert type(self.scale) is float
        assert self.signed is True
        assert self.plain is False
        assert self.missing is None
        assert self.index.dtype == torch.int64
        assert self.index.shape == (grid.shape[1],)
        assert self.table.shape == (1, 7)
        assert self.learned.shape == ()
        term = self.table[0, self.index % self.count] + self.doubled[0, self.index]
        return scores * (self.scale + term * self.learned)[:, None, None]


@pytest.mark.quick
def test_fields_of_every_kind_stay_what_they_are():
    q, k, v, table = leaves((2, 3, 5, 5), ("scalar",))
    table = torch.randn(1, 7, requires_grad=True)
    learned = torch.nn.Parameter(torch.tensor(0.5))

    def call(table, backend):
        return fa.attention(
            q, k, v, score_mods=(Everything(table, 2**40 + 3, 0.5, True, False, None, torch.tensor([1, 2, 3]), learned),), backend=backend
        )

    expected = call(table, "eager")
    right = torch.autograd.grad(expected.sin().sum(), (table, learned), allow_unused=True)
    compiled = torch.compile(lambda table: call(table, "cpu"), backend="aot_eager", fullgraph=True)
    for out in (call(table, "cpu"), compiled(table)):
        assert torch.allclose(out, expected, atol=1e-6)
        for got, want in zip(torch.autograd.grad(out.sin().sum(), (table, learned), allow_unused=True), right, strict=True):
            assert torch.allclose(got, want, atol=1e-5)


@pytest.mark.quick
def test_the_normal_form_carries_the_fields():
    mod = Everything(
        torch.zeros(1, 7), 2**40, 0.5, True, False, None, torch.zeros(2, dtype=torch.int64), torch.nn.Parameter(torch.ones(()))
    )
    (score,) = mod.lower(Grid((1, 2, 3, 3), torch.device("cpu")))
    assert score.layout == "tifyxnttt"
    assert score.scalars == (2**40, 0.5)
    q = torch.zeros(1, 2, 3, 4)
    problem = fa.problem.AttentionProblem.check(
        q, q, q, {"mask": None, "scale": None, "q_offset": None, "score_mods": (mod, fa.SoftCap(2.0)), "sinks": None, "dropout": None, "return_aux": None}
    )  # fmt: skip
    terms = problem.lower().terms
    again = Terms.unflatten(terms.flatten()).mods
    assert [(m.name, m.scalars, m.layout) for m in again] == [(m.name, m.scalars, m.layout) for m in terms.mods]
    assert again[1] == KernelScore("softcap", (2.0,))
    rebuilt = SCORE_MODS[again[0].name].from_kernel(again[0])
    assert (rebuilt.count, rebuilt.signed, rebuilt.missing) == (2**40, True, None)


@pytest.mark.quick
def test_device_functions_get_four_dimensions_and_gradients_come_back():
    grid, mod = Grid((1, 2, 3, 3), torch.device("cpu")), Relative(torch.randn(2, 9))
    (score,) = mod.lower(grid)
    assert score.tensors[0].shape == (2, 9)
    device = on_device(score, grid)
    assert device.tensors[0].shape == (1, 1, 2, 9)
    assert device.layout is None
    (grad,) = in_own_shape((torch.ones(1, 1, 2, 9),), score, grid)
    assert grad.equal(torch.ones(2, 9))


@dataclass(frozen=True, eq=False)
class Named(ScoreMod):
    """A field that no kernel's schema can carry."""

    kind: str
    name: ClassVar[str] = "test_named"

    def apply(self, scores, grid):
        return scores if self.kind == "none" else scores / 2


@dataclass(frozen=True, eq=False)
class Wrong(ScoreMod):
    """Widens the scores."""

    table: Tensor
    name: ClassVar[str] = "test_wrong"

    def apply(self, scores, grid):
        return scores + self.table


@dataclass(frozen=True, eq=False)
class Nameless(ScoreMod):
    """Forgot its name."""

    def apply(self, scores, grid):
        return scores


@pytest.mark.quick
def test_errors():
    q = torch.randn(1, 2, 4, 4)
    assert fa.attention(q, q, q, score_mods=(Named("none"),), backend="eager").equal(fa.attention(q, q, q, backend="eager"))
    with pytest.raises(fa.UnsupportedError, match=r"Named\.kind must be a tensor, a number, a bool or None.*got str"):
        fa.attention(q, q, q, score_mods=(Named("none"),), backend="cpu")
    for backend in APPLYING:
        with pytest.raises(
            TypeError, match=r"Wrong\.apply must return scores shaped like.*\[1, 2, 4, 4\]; got torch.float32 \[3, 2, 4, 4\]"
        ):
            fa.attention(q, q, q, score_mods=(Wrong(torch.zeros(3, 1, 1, 1)),), backend=backend)
    with pytest.raises(fa.UnsupportedError, match="Nameless must have a name of its own"):
        fa.attention(q, q, q, score_mods=(Nameless(),), backend="cpu")

    class Plain(ScoreMod):
        name = "test_plain"

    with pytest.raises(TypeError, match="Plain must be a dataclass"):
        fa.attention(q, q, q, score_mods=(Plain(),))
    SCORE_MODS.pop("test_plain")


@pytest.mark.quick
@pytest.mark.parametrize("name", ["table", "per_head", "scalar", "per_key"])
def test_a_batch_is_as_good_alone(name, monkeypatch):
    """Blocks of rows do not depend on how many batches there are."""
    monkeypatch.setattr(tiles, "TILE", 1 << 11)
    tensors = [t.detach() for t in leaves((5, 4, 40, 57), (name,))]
    whole = run(tensors, (name,), "cpu", mask=fa.Causal())
    for b in range(5):
        alone = run([*(t[b : b + 1] for t in tensors[:3]), tensors[3]], (name,), "cpu", mask=fa.Causal())
        assert whole[b : b + 1].equal(alone)


@pytest.mark.quick
@pytest.mark.parametrize("applying", APPLYING)
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("name", [*MODS, "ALiBi", "ALiBi2", "Bias", "SoftCap", "DecayBias"])
def test_empty_arrays(name, shape, applying):
    batch, heads, q_len, kv_len = shape
    built_in = {
        "ALiBi": lambda: fa.ALiBi(torch.randn(heads, requires_grad=True)),
        "ALiBi2": lambda: fa.ALiBi(torch.randn(batch, heads, requires_grad=True)),
        "Bias": lambda: fa.Bias(torch.randn(shape, requires_grad=True)),
        "SoftCap": lambda: fa.SoftCap(2.0),
        "DecayBias": lambda: fa.DecayBias(torch.randn(1, heads, kv_len, requires_grad=True)),
    }
    if name == "DecayBias" and q_len > kv_len:
        pytest.skip("DecayBias wants every query on a key")
    mod = built_in[name]() if name in built_in else MODS[name][0](torch.randn(MODS[name][1](*shape), requires_grad=True))
    q = torch.randn(batch, heads, q_len, 8, requires_grad=True)
    k, v = (torch.randn(batch, heads, kv_len, 8, requires_grad=True) for _ in range(2))
    out = fa.attention(q, k, v, score_mods=(mod,), q_offset=0, backend=applying)
    assert out.equal(torch.zeros(batch, heads, q_len, 8))
    grads = torch.autograd.grad(out.sum(), (q, k, v, *mod.tensors), create_graph=True, allow_unused=True)
    for grad, tensor in zip(grads, (q, k, v, *mod.tensors), strict=True):
        assert grad is None or grad.equal(torch.zeros_like(tensor))
    once = torch.autograd.grad(
        fa.attention(q, k, v, score_mods=(mod,), q_offset=0, backend=applying).sum(), (q, k, v, *mod.tensors), allow_unused=True
    )
    assert all(g is None or g.equal(torch.zeros_like(g)) for g in once)


@dataclass(frozen=True, eq=False)
class LogDistance(ScoreMod):
    """NaN wherever a key lies behind the query's own position."""

    gain: Tensor
    name: ClassVar[str] = "test_log_distance"
    positional: ClassVar[bool] = True

    def apply(self, scores, grid):
        return scores * (1 + (grid.q_pos - grid.kv_idx + 1).to(scores.dtype).log()) + self.gain


@pytest.mark.quick
@pytest.mark.parametrize("applying", APPLYING)
def test_nan_where_nobody_attends_stays_there(applying):
    q, k, v = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    gain = torch.zeros((), requires_grad=True)
    out = fa.attention(q, k, v, mask=fa.Causal(), score_mods=(LogDistance(gain),), backend=applying)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sin().sum(), (q, k, v, gain)))


@pytest.mark.quick
@pytest.mark.parametrize("offset", [2**31, 2**40, -(2**40)])
def test_offsets_beyond_32_bits(offset):
    """Positions are int64: ALiBi's distance does not wrap, and a forgetting curve says NaN instead of reading elsewhere."""
    grid = Grid((2, 1, 3, 4), torch.device("cpu"), torch.tensor([offset, 0]))
    got = fa.ALiBi(torch.tensor([1.0], dtype=torch.float64)).apply(torch.zeros(2, 1, 3, 4, dtype=torch.float64), grid)
    distance = (torch.arange(3)[:, None] + torch.tensor([offset, 0])[:, None, None] - torch.arange(4)).abs()
    assert got[:, 0].equal(-distance.double())
    curve = fa.DecayBias(torch.randn(1, 1, 4)).apply(torch.zeros(2, 1, 3, 4), grid)
    assert curve[0].isnan().all()
    assert curve[1].isfinite().all()
    q = torch.randn(2, 1, 3, 8)
    k = torch.randn(2, 1, 4, 8)
    mods, offsets = (fa.ALiBi(torch.tensor([0.0])),), torch.tensor([offset, 0])
    for backend in APPLYING:
        out = fa.attention(q, k, k, score_mods=mods, q_offset=offsets, backend=backend)
        assert torch.allclose(out, fa.attention(q, k, k, backend="eager"), atol=1e-6)


@pytest.mark.quick
def test_numbers_of_numpy_and_sizes_of_every_kind():
    numpy = pytest.importorskip("numpy")

    @dataclass(frozen=True, eq=False)
    class Scaled(ScoreMod):
        by: int
        plus: float
        wanted: bool
        name: ClassVar[str] = "test_scaled"

        def apply(self, scores, grid):
            return scores * [1, 1, 1][self.by] * 2 + self.plus if self.wanted else scores

    for length in (8, 700):
        q = torch.randn(1, 2, length, 4)
        for fields in ((2, 0.5, True), (numpy.int64(2), numpy.float32(0.5), numpy.bool_(True))):
            got = fa.attention(q, q, q, score_mods=(Scaled(*fields),))
            torch.testing.assert_close(got, fa.attention(q, q, q, scale=1.0), rtol=1e-4, atol=1e-5)
    SCORE_MODS.pop("test_scaled")


@pytest.mark.quick
def test_what_has_no_normal_form_runs_on_eager_at_every_size():
    @dataclass(frozen=True, eq=False)
    class Text(ScoreMod):
        kind: str
        name: ClassVar[str] = "test_text"

        def apply(self, scores, grid):
            return scores

    for length in (4, 700):
        q = torch.randn(1, 2, length, 4)
        assert fa.attention(q, q, q, score_mods=(Text("none"),)).shape == q.shape
        assert "Text.kind must be a tensor" in str(fa.explain(q, q, q, score_mods=(Text("none"),)))
    SCORE_MODS.pop("test_text")


@pytest.mark.quick
@pytest.mark.parametrize("applying", APPLYING)
def test_apply_may_write_into_its_scores(applying):
    @dataclass(frozen=True, eq=False)
    class InPlace(ScoreMod):
        factor: Tensor
        name: ClassVar[str] = "test_in_place"

        def apply(self, scores, grid):
            return scores.mul_(self.factor)

    q, factor = torch.randn(1, 2, 5, 4, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    out = fa.attention(q, q, q, score_mods=(InPlace(factor),), backend=applying)
    right = fa.attention(q, q, q, scoring=fa.DotProduct(factor * 0.5), backend="eager")
    torch.testing.assert_close(out, right)
    for a, b in zip(*(torch.autograd.grad(o.sin().sum(), (q, factor)) for o in (out, right)), strict=True):
        torch.testing.assert_close(a, b)
    SCORE_MODS.pop("test_in_place")
