"""Builds a model without filling it, then fills it from a checkpoint, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from osp_shared.errors import OspError

import mindspore as ms
from mindspore import Parameter, nn
from mindspore.nn.utils import no_init_parameters

DTYPES = {"fp32": ms.float32, "fp16": ms.float16, "bf16": ms.bfloat16}


def to_tensor(array: np.ndarray) -> ms.Tensor:
    """A tensor with the array's values; bfloat16 (ml_dtypes) by its bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return ms.Tensor(np.ascontiguousarray(array).view(np.int16)).view(ms.bfloat16)
    return ms.Tensor(np.ascontiguousarray(array))


def build(
    model_class, spec, read: Callable[[str], np.ndarray | None], dtype: str = "fp32", keep_float32: tuple[str, ...] = ()
) -> nn.Cell:
    """The model of `spec` in inference mode, every entry of its state dict read and cast to `dtype`.

    read: state-dict name -> array; None for a constant that the checkpoint leaves out (`spec.optional()`), which then
    has its built-in value (`spec.constants()`).
    keep_float32: leaves of names (`wo.weight`) that stay float32 in half precision.

    Raises:
        OspError: a missing entry, or one of another shape.
    """
    with no_init_parameters():
        model = model_class(spec)
    constants = spec.constants() if spec.optional() else {}
    for name, parameter in list(model.parameters_dict().items()):
        array = read(name)
        array = constants.get(name) if array is None else array
        if array is None:
            raise OspError(f"{name}: missing from the checkpoint")
        kept = dtype == "fp16" and any(name.endswith(leaf) for leaf in keep_float32)
        target = ms.float32 if kept else DTYPES[dtype]
        shape, trained = tuple(parameter.shape), parameter.requires_grad
        if tuple(array.shape) != shape:
            raise OspError(f"{name}: the checkpoint holds {tuple(array.shape)}, the model needs {shape}")
        assign(model, name, Parameter(to_tensor(array).astype(target), name=name, requires_grad=trained))
    return model.set_train(False)


def assign(model: nn.Cell, name: str, parameter: Parameter) -> None:
    """Put a parameter of any dtype in place: `set_data` would cast it to the old one's."""
    owner = model
    *path, leaf = name.split(".")
    for part in path:
        owner = owner._cells[part]
    owner._params[leaf] = parameter
