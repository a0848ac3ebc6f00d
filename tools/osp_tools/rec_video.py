"""`osp rec-video`: a video through the autoencoder and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from osp_shared.errors import OspError
from osp_shared.video.grid import reconstruction_name, side_by_side
from osp_shared.video.reader import frame_ids, load_video, probe
from osp_shared.video.writer import check_writable, write_image, write_video
from osp_tools import options, rec
from osp_tools.manifest import Manifest

HELP = "a video through the autoencoder and back"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("rec-video", help=HELP, description=HELP)
    parser.add_argument("--video_path", required=True, metavar="FILE", help="video to reconstruct")
    parser.add_argument(
        "--rec_path", required=True, metavar="NAME", help="output, .mp4 or .gif; one frame: .jpg or .png"
    )
    parser.add_argument("--output_path", default="samples/vae_recons", metavar="FOLDER", help="folder of --rec_path")
    parser.add_argument("--num_frames", type=int, default=65, help="4n+1 frames to take from the start")
    parser.add_argument("--sample_rate", type=int, default=1, help="take every n-th frame")
    parser.add_argument("--height", type=int, default=336, help="cropped to this aspect ratio, then resized")
    parser.add_argument("--width", type=int, default=336, help="cropped to this aspect ratio, then resized")
    parser.add_argument("--fps", type=int, default=30, help="frames a second of the output")
    parser.add_argument("--grid", action="store_true", help="original and reconstruction side by side")
    rec.add_model_arguments(parser)
    options.add_left_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    output, result, how = reconstruct_file(args)
    print(how)
    print(f"PSNR {result.psnr[0]:.2f} dB, SSIM {result.ssim[0]:.4f}")
    print(output)


def reconstruct_file(args: argparse.Namespace) -> tuple[Path, rec.Reconstruction, str]:
    """The whole job: (file written, what is in it before coding, a line about how it went)."""
    plan = rec.plan(args)
    rec.check_clip(plan.spec, args.num_frames, args.height, args.width)
    if args.fps < 1:
        raise OspError(f"fps {args.fps}: must be at least 1")
    output = Path(args.output_path) / reconstruction_name(args.rec_path, args.num_frames)
    check_suffix(output, args.num_frames)
    check_writable(output.parent)
    frame_ids(args.num_frames, args.sample_rate, available=probe(args.video_path).frames, path=args.video_path)
    backend = options.select_backend(args)  # before the reader: MindSpore must be imported before decord
    precision = backend.precision(args.precision, "bf16")
    manifest = Manifest(Path(f"{output}.json"), "rec-video", args, backend, precision=precision)
    with manifest.timed("read"):
        video_CTHW = load_video(args.video_path, args.num_frames, args.height, args.width, sample_rate=args.sample_rate)
    with manifest.timed("load"):
        vae = plan.load(backend, precision)
    manifest.add_weights("ae", plan.path)
    with manifest.timed("reconstruct"):
        result = rec.reconstruct(vae, video_CTHW[None], args.seed, [0], precision)
    frames_THWC = result.frames_BTHWC[0]
    if args.grid:
        frames_THWC = side_by_side(rec.original_frames(video_CTHW[None])[0], frames_THWC)
    if len(frames_THWC) == 1:
        write_image(output, frames_THWC[0])
    else:
        write_video(output, frames_THWC, args.fps)
    manifest.add_output({"file": output.name, "psnr": result.psnr[0], "ssim": result.ssim[0]})
    manifest.write()
    return output, result, rec.describe(backend, precision, result.latents, result.seconds)


def check_suffix(output: Path, num_frames: int) -> None:
    """Raises OspError before the work, rather than at its end, for a file type that cannot hold the result."""
    known = (".jpg", ".jpeg", ".png") if num_frames == 1 else (".mp4", ".gif")
    if output.suffix.lower() not in known:
        raise OspError(f"rec_path {output.name}: must end in {' or '.join(known)} ({num_frames} frames)")
