"""A failing layer as a folder that anyone can run: its arguments, weights, expected result, and a short pytest file.

    <folder>/trace/          arguments, parameters and expected output, in the trace format
    <folder>/replay.json     model, configuration, module path, plain arguments, bounds
    <folder>/test_replay.py  run with pytest; OSP_BACKEND=torch or mindspore picks one backend, else both installed ones

The expected output is the reference's in float64 on the very arguments; the bound is the one of osp_shared.traces.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
from pathlib import Path

import numpy as np

from osp_shared.errors import OspError
from osp_shared.traces import Recorder, Result, Trace, read_trace
from osp_shared.traces.bounds import bound, floor
from osp_shared.traces.cases import Case
from osp_shared.traces.metrics import Distance, distance, wide

TEST = '''"""One layer of {model}: {path}. See replay.json."""

from pathlib import Path

import pytest

from osp_tools.replay import backends, replay


@pytest.mark.parametrize("backend", backends())
def test_layer(backend):
    outcome = replay(Path(__file__).parent, backend)
    assert outcome.fraction <= 1, outcome
'''


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Error of one replay; `fraction` is that of its bound."""

    backend: str
    error: Distance
    bound: float
    fraction: float


class Unsupported(Exception):
    """An argument that cannot be written down."""


def write_replay(folder: Path, case: Case, dtype: str, item: Result) -> Path:
    """Replay folder of the first blamed module, or of the nearest one around it whose arguments can be written."""
    path = item.blames[0].path.split("/")[0]
    reference = importlib.import_module("osp_torch.capture")
    while True:
        known = dict(reference.modules(reference.build(case, dtype)))
        path = path if path in known else path.rpartition(".")[0]
        try:
            return _write(folder, case, dtype, path, item.blames[0].where)
        except Unsupported as error:
            if not path:
                raise OspError(f"replay of {item.name}: {error}") from None
            path = path.rpartition(".")[0]


def _write(folder: Path, case: Case, dtype: str, path: str, where: str) -> Path:
    reference = importlib.import_module("osp_torch.capture")
    models = {name: reference.build(case, name) for name in (dtype, "float64")}
    args, kwargs = _grab(reference, case, dtype, models[dtype], path)
    recorder = Recorder(case.header("torch", dtype), 1 << 62)
    plain = {"args": [_describe(reference, recorder, path, str(i), a) for i, a in enumerate(args)],
             "kwargs": {k: _describe(reference, recorder, path, k, a) for k, a in kwargs.items()}}  # fmt: skip
    outputs = {}
    for name, model in models.items():
        module, method = _module(reference, model, case, path)
        given = [_restore(reference, recorder.trace(), path, p, name) for p in plain["args"]]
        named = {k: _restore(reference, recorder.trace(), path, p, name) for k, p in plain["kwargs"].items()}
        with reference.no_gradients():
            outputs[name] = reference.to_numpy(_first(getattr(module, method)(*given, **named)))
    for name, parameter in models[dtype].state_dict().items():
        if not path or name.startswith(path + "."):
            recorder.add(path, "param", reference.to_numpy(parameter), slot=name)
    exact = outputs["float64"]
    recorder.add(path, "output", exact)
    longest = max((int(np.prod(r.shape[1:])) for r in recorder.records if r.kind == "param"), default=1)
    measured = distance(outputs[dtype], exact)
    scale, largest = float(np.sqrt(np.mean(exact**2))), float(np.abs(exact).max(initial=0.0))
    allowed = bound(dtype, scale, largest, floor(dtype, max(longest, 4096)), measured)
    recorder.trace().write(folder / "trace")
    content = {
        "model": case.model, "name": case.name, "config": dict(case.config), "dtype": dtype, "path": path,
        "where": where, **plain, "bound": {"rel_l2": allowed.rel_l2, "max_abs": allowed.max_abs},
    }  # fmt: skip
    (folder / "replay.json").write_text(json.dumps(content, indent=1, default=list) + "\n", encoding="utf-8")
    (folder / "test_replay.py").write_text(TEST.format(model=case.name, path=path or "the model"), encoding="utf-8")
    return folder


def _module(capture, model, case: Case, path: str):
    """The module at `path` and the name of the method that is its forward pass."""
    module = dict(capture.modules(model))[path]
    if not path and case.place.entry:
        return module, case.place.entry
    return module, "forward" if hasattr(module, "forward") else "construct"


def _grab(capture, case: Case, dtype: str, model, path: str) -> tuple[tuple, dict]:
    """Arguments of the module's first call in a free run."""
    module, method = _module(capture, model, case, path)
    seen: list[tuple] = []
    original = getattr(module, method)

    def spy(*args, **kwargs):
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    module.__dict__[method] = spy
    try:
        capture.run_case(case, dtype, model=model, only=set(), with_kernels=False)
    finally:
        module.__dict__.pop(method, None)
    if not seen:
        raise Unsupported(f"{path} is not called")
    return seen[0]


def _describe(capture, recorder: Recorder, path: str, slot: str, value: object) -> object:
    """An argument as JSON; tensors go into the trace."""
    if capture.is_tensor(value):
        recorder.add(path, "input", capture.to_numpy(value), slot=slot)
        return {"tensor": slot}
    if isinstance(value, (tuple, list)):
        return {"tuple": [_describe(capture, recorder, path, f"{slot}.{i}", v) for i, v in enumerate(value)]}
    if dataclasses.is_dataclass(value):
        kind = type(value)
        return {"dataclass": f"{kind.__module__}:{kind.__qualname__}", "fields": dataclasses.asdict(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if str(value).startswith("torch.") and not callable(value):
        return {"dtype": str(value)}
    raise Unsupported(f"{path}: argument {slot} is a {type(value).__name__}")


def _restore(capture, trace: Trace, path: str, plain: dict, dtype: str) -> object:
    """The argument again, floating tensors in `dtype`."""
    if "tensor" in plain:
        value = trace.get(path, "input", plain["tensor"])
        return capture.tensor(value, dtype) if value.dtype.kind in "fV" else capture.to_tensor(np.array(value))
    if "tuple" in plain:
        return tuple(_restore(capture, trace, path, p, dtype) for p in plain["tuple"])
    if "dataclass" in plain:
        module, _, name = plain["dataclass"].partition(":")
        return getattr(importlib.import_module(module), name)(**plain["fields"])
    if "dtype" in plain:
        return capture.tensor(np.zeros(1, np.float32), dtype).dtype
    return plain["value"]


def _first(output: object) -> object:
    while isinstance(output, (tuple, list)):
        output = output[0]
    return output


def backends() -> list[str]:
    """OSP_BACKEND, or those that are installed."""
    if wanted := os.environ.get("OSP_BACKEND"):
        return [wanted]
    return [name for name in ("torch", "mindspore") if importlib.util.find_spec(name) is not None]


def replay(folder: Path, backend: str) -> Outcome:
    """Run the folder's layer on a backend; only the layer's own weights are needed, the others are zeros."""
    content = json.loads((folder / "replay.json").read_text(encoding="utf-8"))
    trace = read_trace(folder / "trace")
    capture = importlib.import_module(f"osp_{backend}.capture")
    path, dtype = content["path"], content["dtype"]
    weights = {r.slot: trace.value(r) for r in trace.records if r.kind == "param"}
    case = Case(content["name"], content["model"], content["config"], {})
    shapes = case.spec().parameters()

    def read(name: str) -> np.ndarray:
        return np.array(weights[name]) if name in weights else np.zeros(shapes[name], np.float32)

    model = capture.build(dataclasses.replace(case, read=read), dtype)
    module, method = _module(capture, model, case, path)
    args = [_restore(capture, trace, path, p, dtype) for p in content["args"]]
    kwargs = {k: _restore(capture, trace, path, p, dtype) for k, p in content["kwargs"].items()}
    with capture.no_gradients():
        output = capture.to_numpy(_first(getattr(module, method)(*args, **kwargs)))
    error = distance(output, wide(trace.get(path, "output")))
    allowed = content["bound"]
    worst = max(error.rel_l2 / allowed["rel_l2"], error.max_abs / allowed["max_abs"])
    return Outcome(backend, error, allowed["rel_l2"], float("inf") if error.nonfinite else worst)
