"""Helpers of the sampler and pipeline tests: golden records, arrays of three libraries, stand-in models."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np

from osp_shared.fill import input_tensor
from osp_shared.sampling import NUMPY_TYPES, SampleRequest, TextEmbeddings

SHORT_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
UNIT = 2.0**-24  # unit round-off of float32
HALF_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


def sample_indices(count: int) -> list[int]:
    """Flat indices of the eight samples that a golden record holds."""
    return [int(np.floor((j + 1) * 0.6180339887498949 % 1 * count)) for j in range(8)]


def samples(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64).ravel()[sample_indices(x.size)]


def norm(x: np.ndarray) -> float:
    return float(np.linalg.norm(x.astype(np.float64)))


def largest(x: np.ndarray) -> float:
    return float(np.abs(x.astype(np.float64)).max())


def check_record(record: list, x: np.ndarray, tolerance: float, what: str = "") -> None:
    """A golden record [name, shape, mean, std, l2, samples] against an array.

    `tolerance` is relative to the array's root mean square for the mean, deviation and samples, and to l2 itself.
    """
    name, shape, mean, std, l2, values = record
    what = what or name
    assert list(x.shape) == list(shape), f"{what}: shape {x.shape}, golden {shape}"
    wide = x.astype(np.float64)
    scale = max(l2 / np.sqrt(x.size), 1e-30)
    # 5e-9: the golden's numbers are printed with nine digits
    assert abs(wide.mean() - mean) <= tolerance * scale + 5e-9 * abs(mean), f"{what}: mean {wide.mean()}, golden {mean}"
    assert abs(wide.std() - std) <= tolerance * scale + 5e-9 * std, f"{what}: std {wide.std()}, golden {std}"
    assert abs(norm(x) - l2) <= (tolerance + 5e-9) * l2, f"{what}: l2 {norm(x)}, golden {l2}"
    bound = tolerance * np.maximum(scale, np.abs(values)) + 5e-9 * np.abs(values)
    assert (np.abs(samples(x) - values) <= bound).all(), f"{what}: {samples(x)}, golden {values}"


class Arrays:
    """numpy, torch or MindSpore arrays of one float type, made from and turned into numpy."""

    def __init__(self, library: str, dtype: str):
        self.library, self.dtype = library, dtype
        if library == "torch":
            import torch

            self.module = torch
        elif library == "mindspore":
            import osp_mindspore  # noqa: F401  (sets MindSpore up)

            import mindspore

            self.module = mindspore

    def of(self, x: np.ndarray):
        """float32 numpy to this type, rounded."""
        if self.library == "numpy":
            return x.astype(NUMPY_TYPES[SHORT_NAMES[self.dtype]])
        if self.library == "torch":
            return self.module.from_numpy(np.ascontiguousarray(x)).to(getattr(self.module, self.dtype))
        return self.module.Tensor(x).astype(getattr(self.module, self.dtype))

    def numpy(self, x) -> np.ndarray:
        """Back to numpy; float32 holds every half-precision value."""
        assert self.dtype in str(x.dtype).lower(), f"{x.dtype} instead of {self.dtype}"
        if self.library == "numpy":
            return x.astype(np.float32)
        return x.float().numpy() if self.library == "torch" else x.float().asnumpy()


def tagged(tag: str, shape, golden: dict | None = None) -> np.ndarray:
    """The golden files' float32 input of this name; their header may name a salt."""
    return input_tensor(tag, tuple(shape), salt_of(golden))


def salt_of(golden: dict | None) -> str:
    return (golden or {}).get("header", {}).get("salt", "")


# --------------------------------------------------------------------------------------------------- stand-in models


@dataclass
class FakeDenoiser:
    """Output depends on every argument: half the latents, shifted by the text, the time and the condition."""

    dtype: str = "fp32"
    condition: int = 0
    fail_at: int | None = None
    calls: list = field(default_factory=list)

    @property
    def spec(self):
        return SimpleNamespace(in_channels=8, out_channels=8, input_channels=8 + self.condition, vae_scale_factor_t=4)

    def __call__(self, latents, timestep, text, text_mask, video_mask=None):
        assert all(a.dtype == np.float32 for a in (latents, timestep, text))
        self.calls.append((latents.copy(), timestep.copy(), text, text_mask, video_mask))
        phase = (text * text_mask[..., None]).sum(axis=(1, 2, 3)) + timestep / 100
        wave = np.sin(phase[:, None] + np.arange(latents[0, :8].size)).reshape(-1, *latents.shape[2:])
        extra = latents[:, 8:].mean(axis=1, keepdims=True) if self.condition else 0
        output = 0.5 * latents[:, :8] + 0.1 * wave.reshape(len(latents), 8, *latents.shape[2:]) + 0.1 * extra
        if len(self.calls) - 1 == self.fail_at:
            output[0, 0, 0, 0, 0] = np.nan
        return output.astype(NUMPY_TYPES[self.dtype]).astype(np.float32)


class FakeAutoencoder:
    """The stand-in of the golden pipelines: colours are the first three channels, cells are 8 x 8 x 4 pixels."""

    def __init__(self, dtype: str = "fp32", stride: int = 4):
        self.dtype, self.stride, self.encoded = dtype, stride, []
        self.spec = SimpleNamespace(
            stride=(stride, 8, 8), latent_dim=8, latent_size=lambda t, h, w: ((t - 1) // stride + 1, h // 8, w // 8)
        )

    def encode(self, video, noise=None):
        self.encoded.append((video, noise))
        B, C, F, H, W = video[:, :, :: self.stride].shape
        cells = video[:, :, :: self.stride].reshape(B, C, F, H // 8, 8, W // 8, 8).mean(axis=(4, 6), dtype=np.float32)
        return cells[:, [0, 1, 2, 0, 1, 2, 0, 1]]

    def decode(self, latents):
        video = np.float32(0.5) * latents[:, :3].repeat(8, axis=3).repeat(8, axis=4)
        return np.concatenate([video[:, :, :1], video[:, :, 1:].repeat(self.stride, axis=2)], axis=2)


def embeddings(count: int = 1, guided: bool = True) -> TextEmbeddings:
    rng = np.random.default_rng(3)
    text = rng.standard_normal((2, count, 6, 4)).astype(np.float32)
    masks = np.ones((2, count, 6), np.int64)
    masks[0, :, 4:] = 0
    masks[1, :, 2:] = 0
    return TextEmbeddings(text[0], masks[0], *((text[1], masks[1]) if guided else (None, None)))


def request(**changes) -> SampleRequest:
    values = dict(
        text_prompt=("a cat", "a dog"),
        num_frames=9,
        height=32,
        width=48,
        sample_method="EulerAncestralDiscrete",
        num_sampling_steps=5,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    return SampleRequest(**{**values, **changes})
