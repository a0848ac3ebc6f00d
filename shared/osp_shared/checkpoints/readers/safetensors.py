"""safetensors: an 8-byte little-endian header length, a JSON header, then the tensors' bytes.

Source: the format's description (huggingface/safetensors). Every number is checked against the file before it is used.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from osp_shared.checkpoints import dtypes
from osp_shared.checkpoints.extent import Extent, RawCheckpoint, Segment, checked_shape, shown
from osp_shared.errors import OspError

MAX_HEADER = 32 << 20  # bytes; the largest model here has 80 KiB


def parse(path: Path) -> RawCheckpoint:
    """Extents and metadata of one file; OspError for anything that the format does not allow."""
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise OspError(f"{path}: not a safetensors file, or cut off: header of {length} bytes in {size}")
            text = f.read(length)
    except OSError as e:
        raise OspError(f"{path}: cannot be read ({e.strerror})") from None
    header = parse_json(text, path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise OspError(f"{path}: __metadata__ must map text to text")
    base = 8 + length
    extents = {name: _extent(path, name, entry, base, size) for name, entry in header.items()}
    _check_layout(path, extents, base, size)
    return RawCheckpoint(path, "safetensors", extents, metadata)


def parse_json(text: bytes, path: Path) -> dict:
    """A JSON object without repeated keys (a second entry would silently win)."""

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name appears twice")
        return found

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise OspError(f"{path}: damaged JSON ({str(e).splitlines()[0][:80]})") from None
    if not isinstance(value, dict):
        raise OspError(f"{path}: JSON must hold an object, found {type(value).__name__}")
    return value


def _extent(path: Path, name: str, entry, base: int, size: int) -> Extent:
    where = f"{path}: tensor {shown(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise OspError(f"{where}: its header entry needs dtype, shape and data_offsets")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes.ITEMSIZE:
        raise OspError(f"{where}: unknown dtype {shown(dtype, 40)}; known: {', '.join(dtypes.ITEMSIZE)}")
    shape = checked_shape(entry["shape"], where)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise OspError(f"{where}: data_offsets must be two non-negative integers")
    start, stop = offsets
    need = math.prod(shape) * dtypes.ITEMSIZE[dtype]
    if stop - start != need:
        raise OspError(f"{where}: shape {shown(shape)} of {dtype} takes {need} bytes, its offsets span {stop - start}")
    if base + stop > size:
        raise OspError(f"{where}: ends at byte {base + stop}, but the file has {size}; download it again")
    return Extent(dtype, shape, (Segment(path, base + start, need),))


def _check_layout(path: Path, extents: dict[str, Extent], base: int, size: int) -> None:
    """Tensors must follow each other without overlap or gap and fill the file."""
    position = base
    for name, extent in sorted(extents.items(), key=lambda item: (item[1].segments[0].offset, item[1].nbytes)):
        if extent.segments[0].offset != position:
            raise OspError(f"{path}: tensor {shown(name)} overlaps its neighbour or leaves a gap at byte {position}")
        position += extent.nbytes
    if position != size:
        raise OspError(f"{path}: {size - position} bytes after the last tensor; the file is damaged")
