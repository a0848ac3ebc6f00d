"""`osp parity --full-size` at tiny size: a streamed model is the model, weights are dropped, faults and memory fail."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

import dit_models
from osp_shared import fill
from osp_tools import full_size


@pytest.mark.parametrize("backend", dit_models.BACKENDS)
def test_a_streamed_model_equals_the_loaded_one(backend):
    side, spec = dit_models.backend(backend), dit_models.tiny(True)
    package = {"torch": "osp_torch", "mindspore": "osp_mindspore"}[backend]
    streaming = importlib.import_module(f"{package}.streaming")
    shapes, seen, held = spec.parameters(), [], []
    parts = full_size.part_paths(spec)

    def read(name):
        held.append(name)
        return fill.parameter(name, shapes[name])

    model = streaming.stream(side.model.InpaintDiT, spec, parts, read, observe=lambda path, _: seen.append(path))
    assert held == ["scale_shift_table"]  # nothing else before the call
    arguments = dit_models.arguments(side, dit_models.inputs(spec, (2, 4, 6)))
    output = side.numpy(side.call(model, *arguments))
    assert np.array_equal(output, side.numpy(side.call(dit_models.build(side, spec), *arguments)))
    assert sorted(held) == sorted(shapes) and sorted(seen) == sorted(parts)
    kept = model.state_dict() if backend == "torch" else model.parameters_dict()
    held = {n for n, p in kept.items() if not (p.is_meta if backend == "torch" else p.has_init)}
    # MindSpore fills what a cell owns itself when it is first called; of a block that is one small table.
    own = {n for n in shapes if backend == "mindspore" and n.rpartition(".")[0] in parts}
    assert held <= own | {"scale_shift_table"}


def test_parity_of_every_part():
    lines = []
    assert full_size.full_size_parity(dit_models.tiny(), say=lines.append) == 0
    assert sum(line.startswith("transformer_blocks.") for line in lines) == 5 and "passed" in lines[-1]


def test_a_fault_and_too_much_memory_fail(monkeypatch):
    from osp_mindspore.dit import modules

    lines = []
    with monkeypatch.context() as patch:
        patch.setattr(full_size, "MEMORY_LIMIT", 0.01)
        assert full_size.full_size_parity(dit_models.tiny(), say=lines.append) == 1
    assert "FAILED" in lines[-1]
    merge = modules.merge
    monkeypatch.setattr(modules, "merge", lambda x, rule, N: merge(x, rule, N) * (1 + 1e-5))
    assert full_size.full_size_parity(dit_models.tiny(), say=lines.append) == 1
    assert "worst: transformer_blocks.0" in lines[-2] or float(lines[-2].split()[2]) > 1
