"""Trace folders: what is written comes back, and nothing damaged or foreign is taken for a trace."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from osp_shared.errors import OspError
from osp_shared.traces import Header, Recorder, read_trace
from osp_shared.traces.format import MANIFEST, SAMPLES, TENSORS, fingerprint, sample_positions


def make(**changes) -> Recorder:
    header = Header("toy", {"dim": 4}, "w", "i", "torch", "float32", versions={"numpy": np.__version__})
    recorder = Recorder(header, **changes)
    values = np.random.default_rng(0)
    recorder.add("a", "input", values.standard_normal((2, 3), np.float32), type="Linear")
    recorder.add("a", "output", values.standard_normal((2, 4)).astype(ml_dtypes.bfloat16), type="Linear", reduction=3)
    recorder.add("a", "output", np.array([1, -2], np.int64), call=1)
    recorder.add("", "output", values.standard_normal((3,)), step=2)
    recorder.add("b", "output", np.array([True]), slot="1")
    recorder.add("c", "output", np.zeros((0, 3), np.float32))
    return recorder


def test_round_trip(tmp_path):
    trace = make().trace()
    found = read_trace(trace.write(tmp_path / "t"))
    assert found.header == trace.header
    assert found.records == trace.records
    for record in trace.records:
        a, b = trace.value(record), found.value(record)
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    assert found.fingerprint() == trace.fingerprint()


def test_large_tensor_is_sampled_at_positions_of_its_own(tmp_path):
    recorder = make(full_limit=1000)
    value = np.arange(10_000, dtype=np.float32).reshape(100, 100)
    record = recorder.add("big", "output", value)
    found = read_trace(recorder.trace().write(tmp_path / "t"))
    positions = sample_positions("big", "output", "0", (100, 100))
    assert record.sampled and len(positions) == SAMPLES
    assert np.array_equal(found.value(found.by_key[record.key]), value.ravel()[positions])
    assert record.stats["max"] == 9999 and record.stats["mean"] == pytest.approx(4999.5)


def test_recorder_copies():
    recorder, value = make(), np.ones(3, np.float32)
    record = recorder.add("x", "output", value)
    value[:] = 7
    assert recorder.trace().value(record).tolist() == [1, 1, 1]


def test_fingerprint_ignores_order_and_width():
    a, b = np.float32([1.5, 2]), np.float32([[3]])
    assert fingerprint([("a", a), ("b", b)]) == fingerprint([("b", b.astype(np.float64)), ("a", a)])
    assert fingerprint([("a", a)]) != fingerprint([("a", np.float32([1.5, 2.0000002]))])
    assert fingerprint([("a", a)]) != fingerprint([("b", a)])


def test_truncated_data(tmp_path):
    folder = make().trace().write(tmp_path / "t")
    data = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(data[:-5])
    with pytest.raises(OspError, match=f"{len(data) - 5} bytes, the manifest says {len(data)}.*truncated"):
        read_trace(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(OspError, match="missing"):
        read_trace(folder)


def test_altered_data(tmp_path):
    folder = make().trace().write(tmp_path / "t")
    data = bytearray((folder / TENSORS).read_bytes())
    data[-1] ^= 1
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(OspError, match="damaged"):
        read_trace(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=2), "version 2, this program reads version 1"),
        (lambda m: m.update(format="other"), "not a trace"),
        (lambda m: m.pop("header"), "malformed"),
        (lambda m: m["records"][0].pop("shape"), "malformed"),
        (lambda m: m["records"][0].update(shape=[6]), "not what the manifest says"),
    ],
)
def test_foreign_manifest(tmp_path, change, message):
    folder = make().trace().write(tmp_path / "t")
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(OspError, match=message):
        read_trace(folder)


def test_not_a_trace(tmp_path):
    with pytest.raises(OspError, match="no manifest.json"):
        read_trace(tmp_path)
    (tmp_path / MANIFEST).write_text('{"format": "osp-tr')
    with pytest.raises(OspError, match="not valid JSON"):
        read_trace(tmp_path)


def test_writing_leaves_nothing_half_done(tmp_path, monkeypatch):
    trace = make().trace()
    trace.write(tmp_path / "t")
    before = (tmp_path / "t" / MANIFEST).read_bytes()
    monkeypatch.setattr("osp_shared.traces.format.json.dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trace.write(tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    assert (tmp_path / "t" / MANIFEST).read_bytes() == before


def test_other_folders_are_not_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(OspError, match="is not a trace"):
        make().trace().write(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_traces_need_no_framework():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['mindspore'] = None\n"
        "from osp_shared.traces import report_html, report_junit, report_text, ratchet, cases, tap\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
