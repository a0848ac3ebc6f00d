"""Records every cell and kernel of a MindSpore model into a trace. Watching changes nothing: no value is touched."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np

from osp_mindspore import kernels
from osp_mindspore.checkpoint import to_tensor
from osp_shared.traces.format import Recorder, Trace
from osp_shared.traces.tap import SILENT, Arrays, Tap, weight_reduction

import mindspore as ms
from mindspore import nn

KERNELS = (
    "attention", "channel_layer_norm", "conv2d", "conv3d", "embedding", "gelu_erf", "gelu_tanh", "group_norm",
    "layer_norm", "linear", "rms_norm", "silu", "softmax", "upsample_linear", "upsample_nearest2d",
)  # fmt: skip


def is_tensor(value: object) -> bool:
    return isinstance(value, ms.Tensor)


def to_numpy(tensor: ms.Tensor) -> np.ndarray:
    """The values in their own dtype; bfloat16 as ml_dtypes.bfloat16. A copy: asnumpy shares memory."""
    if tensor.dtype == ms.bfloat16:
        return tensor.astype(ms.float32).asnumpy().astype(ml_dtypes.bfloat16)
    return tensor.asnumpy().copy()


def like(array: np.ndarray, tensor: ms.Tensor) -> ms.Tensor:
    """`array` as a tensor of the same dtype as `tensor`."""
    return to_tensor(np.array(array)).astype(tensor.dtype)


ARRAYS = Arrays(is_tensor, to_numpy, like)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "numpy": np.__version__, "mindspore": ms.__version__}


def modules(model: nn.Cell) -> list[tuple[str, nn.Cell]]:
    return list(model.cells_and_names())


@contextmanager
def tapped(model: nn.Cell, recorder: Recorder, *, feed: Trace | None = None, step: int = -1,
           only: set[str] | None = None, with_kernels: bool = True) -> Iterator[Tap]:  # fmt: skip
    """Tap every cell (those named in `only`, when given) and kernel of `model` inside the block."""
    tap = Tap(recorder, ARRAYS, feed, step)
    originals = {name: getattr(kernels, name) for name in KERNELS} if with_kernels else {}
    watched = []
    try:
        for path, cell in modules(model):
            if type(cell).__name__ in SILENT or (only is not None and path not in only):
                continue
            weight = getattr(cell, "weight", None)
            shape = tuple(weight.shape) if is_tensor(weight) else None
            kind = type(cell).__name__
            watched.append(cell)
            cell.__dict__["construct"] = tap.around(path, kind, cell.construct, weight_reduction(kind, shape))
        for name, function in originals.items():
            setattr(kernels, name, tap.around_kernel(name, function))
        yield tap
    finally:
        for cell in watched:
            cell.__dict__.pop("construct", None)
        for name, function in originals.items():
            setattr(kernels, name, function)


def gradients(model: nn.Cell, loss: Callable[[], ms.Tensor]) -> dict[str, np.ndarray]:
    """Gradient of a scalar with respect to every trainable parameter, by name."""
    named = [(name, p) for name, p in model.parameters_and_names() if p.requires_grad]
    found = ms.value_and_grad(loss, None, ms.ParameterTuple([p for _, p in named]))()[1]
    return {name: to_numpy(g) for (name, _), g in zip(named, found, strict=True)}
