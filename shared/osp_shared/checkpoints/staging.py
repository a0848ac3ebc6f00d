"""All or nothing on disk: work under a temporary name beside the target, then one rename.

`Staging` is a hidden folder beside the target, locked while in use. Killed at any moment, the target is still what it
was; the next run finds the staging folder and continues or clears it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from osp_shared.errors import OspError

try:
    import fcntl
except ImportError:  # not a POSIX system: two conversions to one target at once are then not noticed
    fcntl = None

_JOB = ".job"
MARGIN = 16 << 20  # bytes that must stay free on the disk


class Staging:
    """Temporary folder for `target` (a file or a folder) with an exclusive lock."""

    def __init__(self, target: Path) -> None:
        self.target = Path(os.path.realpath(target))  # what a link points to, not the link
        self.folder = self.target.parent / f".{self.target.name}.osp-partial"
        self._old = self.target.parent / f".{self.target.name}.osp-old"
        self._lock: int | None = None

    def __enter__(self) -> Staging:
        try:
            if self._old.exists() and not self.target.exists():
                os.rename(self._old, self.target)  # killed between the two renames of _swap: the old state again
            self.folder.mkdir(parents=True, exist_ok=True)
            if fcntl is not None:
                self._lock = os.open(self.folder, os.O_RDONLY)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise OspError(f"{self.target}: another process is writing it; wait for that to finish") from None
        except OSError as e:
            raise OspError(f"{self.target}: cannot be written ({e.strerror})") from None
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._lock is not None:
            os.close(self._lock)
        # An interrupted run leaves its finished shards to the next one; a failed run leaves nothing.
        if kind is None or not issubclass(kind, (KeyboardInterrupt, SystemExit)):
            shutil.rmtree(self.folder, ignore_errors=True)

    def clear(self) -> None:
        for child in self.folder.iterdir():
            shutil.rmtree(child) if child.is_dir() else child.unlink()

    def holds(self, job: str) -> bool:
        """Whether an interrupted run of this very job left its finished files here."""
        try:
            return (self.folder / _JOB).read_text(encoding="utf-8") == job
        except (OSError, ValueError):
            return False

    def begin(self, job: str) -> None:
        (self.folder / _JOB).write_text(job, encoding="utf-8")

    def require_space(self, nbytes: int) -> None:
        """OspError unless the disk takes `nbytes` beside what is already staged."""
        staged = sum(p.stat().st_size for p in self.folder.iterdir() if p.is_file())
        need, free = max(nbytes - staged, 0) + MARGIN, shutil.disk_usage(self.folder).free
        if need > free:
            raise OspError(f"{self.target}: needs {gib(need)} of disk space, {gib(free)} are free")

    def commit_file(self, staged: Path) -> None:
        """Put the one staged file in the target's place."""
        os.replace(staged, self.target)
        fsync_folder(self.target.parent)

    def commit_folder(self, replaces: Callable[[str], bool], entry: str) -> None:
        """Put the staged files in the target's place.

        replaces(name): which files of an existing folder give way; the others stay. entry: the file that readers start
        from (the index, or the only weight file). Where nothing has to give way the files are moved in, this one last;
        otherwise the folders change places as a whole.
        """
        (self.folder / _JOB).unlink(missing_ok=True)
        fsync_folder(self.folder)
        if not self.target.exists():
            os.rename(self.folder, self.target)
        elif self._nothing_gives_way(replaces):
            self._move_in(entry)
        else:
            _carry_over(self.target, self.folder, replaces)
            fsync_folder(self.folder)
            self._swap()
        fsync_folder(self.target.parent)

    def _nothing_gives_way(self, replaces: Callable[[str], bool]) -> bool:
        if any(replaces(child.name) for child in self.target.iterdir()):
            return False
        twins = [(child, self.target / child.name) for child in self.folder.iterdir()]
        return all(not b.exists() or (b.is_file() and a.read_bytes() == b.read_bytes()) for a, b in twins)

    def _move_in(self, entry: str) -> None:
        for child in sorted(self.folder.iterdir(), key=lambda p: p.name == entry):
            if child.name == entry:
                fsync_folder(self.target)
            os.rename(child, self.target / child.name)
        fsync_folder(self.target)

    def _swap(self) -> None:
        try:
            if _exchange(self.folder, self.target):
                return  # the old state now has the staging name; __exit__ removes it
            os.rename(self.target, self._old)
            os.rename(self.folder, self.target)
        except OSError as e:
            raise OspError(f"{self.target}: this folder cannot be replaced ({e.strerror}); choose another") from None
        shutil.rmtree(self._old, ignore_errors=True)


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**27 else f"{nbytes / 2**20:.1f} MiB"


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder durable (a no-op where folders cannot be opened)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _carry_over(old: Path, new: Path, replaces: Callable[[str], bool]) -> None:
    """Hard-link (or copy) what the old folder holds beside the files that are replaced."""
    for child in old.iterdir():
        twin = new / child.name
        if twin.exists() or replaces(child.name):
            continue
        if child.is_symlink():
            os.symlink(os.readlink(child), twin)
        elif child.is_dir():
            shutil.copytree(child, twin, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(child, twin)


def _link_or_copy(source, target) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step (Linux renameat2); False where the system or the file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    if rename(-100, os.fsencode(a), -100, os.fsencode(b), 2) == 0:  # AT_FDCWD, RENAME_EXCHANGE
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code))
