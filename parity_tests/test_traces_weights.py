"""`osp trace capture` on checkpoints and on the sampling loop: what is traced is the model that was written down."""

import json

import numpy as np
import pytest

from osp_shared.checkpoints import write_safetensors
from osp_shared.traces import compare, read_trace
from osp_shared.traces.cases import default_case
from osp_tools.cli import main

BACKENDS = ("torch", "mindspore")
SALT = "written"


def written(folder, model, form="safetensors"):
    """The made-up weights of a model's case as a checkpoint; the path to give to --weights."""
    case = default_case(model, None, None, SALT)
    spec, read = case.spec(), case.reader()
    names = [name for name in spec.parameters() if name not in spec.optional()]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(spec.to_config()))
    if form == "safetensors":
        write_safetensors(folder, ((name, read(name)) for name in names))
        return folder
    torch = pytest.importorskip("torch")
    torch.save({"state_dict": {name: torch.from_numpy(read(name)) for name in names}}, folder / "weights.ckpt")
    return folder / "weights.ckpt"


def captured(folder, *argv, status=0):
    assert main(["trace", "capture", str(folder), "--salt", SALT, *map(str, argv)]) == status
    return read_trace(folder) if status == 0 else None


@pytest.mark.parametrize(("model", "form"), [("wfvae-decode", "pickle"), ("dit", "safetensors"), ("t5", "safetensors")])
def test_checkpoint_is_what_is_traced(tmp_path, model, form):
    size = {"wfvae-decode": ("--size", 5, 16, 16), "dit": ("--size", 2, 4, 4)}.get(model, ())
    weights = written(tmp_path / "weights", model, form)
    traces = {}
    for backend in BACKENDS:
        pytest.importorskip(f"osp_{backend}.capture")
        rest = ("--model", model, "--backend", backend, *size)
        made = captured(tmp_path / f"made-{backend}", *rest)
        found = traces[backend] = captured(tmp_path / backend, *rest, "--weights", weights)
        assert [r.key for r in found.records] == [r.key for r in made.records] and len(found.records) > 40
        assert all(np.array_equal(found.value(r), made.value(made.by_key[r.key])) for r in found.records)
    a, b = (traces[name].header for name in BACKENDS)
    assert a.weights == b.weights and a.config == b.config
    if model != "t5":  # the reference is a library's own tree there, which has other modules
        assert compare(traces["mindspore"], traces["torch"]).passed


def test_weights_of_another_model_are_refused(tmp_path, capsys):
    pytest.importorskip("torch")
    dit, inpaint = (written(tmp_path / name, name) for name in ("dit", "inpaint"))
    for model, weights, message in (
        ("inpaint", dit, "not the weights of OpenSoraInpaint"),
        ("dit", inpaint, "weights of OpenSoraInpaint"),
        ("t5", dit, "T5"),
        ("dit", tmp_path / "none", "none"),
    ):
        captured(tmp_path / "trace", "--model", model, "--backend", "torch", "--weights", weights, status=2)
        told = capsys.readouterr().err
        assert message in told and len(told.splitlines()) == 1, told
        assert not (tmp_path / "trace").exists()


def test_sampling_loop_is_traced_step_by_step(tmp_path, capsys):
    traces = []
    for backend in BACKENDS:
        pytest.importorskip(f"osp_{backend}.capture")
        traces.append(captured(tmp_path / backend, "--model", "dit-sampler", "--backend", backend))
    for kind in ("x_t", "model_output", "x0"):
        assert [r.step for r in traces[0].records if r.kind == kind] == [0, 1, 2]
    assert compare(traces[1], traces[0]).alignment.complete
    captured(tmp_path / "back", "--model", "dit-sampler", "--backward", status=2)
    assert "no backward pass" in capsys.readouterr().err
