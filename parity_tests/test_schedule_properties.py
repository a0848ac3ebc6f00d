"""What must hold of the samplers for any number of steps: exactness, variance, rounding points in half precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from osp_shared import schedules
from osp_shared.errors import OspError
from osp_shared.schedules.predictions import alpha_and_s
from sampling_support import Arrays

EULER = ("EulerDiscrete", "EulerAncestralDiscrete")


# --------------------------------------------------------------------------------- any number of steps: exactness

METHOD = st.sampled_from(schedules.METHODS)
PREDICTION = st.sampled_from(schedules.PREDICTION_TYPES)


# Step counts that a method refuses are passed over, however many hypothesis happens to draw.
PASS_OVER = [HealthCheck.filter_too_much]
STEPS = st.integers(1, 300) | st.sampled_from([n for n in range(1, 251) if 1000 % n == 0])


def try_build(method: str, steps: int, **options) -> schedules.SamplerTable:
    try:
        return schedules.build(method, steps, **options)
    except OspError:
        assume(False)
        raise


@settings(deadline=None, suppress_health_check=PASS_OVER, max_examples=150)
@given(METHOD, st.integers(1, 1000), PREDICTION, st.booleans(), st.booleans())
def test_weights_are_finite_and_grids_descend(method, steps, prediction, zero_snr, v1_5):
    options = dict(prediction_type=prediction, rescale_betas_zero_snr=zero_snr, v1_5_scheduler=v1_5)
    table = try_build(method, steps, **options)
    for step in table.steps:
        w = step.weights
        numbers = [step.timestep, step.input_scale, w.x, w.base, w.noise, *(v for _, v in w.outputs)]
        assert np.isfinite(numbers).all()
        assert 0 <= step.timestep <= 1000
        assert step.draws or not w.noise
    assert (np.diff(table.timesteps.astype(float)) <= 1e-4).all()
    calls = {"PNDM": steps + 9, "HeunDiscrete": 2 * steps - 1, "KDPM2AncestralDiscrete": 2 * steps - 1}
    assert len(table.steps) == calls.get(method, steps)
    draws = {"EulerDiscrete": steps, "EulerAncestralDiscrete": steps, "KDPM2AncestralDiscrete": 2 * steps - 1}
    if method == "DDPM":
        draws["DDPM"] = int((table.timesteps > 0).sum())
    assert table.noise_draws == draws.get(method, 0)
    assert len(str(table).splitlines()) == len(table.steps) + 1


def level_at(table: schedules.SamplerTable, k: int, zero_snr: bool) -> tuple[float, float]:
    """(alpha, s) of the sample x = alpha x0 + s e that the k-th call starts from, as the model sees it."""
    step = table.steps[k]
    if table.flow:
        sigma = float(table.sigmas[k])
        return 1 - sigma, sigma
    if step.input_scale != 1.0:
        return step.input_scale, math.sqrt(1 - step.input_scale**2)
    if table.sigmas is not None:
        return alpha_and_s(float(table.sigmas[k]))
    a = float(schedules.noise_schedule(table.method, zero_snr=zero_snr).alphas_cumprod[int(step.timestep)])
    return math.sqrt(a), math.sqrt(1 - a)


def perfect_output(table: schedules.SamplerTable, alpha: float, s: float) -> np.ndarray:
    """What a model that knows x0 and e would say, as coefficients (of x0, of e)."""
    x0, e = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    if table.flow:
        return e - x0
    return e if table.prediction_type == "epsilon" else alpha * e - s * x0


DETERMINISTIC = [m for m in schedules.METHODS if m not in ("EulerAncestralDiscrete", "DDPM", "KDPM2AncestralDiscrete")]


@settings(deadline=None, suppress_health_check=PASS_OVER, max_examples=120)
@given(st.sampled_from(DETERMINISTIC), STEPS, PREDICTION, st.booleans())
def test_a_perfect_model_keeps_the_sample_on_its_line(method, steps, prediction, zero_snr):
    """x = alpha x0 + s e with fixed x0 and e solves the diffusion ODE: every solver must follow it exactly, whatever
    its order, and those that end at no noise must end at x0. Samples are pairs of coefficients (of x0, of e)."""
    table = try_build(method, steps, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    # Where N does not divide 1000 the methods that count back from t end their steps beside the next grid point.
    assume(method not in ("DDIM", "CogVideoX", "PNDM") or 1000 % steps == 0)
    # PNDM's half steps meet the timestep that the model is called at if the stride is even; with v_prediction its
    # average of slopes is read at another timestep than they were made at, so only epsilon is exact.
    assume(method != "PNDM" or (prediction == "epsilon" and 1000 // steps % 2 == 0))
    alpha, s = level_at(table, 0, zero_snr)
    scale = table.steps[0].input_scale
    x, memory = np.array([alpha, s]) / scale, schedules.Memory()
    size = np.abs(x).max()
    for k, step in enumerate(table.steps):
        alpha, s = level_at(table, k, zero_snr)
        seen = x if table.flow else schedules.model_input(step, x)
        if method != "PNDM":  # its Runge-Kutta points are not visited in order
            # weights are float64; Heun's levels are sums of float32 differences
            np.testing.assert_allclose(seen, [alpha, s], atol=1e-9 * size * step.input_scale + 1e-9)
        x, memory = schedules.evaluate(table, k, x, perfect_output(table, alpha, s), memory)
    end = 1.0, 0.0
    if method == "DEISMultistep":
        end = alpha_and_s(float(table.sigmas[-1]))
    elif method == "PNDM":
        a = float(schedules.noise_schedule("PNDM").alphas_cumprod[0])
        end = math.sqrt(a), math.sqrt(1 - a)
    np.testing.assert_allclose(x, end, atol=1e-8)


@settings(deadline=None, suppress_health_check=PASS_OVER, max_examples=100)
@given(
    st.sampled_from(["EulerAncestralDiscrete", "DDPM", "DDIM", "EulerDiscrete"]),
    st.integers(1, 250),
    PREDICTION,
    st.booleans(),
)
def test_steps_keep_the_variance_of_the_noise(method, steps, prediction, zero_snr):
    """From x = alpha x0 + s e with a perfect model, what is left of e and the fresh noise make up the next level."""
    table = try_build(method, steps, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    a = schedules.noise_schedule(method, zero_snr=zero_snr).alphas_cumprod.astype(np.float64)
    for k, step in enumerate(table.steps):
        alpha, s = level_at(table, k, zero_snr)
        x = np.array([alpha, s]) / step.input_scale
        (data, left), _ = schedules.evaluate(
            table, k, x, perfect_output(table, alpha, s), schedules.Memory(), np.zeros(2)
        )
        noise = math.hypot(left, step.weights.noise)
        if table.sigmas is not None:
            expected = 1.0, float(table.sigmas[k + 1])
        else:
            end = int(step.timestep) - 1000 // steps
            after = a[end] if end >= 0 else 1.0
            expected = math.sqrt(after), math.sqrt(1 - after)
        # sigma_up and DDPM's beta are float32 differences
        assert data == pytest.approx(expected[0], abs=1e-4)
        assert noise == pytest.approx(expected[1], rel=1e-3, abs=1e-4)


@settings(deadline=None, suppress_health_check=PASS_OVER, max_examples=60)
@given(METHOD, st.integers(4, 60), st.booleans(), st.integers(0, 2**31))
def test_noise_and_velocity_predictions_agree(method, steps, zero_snr, seed):
    """The same model, read once as v and once as e = alpha v + s x, gives the same samples."""
    assume(method not in ("PNDM", "FlowMatchEulerDiscrete"))  # PNDM converts averaged slopes; flow has one reading
    tables = {
        p: try_build(method, steps, prediction_type=p, rescale_betas_zero_snr=zero_snr)
        for p in schedules.PREDICTION_TYPES
    }
    rng = np.random.default_rng(seed)
    outputs, noises = rng.standard_normal((2, 2 * steps, 5))
    start = rng.standard_normal(5) * tables["epsilon"].init_noise_sigma
    ends = {}
    for prediction, table in tables.items():
        x, memory = start, schedules.Memory()
        for k, step in enumerate(table.steps):
            alpha, s = level_at(table, k, zero_snr)
            v = outputs[k]
            output = v if prediction == "v_prediction" else alpha * v + s * schedules.model_input(step, x)
            x, memory = schedules.evaluate(table, k, x, output, memory, noises[k])
        ends[prediction] = x
    # dividing by alpha (1/4096 at zero SNR) costs digits in the epsilon form
    np.testing.assert_allclose(ends["epsilon"], ends["v_prediction"], rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ rounding points


def root(number):
    """Square root of a float32 scalar tensor, correctly rounded: torch's own is not on every machine."""
    return number.new_tensor(np.sqrt(number.numpy()))


def euler_in_half_precision(x, output, noise, sigma, sigma_next, prediction, ancestral, torch):
    """The original's operations on torch tensors, written out: the float32 numbers on the sides they stand on."""
    up = root(sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) if ancestral else torch.tensor(0.0)
    down = root(sigma_next**2 - up**2) if ancestral else sigma_next
    half, x = x.dtype, x.float()
    if prediction == "epsilon":
        x0 = x - sigma * output
    else:
        x0 = output * (-sigma / root(sigma**2 + 1)) + x / (sigma**2 + 1)
    x = x + (x - x0) / sigma * (down - sigma)
    return (x + noise * up if ancestral else x).to(half)


@pytest.mark.parametrize("library", ["numpy", "torch", "mindspore"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("prediction", schedules.PREDICTION_TYPES)
@pytest.mark.parametrize("method", EULER)
def test_euler_rounds_where_the_original_does(method, prediction, dtype, library):
    import torch

    table = schedules.build(method, 20, prediction_type=prediction)
    arrays, reference = Arrays(library, dtype), Arrays("torch", dtype)
    rng = np.random.default_rng(7)
    for k, step in enumerate(table.steps):
        sigma, sigma_next = (torch.tensor(float(s)) for s in table.sigmas[k : k + 2])
        x, output, noise = rng.standard_normal((3, 4000), dtype=np.float32)
        x *= np.float32(float(sigma))
        theirs = euler_in_half_precision(
            *map(reference.of, (x, output, noise)), sigma, sigma_next, prediction, method != "EulerDiscrete", torch
        )
        ours, _ = schedules.evaluate(table, k, *map(arrays.of, (x, output)), schedules.Memory(), arrays.of(noise))
        np.testing.assert_array_equal(arrays.numpy(ours), theirs.float().numpy())
        scaled = reference.of(x) / root(sigma**2 + 1)
        np.testing.assert_array_equal(arrays.numpy(schedules.model_input(step, arrays.of(x))), scaled.float().numpy())
