"""Eager against a second definition: plain Python loops, every mask and modification written again from its meaning in words.

Two independent references guard against both being wrong alike (a causal alignment wrong in kernel and reference has happened).
The error rule itself is put to the test here too: it must notice defects.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.backends import eager
from fused_attn.lowering import Grid
from fused_attn.masks import And, Mask, MaskMod, Not, Or
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ScoreMod
from fused_attn.testing import DIFFERENTIABLE, EVERYTHING, Case, evaluate, make_inputs, violations, vocabulary

pytestmark = pytest.mark.quick
CPU = torch.device("cpu")


def at(tensor: Tensor, *index: int) -> Any:
    """Element of a tensor that broadcasts from the right."""
    own = index[len(index) - tensor.dim() :]
    return tensor[tuple(0 if n == 1 else i for i, n in zip(own, tensor.shape, strict=True))].item()


def prefix_of(mask: Any, b: int) -> int:
    return int(mask.prefix[b]) if isinstance(mask.prefix, Tensor) else mask.prefix


def length_of(mask: Any, b: int, i: int) -> int:
    number = mask.lens[b] if mask.lens.dim() == 1 else mask.lens[b][i]
    return math.ceil(float(number))


def id_at(ids: Tensor, b: int, position: int) -> int | None:
    row = (ids if ids.dim() == 1 else ids[b]).tolist()
    return row[position] if 0 <= position < len(row) else None


def same_document(mask: Any, b: int, i: int, position: int, j: int) -> bool:
    mine = id_at(mask.ids, b, position) if mask.q_ids is None else id_at(mask.q_ids, b, i)
    return mine is not None and mine == id_at(mask.ids, b, j)


def same_block(mask: Any, b: int, position: int, j: int) -> bool:
    mine = id_at(mask.ids, b, position)
    return mine is not None and mine >= 0 and mine == id_at(mask.ids, b, j)


# mask, batch, head, query, the query's position, key -> may attend
MEANINGS: dict[type, Callable[..., bool]] = {
    fa.Causal: lambda m, b, h, i, p, j: not j > p,
    fa.SlidingWindow: lambda m, b, h, i, p, j: (m.left is None or p - j <= m.left) and (m.right is None or j - p <= m.right),
    fa.Band: lambda m, b, h, i, p, j: j in range(p - m.width + 1, p + m.width),
    fa.ValidLengths: lambda m, b, h, i, p, j: j in range(length_of(m, b, i)),
    fa.KeyPadding: lambda m, b, h, i, p, j: m.keep_keys[b].tolist()[j],
    fa.Chunked: lambda m, b, h, i, p, j: math.floor(p / m.size) == math.floor(j / m.size),
    fa.BlockCausal: lambda m, b, h, i, p, j: math.floor(j / m.size) <= math.floor(p / m.size),
    fa.Documents: lambda m, b, h, i, p, j: same_document(m, b, i, p, j),
    fa.BidirectionalBlocks: lambda m, b, h, i, p, j: same_block(m, b, p, j),
    fa.PrefixLM: lambda m, b, h, i, p, j: j in range(prefix_of(m, b)) or not j > p,
    fa.Dense: lambda m, b, h, i, p, j: at(m.keep_pairs, b, h, i, j),
    And: lambda m, b, h, i, p, j: all(MEANINGS[type(part)](part, b, h, i, p, j) for part in m.masks),
    Or: lambda m, b, h, i, p, j: any(MEANINGS[type(part)](part, b, h, i, p, j) for part in m.masks),
    Not: lambda m, b, h, i, p, j: not MEANINGS[type(m.mask)](m.mask, b, h, i, p, j),
    MaskMod: lambda m, b, h, i, p, j: bool(m.fn(*map(torch.tensor, (b, h, i, j)))),
}
# modification, score, batch, head, query, position, key -> score
EFFECTS: dict[type, Callable[..., float]] = {
    fa.SoftCap: lambda m, s, b, h, i, p, j: m.cap * math.tanh(s / m.cap),
    fa.ALiBi: lambda m, s, b, h, i, p, j: s - at(m.slopes, b, h) * (p - j if p > j else j - p),
    fa.Bias: lambda m, s, b, h, i, p, j: s + at(m.bias, b, h, i, j),
    fa.DecayBias: lambda m, s, b, h, i, p, j: s + at(m.c, b, h, p) - at(m.c, b, h, j),
}


def offset_of(offset: int | Tensor, b: int) -> int:
    return int(offset[b]) if isinstance(offset, Tensor) else offset


def brute_force(problem: AttentionProblem) -> dict[str, Tensor]:
    """Attention by loops over batch, heads, queries and keys, in Python floats."""
    (batch, heads, q_len, kv_len), m = problem.shape, problem.modifiers
    q, k, v = (t.tolist() for t in (problem.q, problem.k, problem.v))
    group = heads // problem.k.shape[1]
    value_dim = problem.v.shape[-1]
    rows: dict[str, list[Any]] = {n: [] for n in ("out", "probs", "scores", "lse", "max_scores", "entropy")}
    is_selective, taken = any(isinstance(mod, fa.Selective) for mod in m.score_mods), {}
    for b, h, i in itertools.product(range(batch), range(heads), range(q_len)):
        p = i + offset_of(m.q_offset, b)
        scores = []
        for j in range(kv_len):
            s = m.scale * sum(x * y for x, y in zip(q[b][h][i], k[b][h // group][j], strict=True))
            for mod in m.score_mods[: -1 if is_selective else None]:
                s = EFFECTS[type(mod)](mod, s, b, h, i, p, j)
            scores.append(s if m.mask is None or MEANINGS[type(m.mask)](m.mask, b, h, i, p, j) else -math.inf)
        if is_selective:
            if h == 0:
                taken[b, i] = [max(0.0, s) if j > p - i and j != p else 0.0 for j, s in enumerate(scores)]
            scores = [s - sum(taken[b, earlier][j] for earlier in range(i)) for j, s in enumerate(scores)]
        exps = [math.exp(s) for s in scores]
        total = sum(exps) + (math.exp(float(m.sinks[h])) if m.sinks is not None else 0.0)
        probs = [e / total if total else 1 / kv_len if problem.empty_rows != "zero" else 0.0 for e in exps]
        if m.normalizer is not None:
            probs = [1 / (1 + math.exp(-(s + m.normalizer.bias))) for s in scores]
        rows["probs"].append(probs)
        rows["scores"].append(scores)
        rows["lse"].append(math.log(total) if total else -math.inf)
        rows["max_scores"].append(max(scores, default=-math.inf))
        rows["entropy"].append(-sum(x * math.log(x) for x in probs if x > 0))
        rows["out"].append([sum(w * v[b][h // group][j][d] for j, w in enumerate(probs)) for d in range(value_dim)])
    tensors = {
        n: torch.tensor(r, dtype=torch.float64).reshape(
            batch, heads, q_len, *([value_dim] if n == "out" else [kv_len] * (n in ("probs", "scores")))
        )
        for n, r in rows.items()
    }
    return tensors | {"column_sums": tensors["probs"].sum(2)}


def agree(case: Case, mask: Mask | None = None, **changes: Any) -> dict[str, Tensor]:
    """The definition and the loops on one case; ``changes`` are of the problem or of its modifiers."""
    problem = make_inputs(case).problem
    if mask is not None:
        problem = replace(problem, modifiers=replace(problem.modifiers, mask=mask))
    of_modifiers = {n: x for n, x in changes.items() if hasattr(problem.modifiers, n)}
    problem = replace(
        problem, modifiers=replace(problem.modifiers, **of_modifiers), **{n: changes[n] for n in changes.keys() - of_modifiers}
    )
    out, aux = eager.attention(problem)
    want = brute_force(problem)
    for name, tensor in want.items():
        if name != "out" and getattr(aux, name) is None:
            continue
        torch.testing.assert_close(out if name == "out" else getattr(aux, name), tensor, msg=lambda m, n=name: f"{n}: {m}")
    return want


GRID = Grid((2, 2, 4, 4), CPU)
KNOWN_MASKS = [n for n, m in vocabulary(Mask, GRID).items() if type(m) in MEANINGS]
KNOWN_MODS = [n for n, m in vocabulary(ScoreMod, GRID).items() if type(m) in EFFECTS]
SHAPES = [
    ((2, 4, 2), (7, 7), "top"),
    ((2, 4, 2), (5, 9), "bottom"),
    ((2, 2, 1), (5, 9), "top"),
    ((2, 2, 2), (9, 5), "bottom"),
    ((3, 2, 1), (6, 11), "mixed"),
]


def test_every_public_mask_and_modification_has_a_second_meaning() -> None:
    public = [getattr(fa, n) for n in fa.__all__]
    masks = {c for c in public if isinstance(c, type) and issubclass(c, Mask)}
    mods = {c for c in public if isinstance(c, type) and issubclass(c, ScoreMod)}
    assert masks <= MEANINGS.keys() and mods - {fa.Selective} <= EFFECTS.keys() and len(KNOWN_MASKS) > 12 and len(KNOWN_MODS) > 6


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"q{s[1][0]}k{s[1][1]}{s[2]}")
@pytest.mark.parametrize("empty_rows", ["uniform", "softmax"])
def test_empty_rows(empty_rows: str, shape: Any) -> None:
    agree(Case(*shape[:2], (3, 2), torch.float64, ("Causal0", "KeyPadding0"), offset=shape[2]), empty_rows=empty_rows)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"q{s[1][0]}k{s[1][1]}{s[2]}")
def test_selective(shape: Any) -> None:
    case = Case(*shape[:2], (3, 2), torch.float64, ("Causal0", "KeyPadding0"), offset=shape[2])
    agree(case, score_mods=(fa.SoftCap(2.0), fa.Selective()))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"q{s[1][0]}k{s[1][1]}{s[2]}")
def test_sigmoid(shape: Any) -> None:
    case = Case(*shape[:2], (3, 2), torch.float64, ("Causal0", "KeyPadding0"), ("SoftCap0",), offset=shape[2])
    agree(case, normalizer=fa.Sigmoid(-1.5), aux=fa.AuxRequest(probs=True, scores=True, max_scores=True, column_sums=True))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"q{s[1][0]}k{s[1][1]}{s[2]}")
@pytest.mark.parametrize("mask", ["", *KNOWN_MASKS])
def test_masks(mask: str, shape: Any) -> None:
    agree(Case(*shape[:2], (3, 2), torch.float64, (mask,) if mask else (), offset=shape[2]))


@pytest.mark.parametrize("pair", list(itertools.combinations(KNOWN_MASKS, 2)), ids="&".join)
def test_pairs_of_masks(pair: tuple[str, str]) -> None:
    agree(Case((2, 1, 1), (4, 6), (2, 2), torch.float64, pair, offset="bottom"))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1][0] <= s[1][1]], ids=lambda s: f"q{s[1][0]}k{s[1][1]}{s[2]}")
@pytest.mark.parametrize(
    "mods", [(m,) for m in KNOWN_MODS] + list(itertools.permutations(("SoftCap0", "ALiBi0", "Bias1", "DecayBias0"), 2)), ids="+".join
)
def test_modifications_and_their_order(mods: tuple[str, ...], shape: Any) -> None:
    agree(Case(*shape[:2], (3, 2), torch.float64, ("PrefixLM0",), mods, True, offset=shape[2]))


def test_sinks_join_only_the_denominator() -> None:
    want = agree(Case((2, 3, 1), (5, 7), (3, 4), torch.float64, sinks=True))
    assert (want["probs"].sum(-1) < 1).all()


def test_a_row_without_keys_but_with_a_sink() -> None:
    want = agree(Case((1, 2, 1), (3, 4), (2, 2), torch.float64, sinks=True), fa.Dense(torch.zeros(1, 1, dtype=torch.bool)))
    assert (want["out"] == 0).all() and want["lse"].isfinite().all()


def test_alignment_in_numbers() -> None:
    """Causal with 2 queries and 5 keys: top-left sees 1 and 2 keys, bottom-right 4 and 5."""
    q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 5, 4)
    for offset, seen in ((0, [1, 2]), (3, [4, 5]), (-1, [0, 1]), (torch.tensor([2]), [3, 4])):
        _, aux = fa.attention(q, k, k, mask=fa.Causal(), q_offset=offset, return_aux=EVERYTHING, backend="eager")
        assert (aux.probs > 0).sum(-1).flatten().tolist() == seen


def test_grouped_heads_in_numbers() -> None:
    """Query heads 0, 1, 2 read key head 0; heads 3, 4, 5 key head 1."""
    v = torch.tensor([10.0, 20.0])[None, :, None, None].expand(1, 2, 3, 1)
    out = fa.attention(torch.zeros(1, 6, 1, 4), torch.zeros(1, 2, 3, 4), v, backend="eager")
    assert out.flatten().tolist() == [10, 10, 10, 20, 20, 20]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 2, 3, 4)], ids=str)
def test_softmax(shape: tuple[int, ...], empty_rows: Any, log: bool) -> None:
    scores = torch.randn(shape, dtype=torch.float64)
    keep = torch.rand(shape) > 0.4
    keep.view(-1, 4)[0] = False
    bias = torch.randn(4, dtype=torch.float64)
    out = fa.masked_softmax(scores, keep, scale=0.7, bias=bias, log=log, empty_rows=empty_rows, backend="eager")
    for row, kept, got in zip(scores.view(-1, 4).tolist(), keep.view(-1, 4).tolist(), out.view(-1, 4).tolist(), strict=True):
        exps = [math.exp(0.7 * s + b) if k else 0.0 for s, b, k in zip(row, bias.tolist(), kept, strict=True)]
        want = [e / sum(exps) for e in exps] if any(kept) else [0.25 if empty_rows == "uniform" else 0.0] * 4
        assert got == pytest.approx([(math.log(w) if w else -math.inf) if log else w for w in want], rel=1e-12, abs=0)


@pytest.mark.parametrize("shape", [(2, 2, 9, 9), (2, 2, 5, 11), (3, 1, 11, 5)], ids=str)
@pytest.mark.parametrize("mask", ["", *vocabulary(Mask, GRID)])
def test_normal_form_says_the_same(mask: str, shape: tuple[int, int, int, int]) -> None:
    """lower() agrees with keep() element by element, and tile bounds with the elements of each tile."""
    for offset in (0, shape[3] - shape[2], -3, torch.arange(shape[0]) * 2 - 1):
        grid = Grid(shape, CPU, offset)
        if not mask:
            continue
        meaning = vocabulary(Mask, grid)[mask]
        keep = meaning.keep(grid)
        full = keep[(None,) * (4 - keep.dim())].expand(shape)
        lowered = meaning.lower(grid)
        dense = lowered.dense(grid)
        assert dense is not None and torch.equal(dense.expand(shape), full)
        part = grid.at((0, 1), (0, 1), (1, 4), (2, 5))
        piece, whole = lowered.dense(part), meaning.keep(part)
        assert torch.equal(piece.expand(1, 1, 3, 3), full[:1, :1, 1:4, 2:5]) and torch.equal(
            whole.expand(1, 1, 3, 3), full[:1, :1, 1:4, 2:5]
        )
        for block_q in (1, 2, 4, 16):
            first, last, full_first, full_last = lowered.tile_bounds(grid, block_q)
            inside = replace(lowered, keep=None).dense(grid) if lowered.has_intervals else torch.ones(1, 1, 1, 1, dtype=torch.bool)
            inside = inside.expand(max(first.shape[0], inside.shape[0]), 1, *shape[2:])
            for b, tile in itertools.product(range(inside.shape[0]), range(first.shape[1])):
                rows = inside[b, 0, tile * block_q : (tile + 1) * block_q]
                row = min(b, first.shape[0] - 1)
                reached, everywhere = rows.any(0).nonzero().flatten().tolist(), rows.all(0).nonzero().flatten().tolist()
                assert (
                    [int(first[row, tile]), int(last[row, tile]) - 1] == [min(reached), max(reached)]
                    if reached
                    else int(first[row, tile]) >= int(last[row, tile])
                )
                assert everywhere == list(range(int(full_first[row, tile]), int(full_last[row, tile])))
            summary = lowered.tile_summary(grid, block_q, 3)
            if summary is not None:
                kept = lowered.keep.expand(shape)
                wide = summary.expand(
                    shape[0],
                    shape[1],
                    *[
                        s if n > 1 else -(-m // t)
                        for s, n, m, t in zip(summary.shape[2:], lowered.keep.shape[2:], shape[2:], (block_q, 3), strict=True)
                    ],
                )
                for b, h, y, x in itertools.product(*map(range, wide.shape)):
                    tile_keep = kept[b, h, y * block_q : (y + 1) * block_q, x * 3 : (x + 1) * 3]
                    assert int(wide[b, h, y, x]) == int(tile_keep.any()) + int(tile_keep.all())


def rounded_to_tf32(tensor: Tensor) -> Tensor:
    return (tensor.float().view(torch.int32) & ~0x1FFF).view(torch.float32).to(tensor.dtype)


def modified(problem: AttentionProblem, **changes: Any) -> AttentionProblem:
    return replace(problem, modifiers=replace(problem.modifiers, **changes))


DEFECTS: dict[str, Callable[[AttentionProblem], AttentionProblem]] = {
    "mask_off_by_one": lambda p: modified(p, mask=fa.SlidingWindow(None, 1)),
    "mask_ignored": lambda p: modified(p, mask=None),
    "last_key_dropped": lambda p: modified(p, mask=p.modifiers.mask & fa.Dense(torch.arange(p.shape[3]) < p.shape[3] - 1)),
    "sinks_ignored": lambda p: modified(p, sinks=p.modifiers.sinks * 0 - 1e4),
    "other_dropout": lambda p: modified(p, dropout=fa.Dropout(0.2, seed=12)),
    "dropout_unscaled": lambda p: p.with_inputs((p.q, p.k, p.v * 0.8, *p.inputs[3:])),
    "scale_off": lambda p: modified(p, scale=p.modifiers.scale * 1.05),
    "heads_swapped": lambda p: p.with_inputs((p.q, p.k.flip(1), p.v, *p.inputs[3:])),
    "softcap_forgotten": lambda p: modified(p, score_mods=p.modifiers.score_mods[1:]),
    "order_of_modifications": lambda p: modified(p, score_mods=p.modifiers.score_mods[::-1]),
    "half_the_head_dim": lambda p: p.with_inputs((p.q * (torch.arange(p.q.shape[-1]) < p.q.shape[-1] - 1), *p.inputs[1:])),
}
DEFECTIVE = Case((2, 4, 2), (33, 40), (16, 12), masks=("Causal0",), mods=("SoftCap0", "Bias1"), sinks=True, dropout=0.2, offset="bottom")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("defect", DEFECTS)
def test_error_rule_notices(defect: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(replace(DEFECTIVE, dtype=dtype))

    def broken(problem: AttentionProblem) -> Any:
        out, aux = eager.attention(DEFECTS[defect](problem))
        dead = sum(t.sum() * 0 for t in problem.inputs).to(out.dtype)  # a forgotten input still has a place in the graph
        return out + dead, aux

    wrong = violations(inputs, evaluate(broken, inputs, ("out",)), ("out",))
    assert any(w.startswith("out:") for w in wrong), wrong
    assert any(w.startswith("dv:") for w in wrong), wrong


def test_error_rule_notices_tf32_and_wrong_gradients() -> None:
    """TF32 products in float32, a gradient that is written over instead of added, one bad element, one NaN, a wrong shape."""
    inputs = make_inputs(DEFECTIVE)
    good = evaluate(eager.attention, inputs, DIFFERENTIABLE)
    assert violations(inputs, good, DIFFERENTIABLE) == []
    tf32 = evaluate(
        lambda p: eager.attention(p.with_inputs((*(rounded_to_tf32(t.detach()) + (t - t.detach()) for t in p.inputs[:3]), *p.inputs[3:]))),
        inputs,
    )
    names = {w.split(":")[0] for w in violations(inputs, tf32, DIFFERENTIABLE)}
    assert {"out", "probs", "lse", "scores", "dq", "dk", "dv"} <= names
    spoils = (
        lambda t: t * 1.001,
        lambda t: t.flip(0),
        lambda t: t * 0,
        lambda t: t.masked_fill(torch.arange(t.numel()).view(t.shape) == 3, torch.nan),
        lambda t: t[..., None],
    )
    for name, spoil in itertools.product(good, spoils):
        wrong = violations(inputs, good | {name: spoil(good[name])}, DIFFERENTIABLE)
        if not torch.equal(spoil(good[name]).nan_to_num(5.0), good[name].nan_to_num(5.0)):
            assert [w.split(":")[0] for w in wrong] == [name], (name, wrong)
