"""Ring attention (arXiv 2310.01889): keys and values pass by while the queries stay, merged by lse, each transfer behind a computation.

Step s brings the keys of rank r - s to rank r; steps (and transfers) without a pair that may attend are left out. Backward lets them pass by once more,
computes each part's forward again, and sends the keys' gradients home.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_attn import ops
from fused_attn.backends.base import Forward, Incoming
from fused_attn.distributed.plan import Plan
from fused_attn.distributed.traffic import Exchange, post
from fused_attn.layout import empty_out, laid_out_like
from fused_attn.lowering import LoweredAttention, Range, Terms, stat_dtype
from fused_attn.merging import Merged, share
from fused_attn.vocabulary import with_parameters


def attention(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of this rank's queries, differentiable."""
    tensors = [t for terms in plan.chunk_terms for t in terms.parameters]
    out, lse = _Ring.apply(plan, q, k, v, *tensors)  # type: ignore[no-untyped-call]
    return out, lse


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, q: Tensor, k: Tensor, v: Tensor, *tensors: Any) -> tuple[Tensor, Tensor]:
        size, chunk_terms = plan.shards.size, _on(plan, tensors)
        merged = [Merged() for _ in chunk_terms]
        for step, keys in _passing(plan, k, v):
            for place, part, _, _ in _parts(plan, (q, *keys), chunk_terms, step) if keys is not None else ():
                forward = ops.attention_fwd(part, plan.backend)
                merged[place].add(forward.out, None if plan.terms.normalizer is not None else forward.lse)
        out = empty_out(q, v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=stat_dtype(q.dtype))
        for place, found in enumerate(merged):
            rows = slice(place * size, (place + 1) * size)
            if found.out is None:  # no rank has a key for these queries
                found = Merged(
                    out.new_zeros((*lse[:, :, rows].shape, v.shape[3]), dtype=lse.dtype), torch.full_like(lse[:, :, rows], -torch.inf)
                )
            if plan.terms.sinks is not None:
                found.add_sinks(plan.terms.sinks)
            assert found.out is not None
            out[:, :, rows] = found.out
            lse[:, :, rows] = -torch.inf if found.lse is None else found.lse
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, out, lse, *tensors)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Any, dlse: Any) -> Any:
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        if dout is None and dlse is None:
            return (None,) * (4 + len(tensors))
        work = _Backward(ctx.plan, (q, k, v), (out, lse), (dout, dlse), tuple(tensors), ctx.needs_input_grad[4:])
        return None, *work.run()


def _on(plan: Plan, tensors: tuple[Any, ...]) -> list[Terms]:
    """The chunks' terms on the tensors that autograd saved."""
    result, left = [], list(tensors)
    for terms in plan.chunk_terms:
        count = len(terms.parameters)
        result.append(with_parameters(terms, left[:count]))
        left = left[count:]
    return result


def _passing(plan: Plan, k: Tensor, v: Tensor) -> Iterator[tuple[int, tuple[Tensor, Tensor] | None]]:
    """Each step and the keys and values that it brings, own ones first, None where no query may find any; the next are on their way meanwhile."""
    rank, ranks = plan.rank, plan.shards.ranks
    coming = _rotate(plan, (k, v), 1) if ranks > 1 else None
    yield 0, (k, v) if plan.needs(rank, rank) else None
    for step in range(1, ranks):
        assert coming is not None
        arrived = coming.wait()
        coming = _rotate(plan, (k, v), step + 1) if step + 1 < ranks else None
        yield step, (arrived[0], arrived[1]) if arrived else None


def _rotate(plan: Plan, keys: tuple[Tensor, Tensor], step: int) -> Exchange:
    """Own keys to the rank ``step`` places on, those of the rank as many places back to this one, where they are needed."""
    rank, ranks = plan.rank, plan.shards.ranks
    on, back = (rank + step) % ranks, (rank - step) % ranks
    return post(plan.group, (on, keys) if plan.needs(on, rank) else None, (back, keys) if plan.needs(rank, back) else None)


def _parts(
    plan: Plan, tensors: tuple[Tensor, Tensor, Tensor], chunk_terms: list[Terms], step: int
) -> Iterator[tuple[int, LoweredAttention, int, Range]]:
    """Each chunk of own queries with each chunk of a step's keys that it meets: the places of both, and the keys' range."""
    owner = (plan.rank - step) % plan.shards.ranks
    q, k, v = (t.tensor_split(len(chunk_terms), 2) for t in tensors)
    for i, j, reach in plan.pairs(owner):
        yield i, ops.fitted(plan.part(q[i], (k[j], v[j]), chunk_terms[i], reach), plan.backend), j, reach


class _Backward:
    """Gradients under construction, in float32 (float64 for float64): those of own queries, own keys and the modifications' tensors."""

    def __init__(self, plan: Plan, inputs: Any, forward: Any, arriving: Any, tensors: tuple[Any, ...], wanted: tuple[bool, ...]) -> None:
        self.plan, self.inputs, self.tensors, self.wanted = plan, inputs, tensors, wanted
        (self.out, self.lse), (dout, self.dlse) = forward, arriving
        self.dout = torch.zeros_like(self.out) if dout is None else dout
        dtype = stat_dtype(self.out.dtype)
        self.totals = [torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format) for t in inputs]
        self.more = [torch.zeros_like(t, dtype=dtype) if t is not None and need else None for t, need in zip(tensors, wanted, strict=True)]
        # dout . out - dlse [batch, heads, q_len]: what every score's gradient of a row subtracts.
        self.delta = (self.dout.to(dtype) * self.out.to(dtype)).sum(-1)
        if self.dlse is not None:
            self.delta -= self.dlse

    def run(self) -> tuple[Any, ...]:
        q, k, v = self.inputs
        plan, rank, ranks = self.plan, self.plan.rank, self.plan.shards.ranks
        chunk_terms, home = _on(plan, self.tensors), None
        for step, keys in _passing(plan, k, v):
            grads = None if keys is None else self._with_keys(step, (q, *keys), chunk_terms)
            if step == 0:
                self._add_keys(grads)
                continue
            if home is not None:
                self._add_keys(home.wait())
            back, on = (rank - step) % ranks, (rank + step) % ranks
            to = None if grads is None else (back, (grads[0].to(k.dtype), grads[1].to(v.dtype)))
            home = post(plan.group, to, (on, (k, v)) if plan.needs(on, rank) else None)
        if home is not None:
            self._add_keys(home.wait())
        self._add_sinks()
        named = zip(self.totals, self.inputs, strict=True)
        rest = [g if g is None else g.to(t.dtype) for g, t in zip(self.more, self.tensors, strict=True)]
        return *(laid_out_like(g.to(t.dtype), t) for g, t in named), *rest

    def _add_keys(self, grads: tuple[Tensor, ...] | None) -> None:
        for total, grad in zip(self.totals[1:], grads or (), strict=False):
            total += grad

    def _with_keys(self, step: int, tensors: tuple[Tensor, Tensor, Tensor], chunk_terms: list[Terms]) -> tuple[Tensor, Tensor]:
        """Adds what a step's keys contribute to own queries; the gradients of these keys and values."""
        size = self.plan.shards.size
        dk, dv = (torch.zeros_like(t, dtype=self.totals[0].dtype) for t in tensors[1:])
        for i, part, j, reach in _parts(self.plan, tensors, chunk_terms, step):
            rows, keys = slice(i * size, (i + 1) * size), slice(j * size, (j + 1) * size)
            forward = ops.attention_fwd(part, self.plan.backend)
            first = sum(len(terms.parameters) for terms in chunk_terms[:i]) + 1
            count = len(chunk_terms[i].parameters) - 1
            needs = (True, True, True, False, *self.wanted[first : first + count])
            dq, dk_part, dv_part, _, *dmods = ops.attention_bwd(part, forward, self._incoming(forward, rows), needs, self.plan.backend)
            assert dq is not None
            assert dk_part is not None
            assert dv_part is not None
            self.totals[0][:, :, rows] += dq
            dk[:, :, keys] += dk_part
            dv[:, :, keys] += dv_part
            for total, grad in zip(self.more[first : first + count], dmods, strict=True):
                if total is not None and grad is not None:
                    (total if total.shape[3] == 1 else total.narrow(3, reach[0], reach[1] - reach[0])).add_(grad)
        return dk, dv

    def _incoming(self, forward: Forward, rows: slice) -> Incoming:
        """What arrives at a part's own output and lse, by the derivative of the merge."""
        dout = self.dout[:, :, rows]
        if self.plan.terms.normalizer is not None:
            return Incoming(dout)
        weight = share(forward.lse, self.lse[:, :, rows])
        own = (dout.to(weight.dtype) * forward.out.to(weight.dtype)).sum(-1)
        return Incoming((dout * weight[..., None]).to(dout.dtype), weight * (own - self.delta[:, :, rows]))

    def _add_sinks(self) -> None:
        """A sink is a key without a value: minus its probability times delta."""
        sinks, place = self.plan.terms.sinks, 0
        for i, terms in enumerate(self.plan.chunk_terms):
            total = self.more[place]
            if total is not None and sinks is not None:
                rows = slice(i * self.plan.shards.size, (i + 1) * self.plan.shards.size)
                p = share(sinks.to(self.lse.dtype)[:, None], self.lse[:, :, rows])
                total.sub_((p * self.delta[:, :, rows]).sum((0, 2)))
            place += len(terms.parameters)
