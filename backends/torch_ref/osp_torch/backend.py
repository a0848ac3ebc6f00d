"""The three models with numpy at their border (protocols: osp_shared.backend), in PyTorch."""

from __future__ import annotations

import numpy as np
import torch

from osp_shared.errors import OspError
from osp_shared.geometry.chunks import Tiling
from osp_shared.loading import Weights, check_dtype
from osp_shared.specs.dit import DiTSpec
from osp_shared.specs.t5 import T5Spec
from osp_shared.specs.wfvae import WFVAESpec
from osp_torch import t5
from osp_torch.checkpoint import DTYPES, build
from osp_torch.dit.model import model_class
from osp_torch.wfvae.model import WFVAEModel

name = "torch"


class Loaded:
    """A model in eval mode at a dtype on a device."""

    def __init__(self, model, weights: Weights, dtype: str, device: torch.device):
        self.model, self.spec, self.dtype, self.device = model.to(device), weights.spec, dtype, device
        self.checkpoint = weights.checkpoint

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.float32)).to(self.device, DTYPES[self.dtype])


class VideoAutoencoder(Loaded):
    tiling: Tiling | None = None

    @torch.no_grad()
    def encode(self, video_BCTHW, noise=None):
        noise = None if noise is None else self.tensor(noise)
        return to_numpy(self.model.encode_scaled(self.tensor(video_BCTHW), noise, self.tiling))

    @torch.no_grad()
    def decode(self, latents_BCTHW):
        return to_numpy(self.model.decode_scaled(self.tensor(latents_BCTHW), self.tiling))


class Denoiser(Loaded):
    @torch.no_grad()
    def __call__(self, latents_BCTHW, timestep_B, text_B1LC, text_mask_B1L, video_mask_BTHW=None):
        timestep = torch.from_numpy(np.asarray(timestep_B, np.float32)).to(self.device)
        video_mask = None if video_mask_BTHW is None else self.tensor(video_mask_BTHW)
        latents, text, text_mask = (self.tensor(a) for a in (latents_BCTHW, text_B1LC, text_mask_B1L))
        return to_numpy(self.model(latents, timestep, text, video_mask, text_mask))


class TextEncoder(Loaded):
    @torch.no_grad()
    def __call__(self, ids_BL, mask_BL):
        ids, mask = (torch.from_numpy(np.asarray(a, np.int64)).to(self.device) for a in (ids_BL, mask_BL))
        return to_numpy(self.model(ids, mask))


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _device(wanted: str | None) -> torch.device:
    try:
        device = torch.device((wanted or "cpu").lower())
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OspError(f"device {wanted}: {str(error).splitlines()[0]}; use --device cpu") from None
    return device


def load_vae(path, *, dtype="fp32", device=None, tiling: Tiling | None = None, config=None) -> VideoAutoencoder:
    """config: a mapping that stands for config.json."""
    weights = Weights(path, WFVAESpec, config)
    model = build(WFVAEModel, weights.spec, weights.read, check_dtype(dtype))
    vae = VideoAutoencoder(model, weights, dtype, _device(device))
    vae.tiling = tiling
    return vae


def load_dit(path, *, dtype="fp32", device=None) -> Denoiser:
    weights = Weights(path, DiTSpec)
    model = build(model_class(weights.spec), weights.spec, weights.read, check_dtype(dtype))
    return Denoiser(model, weights, dtype, _device(device))


def load_text_encoder(path, *, dtype="fp32", device=None) -> TextEncoder:
    weights = Weights(path, T5Spec)
    model = build(t5.T5Encoder, weights.spec, weights.read, check_dtype(dtype), t5.KEEP_FLOAT32)
    return TextEncoder(model, weights, dtype, _device(device))
