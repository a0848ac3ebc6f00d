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

# A float32 scalar mixed with a Python number, or squared by **, widens under numpy 1 and not under 2: never done here.
F32 = np.float32


def euler(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray, spacing: str) -> SamplerTable:
    """EulerDiscrete and EulerAncestralDiscrete.

    Both draw noise at every step: plain Euler throws it away (its churn is 0), ancestral gives it weight 0 at the last.
    """
    ancestral = method == "EulerAncestralDiscrete"
    sigmas = levels(schedule, grid)
    steps = []
    for t, (sigma, sigma_next) in zip(grid, intervals(sigmas), strict=True):
        down, up = ancestral_split(sigma, sigma_next) if ancestral else (sigma_next, 0.0)
        weights = X + slope(prediction, X, out(), sigma) * (down - sigma) + up * NOISE
        half = _half_euler(prediction, sigma, down, up if ancestral else None)
        steps.append(Step(float(t), weights, input_scale(sigma), draws=True, half=half))
    return _table(method, prediction, steps, sigmas, spacing)


def heun(method: str, prediction: str, schedule: NoiseSchedule, grid: np.ndarray, spacing: str) -> SamplerTable:
    """HeunDiscrete: an Euler step to the next level, then the same step again with the mean of both ends' slopes.

    Two calls a level but one for the last, whose end, sigma = 0, has no slope.
    """
    sigmas = levels(schedule, grid)
    steps = []
    for i, (sigma, sigma_next) in enumerate(intervals(sigmas)):
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
    for t, (sigma, sigma_next) in zip(grid, intervals(sigmas), strict=True):
        down, up = ancestral_split(sigma, sigma_next)
        middle = math.sqrt(sigma * down)
        here = slope(prediction, X, out(), sigma)
        steps.append(Step(float(t), X + here * (middle - sigma), input_scale(sigma), draws=True, keeps=True))
        if sigma_next == 0:
            break
        weights = BASE + slope(prediction, X, out(), middle) * (down - sigma) + up * NOISE
        t_middle = float(F32(timestep_of(schedule, middle)))
        steps.append(Step(t_middle, weights, input_scale(middle), draws=True))
    return _table(method, prediction, steps, sigmas, spacing)


def flow_match_euler(prediction: str, grid: np.ndarray) -> SamplerTable:
    """FlowMatchEulerDiscrete, shift 1: the model outputs the slope itself on the straight line from data to noise.

    Nothing of the diffusion options applies: prediction_type is recorded but has no say.
    """
    sigmas = np.append(grid / 1000, 0).astype(F32)
    rows = [
        Step(float(F32(sigma * 1000)), X + (sigma_next - sigma) * out(), round_weights=True)
        for sigma, sigma_next in intervals(sigmas)
    ]
    return SamplerTable(
        "FlowMatchEulerDiscrete", prediction, tuple(rows), timestep_dtype="float32", sigmas=sigmas, flow=True
    )


# ------------------------------------------------------------------------------------------------------------- pieces


def levels(schedule: NoiseSchedule, grid: np.ndarray, last: float = 0.0) -> np.ndarray:
    """float32 noise levels at the grid's timesteps, then the level where the last step ends."""
    return np.append(schedule.sigmas[grid], last).astype(F32)


def intervals(sigmas: np.ndarray) -> list[tuple[float, float]]:
    """(level, next level) of each step, widened so that differences are exact."""
    wide = sigmas.tolist()
    return list(zip(wide[:-1], wide[1:], strict=True))


def ancestral_split(sigma: float, sigma_next: float) -> tuple[float, float]:
    """(sigma_down, sigma_up), computed in float32.

    The difference of near-equal squares loses digits of sigma_down; the original's digits are lost in this order.
    OspError where the next level is higher: the lifted sigma_999 of zero terminal SNR is below those of t = 996..998.
    """
    if sigma_next > sigma:
        raise OspError(
            f"too many num_sampling_steps for an ancestral sampler at zero terminal SNR: from noise level {sigma:.0f} "
            f"the second step would go up to {sigma_next:.0f}; 250 steps and fewer work"
        )
    high, low = F32(sigma) * F32(sigma), F32(sigma_next) * F32(sigma_next)
    up = np.sqrt(low * (high - low) / high)
    return float(np.sqrt(np.maximum(low - up * up, F32(0)))), float(up)


def slope(prediction: str, x: Weights, output: Weights, sigma: float) -> Weights:
    """dx/dsigma at level sigma."""
    return (x - data(prediction, x, output, sigma)) / sigma


def input_scale(sigma: float) -> float:
    """Brings x = x0 + sigma e to unit variance."""
    return 1 / math.sqrt(sigma**2 + 1)


def timestep_of(schedule: NoiseSchedule, sigma: float) -> float:
    """Fractional timestep of a noise level, linear in log sigma between the table's entries."""
    return float(np.interp(math.log(sigma), np.log(schedule.sigmas.astype(np.float64)), np.arange(1000)))


def _half_euler(prediction: str, sigma: float, down: float, up: float | None) -> HalfEuler:
    """The step's numbers rounded to float32 one operation after the other, as the original's are."""
    level = F32(sigma)
    power = level * level + F32(1)
    root = np.sqrt(power)
    out_scale, x_divisor = (-level, F32(1)) if prediction == "epsilon" else (-level / root, power)
    return HalfEuler(
        input_divisor=float(root),
        out_scale=float(out_scale),
        x_divisor=float(x_divisor),
        sigma=sigma,
        dt=float(F32(down) - level),
        noise_scale=up,
        round_out_scale=prediction == "epsilon",
    )


def _table(method: str, prediction: str, steps: list[Step], sigmas: np.ndarray, spacing: str) -> SamplerTable:
    """Initial noise has the highest level; a leading grid's x also carries the data's unit variance."""
    top = sigmas.max()
    init = top if spacing == "trailing" else np.sqrt(top * top + F32(1))
    return SamplerTable(method, prediction, tuple(steps), float(init), "float32", sigmas)
