"""What a conversion is going to write: the tensors in order, their shards, and a key that names the job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from osp_shared.checkpoints import dtypes, kinds, names
from osp_shared.checkpoints.checkpoint import Checkpoint
from osp_shared.checkpoints.extent import CHUNK, as_bytes
from osp_shared.checkpoints.write import Item
from osp_shared.errors import OspError

VERSION = 1  # part of every job's key: raise it when the bytes written for the same input change


@dataclass(frozen=True)
class Options:
    """form: whose parameter names, "torch" or "mindspore". dtype: code to cast floating-point tensors to, or None.
    shard_bytes: most bytes of tensors in a file. overwrite: an existing target may be replaced."""

    form: str = "torch"
    dtype: str | None = None
    shard_bytes: int = 5 << 30
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.form not in ("torch", "mindspore"):
            raise OspError(f"format {self.form!r}: choose torch or mindspore")
        if self.shard_bytes < 1:
            raise OspError(f"shard size of {self.shard_bytes} bytes: give a positive size, such as 5GB")


@dataclass(frozen=True)
class Plan:
    """Tensors in the order of the model's state dict, larger element types first so that all stay aligned."""

    items: tuple[Item, ...]
    config: dict[str, Any] | None
    metadata: dict[str, str]
    key: str

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    def shards(self, most: int) -> list[list[Item]]:
        """Consecutive items, as many to a shard as fit in `most` bytes, at least one."""
        groups: list[list[Item]] = []
        size = most + 1
        for item in self.items:
            if size + item.nbytes > most:
                groups.append([])
                size = 0
            groups[-1].append(item)
            size += item.nbytes
        return groups


def make(source: Checkpoint, spec: Any, options: Options, config: Mapping[str, Any] | None) -> Plan:
    """Plan for a checkpoint of a known model (`spec`), or of an unknown one (`spec` None: names as they are)."""
    kind = kinds.BY_NAME.get(source.kind) if spec is not None else None
    order = [n for n in spec.parameters() if n in source.extents] if spec is not None else list(source.extents)
    own = names.to_mindspore(order, kind.name) if kind and options.form == "mindspore" else {n: n for n in order}
    items = [_item(source, name, own[name], options.dtype) for name in order]
    items.sort(key=lambda item: -dtypes.ITEMSIZE[item.dtype])
    config = dict(config) if config is not None else _config(source, spec)
    metadata = {"format": "pt" if options.form == "torch" else "ms"}
    if kind is not None:
        metadata["osp_kind"] = kind.name
    if config is not None:
        metadata["osp_config"] = json.dumps(config, separators=(",", ":"))
    key = _key(source, items, options, metadata)
    return Plan(tuple(items), config, {**metadata, "osp_job": key}, key)


def _config(source: Checkpoint, spec: Any) -> dict[str, Any] | None:
    if source.config is not None:
        return source.config
    if spec is None or source.kind == "llama":  # the sizes that the spec knows are not a transformers config
        return None
    return spec.to_config()


def _key(source: Checkpoint, items: Iterable[Item], options: Options, metadata: Mapping[str, str]) -> str:
    """Hash of the source files' identities and of everything that decides the bytes written."""
    files = sorted({s.path for e in source.extents.values() for s in e.segments})
    stamps = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    content = [
        VERSION,
        stamps,
        [(i.name, i.dtype, i.shape) for i in items],
        options.shard_bytes,
        sorted(metadata.items()),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _item(source: Checkpoint, name: str, own: str, cast: str | None) -> Item:
    have, shape = source.dtypes[name], source.shapes[name]
    want = cast if cast is not None and have in dtypes.FLOATS else have
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtypes.ITEMSIZE[want]
    if want == have:
        return Item(own, name, want, shape, nbytes, lambda: source.pieces(name), source.digests.get(name))
    return Item(own, name, want, shape, nbytes, lambda: regroup(_cast(source, name, have, want)))


def _cast(source: Checkpoint, name: str, have: str, want: str) -> Iterator[np.ndarray]:
    for piece in source.chunks(name):
        values = piece.view(dtypes.NUMPY[have])
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = values.astype(dtypes.NUMPY[want])
        if want == "F16" and not np.isfinite(rounded).all() and np.isfinite(values).all():
            raise OspError(f"{source.path}: {name} has values beyond fp16's 65504; convert to bf16 or fp32")
        yield as_bytes(rounded)


def regroup(pieces: Iterable[np.ndarray], size: int = CHUNK) -> Iterator[np.ndarray]:
    """The same bytes in pieces of exactly `size` (the last may be shorter)."""
    kept: list[np.ndarray] = []
    have = 0
    for piece in pieces:
        while have + piece.size >= size:
            cut = size - have
            yield np.concatenate([*kept, piece[:cut]]) if kept else piece[:cut]
            kept, have, piece = [], 0, piece[cut:]
        if piece.size:
            kept.append(piece)
            have += piece.size
    if kept:
        yield np.concatenate(kept)
