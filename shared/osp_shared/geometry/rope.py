"""Rotary position tables in three dimensions (RoFormer, Su et al. 2021, on a video's t, y and x).

A head is three equal parts for t, y and x; each part is two halves that rotate against each other. Positions are the
tokens' integer indices over the axis' scale; angle j of an axis is position * 10000^(-2 j / part).
"""

from __future__ import annotations

from functools import lru_cache

import ml_dtypes
import numpy as np

BASE = 10000.0
DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
}  # fmt: skip

Grid = tuple[int, int, int]
Scale = tuple[float, float, float]


def frequencies(part: int) -> np.ndarray:
    """float32 (part / 2,): angles per unit of position, each rounded once."""
    return (BASE ** (-np.arange(0, part, 2, dtype=np.float64) / part)).astype(np.float32)


@lru_cache(maxsize=16)
def angles(grid_thw: Grid, head_dim: int, scale_thw: Scale = (1.0, 1.0, 1.0)) -> np.ndarray:
    """float32 (N, 3, head_dim / 6): angle of every token, axis and frequency. Read-only, kept per shape."""
    axes = [
        np.outer(np.arange(extent, dtype=np.float32) / np.float32(scale), frequencies(head_dim // 3))
        for extent, scale in zip(grid_thw, scale_thw, strict=True)
    ]
    t, h, w = grid_thw
    half = head_dim // 6
    table = np.empty((t, h, w, 3, half), np.float32)
    table[..., 0, :] = axes[0].reshape(t, 1, 1, half)
    table[..., 1, :] = axes[1].reshape(1, h, 1, half)
    table[..., 2, :] = axes[2].reshape(1, 1, w, half)
    table = table.reshape(-1, 3, half)
    table.flags.writeable = False
    return table


def tables(grid_thw: Grid, head_dim: int, scale_thw: Scale, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin), each (N, 3, head_dim / 6) in `dtype` ("float32", "bfloat16", ...).

    The angle is rounded to `dtype` before its cosine is taken: in bfloat16 an angle between 32 and 64 is a multiple of
    a quarter. The released weights were trained and are sampled with that.
    """
    kind = DTYPES[dtype]
    rounded = angles(grid_thw, head_dim, scale_thw).astype(kind).astype(np.float64)
    return np.cos(rounded).astype(kind), np.sin(rounded).astype(kind)
