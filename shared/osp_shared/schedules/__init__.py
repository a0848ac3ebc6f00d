"""Samplers as tables, and the noise schedules behind them.

    table = schedules.build("EulerAncestralDiscrete", 100, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    x, memory = schedules.initial_latents(table, noise(0)), schedules.Memory()
    for k, step in enumerate(table.steps):
        output = model(schedules.model_input(step, x), step.timestep)
        x, memory = schedules.evaluate(table, k, x, output, memory, noise(k + 1) if step.draws else None)

Files: noise.py (the 1000 training noise levels), grids.py (which of them are visited), table.py (what a row is and how
it is applied), predictions.py (noise or velocity to data), and the samplers: euler.py, diffusion.py, dpm.py.
"""

from __future__ import annotations

from functools import lru_cache

from osp_shared.schedules import diffusion, dpm, euler
from osp_shared.schedules.grids import spacing_of, timestep_grid
from osp_shared.schedules.noise import METHODS, NoiseSchedule, add_noise, noise_schedule, velocity
from osp_shared.schedules.predictions import PREDICTION_TYPES, check_prediction
from osp_shared.schedules.table import (
    Memory,
    SamplerTable,
    Step,
    Weights,
    evaluate,
    initial_latents,
    model_input,
)

__all__ = [
    "METHODS",
    "PREDICTION_TYPES",
    "Memory",
    "NoiseSchedule",
    "SamplerTable",
    "Step",
    "Weights",
    "add_noise",
    "build",
    "evaluate",
    "initial_latents",
    "model_input",
    "noise_schedule",
    "timestep_grid",
    "velocity",
]

_BY_SIGMA = {
    "EulerDiscrete": euler.euler,
    "EulerAncestralDiscrete": euler.euler,
    "HeunDiscrete": euler.heun,
    "KDPM2AncestralDiscrete": euler.kdpm2_ancestral,
}
_BY_GRID = {
    "DDIM": diffusion.ddim,
    "DDPM": diffusion.ddpm,
    "CogVideoX": diffusion.cogvideox,
    "PNDM": diffusion.pndm,
    "DPMSolverMultistep": dpm.multistep,
    "DPMSolverSinglestep": dpm.singlestep,
    "DEISMultistep": dpm.deis,
}


@lru_cache(maxsize=32)
def build(
    method: str,
    steps: int,
    *,
    prediction_type: str = "epsilon",
    rescale_betas_zero_snr: bool = False,
    v1_5_scheduler: bool = False,
) -> SamplerTable:
    """The table of a sample_method for `steps` sampling steps.

    rescale_betas_zero_snr selects the trailing timesteps, and zero terminal SNR where the method knows it (not PNDM,
    DEIS, DPMSolverSinglestep, Heun, KDPM2). The released weights need it together with v_prediction.
    Raises OspError for an unknown method or prediction, a step count the method cannot take (see `timestep_grid`), and
    epsilon prediction at zero SNR where the method would divide by it.
    """
    grid = timestep_grid(method, steps, rescale_betas_zero_snr)
    check_prediction(prediction_type)
    if method == "FlowMatchEulerDiscrete":
        return euler.flow_match_euler(prediction_type, grid)
    schedule = noise_schedule(method, zero_snr=rescale_betas_zero_snr, v1_5_scheduler=v1_5_scheduler)
    if method in _BY_SIGMA:
        return _BY_SIGMA[method](method, prediction_type, schedule, grid, spacing_of(method, rescale_betas_zero_snr))
    return _BY_GRID[method](method, prediction_type, schedule, grid)
