"""Noise tables, timestep grids and the twelve samplers against the golden numbers; and what they refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

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
