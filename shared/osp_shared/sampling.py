"""From a prompt to a video: the request, the noise, and the sampling loop, written once for both backends.

Shapes: B samples (2 B with guidance: the negative half first), C channels, T frames, H W pixels or latent cells, L text
tokens. Latents live in numpy, in the denoiser's precision, and everything random comes from numpy's Philox generator
keyed by seed, prompt, sample and draw. So the same seed is the same video on every backend and device, however the
prompts are spread over processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from osp_shared import schedules
from osp_shared.backend import Denoiser, TextEncoder, VideoAutoencoder
from osp_shared.errors import OspError
from osp_shared.text import templates
from osp_shared.video.resize import to_uint8

NUMPY_TYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
SIZE_MULTIPLE = 16  # pixels: the autoencoder's 8 times the transformer's patch of 2
RECOMMENDED_MULTIPLE = 32

NoiseSource = Callable[[int, tuple[int, ...]], np.ndarray]


# ----------------------------------------------------------------------------------------------------------- request


@dataclass(frozen=True)
class SampleRequest:
    """What to sample; field names are the command's flags, defaults are the original's.

    The released weights need other values than the defaults: prediction_type v_prediction, rescale_betas_zero_snr and
    sample_method EulerAncestralDiscrete.

    text_prompt: one or more prompts; an empty one is a prompt
    num_frames: 4n + 1 pixel frames, 1 for an image
    height, width: pixels, multiples of 16 (32 is what the weights were trained on)
    guidance_scale: classifier-free guidance above 1, none at 1 and below
    guidance_rescale: 0..1, how much of the guided output's excess contrast is taken back (Lin et al. 2023)
    num_samples_per_prompt: videos a prompt, sampled as one batch
    seed: 0 .. 2^64 - 1

    Raises OspError for values that cannot be sampled.
    """

    text_prompt: tuple[str, ...]
    num_frames: int = 1
    height: int = 512
    width: int = 512
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    sample_method: str = "PNDM"
    num_sampling_steps: int = 50
    prediction_type: str = "epsilon"
    rescale_betas_zero_snr: bool = False
    v1_5_scheduler: bool = False
    max_sequence_length: int = 512
    num_samples_per_prompt: int = 1
    seed: int = 42

    def __post_init__(self) -> None:
        if isinstance(self.text_prompt, str) or not self.text_prompt:
            raise OspError("text_prompt: must be a list of at least one prompt")
        object.__setattr__(self, "text_prompt", tuple(self.text_prompt))
        check_frames(self.num_frames)
        check_size("height", self.height)
        check_size("width", self.width)
        for name, least in (("max_sequence_length", 2), ("num_samples_per_prompt", 1)):
            if getattr(self, name) < least:
                raise OspError(f"{name} {getattr(self, name)}: must be at least {least}")
        if not 0 <= self.seed < 2**64:
            raise OspError(f"seed {self.seed}: must be in 0..2^64 - 1")
        if not math.isfinite(self.guidance_scale):
            raise OspError(f"guidance_scale {self.guidance_scale}: must be a finite number (1 or less: no guidance)")
        if not 0 <= self.guidance_rescale <= 1:
            raise OspError(f"guidance_rescale {self.guidance_rescale}: must be in 0..1")
        if self.guidance_rescale and (not self.guided or self.table.flow):
            raise OspError(
                f"guidance_rescale {self.guidance_rescale} has no effect with guidance_scale {self.guidance_scale} and "
                f"{self.sample_method}: it needs guidance_scale above 1 and not FlowMatchEulerDiscrete"
            )
        _ = self.table  # an unknown method or an impossible step count is told now, not after the weights are loaded

    @property
    def guided(self) -> bool:
        """Whether every step calls the model for the negative prompt as well."""
        return self.guidance_scale > 1

    @property
    def table(self) -> schedules.SamplerTable:
        return schedules.build(
            self.sample_method,
            self.num_sampling_steps,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.rescale_betas_zero_snr,
            v1_5_scheduler=self.v1_5_scheduler,
        )

    def resized(self, height: int, width: int) -> SampleRequest:
        """The same request for another picture size."""
        return replace(self, height=height, width=width)


def check_frames(num_frames: int) -> None:
    """OspError unless 4n + 1."""
    if num_frames < 1 or num_frames % 4 != 1:
        below = max((num_frames - 1) // 4 * 4 + 1, 1)
        nearest = f"{below} or {below + 4}" if num_frames > 0 else "1"
        raise OspError(f"num_frames {num_frames}: must be 4n+1, such as {nearest}")


def check_size(name: str, pixels: int) -> None:
    """OspError unless a positive multiple of 16; the message proposes multiples of 32."""
    if pixels < SIZE_MULTIPLE or pixels % SIZE_MULTIPLE:
        below = max(pixels // RECOMMENDED_MULTIPLE * RECOMMENDED_MULTIPLE, RECOMMENDED_MULTIPLE)
        raise OspError(
            f"{name} {pixels}: must be a multiple of {SIZE_MULTIPLE} pixels; multiples of {RECOMMENDED_MULTIPLE} are "
            f"recommended, such as {below} or {below + RECOMMENDED_MULTIPLE}"
        )


# ------------------------------------------------------------------------------------------------------------- noise


@dataclass(frozen=True)
class PhiloxNoise:
    """Standard normal noise that depends on (seed, prompt, sample, draw) and on nothing else.

    noise(k, shape): float32 for the k-th draw of a run, shape[0] samples first; draw 0 is the initial latents.
    Philox is a counter run through a cipher: prompt, sample and draw are set in the counter's upper words, so no two
    streams meet. `purpose` separates the noise of different uses under one seed.
    """

    seed: int
    prompt: int = 0
    purpose: int = 0

    def __call__(self, k: int, shape: tuple[int, ...]) -> np.ndarray:
        return np.stack([self.one(k, sample, shape[1:]) for sample in range(shape[0])])

    def one(self, k: int, sample: int, shape: tuple[int, ...]) -> np.ndarray:
        """Noise of one sample."""
        key = np.array([self.seed, self.purpose], np.uint64)
        philox = np.random.Philox(key=key, counter=np.array([0, k, sample, self.prompt], np.uint64))
        return np.random.Generator(philox).standard_normal(shape, dtype=np.float32)


# -------------------------------------------------------------------------------------------------------------- text


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Encoded prompts and negative prompts: embeddings (B, L, C) float32, masks (B, L) of 0 and 1.

    The negative half is None without guidance.
    """

    positive: np.ndarray
    positive_mask: np.ndarray
    negative: np.ndarray | None = None
    negative_mask: np.ndarray | None = None

    def for_samples(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Model arguments (text (B', 1, L, C), mask (B', 1, L)) for `count` samples a prompt, negative half first.

        Samples of a prompt are neighbours in embeddings and masks alike. (The original repeats masks the other way
        round, which mixes prompts up when there are several of both.)
        """
        halves = [(self.positive, self.positive_mask)]
        if self.negative is not None:
            halves.insert(0, (self.negative, self.negative_mask))
        text, mask = (np.concatenate([half[i].repeat(count, axis=0) for half in halves])[:, None] for i in (0, 1))
        return text, mask


def encode_prompt(
    request: SampleRequest,
    index: int,
    encoder: TextEncoder,
    tokenize: Callable[[Sequence[str], int], tuple[np.ndarray, np.ndarray]],
) -> TextEmbeddings:
    """Embeddings (B = 1) of prompt `index` in its template, and of the negative prompt if the request is guided.

    tokenize(texts, max_length): (ids, mask), each (B, max_length), padded and truncated. Padding is encoded like text
    and hidden by the mask alone.
    """
    texts = [templates.positive(request.text_prompt[index])]
    if request.guided:
        texts.append(templates.NEGATIVE_PROMPT)
    arrays: list[np.ndarray] = []
    for text in texts:
        ids, mask = tokenize([text], request.max_sequence_length)
        arrays += [encoder(ids, mask), np.asarray(mask)]
    return TextEmbeddings(*arrays)


# ---------------------------------------------------------------------------------------------------------- guidance


def guide(negative: np.ndarray, positive: np.ndarray, scale: float) -> np.ndarray:
    """Classifier-free guidance u + scale (c - u) (Ho and Salimans 2022); each operation rounds to the arrays' type."""
    return negative + _times(positive - negative, scale)


def rescale_guided(guided: np.ndarray, positive: np.ndarray, rescale: float) -> np.ndarray:
    """`guided` brought to the deviation of the unguided `positive`, blended rescale : 1 - rescale (Lin et al. 2023).

    Deviations are a sample's own, unbiased, over all its elements.
    """
    axes = tuple(range(1, guided.ndim))
    wanted, has = (
        np.std(a.astype(np.float32), axis=axes, keepdims=True, ddof=1).astype(a.dtype) for a in (positive, guided)
    )
    return _times(guided * (wanted / has), rescale) + _times(guided, 1 - rescale)


def _times(x: np.ndarray, number: float) -> np.ndarray:
    """Array times a Python number as the frameworks do it: product in float32, then rounded to the array's type."""
    return (x.astype(np.float32) * np.float32(number)).astype(x.dtype)


# ---------------------------------------------------------------------------------------------------------- the loop


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One call of the model, for observers: index k of `total`, what went in, what came out, what it led to.

    model_input (B', C, T, H, W) and timestep (B',) are float32 as the model gets them; output (B, C, T, H, W) is after
    guidance; latents are the next ones.
    """

    k: int
    total: int
    model_input: np.ndarray
    timestep: np.ndarray
    output: np.ndarray
    latents: np.ndarray


def denoise(
    request: SampleRequest,
    denoiser: Denoiser,
    text: TextEmbeddings,
    latent_size: tuple[int, int, int],
    noise: NoiseSource,
    *,
    condition: np.ndarray | None = None,
    observer: Callable[[StepRecord], None] | None = None,
) -> np.ndarray:
    """Latents (B, C, T, H, W) in the denoiser's precision, sampled from noise.

    latent_size: (T, H, W) latent frames and cells
    noise: draw 0 is the initial latents, then one draw for each step that the sampler's table says draws
    condition: inpainting: (B, C', T, H, W) float32, appended to the latents' channels at every call, never scaled
    observer: called after every step; progress bars and traces

    Raises OspError when the model returns NaN, naming the step, and for a condition that is not the model's.
    """
    check_channels(denoiser, 0 if condition is None else condition.shape[1])
    table, dtype = request.table, NUMPY_TYPES[denoiser.dtype]
    count = len(text.positive) * request.num_samples_per_prompt
    shape = (count, denoiser.spec.in_channels, *latent_size)
    text_B1LC, mask_B1L = text.for_samples(request.num_samples_per_prompt)
    halves = len(text_B1LC) // count
    latents = schedules.initial_latents(table, noise(0, shape).astype(dtype))
    memory, draws = schedules.Memory(), 0
    for k, step in enumerate(table.steps):
        batch = np.concatenate([schedules.model_input(step, latents)] * halves).astype(np.float32)
        if condition is not None:
            batch = np.concatenate([batch, np.concatenate([condition] * halves)], axis=1)
        timestep = timestep_vector(step.timestep, len(batch), dtype, table.flow)
        output = denoiser(batch, timestep, text_B1LC, mask_B1L).astype(dtype)
        if np.isnan(output).any():
            raise OspError(
                f"the transformer returned NaN at step {k + 1} of {len(table.steps)} (timestep {step.timestep:g}): "
                f"the weights are damaged or {denoiser.dtype} overflowed; try --precision bf16 or fp32"
            )
        if halves == 2:
            negative, positive = np.split(output, 2)
            output = guide(negative, positive, request.guidance_scale)
            if request.guidance_rescale:
                output = rescale_guided(output, positive, request.guidance_rescale)
        draws += step.draws
        fresh = noise(draws, shape).astype(dtype) if step.draws else None
        latents, memory = schedules.evaluate(table, k, latents, output, memory, fresh)
        if observer is not None:
            observer(StepRecord(k, len(table.steps), batch, timestep, output, latents))
    return latents


def check_channels(denoiser: Denoiser, condition: int) -> None:
    """OspError unless the model takes latents and a condition of that many channels."""
    takes, latents = denoiser.spec.input_channels, denoiser.spec.in_channels
    if takes != latents + condition:
        raise OspError(
            f"the transformer takes {takes} input channels, {latents} latent and {condition} condition channels are "
            f"given: {'an inpaint model needs model_type inpaint' if not condition else 'not the inpaint model'}"
        )


def timestep_vector(timestep: float, count: int, dtype: np.dtype, flow: bool) -> np.ndarray:
    """(count,) float32, rounded to the latents' type: bfloat16 tells the model 1000 for 999. Flow matching: float32."""
    vector = np.full(count, timestep, np.float32)
    return vector if flow else vector.astype(dtype).astype(np.float32)


def latent_size(request: SampleRequest, vae: VideoAutoencoder) -> tuple[int, int, int]:
    """Latent (T, H, W) of the requested video.

    Raises OspError where the autoencoder's stride does not fit the frames: the 8x8x8 one needs 8n + 1.
    """
    stride = vae.spec.stride[0]
    if (request.num_frames - 1) % stride:
        raise OspError(f"num_frames {request.num_frames}: this autoencoder needs {stride}n+1 frames")
    return vae.spec.latent_size(request.num_frames, request.height, request.width)


def decode(vae: VideoAutoencoder, latents: np.ndarray, frames: int, height: int, width: int) -> np.ndarray:
    """uint8 videos (B, T, H, W, 3) of latents, cut to the wanted size; grey levels truncate in the model's type."""
    pixels = to_uint8(vae.decode(latents.astype(np.float32)), vae.dtype)
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 4, 1)[:, :frames, :height, :width])


def sample_prompt(
    request: SampleRequest,
    index: int,
    text: TextEmbeddings,
    denoiser: Denoiser,
    vae: VideoAutoencoder,
    *,
    noise: NoiseSource | None = None,
    observer: Callable[[StepRecord], None] | None = None,
) -> np.ndarray:
    """All samples of prompt `index` of the request: uint8 (num_samples_per_prompt, T, H, W, 3).

    text: the prompt's own embeddings, B = 1. noise: another source than Philox keyed by the request's seed and `index`.
    """
    noise = noise or PhiloxNoise(request.seed, index)
    latents = denoise(request, denoiser, text, latent_size(request, vae), noise, observer=observer)
    return decode(vae, latents, request.num_frames, request.height, request.width)
