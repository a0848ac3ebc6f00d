"""`open_checkpoint`: one object for whatever was downloaded, with canonical names and streaming reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from osp_shared.checkpoints.extent import CHUNK, Extent, Files, RawCheckpoint, merge
from osp_shared.checkpoints.locate import Location, locate
from osp_shared.checkpoints.readers import safetensors
from osp_shared.errors import OspError


class Checkpoint:
    """The tensors of one model, by name, read one at a time.

    `shapes`, `dtypes` (codes such as "F32", "BF16"), `metadata`: what the files say. `notes`: lines worth telling
    the user, such as which of several weight sets was taken.
    """

    def __init__(self, path: Path, raw: RawCheckpoint) -> None:
        self.path, self.format = path, raw.format
        self.extents: dict[str, Extent] = raw.extents
        self.metadata, self.notes = raw.metadata, raw.notes
        self.shapes = {name: e.shape for name, e in raw.extents.items()}
        self.dtypes = {name: e.dtype for name, e in raw.extents.items()}
        self._files = Files()

    def extent(self, name: str) -> Extent:
        try:
            return self.extents[name]
        except KeyError:
            raise OspError(f"{self.path}: no tensor {name}") from None

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own memory, C order; bfloat16 is `ml_dtypes.bfloat16`. OspError when it is absent."""
        return self._files.read(self.extent(name))

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[np.ndarray]:
        """The tensor's bytes, little endian in C order, as uint8 pieces of `size` bytes."""
        return self._files.chunks(self.extent(name), size)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a weight file, an index .json, or a folder with either. Only headers are read.

    Raises OspError in one line: nothing there, a shard missing, a file cut off, a header that contradicts its file.
    """
    where = locate(path)
    return Checkpoint(Path(path), read_raw(where))


def read_raw(where: Location) -> RawCheckpoint:
    """Extents of all files of a location under the names that the files use."""
    parts = {file.name: _parse(file) for file in where.files}
    if len(parts) == 1:
        raw = next(iter(parts.values()))
    else:
        raw = merge(parts, where.path, next(iter(parts.values())).format)
    if where.index is not None:
        for name, shard in where.index.items():
            if name not in parts[shard].extents:
                raise OspError(f"{where.path}: tensor {name[:80]} is not in {shard}, where the index places it")
    if not raw.extents:
        raise OspError(f"{where.path}: holds no tensors")
    return raw


def _parse(file: Path) -> RawCheckpoint:
    return safetensors.parse(file)
