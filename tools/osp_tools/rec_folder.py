"""`osp rec-video-folder`: every video of a folder, or of a list, through the autoencoder and back."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from osp_shared import fill
from osp_shared.errors import OspError
from osp_shared.video.reader import folder_videos, load_video, probe
from osp_shared.video.writer import check_writable, write_image, write_video
from osp_tools import options, rec
from osp_tools.manifest import Manifest, finish, finished, identity, run_path, weights_identity

HELP = "every video of a folder or list through the autoencoder"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("rec-video-folder", help=HELP, description=HELP)
    add = parser.add_argument
    add("--real_video_dir", required=True, metavar="FOLDER", help="searched for avi, mp4 and webm, or root of the list")
    add("--generated_video_dir", required=True, metavar="FOLDER", help="outputs, named like their sources")
    add("--data_file_path", metavar="FILE", help="csv or json list of videos, paths relative to --real_video_dir")
    add("--video_column", default="video", help="column or key of --data_file_path that holds the path")
    add("--num_frames", type=int, default=17, help="4n+1 frames to take from each video")
    add("--sample_rate", type=int, default=1, help="take every n-th frame")
    add("--sample_fps", type=int, default=30, help="output has sample_fps / sample_rate frames a second")
    add("--height", type=int, default=512, help="cropped to this aspect ratio, then resized")
    add("--width", type=int, default=512, help="cropped to this aspect ratio, then resized")
    add("--dynamic_start_index", action="store_true", help="start at a random frame (by --seed) instead of the first")
    add("--batch_size", type=int, default=1, help="videos that go through the autoencoder together")
    add("--num_workers", type=int, default=2, help="videos that are read ahead at the same time")
    add("--output_origin", action="store_true", help="also write what went in, to origin/")
    add("--resume", action="store_true", help="skip videos that an earlier run with the same options finished")
    rec.add_model_arguments(parser)
    options.add_left_out(
        parser,
        dataset_name="only videos are read; pictures: osp rec-image",
        expand_dim_t="only videos are read; pictures: osp rec-image",
        max_device_memory="set OSP_MAX_DEVICE_MEMORY, e.g. 30GB",
        sp_size="reconstruction is not split along the sequence; start one process a device instead",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plan = rec.plan(args)
    rec.check_clip(plan.spec, args.num_frames, args.height, args.width)
    for name in ("batch_size", "num_workers", "sample_fps", "sample_rate"):
        if getattr(args, name) < 1:
            raise OspError(f"{name} {getattr(args, name)}: must be at least 1")
    folder = check_writable(args.generated_video_dir)
    sources = list_videos(args)
    outputs = output_names(sources, folder, args.num_frames)
    rank, world = options.ranks()
    mine = items(args, plan, sources[rank::world], outputs[rank::world])
    todo = [item for item in mine if not (args.resume and finished(item.output, item.key))]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} videos are finished already")
    failed = _reconstruct_all(args, plan, todo) if todo else 0
    entries = [entry for item in mine if (entry := finished(item.output, item.key))]
    if entries:
        mean = {k: np.mean([e[k] for e in entries]) for k in ("psnr", "ssim")}
        print(f"mean of {len(entries)} videos: PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.4f}")
    if failed:
        raise OspError(f"{failed} of {len(todo)} videos could not be read (named above); the others are in {folder}")


def list_videos(args: argparse.Namespace) -> list[Path]:
    """Videos of the folder, or of the list, in a fixed order.

    Raises:
        OspError: no videos, a list that cannot be read, a column or file that is not there.
    """
    if args.data_file_path is None:
        return folder_videos(args.real_video_dir)
    root = Path(args.real_video_dir)
    names = read_list(Path(args.data_file_path), args.video_column)
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise OspError(
            f"{args.data_file_path}: {len(missing)} of {len(names)} videos are not in {root}, e.g. {missing[0]}"
        )
    return [root / name for name in names]


def read_list(path: Path, column: str) -> list[str]:
    """Paths of a csv with a header, or of a json list of paths or of objects."""
    try:
        if path.suffix.lower() == ".json":
            rows = json.loads(path.read_text(encoding="utf-8"))
        else:
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
    except OSError as error:
        raise OspError(f"{path}: {error.strerror}") from None
    except (ValueError, csv.Error) as error:
        raise OspError(f"{path}: cannot be read ({error})") from None
    if not isinstance(rows, list) or not rows:
        raise OspError(f"{path}: lists no video")
    names = [row if isinstance(row, str) else row.get(column) for row in rows]
    if not all(isinstance(name, str) for name in names):
        raise OspError(f"{path}: a row has no {column!r}; name the column with --video_column")
    return names


def output_names(sources: list[Path], folder: Path, num_frames: int) -> list[Path]:
    """The source's own name in `folder`; mp4 whatever the source, jpg for one frame."""
    suffix = ".jpg" if num_frames == 1 else ".mp4"
    outputs = [folder / f"{source.stem}{suffix}" for source in sources]
    seen: dict[Path, Path] = {}
    for source, output in zip(sources, outputs, strict=True):
        if output in seen:
            raise OspError(f"{seen[output]} and {source} would both be written to {output}: list them in separate runs")
        seen[output] = source
    return outputs


@dataclass(frozen=True)
class Item:
    """One video. number: names its random streams; from the file's name, so that other files change nothing."""

    source: Path
    output: Path
    number: int
    key: str


def items(args: argparse.Namespace, plan: rec.Plan, sources: list[Path], outputs: list[Path]) -> list[Item]:
    """Items with the hash of what decides their output: every option but those of scheduling and place."""
    aside = ("run", "argv", "command", "resume", "batch_size", "num_workers", "generated_video_dir", "data_file_path")
    own = {k: v for k, v in vars(args).items() if k not in aside}
    shared = {**own, "weights": weights_identity(plan.path), "spec": plan.spec.to_config()}
    found = []
    for source, output in zip(sources, outputs, strict=True):
        number = int.from_bytes(hashlib.sha256(source.stem.encode()).digest()[:8], "little")
        key = identity({"run": shared, "video": weights_identity(str(source))})
        found.append(Item(source, output, number, key))
    return found


def _reconstruct_all(args: argparse.Namespace, plan: rec.Plan, todo: list[Item]) -> int:
    """Read ahead in threads, reconstruct in batches, write; returns how many could not be read."""
    backend = options.select_backend(args)
    precision = backend.precision(args.precision, "bf16")
    path = run_path(Path(args.generated_video_dir), options.ranks()[0])
    manifest = Manifest(path, "rec-video-folder", args, backend, precision=precision)
    with manifest.timed("load"):
        vae = plan.load(backend, precision)
    manifest.add_weights("ae", plan.path)
    failed, batch = 0, []
    bar = tqdm(total=len(todo), unit="video", desc="rec-video-folder")
    try:
        for item, future in _read_ahead(args, todo):
            try:
                batch.append((item, future.result()))
            except OspError as error:
                failed += 1
                bar.write(f"left out: {error}", file=sys.stderr)
                bar.update()
            if len(batch) == args.batch_size:
                _reconstruct_batch(args, manifest, precision, vae, batch, bar)
        _reconstruct_batch(args, manifest, precision, vae, batch, bar)
    except KeyboardInterrupt:
        done = len(manifest.facts["outputs"])
        bar.write(f"interrupted: {done} of {len(todo)} videos are finished; go on with --resume", file=sys.stderr)
        raise
    finally:
        bar.close()
        manifest.write()
    return failed


def _read_ahead(args, todo: list[Item]) -> Iterator[tuple[Item, Future]]:
    """(item, future of its clip), at most num_workers + 1 clips ahead."""
    waiting: deque[tuple[Item, Future]] = deque()
    with ThreadPoolExecutor(args.num_workers) as pool:
        try:
            for item in todo:
                waiting.append((item, pool.submit(read_clip, args, item)))
                if len(waiting) > args.num_workers:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            for _, future in waiting:
                future.cancel()


def read_clip(args: argparse.Namespace, item: Item) -> np.ndarray:
    """(3, T, H, W) in [-1, 1]."""
    start = 0
    if args.dynamic_start_index:
        slack = probe(item.source).frames - args.num_frames * args.sample_rate
        if slack > 0:
            start = int(fill.rng(f"start of video {item.number} under seed {args.seed}").integers(slack + 1))
    return load_video(item.source, args.num_frames, args.height, args.width, sample_rate=args.sample_rate, start=start)


def _reconstruct_batch(
    args, manifest: Manifest, precision: str, vae, batch: list[tuple[Item, np.ndarray]], bar: tqdm
) -> None:
    """Reconstruct and write the batch, and empty it."""
    if not batch:
        return
    video_BCTHW = np.stack([clip for _, clip in batch])
    with manifest.timed("reconstruct"):
        result = rec.reconstruct(vae, video_BCTHW, args.seed, [item.number for item, _ in batch], precision)
    origin = rec.original_frames(video_BCTHW) if args.output_origin else None
    for k, (item, _) in enumerate(batch):
        _write(item.output, result.frames_BTHWC[k], args)
        if origin is not None:
            _write(item.output.parent / "origin" / item.output.name, origin[k], args)
        facts = {"video": str(item.source), "psnr": result.psnr[k], "ssim": result.ssim[k]}
        manifest.add_output(finish(item.output, item.key, [item.output], facts))
    bar.update(len(batch))
    batch.clear()


def _write(path: Path, frames_THWC: np.ndarray, args) -> None:
    if len(frames_THWC) == 1:
        write_image(path, frames_THWC[0])
    else:
        write_video(path, frames_THWC, args.sample_fps / args.sample_rate)
