"""Crops, bilinear resampling and grey-level conversion of pictures and clips.

Shapes: every function works on the last two axes, height and width; whatever stands before them (channels, frames,
batch) is carried along. Sizes are pixels. "CenterCropResize", "MaxHWResize" and "SpatialStrideCrop" name the rules of
the Open-Sora Plan data pipeline that a function reproduces.

Resampling is separable: one small matrix an axis, built once for a pair of sizes. The matrices repeat the arithmetic
of the interpolation kernels of PyTorch, roundings included, so that both backends start from the pixels that the
original started from. The pair antialias + align_corners is unusual: `align_corners` there changes the scale alone,
(n_in - 1) / (n_out - 1), while the centres stay half-pixel, so the picture is very slightly magnified about its top
left corner. It is what the released weights were made with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from osp_shared.errors import OspError

# ---------------------------------------------------------------------------------------------------- crops and sizes


class Crop(NamedTuple):
    """A rectangle of a picture."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: np.ndarray) -> np.ndarray:
        """View of the rectangle in an array of shape (..., H, W)."""
        return x[..., self.top : self.top + self.height, self.left : self.left + self.width]


def center_crop(height: int, width: int, crop_height: int, crop_width: int) -> Crop:
    """Centred rectangle; odd margins go to the even side (round half to even), as torchvision's CenterCrop does."""
    if crop_height > height or crop_width > width:
        raise OspError(
            f"crop of {crop_height}x{crop_width} from a picture of {height}x{width} (height x width): "
            "it must not be larger than the picture"
        )
    return Crop(round((height - crop_height) / 2), round((width - crop_width) / 2), crop_height, crop_width)


def aspect_crop(height: int, width: int, target_height: int, target_width: int) -> Crop:
    """The largest centred rectangle of the target's aspect ratio (crop of CenterCropResize); sides truncate."""
    ratio = target_height / target_width
    crop_height, crop_width = (int(width * ratio), width) if height / width > ratio else (height, int(height / ratio))
    if not crop_height or not crop_width:
        raise OspError(
            f"picture of {height}x{width} (height x width) has no pixel left at the aspect ratio of "
            f"{target_height}x{target_width}: choose a size closer to the picture's own"
        )
    return center_crop(height, width, crop_height, crop_width)


def stride_crop(height: int, width: int, stride: int) -> Crop:
    """Centred rectangle whose sides are multiples of `stride` (SpatialStrideCrop); odd margins go bottom and right."""
    crop_height, crop_width = height // stride * stride, width // stride * stride
    if not crop_height or not crop_width:
        raise OspError(f"picture of {height}x{width} (height x width): both sides must be at least {stride} pixels")
    return Crop((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def max_area_size(height: int, width: int, max_hxw: int) -> tuple[int, int]:
    """(height, width) shrunk, never enlarged, to at most `max_hxw` pixels (MaxHWResize); sides truncate."""
    if height * width <= max_hxw:
        return height, width
    k = math.sqrt(max_hxw / (height * width))
    return int(height * k), int(width * k)


def short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) whose short side is `size` and whose long side truncates, as torchvision's Resize(int)."""
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def eval_short_side_size(height: int, width: int, size: int) -> tuple[int, int]:
    """The rule of the evaluation script: the same but for the order of its divisions, which can move a truncation."""
    aspect = width / height
    return (size, int(size * aspect)) if width > height else (int(size / aspect), size)


# ------------------------------------------------------------------------------------------------- matrices of an axis


@dataclass(frozen=True, eq=False)
class AxisResampler:
    """Weights from n_in samples to n_out: a band matrix, cut into blocks that skip most of the zeros.

    matrix: (n_out, n_in). blocks: (first output, end output, first input, end input) of each non-zero block.
    shift: None for real weights; for integer weights the right shift that ends the fixed-point sum.
    """

    matrix: np.ndarray
    blocks: tuple[tuple[int, int, int, int], ...]
    shift: int | None = None

    def along_width(self, x_HW: np.ndarray) -> np.ndarray:
        """(..., H, n_in) to (..., H, n_out)."""
        out = np.empty((*x_HW.shape[:-1], self.matrix.shape[0]), self.matrix.dtype)
        for o0, o1, i0, i1 in self.blocks:
            np.matmul(x_HW[..., i0:i1], self.matrix[o0:o1, i0:i1].T, out=out[..., o0:o1])
        return out

    def along_height(self, x_HW: np.ndarray) -> np.ndarray:
        """(..., n_in, W) to (..., n_out, W)."""
        out = np.empty((*x_HW.shape[:-2], self.matrix.shape[0], x_HW.shape[-1]), self.matrix.dtype)
        for o0, o1, i0, i1 in self.blocks:
            np.matmul(self.matrix[o0:o1, i0:i1], x_HW[..., i0:i1, :], out=out[..., o0:o1, :])
        return out


def _blocks(matrix: np.ndarray, size: int = 32) -> tuple[tuple[int, int, int, int], ...]:
    blocks = []
    for o0 in range(0, len(matrix), size):
        used = np.flatnonzero(matrix[o0 : o0 + size].any(axis=0))
        blocks.append((o0, min(o0 + size, len(matrix)), int(used[0]), int(used[-1]) + 1))
    return tuple(blocks)


def antialias_weights(n_in: int, n_out: int, align_corners: bool, real: type = np.float64) -> np.ndarray:
    """Triangle filter, as wide as one output sample (never narrower than one input sample): (n_out, n_in), rows sum 1.

    `real` is the library's working type: it rounds the scale, the centres and the filter's argument to it.
    """
    if align_corners:
        scale = real(n_in - 1) / real(n_out - 1) if n_out > 1 else real(0)
    else:
        scale = real(n_in) / real(n_out)
    support = max(scale, real(1))
    inverse = real(1) / support
    center = (float(scale) * (np.arange(n_out) + 0.5)).astype(real)
    lo = np.maximum(np.trunc((center - support).astype(np.float64) + 0.5), 0)
    hi = np.minimum(np.trunc((center + support).astype(np.float64) + 0.5), n_in)
    j = np.arange(n_in)
    distance = (j.astype(real) - center[:, None]).astype(np.float64) + 0.5
    weights = np.maximum(real(1) - np.abs((distance * float(inverse)).astype(real)), real(0))
    weights = np.where((j >= lo[:, None]) & (j < hi[:, None]), weights, real(0))
    return weights / weights.sum(axis=1, keepdims=True, dtype=real)


def half_pixel_weights(n_in: int, n_out: int) -> np.ndarray:
    """Plain bilinear, two taps at half-pixel positions, clamped at the edges: float32 (n_out, n_in)."""
    scale = np.float32(n_in) / np.float32(n_out)
    # one rounding, as the library's fused multiply-add
    position = np.maximum((float(scale) * (np.arange(n_out) + 0.5) - 0.5).astype(np.float32), 0)
    first = np.minimum(position.astype(np.int64), n_in - 1)
    fraction = np.clip(position - first.astype(np.float32), 0, 1).astype(np.float32)
    weights = np.zeros((n_out, n_in), np.float32)
    rows = np.arange(n_out)
    np.add.at(weights, (rows, first), 1 - fraction)
    np.add.at(weights, (rows, np.minimum(first + 1, n_in - 1)), fraction)
    return weights


@lru_cache(maxsize=64)
def _real_axis(n_in: int, n_out: int, antialias: bool, align_corners: bool) -> AxisResampler:
    if antialias:
        matrix = antialias_weights(n_in, n_out, align_corners, np.float32)
    elif align_corners:
        raise NotImplementedError("corner-aligned resampling without antialias is used nowhere in Open-Sora Plan")
    else:
        matrix = half_pixel_weights(n_in, n_out)
    return AxisResampler(matrix, _blocks(matrix))


@lru_cache(maxsize=64)
def _integer_axis(n_in: int, n_out: int) -> AxisResampler:
    """Fixed-point weights: as many bits as keep the largest below 2**15, rounded half up."""
    real = antialias_weights(n_in, n_out, align_corners=True)
    largest = real.max()
    shift = 0
    while shift < 22 and int(0.5 + largest * (1 << (shift + 1))) < 1 << 15:
        shift += 1
    matrix = np.floor(real * (1 << shift) + 0.5)
    return AxisResampler(matrix, _blocks(matrix), shift)


# -------------------------------------------------------------------------------------------------------- resampling


def _planes(x_HW: np.ndarray, height: int, width: int, dtype: type, one) -> np.ndarray:
    """Applies `one` to each plane in turn: one intermediate is alive at a time, and no layout changes a rounding."""
    if not height or not width or not x_HW.size:
        raise OspError(f"resize of {x_HW.shape[-2]}x{x_HW.shape[-1]} to {height}x{width}: sizes must be at least 1")
    out = np.empty((*x_HW.shape[:-2], height, width), dtype)
    for index in np.ndindex(*x_HW.shape[:-2]):
        out[index] = one(np.ascontiguousarray(x_HW[index]))
    return out


def resize_bilinear(
    x_HW: np.ndarray, height: int, width: int, *, antialias: bool = True, align_corners: bool = True
) -> np.ndarray:
    """Floating point pictures (..., H, W) to float32 (..., height, width).

    The default pair is the resize of CenterCropResize, of the reconstruction and of the evaluation scripts.
    antialias=False, align_corners=False is torchvision 0.16's Resize of a tensor; antialias=True, align_corners=False
    is what newer torchvision does. Equal sizes give the same values.
    """
    x_HW = np.asarray(x_HW, np.float32)
    n_h, n_w = x_HW.shape[-2:]

    def one(plane: np.ndarray) -> np.ndarray:
        if n_w != width:
            plane = _real_axis(n_w, width, antialias, align_corners).along_width(plane)
        if n_h != height:
            plane = _real_axis(n_h, height, antialias, align_corners).along_height(plane)
        return plane

    return _planes(x_HW, height, width, np.float32, one)


def resize_bilinear_uint8(x_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 pictures (..., H, W) to uint8 (..., height, width), antialias + align_corners.

    Fixed-point arithmetic of the library's byte kernel: columns first, rounded to uint8, then rows, rounded again.
    """
    if x_HW.dtype != np.uint8:
        raise TypeError(f"resize_bilinear_uint8 takes uint8 pictures, got {x_HW.dtype}")
    n_h, n_w = x_HW.shape[-2:]

    def rounded(sums: np.ndarray, axis: AxisResampler) -> np.ndarray:
        # float64 holds these integers exactly; ldexp is the shift
        return np.clip(np.floor(np.ldexp(sums + (1 << axis.shift) // 2, -axis.shift)), 0, 255).astype(np.uint8)

    def one(plane: np.ndarray) -> np.ndarray:
        if n_w != width:
            axis = _integer_axis(n_w, width)
            plane = rounded(axis.along_width(plane.astype(np.float64)), axis)
        if n_h != height:
            axis = _integer_axis(n_h, height)
            plane = rounded(axis.along_height(plane.astype(np.float64)), axis)
        return plane

    return _planes(x_HW, height, width, np.uint8, one)


def center_crop_resize(x_HW: np.ndarray, height: int, width: int) -> np.ndarray:
    """CenterCropResize: crop to the target's aspect ratio, then resize to exactly (height, width).

    uint8 stays uint8 (the byte kernel), anything else becomes float32.
    """
    cropped = aspect_crop(*x_HW.shape[-2:], height, width).of(x_HW)
    resize = resize_bilinear_uint8 if x_HW.dtype == np.uint8 else resize_bilinear
    return resize(cropped, height, width)


# -------------------------------------------------------------------------------------------------------- grey levels


def normalise(x: np.ndarray) -> np.ndarray:
    """uint8, or floats in [0, 1], to float32 in [-1, 1]: x / 255 for bytes, then 2 x - 1."""
    unit = x.astype(np.float32) / np.float32(255) if x.dtype == np.uint8 else np.asarray(x, np.float32)
    return unit * np.float32(2) - np.float32(1)


@lru_cache(maxsize=2)
def _half_table(dtype: str) -> np.ndarray:
    """uint8 of each of the 65,536 half-precision values, every step rounded to the half type."""
    half = np.dtype(np.float16) if dtype == "fp16" else _bfloat16()
    with np.errstate(all="ignore"):
        x = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(half)
        x = np.where(np.isnan(x), half.type(-1), x)
        unit = np.clip((x / half.type(2) + half.type(0.5)).astype(np.float32), 0, 1).astype(half)
        return (unit * half.type(255)).astype(np.float32).astype(np.uint8)


def _bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def to_uint8(x: np.ndarray, dtype: str = "fp32") -> np.ndarray:
    """Model output, nominally in [-1, 1], to grey levels: clamp(x / 2 + 1/2, 0, 1) * 255, truncated, not rounded.

    `dtype` (fp32, fp16, bf16) is the type the autoencoder ran in: each step is rounded to it, as the original computes
    in it. NaN becomes 0. Any shape; works on one leading index at a time.
    """
    if dtype not in ("fp32", "fp16", "bf16"):
        raise OspError(f"dtype {dtype!r} of the pictures: must be fp32, fp16 or bf16")
    out = np.empty(x.shape, np.uint8)
    for source, target in zip(x, out, strict=True) if x.ndim > 2 else [(x, out)]:
        if dtype == "fp32":
            unit = np.clip(source.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1)
            np.multiply(np.nan_to_num(unit, copy=False), np.float32(255), out=unit)
            target[...] = unit.astype(np.uint8)
        else:
            half = np.dtype(np.float16) if dtype == "fp16" else _bfloat16()
            target[...] = _half_table(dtype)[source.astype(half).view(np.uint16)]
    return out
