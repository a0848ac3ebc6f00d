"""Which record of one trace answers which record of another, and whether the two may be compared at all."""

from __future__ import annotations

import json
from dataclasses import dataclass

from osp_shared.errors import OspError
from osp_shared.traces.format import Header, Record, Trace


@dataclass(frozen=True)
class Pair:
    candidate: Record
    reference: Record


@dataclass(frozen=True)
class Alignment:
    """Pairs in the reference's order; records that only one trace has; pairs whose shapes differ."""

    pairs: list[Pair]
    missing: list[Record]  # in the reference alone
    extra: list[Record]  # in the candidate alone
    misshaped: list[Pair]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.extra or self.misshaped)


def require_same_run(a: Trace, b: Trace, *, dtype: bool = False) -> None:
    """OspError naming what differs when two traces are not of one model, configuration, weights and input."""
    names = f"{a.source} and {b.source}"
    if a.header.model != b.header.model:
        raise OspError(f"{names}: traces of different models, {a.header.model} and {b.header.model}")
    if difference := _config_difference(a.header, b.header):
        raise OspError(f"{names}: different configurations: {difference}")
    for what, hint in (
        ("weights", "capture both from the same checkpoint, or the same fill and --salt"),
        ("inputs", "capture both with the same --salt and sizes"),
        ("mode", "compare free with free and forced with forced runs"),
        ("passes", "capture both with or both without --backward"),
        ("reference", "feed both from the same reference trace"),
    ):
        left, right = getattr(a.header, what), getattr(b.header, what)
        if left != right:
            raise OspError(f"{names}: different {what}, {left or 'none'} and {right or 'none'}; {hint}")
    if dtype and a.header.dtype != b.header.dtype:
        raise OspError(
            f"{names}: the reference ran in {a.header.dtype}, the candidate in {b.header.dtype}; "
            f"the yardstick is the reference in the candidate's dtype"
        )


def _config_difference(a: Header, b: Header) -> str:
    left, right = (json.loads(json.dumps(dict(h.config), default=list)) for h in (a, b))
    keys = [k for k in sorted({*left, *right}) if left.get(k) != right.get(k)]
    parts = [f"{k} is {left.get(k, 'absent')} and {right.get(k, 'absent')}" for k in keys[:4]]
    return ", ".join(parts) + (f" and {len(keys) - 4} more keys" if len(keys) > 4 else "")


def align(candidate: Trace, reference: Trace) -> Alignment:
    """Pair records by step, module path, call, kind and slot."""
    pairs, missing, misshaped = [], [], []
    for record in reference.records:
        found = candidate.by_key.get(record.key)
        if found is None:
            missing.append(record)
        elif found.shape != record.shape or found.sampled != record.sampled:
            misshaped.append(Pair(found, record))
        else:
            pairs.append(Pair(found, record))
    extra = [record for record in candidate.records if record.key not in reference.by_key]
    return Alignment(pairs, missing, extra, misshaped)
