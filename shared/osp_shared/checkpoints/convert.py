"""Converting one checkpoint: read, check against the spec, stream, verify, and only then put in place."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp_shared.checkpoints import kinds, plan
from osp_shared.checkpoints.checkpoint import Checkpoint
from osp_shared.checkpoints.locate import PICKLES
from osp_shared.checkpoints.plan import Options, Plan
from osp_shared.checkpoints.raw import parse, read_config
from osp_shared.checkpoints.staging import Staging
from osp_shared.checkpoints.write import (
    SET_FINGERPRINT,
    STEM,
    Item,
    SafetensorsWriter,
    entry_name,
    header_size,
    index_text,
    name_shards,
    replaced_by,
    write_text,
)
from osp_shared.checkpoints.write_ckpt import CkptWriter, check_types
from osp_shared.errors import OspError

Progress = Callable[[int, int], None]  # bytes written and compared since the last call, bytes in all
_COMPANION = 64 << 20  # files beside the weights that are copied with them: tokenizers, configs, licences


@dataclass(frozen=True)
class Report:
    """What was done. `fingerprint` is the set's; `done_before`: the target was already what was asked for."""

    target: Path
    kind: str | None
    tensors: int
    nbytes: int
    fingerprint: str
    notes: tuple[str, ...]
    seconds: float
    done_before: bool = False


def convert(
    source: Checkpoint,
    target: str | Path,
    options: Options = Options(),  # noqa: B008 - frozen
    config: Mapping[str, Any] | None = None,
    progress: Progress = lambda n, total: None,
    unknown: bool = False,
) -> Report:
    """Write `source` to `target`: a folder, a `.safetensors` file, or a MindSpore `.ckpt` file.

    config: the model's config.json, checked against the weights; default: the one beside the weights, or one derived
    from them. unknown: accept a model that no spec describes, unchecked.

    Memory stays below a few dozen MiB beside one tensor at most. The target appears complete and verified, or not at
    all. A folder target is resumed shard by shard after an interruption.
    Raises OspError: names or shapes that do not fit, a full disk, a target that exists, a write that reads back wrong.
    """
    started, target = time.monotonic(), Path(target)
    spec = None if unknown and source.kind is None else source.spec(config)
    todo = plan.make(source, spec, options, config)
    _check_target(source, target, todo)
    done = _existing(target, todo, options, _stem(source.kind))
    digests = done or _write(source, target, todo, options, progress)
    return Report(
        target, source.kind, len(todo.items), todo.nbytes, kinds.set_fingerprint(digests), tuple(source.notes),
        time.monotonic() - started, done is not None,
    )  # fmt: skip


def _check_target(source: Checkpoint, target: Path, todo: Plan) -> None:
    sources = {s.path.resolve() for e in source.extents.values() for s in e.segments}
    if target.resolve() in sources:
        raise OspError(f"{target}: is the source itself; choose another target")
    if target.suffix in PICKLES and target.suffix != ".ckpt":
        raise OspError(f"{target}: pickles are not written; end it in .safetensors or .ckpt, or name a folder")
    if target.suffix == ".ckpt":
        check_types(todo.items, target)
    parent = next((p for p in target.absolute().parents if p.exists()), None)
    if parent is None or not parent.is_dir():
        raise OspError(f"{target}: {parent} is not a folder")


def _is_file(target: Path) -> bool:
    return target.suffix in (".safetensors", ".ckpt")


def _stem(source_kind: str | None) -> str:
    return kinds.BY_NAME[source_kind].stem if source_kind else STEM


def _existing(target: Path, todo: Plan, options: Options, stem: str) -> dict[str, str] | None:
    """Fingerprints of a target that this very job wrote before; OspError when the target is something else."""
    if not target.exists():
        return None
    if _is_file(target) != target.is_file():
        raise OspError(f"{target}: is a {'file' if target.is_file() else 'folder'}; the target would not be one")
    files = [target] if target.is_file() else sorted(target.glob("*.safetensors"))
    entry = target / entry_name([f.name for f in files] or [""], stem)
    if not files:
        return None
    try:
        parts = [parse(file) for file in files]
        digests = {n: d for part in parts for n, d in part.digests.items()}
        if all(part.metadata.get("osp_job") == todo.key for part in parts):
            # All of it, or what a killed run had moved in before its index.
            whole = digests.keys() == {item.canonical for item in todo.items} and (target.is_file() or entry.exists())
            return digests if whole else None
    except OspError:
        pass  # not a file of ours
    if not options.overwrite:
        raise OspError(f"{target}: already holds weights; pass --overwrite to replace them, or choose another target")
    return None


def _write(source: Checkpoint, target: Path, todo: Plan, options: Options, progress: Progress) -> dict[str, str]:
    tell = lambda n: progress(n, todo.nbytes)  # noqa: E731
    with Staging(target) as staging:
        if not staging.holds(todo.key):
            staging.clear()
        staging.require_space(todo.nbytes + (1 << 20))
        staging.begin(todo.key)
        if _is_file(target):
            path = staging.folder / f"0{target.suffix}"
            digests = _write_file(path, list(todo.items), todo, tell, whole=True)
            staging.commit_file(path)
            return digests
        digests = _write_shards(source, staging, todo, options, tell)
        _companions(source, staging.folder, target)
        if todo.config is not None and todo.config != read_config(target):
            write_text(staging.folder / "config.json", json.dumps(todo.config, indent=2) + "\n")
        stem, count = _stem(source.kind), len(todo.shards(options.shard_bytes))
        staging.commit_folder(replaced_by(stem), entry_name(name_shards(count, stem), stem))
        return digests


def _write_shards(source: Checkpoint, staging: Staging, todo: Plan, options: Options, tell) -> dict[str, str]:
    """All shards under their published names, with the index if there are several; finished ones are kept."""
    shards = todo.shards(options.shard_bytes)
    stem, digests, weight_map = _stem(source.kind), {}, {}
    names = name_shards(len(shards), stem)
    for k, items in enumerate(shards):
        path = staging.folder / names[k]
        if path.exists():  # renamed only after it was verified
            digests |= parse(path).digests
            tell(sum(item.nbytes for item in items))
        else:
            part = staging.folder / f"{k}.safetensors"
            digests |= _write_file(part, items, todo, tell, whole=len(shards) == 1)
            part.rename(path)
        weight_map |= {item.name: names[k] for item in items}
    if len(shards) > 1:
        write_text(staging.folder / entry_name(names, stem), index_text(weight_map, todo.nbytes, digests))
    return digests


def _write_file(path: Path, items: list[Item], todo: Plan, tell, whole: bool) -> dict[str, str]:
    """One file, compared with what was written. `whole`: it holds the whole set, and so the set's fingerprint."""
    if path.suffix == ".ckpt":
        writer = CkptWriter(path, todo.metadata)
    else:
        writer = SafetensorsWriter(path, todo.metadata, header_size(items, todo.metadata))
    try:
        for item in items:
            writer.add(item, tell)
        writer.finish(**({SET_FINGERPRINT: kinds.set_fingerprint(writer.digests)} if whole else {}))
    finally:
        writer.close()
    return writer.digests


def _companions(source: Checkpoint, folder: Path, target: Path) -> None:
    """Copy the small files beside the weights: tokenizers, generation settings, licences."""
    origin = source.path if source.path.is_dir() else source.path.parent
    if not source.path.is_dir() or origin.resolve() == target.resolve():
        return
    weights = re.compile(r".*\.(safetensors|bin|ckpt|pt|pth|index\.json|h5|msgpack|onnx|gguf)")
    for file in sorted(origin.iterdir()):
        plain = file.is_file() and not file.name.startswith(".") and not weights.fullmatch(file.name)
        if plain and file.stat().st_size <= _COMPANION and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
