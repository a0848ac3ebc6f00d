"""Haar analysis and synthesis: windows that do not overlap, every channel with the same few filters.

haar: x (B, C, T, H, W), filters (n, kt, kh, kw) -> (B, n C, T/kt, H/kh, W/kw), band-major: band 0 of all channels,
band 1 of all channels, ...; what does not fill a window is dropped. inverse_haar is its transpose.

CPU: one strided convolution (transposed for the inverse) with the filters on the diagonal of a dense kernel: no
channel folding, a tenth of the time of moving windows into channels. Ascend: windows moved into channels and one
matrix product, because its convolutions take half types only and the bands must keep float32.
"""

from functools import cache

import numpy as np

from osp_mindspore.kernels.precision import raised

from mindspore import Tensor, ops


@cache
def _operator(transposed, out_channels, channels, window):
    if transposed:
        return ops.Conv3DTranspose(out_channels, channels, window, pad_mode="pad", pad=0, stride=window)
    return ops.Conv3D(out_channels, window, pad_mode="pad", pad=0, stride=window)


def _dense(filters, channels):
    """(n, kt, kh, kw) -> (n C, C, kt, kh, kw): filter n between channel c and itself, zero between others."""
    n, window = filters.shape[0], tuple(filters.shape[1:])
    diagonal = Tensor(np.eye(channels, dtype=np.float32)).astype(filters.dtype)
    dense = filters.reshape((n, 1, 1) + window) * diagonal.reshape((1, channels, channels, 1, 1, 1))
    return dense.reshape((n * channels, channels) + window)


@raised
def haar_cpu(x, filters):
    weight = _dense(filters, x.shape[1])
    return _operator(False, weight.shape[0], x.shape[1], tuple(filters.shape[1:]))(x, weight)


@raised
def inverse_haar_cpu(x, filters):
    weight = _dense(filters, x.shape[1] // filters.shape[0])
    return _operator(True, weight.shape[0], weight.shape[1], tuple(filters.shape[1:]))(x, weight)


def haar_ascend(x, filters):
    B, C, T, H, W = x.shape
    n, kt, kh, kw = filters.shape
    t, h, w = T // kt, H // kh, W // kw
    x = x[:, :, : t * kt, : h * kh, : w * kw].reshape(B, C, t, kt, h, kh, w, kw)
    taps = x.permute((0, 3, 5, 7, 1, 2, 4, 6)).reshape(B, kt * kh * kw, C * t * h * w)
    return ops.matmul(filters.reshape(n, kt * kh * kw), taps).reshape(B, n * C, t, h, w)


def inverse_haar_ascend(x, filters):
    B, _, t, h, w = x.shape
    n, kt, kh, kw = filters.shape
    C = x.shape[1] // n
    bands = x.reshape(B, n, C * t * h * w)
    taps = ops.matmul(filters.reshape(n, kt * kh * kw).permute((1, 0)), bands).reshape(B, kt, kh, kw, C, t, h, w)
    return taps.permute((0, 4, 5, 1, 6, 2, 7, 3)).reshape(B, C, t * kt, h * kh, w * kw)
