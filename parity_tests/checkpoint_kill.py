"""Conversions killed at random moments: whatever is at the target afterwards must be the old state or the new one.

Run as `python checkpoint_kill.py FOLDER KILLS SEED`; prints one JSON object. A child is forked for each trial, so that
the moments lie inside the conversion and not in the interpreter's start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import Options, convert, open_checkpoint, write_safetensors
from osp_shared.specs.auxiliary import DiscriminatorSpec

SPEC = DiscriminatorSpec(ndf=24, n_layers=4)  # 1.6 million parameters
TARGETS = ("folder", "model.safetensors", "model.ckpt", "download")


def make_sources(folder: Path) -> list[tuple[Path, str]]:
    """Two checkpoints of one model with other values, and their fingerprints."""
    made = []
    for k in range(2):
        rng = np.random.default_rng(k)
        arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in SPEC.parameters().items()}
        made.append((folder / f"source{k}", write_safetensors(folder / f"source{k}", arrays.items())))
    return made


def work(source: Path, target: Path) -> None:
    with open_checkpoint(source) as checkpoint:
        convert(checkpoint, target, Options(shard_bytes=1 << 20, overwrite=True))


def killed(source: Path, target: Path, delay: float) -> bool:
    """Fork a conversion and kill it after `delay` seconds; False when it had finished before."""
    pid = os.fork()
    if pid == 0:
        try:
            work(source, target)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the conversion failed by itself")
    return os.WIFSIGNALED(status)


def state(target: Path) -> str:
    """Fingerprint of the target's whole content; raises when it is not a complete checkpoint."""
    with open_checkpoint(target) as checkpoint:
        checkpoint.spec()
        if (target / "config.json").exists() and checkpoint.config["ndf"] != SPEC.ndf:
            raise ValueError("another config")
        return checkpoint.fingerprint(recompute=True)


def campaign(folder: Path, kills: int, seed: int) -> dict:
    rng, sources = random.Random(seed), make_sources(folder)
    outcome = {"kills": 0, "old": 0, "new": 0, "continued": 0, "faults": []}
    for kind in TARGETS:
        target = folder / kind
        work(sources[0][0], target)
        started = time.perf_counter()
        work(sources[1][0], target)
        took = time.perf_counter() - started
        (target / "keep.txt" if target.is_dir() else folder / "keep.txt").write_text("mine")
        goal = 0
        if kind == "download":  # converted in place, beside the file that is the old state
            with open_checkpoint(sources[0][0]) as checkpoint:
                convert(checkpoint, target / "original.ckpt")
        while outcome["kills"] < kills * (TARGETS.index(kind) + 1) / len(TARGETS):
            if kind == "download":
                goal = 1
                for file in (*target.glob("*.json"), *target.glob("*.safetensors")):
                    file.unlink()
            source, wanted = sources[goal]
            # Half of the moments anywhere, half around the end, where files take each other's places.
            was_killed = killed(
                source, target, took * (rng.uniform(0, 1) if rng.random() < 0.5 else rng.uniform(0.7, 1.2))
            )
            outcome["kills"] += was_killed
            try:
                found = state(target)
            except Exception as e:  # noqa: BLE001 - any failure to read is what is looked for
                outcome["faults"].append(f"{kind}: {type(e).__name__}: {e}")
                break
            if found not in (sources[0][1], sources[1][1]):
                outcome["faults"].append(f"{kind}: neither the old nor the new state")
                break
            outcome["new" if found == wanted else "old"] += was_killed
            if found == wanted:
                goal = 1 - goal
            elif rng.random() < 0.3:  # a rerun continues or starts clean
                work(source, target)
                outcome["continued"] += 1
                if state(target) != wanted:
                    outcome["faults"].append(f"{kind}: a rerun did not reach the new state")
                goal = 1 - goal
        work(sources[goal][0], target)
    left = sorted(p.name for p in folder.rglob("*") if ".osp-" in p.name or p.suffix == ".tmp")
    kept = (folder / "folder" / "keep.txt").exists()
    outcome["faults"] += [f"left behind: {left}"] * bool(left) + ["keep.txt is gone"] * (not kept)
    return outcome


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
