"""The three models with numpy at their border (protocols: osp_shared.backend), in MindSpore."""

from __future__ import annotations

import numpy as np

from osp_mindspore import runtime, t5
from osp_mindspore.checkpoint import DTYPES, build
from osp_mindspore.dit.model import model_class
from osp_mindspore.wfvae.model import WFVAEModel
from osp_shared.geometry.chunks import Tiling
from osp_shared.loading import Weights, check_dtype
from osp_shared.specs.dit import DiTSpec
from osp_shared.specs.t5 import T5Spec
from osp_shared.specs.wfvae import WFVAESpec

import mindspore as ms

name = "mindspore"


class Loaded:
    """A model in inference mode at a dtype on this process's device."""

    def __init__(self, model, weights: Weights, dtype: str):
        self.model, self.spec, self.dtype, self.device = model, weights.spec, dtype, runtime.device()
        self.checkpoint = weights.checkpoint

    def tensor(self, array: np.ndarray) -> ms.Tensor:
        return ms.Tensor(np.ascontiguousarray(array, np.float32)).astype(DTYPES[self.dtype])


class VideoAutoencoder(Loaded):
    tiling: Tiling | None = None

    @runtime.clean_precision
    def encode(self, video_BCTHW, noise=None):
        noise = None if noise is None else self.tensor(noise)
        return to_numpy(self.model.encode_scaled(self.tensor(video_BCTHW), noise, self.tiling))

    @runtime.clean_precision
    def decode(self, latents_BCTHW):
        return to_numpy(self.model.decode_scaled(self.tensor(latents_BCTHW), self.tiling))


class Denoiser(Loaded):
    @runtime.clean_precision
    def __call__(self, latents_BCTHW, timestep_B, text_B1LC, text_mask_B1L, video_mask_BTHW=None):
        timestep = ms.Tensor(np.asarray(timestep_B, np.float32))
        video_mask = None if video_mask_BTHW is None else self.tensor(video_mask_BTHW)
        latents, text, text_mask = (self.tensor(a) for a in (latents_BCTHW, text_B1LC, text_mask_B1L))
        return to_numpy(self.model(latents, timestep, text, video_mask, text_mask))


class TextEncoder(Loaded):
    @runtime.clean_precision
    def __call__(self, ids_BL, mask_BL):
        ids, mask = (ms.Tensor(np.asarray(a, np.int32)) for a in (ids_BL, mask_BL))
        return to_numpy(self.model(ids, mask))


def to_numpy(tensor: ms.Tensor) -> np.ndarray:
    return tensor.astype(ms.float32).asnumpy().copy()  # asnumpy shares memory with the tensor


def load_vae(path, *, dtype="fp32", device=None, tiling: Tiling | None = None, config=None) -> VideoAutoencoder:
    """config: a mapping that stands for config.json."""
    runtime.select(device)
    weights = Weights(path, WFVAESpec, config)
    vae = VideoAutoencoder(build(WFVAEModel, weights.spec, weights.read, check_dtype(dtype)), weights, dtype)
    vae.tiling = tiling
    return vae


def load_dit(path, *, dtype="fp32", device=None) -> Denoiser:
    runtime.select(device)
    weights = Weights(path, DiTSpec)
    model = build(model_class(weights.spec), weights.spec, weights.read, check_dtype(dtype))
    return Denoiser(model, weights, dtype)


def load_text_encoder(path, *, dtype="fp32", device=None) -> TextEncoder:
    runtime.select(device)
    weights = Weights(path, T5Spec)
    model = build(t5.T5Encoder, weights.spec, weights.read, check_dtype(dtype), t5.KEEP_FLOAT32)
    return TextEncoder(model, weights, dtype)
