"""Whether a result is right: held to float64, as near as plain torch comes at the same dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the exact one: factor × plain torch's error + rounding of a sum of ``terms`` + absolute.

    Args:
        factor: of the largest error of plain torch at the same dtype.
        terms: most numbers that are summed for one element; 0 for none.
        absolute: what is allowed besides.
    """

    factor: float = 2.0
    terms: int = 0
    absolute: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """How far results are from float64.

    Args:
        error: the largest absolute error of any result; infinite where one is not finite and should be, or has another shape.
        plain_error: that of plain torch at the same dtype.
        broken: names of the results that break the rule.
        reason: what is wrong with them, where a distance does not say it; what is to be known of results that are right.
    """

    error: float
    plain_error: float
    broken: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class Judge:
    """Holds results to the error rule; the exact and the plain ones are computed once per problem.

    Args:
        exact: the definition's results in float64.
        plain: those of the definition at the case's dtype.
        tolerance: how far a result may be from the exact one.
        note: what is to be known of results that are right.

    Example:
        >>> x = torch.tensor([1.0, 3.0])
        >>> judge = Judge({"out": x.double()}, {"out": x})
        >>> judge({"out": x}).broken, judge({"out": x + 1}).error, judge({"out": x[:1]}).reason
        ((), 1.0, 'shape: out is [1], must be [2]')
    """

    exact: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    tolerance: Tolerance = field(default_factory=Tolerance)
    note: str = ""

    def __call__(self, results: Mapping[str, Tensor]) -> Verdict:
        plain_errors = {n: distance(self.plain[n], exact) for n, exact in self.exact.items()}
        worst = max(plain_errors.values())
        reason = self._unlike(results)
        if reason:
            return Verdict(math.inf, worst, tuple(n for n in self.exact), reason)
        errors = {n: self._error(n, got) for n, got in results.items()}
        broken = tuple(n for n, error in errors.items() if not error <= self._bound(n, plain_errors[n]))
        odd = [n for n in broken if math.isinf(errors[n])]
        reason = f"{', '.join(odd)} has NaN or infinity where float64 has none, or another value" if odd else "" if broken else self.note
        return Verdict(max(errors.values()), worst, broken, reason)

    def _error(self, name: str, got: Tensor) -> float:
        """How far a result is from the exact one; a truth value on which plain torch and float64 disagree is anyone's."""
        exact, plain = self.exact[name], self.plain[name]
        return distance(torch.where(plain == exact, got, exact), exact) if got.dtype == torch.bool else distance(got, exact)

    def _bound(self, name: str, plain_error: float) -> float:
        """How far it may be."""
        rule, dtype = self.tolerance, self.plain[name].dtype
        of_plain = 0.0 if dtype == torch.bool else rule.factor * plain_error  # any two truth values lie within twice 1
        return of_plain + rounding(self.exact[name], dtype, rule.terms) + rule.absolute

    def _unlike(self, results: Mapping[str, Tensor]) -> str:
        """What of the results can not even be compared; empty when everything can."""
        if set(results) != set(self.exact):
            return f"outputs: they are {', '.join(results) or 'none'}, must be {', '.join(self.exact)}"
        for name, exact in self.exact.items():
            got = results[name]
            if got.shape != exact.shape:
                return f"shape: {name} is {list(got.shape)}, must be {list(exact.shape)}"
            if got.dtype != self.plain[name].dtype:
                return f"dtype: {name} is {got.dtype}, must be {self.plain[name].dtype}"
            if got.device != exact.device:
                return f"device: {name} is on {got.device}, must be on {exact.device}"
        return ""


def distance(got: Tensor, exact: Tensor) -> float:
    """The largest absolute distance; infinite unless both have the same infinities and NaN in the same places.

    Integers and booleans that are not equal are at least 1 apart, however large: float64 does not hold all of int64.

    Example:
        >>> inf = torch.tensor([1.0, torch.inf])
        >>> distance(inf, inf.double()), distance(torch.tensor([1.0, torch.nan]), inf.double())
        (0.0, inf)
        >>> distance(torch.tensor([True, False]), torch.tensor([True, True]))
        1.0
    """
    wide = torch.complex128 if exact.is_complex() else torch.float64
    apart = (got.to(wide) - exact.to(wide)).abs()
    if not continuous(exact.dtype):
        apart = apart.clamp(min=1.0)
    same = (got == exact) | (got.isnan() & exact.isnan())
    apart = torch.where(same, 0.0, apart).nan_to_num(nan=torch.inf, posinf=torch.inf)
    return float(apart.max()) if apart.numel() else 0.0


def continuous(dtype: torch.dtype) -> bool:
    """Whether its values can be near each other; integers and booleans are equal or not."""
    return dtype.is_floating_point or dtype.is_complex


def rounding(exact: Tensor, dtype: torch.dtype, terms: int = 0) -> float:
    """What rounding may move the largest element by: stored in ``dtype``, summed over ``terms`` in float32 or wider.

    A sum rounds as often as it has terms, by at most half an eps; as independent errors they add up to
    eps * sqrt(terms) / 6 at one standard deviation, so eps * sqrt(terms) is six of them.
    """
    if not continuous(dtype):
        return 0.0
    finite = exact[exact.isfinite()]
    relative = torch.finfo(dtype).eps + torch.finfo(torch.promote_types(dtype, torch.float32)).eps * math.sqrt(terms)
    return float(finite.abs().max()) * relative if finite.numel() else 0.0
