"""Writing MindSpore's .ckpt, streamed; the counterpart of `readers/mindspore_ckpt.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import dtypes, fingerprint
from osp_shared.checkpoints.output import Output, Placed, check_layout
from osp_shared.checkpoints.raw import FINGERPRINTS
from osp_shared.checkpoints.readers.mindspore_ckpt import METADATA_FIELD
from osp_shared.checkpoints.write import Item
from osp_shared.errors import OspError

_SLICE = 512 << 20  # MindSpore cuts larger tensors into slices of this size, and joins them on loading


class CkptWriter:
    """One .ckpt file in the making, with the interface of `SafetensorsWriter`."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path, self.nbytes = path, 0
        self.digests: dict[str, str] = {}
        self.placed: dict[str, Placed] = {}
        self._metadata = dict(metadata)
        self._out = Output(path)

    def add(self, item: Item, progress: Callable[[int], None] = lambda n: None) -> None:
        """Append a tensor as one Value, or as several slices of whole pieces."""
        running = fingerprint.TensorHash(item.dtype, item.shape)
        pieces, left, start = iter(item.pieces()), item.nbytes, None
        while left or start is None:
            take = min(left, _SLICE)
            self._put(_value_head(item, take))
            start = self._out.position if start is None else start
            self._out.stream(_exactly(pieces, take, item.name), running, progress)
            left -= take
        if next(pieces, None) is not None:  # asking also lets a cast compare what it read with its fingerprint
            raise OspError(f"tensor {item.name}: has more than {item.nbytes} bytes")
        self.nbytes += item.nbytes
        self.digests[item.canonical] = item.checked(running.hexdigest())
        self.placed[item.name] = item.dtype, item.shape, start

    def finish(self, **metadata: str) -> None:
        """Append the metadata in a field that MindSpore skips; the file is complete and on the disk after this."""
        own = {FINGERPRINTS: json.dumps(self.digests, separators=(",", ":"))}
        text = json.dumps({**self._metadata, **metadata, **own}, separators=(",", ":")).encode()
        self._put(_bytes_field(METADATA_FIELD, len(text)) + text)
        check_layout(self.path, self.placed)
        self._out.sync()
        self.close()

    def _put(self, data: bytes) -> None:
        self._out.write(np.frombuffer(data, np.uint8))

    def close(self) -> None:
        self._out.close()


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
