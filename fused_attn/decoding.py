"""Decoding: attention of the last few tokens of each sequence to a cache, forward only, in parts of the keys (Flash-Decoding, Dao et al. 2023).

The caches are ``KVCache``, in one piece, and ``PagedKV``, in pages (arXiv 2309.06180). Nothing here waits for a device: lengths stay where
they are, and what would be an error on the CPU shows as NaN in the sequence it belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from fused_attn import autograd, backends, composed, paged
from fused_attn.auxiliary import NOTHING, AuxOutput, AuxRequest
from fused_attn.caches import KVCache, PagedKV
from fused_attn.checks import as_integer, can_look, captured, described
from fused_attn.functional import is_autocast
from fused_attn.lowering import Grid, KernelMask, LoweredAttention, Terms
from fused_attn.masks import And, Causal, Mask, Not, Or, as_mask
from fused_attn.normalizers import Normalizer
from fused_attn.ops import fitted
from fused_attn.paged_call import LoweredPaged
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ScoreMod
from fused_attn.selective import is_selective

__all__ = ["KVCache", "PagedKV", "attention"]

# Parts of the keys that may be asked for.
MOST_SPLITS = 256
_CAUSAL = Causal()
_BEYOND = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Filled(Mask):
    """The keys that a cache holds.

    Args:
        seqused_k: int tensor [batch].

    Example:
        >>> print(Filled(torch.tensor([3])).picture(2, 4))
        ###.
        ###.
    """

    seqused_k: Tensor

    def keep(self, grid: Grid) -> Tensor:
        return grid.kv_idx < grid.crop(self.seqused_k[:, None, None, None])

    def lower(self, grid: Grid) -> KernelMask:
        return KernelMask(kv_end=self.seqused_k.to(torch.int32)[:, None].expand(-1, grid.shape[2]))


@overload
def attention(
    q: Tensor, cache: KVCache | PagedKV, *, mask: Mask | Tensor | None = _CAUSAL, scale: float | None = None, score_mods: Sequence[ScoreMod] = (),
    sinks: Tensor | None = None, normalizer: Normalizer | None = None, return_aux: None = None, num_splits: int | None = None,
    backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, cache: KVCache | PagedKV, *, mask: Mask | Tensor | None = _CAUSAL, scale: float | None = None, score_mods: Sequence[ScoreMod] = (),
    sinks: Tensor | None = None, normalizer: Normalizer | None = None, return_aux: AuxRequest, num_splits: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip


def attention(
    q: Tensor,
    cache: KVCache | PagedKV,
    *,
    mask: Mask | Tensor | None = _CAUSAL,
    scale: float | None = None,
    score_mods: Sequence[ScoreMod] = (),
    sinks: Tensor | None = None,
    normalizer: Normalizer | None = None,
    return_aux: AuxRequest | None = None,
    num_splits: int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attention of each sequence's last ``q_len`` tokens to the keys that its cache holds, theirs included: append first, then attend.

    ``fused_attn.attention`` on the cache with ``q_offset = seqused_k - q_len``, forward only and without dropout. Masks and modifications are
    on the grid [batch, heads, q_len, capacity]; keys beyond ``seqused_k`` never count. On GPUs a key head's whole group is one tile, the keys
    go in parts, and windows read nothing outside of them.

    Args:
        q: queries [batch, heads, q_len, head_dim] of the cache's dtype, any strides. Made for q_len up to 16.
        cache: what ``KVCache.append`` or ``PagedKV.append`` filled.
        mask: which keys a query may attend to; None for all that the cache holds.
        scale: factor of the scores; 1/sqrt(head_dim) by default.
        score_mods: modifications of the scores, in order.
        sinks: logits [heads] that join only the softmax's denominator.
        normalizer: instead of the softmax, as in ``fused_attn.attention``.
        return_aux: what to return besides: probabilities of chosen rows and heads, column sums (for evicting keys), lse, ...; over the capacity.
        num_splits: parts of the keys where kernels split them; chosen by the capacity alone when None.
        backend: "auto", or a name that runs or raises, never falls back.

    Returns:
        out [batch, heads, q_len, value_dim], or (out, AuxOutput) exactly when ``return_aux`` is given. On devices, and in graphs, a sequence
        that holds more than its capacity, or needs a page that the table does not name, gives NaN.

    Raises:
        ValueError, TypeError: the arguments contradict each other, or something wants a gradient; the message says what to do.
        UnsupportedError: the backend asked for refuses the problem.

    Example:
        >>> cache = KVCache.empty((1, 2, 32, 8))
        >>> for _ in range(5):
        ...     cache.append(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 1, 8))
        >>> out, aux = attention(torch.randn(1, 4, 1, 8), cache, return_aux=AuxRequest(column_sums=True))
        >>> out.shape, aux.column_sums[0, 0, 5:].any().item()
        (torch.Size([1, 4, 1, 8]), False)
    """
    if not isinstance(cache, (KVCache, PagedKV)):
        raise TypeError(f"cache must be a KVCache or a PagedKV; got {described(cache)}. Write KVCache(k, v, seqused_k).")
    options = {
        "mask": mask, "scale": scale, "score_mods": score_mods, "sinks": sinks, "normalizer": normalizer, "return_aux": return_aux, "dropout": None,
    }  # fmt: skip
    splits = _as_splits(num_splits)
    if is_autocast(q):
        with torch.autocast(q.device.type, enabled=False):
            out, aux = _attention(q.to(cache.k.dtype), cache, options, splits, backend)
    else:
        out, aux = _attention(q, cache, options, splits, backend)
    return out if return_aux is None else (out, aux)


def _as_splits(value: object) -> int:
    """How many parts the keys go in, 0 for a choice by sizes."""
    if value is None:
        return 0
    splits = as_integer("num_splits", value, "Leave it out to choose by the cache's capacity.")
    if not 1 <= splits <= MOST_SPLITS:
        raise ValueError(f"num_splits must be in [1, {MOST_SPLITS}]; got {splits}. Leave it out to choose by the cache's capacity.")
    return splits


def _attention(q: Tensor, cache: KVCache | PagedKV, options: dict[str, Any], splits: int, backend: str) -> tuple[Tensor, AuxOutput]:
    problem = _checked(q, cache, options)
    # On the CPU "auto" goes by size and by what is asked for besides; asking for more must not change out.
    name = backends.resolve(replace(problem, aux=None) if problem.device.type == "cpu" else problem, backend)
    if name == backends.EAGER:
        k, v = (cache.k, cache.v) if isinstance(cache, KVCache) else cache.gathered()
        out, aux = composed.attention(replace(problem, k=k, v=v), name, is_free=backend == "auto")
        return _marked(cache, out, aux)
    call = LoweredPaged(problem.q, cache.k, cache.v, cache.block_table, _terms(problem, cache), splits)
    reads_pages = hasattr(backends.get(name), "attention_paged")
    if call.block_table is None and not reads_pages and not paged.chooses_by_values(call, name):
        return _in_one_piece(call, problem, cache, name)
    out, lse = paged.attention_fwd(call, name)
    request = problem.aux or NOTHING
    extra = paged.attention_aux(call, request) if request.needs_pass else None
    aux = AuxOutput(lse=lse if request.lse else None)
    if extra is not None:
        aux = replace(aux, **extra._asdict())
    return out, aux


def _checked(q: Tensor, cache: KVCache | PagedKV, options: dict[str, Any]) -> AttentionProblem:
    """The call as a problem on keys [batch, kv_heads, capacity, dim]; those of pages are stand-ins without elements."""
    k, v = cache.k, cache.v
    if isinstance(cache, PagedKV):
        one, shape = k.new_zeros(()), (cache.block_table.shape[0], k.shape[1], cache.capacity)
        k, v = (one.expand(*shape, t.shape[3]) for t in (k, v))
    given, request = options["mask"], options["return_aux"]
    held = Filled(cache.seqused_k)
    q_len = q.shape[2] if isinstance(q, Tensor) and q.dim() == 4 else 0
    offset = cache.seqused_k.to(torch.int64) - q_len
    late = isinstance(request, AuxRequest) and request.is_picked and isinstance(q, Tensor) and not (can_look(q) or captured(q))
    now = replace(request, rows=None, heads=None) if late else request
    mask = held if given is None else as_mask(given) & held
    problem = AttentionProblem.check(q, k, v, options | {"mask": mask, "q_offset": offset, "return_aux": now})
    if late:  # indices that lie on a device are checked there
        for indices, size in ((request.rows, problem.shape[2]), (request.heads, problem.shape[1])):
            if indices is not None:
                torch._assert_async(
                    ((indices >= -size) & (indices < size)).all(), f"AuxRequest's rows and heads must lie in [-{size}, {size})"
                )
        problem = replace(problem, aux=request)
    _require_forward_alone(problem, cache)
    _require_held(problem, cache)
    return problem


def _require_forward_alone(problem: AttentionProblem, cache: KVCache | PagedKV) -> None:
    """Nothing flows back, and no earlier query takes from a later one's scores."""
    if problem.requires_grad or (torch.is_grad_enabled() and (cache.k.requires_grad or cache.v.requires_grad)):
        raise ValueError(
            "decoding.attention must not be asked for gradients, for a cache keeps none; got a tensor that requires grad. "
            "Call it under torch.no_grad(), or call fused_attn.attention."
        )
    if is_selective(problem.modifiers.score_mods):
        raise ValueError(
            "Selective needs the scores of all earlier queries, which a cache does not hold; got it in score_mods. "
            "Call fused_attn.attention with all queries."
        )


def _require_held(problem: AttentionProblem, cache: KVCache | PagedKV) -> None:
    """On the CPU: no sequence holds more than there is room for, and the table names every page that a row reaches."""
    used = cache.seqused_k
    if not can_look(used) or not can_look(problem.q) or used.numel() == 0:
        return
    if bool(((used < 0) | (used > cache.capacity)).any()):
        raise ValueError(
            f"seqused_k must lie in [0, {cache.capacity}], what the cache has room for; got {used.tolist()[:8]}. Make a longer cache, or pass the right lengths."
        )
    mask = problem.modifiers.mask
    if isinstance(cache, KVCache) or cache.page_size == 0 or problem.transform is not None or mask is None:
        return
    form = _form(mask, problem.grid)
    if form.has_pairs:
        return  # which keys of a page it leaves out is for the kernels to see
    start, end = torch.broadcast_tensors(*form.row_intervals(problem.grid))
    empty = start >= end
    first = start.masked_fill(empty, cache.capacity).amin(1, keepdim=True) // cache.page_size if start.shape[1] else start.new_zeros((1, 1))
    last = -(-end.masked_fill(empty, 0).amax(1, keepdim=True) // cache.page_size) if end.shape[1] else end.new_zeros((1, 1))
    index, table = torch.arange(cache.block_table.shape[1], device=used.device), cache.block_table
    nowhere = (table < 0) | (table >= cache.k.shape[0])
    if bool((nowhere & (index >= first) & (index < last)).any()):
        raise ValueError(
            f"block_table must name one of the {cache.k.shape[0]} pages wherever a query reaches a key; got others. "
            "Give every sequence pages for all its tokens before they are appended."
        )


def _terms(problem: AttentionProblem, cache: KVCache | PagedKV) -> Terms:
    """The normal form, made without looking at a device's values."""
    modifiers, mask = problem.modifiers, problem.modifiers.mask
    terms = replace(modifiers, mask=None).lower(problem)
    if mask is None:
        return terms
    form = _form(mask, problem.grid)
    if form.kv_end is not None and not can_look(cache.seqused_k):
        # Of two ends the smaller one counts, which must not hide that a cache holds more than there is room for.
        over = (cache.seqused_k > cache.capacity)[:, None]
        form = replace(form, kv_end=torch.where(over, _BEYOND, form.kv_end))
    return replace(terms, mask=form)


def _form(mask: Mask, grid: Grid) -> KernelMask:
    """``mask.lower``; on a device what would have to be looked at, to be known as one interval per row, is written out instead."""
    looked = mask.masks if isinstance(mask, And) else (mask,)
    if grid.device.type == "cpu" or captured(grid.kv_idx):
        return mask.lower(grid).settled(grid)
    form = KernelMask()
    for part in looked:
        form = form & (KernelMask(rules=(part,)) if isinstance(part, (Or, Not)) else part.lower(grid))
    return form.as_tensors(grid)


def _in_one_piece(call: LoweredPaged, problem: AttentionProblem, cache: KVCache | PagedKV, backend: str) -> tuple[Tensor, AuxOutput]:
    """On a backend that splits no keys: one call, and what is picked out of the probabilities by the definition."""
    request, whole = problem.aux, fitted(LoweredAttention(call.q, call.k, call.v, call.terms), backend)
    if request is None or not request.is_picked:
        return _marked(cache, *autograd.attended(whole, request or NOTHING, backend, requires_grad=False))
    rest = replace(request, probs=False, scores=False, scores_dtype=None, rows=None, heads=None)
    out, aux = autograd.attended(whole, rest if rest.names else NOTHING, backend, requires_grad=False)
    picked = AuxRequest(
        probs=request.probs, scores=request.scores, scores_dtype=request.scores_dtype, rows=request.rows, heads=request.heads
    )
    found = paged.attention_aux(call, picked)
    return _marked(cache, out, replace(aux, probs=found.probs, scores=found.scores))


def _marked(cache: KVCache | PagedKV, out: Tensor, aux: AuxOutput) -> tuple[Tensor, AuxOutput]:
    """Results with NaN for sequences that hold more than there is room for, where nobody has looked."""
    if can_look(cache.seqused_k) and can_look(out):
        return out, aux
    over = cache.seqused_k > cache.capacity

    def marked(tensor: Tensor) -> Tensor:
        return tensor.masked_fill(over.view(-1, *[1] * (tensor.dim() - 1)), torch.nan)

    return marked(out), aux.mapped(lambda _, t: marked(t))
