"""Layers whose parameters carry the released names: `weight` and `bias` everywhere, shapes as in the checkpoint.

MindSpore's own cells call them gamma, beta and embedding_table; with these a checkpoint loads without a name table.
Initial values are PyTorch's defaults: uniform in +-1/sqrt(fan in) for weights and biases, ones and zeros for norms,
standard normal for embeddings.
"""

from __future__ import annotations

import math

from osp_mindspore import kernels

from mindspore import Parameter, nn
from mindspore.common.initializer import Normal, Uniform, initializer


def _uniform(shape, fan_in, name):
    return Parameter(initializer(Uniform(1 / math.sqrt(fan_in)), shape), name=name)


def _constant(value, dim, name):
    return Parameter(initializer(value, (dim,)), name=name)


def _triple(value):
    return (value,) * 3 if isinstance(value, int) else tuple(value)


class Linear(nn.Cell):
    """(..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = _uniform((out_features, in_features), in_features, "weight")
        self.bias = _uniform((out_features,), in_features, "bias") if bias else None

    def construct(self, x):
        return kernels.linear(x, self.weight, self.bias)


class Conv2d(nn.Cell):
    """(B, C, H, W); padding one number, or (top, bottom, left, right)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__()
        fan_in = in_channels * kernel_size * kernel_size
        self.stride = (stride, stride)
        self.padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.weight = _uniform((out_channels, in_channels, kernel_size, kernel_size), fan_in, "weight")
        self.bias = _uniform((out_channels,), fan_in, "bias") if bias else None

    def construct(self, x):
        return kernels.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Conv3d(nn.Cell):
    """(B, C, T, H, W); kernel, stride and padding one number or (t, h, w), padding also before and after each."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__()
        kernel = _triple(kernel_size)
        fan_in = in_channels * math.prod(kernel)
        self.stride, self.padding = _triple(stride), _triple(padding)
        self.weight = _uniform((out_channels, in_channels, *kernel), fan_in, "weight")
        self.bias = _uniform((out_channels,), fan_in, "bias") if bias else None

    def construct(self, x):
        return kernels.conv3d(x, self.weight, self.bias, self.stride, self.padding)


class LayerNorm(nn.Cell):
    """Over the last axis."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = _constant("ones", dim, "weight") if affine else None
        self.bias = _constant("zeros", dim, "bias") if affine else None

    def construct(self, x):
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class ChannelLayerNorm(nn.Cell):
    """Over axis 1 of (B, C, ...), at every position."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = _constant("ones", dim, "weight")
        self.bias = _constant("zeros", dim, "bias")

    def construct(self, x):
        return kernels.channel_layer_norm(x, self.weight, self.bias, self.eps)


class GroupNorm(nn.Cell):
    """Groups of consecutive channels of (B, C, ...), each over all positions."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = _constant("ones", channels, "weight")
        self.bias = _constant("zeros", channels, "bias")

    def construct(self, x):
        return kernels.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class RMSNorm(nn.Cell):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = _constant("ones", dim, "weight")

    def construct(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Cell):
    """ids (...) -> (..., dim)."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.weight = Parameter(initializer(Normal(1.0), (count, dim)), name="weight")

    def construct(self, ids):
        return kernels.embedding(self.weight, ids)
