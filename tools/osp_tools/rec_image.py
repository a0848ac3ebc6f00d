"""`osp rec-image`: a picture through the autoencoder and back."""

from __future__ import annotations

import argparse
from pathlib import Path

from osp_shared.errors import OspError
from osp_shared.video.grid import side_by_side
from osp_shared.video.reader import load_image
from osp_shared.video.resize import stride_crop
from osp_shared.video.writer import check_writable, write_image
from osp_tools import options, rec
from osp_tools.manifest import Manifest
from osp_tools.rec_video import check_suffix

HELP = "a picture through the autoencoder and back"
TILE = 256


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    parser = subparsers.add_parser("rec-image", help=HELP, description=HELP)
    parser.add_argument("--image_path", required=True, metavar="FILE", help="picture to reconstruct")
    parser.add_argument("--rec_path", required=True, metavar="NAME", help="output file, .jpg or .png")
    parser.add_argument("--output_path", default="samples/vae_recons", metavar="FOLDER", help="folder of --rec_path")
    parser.add_argument(
        "--short_size",
        type=int,
        default=336,
        help="pixels of the short side; the long one follows, cut to a multiple of 8",
    )
    parser.add_argument("--grid", action="store_true", help="original and reconstruction side by side")
    rec.add_model_arguments(parser, temporal=False, spatial_default=TILE)
    options.add_left_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plan = rec.plan(args, spatial_default=TILE)
    if args.short_size < 16:
        raise OspError(f"short_size {args.short_size}: must be at least 16")
    output = Path(args.output_path) / args.rec_path
    check_suffix(output, 1)
    check_writable(output.parent)
    picture_CTHW = load_image(args.image_path, args.short_size)
    picture_CTHW = stride_crop(*picture_CTHW.shape[2:], plan.spec.stride[1]).of(picture_CTHW)
    backend = options.select_backend(args)
    precision = backend.precision(args.precision, "bf16")
    manifest = Manifest(Path(f"{output}.json"), "rec-image", args, backend, precision=precision)
    with manifest.timed("load"):
        vae = plan.load(backend, precision)
    manifest.add_weights("ae", plan.path)
    with manifest.timed("reconstruct"):
        result = rec.reconstruct(vae, picture_CTHW[None], args.seed, [0], precision)
    picture_HWC = result.frames_BTHWC[0, 0]
    if args.grid:
        picture_HWC = side_by_side(rec.original_frames(picture_CTHW[None])[0, 0], picture_HWC)
    write_image(output, picture_HWC)
    manifest.add_output({"file": output.name, "psnr": result.psnr[0], "ssim": result.ssim[0]})
    manifest.write()
    print(rec.describe(backend, precision, result.latents, result.seconds))
    print(f"PSNR {result.psnr[0]:.2f} dB, SSIM {result.ssim[0]:.4f}")
    print(output)
