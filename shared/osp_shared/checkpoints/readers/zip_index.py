"""Where the members of an uncompressed zip archive lie; nothing is unpacked.

`torch.save` stores its members uncompressed, so a tensor is a byte range of the archive. Only the directory at the end
is read. Source: PKWARE's APPNOTE, sections 4.3 and 4.4 (with zip64).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

from osp_shared.checkpoints.extent import Segment, shown
from osp_shared.errors import OspError

_MAX_DIRECTORY = 64 << 20
_TAIL = 65_557  # the end record is at most this far from the end: 22 bytes and a comment


def members(path: Path) -> dict[str, Segment]:
    """Byte range of every member by name. OspError for compression, encryption and ranges outside the file."""
    size = path.stat().st_size
    with path.open("rb") as f:
        try:
            start, length, count = _directory(f, size)
            if length > _MAX_DIRECTORY or start + length > size:
                raise ValueError(f"directory of {length} bytes at byte {start}")
            f.seek(start)
            directory = f.read(length)
            return _entries(path, f, directory, count, size)
        except (ValueError, struct.error, IndexError, OverflowError, OSError) as e:
            raise OspError(f"{path}: damaged or cut-off archive ({str(e)[:100]}); download it again") from None


def _directory(f, size: int) -> tuple[int, int, int]:
    """Start, length and entry count of the central directory."""
    f.seek(max(0, size - _TAIL))
    tail = f.read(_TAIL)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise ValueError("no directory at the end")
    count, length, start = struct.unpack_from("<HII", tail, at + 10)
    if 0xFFFFFFFF in (length, start) or count == 0xFFFF:
        mark, _, where, _ = struct.unpack_from("<4sIQI", tail, at - 20)
        if at < 20 or mark != b"PK\x06\x07" or where + 56 > size:
            raise ValueError("no zip64 end record")
        f.seek(where)
        record = f.read(56)
        if record[:4] != b"PK\x06\x06":
            raise ValueError("no zip64 directory")
        count, length, start = struct.unpack_from("<QQQ", record, 32)
    return start, length, count


def _entries(path: Path, f, directory: bytes, count: int, size: int) -> dict[str, Segment]:
    found: dict[str, Segment] = {}
    at = 0
    while at < len(directory):
        mark, flags, method = struct.unpack_from("<4s4xHH", directory, at)
        packed, unpacked, n_name, n_extra, n_comment = struct.unpack_from("<IIHHH", directory, at + 20)
        (offset,) = struct.unpack_from("<I", directory, at + 42)
        if mark != b"PK\x01\x02":
            raise ValueError(f"directory entry {len(found)} is damaged")
        name = directory[at + 46 : at + 46 + n_name].decode("utf-8")
        extra = directory[at + 46 + n_name : at + 46 + n_name + n_extra]
        packed, unpacked, offset = _zip64(extra, packed, unpacked, offset)
        if method != 0 or flags & 1 or packed != unpacked:
            raise ValueError(f"member {shown(name)} is compressed or encrypted, which torch.save never does")
        if name in found:
            raise ValueError(f"member {shown(name)} is there twice")
        data = _data_start(f, offset, size)
        if data + unpacked > size:
            raise ValueError(f"member {shown(name)} ends beyond the file")
        found[name] = Segment(path, data, unpacked)
        at += 46 + n_name + n_extra + n_comment
    if len(found) != count:
        raise ValueError(f"{len(found)} members, {count} announced")
    return found


def _zip64(extra: bytes, packed: int, unpacked: int, offset: int) -> tuple[int, int, int]:
    """Replace the 32-bit fields that say "see zip64" by the 64-bit ones, which come in this order."""
    at, wide = 0, b""
    while at + 4 <= len(extra):
        kind, n = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = extra[at + 4 : at + 4 + n]
        at += 4 + n
    values = iter(struct.unpack(f"<{len(wide) // 8}Q", wide[: len(wide) // 8 * 8]))
    full = 0xFFFFFFFF
    try:
        unpacked = next(values) if unpacked == full else unpacked
        packed = next(values) if packed == full else packed
        offset = next(values) if offset == full else offset
    except StopIteration:
        raise ValueError("zip64 sizes are missing") from None
    return packed, unpacked, offset


def _data_start(f, offset: int, size: int) -> int:
    """Data of a member: after its local header, whose name and extra field may differ in length."""
    if offset + 30 > size:
        raise ValueError("a member starts beyond the file")
    header = os.pread(f.fileno(), 30, offset)
    if header[:4] != b"PK\x03\x04":
        raise ValueError("a member without its local header")
    n_name, n_extra = struct.unpack_from("<HH", header, 26)
    return offset + 30 + n_name + n_extra
