"""Runs of the parity suite: the reference in float64 and in the candidate's dtype, the candidate, free and forced."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from osp_shared import fill
from osp_shared.errors import OspError
from osp_shared.traces import Blame, Result, Trace, compare, result
from osp_shared.traces.cases import WFVAE_GROUPS, WFVAE_TINY, Case, dit, sampler, t5, wfvae, wfvae_tiled, with_changes
from osp_shared.traces.tap import CaptureFailed, rounded
from osp_tools.trajectory import run_trajectory

TRUTH = "float64"
REPOSITORY = Path(__file__).resolve().parents[2]
EVERYTHING = 1 << 62  # elements kept of a tensor: all


def backend_capture(name: str):
    """The capture module of `torch` or `mindspore`; imports the framework."""
    try:
        return importlib.import_module(f"osp_{name}.capture")
    except ModuleNotFoundError as error:
        raise OspError(f"backend {name}: {error.name} is not installed; pip install -e '.[{name}]'") from None


@dataclass
class References:
    """Everything the reference says about a case: made once, whatever is then done to the candidate."""

    case: Case
    dtype: str
    only: set[str] | None
    truth: Trace
    yardstick: Trace
    feed: Trace
    truth_forced: Trace
    yardstick_forced: Trace


def capture_run(
    capture, case: Case, dtype: str, model, feed: Trace | None = None, only: set[str] | None = None,
    *, backward: bool = False, full_limit: int = EVERYTHING,
) -> Trace:  # fmt: skip
    """One run: of the model, or of the whole sampling loop around it. full_limit: largest tensor kept whole."""
    if case.model == "dit-sampler":
        return run_trajectory(capture, case, dtype, model, feed, full_limit)
    return capture.run_case(case, dtype, model=model, feed=feed, only=only, backward=backward, full_limit=full_limit)


def references(case: Case, dtype: str, only: set[str] | None = None) -> References:
    """Four runs of the reference: float64 and `dtype`, free and fed with the float64 values rounded to `dtype`."""
    reference = backend_capture("torch")
    model64, model = reference.build(case, TRUTH), reference.build(case, dtype)
    truth = capture_run(reference, case, TRUTH, model64, only=only)
    yardstick = capture_run(reference, case, dtype, model, only=only)
    feed = rounded(truth, dtype)
    forced = [
        capture_run(reference, case, name, m, feed, only)
        for name, m in ((TRUTH, model64), (dtype, model))
    ]
    return References(case, dtype, only, truth, yardstick, feed, *forced)


def judge(known: References, candidate: str = "mindspore", patch: Callable | None = None, name: str = "") -> Result:
    """Both runs of the candidate against the reference; `patch` is a context it is built and run in."""
    start = time.perf_counter()
    capture = backend_capture(candidate)
    case, dtype = known.case, known.dtype
    crashes = []

    def attempt(model, feed: Trace | None) -> Trace:
        try:
            return capture_run(capture, case, dtype, model, feed, known.only)
        except CaptureFailed as failed:
            crashes.append(failed)
            return failed.trace

    with patch() if patch is not None else nullcontext():
        model = capture.build(case, dtype)
        # Forced first: a shape error there lies in the part that made the shape, not in one that met it later.
        forced, free = attempt(model, known.feed), attempt(model, None)
    item = result(
        name or f"{case.name} {dtype}",
        compare(free, known.yardstick, known.truth),
        compare(forced, known.yardstick_forced, known.truth_forced),
        seconds=time.perf_counter() - start,
    )
    item.free_decides = case.model != "dit-sampler"  # along a trajectory errors may grow without a fault
    if crashes:
        item.crash = Blame(crashes[0].path, crashes[0].path or "(model)", f"raised {crashes[0]}")
    return item


def common_modules(case: Case, candidate: str) -> set[str] | None:
    """Module paths that both backends have, where one of them wraps a library's own tree."""
    if not case.place.common_only:
        return None
    trees = [backend_capture(name) for name in ("torch", candidate)]
    names = [{path for path, _ in tree.modules(tree.build(case, "float32"))} for tree in trees]
    return {path for path in names[0] & names[1] if path not in case.place.skip}


@dataclass(frozen=True)
class Run:
    """One line of the suite."""

    case: Case
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.case.name} {self.dtype}"

    def references(self, candidate: str):
        return references(self.case, self.dtype, common_modules(self.case, candidate))

    def judge(self, known, candidate: str, patch: Callable | None = None) -> Result:
        return judge(known, candidate, patch, self.name)


def quick_runs(salt: str = "") -> list[Run]:
    """The quick suite: every model with tiny widths and full topology, and the half types of an Ascend rehearsed."""
    plain = [
        wfvae("encode", salt=salt), wfvae("decode", salt=salt), wfvae("encode", WFVAE_GROUPS, salt=salt),
        wfvae("decode", WFVAE_GROUPS, salt=salt), wfvae_tiled(salt), dit(salt=salt), dit(inpaint=True, salt=salt),
        t5(salt=salt), sampler(salt=salt),
    ]  # fmt: skip
    halves = [(wfvae("decode", salt=salt), "bfloat16"), (dit(salt=salt), "bfloat16"), (dit(salt=salt), "float16")]
    return [Run(case) for case in plain] + [Run(case, dtype) for case, dtype in halves]


def extra_runs() -> list[Run]:
    """Inputs, weights and configs at the edges, where slips show that the quick runs cannot tell from the original."""
    two = wfvae("encode", size=(5, 16, 16))
    video = fill.input_tensor("two", (2, 3, 5, 16, 16))
    noise = fill.input_tensor("two", (2, 8, 2, 2, 2))
    padded = dit(size=(3, 6, 10), sparse_n=2)  # 45 tokens: pads in every sparse block
    odd, one = dit(), dit(size=(3, 6, 10))
    odd_mask, one_mask = odd.inputs["video_mask"].copy(), np.zeros_like(one.inputs["video_mask"])
    odd_mask[0, :, 1::2, ::2] = 0  # patches that are visible in part
    one_mask[:, 0, 0, 0] = 1  # a single visible token: elsewhere pads decide
    scaled = dit(num_layers=1, interpolation_scale_t=2.0, interpolation_scale_h=1.5, interpolation_scale_w=1.25)
    latents = {"scale": [0.5 + 0.1 * i for i in range(8)], "shift": [0.3 - 0.1 * i for i in range(8)]}
    shifted = wfvae("decode", {**WFVAE_TINY, **latents}, size=(5, 16, 16))
    far = dit(size=(60, 2, 4), num_layers=1, num_attention_heads=2, attention_head_dim=48, cross_attention_dim=96)
    return [
        Run(with_changes(two, name="wfvae-encode-batch2", inputs={"video": video, "noise": noise})),
        Run(with_changes(padded, name="dit-padded")),
        Run(with_changes(odd, name="dit-odd-mask", inputs={**odd.inputs, "video_mask": odd_mask})),
        Run(with_changes(one, name="dit-one-token", inputs={**one.inputs, "video_mask": one_mask})),
        Run(with_changes(far, name="dit-bf16"), "bfloat16"),
        Run(with_changes(scaled, name="dit-scaled")),
        Run(with_changes(shifted, name="wfvae-decode-shifted")),
        Run(wide_posterior()),
    ]


def wide_posterior() -> Case:
    """An encode whose log-variances reach beyond the clamp on both sides."""
    case = wfvae("encode", size=(5, 16, 16))
    plain, last = case.reader(), "encoder.conv_out.conv.bias"
    count = int(case.config["latent_dim"])
    moved = np.concatenate([np.zeros(count), np.linspace(-40, 30, count)]).astype(np.float32)
    return with_changes(
        case, name="wfvae-encode-wide", read=lambda name: plain(name) + moved if name == last else plain(name)
    )


def run_all(
    runs: Iterable[Run], candidate: str, patch: Callable | None = None, tell: Callable[[str], None] = lambda text: None
) -> list[Result]:
    results = []
    for run in runs:
        start = time.perf_counter()
        item = run.judge(run.references(candidate), candidate, patch)
        item.seconds = time.perf_counter() - start
        tell(f"{item.name}: {item.verdict} ({item.seconds:.1f} s)")
        results.append(item)
    return results
