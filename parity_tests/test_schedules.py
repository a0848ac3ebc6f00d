"""Noise tables, timestep grids and the twelve samplers: against the golden numbers, and by what must hold for any N."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import golden_files
from osp_shared import schedules
from osp_shared.errors import OspError
from osp_shared.schedules.grids import spacing_of
from osp_shared.schedules.predictions import alpha_and_s
from sampling_support import HALF_UNIT, UNIT, Arrays, largest, norm, samples, tagged

EULER = ("EulerDiscrete", "EulerAncestralDiscrete")


def label(item: dict) -> str:
    flags = [k for k in ("zero_snr", "v1_5_scheduler") if item.get(k)]
    words = [item.get("method", item["kind"]), item.get("prediction_type", "")[:3], item.get("steps", ""), *flags]
    return "-".join(str(w) for w in [*words, item.get("dtype", "")] if w != "")


def build(item: dict) -> schedules.SamplerTable:
    return schedules.build(
        item["method"],
        item["steps"],
        prediction_type=item.get("prediction_type", "v_prediction"),
        rescale_betas_zero_snr=item["zero_snr"],
        v1_5_scheduler=item.get("v1_5_scheduler", False),
    )


# ------------------------------------------------------------------------------------------------ golden: the tables


@pytest.mark.parametrize("golden, item", golden_files.items("scheduler", "tables", label))
def test_noise_tables(golden, item):
    table = schedules.noise_schedule(item["method"], zero_snr=item["zero_snr"], v1_5_scheduler=item["v1_5_scheduler"])
    assert table.betas.dtype == table.alphas_cumprod.dtype == item["dtype"]
    # float32 tables: betas are exact; rescaled products move in their last bits with the machine's square root
    tolerance = 16 * UNIT if item["zero_snr"] else 5e-9
    np.testing.assert_allclose(table.betas[item["index"]], item["betas"], rtol=tolerance)
    np.testing.assert_allclose(table.alphas_cumprod[item["index"]], item["alphas_cumprod"], rtol=tolerance)


def check_list(item: dict, name: str, values: np.ndarray, atol: float, rtol: float) -> None:
    """A golden list: whole, or its first and last six and its sum."""
    if name in item:
        np.testing.assert_allclose(values, item[name], rtol=rtol, atol=atol)
    elif f"{name}_head_tail" in item:
        head, tail = item[f"{name}_head_tail"]
        np.testing.assert_allclose(values[: len(head)], head, rtol=rtol, atol=atol)
        np.testing.assert_allclose(values[-len(tail) :], tail, rtol=rtol, atol=atol)
        # 5e-8: sums of sigmas are printed with eight digits
        np.testing.assert_allclose(values.sum(dtype=np.float64), item[f"{name}_sum"], rtol=rtol + 5e-8, atol=atol)


def per_call(method: str, sigmas: np.ndarray) -> np.ndarray:
    """Grid levels laid out as the library stores them for its samplers with two calls a level."""
    if method == "HeunDiscrete":
        return np.concatenate([sigmas[:1], np.repeat(sigmas[1:-1], 2), sigmas[-1:]])
    if method == "KDPM2AncestralDiscrete":
        return np.concatenate([sigmas[:1], np.repeat(sigmas[1:], 2), sigmas[-1:]])
    return sigmas


@pytest.mark.parametrize("golden, item", golden_files.items("scheduler", "timesteps", label))
def test_timesteps(golden, item):
    if item["kind"] == "trailing_overshoot":
        assert overshooting() == item["N"]
        return
    table = build(item)
    assert len(table.steps) == item["n"]
    assert table.timesteps.dtype == item["timesteps_dtype"]
    # Timesteps between the grid's come from float32 logarithms of up to 5, each good to 2e-7; the table's log sigma
    # rises by at least 0.005 a timestep: 1e-4. Flow matching: float32 of up to 1000.
    between = 1e-4 if item["method"] == "KDPM2AncestralDiscrete" else 0.0
    check_list(item, "timesteps", table.timesteps, between, 2 * UNIT)
    if "sigmas" in item or "sigmas_head_tail" in item:
        # twice the last-bit scatter of the rescaled products, printed with eight digits
        check_list(item, "sigmas", per_call(item["method"], table.sigmas), 0.0, 16 * UNIT)
    if item["init_noise_sigma"] is None:
        assert table.flow
    else:
        assert table.init_noise_sigma == pytest.approx(item["init_noise_sigma"], rel=16 * UNIT)


def overshooting() -> list[int]:
    counts = []
    for steps in range(1, 1001):
        try:
            schedules.timestep_grid("DDIM", steps, zero_snr=True)
        except OspError as error:
            assert "overshoots" in str(error)
            counts.append(steps)
    return counts


# ------------------------------------------------------------------------------------------------ golden: the samplers


def run_trajectory(golden: dict, item: dict, arrays: Arrays) -> tuple[schedules.SamplerTable, list[tuple]]:
    """The golden's fake model sampled with the table: [(timestep, model input, x before, x after)] in float32 numpy."""
    table, tag, shape = build(item), item["tag"], item["shape"]
    x = schedules.initial_latents(table, arrays.of(tagged(f"{tag}_init", shape, golden)))
    memory, draws, calls = schedules.Memory(), 0, []
    for k, step in enumerate(table.steps):
        seen = arrays.numpy(schedules.model_input(step, x))
        output = np.float32(0.5) * tagged(f"{tag}_out_{k}", shape, golden) + np.float32(0.3) * seen
        noise = None
        if step.draws:
            noise = arrays.of(tagged(f"{tag}_noise_{draws}", shape, golden))
            draws += 1
        before = x
        x, memory = schedules.evaluate(table, k, x, arrays.of(output), memory, noise)
        calls.append((step.timestep, seen, arrays.numpy(before), arrays.numpy(x)))
    assert draws == item["noise_calls"] == table.noise_draws
    return table, calls


def recorded_calls(item: dict, calls: list[tuple]) -> list[tuple[tuple, list]]:
    """Pairs of (call, golden record): long runs record some of their calls only."""
    if len(item["records"]) == len(calls):
        return list(zip(calls, item["records"], strict=True))
    by_timestep = {call[0]: call for call in calls}
    assert len(by_timestep) == len(calls)
    return [(by_timestep[record[0]], record) for record in item["records"]]


def bounds(table: schedules.SamplerTable, calls: list[tuple], unit: float, scatter: float) -> list[float]:
    """How far the original's samples may lie from ours after each call, absolute.

    `scatter` of the largest value, for its ordinary rounding; `unit` is the round-off of its type. Some of the
    originals lose more digits than that, where the table does not, because they subtract large numbers:
    - x + (x - x0) / sigma * (sigma' - sigma) takes numbers of the size of x (4096 at first) to leave sigma' / sigma of
      them: a few units of x's last place. Euler's are carried on by what the step and the fake model keep of x.
    - DEIS takes x / alpha apart and together again at the next alpha. Its weights are differences of terms
      ln(rho) / (ln rho - ln rho'): with N steps over ten units of ln rho each loses a factor N / 10, N times.
    """
    carried, before_that, result = 0.0, 0.0, []
    size = max(largest(after) for *_, after in calls)
    for k, (step, (_, _, before, after)) in enumerate(zip(table.steps, calls, strict=True)):
        bound = scatter * largest(after)
        if table.method in EULER:
            kept = abs(step.weights.x + 0.3 * step.input_scale * dict(step.weights.outputs)[0])
            carried = kept * carried + 4 * unit * largest(before)
            bound += carried
        elif table.method in ("HeunDiscrete", "KDPM2AncestralDiscrete"):
            bound += 4 * unit * max(largest(before), before_that)
        elif table.method == "DEISMultistep":
            alphas = [alpha_and_s(float(sigma))[0] for sigma in table.sigmas[k : k + 2]]
            bound += 4 * unit * alphas[1] / alphas[0] * largest(before) + UNIT * len(table.steps) ** 2 / 10 * size
        before_that = largest(before)
        result.append(bound)
    return result


@pytest.mark.parametrize("library", ["numpy", "torch", "mindspore"])
@pytest.mark.parametrize("golden, item", golden_files.items("scheduler", "trajectories", label))
def test_trajectories(golden, item, library):
    table, calls = run_trajectory(golden, item, Arrays(library, item["dtype"]))
    if item["init_noise_sigma"] is not None:
        assert table.init_noise_sigma == pytest.approx(item["init_noise_sigma"], rel=16 * UNIT)
    if item["dtype"] == "float32":
        # 5e-6: the scatter of a float32 reimplementation of these formulas over ten to a hundred steps
        allowed = bounds(table, calls, UNIT, 5e-6)
    elif table.method in EULER or table.flow:
        check_rounding_points(item, calls)
        return
    else:
        # The original rounds every product and sum of these samplers to the half type, the table only the sample.
        # Against the library the two stayed within 12 round-offs of each other over 50 steps.
        unit = HALF_UNIT[item["dtype"]]
        allowed = bounds(table, calls, unit, 16 * unit)
    allowed = {id(call): bound for call, bound in zip(calls, allowed, strict=True)}
    for call, (t, l2_input, l2, values) in recorded_calls(item, calls):
        timestep, seen, before, after = call
        assert abs(timestep - t) <= 1e-4
        bound = allowed[id(call)]
        assert np.abs(samples(after)[:4] - values).max() <= bound, f"t={t}: {samples(after)[:4]}, golden {values}"
        # errors as large as the bound in every element, added as they would be if independent
        assert abs(norm(after) - l2) <= bound * math.sqrt(after.size)
        assert norm(seen) == pytest.approx(l2_input, rel=max(5e-6, bound / largest(after)))
    assert np.abs(samples(calls[-1][3]) - item["final"][5]).max() <= allowed[id(calls[-1])]


def check_rounding_points(item: dict, calls: list[tuple]) -> None:
    """Half precision, bit for bit: the samples as printed and the l2 norms to nine digits.

    At zero terminal SNR the original's noise table itself moves in its last bits with the machine's square root. There
    one value in ten may fall on the other side of a rounding; it is then one unit in its own last place away.
    """
    pairs = [
        (samples(after)[:4], l2, values, norm(after)) for (*_, after), (_, _, l2, values) in recorded_calls(item, calls)
    ]
    ours = np.concatenate([p[0] for p in pairs] + [samples(calls[-1][3])])
    theirs = np.concatenate([p[2] for p in pairs] + [item["final"][5]])
    differs = np.abs(ours - theirs) > 5e-9 * np.abs(theirs)
    if not item["zero_snr"]:
        assert not differs.any()
    assert differs.mean() <= 0.1
    assert (np.abs(ours - theirs) <= 2 * HALF_UNIT[item["dtype"]] * np.abs(theirs) * 1.001).all()
    for _, l2, _, our_l2 in pairs:
        assert our_l2 == pytest.approx(l2, rel=5e-9 if not differs.any() and not item["zero_snr"] else 2e-5)


def test_half_trajectories_are_exact_here():
    """The files in this repository were made with the same tables: nothing may differ, not even in the l2 norms."""
    checked = 0
    for path in golden_files.files("scheduler", "trajectories"):
        if path.name != "scheduler_golden.json":
            continue
        for item in golden_files.load(path)["trajectories"]:
            if item["dtype"] == "float32":
                continue
            _, calls = run_trajectory(golden_files.load(path), item, Arrays("numpy", item["dtype"]))
            for (*_, after), (_, _, l2, _) in recorded_calls(item, calls):
                assert norm(after) == pytest.approx(l2, rel=5e-9)
                checked += 1
    if not checked:
        pytest.skip("another golden folder")


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


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("method", ["DDIM", "EulerAncestralDiscrete", "PNDM", "HeunDiscrete", "DEISMultistep"])
def test_overshooting_steps_are_refused(method):
    with pytest.raises(OspError, match=r"num_sampling_steps 61: .*overshoots to 62 .* 60 or 62 steps work"):
        schedules.build(method, 61, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    schedules.build(method, 61, prediction_type="v_prediction")  # leading spacing has no such trouble


@pytest.mark.parametrize("steps", [0, -3, 1001])
@pytest.mark.parametrize("method", schedules.METHODS)
def test_step_count_out_of_range(method, steps):
    with pytest.raises(OspError, match=rf"num_sampling_steps {steps}: must be in 1\.\.1000"):
        schedules.build(method, steps)


def test_unknown_method_names_the_twelve():
    with pytest.raises(OspError, match="unknown sample_method 'Euler'") as error:
        schedules.build("Euler", 10)
    assert len(schedules.METHODS) == 12
    for method in schedules.METHODS:
        assert method in str(error.value)


@pytest.mark.parametrize(
    "method, steps, options, message",
    [
        ("DDIM", 10, {"prediction_type": "sample"}, "unknown prediction_type 'sample'"),
        ("PNDM", 3, {}, "use 4 or more"),
        ("DPMSolverSinglestep", 1000, {}, "would repeat"),
        ("DEISMultistep", 1000, {}, "would repeat"),
        ("DDIM", 10, {"rescale_betas_zero_snr": True}, "use v_prediction"),
        ("DDPM", 10, {"rescale_betas_zero_snr": True}, "use v_prediction"),
        ("CogVideoX", 10, {"rescale_betas_zero_snr": True}, "use v_prediction"),
        ("EulerAncestralDiscrete", 500, {"rescale_betas_zero_snr": True}, "would go up"),
    ],
)
def test_impossible_samplers(method, steps, options, message):
    with pytest.raises(OspError, match=message) as error:
        schedules.build(method, steps, **options)
    assert "\n" not in str(error.value)


def test_spacings():
    assert [spacing_of(m, True) for m in ("DDIM", "DPMSolverSinglestep", "FlowMatchEulerDiscrete")] == [
        "trailing",
        "linspace",
        "flow",
    ]
    assert spacing_of("DDIM", False) == "leading"


def test_flow_matching_has_no_noise_schedule():
    with pytest.raises(OspError, match="no noise schedule"):
        schedules.noise_schedule("FlowMatchEulerDiscrete")


@pytest.mark.parametrize("timesteps", [[0.5, 1], [-1, 3], [5, 1000]])
def test_add_noise_refuses_timesteps_off_the_table(timesteps):
    table, x = schedules.noise_schedule("DDPM"), np.zeros((2, 3), np.float32)
    with pytest.raises(OspError, match="integers in 0..999"):
        schedules.add_noise(table, x, x, np.array(timesteps))
