"""Runs a model whose weights do not fit: a part reads its weights when it is called, and drops them when it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch

from osp_torch.checkpoint import DTYPES, assign, to_tensor


def stream(
    model_class, spec, parts: Iterable[str], read: Callable[[str], np.ndarray], dtype: str = "fp32",
    observe: Callable[[str, torch.Tensor], None] | None = None,
) -> torch.nn.Module:  # fmt: skip
    """The model of `spec` in eval mode, for inference; entries outside `parts` are read now and stay.

    parts: paths of submodules that are called once each in a forward pass. read: state-dict name -> array.
    observe: called with a part's path and output.
    """
    with torch.device("meta"):
        model = model_class(spec)
    empty = dict(model.state_dict())
    rest = set(empty)
    for path in parts:
        names = [name for name in empty if name.startswith(f"{path}.")]
        rest -= set(names)
        _watch(model, path, names, empty, read, dtype, observe)
    for name in sorted(rest):
        assign(model, name, to_tensor(read(name)).to(DTYPES[dtype]))
    return model.eval()


def _watch(model, path, names, empty, read, dtype, observe):
    def load(module, inputs):
        for name in names:
            assign(model, name, to_tensor(read(name)).to(DTYPES[dtype]))

    def release(module, inputs, output):
        for name in names:
            assign(model, name, empty[name])
        if observe is not None:
            observe(path, output)

    part = model.get_submodule(path)
    part.register_forward_pre_hook(load)
    part.register_forward_hook(release)
