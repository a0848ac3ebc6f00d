"""Runs a model whose weights do not fit: a part reads its weights when it is called, and drops them when it returns."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import numpy as np

from osp_mindspore.checkpoint import DTYPES, assign, to_tensor

import mindspore as ms
from mindspore import Parameter, nn
from mindspore.nn.utils import no_init_parameters


def stream(
    model_class, spec, parts: Iterable[str], read: Callable[[str], np.ndarray], dtype: str = "fp32",
    observe: Callable[[str, ms.Tensor], None] | None = None,
) -> nn.Cell:  # fmt: skip
    """The model of `spec` in inference mode; entries outside `parts` are read now and stay.

    parts: paths of subcells that are called once each in a forward pass. read: state-dict name -> array.
    observe: called with a part's path and output.
    """
    with no_init_parameters():
        model = model_class(spec)
    empty = dict(model.parameters_dict())
    rest, cells = set(empty), dict(model.cells_and_names())
    for path in parts:
        names = [name for name in empty if name.startswith(f"{path}.")]
        rest -= set(names)
        _watch(model, cells[path], path, names, empty, read, dtype, observe)
    for name in sorted(rest):
        assign(model, name, Parameter(to_tensor(read(name)).astype(DTYPES[dtype]), name=name))
    return model.set_train(False)


def _watch(model, part, path, names, empty, read, dtype, observe):
    def load(cell, inputs):
        for name in names:
            assign(model, name, Parameter(to_tensor(read(name)).astype(DTYPES[dtype]), name=name))

    def release(cell, inputs, output):
        for name in names:
            assign(model, name, empty[name])
        gc.collect()  # a Parameter is part of a cycle: without this, blocks pile up
        if observe is not None:
            observe(path, output)

    part.register_forward_pre_hook(load)
    part.register_forward_hook(release)
