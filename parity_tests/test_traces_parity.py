"""The parity suite on real models, and its own power: a fixed part of the fault catalogue."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mindspore")

from osp_shared.errors import OspError
from osp_shared.traces import ratchet
from osp_tools import parity_run
from osp_tools.faults import Edit, applied, catalogue, find
from osp_tools.mutate import TO_LOCATE, Bench
from osp_tools.parity import RATCHET
from osp_tools.replay import replay, write_replay

# One of each family; all of them leave shapes alone, most leave the model's output where a common tolerance accepts it.
FIXED = (
    "dit-norm-eps", "dit-gelu-erf", "dit-softmax-bf16", "dit-softmax-fp16", "dit-rope-offset", "dit-gate-lost",
    "dit-head-order", "dit-unpatchify", "dit-mask-inverted", "t5-eps", "t5-bucket-edge", "t5-gelu-erf",
    "vae-layernorm-eps", "vae-layernorm-half", "vae-pad-zero", "haar-factor", "haar-band-order-2d", "vae-std",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(scope="module")
def runs():
    return {run.name: run for run in parity_run.quick_runs()}


@pytest.mark.parametrize("name", ["wfvae-encode float32", "dit float32", "inpaint float32", "t5 float32"])
def test_every_layer_within_its_bound(runs, bench, name):
    run = runs[name]
    known = bench.known.setdefault(run.case.name, run.references("mindspore"))
    item = run.judge(known, "mindspore")
    assert item.passed, item.verdict
    kept = ratchet.read(parity_run.REPOSITORY / RATCHET)
    verdict = ratchet.check(ratchet.observed([item]), kept)
    assert verdict.passed, verdict


def test_trajectory_by_step(runs, bench):
    run = runs["dit-sampler float32"]
    known = bench.known.setdefault("dit-sampler", run.references("mindspore"))
    item = run.judge(known, "mindspore")
    assert item.passed, item.verdict
    steps = {row.record.step for row in item.free.rows if row.record.kind == "x0"}
    assert steps == {0, 1, 2}
    assert {row.record.call for row in item.forced.rows if row.record.path == "denoiser"} == {0, 1, 2}


@pytest.mark.parametrize("name", FIXED)
def test_fault_is_caught_and_located(bench, name):
    outcome = bench.judge(find(name))
    assert outcome.caught and outcome.located, (outcome.where, outcome.why)
    assert not np.isnan(outcome.end_error)


def test_catalogue_is_large_and_follows_the_code():
    faults = catalogue()
    assert len({fault.name for fault in faults}) == len(faults) >= 100
    assert TO_LOCATE >= 0.95
    for fault in faults:
        with fault.patch():
            pass


def test_faults_are_taken_back():
    from osp_mindspore.dit import modules

    before = modules.TransformerBlock.construct.__code__
    with find("dit-gate-lost").patch():
        assert modules.TransformerBlock.construct.__code__ is not before
    assert modules.TransformerBlock.construct.__code__ is before
    with pytest.raises(OspError, match="is not in its source any more"):
        with applied("osp_mindspore.dit.modules:merge", [Edit("", "no such text", "")]):
            pass


def test_replay_of_a_failing_layer(runs, bench, tmp_path):
    fault, run = find("dit-gate-lost"), runs["dit float32"]
    known = bench.known.setdefault("dit", run.references("mindspore"))
    item = run.judge(known, "mindspore", fault.patch)
    folder = write_replay(tmp_path / "layer", run.case, run.dtype, item)
    assert "transformer_blocks.0" in (folder / "test_layer.py").read_text()
    for backend in ("torch", "mindspore"):
        assert replay(folder, backend).fraction <= 1
    with fault.patch():
        assert replay(folder, "mindspore").fraction > 1000


@pytest.mark.parametrize("run, fault, path, call", [
    ("dit-sampler float32", "dit-norm-eps", "transformer_blocks.0.norm1", 0),
    ("wfvae-decode-tiled float32", "vae-layernorm-eps", "decoder.mid.0.norm1.norm", 0),
    ("dit float32", "dit-modulation-order", "adaln_single", 0),  # the second of two results is wrong
    ("t5 float32", "t5-scaled", "", 0),  # inside, the library's modules take other arguments than ours
])  # fmt: skip
def test_replay_of_other_layers(runs, bench, tmp_path, run, fault, path, call):
    """Called by a sampling loop or once a chunk, of several results, of a library: replayed all the same."""
    run, fault = runs[run], find(fault)
    item = run.judge(bench.known.setdefault(run.case.name, run.references("mindspore")), "mindspore", fault.patch)
    folder = write_replay(tmp_path / "layer", run.case, run.dtype, item)
    content = json.loads((folder / "replay.json").read_text())
    assert (content["path"], content["call"]) == (path, call)
    assert replay(folder, "mindspore").fraction <= 1
    with fault.patch():
        assert replay(folder, "mindspore").fraction > 5


def test_the_sampling_loop_is_no_layer(runs, bench, tmp_path):
    run, fault = runs["dit-sampler float32"], find("sampler-down")
    item = run.judge(bench.known.setdefault("dit-sampler", run.references("mindspore")), "mindspore", fault.patch)
    with pytest.raises(OspError, match="the fault lies in the sampling loop"):
        write_replay(tmp_path / "layer", run.case, run.dtype, item)
