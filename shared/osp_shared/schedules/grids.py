"""Which of the 1000 training timesteps the model is called at, for N sampling steps.

Spacings of Lin et al. 2023, table 2. "trailing" starts at t = 999 and is what weights trained with zero terminal SNR
need; "leading" stops at t = 0 and never visits the noisiest timestep.
"""

from __future__ import annotations

import numpy as np

from osp_shared.errors import OspError
from osp_shared.schedules.noise import TRAIN_STEPS, check_method

# Solvers that leave the lowest noise level for the end point of their last step.
SHORT_OF_ZERO = frozenset({"DPMSolverMultistep", "DEISMultistep"})
FLOAT_TIMESTEPS = frozenset(
    {"EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "FlowMatchEulerDiscrete"}
)


def spacing_of(method: str, zero_snr: bool) -> str:
    """Spacing that a sample_method is built with: the flag decides, but two methods have their own grid."""
    if method == "DPMSolverSinglestep":
        return "linspace"
    if method == "FlowMatchEulerDiscrete":
        return "flow"
    return "trailing" if zero_snr else "leading"


def timestep_grid(method: str, steps: int, zero_snr: bool) -> np.ndarray:
    """Descending timesteps (N,), int64, or float64 for flow matching (1000 down to 1).

    Raises OspError for a step count that the method cannot take: not in 1..1000, fewer than PNDM's four Runge-Kutta
    points, so many that timesteps repeat, or one of 62 counts for which the floating-point trailing grid overshoots.
    """
    check_method(method)
    if not 1 <= steps <= TRAIN_STEPS:
        raise OspError(f"num_sampling_steps {steps}: must be in 1..{TRAIN_STEPS}")
    if method == "PNDM" and steps < 4:
        raise OspError(
            f"num_sampling_steps {steps}: PNDM starts with Runge-Kutta steps over 4 grid points, use 4 or more"
        )
    spacing = spacing_of(method, zero_snr)
    if spacing == "flow":
        return np.linspace(TRAIN_STEPS, 1, steps)
    if spacing == "linspace":
        grid = np.round(np.linspace(0, TRAIN_STEPS - 1, steps + 1))[:0:-1].astype(np.int64)
    elif spacing == "leading":
        first = 1 if method in SHORT_OF_ZERO else 0
        grid = np.arange(first, steps + first)[::-1] * (TRAIN_STEPS // (steps + first))
    else:
        # arange on floats, as the original: whether it overshoots depends on the rounding of 1000 / N
        grid = np.round(np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / steps)).astype(np.int64) - 1
        if len(grid) > steps:
            raise OspError(
                f"num_sampling_steps {steps}: the trailing timestep grid overshoots to {len(grid)} entries, the last "
                f"one {grid[-1]}; {_clean_neighbours(steps)} steps work"
            )
    if steps > 1 and np.diff(grid).max() >= 0:
        raise OspError(f"num_sampling_steps {steps}: timesteps of {method} would repeat, use fewer steps")
    return grid


def _clean_neighbours(steps: int) -> str:
    def clean(n: int) -> bool:
        return len(np.arange(TRAIN_STEPS, 0, -TRAIN_STEPS / n)) == n

    below = next(n for n in range(steps - 1, 0, -1) if clean(n))
    above = next(n for n in range(steps + 1, TRAIN_STEPS + 1) if clean(n))
    return f"{below} or {above}"
