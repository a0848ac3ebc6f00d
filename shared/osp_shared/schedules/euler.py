"""Samplers that walk down the noise levels sigma of x = x0 + sigma e (Karras et al. 2022).

d = (x - x0) / sigma is the slope dx/dsigma, so a step to the level sigma' is x + d (sigma' - sigma). The ancestral ones
step further down, to sigma_down, and add fresh noise of sigma_up = sqrt(sigma'^2 - sigma_down^2) to come back up.
"""

from __future__ import annotations

import math

import numpy as np

from osp_shared.errors import OspError
from osp_shared.schedules.noise import NoiseSchedule
from osp_shared.schedules.predictions import data
from osp_shared.schedules.table import BASE, NOISE, HalfEuler, SamplerTable, Step, Weights, X, out

F32 = np.float32  # numpy 1 widens float32 ** 2 to float64: squares are products below


def euler(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray, spacing: str) -> SamplerTable:
    """EulerDiscrete and EulerAncestralDiscrete.

    Both draw noise at every step: plain Euler throws it away (its churn is 0), ancestral gives it weight 0 at the last.
    """
    ancestral = method == "EulerAncestralDiscrete"
    sigmas = levels(schedule, grid)
    steps = []
    for t, sigma, sigma_next in zip(grid, sigmas[:-1], sigmas[1:], strict=True):
        down, up = ancestral_split(sigma, sigma_next) if ancestral else (sigma_next, F32(0))
        weights = X + slope(prediction, X, out(), sigma) * (down - sigma) + float(up) * NOISE
        half = _half_euler(prediction, sigma, down, up if ancestral else None)
        steps.append(Step(float(t), weights, input_scale(sigma), draws=True, half=half))
    return _table(method, prediction, steps, sigmas, spacing)


def heun(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray, spacing: str) -> SamplerTable:
    """HeunDiscrete: an Euler step to the next level, then the same step again with the mean of both ends' slopes.

    Two calls a level but one for the last, whose end, sigma = 0, has no slope.
    """
    sigmas = levels(schedule, grid)
    steps = []
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        here = slope(prediction, X, out(), sigma)
        steps.append(Step(float(grid[i]), X + here * (sigma_next - sigma), input_scale(sigma), keeps=True))
        if sigma_next == 0:
            break
        start = slope(prediction, BASE, out(1), sigma)
        end = slope(prediction, X, out(), sigma_next)
        mean = BASE + (start + end) / 2 * (sigma_next - sigma)
        steps.append(Step(float(grid[i + 1]), mean, input_scale(sigma_next)))
    return _table(method, prediction, steps, sigmas, spacing)


def kdpm2_ancestral(
    method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray, spacing: str
) -> SamplerTable:
    """KDPM2AncestralDiscrete: the slope is taken at the geometric middle of sigma and sigma_down (DPM-Solver-2).

    The middle falls between training timesteps: its timestep is interpolated in log sigma. Noise is drawn at every
    call and used at the second of each pair.
    """
    sigmas = levels(schedule, grid)
    steps = []
    for t, sigma, sigma_next in zip(grid, sigmas[:-1], sigmas[1:], strict=True):
        down, up = ancestral_split(sigma, sigma_next)
        middle = math.sqrt(sigma * down)
        here = slope(prediction, X, out(), sigma)
        steps.append(Step(float(t), X + here * (middle - sigma), input_scale(sigma), draws=True, keeps=True))
        if sigma_next == 0:
            break
        weights = BASE + slope(prediction, X, out(), middle) * (down - sigma) + float(up) * NOISE
        t_middle = float(F32(timestep_of(schedule, middle)))
        steps.append(Step(t_middle, weights, input_scale(middle), draws=True))
    return _table(method, prediction, steps, sigmas, spacing)


def flow_match_euler(prediction: str, grid: np.ndarray) -> SamplerTable:
    """FlowMatchEulerDiscrete, shift 1: the model outputs the slope itself on the straight line from data to noise.

    Nothing of the diffusion options applies: prediction_type is recorded but has no say.
    """
    sigmas = np.append(grid / 1000, 0).astype(F32)
    rows = [
        Step(float(sigma * F32(1000)), X + float(sigma_next - sigma) * out(), round_weights=True)
        for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:], strict=True)
    ]
    return SamplerTable(
        "FlowMatchEulerDiscrete", prediction, tuple(rows), timestep_dtype="float32", sigmas=sigmas, flow=True
    )


# ------------------------------------------------------------------------------------------------------------- pieces


def levels(schedule: NoiseSchedule, grid: np.ndarray, last: float = 0.0) -> np.ndarray:
    """float32 noise levels at the grid's timesteps, then the level where the last step ends."""
    return np.append(schedule.sigmas[grid], last).astype(F32)


def ancestral_split(sigma: np.float32, sigma_next: np.float32) -> tuple[np.float32, np.float32]:
    """(sigma_down, sigma_up) in float32.

    The difference of near-equal squares loses digits of sigma_down; the original's digits are lost in this order.
    OspError where the next level is higher: the lifted sigma_999 of zero terminal SNR is below those of t = 996..998.
    """
    if sigma_next > sigma:
        raise OspError(
            f"too many num_sampling_steps for an ancestral sampler at zero terminal SNR: from noise level {sigma:.0f} "
            f"the second step would go up to {sigma_next:.0f}; 250 steps and fewer work"
        )
    high, low = sigma * sigma, sigma_next * sigma_next
    up = np.sqrt(low * (high - low) / high)
    return np.sqrt(np.maximum(low - up * up, F32(0))), up


def slope(prediction: str, x: Weights, output: Weights, sigma: float) -> Weights:
    """dx/dsigma at level sigma."""
    return (x - data(prediction, x, output, float(sigma))) / float(sigma)


def input_scale(sigma: float) -> float:
    """Brings x = x0 + sigma e to unit variance."""
    return 1 / math.sqrt(float(sigma) ** 2 + 1)


def timestep_of(schedule: NoiseSchedule, sigma: float) -> float:
    """Fractional timestep of a noise level, linear in log sigma between the table's entries."""
    return float(np.interp(math.log(sigma), np.log(schedule.sigmas.astype(np.float64)), np.arange(1000)))


def _half_euler(prediction: str, sigma: np.float32, down: np.float32, up: np.float32 | None) -> HalfEuler:
    power = sigma * sigma + F32(1)
    root = np.sqrt(power)
    out_scale, x_divisor = (-sigma, F32(1)) if prediction == "epsilon" else (-sigma / root, power)
    noise_scale = None if up is None else float(up)
    return HalfEuler(
        float(root),
        float(out_scale),
        float(x_divisor),
        float(sigma),
        float(down - sigma),
        noise_scale,
        round_out_scale=prediction == "epsilon",
    )


def _table(method: str, prediction: str, steps: list[Step], sigmas: np.ndarray, spacing: str) -> SamplerTable:
    """Initial noise has the highest level; a leading grid's x also carries the data's unit variance."""
    top = sigmas.max()
    init = top if spacing == "trailing" else np.sqrt(top * top + F32(1))
    return SamplerTable(method, prediction, tuple(steps), float(init), "float32", sigmas)
