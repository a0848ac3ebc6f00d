"""Records every module and kernel of a PyTorch model into a trace. Watching changes nothing: no value is touched."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import torch

from osp_shared.traces.format import Recorder, Trace
from osp_shared.traces.tap import SILENT, Arrays, Tap, weight_reduction
from osp_torch import kernels
from osp_torch.checkpoint import to_tensor

KERNELS = (
    "attention", "channel_layer_norm", "conv2d", "conv3d", "embedding", "gelu_erf", "gelu_tanh", "group_norm",
    "layer_norm", "linear", "rms_norm", "silu", "softmax", "upsample_linear", "upsample_nearest2d",
)  # fmt: skip


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The values in their own dtype; bfloat16 as ml_dtypes.bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def like(array: np.ndarray, tensor: torch.Tensor) -> torch.Tensor:
    """`array` as a tensor of the same dtype and device as `tensor`."""
    return to_tensor(np.array(array)).to(dtype=tensor.dtype, device=tensor.device)


ARRAYS = Arrays(is_tensor, to_numpy, like)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}


def modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    return list(model.named_modules())


@contextmanager
def tapped(model: torch.nn.Module, recorder: Recorder, *, feed: Trace | None = None, step: int = -1,
           only: set[str] | None = None, with_kernels: bool = True) -> Iterator[Tap]:  # fmt: skip
    """Tap every module (those named in `only`, when given) and kernel of `model` inside the block."""
    tap = Tap(recorder, ARRAYS, feed, step)
    originals = {name: getattr(kernels, name) for name in KERNELS} if with_kernels else {}
    watched = []
    try:
        for path, module in modules(model):
            if type(module).__name__ in SILENT or (only is not None and path not in only):
                continue
            weight = getattr(module, "weight", None)
            shape = tuple(weight.shape) if is_tensor(weight) else None
            kind = type(module).__name__
            watched.append(module)
            module.__dict__["forward"] = tap.around(path, kind, module.forward, weight_reduction(kind, shape))
        for name, function in originals.items():
            setattr(kernels, name, tap.around_kernel(name, function))
        yield tap
    finally:
        for module in watched:
            module.__dict__.pop("forward", None)
        for name, function in originals.items():
            setattr(kernels, name, function)


def gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, np.ndarray]:
    """Gradient of a scalar with respect to every trainable parameter it depends on, by name."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(), [p for _, p in named], allow_unused=True)
    return {name: to_numpy(g) for (name, _), g in zip(named, found, strict=True) if g is not None}
