"""What every attention kernel computes first: the scores of one tile, and which of its pairs may attend."""

from __future__ import annotations

import triton
import triton.language as tl

from .masks import allowed, tile_state
from .primitives import contract, fused, pointers
from .score_mods import apply


@triton.jit
def product(q, k, q_source, k_source, score, tile):
    """q k^T times the scale, unless the exponent takes it; or what a scoring of its own says (see ``scorings``)."""
    if score.scoring is None:
        scores = contract(q, k, q_source, k_source, score.precision, tile.resident, tile.head_dim, tile.d)
        if not score.raw:
            scores = scores * score.scale
    elif score.by_columns:
        scores = score.scoring[0](q_source, k_source, score.scoring_args, tile)
    else:
        scores = score.scoring[0](q, k, score.scoring_args, score.precision)
    return scores


# Finite, so that scores of -inf have the weight 0 in rows that have seen nothing else.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def base_of(m, score):
    """What the exponents of a row with the maximum m subtract, and their factor: (base, factor), shaped like m.

    The base is the rounded product, which leaves one instruction per score; its rounding is a factor of the whole row
    (``excess``), which sums and outputs share. Only in rows beyond ``score.far`` would that factor leave the range: these take the power of two
    below the factor, whose product is exact. Float32 scores that differ there differ by 2^64 in weight at least, so equal ones is
    all that is left to tell apart. Whoever rounds weights to float16 takes the factor out before.
    """
    factor = tl.where(tl.abs(m) > score.far, score.coarse, score.factor)
    return tl.maximum(m * factor, _LOWEST), factor


@triton.jit
def excess(m, bases):
    """log2 of what ``exponentials`` are too large by, exactly; m is finite."""
    return fused(m, bases[1], bases[0] * -1.0)


@triton.jit
def exponentials(scores, bases):
    """exp(scores - m) times 2^excess, [tile.q, tile.kv], with the rows' bases of ``base_of``."""
    # A negation would be 0 - x, an instruction of its own.
    return tl.exp2(fused(scores, bases[1][:, None], (bases[0] * -1.0)[:, None]))


@triton.jit
def probabilities(scores, bases, inverse, score):
    """Weights of a tile of scores from the rows' bases and statistics [tile.q]; whatever these are, a sigmoid weighs every pair by itself.

    Without ``inverse`` these of a softmax are yet to be multiplied by it.
    """
    if score.sigmoid is None:
        p = exponentials(scores, bases)
        if inverse is not None:
            p = p * inverse[:, None]
    else:
        p = sigmoid(scores, score) * inverse[:, None]
    return p


@triton.jit
def sigmoid(scores, score):
    """1 / (1 + exp(-(s + bias)))."""
    return 1.0 / (1.0 + tl.exp2(-(scores * score.factor + score.sigmoid)))


@triton.jit
def tile_scores(q, k, q_source, k_source, interval, place, mask, score, sizes, MASKED: tl.constexpr, tile):
    """Scores of one tile [tile.q, tile.kv], -inf where a query may not attend, and where it may (in unmasked tiles: where there is a pair)."""
    b, h, q_idx, shift = place[0], place[1], place[2], place[3]
    kv_idx, kv_ok = k_source[3], k_source[4]
    inside = (q_idx < sizes.q_len)[:, None] & kv_ok[None, :]
    at = (b, h, q_idx[:, None], (q_idx + shift)[:, None], kv_idx[None, :], inside)
    scores = apply(product(q, k, q_source, k_source, score, tile), score, at, len(score.functions))
    if MASKED:
        inside = inside & pairs_allowed(q_idx, kv_idx, interval, place, mask, tile)
        scores = tl.where(inside, scores, float("-inf"))
    return scores, inside


@triton.jit
def pairs_allowed(q_idx, kv_idx, interval, place, mask, tile):
    """Which pairs of a tile [tile.q, tile.kv] may attend."""
    b, h, q_tile = place[0], place[1], place[4]
    state = 1
    if tile.has_summary:
        state = tile_state(mask, b, h, q_tile, tl.min(kv_idx, 0) // tile.kv)
    return allowed(mask, b, h, q_idx[:, None], kv_idx[None, :], interval[0][:, None], interval[1][:, None], state)


@triton.jit
def row_statistics(stats, b, h, q_idx, rows, score):
    """Bases of the exponents and 1 / sum of these (0 for rows without keys, else 1/2 to 1), [tile.q] each, from the forward's statistics."""
    at = pointers(stats, b * 0, b, h, q_idx)
    return normalised(tl.load(at, mask=rows, other=0.0), tl.load(at + stats.batch, mask=rows, other=0.0), score)


@triton.jit
def normalised(m, l, score):
    """``row_statistics`` of rows with the maximum m, -inf where there is none, and the sum l, 0 where there are no keys."""
    m, total = tl.where(m == float("-inf"), 0.0, m), tl.where(l == 0.0, 1.0, l)
    base, factor = base_of(m, score)
    # Whole powers of two go to the base, so that weights fit 16 bits before they are normalised.
    bases = (base + tl.ceil(tl.log2(total)), factor)
    return bases, tl.where(l == 0.0, 0.0, tl.exp2(excess(m, bases) * -1.0) / total)


@triton.jit
def store_statistics(ready, b, h, q_idx, rows, bases, inverse, score):
    """Leaves ``row_statistics`` for ``load_statistics``, [2, batch, heads, q_len]; a sign stands for the second factor."""
    at = pointers(ready, b * 0, b, h, q_idx)
    tl.store(at, bases[0], mask=rows)
    tl.store(at + ready.batch, tl.where(bases[1] == score.factor, inverse, inverse * -1.0), mask=rows)


@triton.jit
def load_statistics(ready, b, h, q_idx, rows, score):
    """What ``row_statistics`` gave, without its division: the passes over queries read it once per tile."""
    at = pointers(ready, b * 0, b, h, q_idx)
    base = tl.load(at, mask=rows, other=0.0)
    inverse = tl.load(at + ready.batch, mask=rows, other=0.0)
    return (base, tl.where(inverse < 0.0, score.coarse, score.factor)), tl.abs(inverse)
