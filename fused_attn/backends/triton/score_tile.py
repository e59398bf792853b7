"""What every attention kernel computes first: the scores of one tile, and which of its pairs may attend."""

from __future__ import annotations

import triton
import triton.language as tl

from .masks import allowed, tile_state
from .primitives import contract, pointers
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


@triton.jit
def exponentials(scores, m, score):
    """exp(scores - m); ``m`` broadcasts and is finite."""
    # Scores may be huge and equal: the exact difference comes first. A fused multiply-add would leave the rounding of m * factor, 2^-24 of
    # the largest logit, in every exponent.
    return tl.exp2((scores - m) * score.factor)


@triton.jit
def probabilities(scores, m, inverse, score):
    """Weights of a tile of scores from the rows' statistics [tile.q]; whatever these are, a sigmoid weighs every pair by itself."""
    if score.sigmoid is None:
        p = exponentials(scores, m[:, None], score) * inverse[:, None]
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
def row_statistics(stats, b, h, q_idx, rows):
    """Row maximum (0 for rows without keys) and 1 / sum (0 for rows without keys), [tile.q] each."""
    at = pointers(stats, b * 0, b, h, q_idx)
    m = tl.load(at, mask=rows, other=0.0)
    l = tl.load(at + stats.batch, mask=rows, other=0.0)
    return tl.where(m == float("-inf"), 0.0, m), tl.where(l == 0.0, 0.0, 1.0 / tl.where(l == 0.0, 1.0, l))
