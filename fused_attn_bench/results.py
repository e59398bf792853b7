"""What is kept of measurements, and the JSON lines that carry it from one history to another."""

from __future__ import annotations

import datetime
import functools
import json
import mmap
import secrets
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NoReturn, TypeAlias, TypeVar

from fused_attn_bench.case import Case
from fused_attn_bench.environment import KEY

if TYPE_CHECKING:
    from pydantic import TypeAdapter

STATUSES = ("ok", "wrong", "refused", "failed")


class Held:
    """Beside a field's type, what else its values are held to when a line or a row is read.

    pydantic finds the method by its name, so that a machine that only measures needs no pydantic.

    Args:
        is_right: whether a value is; it may also raise a ValueError of its own.
        must: what is said of one that is not.
    """

    def __init__(self, is_right: Callable[[Any], object], must: str) -> None:
        self.is_right, self.must = is_right, must

    def __call__(self, value: Any) -> Any:
        if not self.is_right(value):
            raise ValueError(self.must)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self, handler(source))


def _is_utc(text: str) -> bool:
    return not text or datetime.datetime.fromisoformat(text).utcoffset() in (None, datetime.timedelta(0))


# What the fields of kept records may hold.
CaseName = Annotated[str, Held(Case.parse, "it must be a case")]
Time = Annotated[str, Held(_is_utc, "a time must be in UTC")]
Name = Annotated[str, Held(bool, "a name must not be empty")]
Status = Annotated[str, Held(STATUSES.__contains__, f"a status must be one of {', '.join(STATUSES)}")]
# Beyond these no clock is right, and ratios of times or powers of effects would overflow.
Seconds = Annotated[float, Held(lambda value: 1e-12 <= value <= 1e9, "a time must lie between 1e-12 and 1e9 seconds")]
Effect = Annotated[float, Held(lambda value: abs(value) <= 100, "a log ratio must lie between -100 and 100")]
Positive = Annotated[float, Held(lambda value: value > 0, "it must be greater than 0")]
Amount = Annotated[float, Held(lambda value: value >= 0, "it must not be negative")]
Count = Annotated[int, Held(lambda value: value >= 0, "it must not be negative")]
Roofs = Annotated[tuple[Positive, ...], Held(lambda values: len(values) in (0, 2), "there must be two roofs, or none")]
# For pydantic: no text for a number, no field of a newer version, no NaN.
STRICT = {"strict": True, "extra": "forbid", "allow_inf_nan": False}
UNKNOWN = "unexpected_keyword_argument"


@dataclass(frozen=True)
class Result:
    """What one provider did on one case in one run.

    Args:
        case: ``Case.name``.
        provider: a name in ``providers.names()``, perhaps with a planted slowdown or the commit it was built from.
        status: "ok"; "wrong" broke the error rule; "refused" cannot compute the case; "failed" raised.
        reason: why it has no times, or what to know about them.
        backend: which of fused_attn's backends ran.
        config: tile configurations that ran, where they are chosen at run time.
        error: largest absolute distance of any result from float64.
        plain_error: that of plain torch at the same dtype.
        peak: bytes of tensors alive at once beyond the inputs.
        outputs: bytes of the results.
        samples: seconds per call, on the device.
        host: seconds until the call returned; empty where that is the same.
        telemetry: one record of sensors per sample.
        faults: minor page faults per call, the median over the samples; None where they were not counted.
        metrics: figures of the operation's own by name; one whose name ends in "/s" is an amount per call.
        flops: of the case's operations.
        bytes: the least that the case has to move.
        roofs: bytes per second of a copy and operations per second of a matrix product, measured in the same run; empty where they were not.
        marks: what others did on the machine meanwhile, beyond what is usual; see ``quiet``.
        run: id of the run.
        time: of its start, ISO 8601 in UTC.
        timer: what took the samples.
        environment: see ``environment.describe``.
    """

    __pydantic_config__: ClassVar = STRICT

    case: CaseName
    provider: Name
    status: Status = "ok"
    reason: str = ""
    backend: str = ""
    config: str = ""
    error: Amount | None = None
    plain_error: Amount | None = None
    peak: Count | None = None
    outputs: Count = 0
    samples: tuple[Seconds, ...] = ()
    host: tuple[Amount, ...] = ()
    telemetry: tuple[dict[str, Any], ...] = ()
    faults: Amount | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    flops: Amount = 0.0
    bytes: Amount = 0.0
    roofs: Roofs = ()
    marks: tuple[str, ...] = ()
    run: str = ""
    time: Time = ""
    timer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def median(self) -> float | None:
        """Seconds; None where nothing was timed."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def spread(self) -> float | None:
        """Half of the interquartile range as a fraction of the median."""
        if len(self.samples) < 4:
            return None
        low, middle, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / 2 / middle

    @property
    def limit(self) -> float | None:
        """The shortest time in seconds that the roofs allow: what the products or what the memory need, whichever is longer."""
        return max(self.bytes / self.roofs[0], self.flops / self.roofs[1]) if self.roofs else None

    @property
    def memory(self) -> str:
        """Of a call: "fresh" where it had pages mapped for at least half of what it gives out, "reused" where it wrote to mapped ones; "" if unknown.

        Outputs and scratch memory look alike here, and a huge page is one fault: the number of faults stands beside the word.
        """
        if self.faults is None or not self.outputs:
            return ""
        return "fresh" if 2 * self.faults * mmap.PAGESIZE >= self.outputs else "reused"

    @property
    def machine(self) -> tuple[str, ...]:
        """What has to agree before two results may be compared."""
        return machine(self.environment, self.timer)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """A result from one line.

        Raises:
            ResultsError: it is none.
        """
        return parse(cls, text)

    def to_json(self) -> str:
        """One line."""
        return json.dumps(vars(self), allow_nan=False)


@dataclass(frozen=True)
class Compared:
    """What a comparison found on one case, as the history keeps it.

    Args:
        case: ``Case.name``.
        a, b: what the sides are called.
        verdict: as ``significance`` names it, or the status of a side that has no time.
        reason: why there is no time, or what to know about it.
        medians: seconds of A and of B; None where there are none.
        effect: log of the ratio of times B / A; None where a side has no time.
        low, high: its 95 % interval; None where it has none.
        p: corrected p-value.
        smallest: the smallest effect that the comparison could have found, a log ratio.
        launches: how many.
        run: id of the comparison.
        time: of its start, ISO 8601 in UTC.
        timer: what took the samples.
        environment: see ``environment.describe``.
    """

    __pydantic_config__: ClassVar = STRICT

    case: CaseName
    a: Name
    b: Name
    verdict: Name
    reason: str = ""
    medians: tuple[Seconds | None, Seconds | None] = (None, None)
    effect: Effect | None = None
    low: Effect | None = None
    high: Effect | None = None
    p: Amount | None = None
    smallest: Amount | None = None
    launches: Count = 0
    run: str = ""
    time: Time = ""
    timer: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Floor:
    """The noise floor of a case, as ``calibrate`` found it.

    Args:
        machine: see ``machine``.
        case: ``Case.name``.
        provider: what was compared with itself.
        floor: log of a ratio of times that one more comparison of identical code would exceed once in a hundred times.
        comparisons: how many it rests on.
    """

    __pydantic_config__: ClassVar = STRICT

    machine: tuple[str, ...]
    case: CaseName
    provider: Name
    floor: Amount
    comparisons: Count


Record: TypeAlias = Result | Compared | Floor
R = TypeVar("R", Result, Compared, Floor)
S = TypeVar("S", Result, Compared)


def new_run() -> tuple[str, str]:
    """An id for a run that begins now, and the time in UTC."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}", now.isoformat(timespec="seconds")


def machine(environment: Mapping[str, str], timer: str) -> tuple[str, ...]:
    """The part of an environment that times depend on, and what took them, beside which busy processes and at which locked clock."""
    busy, clocks = environment.get("busy", ""), environment.get("clocks", "")
    return (*(environment.get(name, "") for name in KEY), f"{timer}{f' beside {busy}' * bool(busy)}{f', {clocks}' * bool(clocks)}")


class ResultsError(ValueError):
    """A file that cannot be read, or must not be written to."""


@functools.cache
def _checks() -> dict[type[Any], TypeAdapter[Any]]:
    from pydantic import TypeAdapter

    return {kind: TypeAdapter(kind) for kind in (Result, Compared, Floor)}


def parse(kind: type[R], text: str) -> R:
    """A record of a kind from its JSON; every field is held to its type and range, and none may be unknown.

    Raises:
        ResultsError: it is none.
    """
    from pydantic import ValidationError

    try:
        read: R = _checks()[kind].validate_json(text)
    except ValidationError as error:
        first = min(error.errors(include_url=False), key=lambda e: e["type"] != UNKNOWN)
        newer = first["type"] == UNKNOWN
        where = ".".join(map(str, first["loc"]))
        problem = "this field is unknown; a newer version may have written it" if newer else first["msg"].removeprefix("Value error, ")
        _refuse(text, f"{where}: {problem}" if where else problem)
    return read


def kept(kind: type[S], text: str) -> S:
    """The same of a record that a history keeps, which has a run and a time.

    Raises:
        ResultsError: it is none.
    """
    record = parse(kind, text)
    if not (record.run and record.time):
        _refuse(text, "it must name its run and its time")
    return record


def _refuse(text: str, problem: str) -> NoReturn:
    raise ResultsError(f"a line must hold one result as JSON; got {text.strip()[:60]!r} ({problem}).") from None


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def from_line(text: str) -> Record:
    """The record that a line holds, a result where it does not say otherwise.

    Raises:
        ResultsError: it holds none.
    """
    try:
        read = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        _refuse(text, str(error))
    name = next(iter(read)) if isinstance(read, dict) and len(read) == 1 else ""
    if name == "comparison":
        return kept(Compared, json.dumps(read[name]))
    return parse(Floor, json.dumps(read[name])) if name == "floor" else kept(Result, text)


def to_line(record: Record) -> str:
    """One line of JSON, which ``from_line`` takes back: a result's whole object, or an object with one value that is named for its kind.

    Example:
        >>> to_line(Floor(("a chip", "wall"), "softmax/plain/fwd/float32/8x8", "mine", 0.01, 10))
        '{"floor": {"machine": ["a chip", "wall"], "case": "softmax/plain/fwd/float32/8x8", "provider": "mine", "floor": 0.01, "comparisons": 10}}'
    """
    if isinstance(record, Result):
        return record.to_json()
    name = "floor" if isinstance(record, Floor) else "comparison"
    return json.dumps({name: vars(record)}, allow_nan=False)


def load(path: Path) -> list[Record]:
    """Records from JSON lines.

    Raises:
        ResultsError: a line is none; its number is named.
    """
    records: list[Record] = []
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    records.append(from_line(line))
    except ResultsError as error:
        raise ResultsError(f"{path}, line {number}: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} must be a text file of JSON lines; got: {error}.") from None
    return records
