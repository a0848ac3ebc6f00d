"""All or nothing: interrupted, crowded, faulty and shared targets; and progress that people can see."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import time
from collections import namedtuple

import numpy as np
import pytest

from checkpoint_support import config, same_state, snapshot, weights
from osp_shared.checkpoints import Options, convert, fingerprint, open_checkpoint, staging, write_safetensors
from osp_shared.errors import OspError


def interrupted(source, target, after: int, options: Options):
    """Convert, and lose the process once `after` bytes have been handled."""
    handled = 0

    def progress(n, _):
        nonlocal handled
        handled += n
        if handled >= after:
            raise KeyboardInterrupt

    with open_checkpoint(source) as c, pytest.raises(KeyboardInterrupt):
        convert(c, target, options, progress=progress)


def test_interrupted_conversion_continues(tmp_path):
    write_safetensors(tmp_path / "s", weights("dit").items())
    (tmp_path / "s" / "config.json").write_text(json.dumps(config("dit")))
    total, options = sum(a.nbytes for a in weights("dit").values()), Options(shard_bytes=3000)
    interrupted(tmp_path / "s", tmp_path / "o", total // 2, options)
    assert not (tmp_path / "o").exists()
    partial = tmp_path / ".o.osp-partial"
    done = {p.name: p.stat().st_ino for p in partial.glob("diffusion*.safetensors")}
    assert len(done) >= 3
    handled = []
    with open_checkpoint(tmp_path / "s") as c:
        convert(c, tmp_path / "o", options, progress=lambda n, total: handled.append(n))
    assert sum(handled) == total  # the bar still ends at the total
    assert not partial.exists()
    with open_checkpoint(tmp_path / "o") as c:
        same_state(c, weights("dit"))


def test_finished_shards_are_kept_only_for_the_same_job(tmp_path):
    for salt in ("", "x"):
        write_safetensors(tmp_path / f"s{salt}", weights("dit", salt=salt).items())
        (tmp_path / f"s{salt}" / "config.json").write_text(json.dumps(config("dit")))
    options = Options(shard_bytes=3000)
    interrupted(tmp_path / "s", tmp_path / "o", 10_000, options)
    partial = tmp_path / ".o.osp-partial"
    kept = next(iter(sorted(partial.glob("diffusion*.safetensors"))))
    stamp = kept.stat().st_mtime_ns
    with open_checkpoint(tmp_path / "s") as c:
        convert(c, tmp_path / "o", options)
    assert (tmp_path / "o" / kept.name).stat().st_mtime_ns == stamp  # continued: this shard was not written again
    shutil.rmtree(tmp_path / "o")
    interrupted(tmp_path / "s", tmp_path / "o", 10_000, options)
    with open_checkpoint(tmp_path / "sx") as c:
        convert(c, tmp_path / "o", options)
    with open_checkpoint(tmp_path / "o") as c:
        same_state(c, weights("dit", salt="x"))


def test_disk_space_is_checked_first(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "s", weights("discriminator").items())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: usage(1 << 40, 0, 10 << 20))
    with open_checkpoint(tmp_path / "s") as c, pytest.raises(OspError, match="of disk space, 10.0 MiB are free"):
        convert(c, tmp_path / "o")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_write_that_reads_back_differently(tmp_path, monkeypatch):
    """A disk that swallows a bit: the target never appears."""
    from osp_shared.checkpoints import output

    write_safetensors(tmp_path / "s", weights("discriminator").items())
    honest = output.write_all

    def faulty(handle, piece, *where):
        if piece.size == weights("discriminator")["main.2.weight"].nbytes:
            piece = piece.copy()
            piece[7] ^= 1
        honest(handle, piece, *where)

    monkeypatch.setattr(output, "write_all", faulty)
    with open_checkpoint(tmp_path / "s") as c, pytest.raises(OspError, match="reads back differently"):
        convert(c, tmp_path / "o")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_two_conversions_to_one_target(tmp_path):
    write_safetensors(tmp_path / "s", weights("discriminator").items())
    with (
        staging.Staging(tmp_path / "o"),
        open_checkpoint(tmp_path / "s") as c,
        pytest.raises(OspError, match="another process"),
    ):
        convert(c, tmp_path / "o")


def test_folder_is_swapped_without_an_exchange_call(tmp_path, monkeypatch):
    """File systems without renameat2's exchange: two renames, and a crash between them is undone by the next run."""
    write_safetensors(tmp_path / "s", weights("discriminator").items())
    write_safetensors(tmp_path / "o", weights("discriminator", salt="old").items())
    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    rename = staging.os.rename

    def crash_before_the_second(a, b):
        if b == tmp_path / "o":
            raise KeyboardInterrupt
        rename(a, b)

    monkeypatch.setattr(staging.os, "rename", crash_before_the_second)
    with open_checkpoint(tmp_path / "s") as c, pytest.raises(KeyboardInterrupt):
        convert(c, tmp_path / "o", Options(overwrite=True))
    assert not (tmp_path / "o").exists()
    monkeypatch.setattr(staging.os, "rename", rename)
    with staging.Staging(tmp_path / "o"):
        with open_checkpoint(tmp_path / "o") as c:
            same_state(c, weights("discriminator", salt="old"))
    with open_checkpoint(tmp_path / "s") as c:
        convert(c, tmp_path / "o", Options(overwrite=True))
    with open_checkpoint(tmp_path / "o") as c:
        same_state(c, weights("discriminator"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o", "s"]


def test_shards_move_into_an_existing_folder_index_last(tmp_path, monkeypatch):
    """Beside a download nothing has to give way: the folder itself stays, and no moment shows half a model."""
    write_safetensors(tmp_path / "s", weights("discriminator", salt="new").items())
    folder = tmp_path / "vae"
    with open_checkpoint(tmp_path / "s") as c:
        convert(c, tmp_path / "old.ckpt")
    folder.mkdir()
    shutil.copy(tmp_path / "old.ckpt", folder)
    (folder / "config.json").write_text(json.dumps(config("discriminator")))  # the same content, laid out otherwise
    inode, seen, rename = folder.stat().st_ino, [], staging.os.rename

    def watched(a, b):
        if b.parent == folder:
            with open_checkpoint(folder) as now:
                seen.append(now.format)
        rename(a, b)

    monkeypatch.setattr(staging.os, "rename", watched)
    with open_checkpoint(tmp_path / "s") as c:
        convert(c, folder, Options(shard_bytes=1000))
    assert seen and set(seen) == {"MindSpore ckpt"}  # until the very last rename
    assert folder.stat().st_ino == inode
    with open_checkpoint(folder) as c:
        assert c.format == "safetensors" and len({e.segments[0].path for e in c.extents.values()}) > 1
        same_state(c, weights("discriminator", salt="new"))


@pytest.mark.parametrize("shards_moved", ("all", "some"))
def test_rerun_after_a_kill_among_those_moves(tmp_path, shards_moved):
    write_safetensors(tmp_path / "s", weights("discriminator").items())
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "readme.txt").write_text("mine")
    with open_checkpoint(tmp_path / "s") as c:
        convert(c, tmp_path / "o", Options(shard_bytes=1000))
        next((tmp_path / "o").glob("*.index.json")).unlink()
        with pytest.raises(OspError, match="no index"):
            open_checkpoint(tmp_path / "o")
        if shards_moved == "some":
            sorted((tmp_path / "o").glob("*.safetensors"))[0].unlink()
        convert(c, tmp_path / "o", Options(shard_bytes=1000))
    with open_checkpoint(tmp_path / "o") as c:
        same_state(c, weights("discriminator"))
    assert (tmp_path / "o" / "readme.txt").read_text() == "mine"


def test_link_to_a_folder_stays_a_link(tmp_path):
    write_safetensors(tmp_path / "s", weights("discriminator").items())
    write_safetensors(tmp_path / "real", weights("discriminator", salt="old").items())
    (tmp_path / "link").symlink_to("real")
    with open_checkpoint(tmp_path / "s") as c:
        convert(c, tmp_path / "link", Options(overwrite=True))
    assert (tmp_path / "link").is_symlink()
    with open_checkpoint(tmp_path / "real") as c:
        same_state(c, weights("discriminator"))


def test_source_in_a_hub_cache(tmp_path):
    """Snapshots of a hub's cache are links to files named by their hash."""
    write_safetensors(tmp_path / "plain", weights("dit").items(), 3000)
    (tmp_path / "plain" / "config.json").write_text(json.dumps(config("dit")))
    blobs, view = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    view.mkdir(parents=True)
    for k, (name, data) in enumerate(snapshot(tmp_path / "plain").items()):
        (blobs / f"{k:x}").write_bytes(data)
        (view / name).symlink_to(f"../../blobs/{k:x}")
    with open_checkpoint(view) as c:
        same_state(c, weights("dit"))
        assert c.spec().num_layers == 3


def test_progress_shows_bytes_and_time_left(tmp_path, monkeypatch):
    from osp_tools import cli

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    write_safetensors(tmp_path / "s", weights("dit").items())
    (tmp_path / "s" / "config.json").write_text(json.dumps(config("dit")))
    for terminal, visible in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", terminal)
        target = tmp_path / f"o{visible}"
        assert cli.main(["convert", "--src", str(tmp_path / "s"), "--target", str(target)]) == 0
        shown = terminal.getvalue()
        assert ("write + verify" in shown and "B/s" in shown and "<" in shown) == visible


def test_hashing_works_after_a_fork():
    """A worker process inherits the pool of hashing threads without its threads."""
    array = np.zeros(20 << 20, np.uint8)
    expected = fingerprint.of_array(array)  # starts the pool
    pid = os.fork()
    if pid == 0:
        os._exit(0 if fingerprint.of_array(array) == expected else 1)
    for _ in range(200):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        pytest.fail("the child hangs")
    assert os.WEXITSTATUS(status) == 0
