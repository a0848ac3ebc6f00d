"""The timestep's sinusoid (Vaswani et al. 2017), as the transformer's time embedding takes it."""

from __future__ import annotations

import math

import numpy as np


def sinusoid(timestep_B: np.ndarray, channels: int) -> np.ndarray:
    """(B, channels) float32: cosines, then sines, of t * 10000^(-j / half).

    Exponent, frequency and angle are float32, each rounded once, as in the released model: near t = 1000 another
    rounding of the angle alone moves the result by 1e-5. On the host, because MindSpore's exp is a hundred times worse.
    """
    half = channels // 2
    exponent = np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angle = (np.asarray(timestep_B, np.float32)[:, None] * frequency[None, :]).astype(np.float64)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
