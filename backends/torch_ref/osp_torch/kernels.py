"""The plainest statement of every kernel, with the names and arguments of `osp_mindspore.kernels`.

float64, float32: as they are. float16, bfloat16: operands raised to float32, the result rounded back once, which is
what both an Ascend and the MindSpore CPU forms do; torch's own half kernels round at other places.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

HALF = (torch.float16, torch.bfloat16)
_LOGITS = 1 << 24  # logits held at once: 64 MiB in float32


def raised(function):
    """Compute half operands in float32; the first argument sets the dtype of the result."""

    @functools.wraps(function)
    def form(x, *args, **kwargs):
        if x.dtype not in HALF:
            return function(x, *args, **kwargs)
        args = [a.float() if isinstance(a, torch.Tensor) and a.dtype in HALF else a for a in args]
        kwargs = {k: a.float() if isinstance(a, torch.Tensor) and a.dtype in HALF else a for k, a in kwargs.items()}
        return function(x.float(), *args, **kwargs).to(x.dtype)

    return form


@raised
def attention(q_BNSD, k_BNKD, v_BNKD, scale, key_bias_B11K=None, bias_1NSK=None):
    """softmax(scale * q k^T + biases) v, a block of queries at a time.

    key_bias_B11K: added to every query's logits; None means that every key is visible.
    bias_1NSK: a bias for each pair (T5's relative positions).
    """
    B, N, S, D = q_BNSD.shape
    rows = max(1, _LOGITS // (B * N * k_BNKD.shape[2]))
    q_BNSD = q_BNSD * scale
    blocks = []
    for start in range(0, S, rows):
        logits = q_BNSD[:, :, start : start + rows] @ k_BNKD.transpose(2, 3)
        if key_bias_B11K is not None:
            logits = logits + key_bias_B11K
        if bias_1NSK is not None:
            logits = logits + bias_1NSK[:, :, start : start + rows]
        blocks.append(logits.softmax(-1) @ v_BNKD)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


@raised
def linear(x, weight, bias=None):
    """x (..., I), weight (O, I), bias (O,) or None."""
    return F.linear(x, weight, bias)


def embedding(weight, ids):
    """Rows of weight (V, D) at ids (...): (..., D)."""
    return F.embedding(ids, weight)


@raised
def conv2d(x, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0)):
    """x (B, C, H, W), weight (O, C, kh, kw), zero padding (top, bottom, left, right)."""
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
    return F.conv2d(x, weight, bias, stride, (top, left))


@raised
def conv3d(x, weight, bias=None, stride=(1, 1, 1), padding=(0, 0, 0)):
    """x (B, C, T, H, W), weight (O, C, kt, kh, kw), zero padding (t, h, w), or before and after each of the axes."""
    if len(padding) == 6:
        front, back, top, bottom, left, right = padding
        x, padding = F.pad(x, (left, right, top, bottom, front, back)), 0
    return F.conv3d(x, weight, bias, stride, padding)


@raised
def layer_norm(x, weight=None, bias=None, eps=1e-6):
    """Over the last axis; population variance."""
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def channel_layer_norm(x, weight, bias, eps=1e-6):
    """Over axis 1 of (B, C, ...), at every position."""
    return layer_norm(x.movedim(1, -1), weight, bias, eps).movedim(-1, 1)


@raised
def group_norm(x, groups, weight, bias, eps=1e-6):
    """`groups` groups of consecutive channels of (B, C, ...), each over all positions."""
    return F.group_norm(x, groups, weight, bias, eps)


def rms_norm(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight: float32 inside, rounded to the weight's type before it, as T5 does it."""
    h = x.float() if x.dtype in HALF else x
    h = h * torch.rsqrt((h * h).mean(-1, keepdim=True) + eps)
    return weight * h.to(weight.dtype)


def rotary(x_BNAD, cos_NPH, sin_NPH):
    """Each head is P parts of two halves: (u, v) -> (u cos - v sin, v cos + u sin), the same angles for all heads.

    Half types: every product and sum is rounded, as the released model does.
    """
    P, H = cos_NPH.shape[1:]
    cos, sin = cos_NPH.unsqueeze(1), sin_NPH.unsqueeze(1)
    u, v = x_BNAD.unflatten(3, (P, 2, H)).unbind(4)
    return torch.cat((u * cos - v * sin, v * cos + u * sin), -1).flatten(3)


def permute(x, axes):
    return x.permute(axes)


@raised
def modulate(x_BND, shift_B1D, scale_B1D):
    """x (1 + scale) + shift."""
    return x_BND * (1 + scale_B1D) + shift_B1D


@raised
def gated_add(x_BND, gate_B1D, y_BND):
    """x + gate y."""
    return x_BND + gate_B1D * y_BND


@raised
def gelu_tanh(x):
    return F.gelu(x, approximate="tanh")


@raised
def gelu_erf(x):
    return F.gelu(x)


@raised
def exp(x):
    return x.exp()


@raised
def silu(x):
    return F.silu(x)


@raised
def softmax(x):
    """Over the last axis."""
    return x.softmax(-1)


@raised
def upsample_nearest2d(x):
    """(B, C, H, W) -> (B, C, 2H, 2W), each value four times."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


@raised
def upsample_linear(x, axis):
    """(B, C, T, H, W) with `axis` (one of 2, 3, 4, or a tuple of them) doubled linearly, half-pixel centres."""
    axes = (axis,) if isinstance(axis, int) else axis
    size = tuple(n * 2 if i in axes else n for i, n in enumerate(x.shape))[2:]
    return F.interpolate(x, size=size, mode="trilinear", align_corners=False)


@raised
def haar(x, filters):
    """Bands of windows that do not overlap: x (B, C, T, H, W), filters (n, kt, kh, kw) -> (B, n C, T/kt, H/kh, W/kw).

    Band-major: band 0 of all channels, band 1 of all channels, ... What does not fill a window is dropped.
    """
    B, C = x.shape[:2]
    bands = F.conv3d(x.flatten(0, 1).unsqueeze(1), filters.unsqueeze(1), stride=tuple(filters.shape[1:]))
    return bands.unflatten(0, (B, C)).transpose(1, 2).flatten(1, 2)


@raised
def inverse_haar(x, filters):
    """Transpose of `haar`: x (B, n C, T, H, W) -> (B, C, kt T, kh H, kw W), the sum over the n bands."""
    bands = x.unflatten(1, (filters.shape[0], -1)).transpose(1, 2).flatten(0, 1)
    video = F.conv_transpose3d(bands, filters.unsqueeze(1), stride=tuple(filters.shape[1:]))
    return video.unflatten(0, (x.shape[0], -1)).squeeze(2)
