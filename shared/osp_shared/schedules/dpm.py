"""Exponential integrators: solvers in lambda = ln(alpha / s), half the log signal-to-noise ratio.

In lambda the diffusion ODE is linear but for the model, whose prediction is extrapolated over the step: as data
(DPM-Solver++, Lu et al. 2022) or as noise, polynomial in ln sigma (DEIS, Zhang and Chen 2023). The second-order forms
use the previous prediction as well; it belongs to the previous sample, hence the base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from osp_shared.schedules.euler import levels
from osp_shared.schedules.noise import NoiseSchedule
from osp_shared.schedules.predictions import alpha_and_s, data_and_noise
from osp_shared.schedules.table import BASE, SamplerTable, Step, Weights, X, out


@dataclass(frozen=True)
class Level:
    """A noise level in the three ways the solvers speak of it."""

    alpha: float
    s: float
    sigma: float

    @staticmethod
    def of(sigma: np.float32) -> Level:
        return Level(*alpha_and_s(float(sigma)), float(sigma))

    @property
    def log_snr(self) -> float:
        """lambda; infinite at sigma = 0."""
        return -math.log(self.sigma) if self.sigma else math.inf


def multistep(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray) -> SamplerTable:
    """DPMSolverMultistep: DPM-Solver++ 2M (midpoint). First order at the first step and at the last (to x0)."""
    sigmas = levels(schedule, grid)
    level = [Level.of(sigma) for sigma in sigmas]
    steps = []
    for i, t in enumerate(grid):
        here, end = level[i], level[i + 1]
        x0, _ = data_and_noise(prediction, X, out(), here.alpha, here.s)
        if i == 0 or i == len(grid) - 1:
            weights = _towards(X, here, end, x0)
        else:
            before = level[i - 1]
            x0_before, _ = data_and_noise(prediction, BASE, out(1), before.alpha, before.s)
            ratio = (here.log_snr - before.log_snr) / (end.log_snr - here.log_snr)
            weights = _towards(X, here, end, x0 + (x0 - x0_before) / (2 * ratio))
        steps.append(Step(float(t), weights, keeps=True))
    return SamplerTable(method, prediction, tuple(steps), sigmas=sigmas)


def singlestep(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray) -> SamplerTable:
    """DPMSolverSinglestep: pairs of calls, a first-order step and then a second-order step over both intervals.

    The second starts again from the first one's x. The last call, or the last two of an even number, are first order.
    """
    count = len(grid)
    sigmas = levels(schedule, grid)
    level = [Level.of(sigma) for sigma in sigmas]
    steps = []
    for i, t in enumerate(grid):
        here, end = level[i], level[i + 1]
        x0, _ = data_and_noise(prediction, X, out(), here.alpha, here.s)
        if i % 2 == 0 or i == count - 1:
            steps.append(Step(float(t), _towards(X, here, end, x0), keeps=True))
            continue
        start = level[i - 1]
        x0_start, _ = data_and_noise(prediction, BASE, out(1), start.alpha, start.s)
        ratio = (here.log_snr - start.log_snr) / (end.log_snr - start.log_snr)
        steps.append(Step(float(t), _towards(BASE, start, end, x0_start + (x0 - x0_start) / (2 * ratio))))
    return SamplerTable(method, prediction, tuple(steps), sigmas=sigmas)


def deis(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray) -> SamplerTable:
    """DEISMultistep, order 2, log-rho. The last step ends at the table's sigma_0, not at 0.

    First order at the first step, and at the last when there are fewer than 15.
    """
    sigmas = levels(schedule, grid, last=schedule.sigmas[0])
    level = [Level.of(sigma) for sigma in sigmas]
    steps = []
    for i, t in enumerate(grid):
        here, end = level[i], level[i + 1]
        _, e = data_and_noise(prediction, X, out(), here.alpha, here.s)
        if i == 0 or (i == len(grid) - 1 and len(grid) < 15):
            weights = end.alpha / here.alpha * X + end.alpha * (end.sigma - here.sigma) * e
        else:
            before = level[i - 1]
            _, e_before = data_and_noise(prediction, BASE, out(1), before.alpha, before.s)
            now, then = (
                _log_line(end.sigma, at, zero) - _log_line(here.sigma, at, zero)
                for at, zero in ((here.sigma, before.sigma), (before.sigma, here.sigma))
            )
            weights = end.alpha * (X / here.alpha + now * e + then * e_before)
        steps.append(Step(float(t), weights, keeps=True))
    return SamplerTable(method, prediction, tuple(steps), sigmas=sigmas)


def _towards(x: Weights, here: Level, end: Level, x0: Weights) -> Weights:
    """Exact step from `here` to `end` for a constant data prediction: (s'/s) x - alpha' (e^-h - 1) x0."""
    return end.s / here.s * x - end.alpha * math.expm1(here.log_snr - end.log_snr) * x0


def _log_line(t: float, one: float, zero: float) -> float:
    """Antiderivative at t of the line in ln t that is 1 at `one` and 0 at `zero`."""
    return t * (math.log(t) - math.log(zero) - 1) / (math.log(one) - math.log(zero))
