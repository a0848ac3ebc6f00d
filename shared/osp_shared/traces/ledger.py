"""Where an error comes from: what a layer makes itself, what it is given, and by how much it grows on the way.

Local error is measured on the forced run (the layer on the reference's values), total error on the free run. Errors are
vectors and add up exactly, so inherited = total - local as vectors; amplification is the inherited error over the error
of the layer's own input in the free run. A drift shows as small local errors and inherited ones that grow; a bug as one
local error over its bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from osp_shared.traces.compare import Blame, Comparison, Row
from osp_shared.traces.metrics import wide


@dataclass(frozen=True)
class Entry:
    """One output of one module call. Errors are relative L2; `fraction` is that of the local error's bound."""

    row: Row  # of the forced run when there is one
    local: float
    total: float
    inherited: float
    given: float  # error of the module's first input in the free run
    amplification: float  # inherited / given; nan where nothing was given
    fraction: float
    free_fraction: float

    @property
    def path(self) -> str:
        return self.row.record.path


@dataclass
class Result:
    """Outcome of one model in one dtype."""

    name: str
    free: Comparison
    forced: Comparison | None
    entries: list[Entry]
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    crash: Blame | None = None  # the candidate raised
    free_decides: bool = True  # False where errors legitimately explode along the run (long trajectories)

    @property
    def judged(self) -> Comparison:
        """The comparison that decides: local errors when they were measured."""
        return self.forced if self.forced is not None else self.free

    @property
    def passed(self) -> bool:
        return self.crash is None and self.judged.passed and (self.free.passed or not self.free_decides)

    @property
    def blames(self) -> list[Blame]:
        found = self.judged.blames or ([] if self.passed else self.free.blames)
        if self.crash is None:
            return found
        # What ran before the exception may show its cause; calls that are missing because of it do not.
        return [blame for blame in found if not blame.why.startswith("the candidate never")] + [self.crash]

    @property
    def fraction(self) -> float:
        """Worst error over bound among the judged records; 0 for an empty trace."""
        rows = self.judged.rows + (self.free.rows if self.free_decides else [])
        return max((row.fraction for row in rows), default=0.0)

    @property
    def verdict(self) -> str:
        if self.passed:
            return "within bounds"
        first, others = self.blames[0], len({blame.path for blame in self.blames}) - 1
        more = f"; {others} more part{'s' if others > 1 else ''}" if others > 0 else ""
        return f"first fault: {first.where}: {first.why}{more}"


def result(name: str, free: Comparison, forced: Comparison | None = None, **rest: object) -> Result:
    return Result(name, free, forced, list(_entries(free, forced)), **rest)


def _entries(free: Comparison, forced: Comparison | None) -> Iterable[Entry]:
    for row in (forced or free).rows:
        record = row.record
        if record.kind not in ("output", "model_output", "x0", "x_t"):
            continue
        in_free = free.by_key.get(record.key)
        if in_free is None:
            continue
        given_row = free.by_key.get((record.step, record.path, record.call, "input", "0"))
        given = given_row.error.rel_l2 if given_row is not None and given_row.bound.source != "exact" else 0.0
        inherited = _inherited(free, forced, row, in_free) if forced is not None else math.nan
        amplification = inherited / given if given > 0 else math.nan
        local = row.error.rel_l2 if forced is not None else math.nan
        yield Entry(row, local, in_free.error.rel_l2, inherited, given, amplification, row.fraction, in_free.fraction)


def _inherited(free: Comparison, forced: Comparison, local: Row, total: Row) -> float:
    def gap(comparison: Comparison, row: Row) -> tuple[np.ndarray, np.ndarray]:
        exact = wide(comparison.truth.value(comparison.truth.by_key[row.record.key]))
        return wide(comparison.candidate.value(row.record)) - exact, exact

    gap_total, exact = gap(free, total)
    gap_local, _ = gap(forced, local)
    difference = gap_total - gap_local
    good = np.isfinite(difference) & np.isfinite(exact)
    norm = np.linalg.norm(exact[good])
    return float(np.linalg.norm(difference[good]) / norm) if norm > 0 else float(np.linalg.norm(difference[good]))
