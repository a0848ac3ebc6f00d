"""The run manifest: what was run, with which weights and versions, and what came out, as JSON beside the outputs.

A command with one output writes `<output>.json`. A command with many writes into their folder `manifest/run.json`
(`run-rank1.json` ... for further processes) and, for each finished prompt or clip, `manifest/<output>.json`: after
its files and by one rename. `--resume` skips an item when that entry has the same inputs and the files are still the
ones that were written then.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from osp_shared.checkpoints import open_checkpoint
from osp_shared.errors import OspError
from osp_tools.options import Selected

PACKAGES = ("open-sora-parity", "numpy", "mindspore", "torch", "transformers", "av", "safetensors")


class Manifest:
    """Collects facts of one run; `write` puts them on disk, also after an interruption."""

    def __init__(self, path: Path, command: str, args: argparse.Namespace, backend: Selected, **facts: Any):
        """facts: choices that were not arguments, such as a default precision."""
        self.path = path
        self.facts: dict[str, Any] = {
            "command": command,
            "argv": args.argv,
            "arguments": {k: v for k, v in vars(args).items() if k not in ("run", "argv", "command")},
            "backend": backend.name,
            "device": backend.device,
            **facts,
            "versions": versions(),
            "weights": {},
            "outputs": [],
            "seconds": {},
        }
        self._hashing: dict[str, Fingerprint] = {}

    def add_weights(self, role: str, path: str) -> None:
        """Record a weight file; its fingerprint is computed beside the work unless a conversion recorded it."""
        if role not in self._hashing:
            self.facts["weights"][role] = {"path": os.path.abspath(path)}
            self._hashing[role] = Fingerprint(path)

    def add_output(self, entry: Mapping[str, Any]) -> None:
        self.facts["outputs"].append(dict(entry))

    @contextmanager
    def timed(self, phase: str):
        """Adds the seconds of its body to `phase`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.facts["seconds"]
            seconds[phase] = round(seconds.get(phase, 0.0) + time.perf_counter() - start, 3)

    def write(self, wait: bool = True) -> None:
        """wait: for fingerprints that are still being computed; without them they are null."""
        for role, fingerprint in self._hashing.items():
            self.facts["weights"][role]["fingerprint"] = fingerprint.result(wait)
        write_json(self.path, self.facts)


class Fingerprint:
    """The fingerprint of a checkpoint's content, computed in a thread."""

    def __init__(self, path: str) -> None:
        self._value: str | None = None
        self._thread = threading.Thread(target=self._compute, args=(path,), daemon=True)
        self._thread.start()

    def _compute(self, path: str) -> None:
        try:
            with open_checkpoint(path) as checkpoint:
                self._value = checkpoint.fingerprint()
        except (OspError, OSError) as error:  # the files were readable when the model was loaded from them
            self._value = f"unknown: {error}"

    def result(self, wait: bool) -> str | None:
        if wait:
            self._thread.join()
        return self._value


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_json(path: Path, value: Any) -> None:
    """Atomic: the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ resuming


def identity(facts: Mapping[str, Any]) -> str:
    """Hash of everything that decides an output; equal facts give equal files."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def weights_identity(path: str) -> list:
    """Names, sizes and times of weight files: tells a changed checkpoint without reading it.

    Raises:
        OspError: nothing there.
    """
    root = Path(path)
    files = sorted(p for p in root.iterdir() if p.is_file()) if root.is_dir() else [root]
    try:
        return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    except OSError as error:
        raise OspError(f"{path}: {error.strerror}") from None


def digest(path: Path) -> str:
    running = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            running.update(piece)
    return running.hexdigest()


def run_path(folder: Path, rank: int = 0) -> Path:
    """Where the manifest of one process of a run with many outputs stands."""
    return folder / "manifest" / (f"run-rank{rank}.json" if rank else "run.json")


def entry_path(output: Path) -> Path:
    return output.parent / "manifest" / f"{output.name}.json"


def finish(output: Path, key: str, files: Sequence[Path], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the entry of a finished item and return its content."""
    entry = {**facts, "identity": key, "files": {p.name: digest(p) for p in files}}
    write_json(entry_path(output), entry)
    return entry


def finished(output: Path, key: str) -> dict[str, Any] | None:
    """The entry of an item that is finished: same identity, and every file as it was written; else None."""
    try:
        entry = json.loads(entry_path(output).read_text(encoding="utf-8"))
        same = entry["identity"] == key and all(digest(output.parent / f) == d for f, d in entry["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return entry if same else None
