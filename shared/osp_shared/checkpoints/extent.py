"""Where a tensor lies: every file format is reduced to byte ranges of files, and one class reads them.

A reader parses headers only. It hands out `Extent`s, already checked against the size of their file, so no number
from a header reaches an allocation unchecked. Bytes are read with `pread` rather than mapped: a file that shrinks
meanwhile gives an error instead of a crash, and resident memory is what was asked for.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import dtypes
from osp_shared.errors import OspError

CHUNK = 8 << 20  # bytes handled at once by everything that streams
MAX_RANK = 16


@dataclass(frozen=True)
class Segment:
    """`nbytes` bytes of the file `path` from `offset`."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Extent:
    """One tensor: its type code, shape and bytes; `stride` (in elements) only when they are not in C order. A tensor
    without segments is all zeros: a file left it out, and its absence means that."""

    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]
    stride: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * dtypes.ITEMSIZE[self.dtype]


@dataclass
class RawCheckpoint:
    """What a reader returns: extents under the names the file uses, and whatever text the file says about itself."""

    path: Path
    format: str
    extents: dict[str, Extent]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    digests: dict[str, str] = field(default_factory=dict)  # recorded fingerprints by canonical name


def shown(value, most: int = 80) -> str:
    """Text for an error message of something that a file made: printable, short, and cheap whatever it is.

    `str` of tuples that share parts takes exponential time, and of deep ones may not return at all.
    """
    if isinstance(value, str):
        return (value if value.isprintable() else ascii(value)[1:-1])[:most]
    if isinstance(value, (list, tuple)) and all(isinstance(v, (int, float, str)) for v in value[:20]):
        return f"({', '.join(shown(v, 24) for v in value[:20])})"[:most]
    return str(value)[:most] if value is None or isinstance(value, (int, float)) else type(value).__name__


def checked_shape(shape, where: str) -> tuple[int, ...]:
    """A tuple of non-negative integers whose product is a possible size, or OspError."""
    ok = isinstance(shape, (list, tuple)) and len(shape) <= MAX_RANK
    if not ok or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape) or math.prod(shape) >= 1 << 48:
        raise OspError(f"{where}: impossible shape {shown(shape)}")
    return tuple(shape)


class Files:
    """Read-only file handles by path, opened once."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}
        self._ring: deque[np.ndarray] = deque()

    def read_into(self, segment: Segment, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` of the segment."""
        if segment.path not in self._handles:
            try:
                self._handles[segment.path] = os.open(segment.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            except OSError as e:
                raise OspError(f"{segment.path}: cannot be read ({e.strerror})") from None
        handle, done = self._handles[segment.path], 0
        while done < len(buffer):
            got = os.preadv(handle, [buffer[done:]], segment.offset + start + done)
            if got == 0:
                raise OspError(f"{segment.path}: the file ended early; it changed while it was being read")
            done += got

    def chunks(self, extent: Extent, size: int = CHUNK, reuse: bool = False) -> Iterator[np.ndarray]:
        """The tensor's bytes in C order as uint8 pieces of `size` bytes (the last may be shorter).

        reuse: a piece is overwritten after three more have been taken, which spares fresh memory for each.
        """
        if extent.stride is not None:
            step = size // dtypes.ITEMSIZE[extent.dtype]
            flat = self._strided(extent).flat
            yield from (as_bytes(flat[i : i + step]) for i in range(0, math.prod(extent.shape), step))
            return
        if not extent.segments:
            yield from (np.zeros(min(size, extent.nbytes - i), np.uint8) for i in range(0, extent.nbytes, size))
            return
        total, segments, start = extent.nbytes, iter(extent.segments), 0
        segment = next(segments, None)
        for first in range(0, total, size):
            wanted = min(size, total - first)
            piece = self._lend(wanted) if reuse and size == CHUNK else np.empty(wanted, np.uint8)
            view, filled = memoryview(piece), 0
            while filled < piece.size:
                n = min(piece.size - filled, segment.nbytes - start)
                self.read_into(segment, start, view[filled : filled + n])
                filled, start = filled + n, start + n
                if start == segment.nbytes:
                    segment, start = next(segments, None), 0
            yield piece

    def _lend(self, size: int) -> np.ndarray:
        if not self._ring:
            self._ring.extend(np.empty(CHUNK, np.uint8) for _ in range(4))
        self._ring.rotate()
        return self._ring[0][:size]

    def read(self, extent: Extent) -> np.ndarray:
        """One tensor in C order, in its own memory."""
        if not extent.segments:
            return np.zeros(extent.shape, dtypes.NUMPY[extent.dtype])
        if extent.stride is not None:
            return np.ascontiguousarray(self._strided(extent)).reshape(extent.shape)
        return self._bytes(extent).view(dtypes.NUMPY[extent.dtype]).reshape(extent.shape)

    def _bytes(self, extent: Extent) -> np.ndarray:
        raw = np.empty(sum(s.nbytes for s in extent.segments), np.uint8)
        view, start = memoryview(raw), 0
        for s in extent.segments:
            self.read_into(s, 0, view[start : start + s.nbytes])
            start += s.nbytes
        return raw

    def _strided(self, extent: Extent) -> np.ndarray:
        flat = self._bytes(extent).view(dtypes.NUMPY[extent.dtype])
        steps = tuple(n * flat.itemsize for n in extent.stride)
        return np.lib.stride_tricks.as_strided(flat, extent.shape, steps, writeable=False)

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()


def as_bytes(array: np.ndarray) -> np.ndarray:
    """The array's bytes in C order, little endian, as a flat uint8 view (copied only when it has to be)."""
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    # ascontiguousarray turns a scalar into a vector, which flattening does anyway.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def merge(parts: Mapping[str, RawCheckpoint], path: Path) -> RawCheckpoint:
    """One checkpoint of several shard files; a name in two shards is an error."""
    whole = RawCheckpoint(path, next(iter(parts.values())).format, {})
    for shard, part in parts.items():
        twice = next((name for name in part.extents if name in whole.extents), None)
        if twice is not None:
            raise OspError(f"{path}: tensor {shown(twice)} is in more than one shard; the second is {shard}")
        whole.extents.update(part.extents)
        whole.metadata.update(part.metadata)
        whole.digests.update(part.digests)
        whole.notes.extend(note for note in part.notes if note not in whole.notes)
    return whole
