"""The normal form back as vocabulary, so that the definition can evaluate what the kernels were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fused_attn.dropout import Dropout
from fused_attn.lowering import Terms
from fused_attn.masks import Mask
from fused_attn.modifiers import Modifiers
from fused_attn.normalizers import NORMALIZERS
from fused_attn.score_mods import SCORE_MODS
from fused_attn.scoring import SCORINGS


def modifiers_of(terms: Terms, mask: Mask | None = None) -> Modifiers:
    """The vocabulary of the terms; the mask is the caller's to give, who knows of which region."""
    mods = tuple([SCORE_MODS[score.name].from_kernel(score) for score in terms.mods])
    dropout = None if terms.dropout is None else Dropout(*terms.dropout)
    scoring = None if terms.scoring is None else SCORINGS[terms.scoring.name].from_kernel(terms.scoring)
    normalizer = None if terms.normalizer is None else NORMALIZERS[terms.normalizer.name](*terms.normalizer.scalars)
    return Modifiers(mask, terms.scale, terms.q_offset, mods, terms.sinks, dropout, scoring, normalizer)


def with_parameters(terms: Terms, tensors: Sequence[Tensor | None]) -> Terms:
    """The same terms on other tensors, in the order of ``Terms.parameters``."""
    sinks, *rest = tensors
    left = iter([t for t in rest if t is not None])
    entries = [replace(m, tensors=tuple([next(left) for _ in m.tensors])) for m in terms.entries]
    scoring = None if terms.scoring is None else entries.pop(0)
    return replace(terms, mods=tuple(entries), sinks=sinks, scoring=scoring)
