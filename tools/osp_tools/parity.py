"""`osp parity`: every layer of the MindSpore models against the PyTorch reference; the verdict names the layer."""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from osp_shared.errors import OspError
from osp_shared.traces import Result, ratchet, report_text
from osp_tools.trace import write_reports

RATCHET = Path("parity_tests/ratchet.json")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("parity", help="prove the MindSpore models against the reference, layer by layer")
    parser.add_argument("--candidate", choices=("mindspore", "torch"), default="mindspore", help="backend under test")
    parser.add_argument("--salt", default="", help="other made-up weights and inputs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="runs whose name contains one of these")
    parser.add_argument("--layers", action="store_true", help="print every layer, not only the table of models")
    parser.add_argument("--html", type=Path, help="one self-contained page with plots")
    parser.add_argument("--junit", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--replay", type=Path, metavar="FOLDER", help="on a fault, write the layer as a runnable test")
    parser.add_argument("--break", dest="fault", metavar="FAULT", help="apply one fault of the catalogue, then judge")
    parser.add_argument("--mutate", nargs="*", metavar="FAULT", help="judge every fault, or those named")
    parser.add_argument("--ratchet", type=Path, nargs="?", const=RATCHET, help="fail when an error grew (ratchet.json)")
    parser.add_argument("--update_ratchet", type=Path, nargs="?", const=RATCHET, help="write the observed figures")
    parser.add_argument("--full-size", dest="full_size", action="store_true", help="the 2.77 B transformer, streamed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    if args.full_size:
        from osp_tools.full_size import full_size_parity

        return full_size_parity()
    if args.mutate is not None:
        from osp_tools.mutate import run_catalogue

        passed = run_catalogue(args.mutate, args.json)
    else:
        passed = _suite(args)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.0f} s, peak memory {memory:.1f} GiB")
    return 0 if passed else 1


def _suite(args: argparse.Namespace) -> bool:
    from osp_tools.parity_run import extra_runs, quick_runs, run_all

    every = [*quick_runs(args.salt), *extra_runs()]
    runs = [r for r in every if not args.only or any(word in r.name for word in args.only)]
    if not runs:
        raise OspError(f"--only {' '.join(args.only)}: no such run; {', '.join(r.name for r in every)}")
    patch = None
    if args.fault:
        from osp_tools.faults import find

        fault = find(args.fault)
        patch = fault.patch
        runs = [r for r in runs if r.case.name in fault.runs] or runs
        print(f"with fault {fault.name}: {fault.what}")
    results = run_all(runs, args.candidate, patch)
    print(report_text.suite_table(results))
    if args.layers:
        for item in results:
            print(f"\n{item.name}\n{report_text.layer_table(item)}")
    write_reports(results, args)
    if args.replay is not None:
        _replay(results, runs, args.replay)
    return all(item.passed for item in results) and _ratchet(results, args)


def _replay(results: list[Result], runs: list, folder: Path) -> None:
    from osp_tools.replay import write_replay

    for item, planned in zip(results, runs, strict=True):
        if item.passed or not item.blames:
            continue
        try:
            print(f"replay: {write_replay(folder / item.name.replace(' ', '-'), planned.case, planned.dtype, item)}")
        except OspError as error:  # the other runs may still have theirs
            print(error)


def _ratchet(results: list[Result], args: argparse.Namespace) -> bool:
    found = ratchet.observed(results)
    if args.update_ratchet is not None:
        kept = ratchet.read(args.update_ratchet) if args.update_ratchet.exists() else {}
        ratchet.write(args.update_ratchet, found, kept)
        print(f"wrote {args.update_ratchet}")
    if args.ratchet is None:
        return True
    verdict = ratchet.check(found, ratchet.read(args.ratchet))
    told = {"grown": verdict.grown, "not in the ratchet": verdict.new, "could be tightened": verdict.loose}
    for what, lines in told.items():
        for line in lines:
            print(f"{what}: {line}")
    return verdict.passed
