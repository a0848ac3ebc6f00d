"""What the inpaint / I2V transformer is shown besides noise: pictures or a clip to keep, and a mask.

The condition has two parts on the latents' grid: latents of the video whose unknown pixels are -1, and a mask with one
channel for each pixel frame of a latent frame. Mask values: 1 = to be generated, 0 = given.

Shapes: B samples, C channels, F pixel frames, T latent frames, H W pixels, h w latent cells. Clips are uint8
(F, 3, H, W).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np

from osp_shared.backend import Denoiser, VideoAutoencoder
from osp_shared.errors import OspError
from osp_shared.sampling import (
    NUMPY_TYPES,
    NoiseSource,
    PhiloxNoise,
    SampleRequest,
    StepRecord,
    TextEmbeddings,
    decode,
    denoise,
    latent_size,
)
from osp_shared.video.resize import center_crop_resize, max_area_size, resize_bilinear, stride_crop

MASK_TYPES = ("t2iv", "i2v", "transition", "continuation", "clear", "random_temporal")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".flv", ".wmv", ".webm", ".mpeg", ".mpg", ".3gp")
MAX_HXW = (102400, 236544)  # pixels
STRIDE = 32  # pictures keep their aspect ratio up to this
NOISE_DEVIATION = 0.01  # of ln sigma
# Purposes of PhiloxNoise: 0 is the sampling itself.
CONDITION_NOISE, POSTERIOR_NOISE = 1, 2


@dataclass(frozen=True)
class ConditionRequest:
    """How pictures or clips become a condition; field names are the command's flags.

    mask_type: one of MASK_TYPES, or None to choose by what is given (see `default_mask_type`). It decides when as many
        frames are given as are wanted (a clip, or one picture for one frame); otherwise the indices do
    indices: the frame that each picture stands at, negative from the end; None to choose
    crop_for_hw: cut to the request's height and width; otherwise the smallest given height and width decide, at most
        max_hxw pixels, then the largest multiples of 32 inside
    noise_strength: 0..1, typical deviation of noise on the given pixels (in [-1, 1]); 0 for none
    """

    mask_type: str | None = None
    indices: tuple[int, ...] | None = None
    crop_for_hw: bool = False
    max_hxw: int = MAX_HXW[1]
    noise_strength: float = 0.0

    def __post_init__(self) -> None:
        if self.mask_type is not None and self.mask_type not in MASK_TYPES:
            raise OspError(f"unknown mask_type {self.mask_type!r}: must be one of {', '.join(MASK_TYPES)}")
        if not MAX_HXW[0] <= self.max_hxw <= MAX_HXW[1]:
            raise OspError(f"max_hxw {self.max_hxw}: must be in {MAX_HXW[0]}..{MAX_HXW[1]} pixels")
        if not 0 <= self.noise_strength <= 1:
            raise OspError(f"noise_strength {self.noise_strength}: must be in 0..1")


# ------------------------------------------------------------------------------------------------------------- input


def condition_kind(paths: Sequence[str]) -> str:
    """ "image" or "video", by the first path's extension.

    Raises OspError for other extensions, no path, and several videos.
    """
    if not paths:
        raise OspError("condition: needs at least one picture or one video")
    suffix = PurePath(paths[0]).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix not in VIDEO_SUFFIXES:
        raise OspError(f"condition {paths[0]}: must be a picture ({', '.join(IMAGE_SUFFIXES)}) or a video file")
    if len(paths) > 1:
        raise OspError(f"condition {paths[0]} and {len(paths) - 1} more: only one video can be given")
    return "video"


def load_clips(paths: Sequence[str], num_frames: int) -> list[np.ndarray]:
    """uint8 (F, 3, H, W) for each path: pictures have one frame, a video gives its first num_frames."""
    from osp_shared.video.reader import read_frames, read_image

    if condition_kind(paths) == "video":
        frames = [list(read_frames(paths[0], range(num_frames)))]
    else:
        frames = [[read_image(path)] for path in paths]
    return [np.ascontiguousarray(np.stack(clip).transpose(0, 3, 1, 2)) for clip in frames]


# ----------------------------------------------------------------------------------------------------------- geometry


def fit_clips(clips: Sequence[np.ndarray], request: ConditionRequest, height: int, width: int) -> np.ndarray:
    """All clips brought to one size and put one after the other: uint8 (F, 3, H, W)."""
    if not request.crop_for_hw:
        smallest = min(c.shape[2] for c in clips), min(c.shape[3] for c in clips)
        height, width = max_area_size(*smallest, request.max_hxw)
    fitted = np.concatenate([center_crop_resize(clip, height, width) for clip in clips])
    return fitted if request.crop_for_hw else stride_crop(height, width, STRIDE).of(fitted)


# -------------------------------------------------------------------------------------------------------------- masks


def frame_mask(mask_type: str, frames: int, rng: random.Random, low: float = 0.5, high: float = 0.5) -> np.ndarray:
    """(F,) float32, 1 = to be generated, 0 = given.

    continuation keeps the first k frames, random_temporal k frames anywhere; k is drawn from floor(F low) to
    ceil(F high), both included. rng: random.Random or the module `random`.
    """
    mask = np.ones(frames, np.float32)
    if mask_type == "i2v":
        mask[0] = 0
    elif mask_type == "transition":
        mask[[0, -1]] = 0
    elif mask_type == "clear":
        mask[:] = 0
    elif mask_type in ("continuation", "random_temporal"):
        k = rng.randint(math.floor(frames * low), math.ceil(frames * high))
        mask[list(range(k)) if mask_type == "continuation" else rng.sample(range(frames), k)] = 0
    elif mask_type != "t2iv":
        raise OspError(f"unknown mask_type {mask_type!r}: must be one of {', '.join(MASK_TYPES)}")
    return mask


def default_mask_type(kind: str, given: int) -> str:
    """What is meant by the number of pictures: one starts the video, two are its ends; a video is continued."""
    if kind == "video":
        return "continuation"
    return {1: "i2v", 2: "transition"}.get(given, "random_temporal")


def default_indices(given: int) -> tuple[int, ...]:
    """Frames that one or two pictures stand at. More pictures need indices: OspError."""
    if given > 2:
        raise OspError(f"{given} pictures: their frame indices must be given")
    return (0, -1)[:given]


def place_frames(
    clip_F3HW: np.ndarray, num_frames: int, request: ConditionRequest, kind: str, rng: random.Random
) -> tuple[np.ndarray, np.ndarray]:
    """(pixels (F, 3, H, W) uint8 with 0 where unknown, mask (F,)) of the whole video.

    Raises OspError for more pictures than frames, and indices that do not fit.
    """
    given = len(clip_F3HW)
    if given == num_frames:
        mask = frame_mask(request.mask_type or default_mask_type(kind, given), num_frames, rng)
        return clip_F3HW * (mask < 0.5).astype(np.uint8)[:, None, None, None], mask
    if given > num_frames:
        raise OspError(f"{given} frames given for a video of {num_frames}: must not be more")
    indices = default_indices(given) if request.indices is None else request.indices
    if len(indices) != given:
        raise OspError(f"{len(indices)} frame indices for {given} pictures: must be one for each")
    if any(not -num_frames <= i < num_frames for i in indices):
        raise OspError(f"frame indices {list(indices)}: must be in {-num_frames}..{num_frames - 1}")
    pixels = np.zeros((num_frames, *clip_F3HW.shape[1:]), np.uint8)
    mask = np.ones(num_frames, np.float32)
    for i, frame in zip(indices, clip_F3HW, strict=True):
        pixels[i], mask[i] = frame, 0
    return pixels, mask


def compress_mask(mask_B1FHW: np.ndarray, height: int, width: int, stride: int = 4) -> np.ndarray:
    """(B, stride, T, h, w): the mask on the latents' grid, `stride` pixel frames in the channels of a latent frame.

    Sampled bilinearly at each cell's centre. An odd number of frames starts with a frame that stands for itself alone:
    it fills the first group. Raises OspError for a count that leaves a group unfilled.
    """
    small = resize_bilinear(mask_B1FHW[:, 0], height, width, antialias=False, align_corners=False)
    if small.shape[1] % 2:
        small = np.concatenate([small[:, :1].repeat(stride, axis=1), small[:, 1:]], axis=1)
    count = small.shape[1]
    if count % stride:
        raise OspError(f"mask of {mask_B1FHW.shape[2]} frames: must be {stride}n or {stride}n+1")
    return small.reshape(len(small), count // stride, stride, height, width).swapaxes(1, 2)


# ---------------------------------------------------------------------------------------------------------- condition


def pixel_values(pixels_F3HW: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """uint8 (F, 3, H, W) to (3, F, H, W) in [-1, 1], each operation rounded to `dtype`."""
    unit = pixels_F3HW.transpose(1, 0, 2, 3).astype(dtype) / dtype.type(255)
    return unit * dtype.type(2) - dtype.type(1)


def add_noise_to_given(pixels_B3FHW: np.ndarray, mask_F: np.ndarray, strength: float, noise: NoiseSource) -> np.ndarray:
    """Noise on the given frames, so that the video may leave them a little; its deviation is drawn around `strength`.

    noise: draw 0 decides the deviations, ln sigma ~ N(ln strength, 0.01), draw 1 the noise.
    """
    dtype = pixels_B3FHW.dtype
    draw = noise(0, (len(pixels_B3FHW), 1, 1, 1, 1))
    sigma = np.exp(math.log(strength) + NOISE_DEVIATION * draw.astype(np.float64)).astype(dtype)
    given = (mask_F < 0.5).astype(dtype)[:, None, None]
    return pixels_B3FHW + noise(1, pixels_B3FHW.shape).astype(dtype) * sigma * given


@dataclass(frozen=True, eq=False)
class Condition:
    """A finished condition. channels: (B, latent channels + mask channels, T, h, w) float32; the video's own size."""

    channels: np.ndarray
    height: int
    width: int


def build_condition(
    clips: Sequence[np.ndarray],
    kind: str,
    request: SampleRequest,
    condition: ConditionRequest,
    vae: VideoAutoencoder,
    *,
    index: int = 0,
    mask_stride: int = 4,
    dtype: str = "fp32",
    pixel_noise: NoiseSource | None = None,
    posterior_noise: NoiseSource | None = None,
) -> Condition:
    """The condition of prompt `index` from uint8 clips (F, 3, H, W), for all its samples.

    mask_stride: the transformer's vae_scale_factor_t; dtype: its precision; kind: "image" or "video".
    The noise sources default to Philox keyed by the request's seed and `index`. Each sample draws its own posterior.
    """
    fitted = fit_clips(clips, condition, request.height, request.width)
    rng = random.Random(f"{request.seed}/{index}")
    pixels, mask_F = place_frames(fitted, request.num_frames, condition, kind, rng)
    count, (height, width) = request.num_samples_per_prompt, fitted.shape[2:]
    resized = request.resized(height, width)
    size = latent_size(resized, vae)
    video = np.stack([pixel_values(pixels, NUMPY_TYPES[dtype])] * count)
    if condition.noise_strength:
        source = pixel_noise or PhiloxNoise(request.seed, index, CONDITION_NOISE)
        video = add_noise_to_given(video, mask_F, condition.noise_strength, source)
    source = posterior_noise or PhiloxNoise(request.seed, index, POSTERIOR_NOISE)
    latents = vae.encode(video.astype(np.float32), source(0, (count, vae.spec.latent_dim, *size)))
    mask = np.broadcast_to(mask_F[None, None, :, None, None], (count, 1, len(mask_F), height, width))
    cells = compress_mask(mask, *size[1:], stride=mask_stride).astype(NUMPY_TYPES[dtype])
    if cells.shape[2] != size[0]:
        raise OspError(
            f"the mask has {mask_stride} frames in a latent frame, the autoencoder {vae.spec.stride[0]}: "
            "transformer and autoencoder do not belong together"
        )
    return Condition(np.concatenate([latents, cells.astype(np.float32)], axis=1), height, width)


def sample_prompt(
    request: SampleRequest,
    index: int,
    text: TextEmbeddings,
    condition: Condition,
    denoiser: Denoiser,
    vae: VideoAutoencoder,
    *,
    noise: NoiseSource | None = None,
    observer: Callable[[StepRecord], None] | None = None,
) -> np.ndarray:
    """All samples of prompt `index`, kept to its condition: uint8 (num_samples_per_prompt, T, H, W, 3).

    Height and width are the condition's. Raises OspError for flow matching, which has no inpaint model.
    """
    if request.table.flow:
        raise OspError(f"sample_method {request.sample_method}: not for inpainting; use a diffusion sampler")
    request = request.resized(condition.height, condition.width)
    latents = denoise(
        request,
        denoiser,
        text,
        latent_size(request, vae),
        noise or PhiloxNoise(request.seed, index),
        condition=condition.channels,
        observer=observer,
    )
    return decode(vae, latents, request.num_frames, request.height, request.width)
