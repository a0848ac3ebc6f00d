"""A failing layer as a folder that anyone can run: its arguments, weights, expected result, and a short pytest file.

    <folder>/trace/          arguments, parameters and expected output, in the trace format
    <folder>/replay.json     model, configuration, module path, plain arguments, bounds
    <folder>/test_<name>.py  run with pytest; OSP_BACKEND=torch or mindspore picks one backend, else both installed ones

The expected output is the reference's in float64 on the very arguments; the bound is the free run's of
osp_shared.traces, with the reference's own error on these arguments as yardstick.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from osp_shared.errors import OspError
from osp_shared.specs.fields import read_object
from osp_shared.traces import Recorder, Result, Trace, compare, read_trace
from osp_shared.traces.bounds import Bound
from osp_shared.traces.cases import Case
from osp_shared.traces.compare import reason
from osp_shared.traces.metrics import Distance, distance, wide
from osp_tools.parity_run import capture_run
from osp_tools.trajectory import PART

TEST = '''"""One layer of {model}: {path}. See replay.json."""

from pathlib import Path

import pytest

from osp_tools.replay import backends, replay


@pytest.mark.parametrize("backend", backends())
def test_layer(backend):
    outcome = replay(Path(__file__).parent, backend)
    if outcome.fraction > 1:
        pytest.fail(f"{path}, {{outcome}}", pytrace=False)
'''


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Error of one replay; `fraction` is that of its bound."""

    backend: str
    error: Distance
    bound: float
    fraction: float

    def __str__(self) -> str:
        return f"{self.backend}: {reason(self.error, self.bound, self.fraction)}"


class Unsupported(Exception):
    """An argument that cannot be written down."""


def write_replay(folder: Path, case: Case, dtype: str, item: Result) -> Path:
    """Replay folder of the first blamed module's call, or of the nearest module around it whose arguments can be
    written. OspError when there is none."""
    blame = item.blames[0]
    path, call = blame.path.split("/")[0], blame.call
    if case.model == "dit-sampler":
        if path != PART and not path.startswith(PART + "."):
            raise OspError(f"no replay of {item.name}: the fault lies in the sampling loop, which is not a layer")
        path = path[len(PART) + 1 :]
    reference = importlib.import_module("osp_torch.capture")
    models = {name: reference.build(case, name) for name in (dtype, "float64")}
    known = dict(reference.modules(models[dtype]))
    while True:
        path = path if path in known else path.rpartition(".")[0]
        try:
            return _write(folder, case, dtype, models, path, call, blame.where)
        except Unsupported as error:
            if not path:
                raise OspError(f"no replay of {item.name}: {error}") from None
            path, call = path.rpartition(".")[0], 0


def _write(folder: Path, case: Case, dtype: str, models: dict, path: str, call: int, where: str) -> Path:
    reference = importlib.import_module("osp_torch.capture")
    args, kwargs = _grab(reference, case, dtype, models[dtype], path, call)
    if case.place.common_only and path and (kwargs or len(args) != 1):
        raise Unsupported(f"{path}: the library's module takes other arguments than ours")
    recorder = Recorder(case.header("torch", dtype), 1 << 62)
    plain = {"args": [_describe(reference, recorder, path, str(i), a) for i, a in enumerate(args)],
             "kwargs": {k: _describe(reference, recorder, path, k, a) for k, a in kwargs.items()}}  # fmt: skip
    traces = {name: _run(reference, case, name, model, path, plain, recorder.trace()) for name, model in models.items()}
    judged = compare(traces[dtype], traces[dtype], traces["float64"])
    rows = [row for row in judged.rows if row.record.path == "" and row.record.kind == "output"]
    for name, parameter in models[dtype].state_dict().items():
        if not path or name.startswith(path + "."):
            recorder.add(path, "param", reference.to_numpy(parameter), slot=name)
    for row in rows:
        slot = row.record.slot
        recorder.add(path, "output", traces["float64"].get("", "output", slot), slot=slot)
    recorder.trace().write(folder / "trace")
    content = {
        "model": case.model, "name": case.name, "config": dict(case.config), "dtype": dtype, "path": path,
        "call": call, "where": where, **plain,
        "bounds": {r.record.slot: {"rel_l2": r.bound.rel_l2, "max_abs": r.bound.max_abs} for r in rows},
    }  # fmt: skip
    (folder / "replay.json").write_text(json.dumps(content, indent=1, default=list) + "\n", encoding="utf-8")
    # Named after the folder: pytest takes no two files of one name.
    test = re.sub(r"\W", "_", f"test_{folder.name}") + ".py"
    (folder / test).write_text(TEST.format(model=case.name, path=path or "the model"), encoding="utf-8")
    return folder


def _run(capture, case: Case, dtype: str, model, path: str, plain: Mapping, arguments: Trace) -> Trace:
    """Trace of the module alone, on the arguments as they were written; its own record has the path ""."""
    module, method = _module(capture, model, case, path)
    backend = capture.__name__.split(".")[0].removeprefix("osp_")
    recorder = Recorder(case.header(backend, dtype), 1 << 62)
    args = [_restore(capture, arguments, path, p, dtype) for p in plain["args"]]
    kwargs = {k: _restore(capture, arguments, path, p, dtype) for k, p in plain["kwargs"].items()}
    # A library's own tree has no kernels to tap: then the modules' first results are all there is.
    only = None if case.place.kernels else {name for name, _ in capture.modules(module)}
    tapped = capture.tapped(module, recorder, only=only, with_kernels=case.place.kernels, entry=method)
    with tapped, capture.no_gradients():
        getattr(module, method)(*args, **kwargs)
    return recorder.trace()


def _module(capture, model, case: Case, path: str):
    """The module at `path` and the name of the method that is its forward pass."""
    module = dict(capture.modules(model))[path]
    if not path and case.place.entry:
        return module, case.place.entry
    return module, "forward" if hasattr(module, "forward") else "construct"


def _grab(capture, case: Case, dtype: str, model, path: str, call: int) -> tuple[tuple, dict]:
    """Arguments of one of the module's calls in a free run."""
    module, method = _module(capture, model, case, path)
    seen: list[tuple] = []
    original = getattr(module, method)

    def spy(*args, **kwargs):
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    module.__dict__[method] = spy
    try:
        capture_run(capture, case, dtype, model, only=set())
    finally:
        module.__dict__.pop(method, None)
    if call >= len(seen):
        raise Unsupported(f"{path or 'the model'} is called {len(seen)} times, not {call + 1}")
    return seen[call]


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


def backends() -> list[str]:
    """OSP_BACKEND, or those that are installed."""
    if wanted := os.environ.get("OSP_BACKEND"):
        return [wanted]
    return [name for name in ("torch", "mindspore") if importlib.util.find_spec(name) is not None]


def replay(folder: Path, backend: str) -> Outcome:
    """Run the folder's layer on a backend; only the layer's own weights are needed, the others are zeros."""
    content = read_object(folder / "replay.json")
    trace = read_trace(folder / "trace")
    capture = importlib.import_module(f"osp_{backend}.capture")
    path, dtype = content["path"], content["dtype"]
    weights = {r.slot: trace.value(r) for r in trace.records if r.kind == "param"}
    case = Case(content["name"], content["model"], content["config"], {})
    shapes = case.spec().parameters()

    def read(name: str) -> np.ndarray:
        return np.array(weights[name]) if name in weights else np.zeros(shapes[name], np.float32)

    model = capture.build(dataclasses.replace(case, read=read), dtype)
    outputs = _run(capture, case, dtype, model, path, content, trace)
    found = []
    for slot, allowed in content["bounds"].items():
        error = distance(outputs.get("", "output", slot), wide(trace.get(path, "output", slot)))
        fraction = Bound(**allowed, source="replay").fraction(error)
        found.append(Outcome(backend, error, allowed["rel_l2"], fraction))
    return max(found, key=lambda outcome: outcome.fraction)
