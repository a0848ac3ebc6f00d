"""What a capture does at every module and kernel call; the same for both frameworks, which only supply arrays.

A tap wraps the forward method of every module and every function of a backend's `kernels`. On the way in it records the
arguments, on the way out the result. With a feed (a trace of the reference) it also *replaces* both by the reference's
values: then each module computes from exactly the reference's arguments and its parts' exact results, and every record
holds an error of one part's own arithmetic. One such run judges all parts at once; nothing is searched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from osp_shared.traces.format import DTYPES, Recorder, Trace

# Layers that are one kernel: their kernel call would be recorded twice.
SINGLE_KERNEL = {"Linear", "Conv2d", "Conv3d", "LayerNorm", "ChannelLayerNorm", "GroupNorm", "RMSNorm", "Embedding"}
# Containers and no-ops that only one framework calls.
SILENT = {"Dropout", "Identity", "ModuleList", "CellList", "Sequential", "SequentialCell"}


class CaptureFailed(RuntimeError):
    """A model raised while it was captured. `path`: the innermost module running; `trace`: what was recorded before."""

    def __init__(self, path: str, error: Exception, trace: Trace):
        text = str(error).strip().splitlines()
        super().__init__(f"{path or '(model)'}: {type(error).__name__}: {text[0] if text else ''}")
        self.path, self.trace = path, trace


@dataclass
class Frame:
    path: str
    type: str
    call: int
    after: str = ""


@dataclass(frozen=True)
class Arrays:
    """How a framework's tensors become arrays and come back in the dtype of the tensor they replace."""

    is_tensor: Callable[[object], bool]
    to_numpy: Callable[[object], np.ndarray]
    like: Callable[[np.ndarray, object], object]


class Tap:
    """Stack of running modules; records what passes, and replaces it when there is a feed."""

    def __init__(
        self, recorder: Recorder, arrays: Arrays, feed: Trace | None = None, step: int = -1, first_only: bool = False
    ):
        """first_only: first argument and first result alone, for modules whose other arguments differ by framework."""
        self.recorder, self.arrays, self.feed, self.step = recorder, arrays, feed, step
        self.first_only = first_only
        # Without kernel records, exponentials are part of the modules' own code.
        self.own_reduction = TRANSCENDENTAL if first_only else 1
        self.stack: list[Frame] = []
        self.calls: dict[str, int] = {}
        self.failed_in: str | None = None  # innermost module that was running when an exception passed

    def around(self, path: str, type: str, function: Callable, reduction: Callable | None = None) -> Callable:
        """`function` with its arguments and result tapped."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def tapped(*args, **kwargs):
            with self._frame(path, type) as (frame, parent):
                args, kwargs = self._arguments(frame, parent, signature, args, kwargs)
                length = reduction(args) if reduction is not None else 1
                output = function(*args, **kwargs)
                return self._result(frame, parent, output, length)

        return tapped

    def around_kernel(self, name: str, function: Callable) -> Callable:
        """A kernel becomes a part of the module that calls it, unless that module is nothing but this kernel."""

        @functools.wraps(function)
        def tapped(*args, **kwargs):
            if not self.stack or self.stack[-1].type in SINGLE_KERNEL or "/" in self.stack[-1].path:
                return function(*args, **kwargs)
            part = self.around(f"{self.stack[-1].path}/{name}", name, function, kernel_reduction(name))
            return part(*args, **kwargs)

        return tapped

    @contextmanager
    def _frame(self, path: str, type: str) -> Iterator[tuple[Frame, Frame | None]]:
        parent = self.stack[-1] if self.stack else None
        call = self.calls.get(path, 0)
        self.calls[path] = call + 1
        frame = Frame(path, type, call)
        self.stack.append(frame)
        try:
            yield frame, parent
        except Exception:
            if self.failed_in is None:
                self.failed_in = path
            raise
        finally:
            self.stack.pop()
        if parent is not None:
            parent.after = path + (f" call {call + 1}" if call else "")

    def _arguments(self, frame: Frame, parent: Frame | None, signature, args, kwargs):
        names = list(signature.parameters)
        place = {name: str(i) for i, name in enumerate(names)}
        new_args = [self._pass(frame, parent, "input", str(i), value) for i, value in enumerate(args)]
        new_kwargs = {k: self._pass(frame, parent, "input", place.get(k, k), v) for k, v in kwargs.items()}
        return tuple(new_args), new_kwargs

    def _result(self, frame: Frame, parent: Frame | None, output: object, reduction: int) -> object:
        return self._pass(frame, parent, "output", "0", output, reduction)

    def _pass(self, frame: Frame, parent: Frame | None, kind: str, slot: str, value: object, reduction: int = 1):
        """Record a value, or the tensors of a nested one; returns it, or what the feed puts in its place."""
        if isinstance(value, (tuple, list)):
            items = [
                self._pass(frame, parent, kind, slot if i == 0 else f"{slot}.{i}", item, reduction)
                for i, item in enumerate(value)
            ]
            return value if self.feed is None else type(value)(items)
        if isinstance(value, dict):
            for i, (key, item) in enumerate(list(value.items())):
                passed = self._pass(frame, parent, kind, slot if i == 0 else f"{slot}.{i}", item, reduction)
                if self.feed is not None:
                    value[key] = passed
            return value
        if not self.arrays.is_tensor(value) or (self.first_only and slot != "0"):
            return value
        array = self.arrays.to_numpy(value)
        after = frame.after if kind == "output" else (parent.after if parent else "")
        record = self.recorder.add(
            frame.path, kind, array, slot=slot, call=frame.call, step=self.step,
            reduction=max(reduction, self.own_reduction), type=frame.type,
            parent=parent.path if parent else "", after=after,
        )  # fmt: skip
        if self.feed is None:
            return value
        answer = self.feed.by_key.get((self.step, *record.key[1:])) or self.feed.by_key.get((-1, *record.key[1:]))
        if answer is None or answer.shape != record.shape:
            return value
        return self.arrays.like(self.feed.value(answer), value)


def join(prefix: str, path: str) -> str:
    return f"{prefix}.{path}" if prefix and path else prefix or path


def with_numpy(arrays: Arrays) -> Arrays:
    """The same for code that handles numpy arrays beside a framework's tensors."""
    return Arrays(
        lambda value: isinstance(value, np.ndarray) or arrays.is_tensor(value),
        lambda value: value if isinstance(value, np.ndarray) else arrays.to_numpy(value),
        lambda array, old: array.astype(old.dtype) if isinstance(old, np.ndarray) else arrays.like(array, old),
    )


def rounded(trace: Trace, dtype: str) -> Trace:
    """A copy of a trace whose floating values are rounded to `dtype`: what every side of a forced run is fed with."""
    target = DTYPES[dtype][1]

    def convert(value: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return value.astype(target).astype(value.dtype) if value.dtype.kind in "fV" else value

    return Trace(trace.header, trace.records, {r.tensor: convert(trace.value(r)) for r in trace.records}, trace.source)


def weight_reduction(type: str, weight_shape: tuple[int, ...] | None) -> Callable | None:
    """Length of the longest sum in a layer, from its weight; group norm sums over positions as well."""
    if weight_shape is None or type == "Embedding":
        return None
    if type == "GroupNorm":
        return lambda args: int(np.prod(args[0].shape[1:]))
    length = int(np.prod(weight_shape[1:])) if len(weight_shape) > 1 else weight_shape[0]
    return lambda args: length


# Vector libraries compute exp, tanh and erf by short polynomials, off by up to sixteen unit round-offs where libm is
# off by one (MindSpore's CPU sigmoid: 3e-7 root mean square, 8e-7 at most). A sum of 4096 terms costs as much.
TRANSCENDENTAL = 4096


def kernel_reduction(name: str) -> Callable | None:
    """Length of the longest sum in a kernel, from its arguments."""
    if name == "attention":
        return lambda args: max(args[0].shape[-1], args[1].shape[-2], TRANSCENDENTAL)
    if name in ("exp", "gelu_erf", "gelu_tanh", "silu"):
        return lambda args: TRANSCENDENTAL
    if name in ("linear", "conv2d", "conv3d"):
        return lambda args: int(np.prod(args[1].shape[1:]))
    if name == "softmax":
        return lambda args: max(args[0].shape[-1], TRANSCENDENTAL)
    if name in ("layer_norm", "rms_norm"):
        return lambda args: args[0].shape[-1]
    if name == "channel_layer_norm":
        return lambda args: args[0].shape[1]
    if name == "group_norm":
        return lambda args: int(np.prod(args[0].shape[1:]))
    return None
