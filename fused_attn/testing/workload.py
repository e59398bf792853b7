"""One attention workload, run by fused_attn, plain torch and torch's SDPA, and the float64 result they are held to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends import Explanation
from fused_attn.functional import attention, explain
from fused_attn.lowering import Grid
from fused_attn.masks import Causal, Mask
from fused_attn_bench.judge import Judge, Results, Tolerance

# Most scores that ``by_rows`` holds in one tensor.
BLOCK = 2**25


@dataclass(frozen=True, eq=False)
class Workload:
    """Attention on given inputs, with or without a backward pass and returned probabilities.

    Args:
        inputs: q, k and v.
        mask: None for none; no row may be empty, since plain torch gives NaN there.
        probs: whether the probabilities are returned.
        backward: whether gradients of q, k and v are computed; they arrive through everything that is returned.
        incoming: gradients that arrive at the output and, with ``probs``, at the probabilities.
    """

    inputs: tuple[Tensor, Tensor, Tensor]
    mask: Mask | None = None
    probs: bool = False
    backward: bool = False
    incoming: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        q, k, v = (t.detach().requires_grad_(self.backward) for t in self.inputs)
        object.__setattr__(self, "inputs", (q, k, v))
        object.__setattr__(self, "incoming", tuple(self._made(self.shapes)) if self.backward else ())

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the output and, where returned, of the probabilities."""
        q, k, v = self.inputs
        return [(*q.shape[:3], v.shape[-1]), *[(*q.shape[:3], k.shape[2])] * self.probs]

    def _made(self, shapes: list[tuple[int, ...]]) -> list[Tensor]:
        q = self.inputs[0]
        made = torch.Generator(q.device).manual_seed(0)
        return [torch.randn(shape, generator=made, dtype=q.dtype, device=q.device) for shape in shapes]

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    @property
    def grid(self) -> Grid:
        q, k, _ = self.inputs
        return Grid((q.shape[0], q.shape[1], q.shape[2], k.shape[2]), self.device)

    @property
    def score_bytes(self) -> int:
        """Size of one [batch, heads, q_len, kv_len] tensor in the inputs' dtype."""
        return torch.Size(self.grid.shape).numel() * self.inputs[0].element_size()

    def explain(self) -> Explanation:
        """Which backend fused_attn chooses, and why."""
        return explain(*self.inputs, mask=self.mask, return_aux=self._request)

    @property
    def _request(self) -> AuxRequest | None:
        return AuxRequest(probs=True) if self.probs else None

    def fused(self, backend: str = "auto") -> Results:
        """Through ``fused_attn.attention``."""
        returned = attention(*self.inputs, mask=self.mask, return_aux=self._request, backend=backend)
        if isinstance(returned, Tensor):
            return self._collected((returned,))
        out, aux = returned
        assert aux.probs is not None
        return self._collected((out, aux.probs))

    def _collected(self, outputs: tuple[Tensor, ...]) -> Results:
        results = dict(zip(("out", "probs"), (t.detach() for t in outputs), strict=False))
        if self.backward:
            grads = torch.autograd.grad(outputs, self.inputs, self.incoming)
            results |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        return results

    def dense_mask(self) -> Tensor | None:
        """The mask as the bool tensor that torch's own functions need."""
        return None if self.mask is None else self.mask.allowed(self.grid)

    def eager(self) -> Callable[[], Results]:
        """Plain torch operations; the dense mask is made here, outside of what is measured."""
        keep = self.dense_mask()
        return lambda: self._collected(plain(*self.inputs, keep)[: 1 + self.probs])

    def sdpa(self) -> Callable[[], Results] | None:
        """``F.scaled_dot_product_attention``; None where it cannot return what is asked for."""
        if self.probs:
            return None
        causal = isinstance(self.mask, Causal)
        keep = None if causal else self.dense_mask()
        # torch's own function, also while fused_attn.integrations.sdpa is installed.
        function = torch._C._nn.scaled_dot_product_attention
        return lambda: self._collected((function(*self.inputs, attn_mask=keep, is_causal=causal),))

    def judge(self) -> Judge:
        """Holds results to the error rule."""
        return Judge(self.by_rows(torch.float64), self.by_rows(self.inputs[0].dtype), Tolerance(terms=self.grid.shape[3]))

    def by_rows(self, dtype: torch.dtype) -> Results:
        """What ``plain`` gives in ``dtype``, a few hundred query rows at a time so that a long sequence fits."""
        q, k, v = (t.detach().to(dtype).requires_grad_(self.backward) for t in self.inputs)
        kv_len, parts = k.shape[2], []
        ranges = self.grid.ranges
        step = max(1, BLOCK // max(1, q.shape[0] * q.shape[1] * kv_len))
        for start in range(0, q.shape[2], step):
            rows = slice(start, min(start + step, q.shape[2]))
            keep = None if self.mask is None else self.mask.allowed(self.grid.at(ranges[0], ranges[1], (rows.start, rows.stop), ranges[3]))
            outputs = plain(q[:, :, rows], k, v, keep)[: 1 + self.probs]
            if self.backward:
                torch.autograd.backward(outputs, [t[:, :, rows].to(dtype) for t in self.incoming])
            parts.append([t.detach() for t in outputs])
        results = {n: torch.cat(p, 2) for n, p in zip(("out", "probs"), zip(*parts, strict=True), strict=False)}
        grads = {"dq": q.grad, "dk": k.grad, "dv": v.grad}
        return results | {n: g for n, g in grads.items() if g is not None}


def plain(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Attention in four torch operations, as a textbook writes it; also returns the probabilities."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    probs = torch.softmax(scores if keep is None else scores.masked_fill(~keep, -torch.inf), -1)
    return probs @ v, probs
