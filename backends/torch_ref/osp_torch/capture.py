"""Records every module and kernel of a PyTorch model into a trace. Watching changes nothing: no value is touched."""

from __future__ import annotations

import importlib
import inspect
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import torch

from osp_shared import fill
from osp_shared.errors import OspError
from osp_shared.traces.cases import SHORT, Case
from osp_shared.traces.format import FULL_LIMIT, Recorder, Trace
from osp_shared.traces.tap import SILENT, Arrays, CaptureFailed, Tap, join, weight_reduction
from osp_torch import checkpoint, kernels
from osp_torch.checkpoint import to_tensor


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


def kernel_functions() -> dict[str, Callable]:
    """Public functions of the backend's `kernels`, whose calls become parts of the modules that make them."""
    return {
        name: f for name, f in vars(kernels).items()
        if inspect.isfunction(f) and not name.startswith("_") and name != "raised"
    }  # fmt: skip


@contextmanager
def tapped(model: torch.nn.Module, recorder: Recorder, *, feed: Trace | None = None, step: int = -1,
           only: set[str] | None = None, with_kernels: bool = True, entry: str = "", prefix: str = "",
           arrays: Arrays = ARRAYS) -> Iterator[Tap]:  # fmt: skip
    """Tap every module (those named in `only`, when given) and kernel of `model` inside the block.

    entry: the method that is the model's own record, when it is not the forward pass. prefix: put before every path,
    for a model that is a part of something larger.
    """
    tap = Tap(recorder, arrays, feed, step, first_only=only is not None)
    originals = kernel_functions() if with_kernels else {}
    watched = []
    try:
        for path, module in modules(model):
            if type(module).__name__ in SILENT or (only is not None and path not in only):
                continue
            weight = getattr(module, "weight", None)
            shape = tuple(weight.shape) if is_tensor(weight) else None
            kind, method = type(module).__name__, entry if entry and not path else "forward"
            watched.append((module, method))
            length = weight_reduction(kind, shape)
            module.__dict__[method] = tap.around(join(prefix, path), kind, getattr(module, method), length)
        for name, function in originals.items():
            setattr(kernels, name, tap.around_kernel(name, function))
        yield tap
    finally:
        for module, method in watched:
            module.__dict__.pop(method, None)
        for name, function in originals.items():
            setattr(kernels, name, function)


def gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, np.ndarray]:
    """Gradient of a scalar with respect to every trainable parameter, by name; zeros where it does not depend on it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(), [p for _, p in named], allow_unused=True)
    return {name: to_numpy(torch.zeros_like(p) if g is None else g) for (name, p), g in zip(named, found, strict=True)}


def build(case: Case, dtype: str) -> torch.nn.Module:
    """The case's model with its weights in `dtype` (float64, float32, ...)."""
    place = case.place
    module = importlib.import_module(f"osp_torch.{place.module}")
    if SHORT.get(dtype) not in checkpoint.DTYPES:
        known = ", ".join(long for long, short in SHORT.items() if short in checkpoint.DTYPES)
        raise OspError(f"dtype {dtype}: this backend runs {known}")
    kept = getattr(module, "KEEP_FLOAT32", ())
    return checkpoint.build(getattr(module, place.cls), case.spec(), case.reader(), SHORT[dtype], kept)


def arguments(case: Case, dtype: str) -> list:
    """The case's inputs as tensors; floating ones in `dtype`."""

    def convert(name: str, value: np.ndarray):
        return to_tensor(value) if value.dtype.kind != "f" or name in case.exact else tensor(value, dtype)

    return [None if value is None else convert(name, value) for name, value in case.inputs.items()]


def tensor(array: np.ndarray, dtype: str) -> torch.Tensor:
    """Floating values as a tensor of `dtype` (float64, float32, ...)."""
    return to_tensor(np.ascontiguousarray(array)).to(checkpoint.DTYPES[SHORT[dtype]])


def no_gradients():
    """Context in which nothing is kept for a backward pass."""
    return torch.no_grad()


def run_case(
    case: Case, dtype: str, *, feed: Trace | None = None, model: torch.nn.Module | None = None, backward: bool = False,
    only: set[str] | None = None, with_kernels: bool | None = None, full_limit: int = FULL_LIMIT,
) -> Trace:  # fmt: skip
    """Trace of one run: free, or forced by a `feed`; with `backward`, the parameters' gradients of a fixed projection.

    Raises:
        CaptureFailed: the model raised; it names the innermost module that was running.
    """
    model = model if model is not None else build(case, dtype)
    extra = {"mode": "forced", "reference": feed.fingerprint()} if feed is not None else {}
    passes = "backward" if backward else "forward"
    header = case.header("torch", dtype, versions=versions(), passes=passes, **extra)
    recorder = Recorder(header, full_limit)
    place = case.place
    use_kernels = place.kernels if with_kernels is None else with_kernels
    given = arguments(case, dtype)
    with tapped(model, recorder, feed=feed, only=only, with_kernels=use_kernels, entry=place.entry) as tap:
        try:
            call = getattr(model, place.entry) if place.entry else model
            if backward:
                grads = gradients(model, lambda: project(call(*given, **case.options)))
            else:
                with torch.no_grad():
                    call(*given, **case.options)
                grads = {}
        except Exception as error:
            raise CaptureFailed(tap.failed_in or "", error, recorder.trace()) from error
    for name, value in grads.items():
        path, _, leaf = name.rpartition(".")
        recorder.add(path, "param_grad", value, slot=leaf, reduction=value.size)
    return recorder.trace()


def project(output: torch.Tensor) -> torch.Tensor:
    """A scalar of the output: its inner product with fixed pseudo-random numbers, so every value has a gradient."""
    probe = like(fill.input_tensor("probe", tuple(output.shape)), output)
    return (output * probe).sum()
