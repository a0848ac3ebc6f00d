"""Comparison of traces: every record's error against its measured bound, and where the first fault lies.

Roles: `truth` is the reference in float64, `reference` the same code in the candidate's dtype (the yardstick), and
`candidate` the port under test. Two runs of each are compared: *free* (the model as it is, errors accumulate) and
*forced* (every module and kernel is fed with the reference's values and its result replaced by the reference's, so a
record's error is made by that module's own arithmetic and nothing else).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from osp_shared.errors import OspError
from osp_shared.traces.align import Alignment, align, require_same_run
from osp_shared.traces.bounds import RATIO, Bound, bound, floor, unit_roundoff
from osp_shared.traces.format import Record, Trace
from osp_shared.traces.metrics import Distance, distance, ulp_summary, wide

HALF = ("float16", "bfloat16")
COMPARED = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One record of the candidate against truth."""

    record: Record
    error: Distance
    yardstick: Distance | None
    ulp: tuple[float, float]  # median and 99th percentile, in the candidate's dtype
    bound: Bound
    fraction: float
    candidate_nonfinite: int

    @property
    def failed(self) -> bool:
        return not self.fraction <= 1.0

    @property
    def title(self) -> str:
        return self.record.title


@dataclass(frozen=True)
class Blame:
    """Where a fault lies: the smallest part whose own arithmetic (or structure) is wrong."""

    path: str
    where: str
    why: str
    call: int = 0  # which call of the module that `path` names, or lies in


@dataclass
class Comparison:
    candidate: Trace
    reference: Trace
    truth: Trace
    rows: list[Row]
    alignment: Alignment
    has_truth: bool
    by_key: dict = field(init=False)

    def __post_init__(self):
        self.by_key = {row.record.key: row for row in self.rows}

    @property
    def failing(self) -> list[Row]:
        return [row for row in self.rows if row.failed]

    @property
    def passed(self) -> bool:
        return self.alignment.complete and not self.failing

    @property
    def worst(self) -> Row | None:
        return max(self.rows, key=lambda row: row.fraction, default=None)

    @property
    def nonfinite(self) -> list[Row]:
        """Rows whose candidate holds NaN or infinite values where truth has none, in execution order."""
        return [row for row in self.rows if row.error.nonfinite]

    @property
    def blames(self) -> list[Blame]:
        """Faults in execution order. In a forced comparison each is a part that is wrong by itself."""
        found = [(record, "the candidate never makes this call") for record in _first_of_calls(self.alignment.missing)]
        found += [(record, "the reference makes no such call") for record in _first_of_calls(self.alignment.extra)]
        for pair in self.alignment.misshaped:
            why = f"shape {list(pair.candidate.shape)} instead of {list(pair.reference.shape)}"
            found.append((pair.reference, why))
        found += [(row.record, reason(row.error, row.bound.rel_l2, row.fraction)) for row in self.failing]
        found.sort(key=lambda item: item[0].order)
        return [Blame(_owner(record), _stretch(record), why, self._call(record)) for record, why in found]

    def _call(self, record: Record) -> int:
        """Which call of a module made a record: inputs and kernels belong to their caller's call in progress."""
        if _owner(record) == record.path and "/" not in record.path:
            return record.call
        earlier = (r for r in self.reference.records if r.order < record.order)
        return max((r.call for r in earlier if r.path == record.parent and r.kind == "input"), default=0)


def _owner(record: Record) -> str:
    """Whose code made this value: an input is made by the caller, anything else by the module itself."""
    return record.parent if record.kind == "input" and record.path else record.path


def _stretch(record: Record) -> str:
    name = record.path or "(model)"
    if record.kind != "input":
        return f"{name} {record.kind}" + (f", after {record.after}" if record.after else "")
    start = record.after or "its inputs"
    again = f" call {record.call + 1}" if record.call else ""
    return f"{record.parent or '(model)'}, between {start} and {name}{again}"


def reason(error: Distance, bound: float, fraction: float) -> str:
    """What is wrong with a value, in a line."""
    if error.nonfinite:
        return f"{error.nonfinite} of {error.size} values are NaN or infinite"
    return f"relative error {error.rel_l2:.1e}, bound {bound:.1e} ({fraction:.3g} of the bound)"


def _first_of_calls(records: list[Record]) -> list[Record]:
    seen, first = set(), []
    for record in records:
        call = (record.step, record.path, record.call)
        if call not in seen:
            seen.add(call)
            first.append(record)
    return first


def compare(candidate: Trace, reference: Trace, truth: Trace | None = None) -> Comparison:
    """Compare two traces of one run. OspError when they are of different models, configurations, weights or inputs.

    Without `truth` a wider reference (float64) is truth itself; with neither, the reference's rounding is unknown and
    bounds come from the arithmetic alone, accumulated along the run.
    """
    measured = truth is not None
    require_same_run(candidate, reference, dtype=measured)
    if truth is not None:
        require_same_run(candidate, truth)
        if unit_roundoff(truth.header.dtype) >= unit_roundoff(candidate.header.dtype):
            raise OspError(
                f"{truth.source}: truth in {truth.header.dtype} for a candidate in {candidate.header.dtype}; "
                f"capture truth with --dtype float64"
            )
    alignment = align(candidate, reference)
    rows, history = [], 0.0
    magnitudes = _magnitudes(truth or reference)
    for pair in alignment.pairs:
        record = pair.candidate
        if pair.reference.dtype not in COMPARED or record.dtype not in COMPARED:
            rows.extend(_exact_row(candidate, reference, record, pair.reference))
            continue
        local = floor(candidate.header.dtype, record.reduction, magnitudes.get(record.key, 1.0))
        if measured:
            # Sums before this record may have been taken in another order; the yardstick shows one order alone.
            allowed = math.hypot(local, math.sqrt(history))
        else:
            allowed = RATIO * math.sqrt(2.0 * (local**2 + history))
        if record.kind == "output" and candidate.header.mode == "free":
            history += (local - unit_roundoff(candidate.header.dtype) if measured else local) ** 2
        exact = truth if truth is not None else reference
        rows.append(_row(candidate, reference if measured else None, exact, record, pair.reference, allowed))
    return Comparison(candidate, reference, truth or reference, rows, alignment, measured)


def _row(
    candidate: Trace, reference: Trace | None, truth: Trace, record: Record, answer: Record, floor_rel: float
) -> Row:
    in_truth = truth.by_key.get(record.key)
    if in_truth is None or in_truth.shape != record.shape:
        raise OspError(f"{truth.source}: no {record.title} of shape {list(record.shape)}; truth is of another run")
    value, exact = candidate.value(record), truth.value(in_truth)
    error = distance(value, exact)
    yardstick = distance(reference.value(answer), exact) if reference is not None else None
    good = np.abs(wide(exact)[np.isfinite(wide(exact))])
    allowed = bound(candidate.header.dtype, error.scale, float(good.max(initial=0.0)), floor_rel, yardstick)
    spoiled = record.stats["nan"] + record.stats["inf"]
    fraction = allowed.fraction(error)
    if reference is not None and candidate.header.mode == "forced" and candidate.header.dtype in HALF:
        fraction = max(fraction, _rounding_fraction(value, reference.value(answer), error, floor_rel))
    steps = ulp_summary(value, exact, record.dtype)
    return Row(record, error, yardstick, steps, allowed, fraction, spoiled)


def _rounding_fraction(value: np.ndarray, answer: np.ndarray, error: Distance, floor_rel: float) -> float:
    """How far a half-precision candidate is from the reference in that dtype, over what its own error explains.

    The reference rounds at stated places (RoPE angles, for one). A candidate that leaves such a rounding out is closer
    to truth than the reference, so no bound on its error shows it; but then it is far from the reference.
    """
    apart = distance(value, answer)
    explained = Bound(RATIO * max(error.rel_l2, floor_rel), RATIO * max(error.max_abs, floor_rel * error.scale), "half")
    return explained.fraction(apart)


def _exact_row(candidate: Trace, reference: Trace, record: Record, answer: Record) -> list[Row]:
    """Integers and booleans must be equal."""
    a, b = candidate.value(record), reference.value(answer)
    error = distance(a, b)
    fraction = 0.0 if np.array_equal(wide(a), wide(b)) else math.inf
    return [Row(record, error, None, (0.0, 0.0), Bound(0.0, 0.0, "exact"), fraction, 0)]


def _magnitudes(truth: Trace) -> dict[tuple, float]:
    """Per output of a composite: largest root mean square of its parts' outputs and a residual input, over its own.

    An input counts when it has the output's shape: others (a timestep, a mask) are not summed with the rest. Attention
    sums its values: where their mean is small, the probabilities' errors are not.
    """
    shapes: dict[tuple, tuple] = {r.key[:3]: r.shape for r in truth.records if r.kind == "output" and r.slot == "0"}
    operands: dict[tuple, float] = {}
    composites: set[tuple] = set()
    running: dict[tuple[int, str], tuple] = {}  # the call in progress of each module
    result: dict[tuple, float] = {}
    for record in truth.records:
        own = (record.step, record.path, record.call)
        rms = record.stats["rms"]
        if record.kind == "input" and record.slot == "0":
            operands[own] = rms if shapes.get(own) == record.shape else 0.0
            running[(record.step, record.path)] = own
        elif record.kind == "input" and record.slot == "2" and record.type == "attention":
            operands[own] = rms  # the values: what the probabilities' errors are multiplied with
            composites.add(own)
        elif record.kind == "output":
            caller = running.get((record.step, record.parent))
            if caller is not None and record.path != record.parent:
                operands[caller] = max(operands[caller], rms)
                composites.add(caller)
            if rms > 0 and own in composites:
                result[record.key] = max(1.0, operands.get(own, 0.0) / rms)
    return result
