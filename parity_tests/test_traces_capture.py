"""Capture: watching changes nothing, a forced run isolates each layer, machines with one framework each can meet."""

import contextlib
import functools
import subprocess
import sys

import numpy as np
import pytest

import toy_models
from osp_shared.errors import OspError
from osp_shared.traces import Header, Recorder, Trace, compare, read_trace, result
from osp_shared.traces.cases import WFVAE_TINY, wfvae
from osp_shared.traces.tap import CaptureFailed, rounded

DTYPES = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def capture_of(backend):
    return pytest.importorskip(f"osp_{backend}.capture")


@functools.cache
def reference(dtype, fed_in=None):
    """The toy network on torch, free or fed with the float64 values rounded to `fed_in`: the same for every test."""
    return run("torch", dtype, rounded(reference("float64"), fed_in) if fed_in else None)[0]


def run(backend, dtype="float32", feed=None, change=None, watched=True):
    """Trace and output of the toy network; `change` is applied to the built model."""
    capture = capture_of(backend)
    model = toy_models.build(f"osp_{backend}", DTYPES[dtype])
    if change is not None:
        change(model)
    extra = {"mode": "forced", "reference": feed.fingerprint()} if feed is not None else {}
    recorder = Recorder(Header("toy", {"dim": toy_models.DIM}, "w", "i", backend, dtype, **extra))
    args = [capture.tensor(value, dtype) for value in toy_models.inputs().values()]
    with capture.no_gradients(), capture.tapped(model, recorder, feed=feed) if watched else contextlib.nullcontext():
        output = model(*args)
    return recorder.trace(), capture.to_numpy(output)


def judge(dtype="float32", change=None):
    truth = reference("float64")
    feed = rounded(truth, dtype)
    free = compare(run("mindspore", dtype, change=change)[0], reference(dtype), truth)
    forced = compare(
        run("mindspore", dtype, feed, change)[0], reference(dtype, dtype), reference("float64", dtype)
    )
    return result("toy", free, forced)


@pytest.mark.parametrize("backend", ["torch", "mindspore"])
def test_watching_changes_nothing(backend):
    capture = capture_of(backend)
    _, plain = run(backend, watched=False)
    trace, watched = run(backend)
    assert np.array_equal(plain, watched) and len(trace.records) > 80
    model = toy_models.build(f"osp_{backend}")
    args = [capture.tensor(value, "float32") for value in toy_models.inputs().values()]

    def loss():
        return capture.project(model(*args))

    before = capture.gradients(model, loss)
    with capture.tapped(model, Recorder(Header("toy", {}, "w", "i", backend, "float32"))):
        during = capture.gradients(model, loss)
    assert set(before) == set(during) and len(before) > 20
    assert all(np.array_equal(before[name], during[name]) for name in before)
    assert np.array_equal(run(backend, watched=False)[1], plain)  # and everything is as it was


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_backends_agree_layer_by_layer(dtype):
    item = judge(dtype)
    assert item.passed, item.verdict
    assert len({entry.path for entry in item.entries}) > 35


def test_a_fault_below_the_noise_of_the_output_is_named():
    """One of seven norms with eps 1e-5: the end error is that of rounding, the layer's own is not."""

    def change(model):
        model.blocks[1].norm2.eps = 1e-5

    item = judge(change=change)
    assert [blame.path for blame in item.blames] == ["blocks.1.norm2"]
    assert item.entries[-1].path == "" and item.entries[-1].total < 1e-6
    named = next(e for e in item.entries if e.path == "blocks.1.norm2")
    assert named.local > 3 * named.row.bound.rel_l2 and named.inherited < 1e-6


def test_errors_add_up():
    for entry in judge().entries:
        assert entry.total <= (entry.local + entry.inherited) * (1 + 1e-9) + 1e-15


def test_own_code_between_parts_is_named():
    from osp_mindspore import kernels

    def change(model):
        block = model.blocks[2]

        def construct(x, shift):
            x = x + block.attn(block.norm1(x) * 1.5 - shift)
            return x + block.down(kernels.gelu_tanh(block.up(block.norm2(x))))

        block.__dict__["construct"] = construct

    item = judge(change=change)
    assert [blame.where for blame in item.blames] == ["blocks.2, between blocks.2.norm1 and blocks.2.attn"]


def test_an_exception_names_the_module():
    from osp_mindspore import capture

    case = wfvae("decode", size=(5, 16, 16))
    model = capture.build(case, "float32")
    model.decoder.mid[1].proj_out.__dict__["construct"] = lambda x, cache=None: 1 / 0
    with pytest.raises(CaptureFailed, match="decoder.mid.1.proj_out: ZeroDivisionError"):
        capture.run_case(case, "float32", model=model)


def test_gradients_agree_parameter_by_parameter():
    torch_capture, ms_capture = capture_of("torch"), capture_of("mindspore")
    case = wfvae("decode", size=(5, 16, 16))
    truth = torch_capture.run_case(case, "float64", backward=True)
    found = compare(
        ms_capture.run_case(case, "float32", backward=True),
        torch_capture.run_case(case, "float32", backward=True), truth,
    )  # fmt: skip
    grads = [row for row in found.rows if row.record.kind == "param_grad"]
    assert len(grads) > 60 and found.passed, found.blames[:3]


def test_two_machines_and_a_third(tmp_path):
    """Each trace is written by a process that has one framework; they are compared in one that has neither."""
    argv = ["trace", "capture", "--model", "wfvae-decode", "--size", "5", "16", "16", "--salt", "far"]
    for name, hidden, rest in (
        ("a", "mindspore", ["--backend", "torch"]),
        ("t", "mindspore", ["--backend", "torch", "--dtype", "float64"]),
        ("b", "torch", ["--backend", "mindspore"]),
    ):
        _osp(hidden, [*argv[:2], str(tmp_path / name), *argv[2:], *rest])
    paths = [str(tmp_path / name) for name in "ab"]
    told = _osp("torch mindspore", ["trace", "compare", *paths, "--truth", str(tmp_path / "t")])
    assert "bounds measured against truth" in told and "ok: " in told
    assert read_trace(paths[1]).header.versions.keys() == {"python", "numpy", "mindspore"}
    other = wfvae("decode", size=(5, 16, 16), salt="near").header("torch", "float32")
    with pytest.raises(OspError, match="different weights"):
        compare(Trace(other, [], {}), read_trace(paths[0]))


def _osp(hidden: str, argv: list[str], status: int = 0) -> str:
    code = (
        f"import sys\nfor name in {hidden.split()!r}: sys.modules[name] = None\n"
        "from osp_tools.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_tiny_config_covers_the_released_topology():
    from osp_shared.specs.wfvae import RELEASED, WFVAESpec

    kinds = {name.split(".")[1] for name in RELEASED.parameters()}
    assert {name.split(".")[1] for name in WFVAESpec.from_config(WFVAE_TINY).parameters()} == kinds
