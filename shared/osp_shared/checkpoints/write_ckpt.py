"""Writing MindSpore's .ckpt, streamed; the counterpart of `readers/mindspore_ckpt.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import dtypes, fingerprint
from osp_shared.checkpoints.raw import FINGERPRINTS
from osp_shared.checkpoints.readers.mindspore_ckpt import METADATA_FIELD
from osp_shared.checkpoints.write import Item, Sync, Written, write_all
from osp_shared.errors import OspError

_SLICE = 512 << 20  # MindSpore cuts larger tensors into slices of this size, and joins them on loading


class CkptWriter:
    """One .ckpt file in the making, with the interface of `SafetensorsWriter`."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path, self.nbytes = path, 0
        self.digests: dict[str, str] = {}
        self.expected: dict[str, Written] = {}
        self._metadata = dict(metadata)
        self._file = path.open("wb", buffering=0)
        self._sync = Sync(self._file)

    def add(self, item: Item, progress: Callable[[int], None] = lambda n: None) -> None:
        """Append a tensor as one Value, or as several slices of whole pieces."""
        running = fingerprint.TensorHash(item.dtype, item.shape)
        pieces, left = iter(item.pieces()), item.nbytes
        while True:
            take = min(left, _SLICE)
            self._put(_value_head(item, take))
            for piece in _exactly(pieces, take, item.name):
                running.update(piece)
                write_all(self._file, piece)
                progress(piece.size)
            left -= take
            if left == 0:
                break
        if next(pieces, None) is not None:  # asking also lets a cast compare what it read with its fingerprint
            raise OspError(f"tensor {item.name}: has more than {item.nbytes} bytes")
        self.nbytes += item.nbytes
        digest = self.digests[item.canonical] = item.checked(running.hexdigest())
        self.expected[item.name] = digest, item.dtype, item.shape

    def finish(self, **metadata: str) -> None:
        """Append the metadata in a field that MindSpore skips, and start the fsync that `close` waits for."""
        own = {FINGERPRINTS: json.dumps(self.digests, separators=(",", ":"))}
        text = json.dumps({**self._metadata, **metadata, **own}, separators=(",", ":")).encode()
        self._put(_bytes_field(METADATA_FIELD, len(text)) + text)
        self._sync.start()

    def _put(self, data: bytes) -> None:
        write_all(self._file, np.frombuffer(data, np.uint8))

    def close(self) -> None:
        """The file is on the disk after this, if it was finished."""
        self._sync.wait()
        self._file.close()


def check_types(items: Iterable[Item], target: Path) -> None:
    """OspError when MindSpore has no name for a tensor's type."""
    for item in items:
        if item.dtype not in dtypes.MINDSPORE_NAME:
            raise OspError(f"{target}: MindSpore cannot store {item.name} of type {item.dtype}; cast it with --dtype")


def _exactly(pieces: Iterator[np.ndarray], nbytes: int, name: str) -> Iterator[np.ndarray]:
    """The next pieces, which must end at `nbytes`: slices are a multiple of the piece size."""
    done = 0
    while done < nbytes:
        piece = next(pieces, None)
        if piece is None or done + piece.size > nbytes:
            raise OspError(f"tensor {name}: its pieces do not add up to {nbytes} bytes")
        done += piece.size
        yield piece


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _bytes_field(number: int, length: int) -> bytes:
    return _varint(number << 3 | 2) + _varint(length)


def _value_head(item: Item, nbytes: int) -> bytes:
    """Everything of a Value before `nbytes` of tensor content. A scalar has no dims."""
    tag, kind = item.name.encode(), dtypes.MINDSPORE_NAME[item.dtype].encode()
    dims = b"".join(b"\x08" + _varint(n) for n in item.shape)
    tensor = dims + _bytes_field(2, len(kind)) + kind + _bytes_field(3, nbytes)
    value = _bytes_field(1, len(tag)) + tag + _bytes_field(2, len(tensor) + nbytes) + tensor
    return _bytes_field(1, len(value) + nbytes) + value
