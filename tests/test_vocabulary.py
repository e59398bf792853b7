"""Masks and score modifications: pictures, combination, and that the normal form means what the vocabulary says."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import operator
import pkgutil
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fused_attn as fa
from fused_attn.lowering import Grid, KernelMask, KernelScore, LoweredAttention, Terms
from fused_attn.masks import Mask
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import SCORE_MODS, ScoreMod
from fused_attn.testing import vocabulary

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")
property_test = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
NAMES = list(vocabulary(Mask, Grid((2, 2, 4, 4), CPU)))
MOD_NAMES = list(vocabulary(ScoreMod, Grid((2, 2, 4, 4), CPU)))


@st.composite
def grids(draw, q_len=None, kv_len=None):
    q_len = st.integers(1, 12) if q_len is None else q_len
    kv_len = st.integers(1, 14) if kv_len is None else kv_len
    shape = (draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(q_len), draw(kv_len))
    offsets = st.integers(-6, 16)
    offset = draw(st.one_of(offsets, st.lists(offsets, min_size=shape[0], max_size=shape[0]).map(torch.tensor)))
    return Grid(shape, CPU, offset)


@st.composite
def masks(draw, grid):
    """One to three masks of the package combined, mostly with ``&``."""
    known = vocabulary(Mask, grid)
    names = draw(st.lists(st.sampled_from(sorted(known)), min_size=1, max_size=3))
    mask = known[names[0]]
    for name in names[1:]:
        join = draw(st.sampled_from([operator.and_, operator.and_, operator.or_]))
        mask = join(mask, draw(st.sampled_from([known[name], known[name], ~known[name]])))
    return mask


def meaning(mask, grid):
    return mask.keep(grid).expand(grid.shape)


PICTURES = {
    "causal": (fa.Causal(), "#.../##../###./####"),
    "causal-and-band": (fa.Causal() & fa.Band(2), "#.../##../.##./..##"),
    "window-and-lengths": (fa.SlidingWindow(None, 1) & fa.ValidLengths(torch.tensor([3])), "##../###./###./###."),
    "tensor-and-causal": (torch.eye(4, dtype=torch.bool) & fa.Causal(), "#.../.#../..#./...#"),
    "causal-and-tensor": (fa.Causal() & torch.eye(4, dtype=torch.bool), "#.../.#../..#./...#"),
    "prefix": (fa.PrefixLM(2), "##../##../###./####"),
    "documents-and-causal": (fa.Documents(torch.tensor([5, 5, 1, 1])) & fa.Causal(), "#.../##../..#./..##"),
}


@pytest.mark.parametrize(("mask", "picture"), PICTURES.values(), ids=PICTURES.keys())
def test_pictures(mask, picture):
    assert mask.picture() == picture.replace("/", "\n")


def test_and_is_flat_and_keeps_order():
    a, b, c = fa.Causal(), fa.Band(2), fa.PrefixLM(1)
    assert ((a & b) & c).masks == (a & (b & c)).masks == (a, b, c)
    assert (a & b).positional
    assert not (fa.ValidLengths(torch.tensor([1])) & fa.Dense(torch.ones(1, 1).bool())).positional


@pytest.mark.parametrize("name", NAMES)
@given(grid=grids())
@property_test
def test_lowering_equals_meaning(name, grid):
    mask = vocabulary(Mask, grid)[name]
    dense = mask.lower(grid).dense(grid)
    assert dense.expand(grid.shape).equal(meaning(mask, grid))


@given(st.data())
@property_test
def test_combinations_lower_to_their_meaning(data):
    grid = data.draw(grids())
    mask = data.draw(masks(grid))
    lowered = mask.lower(grid)
    assert (torch.ones((), dtype=torch.bool) if lowered.is_trivial else lowered.dense(grid)).expand(grid.shape).equal(meaning(mask, grid))


@given(st.data())
@property_test
def test_a_region_is_a_crop_of_the_whole(data):
    grid = data.draw(grids())
    mask = data.draw(masks(grid))
    ranges = []
    for size in grid.shape:
        start = data.draw(st.integers(0, size - 1))
        ranges.append((start, data.draw(st.integers(start + 1, size))))
    cut = meaning(mask, grid)[tuple(slice(*r) for r in ranges)]
    region = grid.at(*ranges)
    assert mask.keep(region).expand(cut.shape).equal(cut)
    dense = mask.lower(grid).dense(region)
    assert dense is None or dense.expand(cut.shape).equal(cut)


@given(st.data())
@property_test
def test_tile_bounds_against_brute_force(data):
    grid = data.draw(grids())
    lowered, block = data.draw(masks(grid)).lower(grid), data.draw(st.sampled_from([1, 2, 4, 16]))
    intervals = KernelMask(lowered.left, lowered.right, lowered.kv_start, lowered.kv_end)
    whole = torch.ones(grid.shape, dtype=torch.bool) if intervals.is_trivial else intervals.dense(grid).expand(grid.shape)
    bounds = lowered.tile_bounds(grid, block)
    for b in range(grid.shape[0]):
        for tile in range(bounds.shape[2]):
            first, last, full_first, full_last = bounds[:, b if bounds.shape[1] > 1 else 0, tile].tolist()
            rows = whole[b, 0, tile * block : (tile + 1) * block]
            reached = rows.any(0).nonzero().flatten().tolist()
            assert (first >= last) == (not reached)
            if reached:
                assert (first, last) == (reached[0], reached[-1] + 1)
            every = rows.all(0).nonzero().flatten().tolist()
            assert list(range(full_first, full_last)) == every


@given(st.data())
@property_test
def test_tile_summary_against_brute_force(data):
    grid = data.draw(grids())
    shape = [data.draw(st.sampled_from([1, n])) for n in grid.shape]
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))) < data.draw(
        st.sampled_from([0.1, 0.5, 0.95])
    )
    blocks = data.draw(st.sampled_from([(1, 1), (2, 3), (4, 4), (16, 16)]))
    summary = KernelMask(keep=keep).tile_summary(grid, *blocks)
    for index in range(summary.numel()):
        b, h, i, j = (int(x) for x in torch.unravel_index(torch.tensor(index), summary.shape))
        tile = keep[
            b,
            h,
            i * blocks[0] : (i + 1) * blocks[0] if shape[2] > 1 else None,
            j * blocks[1] : (j + 1) * blocks[1] if shape[3] > 1 else None,
        ]
        assert int(summary[b, h, i, j]) == int(tile.any()) + int(tile.all())


def test_without_keep_there_is_no_summary():
    assert KernelMask(right=0).tile_summary(Grid((1, 1, 4, 4), CPU), 2, 2) is None


def same(a, b):
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and a.shape == b.shape
            and bool(((a == b) | (a.isnan() & b.isnan())).all())
        )
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


FIELDS = ("mask", "scale", "q_offset", "mods", "sinks", "dropout")


@given(st.data())
@property_test
def test_flatten_is_undone_by_unflatten(data):
    grid = data.draw(grids(st.just(5), st.just(12)).filter(lambda g: isinstance(g.q_offset, torch.Tensor) or 0 <= g.q_offset <= 7))
    known = vocabulary(ScoreMod, grid)
    mods = tuple(known[n] for n in data.draw(st.lists(st.sampled_from(MOD_NAMES), max_size=4)))
    batch, heads, q_len, kv_len = grid.shape
    options = {
        "mask": data.draw(masks(grid)), "scale": data.draw(st.floats(-2, 2)), "q_offset": grid.q_offset, "score_mods": mods, "return_aux": None,
        "sinks": data.draw(st.sampled_from([None, torch.arange(float(heads))])), "dropout": data.draw(st.sampled_from([None, fa.Dropout(0.25, seed=9)])),
    }  # fmt: skip
    shape = (batch, heads, kv_len, 4)
    terms = AttentionProblem.check(torch.zeros(batch, heads, q_len, 4), torch.zeros(shape), torch.zeros(shape), options).lower().terms
    terms = replace(terms, mask=terms.mask.as_tensors(grid))
    again = Terms.unflatten(terms.flatten())
    assert all(same(getattr(terms.mask, n), getattr(again.mask, n)) for n in ("left", "right", "kv_start", "kv_end", "keep"))
    assert all(same(getattr(terms, n), getattr(again, n)) for n in FIELDS[1:3])
    assert [(m.name, m.scalars) for m in again.mods] == [(m.name, m.scalars) for m in terms.mods]
    assert all(same(a.tensors, b.tensors) for a, b in zip(again.mods, terms.mods, strict=True))
    assert same(terms.sinks, again.sinks)
    assert same(terms.dropout, again.dropout)


@pytest.mark.parametrize("name", MOD_NAMES)
@given(grid=grids(st.integers(1, 5), st.integers(8, 12)).filter(lambda g: isinstance(g.q_offset, torch.Tensor) or 0 <= g.q_offset <= 3))
@property_test
def test_mods_lower_to_their_meaning(name, grid):
    mod = vocabulary(ScoreMod, grid)[name]
    scores = torch.linspace(-2, 2, grid.shape[3], dtype=torch.float64).expand(grid.shape)
    expected, got = mod.apply(scores, grid), scores
    for term in mod.lower(grid):
        got = SCORE_MODS[term.name].from_kernel(term).apply(got, grid)
    assert ((got - expected).abs().nan_to_num() <= 8 * torch.finfo(torch.float32).eps * (1 + expected.abs().nan_to_num())).all()
    assert got.isnan().equal(expected.isnan())


def test_every_term_is_at_most_four_dimensional():
    grid = Grid((2, 2, 4, 4), CPU)
    for mod in vocabulary(ScoreMod, grid).values():
        for term in mod.lower(grid):
            assert isinstance(term, KernelScore)
            assert all(t.dim() == 4 for t in term.tensors)


def test_lowered_shapes():
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    assert LoweredAttention(q, k, k, Terms(KernelMask(), 1.0)).grid.shape == (2, 4, 3, 5)


def _modules():
    for info in pkgutil.walk_packages(fa.__path__, "fused_attn."):
        if info.name.endswith(("__main__", "._native", "._cpu")) or (".triton" in info.name and importlib.util.find_spec("triton") is None):
            continue
        yield info.name


@pytest.mark.parametrize("name", ["fused_attn", *_modules()])
def test_doctests(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        missing = error.name or ""
        if missing.startswith("fused_attn"):
            raise
        pytest.skip(f"{missing} is not installed")
    if name.endswith("flash_registry") and not hasattr(torch.nn.attention, "restore_flash_attention_impl"):
        pytest.skip("this torch has no registry of flash implementations, or one that cannot be left again")
    torch.manual_seed(0)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
