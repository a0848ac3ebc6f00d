"""What the three reconstruction commands share: the autoencoder of the options, one pass through it, and its quality.

Shapes: B clips, T frames, H W pixels; float clips (B, 3, T, H, W) in [-1, 1], written ones uint8 (T, H, W, 3).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import numpy as np

from osp_shared.backend import VideoAutoencoder
from osp_shared.errors import OspError
from osp_shared.geometry.chunks import Tiling
from osp_shared.inpaint import POSTERIOR_NOISE
from osp_shared.loading import Weights
from osp_shared.sampling import PhiloxNoise
from osp_shared.specs.wfvae import WFVAESpec
from osp_shared.video.metrics import psnr, ssim
from osp_shared.video.resize import to_uint8
from osp_tools import options
from osp_tools.options import Selected


def add_model_arguments(
    parser: argparse.ArgumentParser, *, temporal: bool = True, spatial_default: int | None = None
) -> None:
    """Options of the autoencoder, its precision and backend; the same for the three commands."""
    options.add_autoencoder(parser, temporal=temporal, spatial_default=spatial_default)
    parser.add_argument("--ms_checkpoint", metavar="FILE", help="weights instead of those in --ae_path, any format")
    parser.add_argument("--model_config", metavar="JSON", help="config instead of the config.json in --ae_path")
    parser.add_argument("--precision", choices=options.PRECISIONS, help="default: bf16; fp32 on a CPU")
    parser.add_argument("--seed", type=int, default=4, help="of the noise with which the posterior is sampled")
    options.add_backend(parser)


@dataclass(frozen=True)
class Plan:
    """An autoencoder that can be loaded: its weights were found and fit their config, no framework is imported yet."""

    path: str
    config: dict | None
    spec: WFVAESpec
    tiling: Tiling | None

    def load(self, backend: Selected, precision: str) -> VideoAutoencoder:
        return backend.module.load_vae(
            self.path, dtype=precision, device=backend.device, tiling=self.tiling, config=self.config
        )


def plan(args: argparse.Namespace, spatial_default: int | None = None) -> Plan:
    """Check everything about the autoencoder that can be known from headers.

    Raises:
        OspError: weights, config or --ae that contradict each other; tiling options that do nothing.
    """
    if not 0 <= args.seed < 2**64:
        raise OspError(f"seed {args.seed}: must be in 0..2^64 - 1")
    path, config = options.vae_path(args)
    spec = Weights(path, WFVAESpec, config).spec
    options.check_ae_name(args.ae, spec)
    return Plan(path, config, spec, options.tiling(args, spatial_default))


def check_clip(spec: WFVAESpec, num_frames: int, height: int, width: int) -> None:
    """Raises OspError for a clip that the autoencoder would cut: it keeps whole strides only."""
    t, h, w = spec.stride
    if num_frames < 1 or (num_frames - 1) % t:
        near = [n for n in ((num_frames - 1) // t * t + 1, (num_frames - 1) // t * t + 1 + t) if n > 0]
        raise OspError(f"num_frames {num_frames}: must be {t}n+1, e.g. {' or '.join(map(str, near))}")
    if min(height, width) < 16 or height % h or width % w:
        raise OspError(f"height {height}, width {width}: both must be multiples of {h}, at least {16}")


@dataclass(frozen=True)
class Reconstruction:
    """output_BCTHW: float32 as decoded; frames_BTHWC: uint8; psnr (dB) and ssim: one number a clip, its frames' mean;
    seconds: (encode, decode)."""

    output_BCTHW: np.ndarray
    frames_BTHWC: np.ndarray
    psnr: list[float]
    ssim: list[float]
    latents: tuple[int, ...]
    seconds: tuple[float, float]


def reconstruct(
    vae: VideoAutoencoder, video_BCTHW: np.ndarray, seed: int, indices: list[int], dtype: str
) -> Reconstruction:
    """Encode, sample the posterior, decode; quality against the input, both clamped to [0, 1]."""
    size = (vae.spec.latent_dim, *vae.spec.latent_size(*video_BCTHW.shape[2:]))
    noise = np.stack([PhiloxNoise(seed, i, POSTERIOR_NOISE).one(0, 0, size) for i in indices])
    start = time.perf_counter()
    latents = vae.encode(video_BCTHW, noise)
    middle = time.perf_counter()
    output_BCTHW = vae.decode(latents)
    end = time.perf_counter()
    a, b = (to_unit(x) for x in (video_BCTHW, output_BCTHW))
    return Reconstruction(
        output_BCTHW,
        to_uint8(output_BCTHW, dtype).transpose(0, 2, 3, 4, 1),
        psnr(a, b).mean(1).tolist(),
        ssim(a, b).mean(1).tolist(),
        tuple(latents.shape[1:]),
        (middle - start, end - middle),
    )


def to_unit(video_BCTHW: np.ndarray) -> np.ndarray:
    """[-1, 1] to (B, T, C, H, W) in [0, 1]."""
    return np.clip(video_BCTHW.transpose(0, 2, 1, 3, 4) / 2 + 0.5, 0, 1)


def original_frames(video_BCTHW: np.ndarray) -> np.ndarray:
    """The clips as the autoencoder saw them, uint8 (B, T, H, W, 3)."""
    return to_uint8(video_BCTHW, "fp32").transpose(0, 2, 3, 4, 1)


def describe(backend: Selected, precision: str, latents: tuple[int, ...], seconds: tuple[float, float]) -> str:
    size = "x".join(map(str, latents))
    where = f"{backend.name} on {backend.device}, {precision}"
    return f"{where}: encode {seconds[0]:.1f} s, latents {size}, decode {seconds[1]:.1f} s"
