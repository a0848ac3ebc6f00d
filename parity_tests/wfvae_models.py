"""WFVAE of both backends with deterministic weights, their outputs layer by layer, and what error they may show.

Truth is the torch reference in float64. What float32 arithmetic costs on the same weights and inputs is measured on
the torch reference in float32; a candidate may err a few times as much.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache

import numpy as np

from osp_shared import fill
from osp_shared.specs.wfvae import WFVAESpec

BACKENDS = ("torch", "mindspore")
FACTOR = 4.0  # two correct float32 implementations: each errs like the reference, order of summation differs
UNIT = float(np.finfo(np.float32).eps) / 2  # round-off of one float32 operation
FLOOR = 8.0  # operations whose rounding no measurement may fall below (a short sum can be exact by luck)


def reader(spec: WFVAESpec, salt: str = ""):
    """Filled parameters by name; Haar constants are absent and keep their built-in values."""
    shapes, constants = spec.parameters(), spec.optional()
    return lambda name: None if name in constants else fill.parameter(name, shapes[name], salt)


class TorchVAE:
    """numpy in, numpy out."""

    def __init__(self, spec: WFVAESpec, salt: str = "", dtype: str = "fp32"):
        from osp_torch import checkpoint
        from osp_torch.wfvae import WFVAEModel

        self.model = checkpoint.build(WFVAEModel, spec, reader(spec, salt), dtype)
        self.dtype = checkpoint.DTYPES[dtype]

    def tensor(self, array):
        import torch

        return torch.from_numpy(np.array(array)).to(self.dtype)

    @staticmethod
    def array(tensor) -> np.ndarray:
        import torch

        return (tensor if tensor.dtype == torch.float64 else tensor.float()).detach().numpy()

    @contextmanager
    def no_grad(self):
        import torch

        with torch.no_grad():
            yield

    @contextmanager
    def record(self, paths=None):
        """Outputs of every module, or of those named, as {path: [one array a call]}."""
        outputs: dict[str, list[np.ndarray]] = {}
        handles = []
        for path, module in self.model.named_modules():
            if path and (paths is None or path in paths):
                handles.append(module.register_forward_hook(_hook(outputs, path, self.array)))
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


class MindSporeVAE:
    """numpy in, numpy out, on the device in force."""

    def __init__(self, spec: WFVAESpec, salt: str = "", dtype: str = "fp32"):
        from osp_mindspore import checkpoint
        from osp_mindspore.wfvae import WFVAEModel

        self.model = checkpoint.build(WFVAEModel, spec, reader(spec, salt), dtype)
        self.dtype = checkpoint.DTYPES[dtype]

    def tensor(self, array):
        from mindspore import Tensor

        return Tensor(np.array(array, np.float32)).astype(self.dtype)

    @staticmethod
    def array(tensor) -> np.ndarray:
        return tensor.float().asnumpy()

    @contextmanager
    def no_grad(self):
        yield  # nothing is taped outside value_and_grad

    @contextmanager
    def record(self, paths=None):
        """Outputs of every cell, or of those named, as {path: [one array a call]}."""
        outputs: dict[str, list[np.ndarray]] = {}
        handles = []
        for path, cell in self.model.cells_and_names():
            if path and (paths is None or path in paths):
                handles.append(cell.register_forward_hook(_hook(outputs, path, self.array)))
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()


def _hook(outputs, path, array):
    def keep(module, inputs, output):
        if not isinstance(output, tuple):
            outputs.setdefault(path, []).append(np.array(array(output)))

    return keep


@cache
def build(backend: str, spec: WFVAESpec, salt: str = "", dtype: str = "fp32"):
    """backend: torch, mindspore, or truth (torch in float64)."""
    if backend == "mindspore":
        return MindSporeVAE(spec, salt, dtype)
    return TorchVAE(spec, salt, "fp64" if backend == "truth" else dtype)


def frames_unfolded(array: np.ndarray, batch: int) -> np.ndarray:
    """(B T, C, H, W) -> (B, C, T, H, W); five axes stay."""
    if array.ndim != 4:
        return array
    return array.reshape(batch, -1, *array.shape[1:]).swapaxes(1, 2)


class Allowance:
    """How far a candidate's tensors may be from the truth, in the order in which a model computes them.

    The reference's own float32 error is taken relative to each tensor's spread, and the largest seen so far counts:
    errors travel on, and one small tensor may be exact by luck. A tensor that is rounding alone (the gradient of a
    key's bias is zero: softmax does not see it) is judged by its own error and says nothing about the others.
    """

    ROUNDING = 0.01  # an error of this part of the spread: there is no signal

    def __init__(self):
        self.relative = 0.0

    def __call__(self, truth: np.ndarray, reference: np.ndarray) -> float:
        spread = float(truth.std()) or float(np.abs(truth).max())
        error = float(np.abs(reference - truth).max())
        floor = FLOOR * UNIT * float(np.abs(truth).max())
        if error > self.ROUNDING * spread:
            return FACTOR * error + floor
        self.relative = max(self.relative, error / spread) if spread else self.relative
        return FACTOR * self.relative * spread + floor
