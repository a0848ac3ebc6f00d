"""Convolutions. Zero padding is given inside the operator: 27 times cheaper than padding first.

conv2d: x (B, C, H, W), weight (O, C, kh, kw), padding (top, bottom, left, right).
conv3d: x (B, C, T, H, W), weight (O, C, kt, kh, kw), padding (t, h, w), the same on both sides of an axis, or
(front, back, top, bottom, left, right).
"""

import math
from functools import cache

from osp_mindspore.kernels.precision import raised

import mindspore as ms
from mindspore import mint, ops


@cache
def _conv2d(out_channels, kernel, stride, padding):
    return ops.Conv2D(out_channels, kernel, pad_mode="pad", pad=padding, stride=stride)


@cache
def _conv3d(out_channels, kernel, stride, padding):
    pad = padding if len(padding) == 6 else tuple(n for n in padding for _ in range(2))
    return ops.Conv3D(out_channels, kernel, pad_mode="pad", pad=pad, stride=stride)


def _add_bias(y, bias):
    if bias is None:
        return y
    if y.dtype == ms.float32:
        return ops.bias_add(y, bias)  # nine times faster than broadcasting on CPU
    return y + bias.reshape((1, -1) + (1,) * (y.ndim - 2))


@raised
def conv2d_cpu(x, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0)):
    return _add_bias(_conv2d(weight.shape[0], tuple(weight.shape[2:]), stride, padding)(x, weight), bias)


def conv2d_ascend(x, weight, bias=None, stride=(1, 1), padding=(0, 0, 0, 0)):
    top, bottom, left, right = padding
    if (top, left) != (bottom, right):  # the fused operator pads both sides alike
        x = mint.nn.functional.pad(x, (left, right, top, bottom))
        top = left = 0
    return mint.nn.functional.conv2d(x, weight, bias, stride=stride, padding=(top, left))


def _both_sides(padding):
    if len(padding) == 6:
        return padding
    t, h, w = padding
    return t, t, h, h, w, w


_UNROLLED = 20 << 20  # bytes of one unrolled frame up to which the 3-D operator is the faster form


@raised
def conv3d_cpu(x, weight, bias=None, stride=(1, 1, 1), padding=(0, 0, 0)):
    """oneDNN's 3-D convolution for small frames, else a 2-D one for each frame of the kernel, summed.

    The 3-D one unrolls a whole frame (kernel size x C x H x W), keeps that memory for every shape it has met, and runs
    at half speed when a frame has a multiple of 512 positions. The 2-D one works in small blocks.
    """
    out_channels, channels, *kernel = weight.shape
    front, back, top, bottom, left, right = _both_sides(padding)
    rows = (x.shape[3] + top + bottom - kernel[1]) // stride[1] + 1
    columns = (x.shape[4] + left + right - kernel[2]) // stride[2] + 1
    unrolled = 4 * math.prod(kernel) * channels * rows * columns
    if math.prod(kernel) == 1 or (unrolled <= _UNROLLED and rows * columns % 512):
        pad = (front, back, top, bottom, left, right)
        return _add_bias(_conv3d(out_channels, tuple(kernel), tuple(stride), pad)(x, weight), bias)
    B, C, T, H, W = x.shape
    x_TBCHW = x.permute((2, 0, 1, 3, 4))
    if front or back:
        x_TBCHW = ops.cat([ops.zeros((n, B, C, H, W), x.dtype) if n else x_TBCHW for n in (front, 0, back)], 0)
    frames = (T + front + back - kernel[0]) // stride[0] + 1
    conv = _conv2d(out_channels, tuple(kernel[1:]), tuple(stride[1:]), (top, bottom, left, right))
    weights = weight.permute((2, 0, 1, 3, 4))
    y = None
    for t in range(kernel[0]):
        seen = x_TBCHW[t : t + (frames - 1) * stride[0] + 1 : stride[0]].reshape(frames * B, C, H, W)
        part = conv(seen, weights[t])
        y = part if y is None else y + part
    y = _add_bias(y, bias)
    return y.reshape(frames, B, out_channels, rows, columns).permute((1, 2, 0, 3, 4))


def conv3d_ascend(x, weight, bias=None, stride=(1, 1, 1), padding=(0, 0, 0)):
    """Ascend's Conv3D takes half types only: float32 goes through bfloat16 and returns as float32."""
    if len(padding) == 6:  # the fused operator pads both sides alike
        front, back, top, bottom, left, right = padding
        x, padding = mint.nn.functional.pad(x, (left, right, top, bottom, front, back)), (0, 0, 0)
    if x.dtype == ms.float32:
        half = [a if a is None else a.astype(ms.bfloat16) for a in (x, weight, bias)]
        return mint.nn.functional.conv3d(*half, stride=stride, padding=padding).astype(ms.float32)
    return mint.nn.functional.conv3d(x, weight, bias, stride=stride, padding=padding)
