"""Samplers that work with a_t (alphas_cumprod) at t and at the end of the step, t - 1000 // N.

The end is counted from t, not read from the grid: where N does not divide 1000 the two differ, as in the original.
"""

from __future__ import annotations

import math

import numpy as np

from osp_shared.errors import OspError
from osp_shared.schedules.noise import TRAIN_STEPS, NoiseSchedule
from osp_shared.schedules.predictions import data_and_noise
from osp_shared.schedules.table import BASE, NOISE, SamplerTable, Step, Weights, X, out


def ddim(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray) -> SamplerTable:
    """DDIM (Song et al. 2021, eta 0): predict data and noise, mix them again at the lower level."""
    steps = []
    for t, a, a_next in _levels(schedule, grid):
        x0, e = data_and_noise(prediction, X, out(), *_roots(a, prediction))
        steps.append(Step(float(t), math.sqrt(a_next) * x0 + math.sqrt(1 - a_next) * e))
    return SamplerTable(method, prediction, tuple(steps))


def cogvideox(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray) -> SamplerTable:
    """CogVideoX: DDIM with the noise written as what is left of x without its data."""
    steps = []
    for t, a, a_next in _levels(schedule, grid):
        x0, _ = data_and_noise(prediction, X, out(), *_roots(a, prediction))
        keep = math.sqrt((1 - a_next) / (1 - a))
        steps.append(Step(float(t), keep * X + (math.sqrt(a_next) - math.sqrt(a) * keep) * x0))
    return SamplerTable(method, prediction, tuple(steps))


def ddpm(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray) -> SamplerTable:
    """DDPM (Ho et al. 2020): mean and (smaller) variance of the posterior q(x_next | x, x0).

    Noise is drawn unless t = 0; where the step ends at no noise its deviation is 1e-10.
    """
    steps = []
    for t, a, a_next in _levels(schedule, grid):
        x0, _ = data_and_noise(prediction, X, out(), *_roots(a, prediction))
        # in float32, as the original: for short steps the difference has few digits left
        ratio = np.float32(a) / np.float32(a_next)
        beta = float(np.float32(1) - ratio)
        mean = math.sqrt(a_next) * beta / (1 - a) * x0 + math.sqrt(ratio) * (1 - a_next) / (1 - a) * X
        deviation = math.sqrt(max((1 - a_next) / (1 - a) * beta, 1e-20))
        steps.append(Step(float(t), mean + deviation * NOISE if t > 0 else mean, draws=bool(t > 0)))
    return SamplerTable(method, prediction, tuple(steps))


def pndm(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray) -> SamplerTable:
    """PNDM (Liu et al. 2022): three rounds of Runge-Kutta (12 calls), then linear multistep. N + 9 calls.

    Slopes are the model's raw outputs; they are averaged first and read as noise afterwards, at the step's start.
    """
    stride = TRAIN_STEPS // len(grid)
    half = stride // 2
    a = schedule.alphas_cumprod.astype(np.float64)

    def transfer(x: Weights, output: Weights, t: int, t_next: int) -> Weights:
        """x at t to t_next with `output` as slope (their equation 9); past the end stands t = 0."""
        here, there = a[t], a[max(t_next, 0)]
        e = data_and_noise(prediction, x, output, math.sqrt(here), math.sqrt(1 - here))[1]
        denominator = here * math.sqrt(1 - there) + math.sqrt(here * (1 - here) * there)
        return math.sqrt(there / here) * x - (there - here) / denominator * e

    steps = []
    for start, middle, end in _runge_kutta_points(grid, half):
        # for odd strides the first half step ends one short of the middle, where the model is called next
        steps.append(Step(float(start), transfer(X, out(), start, start - half), keeps=True))
        steps.append(Step(float(middle), transfer(BASE, out(), start, middle)))
        steps.append(Step(float(middle), transfer(BASE, out(), start, middle - half)))
        mean = (out(3) + 2 * out(2) + 2 * out(1) + out()) / 6
        steps.append(Step(float(end), transfer(BASE, mean, start, end)))
    # Adams-Bashforth looks back at the first output of each Runge-Kutta round (calls 0, 4, 8), then at its own
    remembered = [0, 4, 8]
    for t in grid[3:]:
        k = len(steps)
        remembered = [*remembered[-3:], k]
        o = [out(k - call) for call in reversed(remembered)]
        mean = (55 * o[0] - 59 * o[1] + 37 * o[2] - 9 * o[3]) / 24
        steps.append(Step(float(t), transfer(X, mean, int(t), int(t) - stride)))
    return SamplerTable(method, prediction, tuple(steps))


def _runge_kutta_points(grid: np.ndarray, half: int) -> list[tuple[int, int, int]]:
    """(start, middle, end) of the three rounds; a round's middle lies half a stride above its end."""
    return [(int(grid[i]), int(grid[i + 1]) + half, int(grid[i + 1])) for i in range(3)]


def _levels(schedule: NoiseSchedule, grid: np.ndarray) -> list[tuple[int, float, float]]:
    """(t, a_t, a at the end of the step) of each step; past t = 0 nothing is left but data."""
    a = schedule.alphas_cumprod
    ends = grid - TRAIN_STEPS // len(grid)
    return [(int(t), float(a[t]), float(a[end]) if end >= 0 else 1.0) for t, end in zip(grid, ends, strict=True)]


def _roots(a: float, prediction: str) -> tuple[float, float]:
    if a == 0 and prediction == "epsilon":
        raise OspError(
            "prediction_type epsilon with rescale_betas_zero_snr: at t = 999 the sample holds no data to divide out; "
            "use v_prediction, or one of EulerDiscrete, EulerAncestralDiscrete, DPMSolverMultistep"
        )
    return math.sqrt(a), math.sqrt(1 - a)
