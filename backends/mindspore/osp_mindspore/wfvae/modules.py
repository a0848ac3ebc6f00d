"""Layers of WFVAE.

Shapes: B batch, C channels, T frames, H W rows and columns. Every layer maps (B, C, T, H, W) to (B, C', T', H', W').
`cache` is None for a whole video. For a chunk of one it is an object of tiling.py that keeps, between chunks, the
frames that causal layers reach back to; layers that look at one frame at a time ignore it.
"""

from __future__ import annotations

from osp_mindspore import kernels, layers
from osp_shared.specs.haar import haar_2d, haar_3d

from mindspore import Parameter, Tensor, nn, ops

# ------------------------------------------------------------------------------------------------ frames and time


def fold(x_BCTHW):
    """Frames into the batch, batch-major: (B T, C, H, W)."""
    B, C, T, H, W = x_BCTHW.shape
    return x_BCTHW.swapaxes(1, 2).reshape(B * T, C, H, W)


def unfold(x_NCHW, batch: int):
    """The inverse of `fold`."""
    N, C, H, W = x_NCHW.shape
    return x_NCHW.reshape(batch, N // batch, C, H, W).swapaxes(1, 2)


def first_repeated(layer, x_BCTHW):
    """x behind kernel_t - 1 copies of its first frame: time is padded with that, never with zeros."""
    return ops.cat([x_BCTHW[:, :, :1]] * (layer.kernel_t - 1) + [x_BCTHW], 2)


def with_past(layer, x_BCTHW, cache):
    """x behind the frames that the causal window of `layer` reaches back to."""
    if layer.kernel_t == 1:
        return x_BCTHW
    return first_repeated(layer, x_BCTHW) if cache is None else cache.extend(layer, x_BCTHW)


class Stack(nn.SequentialCell):
    """Layers one after the other."""

    def construct(self, x_BCTHW, cache=None):
        for layer in self.cell_list:
            x_BCTHW = layer(x_BCTHW, cache)
        return x_BCTHW


# ------------------------------------------------------------------------------------------------ convolutions, norms


class CausalConv3d(nn.Cell):
    """Convolution that sees no later frame; zeros around height and width, one number or (top, bottom, left, right)."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True):
        super().__init__()
        self.kernel_t, self.stride_t = kernel_size, stride
        around = (padding,) * 2 if isinstance(padding, int) else (0, *padding)
        self.conv = layers.Conv3d(in_channels, out_channels, kernel_size, stride, (0, *around), bias)

    def construct(self, x_BCTHW, cache=None):
        return self.conv(with_past(self, x_BCTHW, cache))


class FrameConv2d(layers.Conv2d):
    """A 2-D convolution of every frame."""

    def construct(self, x_BCTHW, cache=None):
        return unfold(super().construct(fold(x_BCTHW)), x_BCTHW.shape[0])


class LayerNorm(nn.Cell):
    """Over the channels at every position; its parameters sit one level deeper than a group norm's."""

    def __init__(self, channels):
        super().__init__()
        self.norm = layers.ChannelLayerNorm(channels, 1e-6)

    def construct(self, x):
        return self.norm(x)


def normalize(channels, norm_type):
    """The norm of the config: of five axes groupnorm takes all frames together."""
    return layers.GroupNorm(32, channels, 1e-6) if norm_type == "groupnorm" else LayerNorm(channels)


# ------------------------------------------------------------------------------------------------ blocks


class ResnetBlock2D(nn.Cell):
    """x + conv(swish(norm(conv(swish(norm(x)))))) frame by frame."""

    def __init__(self, channels, norm_type, dropout=0.0):
        super().__init__()
        self.norm1 = normalize(channels, norm_type)
        self.conv1 = layers.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = normalize(channels, norm_type)
        self.dropout = nn.Dropout(p=dropout)
        self.conv2 = layers.Conv2d(channels, channels, 3, padding=1)

    def construct(self, x_BCTHW, cache=None):
        x_NCHW = fold(x_BCTHW)
        h = self.conv1(kernels.silu(self.norm1(x_NCHW)))
        h = self.conv2(self.dropout(kernels.silu(self.norm2(h))))
        return unfold(x_NCHW + h, x_BCTHW.shape[0])


class ResnetBlock3D(nn.Cell):
    """x + conv(swish(norm(conv(swish(norm(x)))))), causal; a 1x1x1 shortcut where the width changes."""

    def __init__(self, in_channels, out_channels, norm_type, dropout=0.0):
        super().__init__()
        self.norm1 = normalize(in_channels, norm_type)
        self.conv1 = CausalConv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = normalize(out_channels, norm_type)
        self.dropout = nn.Dropout(p=dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def construct(self, x_BCTHW, cache=None):
        h = self.conv1(kernels.silu(self.norm1(x_BCTHW)), cache)
        h = self.conv2(self.dropout(kernels.silu(self.norm2(h))), cache)
        return (x_BCTHW if self.nin_shortcut is None else self.nin_shortcut(x_BCTHW)) + h


class AttnBlock3DFix(nn.Cell):
    """x + attention among the positions of each frame: one head as wide as the layer."""

    def __init__(self, channels, norm_type):
        super().__init__()
        self.norm = normalize(channels, norm_type)
        self.q = CausalConv3d(channels, channels, 1)
        self.k = CausalConv3d(channels, channels, 1)
        self.v = CausalConv3d(channels, channels, 1)
        self.proj_out = CausalConv3d(channels, channels, 1)

    def construct(self, x_BCTHW, cache=None):
        B, C, T, H, W = x_BCTHW.shape
        h = self.norm(x_BCTHW)
        q, k, v = [fold(part(h)).reshape(B * T, 1, C, H * W).swapaxes(2, 3) for part in (self.q, self.k, self.v)]
        h = kernels.attention(q, k, v, C**-0.5)  # (B T, 1, H W, C)
        return x_BCTHW + self.proj_out(unfold(h.swapaxes(2, 3).reshape(B * T, C, H, W), B))


# ------------------------------------------------------------------------------------------------ resolution


class Downsample(nn.Cell):
    """Space halved frame by frame; zeros on the right and at the bottom only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = layers.Conv2d(channels, channels, 3, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x_BCTHW, cache=None):
        return unfold(self.conv(fold(x_BCTHW)), x_BCTHW.shape[0])


class Upsample(nn.Cell):
    """Space doubled frame by frame, nearest."""

    def __init__(self, channels):
        super().__init__()
        self.conv = layers.Conv2d(channels, channels, 3, padding=1)

    def construct(self, x_BCTHW, cache=None):
        return unfold(self.conv(kernels.upsample_nearest2d(fold(x_BCTHW))), x_BCTHW.shape[0])


class Spatial2xTime2x3DDownsample(nn.Cell):
    """Time and space halved: T -> (T + 1) // 2; zeros on the right and at the bottom only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = CausalConv3d(channels, channels, 3, stride=2, padding=(0, 1, 0, 1))

    def construct(self, x_BCTHW, cache=None):
        return self.conv(x_BCTHW, cache)


class Spatial2xTime2x3DUpsample(nn.Cell):
    """Time and space doubled: T -> 2 T - 1. Space is doubled linearly whatever `t_interpolation` says."""

    def __init__(self, channels, t_interpolation="trilinear"):
        super().__init__()
        self.t_interpolation = t_interpolation
        self.conv = CausalConv3d(channels, channels, 3, padding=1)

    def construct(self, x_BCTHW, cache=None):
        h = self.upsample_time(x_BCTHW) if cache is None else cache.upsample_time(self, x_BCTHW)
        return self.conv(kernels.upsample_linear(h, (3, 4)), cache)

    def upsample_time(self, x_BCTHW):
        """The first frame as it is; the rest doubled as a sequence of their own."""
        if x_BCTHW.shape[2] == 1:
            return x_BCTHW
        return ops.cat([x_BCTHW[:, :, :1], self.double_time(x_BCTHW[:, :, 1:])], 2)

    def double_time(self, x_BCTHW):
        if self.t_interpolation == "nearest":
            B, C, T, H, W = x_BCTHW.shape
            x_BCT1HW = x_BCTHW.reshape(B, C, T, 1, H, W)
            return ops.cat([x_BCT1HW, x_BCT1HW], 3).reshape(B, C, 2 * T, H, W)
        return kernels.upsample_linear(x_BCTHW, 2)


# ------------------------------------------------------------------------------------------------ wavelets


def _constant(taps, name):
    return Parameter(Tensor(taps.reshape((1, 1) + taps.shape)), name=name, requires_grad=False)


class HaarWaveletTransform2D(nn.Cell):
    """Frame by frame, exact: C -> 4 C, band-major."""

    def __init__(self):
        super().__init__()
        for band, taps in haar_2d().items():
            setattr(self, band, _constant(taps, band))

    def filters(self):
        return ops.cat([self.aa, self.ad, self.da, self.dd])  # (4, 1, 2, 2): one frame at a time

    def construct(self, x_BCTHW, cache=None):
        return kernels.haar(x_BCTHW, self.filters())


class InverseHaarWaveletTransform2D(HaarWaveletTransform2D):
    """Frame by frame: 4 C -> C."""

    def construct(self, x_BCTHW, cache=None):
        return kernels.inverse_haar(x_BCTHW, self.filters())


class HaarWaveletTransform3D(nn.Cell):
    """C -> 8 C, T -> (T + 1) // 2, band-major: windows (x0, x0), (x1, x2), (x3, x4), ...

    Each filter is stored as a causal convolution of its own; they are applied together.
    """

    kernel_t = stride_t = 2

    def __init__(self):
        super().__init__()
        for band, taps in haar_3d().items():
            conv = CausalConv3d(1, 1, 2, stride=2, bias=False)
            conv.conv.weight = _constant(taps, "weight")
            setattr(self, f"{band}_conv", conv)

    def filters(self):
        first = (self.h_conv, self.g_conv, self.hh_conv, self.gh_conv)
        later = (self.h_v_conv, self.g_v_conv, self.hh_v_conv, self.gh_v_conv)
        return ops.cat([band.conv.weight for band in first + later]).squeeze(1)  # (8, 2, 2, 2)

    def construct(self, x_BCTHW, cache=None):
        return kernels.haar(with_past(self, x_BCTHW, cache), self.filters())


class InverseHaarWaveletTransform3D(nn.Cell):
    """8 C -> C, T -> 2 T - 1: of the first window only the second frame is a frame of the video."""

    def __init__(self):
        super().__init__()
        for band, taps in haar_3d().items():
            setattr(self, band, _constant(taps, band))

    def filters(self):
        first = (self.h, self.g, self.hh, self.gh)
        return ops.cat(first + (self.h_v, self.g_v, self.hh_v, self.gh_v)).squeeze(1)  # (8, 2, 2, 2)

    def construct(self, x_BCTHW, cache=None):
        h = kernels.inverse_haar(x_BCTHW, self.filters())
        return h[:, :, 1:] if cache is None or cache.first else h
