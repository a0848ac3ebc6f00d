"""`osp demo`: both jobs on both backends with tiny untrained weights, and how far the backends are apart."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from osp_shared.errors import OspError
from osp_shared.video.reader import load_video
from osp_shared.video.writer import check_writable, write_image, write_video
from osp_tools import assets, demo_picture, demo_weights, options, rec
from osp_tools.demo_worker import FRAMES, HEIGHT, WIDTH
from osp_tools.manifest import write_json

HELP = "both jobs on both backends with tiny weights, and a table of differences"
CLIP = "bigbuckbunny"
BACKENDS = ("torch", "mindspore")
SHARE = 0.999  # of pixels that may differ by one grey level at most


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("demo", help=HELP, description=HELP)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start, folder = time.perf_counter(), check_writable(args.output)
    if missing := [name for name in BACKENDS if not options.installed(name)]:
        raise OspError(
            f"the demo needs both backends, missing: {', '.join(missing)} (pip install -e '.[torch,mindspore]')"
        )
    clip, tokenizer = assets.fetch(CLIP), assets.fetch("mt5_tokenizer")
    folder.mkdir(parents=True, exist_ok=True)
    paths = demo_weights.write(folder / "weights", tokenizer)
    size = sum(f.stat().st_size for p in paths.values() for f in p.glob("*.safetensors")) / 2**20
    print(f"untrained weights of the released topology, {size:.1f} MiB: {folder / 'weights'}", flush=True)
    results = {}
    for backend in BACKENDS:
        print(f"\n== {backend}", flush=True)
        results[backend] = work(backend, folder, clip)
    torch, mindspore = (results[name] for name in BACKENDS)
    original = rec.original_frames(load_video(clip, FRAMES, HEIGHT, WIDTH)[None])[0]
    write_image(folder / "compare.png", demo_picture.sheet(original, torch, mindspore))
    write_video(folder / "compare.mp4", demo_picture.film(original, torch, mindspore), 12)
    rows = differences(torch, mindspore)
    write_json(folder / "differences.json", {"rows": rows, "seconds": round(time.perf_counter() - start, 1)})
    print("\n" + table(rows, results))
    for name in ("compare.png", "compare.mp4", "differences.json"):
        print(folder / name)
    print(f"demo: {time.perf_counter() - start:.0f} s")
    agree = all(row["within_1"] >= SHARE for row in rows)
    print(
        f"torch and mindspore {'agree' if agree else 'DISAGREE'}: at most one grey level apart on {SHARE:.1%} of pixels"
    )
    return 0 if agree else 1


def work(backend: str, folder: Path, clip: Path) -> dict[str, np.ndarray]:
    """Run a backend's half in its own process and read what it kept.

    Raises:
        OspError: it failed.
    """
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "osp_tools.demo_worker", backend, str(folder), str(clip)]
    if code := subprocess.run(command, env=environment, check=False).returncode:
        raise OspError(f"the {backend} half of the demo failed (exit status {code}); its message is above")
    exact = folder / backend / "exact.npz"
    with np.load(exact) as kept:
        result = {name: kept[name] for name in kept.files}
    exact.unlink()
    return result


def differences(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[dict]:
    """One row for each job: grey levels apart, and the relative error of the numbers behind them."""
    rows = []
    for what, pixels, numbers in (("reconstruction", "rec", "rec_float"), ("sample", "sample", "latents")):
        apart = np.abs(a[pixels].astype(int) - b[pixels].astype(int))
        error = np.abs(a[numbers].astype(np.float64) - b[numbers]).max() / np.abs(a[numbers]).max()
        rows.append(
            {
                "what": what,
                "frames": "x".join(map(str, a[pixels].shape[:3])),
                "max": int(apart.max()),
                "mean": float(apart.mean()),
                "within_1": float((apart <= 1).mean()),
                "same": float((apart == 0).mean()),
                "float_error": float(error),
            }
        )
    return rows


def table(rows: list[dict], results: dict[str, dict]) -> str:
    """The differences and both backends' times, as text."""
    lines = ["torch against mindspore, float32    grey levels apart (of 255)              largest error"]
    lines += ["job             frames         max    mean      same   at most 1       of the floats"]
    for r in rows:
        lines.append(
            f"{r['what']:15} {r['frames']:13} {r['max']:4d} {r['mean']:8.5f} {r['same']:8.3%} {r['within_1']:10.4%}"
            f"{r['float_error']:20.1e}"
        )
    lines.append("")
    for name, result in results.items():
        lines.append(
            f"{name:10} reconstruction {float(result['rec_seconds']):5.1f} s, PSNR {float(result['psnr']):.2f} dB, "
            f"SSIM {float(result['ssim']):.4f}; sample {float(result['sample_seconds']):5.1f} s with loading"
        )
    return "\n".join(lines)
