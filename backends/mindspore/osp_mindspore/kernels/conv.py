"""Convolutions. Zero padding is given inside the operator: 27 times cheaper than padding first.

conv2d: x (B, C, H, W), weight (O, C, kh, kw), padding (top, bottom, left, right).
conv3d: x (B, C, T, H, W), weight (O, C, kt, kh, kw), padding (t, h, w), the same on both sides of an axis, or
(front, back, top, bottom, left, right).
"""

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


@raised
def conv3d_cpu(x, weight, bias=None, stride=(1, 1, 1), padding=(0, 0, 0)):
    """Frames of a multiple of 512 outputs are computed with one more row, which is cut off.

    oneDNN's 3-D convolution is one product a frame, and rows of 2^k bytes fall on the same cache lines: it runs at
    half speed up to some 384 output channels. One row more costs 1 / height.
    """
    out_channels, kernel = weight.shape[0], tuple(weight.shape[2:])
    front, back, top, bottom, left, right = padding if len(padding) == 6 else [n for n in padding for _ in range(2)]
    rows = (x.shape[3] + top + bottom - kernel[1]) // stride[1] + 1
    columns = (x.shape[4] + left + right - kernel[2]) // stride[2] + 1
    one_more = max(kernel) > 1 and out_channels < 384 and rows * columns % 512 == 0
    pad = (front, back, top, bottom + stride[1] * one_more, left, right)
    y = _conv3d(out_channels, kernel, stride, pad)(x, weight)
    return _add_bias(y[:, :, :, :rows] if one_more else y, bias)


def conv3d_ascend(x, weight, bias=None, stride=(1, 1, 1), padding=(0, 0, 0)):
    """Ascend's Conv3D takes half types only: float32 goes through bfloat16 and returns as float32."""
    if len(padding) == 6:  # the fused operator pads both sides alike
        front, back, top, bottom, left, right = padding
        x, padding = mint.nn.functional.pad(x, (left, right, top, bottom, front, back)), (0, 0, 0)
    if x.dtype == ms.float32:
        half = [a if a is None else a.astype(ms.bfloat16) for a in (x, weight, bias)]
        return mint.nn.functional.conv3d(*half, stride=stride, padding=padding).astype(ms.float32)
    return mint.nn.functional.conv3d(x, weight, bias, stride=stride, padding=padding)
