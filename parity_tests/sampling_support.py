"""Helpers of the sampler and pipeline tests: golden records, and one face for the arrays of three libraries."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from osp_shared.fill import input_tensor

NUMPY_TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
UNIT = 2.0**-24  # unit round-off of float32
HALF_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def sample_indices(count: int) -> list[int]:
    """Flat indices of the eight samples that a golden record holds."""
    return [int(np.floor((j + 1) * 0.6180339887498949 % 1 * count)) for j in range(8)]


def samples(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64).ravel()[sample_indices(x.size)]


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def largest(x: np.ndarray) -> float:
    return float(np.abs(x.astype(np.float64)).max())


def check_record(record: list, x: np.ndarray, tolerance: float, what: str = "") -> None:
    """A golden record [name, shape, mean, std, l2, samples] against an array.

    `tolerance` is relative to the array's root mean square for the mean, deviation and samples, and to l2 itself.
    """
    name, shape, mean, std, l2, values = record
    what = what or name
    assert list(x.shape) == list(shape), f"{what}: shape {x.shape}, golden {shape}"
    wide = x.astype(np.float64)
    scale = max(l2 / np.sqrt(x.size), 1e-30)
    # 5e-9: the golden's numbers are printed with nine digits
    assert abs(wide.mean() - mean) <= tolerance * scale + 5e-9 * abs(mean), f"{what}: mean {wide.mean()}, golden {mean}"
    assert abs(wide.std() - std) <= tolerance * scale + 5e-9 * std, f"{what}: std {wide.std()}, golden {std}"
    assert abs(norm(x) - l2) <= (tolerance + 5e-9) * l2, f"{what}: l2 {norm(x)}, golden {l2}"
    bound = tolerance * np.maximum(scale, np.abs(values)) + 5e-9 * np.abs(values)
    assert (np.abs(samples(x) - values) <= bound).all(), f"{what}: {samples(x)}, golden {values}"


class Arrays:
    """numpy, torch or MindSpore arrays of one float type, made from and turned into numpy."""

    def __init__(self, library: str, dtype: str):
        self.library, self.dtype = library, dtype
        if library == "torch":
            import torch

            self.module = torch
        elif library == "mindspore":
            import osp_mindspore  # noqa: F401  (sets MindSpore up)

            import mindspore

            self.module = mindspore

    def of(self, x: np.ndarray):
        """float32 numpy to this type, rounded."""
        if self.library == "numpy":
            return x.astype(NUMPY_TYPES[self.dtype])
        if self.library == "torch":
            return self.module.from_numpy(np.ascontiguousarray(x)).to(getattr(self.module, self.dtype))
        return self.module.Tensor(x).astype(getattr(self.module, self.dtype))

    def numpy(self, x) -> np.ndarray:
        """Back to numpy; float32 holds every half-precision value."""
        assert self.dtype in str(x.dtype).lower(), f"{x.dtype} instead of {self.dtype}"
        if self.library == "numpy":
            return x.astype(np.float32)
        return x.float().numpy() if self.library == "torch" else x.float().asnumpy()


def tagged(tag: str, shape) -> np.ndarray:
    return input_tensor(tag, tuple(shape))
