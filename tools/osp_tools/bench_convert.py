"""Full-size conversions: peak memory, and time beside a plain copy of the same file on the same disk.

`python -m osp_tools.bench_convert FOLDER` writes a float32 DiT of the released size (11 GB) as safetensors shards, and
an mT5-xxl with a few of its layers as a torch pickle (several GB), fills them with random bytes, and converts both in
processes of their own. Needs three times the largest set in free disk space, and torch to lay out the pickle.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import Options, convert, open_checkpoint, write_safetensors
from osp_shared.checkpoints.staging import gib
from osp_shared.specs import dit, t5

_BLOCK = 64 << 20


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m osp_tools.bench_convert", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="an empty folder on the disk to be measured")
    parser.add_argument("--dit_layers", type=int, default=32, help="blocks of the DiT (32: 11 GB; 0: none)")
    parser.add_argument("--t5_layers", type=int, default=3, help="blocks of the mT5 encoder (24: 22 GB; 0: none)")
    parser.add_argument("--child", nargs=2, metavar=("SRC", "TARGET"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return _child(*args.child)
    args.folder.mkdir(parents=True, exist_ok=True)
    cases = {
        "DiT, float32 safetensors in 4 GiB shards -> folder": (make_dit, args.dit_layers),
        "mT5, torch pickle -> folder": (make_t5_pickle, args.t5_layers),
    }
    for title, (make, layers) in cases.items():
        if not layers:
            continue
        source = make(args.folder / "source", layers)
        print(f"{title}: {gib(_size(source))}, largest tensor {gib(_largest(source))}", flush=True)
        _measure(source, args.folder)
        shutil.rmtree(args.folder / "source")
    return 0


def _measure(source: Path, folder: Path) -> None:
    """Copies and conversions in turn, the best of two rounds each, so that a busy moment hits both."""
    names, best = {"": "as it is ", "BF16": "cast bf16"}, {}
    for _ in range(2):
        best["copy"] = min(best.get("copy", 1e9), _copy(source, folder / "copy"))
        for dtype in names:
            found = _convert(source, folder / "target", dtype)
            best[dtype] = min(best.get(dtype, found), found, key=lambda f: f["seconds"])
    for dtype, name in names.items():
        seconds, peak = best[dtype]["seconds"], best[dtype]["peak"]
        rate = f"{gib(int(_size(source) / seconds))}/s of source"
        ratio = f"plain copy with fsync {best['copy']:.1f} s, ratio {best['copy'] / seconds:.2f}"
        print(f"  {name}: {seconds:.1f} s, {rate}; {ratio}")
        print(f"    peak memory {gib(peak)}, of it {gib(peak - best[dtype]['start'])} for the conversion", flush=True)


def _convert(source: Path, target: Path, dtype: str) -> dict:
    _drop_cache(source)
    command = [sys.executable, "-m", "osp_tools.bench_convert", "-", "--child", str(source), str(target)]
    environment = {**os.environ, "OSP_BENCH_DTYPE": dtype}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    shutil.rmtree(target)
    return json.loads(done.stdout)


def _child(source: str, target: str) -> int:
    """One conversion, with nothing else in the process. Prints seconds and the resident memory before and at most."""
    start = _peak()
    options = Options(dtype=os.environ.get("OSP_BENCH_DTYPE") or None)
    began = time.perf_counter()
    with open_checkpoint(source) as checkpoint:
        convert(checkpoint, target, options)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "start": start, "peak": _peak()}))
    return 0


def _peak() -> int:
    """Most resident memory of this process so far, in bytes. (getrusage counts the parent's before exec, too.)"""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


# ------------------------------------------------------------------------------------------------ synthetic checkpoints


def make_dit(folder: Path, layers: int) -> Path:
    """The released DiT's names and shapes in float32, in three shards."""
    spec = dataclasses.replace(dit.RELEASED, num_layers=layers)
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(max(np.prod(s) for s in spec.parameters().values()) + 4096, np.float32)

    def tensors():
        for name, shape in spec.parameters().items():
            first = int(rng.integers(4096))
            yield name, pool[first : first + int(np.prod(shape))].reshape(shape)

    write_safetensors(folder, tensors(), shard_bytes=4 << 30)
    (folder / "config.json").write_text(json.dumps(spec.to_config()))
    return folder


def make_t5_pickle(folder: Path, layers: int) -> Path:
    """mT5-xxl with fewer layers as `pytorch_model.bin`: torch lays it out without data, then the data is filled in."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    spec = dataclasses.replace(t5.RELEASED, num_layers=layers)
    folder.mkdir(parents=True)
    file = folder / "pytorch_model.bin"
    with FakeTensorMode(), torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save({name: torch.empty(shape) for name, shape in spec.parameters().items()}, file)
    block = np.random.default_rng(0).standard_normal(_BLOCK // 4, np.float32)
    with open_checkpoint(file) as checkpoint, file.open("r+b") as f:
        for extent in checkpoint.extents.values():
            for segment in extent.segments:
                f.seek(segment.offset)
                for at in range(0, segment.nbytes, _BLOCK):
                    f.write(block[: (min(_BLOCK, segment.nbytes - at)) // 4])
        f.flush()
        os.fsync(f.fileno())
    (folder / "config.json").write_text(json.dumps(spec.to_config()))
    return folder


# ------------------------------------------------------------------------------------------------ the disk


def _copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy of every file, with fsync and nothing in the page cache beforehand."""
    _drop_cache(source)
    began = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        with file.open("rb") as src, (target / file.name).open("wb") as dst:
            shutil.copyfileobj(src, dst, 8 << 20)
            dst.flush()
            os.fsync(dst.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def _drop_cache(folder: Path) -> None:
    for file in folder.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.iterdir())


def _largest(folder: Path) -> int:
    with open_checkpoint(folder) as checkpoint:
        return max(e.nbytes for e in checkpoint.extents.values())


if __name__ == "__main__":
    sys.exit(main())
