"""Deterministic weights and inputs: the same numbers on every machine, nothing stored.

A tensor's values depend on its name, its shape and a salt alone (numpy Philox keyed by sha256), so golden numbers,
demos, traces and tests of both backends share weights without a file. Source: headers of the golden files.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np


def rng(text: str, salt: str = "") -> np.random.Generator:
    """Generator keyed by the first eight bytes (little endian) of sha256(salt + text)."""
    digest = hashlib.sha256((salt + text).encode("utf-8")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:8], "little")))


def parameter(key: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray:
    """float32 weights for state-dict key `key`: unit gain for matrices and kernels, near one for norm scales."""
    v = rng(key, salt).standard_normal(shape, dtype=np.float32)
    if len(shape) >= 2:
        return v * np.float32(1.0 / math.sqrt(math.prod(shape[1:])))
    if len(shape) == 1 and key.endswith("weight"):
        return np.float32(1.0) + np.float32(0.1) * v
    return np.float32(0.1) * v


def input_tensor(tag: str, shape: tuple[int, ...], salt: str = "") -> np.ndarray:
    """float32 standard normal input named `input:<tag>:<AxBxC>`."""
    return rng(f"input:{tag}:{'x'.join(map(str, shape))}", salt).standard_normal(shape, dtype=np.float32)
