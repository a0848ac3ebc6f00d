"""`osp trace capture`: record a run of one model on one backend. `osp trace compare`: judge one trace by another."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from osp_shared.errors import OspError
from osp_shared.traces import Result, compare, read_trace, report_html, report_junit, report_text, result
from osp_shared.traces import cases as case_table
from osp_shared.traces.cases import Case
from osp_shared.traces.format import FULL_LIMIT, Trace
from osp_shared.traces.tap import CaptureFailed, rounded


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("trace", help="capture what every layer computes; compare two captures anywhere")
    kinds = parser.add_subparsers(dest="what", required=True, metavar="{capture,compare}")

    capture = kinds.add_parser("capture", help="run one model and write its trace")
    capture.add_argument("output", type=Path, help="folder to write")
    capture.add_argument("--model", required=True, choices=sorted(case_table.MODELS))
    capture.add_argument("--backend", choices=("torch", "mindspore"), default="mindspore")
    capture.add_argument("--dtype", choices=("float64", "float32", "float16", "bfloat16"), default="float32")
    capture.add_argument("--weights", type=Path, help="checkpoint; without it a tiny model with made-up weights")
    capture.add_argument("--salt", default="", help="of the made-up weights and inputs")
    capture.add_argument("--size", type=int, nargs=3, metavar=("T", "H", "W"), help="video pixels, or DiT latent cells")
    capture.add_argument("--backward", action="store_true", help="also the gradients of every parameter")
    capture.add_argument("--feed", type=Path, help="trace of the reference in float64 to feed every layer from")
    capture.add_argument("--feed_dtype", help="the candidate's dtype, when it is not --dtype")
    capture.add_argument("--full_limit", type=int, default=FULL_LIMIT, help="elements above which a tensor is sampled")
    capture.set_defaults(run=run_capture)

    judge = kinds.add_parser("compare", help="candidate against reference; needs neither framework")
    judge.add_argument("reference", type=Path, metavar="A", help="trace of the reference in the candidate's dtype")
    judge.add_argument("candidate", type=Path, metavar="B", help="trace of the candidate")
    judge.add_argument("--truth", type=Path, help="trace of the reference in float64")
    judge.add_argument("--all", action="store_true", help="print every record, not the worst twenty")
    judge.add_argument("--html", type=Path)
    judge.add_argument("--json", type=Path)
    judge.add_argument("--junit", type=Path)
    judge.set_defaults(run=run_compare)


def run_capture(args: argparse.Namespace) -> int:
    from osp_tools.parity_run import backend_capture, capture_run

    if args.feed is not None and args.backward:
        raise OspError("--feed and --backward: a forced run has no gradients, its values do not depend on each other")
    if args.model == "dit-sampler" and args.backward:
        raise OspError("--model dit-sampler and --backward: a sampling run has no backward pass; use --model dit")
    case = make_case(args.model, args.weights, args.salt, args.size)
    feed = full_feed(args.feed, case, args.feed_dtype or args.dtype) if args.feed is not None else None
    capture = backend_capture(args.backend)
    model = capture.build(case, args.dtype)
    try:
        trace = capture_run(
            capture, case, args.dtype, model, feed, backward=args.backward, full_limit=args.full_limit
        )
    except CaptureFailed as failed:
        raise OspError(f"{args.model} on {args.backend}: {failed}") from failed
    trace.write(args.output)
    worst = [r.title for r in trace.records if r.stats["nan"] or r.stats["inf"]]
    run = f"{args.model}, {args.backend} {args.dtype}, {trace.header.mode}"
    print(f"{args.output}: {len(trace.records)} records of {run}")
    if worst:
        print(f"NaN or infinite values first in {worst[0]} ({len(worst)} records in all)", file=sys.stderr)
    return 0


def make_case(model: str, weights: Path | None, salt: str, size: list[int] | None) -> Case:
    """The case of a command line: a tiny model of its kind, or a checkpoint with small inputs.

    Raises:
        OspError: weights that cannot be read or are another model's.
    """
    place = tuple(size) if size else None
    if weights is None:
        return case_table.default_case(model, None, place, salt)
    from osp_shared.loading import Weights

    wanted = case_table.require(model).spec_class()
    found = Weights(weights, wanted)
    if type(found.spec) is not wanted:
        raise OspError(f"{weights}: weights of {found.spec.class_name()}, not of --model {model}")
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(found.spec).items()}
    case = case_table.default_case(model, config, place, salt)
    return case_table.with_changes(case, read=found.read, weights=str(found.checkpoint.fingerprint()))


def full_feed(folder: Path, case: Case, dtype: str) -> Trace:
    """A reference trace whose values can be fed: complete, of this case, rounded to the candidate's dtype."""
    feed = read_trace(folder)
    header = case.header(feed.header.backend, feed.header.dtype)
    for what in ("model", "weights", "inputs"):
        if getattr(feed.header, what) != getattr(header, what):
            raise OspError(f"{folder}: {what} {getattr(feed.header, what)}, this run has {getattr(header, what)}")
    if any(record.sampled for record in feed.records):
        raise OspError(f"{folder}: holds samples of large tensors; capture it again with a larger --full_limit")
    return rounded(feed, dtype)


def run_compare(args: argparse.Namespace) -> int:
    truth = read_trace(args.truth) if args.truth is not None else None
    comparison = compare(read_trace(args.candidate), read_trace(args.reference), truth)
    print(report_text.comparison_table(comparison, 0 if args.all else 20))
    print(report_text.comparison_summary(comparison))
    item = result(f"{comparison.candidate.header.model} {comparison.candidate.header.dtype}", comparison)
    write_reports([item], args)
    return 0 if comparison.passed else 1


def write_reports(results: list[Result], args: argparse.Namespace) -> None:
    """--html, --json and --junit; each file complete or not there."""
    header = results[0].judged.candidate.header if results else None
    about = {**header.versions, "salt": header.salt or "(none)"} if header else {}
    for path, text in (
        (args.html, lambda: report_html.html(results, "Parity report", about)),
        (args.json, lambda: json.dumps([report_text.result_dict(r) for r in results], indent=1) + "\n"),
        (args.junit, lambda: report_junit.junit(results)),
    ):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.partial")
            temporary.write_text(text(), encoding="utf-8")
            temporary.replace(path)
            print(f"wrote {path}")
