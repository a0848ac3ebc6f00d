"""How much noise is left at each of the 1000 training timesteps.

beta_t is the noise added at step t; alphas_cumprod_t (written a_t here, "alpha bar" in Ho et al. 2020) is what is left
of the signal's power, so that x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e; sigma_t = sqrt((1 - a_t) / a_t) is the same fact
as a noise-to-signal ratio (Karras et al. 2022).

The tables are float32 because the ones the model was trained with are: near t = 0 sigma moves by 8e-5 (relative) when
1 - a_t is taken in float64 instead. CogVideoX alone keeps float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from osp_shared.errors import OspError

TRAIN_STEPS = 1000

METHODS = (
    "DDIM",
    "EulerDiscrete",
    "DDPM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "PNDM",
    "HeunDiscrete",
    "EulerAncestralDiscrete",
    "DEISMultistep",
    "KDPM2AncestralDiscrete",
    "CogVideoX",
    "FlowMatchEulerDiscrete",
)

# Only these rescale their betas to zero terminal SNR when asked; for the others the flag changes the spacing alone.
RESCALING = frozenset({"DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "CogVideoX"})
# These divide by sqrt(a_999), or take its logarithm, and lift the zero to the smallest float16 instead.
LIFTING = frozenset({"EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep"})
SMALLEST_A = np.float32(2.0**-24)

BETAS = (1e-4, 0.02)
BETAS_STABLE_DIFFUSION = (0.00085, 0.012)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """betas and alphas_cumprod, each (1000,), float32 (float64 for CogVideoX)."""

    betas: np.ndarray
    alphas_cumprod: np.ndarray

    @property
    def sigmas(self) -> np.ndarray:
        """Noise-to-signal ratio (1000,) in the tables' own type."""
        a = self.alphas_cumprod
        return np.sqrt((1 - a) / a)


def check_method(method: str) -> None:
    """OspError unless `method` is one of the twelve."""
    if method not in METHODS:
        raise OspError(f"unknown sample_method {method!r}: must be one of {', '.join(METHODS)}")


@lru_cache
def noise_schedule(method: str, *, zero_snr: bool = False, v1_5_scheduler: bool = False) -> NoiseSchedule:
    """Tables of a sample_method (FlowMatchEulerDiscrete has none: its noise level is its time).

    v1_5_scheduler: the "scaled linear" betas of Open-Sora Plan 1.5 instead of the method's own.
    """
    check_method(method)
    if method == "FlowMatchEulerDiscrete":
        raise OspError("FlowMatchEulerDiscrete has no noise schedule: its noise level is timestep / 1000")
    if method == "CogVideoX":
        return _cogvideox(zero_snr)
    if v1_5_scheduler:
        betas = _linspace(*(b**0.5 for b in BETAS_STABLE_DIFFUSION)) ** 2
    else:
        betas = _linspace(*(BETAS_STABLE_DIFFUSION if method in ("HeunDiscrete", "KDPM2AncestralDiscrete") else BETAS))
    if zero_snr and method in RESCALING:
        betas = _betas_with_zero_terminal_snr(betas)
    alphas_cumprod = _cumprod(1 - betas)
    if zero_snr and method in LIFTING:
        alphas_cumprod[-1] = SMALLEST_A
    return _frozen(betas, alphas_cumprod)


def _cogvideox(zero_snr: bool) -> NoiseSchedule:
    """Scaled linear betas, signal-to-noise ratio divided by 3; the rescale acts on a_t itself (CogVideoX, 2024)."""
    betas = _linspace(*(b**0.5 for b in BETAS_STABLE_DIFFUSION), real=np.float64) ** 2
    a = np.cumprod(1 - betas)
    a = a / (3 - 2 * a)
    if zero_snr:
        a = _shifted_to_zero(np.sqrt(a)) ** 2
    return _frozen(betas, a)


def _frozen(betas: np.ndarray, alphas_cumprod: np.ndarray) -> NoiseSchedule:
    betas.flags.writeable = alphas_cumprod.flags.writeable = False  # one table serves every sampler built from it
    return NoiseSchedule(betas, alphas_cumprod)


def _linspace(start: float, end: float, real: type = np.float32) -> np.ndarray:
    """1000 points as torch.linspace makes them: from both ends towards the middle, one rounding a point."""
    first, last = float(real(start)), float(real(end))
    step = float(real((real(end) - real(start)) / real(TRAIN_STEPS - 1)))
    i = np.arange(TRAIN_STEPS)
    return np.where(i < TRAIN_STEPS // 2, first + step * i, last - step * (TRAIN_STEPS - 1 - i)).astype(real)


def _cumprod(x: np.ndarray) -> np.ndarray:
    """Running product, accumulated in double and stored in float32, as torch.cumprod does on CPU."""
    return np.cumprod(x, dtype=np.float64).astype(np.float32)


def _shifted_to_zero(root: np.ndarray) -> np.ndarray:
    """sqrt(a_t), shifted so that the last is 0 and scaled so that the first stays (Lin et al. 2023, algorithm 1)."""
    return (root - root[-1]) * (root[0] / (root[0] - root[-1]))


def _betas_with_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    a = _shifted_to_zero(np.sqrt(_cumprod(1 - betas))) ** 2
    return 1 - np.concatenate([a[:1], a[1:] / a[:-1]])


# ------------------------------------------------------------------------------------------------------ for training


def add_noise(schedule: NoiseSchedule, x0: np.ndarray, noise: np.ndarray, timesteps_B: np.ndarray) -> np.ndarray:
    """Noisy samples sqrt(a_t) x0 + sqrt(1 - a_t) noise; x0 and noise (B, ...), one integer timestep a sample."""
    signal, spread = _signal_and_spread(schedule, timesteps_B, x0.ndim)
    return signal * x0 + spread * noise


def velocity(schedule: NoiseSchedule, x0: np.ndarray, noise: np.ndarray, timesteps_B: np.ndarray) -> np.ndarray:
    """Target of v-prediction, sqrt(a_t) noise - sqrt(1 - a_t) x0 (Salimans and Ho 2022)."""
    signal, spread = _signal_and_spread(schedule, timesteps_B, x0.ndim)
    return signal * noise - spread * x0


def _signal_and_spread(schedule: NoiseSchedule, timesteps_B, ndim: int) -> tuple[np.ndarray, np.ndarray]:
    t = np.asarray(timesteps_B)
    if t.dtype.kind not in "iu" or t.min() < 0 or t.max() >= TRAIN_STEPS:
        raise OspError(f"timesteps must be integers in 0..{TRAIN_STEPS - 1}, got {t.dtype} {t.min()}..{t.max()}")
    a = schedule.alphas_cumprod[t].reshape(-1, *[1] * (ndim - 1))
    return np.sqrt(a), np.sqrt(1 - a)
