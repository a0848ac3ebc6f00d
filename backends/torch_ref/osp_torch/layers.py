"""Layers of the mirror: the names, arguments and parameter names of `osp_mindspore.layers`, initial values alike."""

from __future__ import annotations

import math

import torch
from torch import nn

from osp_torch import kernels


def _uniform(shape, fan_in):
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _triple(value):
    return (value,) * 3 if isinstance(value, int) else tuple(value)


class Linear(nn.Module):
    """(..., in_features) -> (..., out_features)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__()
        self.weight = _uniform((out_features, in_features), in_features)
        self.bias = _uniform((out_features,), in_features) if bias else None

    def forward(self, x):
        return kernels.linear(x, self.weight, self.bias)


class Conv2d(nn.Module):
    """(B, C, H, W); padding one number, or (top, bottom, left, right)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__()
        fan_in = in_channels * kernel_size * kernel_size
        self.stride = (stride, stride)
        self.padding = (padding,) * 4 if isinstance(padding, int) else tuple(padding)
        self.weight = _uniform((out_channels, in_channels, kernel_size, kernel_size), fan_in)
        self.bias = _uniform((out_channels,), fan_in) if bias else None

    def forward(self, x):
        return kernels.conv2d(x, self.weight, self.bias, self.stride, self.padding)


class Conv3d(nn.Module):
    """(B, C, T, H, W); kernel, stride and padding one number or (t, h, w), padding also before and after each."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__()
        kernel = _triple(kernel_size)
        fan_in = in_channels * math.prod(kernel)
        self.stride, self.padding = _triple(stride), _triple(padding)
        self.weight = _uniform((out_channels, in_channels, *kernel), fan_in)
        self.bias = _uniform((out_channels,), fan_in) if bias else None

    def forward(self, x):
        return kernels.conv3d(x, self.weight, self.bias, self.stride, self.padding)


class LayerNorm(nn.Module):
    """Over the last axis."""

    def __init__(self, dim: int, eps: float = 1e-6, affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x):
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class ChannelLayerNorm(nn.Module):
    """Over axis 1 of (B, C, ...), at every position."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        return kernels.channel_layer_norm(x, self.weight, self.bias, self.eps)


class GroupNorm(nn.Module):
    """Groups of consecutive channels of (B, C, ...), each over all positions."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return kernels.group_norm(x, self.groups, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return kernels.rms_norm(x, self.weight, self.eps)


class Embedding(nn.Module):
    """ids (...) -> (..., dim)."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim).normal_())

    def forward(self, ids):
        return kernels.embedding(self.weight, ids)
