"""Normalisations; statistics in float32 on every device. weight and bias may both be None (no affine part)."""

from functools import cache

from osp_mindspore.kernels.precision import HALF, raised

import mindspore as ms
from mindspore import mint, ops


@cache
def _layer_norm(eps):
    return ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)


@raised
def layer_norm_cpu(x, weight=None, bias=None, eps=1e-6):
    """Over the last axis; population variance."""
    dim = x.shape[-1]
    gamma = ops.ones((dim,), x.dtype) if weight is None else weight
    beta = ops.zeros((dim,), x.dtype) if bias is None else bias
    return _layer_norm(eps)(x, gamma, beta)[0]


def layer_norm_ascend(x, weight=None, bias=None, eps=1e-6):
    return mint.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def channel_layer_norm_cpu(x, weight, bias, eps=1e-6):
    """Over axis 1 of (B, C, ...), at every position."""
    last = tuple(range(2, x.ndim))
    back = (0, x.ndim - 1) + tuple(range(1, x.ndim - 1))
    return layer_norm_cpu(x.permute((0,) + last + (1,)), weight, bias, eps).permute(back)


def channel_layer_norm_ascend(x, weight, bias, eps=1e-6):
    last = tuple(range(2, x.ndim))
    back = (0, x.ndim - 1) + tuple(range(1, x.ndim - 1))
    return layer_norm_ascend(x.permute((0,) + last + (1,)), weight, bias, eps).permute(back)


@raised
def group_norm_cpu(x, groups, weight, bias, eps=1e-6):
    """`groups` groups of consecutive channels of (B, C, ...), each over all positions."""
    return ops.group_norm(x, groups, weight, bias, eps)


def group_norm_ascend(x, groups, weight, bias, eps=1e-6):
    return mint.nn.functional.group_norm(x, groups, weight, bias, eps)


def rms_norm_cpu(x, weight, eps=1e-6):
    """x / sqrt(mean(x^2) + eps) * weight: float32 inside, rounded to the weight's type before it, as T5 does it."""
    h = x.astype(ms.float32) if x.dtype in HALF else x
    h = h * ops.rsqrt((h * h).mean(-1, keep_dims=True) + eps)
    return weight * h.astype(weight.dtype)


def rms_norm_ascend(x, weight, eps=1e-6):
    return ops.rms_norm(x, weight, eps)[0]
