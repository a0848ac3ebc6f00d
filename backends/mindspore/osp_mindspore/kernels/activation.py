"""Point-wise functions and softmax."""

import math

from osp_mindspore.kernels.precision import raised

import mindspore as ms
from mindspore import mint, ops

_TWICE_SQRT_2_OVER_PI = 1.5957691216057308  # 2 * sqrt(2 / pi)


@raised
def gelu_tanh_cpu(x):
    """0.5 x (1 + tanh(u)) = x sigmoid(2u): ops.tanh is off by 1e-4 near saturation on CPU, ops.sigmoid is not."""
    return x * ops.sigmoid(_TWICE_SQRT_2_OVER_PI * (x + 0.044715 * (x * x * x)))


def gelu_tanh_ascend(x):
    return mint.nn.functional.gelu(x, approximate="tanh")


@raised
def gelu_erf_cpu(x):
    return ops.gelu(x, approximate="none")


def gelu_erf_ascend(x):
    return mint.nn.functional.gelu(x)


@raised
def exp_cpu(x):
    """A power of e: ops.exp is off by 4e-6 of the value on CPU, ops.pow by 2e-7."""
    return ops.pow(ms.Tensor(math.e, x.dtype), x)


def exp_ascend(x):
    return mint.exp(x)


@raised
def silu_cpu(x):
    return ops.silu(x)


def silu_ascend(x):
    return mint.nn.functional.silu(x)


@raised
def softmax_cpu(x):
    """Over the last axis."""
    return ops.softmax(x, -1)


def softmax_ascend(x):
    return mint.nn.functional.softmax(x.astype(ms.float32), dim=-1).astype(x.dtype)
