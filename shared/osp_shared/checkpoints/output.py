"""A file being written whose every piece is read back and compared while it is still warm.

Comparing piece by piece costs a fraction of reading a finished file again, and needs no memory of what was written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import raw
from osp_shared.checkpoints.extent import CHUNK
from osp_shared.checkpoints.fingerprint import TensorHash
from osp_shared.errors import OspError

Placed = tuple[str, tuple[int, ...], int]  # type, shape, byte in the file where the tensor starts


class Output:
    """Binary file for sequential writing. `position` is where the next byte goes."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self.path, self.position = path, start
        self._file = path.open("w+b", buffering=0)
        self._buffers = threading.local()

    def write(self, piece: np.ndarray, at: int | None = None) -> int:
        """Write all of a uint8 piece at the end (or `at` a byte); returns where it went."""
        offset = self.position if at is None else at
        write_all(self._file.fileno(), piece, offset, self.path)
        if at is None:
            self.position += piece.size
        return offset

    def stream(self, pieces: Iterable[np.ndarray], running: TensorHash, progress: Callable[[int], None]) -> int:
        """Write consecutive pieces; each is hashed and compared behind the back of the next. Returns their bytes."""
        written = 0
        for piece in pieces:
            offset = self.write(piece)
            running.update(piece, lambda offset=offset, piece=piece: self.compare(offset, piece))
            written += piece.size
            progress(piece.size)
        return written

    def compare(self, offset: int, piece: np.ndarray) -> None:
        """OspError unless the file holds `piece` at `offset`. May run in any thread."""
        if not hasattr(self._buffers, "own"):
            self._buffers.own = np.empty(CHUNK, np.uint8)
        for first in range(0, piece.size, CHUNK):
            wanted = piece[first : first + CHUNK]
            found = self._buffers.own[: wanted.size]
            got = os.preadv(self._file.fileno(), [found], offset + first)
            if got != wanted.size or not np.array_equal(found, wanted):
                raise OspError(f"{self.path}: reads back differently at byte {offset + first}; the disk may be failing")

    def sync(self) -> None:
        """Everything is on the disk after this. OspError when the disk refused."""
        try:
            os.fsync(self._file.fileno())
        except OSError as e:
            raise OspError(f"{self.path}: cannot be written ({e.strerror})") from None

    def close(self) -> None:
        self._file.close()


def write_all(handle: int, piece: np.ndarray, offset: int, path: Path) -> None:
    """Write every byte of a piece at an offset, however often the system has to be asked."""
    view = memoryview(piece)
    try:
        while len(view):
            done = os.pwrite(handle, view, offset)
            view, offset = view[done:], offset + done
    except OSError as e:
        raise OspError(f"{path}: cannot be written ({e.strerror})") from None


def check_layout(path: Path, expected: Mapping[str, Placed]) -> None:
    """Parse a finished file: the tensors that were written, at the places where they were compared."""
    found = {n: (e.dtype, e.shape, e.segments[0].offset) for n, e in raw.parse(path).extents.items()}
    if found != dict(expected):
        raise OspError(f"{path}: reads back with other names, types, shapes or places than were written")
