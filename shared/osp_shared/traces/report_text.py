"""What a terminal shows, and the same as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from osp_shared.traces.compare import HALF, Comparison, Row
from osp_shared.traces.ledger import Entry, Result


def number(value: float) -> str:
    """Two digits, never wider than eight characters; `-` where there is nothing to say."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "inf"
    return "0" if value == 0 else f"{value:.1e}" if not 0.01 <= abs(value) < 1000 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Columns in plain text; the first `left` are aligned to the left."""
    widths = [max(len(str(line[i])) for line in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        parts = [
            str(c).ljust(w) if i < left else str(c).rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(head), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def suite_table(results: Sequence[Result]) -> str:
    """One line a model, then one for each that failed."""
    head = ["model", "layers", "worst local", "of bound", "end error", "seconds", "", "layer"]
    rows = []
    for item in results:
        worst = item.judged.worst
        last = next((entry for entry in reversed(item.entries) if entry.path == ""), None)
        rows.append([
            item.name, str(len({row.record.path for row in item.judged.rows})),
            number(worst.error.rel_l2) if worst else "-", number(item.fraction),
            number(last.total) if last else "-", f"{item.seconds:.1f}", "ok" if item.passed else "FAIL",
            worst.title if worst else "-",
        ])  # fmt: skip
    text = table(head, rows)
    failures = [f"FAIL {item.name}: {item.verdict}" for item in results if not item.passed]
    return "\n".join([text, *failures, *_by_type(results)])


def _by_type(results: Sequence[Result]) -> list[str]:
    """How many outputs of each type of layer or kernel are wrong by themselves: one type alone points at its kernel.

    Half types are left out: their bounds are too wide to tell a type apart.
    """
    failed: Counter[str] = Counter()
    judged: Counter[str] = Counter()
    for item in results:
        if item.forced is None or item.forced.candidate.header.dtype in HALF:
            continue
        for row in item.forced.rows:
            if row.record.kind == "output" and row.record.type:
                judged[row.record.type] += 1
                failed[row.record.type] += row.failed
    parts = [f"{type} {count} of {judged[type]}" for type, count in failed.most_common(5) if count]
    return [f"wrong by type, in float32: {', '.join(parts)}"] if parts else []


def layer_table(item: Result, limit: int = 0) -> str:
    """Every layer's local and inherited error; `limit` keeps the worst ones, still in execution order."""
    kept = item.entries
    if limit and len(kept) > limit:
        kept = sorted(sorted(kept, key=lambda e: -e.fraction)[:limit], key=lambda e: e.row.record.order)
    head = ["layer", "local", "bound", "of bound", "inherited", "total", "growth", "max abs", "1-cos", "ulp", "from"]
    return table(head, [_layer_line(entry) for entry in kept])


def _layer_line(entry: Entry) -> list[str]:
    row = entry.row
    return [
        row.title, number(entry.local), number(row.bound.rel_l2), number(entry.fraction), number(entry.inherited),
        number(entry.total), number(entry.amplification), number(row.error.max_abs), number(row.error.angle),
        f"{row.ulp[0]:.0f}/{row.ulp[1]:.0f}", row.bound.source,
    ]  # fmt: skip


def comparison_table(comparison: Comparison, limit: int = 0) -> str:
    """Records of a plain comparison of traces, in execution order."""
    rows = comparison.rows
    if limit and len(rows) > limit:
        rows = sorted(sorted(rows, key=lambda r: -r.fraction)[:limit], key=lambda r: r.record.order)
    head = ["record", "rel L2", "bound", "of bound", "max abs", "1-cos", "ulp", "from", ""]
    return table(head, [
        [row.title, number(row.error.rel_l2), number(row.bound.rel_l2), number(row.fraction), number(row.error.max_abs),
         number(row.error.angle), f"{row.ulp[0]:.0f}/{row.ulp[1]:.0f}", row.bound.source, "FAIL" if row.failed else ""]
        for row in rows
    ])  # fmt: skip


def comparison_summary(comparison: Comparison) -> str:
    """A few lines: what was compared, what has no partner, non-finite layers, the verdict."""
    a, b = comparison.candidate.header, comparison.reference.header
    how = "bounds measured against truth" if comparison.has_truth else "no truth trace: bounds from arithmetic alone"
    lines = [f"{a.model} ({a.mode}): {a.backend} {a.dtype} against {b.backend} {b.dtype}; {how}"]
    alignment = comparison.alignment
    for what, records in (("only in the reference", alignment.missing), ("only in the candidate", alignment.extra)):
        if records:
            names = ", ".join(r.title for r in records[:4]) + (" ..." if len(records) > 4 else "")
            lines.append(f"{len(records)} records {what}: {names}")
    for row in comparison.nonfinite:
        lines.append(f"NaN or infinite: {row.title}: {row.error.nonfinite} of {row.error.size}")
    blames = comparison.blames
    worst = comparison.worst
    if blames:
        lines.append(f"FAIL first: {blames[0].where}: {blames[0].why}")
    elif worst is not None:
        peak = f"worst at {number(worst.fraction)} of its bound: {worst.title}"
        lines.append(f"ok: {len(comparison.rows)} records, {peak}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- JSON


def finite(value: float) -> float | str:
    """JSON has neither NaN nor infinity: they become strings."""
    return value if math.isfinite(value) else str(value)


def row_dict(row: Row) -> dict:
    record = row.record
    return {
        "record": row.title, "path": record.path, "kind": record.kind, "slot": record.slot, "call": record.call,
        "step": record.step, "type": record.type, "shape": list(record.shape), "rel_l2": finite(row.error.rel_l2),
        "max_abs": finite(row.error.max_abs), "one_minus_cosine": finite(row.error.angle), "ulp_median": row.ulp[0],
        "ulp_p99": row.ulp[1], "yardstick": finite(row.yardstick.rel_l2) if row.yardstick else None,
        "bound": row.bound.rel_l2, "bound_max_abs": row.bound.max_abs, "bound_from": row.bound.source,
        "fraction": finite(row.fraction), "nonfinite": row.error.nonfinite, "failed": row.failed,
    }  # fmt: skip


def comparison_dict(comparison: Comparison) -> dict:
    return {
        "candidate": comparison.candidate.source,
        "reference": comparison.reference.source,
        "truth": comparison.truth.source if comparison.has_truth else None,
        "passed": comparison.passed,
        "missing": [record.title for record in comparison.alignment.missing],
        "extra": [record.title for record in comparison.alignment.extra],
        "faults": [{"path": b.path, "where": b.where, "why": b.why} for b in comparison.blames],
        "records": [row_dict(row) for row in comparison.rows],
    }


def result_dict(item: Result) -> dict:
    layers = [
        {**row_dict(e.row), "local": finite(e.local), "inherited": finite(e.inherited), "total": finite(e.total),
         "given": finite(e.given), "amplification": finite(e.amplification), "free_fraction": finite(e.free_fraction)}
        for e in item.entries
    ]  # fmt: skip
    return {
        "name": item.name, "passed": item.passed, "verdict": item.verdict, "fraction": finite(item.fraction),
        "seconds": round(item.seconds, 2), "notes": item.notes, "layers": layers,
        "faults": [{"path": b.path, "where": b.where, "why": b.why} for b in item.blames],
    }  # fmt: skip
