"""`osp parity --mutate`: how many faults of the catalogue the suite catches, and whether it names the right layer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from osp_shared.errors import OspError
from osp_shared.traces import Result
from osp_shared.traces.report_text import number, table
from osp_tools.faults import Fault, catalogue, find
from osp_tools.parity_run import Run, extra_runs, quick_runs

TO_LOCATE = 0.95


@dataclass
class Outcome:
    fault: Fault
    caught: bool
    located: bool
    where: str
    why: str
    fraction: float
    end_error: float
    end_within: bool  # the free run's output is within its bound
    seconds: float


class Bench:
    """Judges faults; the reference's side of a run is computed once and kept."""

    def __init__(self, candidate: str = "mindspore"):
        self.candidate = candidate
        self.runs = {run.case.name: run for run in [*extra_runs(), *reversed(quick_runs())]}
        self.known: dict[str, object] = {}

    def run_of(self, name: str) -> Run:
        if name not in self.runs:
            raise OspError(f"no run {name!r}; one of {', '.join(self.runs)}")
        return self.runs[name]

    def judge(self, fault: Fault) -> Outcome:
        """Apply the fault and judge its runs until one catches it."""
        start = time.perf_counter()
        for name in fault.runs:
            run = self.run_of(name)
            if name not in self.known:
                self.known[name] = run.references(self.candidate)
            item = run.judge(self.known[name], self.candidate, fault.patch)
            if not item.passed:
                break
        return _outcome(fault, item, time.perf_counter() - start)


def _outcome(fault: Fault, item: Result, seconds: float) -> Outcome:
    blame = item.blames[0] if not item.passed else None
    located = blame is not None and re.search(fault.where, blame.path) is not None
    ends = [entry for entry in item.entries if entry.path == ""]
    return Outcome(
        fault, blame is not None, located, blame.where if blame else "-", blame.why if blame else "within bounds",
        item.fraction, ends[-1].total if ends else float("nan"), bool(ends) and ends[-1].free_fraction <= 1, seconds,
    )  # fmt: skip


def run_catalogue(names: Sequence[str], output: Path | None = None) -> bool:
    """Print the table and both rates; False when a visible fault escapes or too few are located."""
    if list(names) == ["list"]:
        print(table(["fault", "what"], [[fault.name, fault.what] for fault in catalogue()], left=2))
        return True
    faults = [find(name) for name in names] if names else catalogue()
    bench = Bench()
    outcomes = [bench.judge(fault) for fault in faults]
    print(report(outcomes))
    if output is not None:
        output.write_text(json.dumps([_as_dict(o) for o in outcomes], indent=1) + "\n", encoding="utf-8")
    visible = [o for o in outcomes if not o.fault.proof]
    escaped = [o for o in visible if not o.caught] + [o for o in outcomes if o.fault.proof and not o.end_within]
    return not escaped and sum(o.located for o in visible) >= TO_LOCATE * len(visible)


def report(outcomes: Sequence[Outcome]) -> str:
    visible = [o for o in outcomes if not o.fault.proof]
    lines = [
        [o.fault.name, "caught" if o.caught else "MISSED", "located" if o.located else "elsewhere" if o.caught else "-",
         number(o.fraction), number(o.end_error), f"{o.seconds:.1f}", o.where[:90]]
        for o in visible
    ]  # fmt: skip
    text = [table(["fault", "", "", "of bound", "end error", "s", "named"], lines)]
    for o in outcomes:
        if o.fault.proof:
            output = f"output {'within its bound' if o.end_within else 'BEYOND ITS BOUND'} ({number(o.end_error)})"
            inside = f"; inside, {o.where} differs" if o.caught else ""
            text.append(f"invisible: {o.fault.name} ({o.fault.what}): {output}{inside}. Proof: {o.fault.proof}")
    caught, located = sum(o.caught for o in visible), sum(o.located for o in visible)
    count = len(visible)
    if count:
        hidden = sum(1 for o in visible if o.caught and o.end_error < 5e-3)
        rates = f"{caught} caught ({caught / count:.0%}), {located} located ({located / count:.0%})"
        text.append(f"{count} faults: {rates}")
        text.append(f"{hidden} of them change the model's output by less than 5e-3, a common end-to-end tolerance")
    return "\n".join(text)


def _as_dict(o: Outcome) -> dict:
    return {
        "name": o.fault.name, "what": o.fault.what, "caught": o.caught, "located": o.located, "where": o.where,
        "why": o.why, "proof": o.fault.proof, "fraction": str(o.fraction), "end_error": str(o.end_error),
        "seconds": round(o.seconds, 2),
    }  # fmt: skip
