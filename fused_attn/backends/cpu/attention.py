"""Attention tile by tile in plain torch operations; O(length) memory, forward, auxiliary outputs and backward.

The backward recomputes every row's maximum and sum as the forward did, so it is exact where a stored lse would lose log S next to
huge logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from fused_attn.allowed_products import sum_over_allowed
from fused_attn.auxiliary import AuxRequest
from fused_attn.backends.base import AuxTensors, Forward, Gradients, Incoming
from fused_attn.backends.cpu import devices, flash
from fused_attn.backends.cpu.leaves import Leaves, own_scores, vectors
from fused_attn.backends.cpu.tiles import Operands, Tile
from fused_attn.dropout import keep_factor
from fused_attn.kernel_score import KernelScore
from fused_attn.layout import empty_out, laid_out_like
from fused_attn.lowering import LoweredAttention, stat_dtype
from fused_attn.score_mods import SCORE_MODS, modified


def attention_fwd(call: LoweredAttention) -> Forward:
    """The output and lse [batch, heads, q_len]."""
    forward = flash.forward(call) if flash.suits(call) else None
    if forward is not None:
        return forward
    work = Operands(call)
    out, lse = empty_out(call.q, call.v.shape[-1]), _no_keys(call)
    if call.shape[3] == 0:
        out.zero_()
    for tile in work.plan:
        scores, allowed = _scores(work, tile)
        if call.terms.normalizer is not None:
            _weigh(scores, call.terms.normalizer)
        else:
            top, sinks = _normalise(scores), _sinks(work, tile)
            sums = _row_sums(scores).log_().add_(top) if sinks is None else _add_sinks(scores, top, sinks)[0]
            lse[tile.rows] = sums[..., 0]
        _clear_masked(scores, allowed)
        if call.terms.dropout is not None:
            scores.mul_(keep_factor(call.terms.dropout, call.grid.at(*tile.region), work.dtype))
        out[tile.rows] = _sums(work.matrices(scores, tile), work.v[tile.keys], work.matrices(allowed, tile)).view(*tile.shape[:3], -1)
    return Forward(out, lse, flash.no_stats(lse))


def attention_aux(call: LoweredAttention, request: AuxRequest) -> AuxTensors:
    """What is asked for besides, by the same tiles."""
    work = Operands(call)
    aux = AuxTensors(
        call.q.new_empty(call.shape) if request.probs else None,
        call.q.new_empty(call.shape, dtype=request.scores_dtype) if request.scores else None,
        call.q.new_full(call.shape[:3], -torch.inf, dtype=work.dtype) if request.max_scores else None,
        call.q.new_zeros((*call.shape[:2], call.shape[3]), dtype=work.dtype) if request.column_sums else None,
        call.q.new_zeros(call.shape[:3], dtype=work.dtype) if request.entropy else None,
    )
    for tile in work.plan:
        _fill_aux(work, tile, aux)
    return aux


def attention_bwd(call: LoweredAttention, forward: Forward, incoming: Incoming, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of q, k, v, the sinks and the modifications' tensors; None where not needed."""
    if incoming.dout is not None and flash.suits_backward(call, forward, incoming, needs):
        grads = flash.backward(call, forward, incoming.dout, needs)
        if grads is not None:
            return grads
    backward = _Backward.of(call, incoming, needs)
    for tile in backward.work.plan:
        backward.add(tile)
    return backward.finish()


def _no_keys(call: LoweredAttention) -> Tensor:
    """lse [batch, heads, q_len] of rows without keys: -inf, or the sink."""
    lse = call.q.new_full(call.shape[:3], -torch.inf, dtype=stat_dtype(call.q.dtype))
    return lse if call.terms.sinks is None or call.shape[3] else lse.copy_(call.terms.sinks[:, None])


def _sinks(work: Operands, tile: Tile) -> Tensor | None:
    sinks = work.call.terms.sinks
    return None if sinks is None else sinks[slice(*tile.region[1]), None, None].to(work.dtype)


def _raw_scores(work: Operands, tile: Tile) -> Tensor:
    """Scores before the modifications, [batch, heads, rows, keys]."""
    scores = work.buffer("scores", tile)
    scoring = work.call.terms.scoring
    if scoring is not None:
        return scores.view(tile.shape).copy_(own_scores(work, tile, vectors(work, tile), scoring.tensors))
    factor = work.scale if isfinite(work.scale) else 1.0  # an infinite one would meet zeros inside the product
    torch.baddbmm(scores, work.rows(work.q, tile), work.k[tile.keys].mT, beta=0, alpha=factor, out=scores)
    if factor != work.scale:
        scores.mul_(work.scale)
    return scores.view(tile.shape)


def _scores(work: Operands, tile: Tile) -> tuple[Tensor, Tensor | None]:
    """Modified scores, -inf where masked, [batch, heads, rows, keys]; where one has to be careful, which pairs may attend as well."""
    if work.is_careful:
        return _careful_scores(work, tile)
    return _masked(_modified(work, tile, None), tile), None


def _masked(scores: Tensor, tile: Tile) -> Tensor:
    """-inf where masked, in place: in a tenth of masked_fill's time, which only NaN would need."""
    for columns, limit in tile.limits:
        torch.minimum(scores[..., columns], limit, out=scores[..., columns])
    return scores


def _careful_scores(work: Operands, tile: Tile) -> tuple[Tensor, Tensor]:
    """Scores and pairs of ``_scores``; a row whose scores are all -inf has no allowed pair."""
    allowed = tile.allowed(work.q.device)
    scores = _modified(work, tile, ~allowed)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    if devices.some(empty & allowed):
        allowed &= ~empty
        scores = _modified(work, tile, ~allowed)
    return scores, allowed


def _modified(work: Operands, tile: Tile, hidden: Tensor | None) -> Tensor:
    """Scores after all modifications, which meet zeros in ``hidden`` pairs and leave -inf there."""
    raw = scores = _raw_scores(work, tile)
    grid = work.call.grid.at(*tile.region)
    if hidden is not None:
        raw.masked_fill_(hidden, 0.0)
    for score in work.call.terms.mods:
        scores = modified(SCORE_MODS[score.name].from_kernel(score), scores, grid)
        scores = scores if hidden is None else scores.masked_fill(hidden, 0.0)
    raw = raw if scores is raw else raw.copy_(scores)
    return raw if hidden is None else raw.masked_fill_(hidden, -torch.inf)


def _clear_masked(values: Tensor, allowed: Tensor | None) -> None:
    """Zeros where masked; they are there already unless a NaN spread along the row."""
    if allowed is not None:
        values.masked_fill_(~allowed, 0.0)


def _sums(weights: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """weights values over the allowed pairs, all of them [pairs, ...] matrices."""
    return torch.bmm(weights, values) if allowed is None else sum_over_allowed(weights, values, allowed)


def _normalise(scores: Tensor) -> Tensor:
    """Turns scores into probabilities in place, zeros in rows without keys; the rows' maxima [batch, heads, rows, 1].

    torch.softmax takes 0.5 ns per element whatever the values; exp_ alone takes 1.1, and 2.5 to 13 where it meets -inf or denormals.
    """
    top = scores.amax(-1, keepdim=True)
    devices.softmax_(scores)
    empty = top == -torch.inf
    if devices.some(empty):
        scores.masked_fill_(empty, 0.0)
    return top


def _weigh(scores: Tensor, sigmoid: KernelScore) -> None:
    """1 / (1 + exp(-(s + bias))) in place; torch's own sigmoid gives other bits at the end of an array than inside it."""
    scores.add_(sigmoid.scalars[0]).neg_().exp_().add_(1.0).reciprocal_()


def _turn_into_probabilities(work: Operands, tile: Tile, scores: Tensor) -> Tensor | None:
    """Scores become probabilities in place; the sinks' own, [batch, heads, rows, 1], where there are sinks."""
    if work.call.terms.normalizer is not None:
        _weigh(scores, work.call.terms.normalizer)
        return None
    top, sinks = _normalise(scores), _sinks(work, tile)
    return None if sinks is None else _add_sinks(scores, top, sinks)[1]


def _row_sums(probs: Tensor) -> Tensor:
    """The rows' sums of exp(scores - maximum): one over the largest probability; 1 in rows without keys."""
    peak = probs.amax(-1, keepdim=True)
    return peak.masked_fill_(peak == 0, 1.0).reciprocal_()


def _add_sinks(probs: Tensor, top: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Makes room for the sinks in the probabilities; lse and the sinks' own probability, [batch, heads, rows, 1].

    Only exp and log: torch's sigmoid and logaddexp give other bits at the end of an array than inside it.
    """
    floor = torch.finfo(top.dtype)
    base = torch.maximum(top, sinks).clamp_(min=floor.min)
    sums = _row_sums(probs).mul_((top - base).exp_())
    share = (sinks - base).exp_()
    total = sums + share
    divisor = total.clamp(min=floor.tiny)
    probs.mul_(sums.div_(divisor))
    return total.log_().add_(base), share.div_(divisor)


def _fill_aux(work: Operands, tile: Tile, aux: AuxTensors) -> None:
    values, allowed = _scores(work, tile)
    if aux.max_scores is not None:
        aux.max_scores[tile.rows] = values.amax(-1)
    if aux.scores is not None:
        _write_row_block(aux.scores, tile, values, -torch.inf)
    if aux.probs is None and aux.column_sums is None and aux.entropy is None:
        return
    _turn_into_probabilities(work, tile, values)
    _clear_masked(values, allowed)
    if aux.probs is not None:
        _write_row_block(aux.probs, tile, values, 0.0)
    if aux.column_sums is not None:
        aux.column_sums[tile.index[0], tile.index[1], tile.index[3]] += values.sum(-2)
    if aux.entropy is not None:
        aux.entropy[tile.rows] = torch.special.entr(values).sum(-1)


def _write_row_block(full: Tensor, tile: Tile, values: Tensor, outside: float) -> None:
    """Whole rows: the tile's values, and ``outside`` left and right of its reach."""
    rows, (k0, k1) = full[tile.rows], tile.region[3]
    rows[..., :k0] = outside
    rows[..., k0:k1] = values
    rows[..., k1:] = outside


@dataclass(frozen=True, slots=True)
class _Backward:
    """Gradients under construction; ``dq``, ``dk``, ``dv`` are None where not wanted, ``dmods`` likewise."""

    work: Operands
    incoming: Incoming
    dout: Tensor | None
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    dsinks: Tensor | None
    dmods: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, call: LoweredAttention, incoming: Incoming, needs: tuple[bool, ...]) -> _Backward:
        work = Operands(call, incoming.dout, incoming.dlse, incoming.dprobs, incoming.dscores)
        dk, dv = (torch.zeros_like(t) if need else None for t, need in zip((work.k, work.v), needs[1:3], strict=True))
        dq = torch.zeros_like(call.q) if needs[0] else None
        sinks = call.terms.sinks
        dsinks = torch.zeros_like(sinks, dtype=work.dtype) if needs[3] and sinks is not None else None
        if dsinks is not None and call.shape[3] == 0 and incoming.dlse is not None:
            dsinks.add_(incoming.dlse.sum((0, 2)))
        tensors = [t for m in call.terms.entries for t in m.tensors]
        # A parameter without broadcasting gets every element once: its own dtype loses nothing and needs no second copy.
        single = [m.layout is None and t.shape == call.shape for m in call.terms.entries for t in m.tensors]
        dmods = tuple(
            torch.zeros_like(t, dtype=t.dtype if once else work.dtype) if need else None
            for t, once, need in zip(tensors, single, needs[4:], strict=True)
        )
        return cls(work, incoming, None if incoming.dout is None else work.grouped(incoming.dout), dq, dk, dv, dsinks, dmods)

    def finish(self) -> Gradients:
        call = self.work.call
        shaped = (g if g is None else laid_out_like(g.view(t.shape).to(t.dtype), t) for g, t in ((self.dk, call.k), (self.dv, call.v)))
        parameters = [
            g if g is None or t is None else g.to(t.dtype) for g, t in zip((self.dsinks, *self.dmods), call.terms.parameters, strict=True)
        ]
        return self.dq, *shaped, *parameters

    def add(self, tile: Tile) -> None:
        """Adds one tile's contribution to every gradient."""
        work, leaves = self.work, None
        if work.call.terms.entries and not work.is_careful:
            leaves, allowed = self._leaves(tile, None), None
            probs = _masked(work.buffer("probs", tile).view(tile.shape).copy_(leaves.result.detach()), tile)
        else:
            probs, allowed = _scores(work, tile)
            if work.call.terms.entries:
                probs = work.buffer("probs", tile).view(tile.shape).copy_(probs)
                leaves = self._leaves(tile, None if allowed is None else ~allowed)
        empty = None if self.incoming.dscores is None else (probs == -torch.inf).all(-1, keepdim=True)
        share = _turn_into_probabilities(work, tile, probs)
        _clear_masked(probs, allowed)
        dprobs = self._dprobs(tile, probs, allowed)
        if self.dsinks is not None and share is not None:
            self._add_dsinks(tile, (probs, dprobs), share)
        dscores = self._dscores(tile, (probs, dprobs), allowed, empty)
        sources = (dscores,) if leaves is None else self._through_entries(tile, leaves, dscores)
        if work.call.terms.scoring is None:
            self._add_products(tile, sources[0], allowed)
        else:
            self._add_vectors(tile, sources)

    def _dprobs(self, tile: Tile, probs: Tensor, allowed: Tensor | None) -> Tensor:
        """Gradient of the probabilities; adds to dv on the way."""
        work, dropout = self.work, self.work.call.terms.dropout
        dprobs = work.buffer("dprobs", tile)
        if self.dout is None:
            dprobs.zero_()
        else:
            dout = work.rows(self.dout, tile)
            torch.bmm(dout, work.v[tile.keys].mT, out=dprobs)
            factor = None if dropout is None else keep_factor(dropout, work.call.grid.at(*tile.region), work.dtype).view(dprobs.shape)
            if factor is not None:
                dprobs.mul_(factor)
            if self.dv is not None:
                weights = probs.view(dprobs.shape)
                weights = weights if factor is None else weights * factor
                if allowed is None:
                    self.dv[tile.keys].baddbmm_(weights.mT, dout)
                else:
                    self.dv[tile.keys] += sum_over_allowed(weights.mT, dout, allowed.view(dprobs.shape).mT)
        dprobs = dprobs.view(tile.shape)
        if self.incoming.dprobs is not None:
            dprobs.add_(self.incoming.dprobs[tile.index])
        _clear_masked(dprobs, allowed)
        return dprobs

    def _add_dsinks(self, tile: Tile, pair: tuple[Tensor, Tensor], share: Tensor) -> None:
        """``share`` [batch, heads, rows, 1] is the sinks' probability; nothing arrives at it but through the rows' sums."""
        assert self.dsinks is not None
        arriving = (pair[0] * pair[1]).sum(-1, keepdim=True).neg_()
        if self.incoming.dlse is not None:
            arriving.add_(self.incoming.dlse[tile.rows][..., None])
        self.dsinks[tile.index[1]] += arriving.mul_(share).sum((0, 2, 3))

    def _dscores(self, tile: Tile, pair: tuple[Tensor, Tensor], allowed: Tensor | None, empty: Tensor | None) -> Tensor:
        """Gradient of the modified scores: probs * (dprobs - sum(probs * dprobs)) and what arrives at lse and scores directly."""
        probs, dprobs = pair
        if self.work.call.terms.normalizer is not None:
            dscores = dprobs.mul_(probs).mul_(1 - probs)
        else:
            dscores = devices.softmax_backward_(dprobs, probs)
        if self.incoming.dlse is not None:
            dscores.addcmul_(probs, self.incoming.dlse[tile.rows][..., None])
        _clear_masked(dscores, allowed)
        if self.incoming.dscores is not None:
            direct = self.incoming.dscores[tile.index].to(self.work.dtype, copy=True)
            _clear_masked(direct, allowed)
            for columns, limit in tile.limits if allowed is None else ():
                direct[..., columns].masked_fill_(limit < 0, 0.0)
            dscores.add_(direct if empty is None else direct.masked_fill_(empty, 0.0))
        return dscores

    def _leaves(self, tile: Tile, hidden: Tensor | None) -> Leaves:
        """The modified scores with a graph of this tile alone."""
        raw = _raw_scores(self.work, tile) if self.work.call.terms.scoring is None else None
        return Leaves.of(self.work, tile, raw, hidden, tuple(g is not None for g in self.dmods))

    def _through_entries(self, tile: Tile, leaves: Leaves, dscores: Tensor) -> tuple[Tensor, ...]:
        """Gradients of the leaves' sources; adds to the parameters' gradients on the way."""
        sources, grads = leaves.pull_back(dscores)
        for target, grad in zip([g for g in self.dmods if g is not None], grads, strict=True):
            if grad is not None:
                part = self.work.call.grid.at(*tile.region).crop(target) if target.shape != grad.shape else target
                part.add_(grad)
        return sources

    def _add_vectors(self, tile: Tile, grads: tuple[Tensor, ...]) -> None:
        """Adds the gradients of ``leaves.vectors``."""
        if self.dq is not None:
            self.dq[tile.rows] = grads[0]
        if self.dk is not None:
            self.dk[tile.keys] += grads[1].reshape(self.dk[tile.keys].shape)

    def _add_products(self, tile: Tile, dscores: Tensor, allowed: Tensor | None) -> None:
        work, scale = self.work, self.work.scale
        matrices, pairs, q, k = work.matrices(dscores, tile), work.matrices(allowed, tile), work.rows(work.q, tile), work.k[tile.keys]
        if self.dk is not None:
            if pairs is None:
                self.dk[tile.keys].baddbmm_(matrices.mT, q, alpha=scale)
            else:
                self.dk[tile.keys].add_(sum_over_allowed(matrices.mT, q, pairs.mT), alpha=scale)
        if self.dq is not None:
            if pairs is None:
                product = torch.baddbmm(matrices.new_empty(1, 1, 1), matrices, k, beta=0, alpha=scale)
            else:
                product = sum_over_allowed(matrices, k, pairs) * scale
            self.dq[tile.rows] = product.view(*tile.shape[:3], -1)
