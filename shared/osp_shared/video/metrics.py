"""PSNR and SSIM of videos, frame by frame, as the Open-Sora Plan evaluation defines them.

Shapes: B videos, T frames, C channels, H W pixels; values in [0, 1]. Results are float64 (B, T).
"""

from __future__ import annotations

import numpy as np

from osp_shared.errors import OspError

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def psnr(a_BTCHW: np.ndarray, b_BTCHW: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each frame, over its channels and pixels; 100 when they are the same."""
    _same_shape(a_BTCHW, b_BTCHW)
    out = np.empty(a_BTCHW.shape[:2])
    for index in np.ndindex(*out.shape):
        difference = a_BTCHW[index].astype(np.float64) - b_BTCHW[index]
        mse = np.mean(difference * difference)
        out[index] = 100.0 if mse < 1e-10 else -10.0 * np.log10(mse)
    return out


def ssim(a_BTCHW: np.ndarray, b_BTCHW: np.ndarray) -> np.ndarray:
    """Structural similarity of each frame (Wang et al. 2004), mean over channels.

    11 x 11 Gaussian window of sigma 1.5, positions where it fits whole, biased variances, C1 = 0.01^2, C2 = 0.03^2.
    """
    _same_shape(a_BTCHW, b_BTCHW)
    if min(a_BTCHW.shape[-2:]) < SSIM_WINDOW:
        raise OspError(
            f"SSIM of frames of {a_BTCHW.shape[-2]}x{a_BTCHW.shape[-1]}: "
            f"both sides must be at least {SSIM_WINDOW} pixels"
        )
    out = np.empty(a_BTCHW.shape[:2])
    for index in np.ndindex(*out.shape):
        out[index] = _ssim_map(a_BTCHW[index].astype(np.float64), b_BTCHW[index].astype(np.float64)).mean()
    return out


def over_videos(per_frame_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and population standard deviation over the videos, of each frame index: (T,), (T,)."""
    return per_frame_BT.mean(axis=0), per_frame_BT.std(axis=0)


def _ssim_map(a_CHW: np.ndarray, b_CHW: np.ndarray) -> np.ndarray:
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _blur(a_CHW), _blur(b_CHW)
    var_a = _blur(a_CHW * a_CHW) - mean_a * mean_a
    var_b = _blur(b_CHW * b_CHW) - mean_b * mean_b
    covariance = _blur(a_CHW * b_CHW) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a * mean_a + mean_b * mean_b + c1)
    return luminance * (2 * covariance + c2) / (var_a + var_b + c2)


def _blur(x_CHW: np.ndarray) -> np.ndarray:
    """Gaussian mean at every position where the window fits."""
    offset = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    kernel = np.exp(-(offset**2) / (2 * SSIM_SIGMA**2))
    kernel /= kernel.sum()
    height, width = (n - SSIM_WINDOW + 1 for n in x_CHW.shape[-2:])
    rows = sum(k * x_CHW[:, i : i + height] for i, k in enumerate(kernel))
    return sum(k * rows[:, :, i : i + width] for i, k in enumerate(kernel))


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 5:
        raise OspError(f"videos of shapes {a.shape} and {b.shape}: both must be (B, T, C, H, W) and the same")
