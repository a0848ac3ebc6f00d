"""Comparison: distances, bounds, refusals, and what is said about missing, misshapen and non-finite layers."""

import math

import numpy as np
import pytest

from osp_shared.errors import OspError
from osp_shared.traces import Header, Recorder, compare, ratchet, result
from osp_shared.traces.bounds import RATIO, bound, floor, unit_roundoff
from osp_shared.traces.metrics import distance, ulps
from osp_shared.traces.report_html import html
from osp_shared.traces.report_junit import junit
from osp_shared.traces.report_text import comparison_summary, suite_table


def chain(dtype="float32", noise=0.0, fault=None, backend="torch", skip=None, **header):
    """Trace of four layers; `noise` is their relative error, `fault` (layer, function) changes one of them."""
    settings = {"model": "toy", "config": {"dim": 8}, "weights": "w", "inputs": "i", **header}
    recorder = Recorder(Header(backend=backend, dtype=dtype, **settings))
    exact, errors = np.random.default_rng(1), np.random.default_rng(len(backend) + len(dtype))
    for i in range(4):
        value = exact.standard_normal((16, 8))
        value = value * (1 + noise * errors.standard_normal(value.shape))
        if fault is not None and fault[0] == i:
            value = fault[1](value)
        if i != skip:
            recorder.add(f"layer.{i}", "output", value.astype(dtype), reduction=8, type="Linear")
    return recorder.trace()


TRUTH, YARDSTICK = chain("float64"), chain(noise=5e-8)


def test_rounding_passes_and_a_small_fault_does_not():
    assert compare(chain(noise=6e-8, backend="mindspore"), YARDSTICK, TRUTH).passed
    faulty = chain(noise=6e-8, fault=(2, lambda v: v * (1 + 2e-6)), backend="mindspore")
    found = compare(faulty, YARDSTICK, TRUTH)
    assert [row.record.path for row in found.failing] == ["layer.2"]
    assert found.blames[0].path == "layer.2" and not found.passed


def test_one_wrong_element_fails_by_the_maximum():
    def spoil(value):
        value = value.copy()
        value[3, 3] += 2e-6
        return value

    row = compare(chain(noise=6e-8, fault=(1, spoil)), YARDSTICK, TRUTH).by_key[(-1, "layer.1", 0, "output", "0")]
    assert row.failed and row.error.rel_l2 < row.bound.rel_l2


def test_without_truth_bounds_come_from_arithmetic():
    found = compare(chain(noise=1e-7, backend="mindspore"), YARDSTICK)
    assert found.passed and not found.has_truth and {r.bound.source for r in found.rows} == {"floor"}
    assert not compare(chain(noise=1e-5), YARDSTICK).passed


def test_wider_reference_is_truth():
    assert compare(YARDSTICK, TRUTH).passed
    with pytest.raises(OspError, match="capture truth with --dtype float64"):
        compare(YARDSTICK, YARDSTICK, YARDSTICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "different models, other and toy"),
        ({"config": {"dim": 9, "eps": 1}}, "dim is 9 and 8, eps is 1 and absent"),
        ({"weights": "x"}, "different weights, x and w"),
        ({"inputs": "x"}, "different inputs, x and i"),
        ({"mode": "forced"}, "different mode, forced and free"),
        ({"passes": "backward"}, "different passes"),
    ],
)
def test_other_runs_are_refused(change, message):
    with pytest.raises(OspError, match=message):
        compare(chain(**change), YARDSTICK)


def test_yardstick_of_another_dtype_is_refused():
    with pytest.raises(OspError, match="yardstick is the reference in the candidate's dtype"):
        compare(chain("float16"), YARDSTICK, TRUTH)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_is_reported_by_layer(bad):
    def spoil(value):
        value = value.copy()
        value[0, :3] = bad
        return value

    found = compare(chain(fault=(1, spoil)), YARDSTICK, TRUTH)
    assert [(row.record.path, row.error.nonfinite) for row in found.nonfinite] == [("layer.1", 3)]
    assert "NaN or infinite: layer.1 output: 3 of 128" in comparison_summary(found)
    assert found.by_key[(-1, "layer.1", 0, "output", "0")].fraction == math.inf


def test_missing_extra_and_misshapen_layers():
    found = compare(chain(skip=1), YARDSTICK, TRUTH)
    assert [r.path for r in found.alignment.missing] == ["layer.1"] and not found.passed
    assert "never makes this call" in found.blames[0].why
    full = compare(chain(), chain(skip=1), TRUTH)
    assert [r.path for r in full.alignment.extra] == ["layer.1"]
    bent = compare(chain(fault=(0, lambda v: v[:, :4])), YARDSTICK, TRUTH)
    assert "shape [16, 4] instead of [16, 8]" in bent.blames[0].why


def test_distances():
    d = distance(np.float32([1, 2, 4]), np.float32([1, 2, 3]))
    assert d.max_abs == 1 and d.rel_l2 == pytest.approx(1 / math.sqrt(14)) and d.nonfinite == 0
    assert distance(np.float32([np.inf, 1]), np.float32([np.inf, 1])).nonfinite == 0
    assert distance(np.float32([2, 2]), np.float32([1, 1])).angle == pytest.approx(0, abs=1e-15)
    assert distance(np.float32([1e-3]), np.zeros(1)).rel_l2 == pytest.approx(1e-3)


def test_ulps_across_zero_and_in_bfloat16():
    tiny = np.nextafter(np.float32(0), np.float32(1))
    assert ulps(np.float32([tiny, 1.0]), np.float64([-tiny, 1.0]), "float32").tolist() == [2, 0]
    assert ulps(np.float32([1.0078125]), np.float64([1.0]), "bfloat16").tolist() == [1]


def test_floor_grows_with_length_magnitude_and_roundoff():
    u = unit_roundoff("float32")
    assert floor("float32") == 2 * u
    assert floor("float32", 64) == u + 2 * u
    assert floor("float32", 64, magnitude=3) == u + 6 * u
    assert floor("bfloat16", 64) == unit_roundoff("bfloat16") + 2 * u  # accumulated in float32
    with pytest.raises(OspError, match="no error bound"):
        floor("int8")


def test_bound_is_the_larger_of_yardstick_and_floor():
    yardstick = distance(np.float64([1 + 1e-6]), np.float64([1.0]))
    assert bound("float32", 1.0, 1.0, 1e-7, yardstick).rel_l2 == pytest.approx(RATIO * 1e-6)
    assert bound("float32", 1.0, 1.0, 1e-5, yardstick).rel_l2 == 1e-5


def test_reports_tell_the_same_story():
    good = result("good", compare(chain(noise=6e-8), YARDSTICK, TRUTH))
    bad = result("bad <one>", compare(chain(fault=(2, lambda v: -v)), YARDSTICK, TRUTH))
    assert good.passed and not bad.passed
    page, xml = html([good, bad], "Parity <report>", {"salt": "x"}), junit([good, bad])
    assert "http" not in page and "<script" not in page and "Parity &lt;report&gt;" in page
    assert xml.count("<testcase") == 8 and xml.count("<failure") == 1 and 'failures="1"' in xml
    assert "FAIL bad <one>: first fault: layer.2 output" in suite_table([good, bad])


def test_ratchet_sees_growth_and_slack(tmp_path):
    item = result("run", compare(chain(noise=6e-8), YARDSTICK, TRUTH))
    found = ratchet.observed([item])
    file = tmp_path / "ratchet.json"
    ratchet.write(file, found, {})
    kept = ratchet.read(file)
    assert ratchet.check(found, kept).passed and not ratchet.check(found, kept).loose
    grown = {"run": {"Linear": found["run"]["Linear"] * 1.5}}
    assert "run Linear" in ratchet.check(grown, kept).grown[0]
    assert "run Linear" in ratchet.check({"run": {"Linear": found["run"]["Linear"] / 3}}, kept).loose[0]
    assert not ratchet.check({"other": {"Linear": 0.1}}, kept).passed
    kept["run"]["Linear"]["reason"] = "another kernel"
    ratchet.write(file, grown, kept)
    assert ratchet.read(file)["run"]["Linear"]["reason"] == "another kernel"
    file.write_text('{"run": 3}')
    with pytest.raises(OspError, match="not a ratchet file"):
        ratchet.read(file)
