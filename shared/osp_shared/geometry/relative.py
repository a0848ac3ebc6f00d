"""T5's buckets of relative positions (Raffel et al. 2020): small distances exactly, larger ones by logarithm."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


def bucket(relative: np.ndarray, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of key position minus query position, both directions: half of the buckets for positive ones.

    The logarithm is taken in float32, as the library does: at a boundary, float64 can fall on the other side.
    """
    half = buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(half - exact)).astype(np.int64), half - 1)
    return half * (relative > 0) + np.where(distance < exact, distance, far)


@lru_cache(maxsize=8)
def bucket_table(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """(length, length) bucket of query i and key j, int32."""
    position = np.arange(length)
    return bucket(position[None, :] - position[:, None], buckets, max_distance).astype(np.int32)
