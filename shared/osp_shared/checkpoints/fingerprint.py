"""Content fingerprints of tensors and of sets of tensors.

A tensor's fingerprint is a sha256 over its type, shape and the sha256 of each `CHUNK` of its little-endian bytes in C
order (a two-level tree, so that chunks are hashed in parallel while others are read and written). The fingerprint of a
set covers the sorted (canonical name, tensor fingerprint) pairs. Neither knows of files, shards, frameworks or the
names that a format uses.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from osp_shared.checkpoints.dtypes import code_of
from osp_shared.checkpoints.extent import CHUNK, as_bytes

DIGITS = 64
_IN_FLIGHT = 2  # chunks being hashed at once; each is kept in memory until it is done
_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """A forked child inherits the pool but not its threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _hash(piece: np.ndarray, check: Callable[[], None] | None) -> bytes:
    if check is not None:
        check()
    return hashlib.sha256(piece).digest()


class TensorHash:
    """Fingerprint of a tensor that arrives in pieces of exactly `CHUNK` bytes (the last may be shorter)."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self._root = hashlib.sha256(f"{dtype}[{','.join(map(str, shape))}]".encode())
        self._pending: deque[Future[bytes]] = deque()

    def update(self, piece: np.ndarray, check: Callable[[], None] | None = None) -> None:
        """Hash one piece (uint8), in the background when it is large, after calling `check`.

        The piece must stay as it is until two more have been given, or the fingerprint has been asked for.
        """
        if piece.size < CHUNK and not self._pending:
            self._root.update(_hash(piece, check))
            return
        global _pool
        _pool = _pool or ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="fingerprint")
        self._pending.append(_pool.submit(_hash, piece, check))
        if len(self._pending) > _IN_FLIGHT:
            self._root.update(self._pending.popleft().result())

    def hexdigest(self) -> str:
        while self._pending:
            self._root.update(self._pending.popleft().result())
        return self._root.hexdigest()


def of_pieces(dtype: str, shape: tuple[int, ...], pieces: Iterable[np.ndarray]) -> str:
    """Fingerprint of a tensor given as consecutive pieces of `CHUNK` bytes."""
    running = TensorHash(dtype, shape)
    for piece in pieces:
        running.update(piece)
    return running.hexdigest()


def of_array(array: np.ndarray) -> str:
    """Fingerprint of an array in memory."""
    raw = as_bytes(array)
    pieces = (raw[i : i + CHUNK] for i in range(0, raw.size, CHUNK))
    return of_pieces(code_of(array.dtype), array.shape, pieces)


def of_set(tensors: Mapping[str, str]) -> str:
    """Fingerprint of a set from its tensors' fingerprints by canonical name."""
    lines = "".join(f"{name}\t{tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256(lines.encode()).hexdigest()
