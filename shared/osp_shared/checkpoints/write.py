"""Writing safetensors: streamed, with fingerprints in the header, complete or absent.

The header stands before the data but holds the data's fingerprints, so room is left for it and it is written last. The
format allows a header to be padded with blanks.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import fingerprint
from osp_shared.checkpoints.dtypes import code_of
from osp_shared.checkpoints.extent import CHUNK, as_bytes
from osp_shared.checkpoints.kinds import set_fingerprint
from osp_shared.checkpoints.output import Output, Placed, check_layout
from osp_shared.checkpoints.raw import FINGERPRINTS
from osp_shared.checkpoints.staging import Staging
from osp_shared.errors import OspError

SET_FINGERPRINT = "osp_fingerprint"  # header or index metadata
STEM = "diffusion_pytorch_model"
_ROOM = 256 << 10  # header of a file whose tensors are not known beforehand


@dataclass(frozen=True)
class Item:
    """A tensor to be written: `name` in the file, `canonical` in fingerprints, and its bytes on demand. `known` is the
    fingerprint that its source recorded: the content must have it."""

    name: str
    canonical: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    pieces: Callable[[], Iterator[np.ndarray]]  # uint8, CHUNK bytes each, the last may be shorter
    known: str | None = None

    def checked(self, digest: str) -> str:
        """The fingerprint of what was written, if the source agrees."""
        if self.known not in (None, digest):
            raise OspError(
                f"tensor {self.name}: its content is not what was once written (another fingerprint); "
                "the source is damaged or was edited: download or convert it again"
            )
        return digest


def item_of(name: str, array: np.ndarray, canonical: str | None = None) -> Item:
    """Item of an array in memory."""
    data = as_bytes(array)
    cut = lambda: (data[i : i + CHUNK] for i in range(0, data.size, CHUNK))  # noqa: E731
    return Item(name, canonical or name, code_of(array.dtype), tuple(array.shape), data.size, cut)


class SafetensorsWriter:
    """One safetensors file in the making; `finish` makes it valid.

    digests: canonical name -> fingerprint. placed: name in the file -> what `check_layout` has to find.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], room: int = _ROOM) -> None:
        self.path, self.room, self.nbytes = path, room, 0
        self.digests: dict[str, str] = {}
        self.placed: dict[str, Placed] = {}
        self._metadata, self._header = dict(metadata), {}
        self._used = header_size([], metadata)
        self._out = Output(path, 8 + room)

    def fits(self, item: Item) -> bool:
        """Whether the header has room for one more tensor."""
        return self._used + entry_size(item) <= self.room

    def add(self, item: Item, progress: Callable[[int], None] = lambda n: None) -> None:
        """Append a tensor; `progress` is told the bytes of each piece."""
        running, start = fingerprint.TensorHash(item.dtype, item.shape), self._out.position
        written = self._out.stream(item.pieces(), running, progress)
        if written != item.nbytes:
            raise OspError(f"{self.path.name}: tensor {item.name} gave {written} bytes instead of {item.nbytes}")
        self._used += entry_size(item)
        offsets = [self.nbytes, self.nbytes + written]
        self._header[item.name] = {"dtype": item.dtype, "shape": list(item.shape), "data_offsets": offsets}
        self.nbytes += written
        self.digests[item.canonical] = item.checked(running.hexdigest())
        self.placed[item.name] = item.dtype, item.shape, start

    def finish(self, **metadata: str) -> None:
        """Write the header, with more metadata if there is any; the file is complete and on the disk after this."""
        own = {FINGERPRINTS: json.dumps(self.digests, separators=(",", ":"))}
        text = _header_text({**self._metadata, **metadata, **own}, self._header)
        if len(text) > self.room:
            raise OspError(f"{self.path.name}: header of {len(text)} bytes is larger than the {self.room} left for it")
        self._out.write(np.frombuffer(self.room.to_bytes(8, "little") + text.ljust(self.room), np.uint8), at=0)
        check_layout(self.path, self.placed)
        self._out.sync()
        self.close()

    def close(self) -> None:
        self._out.close()


def _header_text(metadata: Mapping[str, str], header: Mapping[str, dict]) -> bytes:
    return json.dumps({"__metadata__": dict(metadata), **header}, separators=(",", ":")).encode()


def entry_size(item: Item) -> int:
    """Upper bound of what a tensor adds to a header: its entry, and its fingerprint inside a quoted JSON text."""
    shape = sum(len(str(n)) + 1 for n in item.shape)
    return len(json.dumps(item.name)) + 2 * len(json.dumps(item.canonical)) + shape + fingerprint.DIGITS + 110


def header_size(items: Iterable[Item], metadata: Mapping[str, str]) -> int:
    """Room for the header of a file with these tensors, a multiple of 8 so that the data is aligned."""
    fixed = len(_header_text({**metadata, FINGERPRINTS: "{}", SET_FINGERPRINT: "0" * fingerprint.DIGITS}, {}))
    return -(-(fixed + sum(map(entry_size, items))) // 8) * 8


def index_text(weight_map: Mapping[str, str], total: int, digests: Mapping[str, str]) -> str:
    """An index.json as diffusers and transformers read it."""
    metadata = {"total_size": total, SET_FINGERPRINT: set_fingerprint(digests)}
    return json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write and fsync a small file in a staging folder."""
    with path.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def replaced_by(stem: str) -> Callable[[str], bool]:
    """Which files of an existing folder a new set of shards with this stem takes the place of."""
    pattern = re.compile(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    return lambda name: pattern.fullmatch(name) is not None


def write_safetensors(
    folder: str | Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    shard_bytes: int = 5 << 30,
    metadata: Mapping[str, str] | None = None,
    stem: str = STEM,
) -> str:
    """Write `(name, array)` pairs into `folder` as one safetensors file or as shards with an index.

    Streaming: one array at a time is looked at. Atomic: the folder's earlier weights stay in force until everything is
    written, fsynced and read back; other files in the folder are kept. Returns the fingerprint of the set.
    Raises OspError for a name given twice, a type that cannot be stored, or a disk that is full.
    """
    metadata = {"format": "pt", **(metadata or {})}
    with Staging(Path(folder)) as staging:
        staging.clear()
        writers: list[SafetensorsWriter] = []
        names: dict[str, int] = {}
        for name, array in tensors:
            item = item_of(name, array)
            if name in names:
                raise OspError(f"{folder}: tensor {name} was given twice")
            full = writers and (writers[-1].nbytes + item.nbytes > shard_bytes or not writers[-1].fits(item))
            if not writers or (full and writers[-1].nbytes):
                if writers:
                    writers[-1].finish()
                staging.require_space(item.nbytes)
                writers.append(SafetensorsWriter(staging.folder / f"{len(writers)}.tmp", metadata))
            writers[-1].add(item)
            names[name] = len(writers) - 1
        if not writers:
            raise OspError(f"{folder}: no tensors were given")
        digests = {name: digest for w in writers for name, digest in w.digests.items()}
        writers[-1].finish(**({SET_FINGERPRINT: set_fingerprint(digests)} if len(writers) == 1 else {}))
        files = name_shards(len(writers), stem)
        for w, file in zip(writers, files, strict=True):
            os.rename(w.path, staging.folder / file)
        if len(files) > 1:
            weight_map = {name: files[k] for name, k in names.items()}
            text = index_text(weight_map, sum(w.nbytes for w in writers), digests)
            write_text(staging.folder / entry_name(files, stem), text)
        staging.commit_folder(replaced_by(stem), entry_name(files, stem))
    return set_fingerprint(digests)


def name_shards(count: int, stem: str) -> list[str]:
    """Published names of `count` files."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{k:05d}-of-{count:05d}.safetensors" for k in range(1, count + 1)]


def entry_name(files: list[str], stem: str) -> str:
    """The file that readers start from: the index when there are several weight files."""
    return files[0] if len(files) == 1 else f"{stem}.safetensors.index.json"
