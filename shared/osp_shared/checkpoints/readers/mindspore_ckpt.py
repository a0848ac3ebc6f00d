"""MindSpore's own .ckpt: a protobuf message, read by its wire format without protobuf or MindSpore.

    Checkpoint { repeated Value value = 1; }    Value { string tag = 1; TensorProto tensor = 2; }
    TensorProto { repeated int64 dims = 1; string tensor_type = 2; bytes tensor_content = 3; }

A tensor over 512 MiB is cut into consecutive Values with one tag, each with the dims of the whole. A scalar has no
dims or [0]. Text values have the type "str". The file may end in `crc_num` and ten bytes. Source: MindSpore's
checkpoint.proto and train/serialization.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from osp_shared.checkpoints import dtypes
from osp_shared.checkpoints.extent import Extent, RawCheckpoint, Segment, checked_shape, shown
from osp_shared.errors import OspError

METADATA_FIELD = 1900  # a field of Checkpoint that MindSpore does not know, and skips: JSON of {text: text}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VALUES = 200_000
_MAX_TEXT = 4096
_MAX_METADATA = 16 << 20


@dataclass
class _Value:
    tag: str = ""
    kind: str = ""
    dims: list[int] = field(default_factory=list)
    content: Segment | None = None


class _Wire:
    """Protobuf fields of a file between byte limits; nothing larger than a few KiB is read."""

    def __init__(self, path: Path, file, size: int) -> None:
        self.path, self._file, self.size = path, file, size
        self.at = 0

    def fail(self, what: str) -> OspError:
        return OspError(f"{self.path}: damaged or cut-off MindSpore checkpoint at byte {self.at} ({what})")

    def varint(self, limit: int) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._file.read(1)
            if not byte or self.at >= limit:
                raise self.fail("it ends inside a number")
            self.at += 1
            value |= (byte[0] & 0x7F) << shift
            if byte[0] < 0x80:
                return value & (1 << 64) - 1
        raise self.fail("a number of more than ten bytes")

    def field(self, limit: int) -> tuple[int, int, int]:
        """Number, wire type, and byte after the field, which starts at `at` (a varint's value is not read yet)."""
        key = self.varint(limit)
        number, wire = key >> 3, key & 7
        if number == 0 or wire not in (_VARINT, _FIXED64, _BYTES, _FIXED32):
            raise self.fail(f"field {number} of wire type {wire}")
        length = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
        if wire == _BYTES:
            length = self.varint(limit)
        if self.at + length > limit:
            raise self.fail(f"field {number} of {length} bytes reaches beyond {limit}")
        return number, wire, self.at + length

    def skip(self, wire: int, end: int, limit: int) -> None:
        if wire == _VARINT:
            self.varint(limit)
        else:
            self.seek(end)

    def seek(self, at: int) -> None:
        if at != self.at:
            self._file.seek(at)
            self.at = at

    def text(self, end: int, most: int = _MAX_TEXT) -> str:
        if end - self.at > most:
            raise self.fail(f"a text of {end - self.at} bytes")
        data = self._file.read(end - self.at)
        self.at = end
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("text that is not UTF-8") from None


def parse(path: Path) -> RawCheckpoint:
    """Extents of all tensors; text values go to the metadata. OspError for anything else."""
    size = path.stat().st_size
    with path.open("rb") as f:
        f.seek(max(0, size - 17))
        if f.read(7) == b"crc_num":
            size -= 17
        f.seek(0)
        wire, values, metadata = _Wire(path, f, size), [], {}
        while wire.at < size:
            number, kind, end = wire.field(size)
            if number == 1 and kind == _BYTES:
                values.append(_value(wire, end))
            elif number == METADATA_FIELD and kind == _BYTES:
                metadata.update(_metadata(wire, end))
            else:
                raise wire.fail(f"field {number}, which MindSpore does not write")
            if len(values) > _MAX_VALUES:
                raise wire.fail(f"more than {_MAX_VALUES} values")
    return RawCheckpoint(path, "MindSpore ckpt", _extents(path, values), metadata)


def _value(wire: _Wire, limit: int) -> _Value:
    value = _Value()
    while wire.at < limit:
        number, kind, end = wire.field(limit)
        if number == 1 and kind == _BYTES:
            value.tag = wire.text(end)
        elif number == 2 and kind == _BYTES:
            _tensor(wire, end, value)
        else:
            raise wire.fail(f"field {number} of a value: map parameters are not read")
    if not value.tag or value.content is None or not value.kind:
        raise wire.fail("a value without tag, type or content")
    return value


def _tensor(wire: _Wire, limit: int, value: _Value) -> None:
    while wire.at < limit:
        number, kind, end = wire.field(limit)
        if number == 1 and kind in (_VARINT, _BYTES):  # one by one, or packed
            stop = end if kind == _BYTES else wire.at + 1
            while wire.at < stop:
                value.dims.append(wire.varint(limit))
                if len(value.dims) > 64:
                    raise wire.fail("more than 64 dims")
        elif number == 2 and kind == _BYTES:
            value.kind = wire.text(end)
        elif number == 3 and kind == _BYTES:
            value.content = Segment(wire.path, wire.at, end - wire.at)
            wire.seek(end)
        else:
            wire.skip(kind, end, limit)


def _metadata(wire: _Wire, end: int) -> dict[str, str]:
    try:
        found = json.loads(wire.text(end, _MAX_METADATA))
    except (ValueError, RecursionError):
        raise wire.fail("metadata that is not JSON") from None
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise wire.fail("metadata that does not map text to text")
    return found


def _extents(path: Path, values: list[_Value]) -> dict[str, Extent]:
    found: dict[str, Extent] = {}
    at = 0
    while at < len(values):
        first, parts = values[at], []
        while at < len(values) and values[at].tag == first.tag:
            if (values[at].dims, values[at].kind) != (first.dims, first.kind):
                raise OspError(f"{path}: tensor {shown(first.tag)}: its slices disagree about shape or type")
            parts.append(values[at].content)
            at += 1
        if first.kind == "str":
            continue
        where = f"{path}: tensor {shown(first.tag)}"
        if first.kind not in dtypes.MINDSPORE:
            raise OspError(f"{where}: type {shown(first.kind, 40)} is not read; known: {', '.join(dtypes.MINDSPORE)}")
        if first.tag in found:
            raise OspError(f"{where}: is there twice")
        dtype, nbytes = dtypes.MINDSPORE[first.kind], sum(p.nbytes for p in parts)
        scalar = first.dims in ([], [0]) and nbytes == dtypes.ITEMSIZE[dtype]
        shape = () if scalar else checked_shape(first.dims, where)
        if math.prod(shape) * dtypes.ITEMSIZE[dtype] != nbytes:
            raise OspError(f"{where}: shape {shape} of {first.kind} does not take {nbytes} bytes")
        found[first.tag] = Extent(dtype, shape, tuple(parts))
    return found
