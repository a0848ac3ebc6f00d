"""From a path that somebody typed to the weight files behind it: a file, an index, or a folder.

In a folder the first of these decides: a safetensors index, a safetensors file under a name that libraries write,
the only safetensors file, a pickle index, the only pickle or MindSpore file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from osp_shared.checkpoints.extent import shown
from osp_shared.checkpoints.readers import safetensors
from osp_shared.errors import OspError

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model")
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")  # only an index says what these make together
MAX_INDEX = 64 << 20
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class Location:
    """The files that hold one model. `index` maps each tensor to its shard's file name when there is an index."""

    path: Path
    files: tuple[Path, ...]
    index: dict[str, str] | None = None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent


def locate(path: str | Path) -> Location:
    """Files of one model; OspError when there are none, or several that could be meant."""
    path = Path(path)
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.is_file():
            return _index(path) if path.name.endswith(".json") else Location(path, (path,))
        exists = path.exists()
    except OspError:
        raise
    except (OSError, ValueError) as e:  # no permission; a NUL in the name
        raise OspError(f"{str(path)[:200]!r}: cannot be read ({getattr(e, 'strerror', e)})") from None
    if exists:
        raise OspError(f"{path}: neither a file nor a folder")
    parent = path.parent
    hint = "" if parent.is_dir() else f"; the folder {parent} does not exist either"
    raise OspError(f"{path}: no such file or folder{hint}; give a weight file, an index .json or a model folder")


def _in_folder(folder: Path) -> Location:
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    for ending, single in ((".safetensors", ".safetensors"), (".bin", ".bin")):
        index = [n for n in names if n.endswith(f"{ending}.index.json")]
        if index:
            found = _index(folder / _only(folder, index, "indexes"))
            return Location(folder, found.files, found.index)
        usual = [stem + single for stem in STEMS if stem + single in names]
        if usual:
            return Location(folder, (folder / usual[0],))
        if single == ".safetensors" and (loose := [n for n in names if n.endswith(single) and not _SHARD.search(n)]):
            return Location(folder, (folder / _only(folder, loose, "safetensors files"),))
    weights = [n for n in names if n.endswith(PICKLES) and not _SHARD.search(n)]
    if weights:
        return Location(folder, (folder / _only(folder, weights, "weight files"),))
    if shards := [n for n in names if _SHARD.search(n)]:
        raise OspError(f"{folder}: shards such as {shards[0]}, but no index .json that says what they are; download it")
    below = sorted(p.parent.name for p in folder.glob("*/*") if p.suffix in (".safetensors", *PICKLES))
    hint = f"; there are some in its subfolder {below[0]}" if below else ""
    kinds = ", ".join(("*.safetensors", *(f"*{p}" for p in PICKLES)))
    raise OspError(f"{folder}: no weights found (looked for {kinds}){hint}")


def _only(folder: Path, names: list[str], what: str) -> str:
    if len(names) > 1:
        raise OspError(f"{folder}: {len(names)} {what} ({', '.join(names[:4])}, ...); name the one that is meant")
    return names[0]


def _index(path: Path) -> Location:
    if path.stat().st_size > MAX_INDEX:
        raise OspError(f"{path}: an index of {path.stat().st_size} bytes is not a weight index")
    weight_map = safetensors.parse_json(path.read_bytes(), path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise OspError(f"{path}: not a weight index: it needs a non-empty weight_map")
    for name in weight_map.values():
        # A shard lies beside its index; anything else in this place is a mistake or an attack.
        if not isinstance(name, str) or not 0 < len(name) < 256 or name != Path(name).name or set(name) & {"\0", "\\"}:
            raise OspError(f"{path}: shard name {shown(name)} is not a plain file name")
    shards = sorted(set(weight_map.values()))
    if len(shards) > MAX_SHARDS:
        raise OspError(f"{path}: names {len(shards)} shards; no model has that many")
    files = tuple(path.parent / name for name in shards)
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OspError(f"{path}: of {len(shards)} shards {shown(missing[0])}{more} is missing beside it; download it")
    return Location(path, files, weight_map)
