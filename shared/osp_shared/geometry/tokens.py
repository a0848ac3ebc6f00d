"""Token grids of latents, and video masks per token.

Tokens run t, y, x with x fastest: one for each patch of p x p latent cells of a frame.
"""

from __future__ import annotations

import numpy as np

from osp_shared.errors import OspError

HIDDEN = -10000.0  # bias of a masked key
PAD = -9980.0  # bias of a pad: where no key is valid, pads win over masked tokens


def grid(frames: int, height: int, width: int, patch: int) -> tuple[int, int, int]:
    """Tokens along (t, y, x) of a latent of this size; rows and columns that fill no patch are dropped.

    Raises:
        OspError: no token at all.
    """
    if frames < 1 or height < patch or width < patch:
        raise OspError(f"latent of {frames} frames {height}x{width}: at least 1 frame of {patch}x{patch} is needed")
    return frames, height // patch, width // patch


def count(grid_thw: tuple[int, int, int]) -> int:
    """N."""
    t, h, w = grid_thw
    return t * h * w


def pool_mask(mask_BTHW: np.ndarray, patch: int) -> np.ndarray:
    """(B, N): a token is worth the largest mask value of its patch, so one valid cell makes it valid."""
    B, T, H, W = mask_BTHW.shape
    _, h, w = grid(T, H, W, patch)
    cells = mask_BTHW[:, :, : h * patch, : w * patch].reshape(B, T, h, patch, w, patch)
    return cells.max(axis=(3, 5)).reshape(B, T * h * w)


def key_bias(mask: np.ndarray) -> np.ndarray | None:
    """Additive bias of each key, float32: 0 where the mask is 1, -10000 where it is 0; None when all are 1."""
    mask = np.asarray(mask, np.float32)
    return None if bool((mask == 1).all()) else (1 - mask) * np.float32(HIDDEN)
