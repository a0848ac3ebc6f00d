"""Builds a model without filling it, then fills it from a checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch

from osp_shared.errors import OspError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}


def to_tensor(array: np.ndarray) -> torch.Tensor:
    """A tensor with the array's values; bfloat16 (ml_dtypes) by its bits. Shares memory where numpy allows it."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def build(
    model_class, spec, read: Callable[[str], np.ndarray | None], dtype: str = "fp32", keep_float32: tuple[str, ...] = ()
) -> torch.nn.Module:
    """The model of `spec` in eval mode, every entry of its state dict read and cast to `dtype`.

    read: state-dict name -> array; None for a constant that the checkpoint leaves out (`spec.optional()`), which then
    has its built-in value (`spec.constants()`).
    keep_float32: leaves of names (`wo.weight`) that stay float32 in half precision.

    Raises:
        OspError: a missing entry, or one of another shape.
    """
    with torch.device("meta"):
        model = model_class(spec)
    constants = spec.constants() if spec.optional() else {}
    for name, empty in model.state_dict().items():
        shape, array = tuple(empty.shape), read(name)
        array = constants.get(name) if array is None else array
        if array is None:
            raise OspError(f"{name}: missing from the checkpoint")
        if tuple(array.shape) != shape:
            raise OspError(f"{name}: the checkpoint holds {tuple(array.shape)}, the model needs {shape}")
        kept = dtype == "fp16" and any(name.endswith(leaf) for leaf in keep_float32)
        assign(model, name, to_tensor(array).to(torch.float32 if kept else DTYPES[dtype]))
    return model.eval()


def assign(model: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=owner._parameters[leaf].requires_grad)
    else:
        owner._buffers[leaf] = tensor
