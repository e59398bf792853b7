"""The public functions, and the only long signatures of the package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor

from fused_attn import autograd, backends, composed, sharded, torch_sdpa
from fused_attn.auxiliary import AuxOutput, AuxRequest
from fused_attn.backends import Explanation, Target, eager
from fused_attn.checks import is_sharded
from fused_attn.dropout import Dropout
from fused_attn.layout import laid_out_like, with_laid_out_gradients
from fused_attn.masks import Mask
from fused_attn.normalizers import Normalizer
from fused_attn.problem import AttentionProblem, EmptyRows, SoftmaxProblem, active_transform, softmax_dim
from fused_attn.score_mods import ScoreMod
from fused_attn.scoring import Scoring
from fused_attn.targets import as_target


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None, scale: float | None = None, scoring: Scoring | None = None,
    q_offset: int | Tensor | None = None, score_mods: Sequence[ScoreMod] = (), sinks: Tensor | None = None,
    dropout: Dropout | None = None, normalizer: Normalizer | None = None, empty_rows: EmptyRows = "zero",
    return_aux: None = None, backend: str = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Mask | Tensor | None = None, scale: float | None = None, scoring: Scoring | None = None,
    q_offset: int | Tensor | None = None, score_mods: Sequence[ScoreMod] = (), sinks: Tensor | None = None,
    dropout: Dropout | None = None, normalizer: Normalizer | None = None, empty_rows: EmptyRows = "zero",
    return_aux: AuxRequest, backend: str = "auto",
) -> tuple[Tensor, AuxOutput]: ...  # fmt: skip


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    scoring: Scoring | None = None,
    q_offset: int | Tensor | None = None,
    score_mods: Sequence[ScoreMod] = (),
    sinks: Tensor | None = None,
    dropout: Dropout | None = None,
    normalizer: Normalizer | None = None,
    empty_rows: EmptyRows = "zero",
    return_aux: AuxRequest | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Multi-head attention, softmax(mods(scale * q k^T)) v over the allowed keys, in O(length) memory (arXiv 2205.14135, 2307.08691).

    Args:
        q: queries [batch, heads, q_len, head_dim]; float16, bfloat16, float32 or float64, any strides.
        k: keys [batch, kv_heads, kv_len, head_dim]; kv_heads divides heads, query head n uses key head n // (heads // kv_heads).
        v: values [batch, kv_heads, kv_len, value_dim]. All three may be DTensors: each rank computes the batches, heads and queries of its own.
        mask: which keys a query may attend to: a mask, several combined with ``&``, ``|`` and ``~``, or a bool tensor (True may attend)
            that broadcasts to [batch, heads, q_len, kv_len]. A 2-D one is [q_len, kv_len], also where batch equals q_len; write
            ``KeyPadding`` for [batch, kv_len].
        scale: factor of the scores; 1/sqrt(head_dim) by default.
        scoring: how a score comes from a query and a key, instead of scale * q k^T; not together with ``scale``.
        q_offset: key position of query 0, an int or an int tensor [batch]. Needed when positions are compared and the lengths
            differ: 0 is top-left, kv_len - q_len bottom-right.
        score_mods: modifications of the scores, in order.
        sinks: logits [heads] that join only the softmax's denominator (arXiv 2309.17453), differentiable.
        dropout: counter-based dropout of the probabilities.
        normalizer: what makes weights of a row's scores, instead of the softmax: ``Sigmoid()``, or one of ``fused_attn.normalizers``.
        empty_rows: what rows without any allowed key give: "zero"; "uniform", weights of 1/kv_len through which nothing flows to the
            scores (a fill that replaces them); or "softmax", the same weights with the softmax's gradient (a fill that is added). Their
            lse is -inf. With a sink no row is empty.
        return_aux: what to return besides the output; asking for more never changes the output.
        backend: "auto", or a name that runs or raises, never falls back.

    Returns:
        out [batch, heads, q_len, value_dim], or (out, AuxOutput) exactly when ``return_aux`` is given. Rows without any allowed
        key give zeros, lse -inf and zero gradients, or what ``empty_rows`` says.

    Raises:
        ValueError, TypeError: the arguments contradict each other; the message says what to do.
        UnsupportedError: the backend asked for refuses the problem.

    Example:
        >>> import fused_attn as fa
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8).unbind(0)
        >>> out, aux = fa.attention(q, k, v, mask=fa.Causal(), return_aux=fa.AuxRequest(probs=True))
        >>> out.shape, aux.probs.sum(-1).allclose(torch.ones(1, 2, 5))
        (torch.Size([1, 2, 5, 8]), True)
    """
    options = {
        "mask": mask,
        "scale": scale,
        "scoring": scoring,
        "q_offset": q_offset,
        "score_mods": score_mods,
        "sinks": sinks,
        "dropout": dropout,
        "normalizer": normalizer,
        "empty_rows": empty_rows,
        "return_aux": return_aux,
    }
    if is_autocast(q):
        with torch.autocast(q.device.type, enabled=False):  # the products inside choose their own precision
            out, aux = _attention(in_autocast_dtype(q, k, v), options, backend)
    else:
        out, aux = _attention((q, k, v), options, backend)
    return out if return_aux is None else (out, aux)


def _attention(tensors: tuple[Any, Any, Any], options: dict[str, Any], backend: str) -> tuple[Tensor, AuxOutput]:
    part = sharded.Part(tensors, options) if any(map(is_sharded, tensors)) else None
    problem = AttentionProblem.check(*tensors, options) if part is None else part.problem
    out, aux = composed.attention(problem, backends.resolve(problem, backend), is_free=backend == "auto")
    return (out, aux) if part is None else part.whole(out, aux)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    scoring: Scoring | None = None,
    q_offset: int | Tensor | None = None,
    score_mods: Sequence[ScoreMod] = (),
    sinks: Tensor | None = None,
    dropout: Dropout | None = None,
    normalizer: Normalizer | None = None,
    empty_rows: EmptyRows = "zero",
    return_aux: AuxRequest | None = None,
    on: str | Target | None = None,
) -> Explanation:
    """Which backend ``attention`` would run for these arguments, and why each other one would not.

    ``on`` says where it would run, instead of on the tensors' device: "cpu", "sm_80", "sm_90", "sm_100", ... (with Triton and the CUDA
    library), or a ``fused_attn.backends.Target`` that says whether the library is there. Errors are those of ``attention``, and a
    ValueError where ``on`` names no target.

    Example:
        >>> q = torch.zeros(1, 1, 4, 8, dtype=torch.float64)
        >>> print(explain(q, q, q).chosen)
        cpu
        >>> explain(q.half(), q.half(), q.half(), on="sm_90").chosen, explain(q, q, q, on="sm_90").chosen
        ('triton', 'blocked')
    """
    options = {
        "mask": mask,
        "scale": scale,
        "scoring": scoring,
        "q_offset": q_offset,
        "score_mods": score_mods,
        "sinks": sinks,
        "dropout": dropout,
        "normalizer": normalizer,
        "empty_rows": empty_rows,
        "return_aux": return_aux,
    }
    q, k, v = in_autocast_dtype(q, k, v) if is_autocast(q) else (q, k, v)
    is_part = any(map(is_sharded, (q, k, v)))
    problem = sharded.Part((q, k, v), options).problem if is_part else AttentionProblem.check(q, k, v, options)
    return backends.explain(replace(problem, target=as_target(on)))


def is_autocast(tensor: Any) -> bool:
    """Whether autocast is in force where the tensor is."""
    return (
        torch._C._is_any_autocast_enabled()
        and isinstance(tensor, Tensor)
        and not tensor.is_meta
        and torch.is_autocast_enabled(tensor.device.type)
    )


def in_autocast_dtype(*tensors: Any) -> tuple[Any, ...]:
    """Inputs in autocast's dtype, as torch's own attention takes them; float64 stays."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def masked_softmax(
    scores: Tensor,
    mask: Mask | Tensor | None = None,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    dim: int = -1,
    log: bool = False,
    dropout: Dropout | None = None,
    empty_rows: Literal["zero", "uniform"] = "zero",
    q_offset: int | Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(scale * scores + bias) along ``dim`` over the allowed keys, in one pass over memory where a row fits (arXiv 1805.02867).

    Args:
        scores: any rank >= 1, any strides, or a DTensor. With ``dim`` moved last, the last two dimensions are (query, key) and, from rank 3 on,
            the first is the batch, so that ``ValidLengths`` takes [batch] or [batch, q_len] for every rank.
        mask: a mask, several combined with ``&``, ``|`` and ``~``, or a bool tensor that broadcasts to the scores (True may attend).
        scale: factor of the scores.
        bias: float tensor that broadcasts to the scores, with gradient in its own shape.
        dim: the dimension whose allowed elements sum to 1.
        log: logarithms instead; masked elements give -inf.
        dropout: counter-based dropout of the probabilities.
        empty_rows: rows without keys give 0 ("zero") or 1/kv_len ("uniform"); no gradient flows through them.
        q_offset: key position of query 0, needed when positions are compared and the lengths differ.
        backend: "auto", or a name that runs or raises, never falls back.

    Returns:
        A tensor like ``scores``.

    Raises:
        ValueError, TypeError: the arguments contradict each other; the message says what to do.
        UnsupportedError: the backend asked for refuses the problem.

    Example:
        >>> from fused_attn import ValidLengths
        >>> masked_softmax(torch.zeros(1, 1, 4), ValidLengths(torch.tensor([2])))
        tensor([[[0.5000, 0.5000, 0.0000, 0.0000]]])
    """
    if isinstance(scores, Tensor) and scores.dim() > 4:  # leading dimensions are merged, which may copy them into another order
        scores, bias = _in_their_own_layout(scores, bias)
    options = {
        "mask": mask,
        "scale": scale,
        "bias": bias,
        "dim": dim,
        "log": log,
        "dropout": dropout,
        "empty_rows": empty_rows,
        "q_offset": q_offset,
    }
    if is_sharded(scores):
        part = sharded.SoftmaxPart(scores, options)
        return part.whole(masked_softmax(part.scores, **part.options, backend=backend))
    problem = SoftmaxProblem.check(scores, options)
    name = backends.resolve(problem, backend)
    rows = eager.softmax(problem) if name == backends.EAGER else autograd.softmax(problem, name)
    axis = softmax_dim(scores, dim)
    return laid_out_like(rows.reshape(scores.movedim(axis, -1).shape).movedim(-1, axis), scores)


def _in_their_own_layout(*tensors: Any) -> tuple[Any, ...]:
    """The same tensors; the gradients of those that want one come in their layout, except under torch's transforms."""
    if not torch.is_grad_enabled() or active_transform() is not None:
        return tensors
    kept = list(with_laid_out_gradients(tuple([t for t in tensors if isinstance(t, Tensor)])))
    return tuple([kept.pop(0) if isinstance(t, Tensor) else t for t in tensors])


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's function of the same name and meaning: bool masks keep, float masks add, ``is_causal`` is aligned top-left.

    Args:
        query: [..., heads, q_len, head_dim]; leading dimensions broadcast as torch's do.
        key: [..., heads, kv_len, head_dim].
        value: [..., heads, kv_len, value_dim].
        attn_mask: bool or float, broadcastable to [..., heads, q_len, kv_len], or a ``torch.nn.attention.bias.CausalBias``.
        dropout_p: chance of removal, drawn from torch's generator; a float or a 0-d tensor without gradient.
        is_causal: keys at or before the query's index.
        scale: factor of the scores, a float or a 0-d tensor without gradient; 1/sqrt(head_dim) by default.
        enable_gqa: whether key and value may have fewer heads.

    Raises:
        TypeError: an argument is no tensor, number or bool, as torch's parser says.
        RuntimeError: everything else, as torch; it is a ValueError or a TypeError as well, as in ``attention``.

    Example:
        >>> q = torch.randn(2, 4, 6, 8)
        >>> expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> scaled_dot_product_attention(q, q, q, is_causal=True).allclose(expected, atol=1e-6)
        True
    """
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return torch_attention((query, key, value), attn_mask, options, "auto")


def torch_attention(tensors: tuple[Any, Any, Any], attn_mask: Any, options: dict[str, Any], backend: str) -> Tensor:
    """``scaled_dot_product_attention`` on a backend of choice; ``options`` are its arguments after ``attn_mask``."""
    parsed = False
    try:
        options = torch_sdpa.parse(tensors, attn_mask, options)
        parsed = True
        if tensors[0].dim() > 4:
            tensors = _in_their_own_layout(*tensors)
        qkv, keywords, lead = torch_sdpa.as_attention(tensors, attn_mask, options)
        out: Tensor = attention(*qkv, **keywords, backend=backend)
    except ValueError as error:
        raise torch_sdpa.ArgumentError(*error.args).with_traceback(error.__traceback__) from None
    except TypeError as error:
        if not parsed:
            raise
        raise torch_sdpa.ArgumentTypeError(*error.args).with_traceback(error.__traceback__) from None
    if len(lead) == 2:
        return out
    out = out.reshape(*lead, *out.shape[-2:])
    return laid_out_like(out, tensors[0]) if tensors[0].dim() == out.dim() else out
