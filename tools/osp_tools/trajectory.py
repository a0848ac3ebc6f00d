"""Traces of a whole sampling run: the loop of `osp sample` with every model call, step by step.

The loop is the root of the trace, the model its part `denoiser`, called once a step: a forced run then gives the loop
the reference's model outputs and the model the reference's inputs, so that each step and each module of each step shows
the error it makes itself. One run covers step x module; nothing is searched.
"""

from __future__ import annotations

import numpy as np

from osp_shared import sampling
from osp_shared.schedules import noise_schedule
from osp_shared.traces.cases import SHORT, Case
from osp_shared.traces.format import FULL_LIMIT, Recorder, Trace
from osp_shared.traces.tap import CaptureFailed, with_numpy

PART = "denoiser"


class TracedDenoiser:
    """`osp_shared.backend.Denoiser` over a model of any dtype; float64 runs with float32 latents."""

    def __init__(self, capture, case: Case, dtype: str, model):
        self.capture, self.model, self.run_dtype = capture, model, dtype
        self.spec = case.spec()
        self.dtype = SHORT[dtype] if dtype != "float64" else "fp32"

    def __call__(self, latents_BCTHW, timestep_B, text_B1LC, text_mask_B1L, video_mask_BTHW=None):
        floating = [latents_BCTHW, text_B1LC, np.asarray(text_mask_B1L, np.float32)]
        latents, text, mask = (self.capture.tensor(array, self.run_dtype) for array in floating)
        timestep = self.capture.tensor(np.asarray(timestep_B, np.float32), "float32")
        with self.capture.no_gradients():
            output = self.model(latents, timestep, text, None, mask)
        return np.asarray(self.capture.to_numpy(output))


def run_trajectory(
    capture, case: Case, dtype: str, model, feed: Trace | None = None, full_limit: int = FULL_LIMIT
) -> Trace:
    """Records of the loop, of every module at every step, and per step x_t, the guided model output and x0."""
    extra = {"mode": "forced", "reference": feed.fingerprint()} if feed is not None else {}
    backend = capture.__name__.split(".")[0].removeprefix("osp_")
    recorder = Recorder(case.header(backend, dtype, versions=capture.versions(), **extra), full_limit)
    request = sampling.SampleRequest(text_prompt=("",), **case.options)
    values = [case.inputs["text"][i : i + 1] for i in (1, 0)], [case.inputs["text_mask"][i : i + 1] for i in (1, 0)]
    text = sampling.TextEmbeddings(values[0][0], values[1][0], values[0][1], values[1][1])
    size = (request.num_frames - 1) // 4 + 1, request.height // 8, request.width // 8
    denoiser = TracedDenoiser(capture, case, dtype, model)
    steps: list[sampling.StepRecord] = []

    def loop() -> np.ndarray:
        return sampling.denoise(
            request, denoiser, text, size, sampling.PhiloxNoise(7), observer=steps.append
        )

    with capture.tapped(model, recorder, feed=feed, prefix=PART, arrays=with_numpy(capture.ARRAYS)) as tap:
        try:
            tap.around("", "SamplingLoop", loop)()
        except Exception as error:
            raise CaptureFailed(tap.failed_in or "", error, recorder.trace()) from error
    _add_steps(recorder, request, steps)
    return recorder.trace()


def _add_steps(recorder: Recorder, request: sampling.SampleRequest, steps: list[sampling.StepRecord]) -> None:
    """x_t after the step, the output it used, and the estimate of clean latents that both imply."""
    method = request.sample_method
    kept = None if method == "FlowMatchEulerDiscrete" else noise_schedule(
        method, zero_snr=request.rescale_betas_zero_snr, v1_5_scheduler=request.v1_5_scheduler)  # fmt: skip
    for record in steps:
        count = len(record.output)
        recorder.add("", "x_t", record.latents.astype(np.float32), step=record.k)
        recorder.add("", "model_output", record.output.astype(np.float32), step=record.k)
        if kept is None:
            continue
        left = float(kept.alphas_cumprod[min(999, round(float(record.timestep[0])))])
        alpha, s = left**0.5, (1 - left) ** 0.5
        x = record.model_input[:count, : record.output.shape[1]].astype(np.float64)
        output = record.output.astype(np.float64)
        velocity = request.prediction_type == "v_prediction"
        x0 = alpha * x - s * output if velocity else (x - s * output) / max(alpha, 1e-6)
        recorder.add("", "x0", x0.astype(np.float32), step=record.k)
