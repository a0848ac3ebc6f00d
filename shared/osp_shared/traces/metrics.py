"""Distances between two arrays of one shape, in float64: relative L2, maximum, angle, and units in the last place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from osp_shared.traces.format import DTYPES


@dataclass(frozen=True)
class Distance:
    """`rel_l2` = |a - b| / |b|; `max_abs` = largest |a - b|; `angle` = 1 - cosine; all over entries finite in both.

    `scale` is |b| as a root mean square. `nonfinite` counts entries that are NaN or infinite in one array alone.
    """

    rel_l2: float
    max_abs: float
    angle: float
    scale: float
    nonfinite: int
    size: int


def wide(value: np.ndarray) -> np.ndarray:
    return np.asarray(value).astype(np.float64)


def distance(value: np.ndarray, truth: np.ndarray) -> Distance:
    """Distance of `value` from `truth`; a zero truth makes the relative error absolute."""
    a, b = wide(value).ravel(), wide(truth).ravel()
    good = np.isfinite(a) & np.isfinite(b)
    # Equal infinities and NaN at the same place are agreement: masks produce them on purpose.
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    nonfinite = int((~good & ~same).sum())
    if not good.all():
        a, b = a[good], b[good]
    if not a.size:
        return Distance(0.0, 0.0, 0.0, 0.0, nonfinite, value.size)
    norm_a, norm_b, gap = np.linalg.norm(a), np.linalg.norm(b), np.linalg.norm(a - b)
    rel = gap / norm_b if norm_b > 0 else gap
    # Half the squared chord between unit vectors: exact where 1 - a.b / |a||b| would cancel.
    both = norm_a > 0 and norm_b > 0
    angle = 0.5 * float(np.sum((a / norm_a - b / norm_b) ** 2)) if both else float(norm_a != norm_b)
    scale = float(norm_b / np.sqrt(b.size))
    return Distance(float(rel), float(np.max(np.abs(a - b))), angle, scale, nonfinite, value.size)


def ulps(value: np.ndarray, truth: np.ndarray, dtype: str) -> np.ndarray:
    """How many representable numbers of `dtype` lie between each pair; truth is rounded to `dtype` first."""
    np_dtype = DTYPES[dtype][1]
    integer = np.dtype(f"int{8 * np_dtype.itemsize}")
    with np.errstate(over="ignore", invalid="ignore"):
        # Rounding float64 to a half type passes float32 on the way in ml_dtypes too: the double rounding is < 1 ulp.
        bits = [np.ascontiguousarray(wide(x).astype(np_dtype)).view(integer).astype(np.int64) for x in (value, truth)]
    least = np.iinfo(integer).min
    # Negative numbers count downwards from zero, so that the order of integers is the order of the numbers.
    ordered = [np.where(b < 0, least - b, b) for b in bits]
    return np.abs(ordered[0] - ordered[1]).astype(np.float64)


def ulp_summary(value: np.ndarray, truth: np.ndarray, dtype: str) -> tuple[float, float]:
    """Median and 99th percentile of `ulps` over the finite entries: the maximum belongs to entries near zero."""
    good = np.isfinite(wide(value)) & np.isfinite(wide(truth))
    if not good.any():
        return 0.0, 0.0
    steps = ulps(np.asarray(value)[good], np.asarray(truth)[good], dtype)
    return float(np.median(steps)), float(np.quantile(steps, 0.99))
