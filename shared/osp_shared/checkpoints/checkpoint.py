"""`open_checkpoint`: one object for whatever was downloaded, with canonical names and streaming, checked reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from osp_shared.checkpoints import fingerprint, kinds, names
from osp_shared.checkpoints.dtypes import code_of
from osp_shared.checkpoints.extent import CHUNK, Extent, Files, RawCheckpoint, as_bytes, merge
from osp_shared.checkpoints.locate import locate
from osp_shared.checkpoints.raw import read_config, read_raw
from osp_shared.checkpoints.readers import safetensors
from osp_shared.errors import OspError
from osp_shared.specs.auxiliary import VGG_SLICES


class Checkpoint:
    """The tensors of one model under their canonical names, read one at a time.

    path: as it was given. kind: "wfvae", "dit", "inpaint", "t5", "llama", "discriminator", "lpips" or None.
    format: "safetensors", "torch zip", "torch legacy" or "MindSpore ckpt".
    shapes, dtypes: by name; dtypes are codes such as "F32" and "BF16". config: the config.json beside the weights.
    notes: lines worth telling the user, such as which of several weight sets was taken.
    digests: fingerprints that a conversion recorded; every read of such a tensor is compared with its own.
    """

    def __init__(self, path: Path, raw: RawCheckpoint, kind: str | None, config: dict[str, Any] | None) -> None:
        self.path, self.format, self.metadata, self.config = path, raw.format, raw.metadata, config
        renamed = names.canonical(raw.extents, kind, path)
        self.kind, self.notes = kind, list(raw.notes)
        self.notes += [f"left out: {count} {reason}" for reason, count in renamed.dropped.items()]
        self.extents = {name: raw.extents[own] for name, own in renamed.names.items()}
        self.file_names = dict(renamed.names)
        if kind == "lpips":
            _add_missing_biases(self)
        self.digests = {n: d for n, d in raw.digests.items() if n in self.extents}
        self.shapes = {name: e.shape for name, e in self.extents.items()}
        self.dtypes = {name: e.dtype for name, e in self.extents.items()}
        self.arrays: dict[str, np.ndarray] = {}
        self._files = Files()

    def extent(self, name: str) -> Extent:
        try:
            return self.extents[name]
        except KeyError:
            raise OspError(f"{self.path}: no tensor {name}") from None

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own memory, C order; bfloat16 is `ml_dtypes.bfloat16`.

        Raises OspError when it is absent, or when its content is not what the recorded fingerprint says.
        """
        array = self.arrays[name].copy() if name in self.arrays else self._files.read(self.extent(name))
        if name in self.digests:
            self._compare(name, fingerprint.of_array(array))
        return array

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[np.ndarray]:
        """The tensor's bytes, little endian in C order, as uint8 pieces of `size` bytes (the last may be shorter).

        A recorded fingerprint is compared after the last piece: OspError when it differs.
        """
        extent = self.extent(name)
        if name in self.arrays:
            data = as_bytes(self.arrays[name])
            yield from (data[i : i + size] for i in range(0, data.size, size))
            return
        if size != CHUNK or name not in self.digests:
            yield from self._files.chunks(extent, size)
            return
        running = fingerprint.TensorHash(extent.dtype, extent.shape)
        for piece in self._files.chunks(extent):
            running.update(piece)
            yield piece
        self._compare(name, running.hexdigest())

    def add(self, name: str, value: Extent | np.ndarray) -> None:
        """One more tensor: bytes of a file, or an array in memory."""
        if isinstance(value, np.ndarray):
            self.arrays[name] = value
            value = Extent(code_of(value.dtype), value.shape, ())
        self.extents[name], self.shapes[name], self.dtypes[name] = value, value.shape, value.dtype

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The same for a consumer that takes fingerprints itself: nothing is compared, and each piece is overwritten
        after three more have been taken."""
        extent = self.extent(name)
        return self.chunks(name) if name in self.arrays else self._files.chunks(extent, reuse=True)

    def _compare(self, name: str, found: str) -> None:
        if found != self.digests[name]:
            raise OspError(
                f"{self.path}: the content of {name} is not what was written (its fingerprint differs); "
                "the file is damaged or was edited: convert or download it again"
            )

    def fingerprint(self, recompute: bool = False) -> str:
        """Fingerprint of the set, constants and copies aside; from the recorded ones unless `recompute`."""
        return kinds.set_fingerprint({n: self.tensor_fingerprint(n, recompute) for n in self.extents})

    def tensor_fingerprint(self, name: str, recompute: bool = False) -> str:
        """Fingerprint of one tensor; computing it compares it with the recorded one."""
        if name in self.digests and not recompute:
            return self.digests[name]
        extent = self.extent(name)
        return fingerprint.of_pieces(extent.dtype, extent.shape, self.chunks(name))

    @property
    def nbytes(self) -> int:
        return sum(e.nbytes for e in self.extents.values())

    def spec(self, config: Mapping[str, Any] | None = None) -> Any:
        """The model's spec, derived from the names and agreeing with `config` (default: the config.json beside it).

        Raises OspError for an unknown model, for weights that contradict the config, and for tensors that are missing,
        unexpected or of another shape.
        """
        if self.kind is None:
            known = ", ".join(kind.title for kind in kinds.KINDS)
            raise OspError(f"{self.path}: not a known model ({', '.join(list(self.shapes)[:3])}, ...); known: {known}")
        try:
            spec = kinds.BY_NAME[self.kind].spec().derive(self.shapes, self.config if config is None else config)
            spec.check(self.shapes)
        except OspError as e:
            raise OspError(f"{self.path}: {e}") from None
        return spec

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    def __del__(self) -> None:
        if hasattr(self, "_files"):  # not when the constructor failed
            self._files.close()


def open_checkpoint(path: str | Path | Sequence[str | Path], kind: str | None = None) -> Checkpoint:
    """Open a weight file, an index .json, or a folder with either. Only headers are read.

    kind: which model is wanted; told from the names when it is not given. It matters for training checkpoints, which
    hold several. Several paths are one set that was published in parts (LPIPS: the VGG and its linear heads).
    Raises OspError in one line: nothing there, a shard missing, a file cut off, a header that contradicts its file, a
    pickle that asks for more than tensors.
    """
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise OspError("no checkpoint was named")
    places = [locate(p) for p in paths]
    parts = [read_raw(place, kind) for place in places]
    raw = parts[0] if len(parts) == 1 else merge({str(p): part for p, part in zip(paths, parts, strict=True)}, paths[0])
    if kind is None:
        found = kinds.detect([n for n in map(names.common, raw.extents) if n is not None])
        kind = found.name if found else None
    return Checkpoint(Path(paths[0]), raw, kind, read_config(places[0].folder) or _embedded_config(raw))


def _embedded_config(raw: RawCheckpoint) -> dict[str, Any] | None:
    """The config that a conversion wrote into the file itself, so that one file is enough."""
    text = raw.metadata.get("osp_config")
    return None if text is None else safetensors.parse_json(text.encode("utf-8", "replace"), raw.path)


def _add_missing_biases(checkpoint: Checkpoint) -> None:
    """The MindSpore LPIPS file was published with a VGG whose convolutions have no biases: they are zero."""
    convolutions = [f"net.slice{s}.{i}" for s, layers in VGG_SLICES.items() for i, _, _ in layers]
    extents = checkpoint.extents
    if any(f"{c}.bias" in extents for c in convolutions) or not all(f"{c}.weight" in extents for c in convolutions):
        return
    for c in convolutions:
        weight = extents[f"{c}.weight"]
        extents[f"{c}.bias"] = Extent(weight.dtype, weight.shape[:1], ())
    checkpoint.notes.append("VGG without biases: zeros are used; LPIPS values differ from the reference package's")
