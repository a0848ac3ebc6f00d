"""One backend's half of the demo, in a process of its own: `python -m osp_tools.demo_worker BACKEND FOLDER CLIP`.

Runs the real commands and keeps beside their files what was in them before coding (exact.npz), to be compared.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np

from osp_shared.errors import OspError
from osp_tools import cli, rec_video, sample, sample_run

PROMPT = "A red fox runs through fresh snow, the camera follows it."
RECONSTRUCTION = "untrained_reconstruction.mp4"
SAMPLES = "untrained_samples"
FRAMES, HEIGHT, WIDTH = 17, 288, 512  # of the clip


def commands(backend: str, folder: Path, clip: Path) -> tuple[list[str], list[str]]:
    """The two command lines of the demo."""
    weights = folder / "weights"
    common = ["--backend", backend, "--device", "cpu", "--precision", "fp32", "--ae", "WFVAEModel_D8_4x8x8"]
    common += ["--ae_path", str(weights / "vae")]
    reconstruct = ["rec-video", "--video_path", str(clip), "--rec_path", RECONSTRUCTION]
    reconstruct += ["--output_path", str(folder / backend), "--num_frames", f"{FRAMES}"]
    reconstruct += ["--height", f"{HEIGHT}", "--width", f"{WIDTH}"]
    reconstruct += ["--fps", "25", "--enable_tiling", *common]
    draw = ["sample", "--model_path", str(weights / "transformer"), "--version", "v1_3"]
    draw += ["--text_encoder_name_1", str(weights / "text_encoder"), "--text_prompt", PROMPT]
    draw += [
        "--save_img_path",
        str(folder / backend / SAMPLES),
        "--num_frames",
        "17",
        "--height",
        "96",
        "--width",
        "160",
    ]
    draw += ["--sample_method", "EulerAncestralDiscrete", "--num_sampling_steps", "10", "--fps", "8", "--seed", "1234"]
    draw += ["--prediction_type", "v_prediction", "--rescale_betas_zero_snr", "--max_sequence_length", "64", *common]
    return reconstruct, draw


def parse(argv: list[str]):
    args = cli.build_parser(cli.find(argv[0])).parse_args(argv)
    args.argv = argv
    return args


def main(backend: str, folder: Path, clip: Path) -> None:
    reconstruct, draw = commands(backend, folder, clip)
    exact = {}
    print("$ osp " + " ".join(reconstruct), flush=True)
    _, result, how = rec_video.reconstruct_file(parse(reconstruct))
    print(f"{how}\nPSNR {result.psnr[0]:.2f} dB, SSIM {result.ssim[0]:.4f}", flush=True)
    exact |= {"rec_float": result.output_BCTHW[0], "rec": result.frames_BTHWC[0]}
    exact |= {"rec_seconds": sum(result.seconds), "psnr": result.psnr[0], "ssim": result.ssim[0]}

    print("$ osp " + " ".join(f'"{a}"' if " " in a else a for a in draw), flush=True)
    start = time.perf_counter()
    setup = sample.prepare(parse(draw))
    sample_run.sample(setup, setup.jobs, lambda job, latents, videos: exact.update(latents=latents, sample=videos[0]))
    exact["sample_seconds"] = time.perf_counter() - start
    np.savez(folder / backend / "exact.npz", **exact)


if __name__ == "__main__":
    try:
        main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    except OspError as error:
        sys.exit(cli.fail(str(error)))
