"""A whole `Open-Sora-Plan-v1.3.0` download in one call: every model folder in it, and the files around them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from osp_shared.checkpoints.checkpoint import open_checkpoint
from osp_shared.checkpoints.convert import Progress, Report, convert
from osp_shared.checkpoints.locate import PICKLES
from osp_shared.checkpoints.plan import Options
from osp_shared.errors import OspError

_WEIGHTS = (".safetensors", *PICKLES)
_DEPTH = 3


def model_folders(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Folders below `root` (or `root` itself) that hold weights, in name order."""
    if any(p.is_file() and p.suffix in _WEIGHTS for p in root.iterdir()):
        yield root
    elif depth:
        for child in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
            yield from model_folders(child, depth - 1)


def convert_release(
    source: str | Path,
    target: str | Path,
    options: Options,
    progress: Callable[[str], Progress] = lambda name: lambda n, total: None,
) -> Iterator[Report]:
    """Convert each model folder of a download into the folder of the same name below `target`; reports as they come.

    Every model is checked before the first is written. Models that an earlier call finished are not written again.
    Raises OspError: no models, an unknown model, weights that do not fit, or a target inside the source.
    """
    source, target = Path(source), Path(target)
    if not source.is_dir():
        raise OspError(f"{source}: not a folder; give the download's top folder")
    if source.resolve() == target.resolve() or source.resolve() in target.resolve().parents:
        raise OspError(f"{target}: lies inside the download; choose a target beside it")
    folders = list(model_folders(source))
    if not folders:
        raise OspError(f"{source}: no weights found in it or in its subfolders")
    for folder in folders:
        with open_checkpoint(folder) as checkpoint:
            checkpoint.spec()
    for folder in folders:
        name = folder.relative_to(source)
        with open_checkpoint(folder) as checkpoint:
            yield convert(checkpoint, target / name, options, progress=progress(str(name)))
    _copy_plain_files(source, target, set(folders))


def _copy_plain_files(source: Path, target: Path, done: set[Path]) -> None:
    """Licences, model cards, index files: whatever lies outside the model folders and is not there yet."""
    for child in sorted(source.iterdir()):
        if child in done or child.name.startswith("."):
            continue
        if child.is_dir():
            _copy_plain_files(child, target / child.name, done)
        elif child.is_file() and not (target / child.name).exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(child, target / child.name)
