"""What a backend offers to everything that is written once: three models with numpy at their border.

Shapes: B batch, C channels, T frames, H W pixels or latent cells, L text tokens. Arrays are float32 whatever the
precision inside (`dtype`: fp32, fp16 or bf16), so two backends can be swapped under the same sampling loop and
compared.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from osp_shared.geometry.chunks import Tiling
from osp_shared.specs.dit import DiTSpec
from osp_shared.specs.t5 import T5Spec
from osp_shared.specs.wfvae import WFVAESpec


class VideoAutoencoder(Protocol):
    spec: WFVAESpec
    dtype: str

    def encode(self, video_BCTHW: np.ndarray, noise: np.ndarray | None = None) -> np.ndarray:
        """Scaled latents of a video in [-1, 1]: the posterior's mean, plus std * noise when noise is given."""

    def decode(self, latents_BCTHW: np.ndarray) -> np.ndarray:
        """Video of scaled latents; not clamped; values as the model's dtype holds them."""


class Denoiser(Protocol):
    spec: DiTSpec
    dtype: str

    def __call__(
        self,
        latents_BCTHW: np.ndarray,
        timestep_B: np.ndarray,
        text_B1LC: np.ndarray,
        text_mask_B1L: np.ndarray,
        video_mask_BTHW: np.ndarray | None = None,
    ) -> np.ndarray:
        """Model output for noisy latents. A video mask of None means that every token is visible."""


class TextEncoder(Protocol):
    spec: T5Spec
    dtype: str

    def __call__(self, ids_BL: np.ndarray, mask_BL: np.ndarray) -> np.ndarray:
        """Last hidden state (B, L, C); padding positions are not zeroed."""


class Backend(Protocol):
    """The module `osp_torch.backend` or `osp_mindspore.backend`."""

    name: str

    def load_vae(
        self, path: str, *, dtype: str = "fp32", device: str | None = None, tiling: Tiling | None = None
    ) -> VideoAutoencoder: ...

    def load_dit(self, path: str, *, dtype: str = "fp32", device: str | None = None) -> Denoiser: ...

    def load_text_encoder(self, path: str, *, dtype: str = "fp32", device: str | None = None) -> TextEncoder: ...
