"""From located files to extents under the names that the files use: the format of each is told by its first bytes."""

from __future__ import annotations

from pathlib import Path

from osp_shared.checkpoints import names, nested
from osp_shared.checkpoints.extent import RawCheckpoint, merge, shown
from osp_shared.checkpoints.locate import Location
from osp_shared.checkpoints.readers import mindspore_ckpt, safetensors, torch_pickle
from osp_shared.errors import OspError
from osp_shared.specs import fields

FINGERPRINTS = "osp_fingerprints"  # metadata: JSON of {canonical name: fingerprint}
_MAX_NAME = 512


def read_raw(where: Location, kind: str | None = None) -> RawCheckpoint:
    """All tensors of one model. `kind` only decides which part of a torch training checkpoint is meant."""
    parts = {file.name: parse(file, kind) for file in where.files}
    raw = next(iter(parts.values())) if len(parts) == 1 else merge(parts, where.path)
    if where.index is not None:
        for name, shard in where.index.items():
            if name not in parts[shard].extents:
                raise OspError(f"{where.path}: tensor {shown(name)} is not in {shard}, where the index places it")
    if not raw.extents:
        raise OspError(f"{where.path}: holds no tensors")
    return raw


def parse(path: Path, kind: str | None = None) -> RawCheckpoint:
    """One file of any format. OspError says what it is when it is none of them."""
    try:
        return _checked(_parse(path, kind))
    except OSError as e:
        raise OspError(f"{path}: cannot be read ({e.strerror})") from None


def _parse(path: Path, kind: str | None) -> RawCheckpoint:
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(512)
    # Before the others: the length that a safetensors file starts with may begin with any byte.
    if (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size) or path.suffix == ".safetensors":
        return safetensors.parse(path)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        root, form = torch_pickle.parse(path)
        extents, notes = nested.select(root, path, kind)
        return RawCheckpoint(path, form, extents, {}, notes)
    if head[:1] == b"\x0a" and size > 2:
        return mindspore_ckpt.parse(path)
    raise OspError(f"{path}: {_guess(head, size)}; weights are safetensors, torch pickles or MindSpore .ckpt files")


def _guess(head: bytes, size: int) -> str:
    if size == 0:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself: fetch it with `git lfs pull`"
    if head.lstrip()[:1] == b"<":
        return "a web page, not the file itself: the download failed"
    if head[257:262] == b"ustar":
        return "torch's tar format of before 2018, or another tar: re-save it with torch.save"
    return "not a format that is read here, or encrypted"


def _checked(raw: RawCheckpoint) -> RawCheckpoint:
    """Names that can be names, and the recorded fingerprints taken out of the metadata."""
    for name in raw.extents:
        if not name or len(name) > _MAX_NAME or not name.isprintable():
            raise OspError(f"{raw.path}: impossible tensor name {shown(name)}")
    text = raw.metadata.pop(FINGERPRINTS, None)
    if text is not None:
        digests = safetensors.parse_json(text.encode("utf-8", "replace"), raw.path)
        if not all(isinstance(d, str) for d in digests.values()):
            raise OspError(f"{raw.path}: damaged {FINGERPRINTS} in its metadata")
        raw.digests.update(digests)
    return raw


def read_config(folder: Path) -> dict | None:
    """`config.json` of a model folder, None when there is none; OspError when it is damaged."""
    file = folder / "config.json"
    if not file.is_file() or file.stat().st_size > 16 << 20:
        return None
    return {key: value for key, value in fields.read_object(file).items() if key not in names.EMA_CONFIG}
