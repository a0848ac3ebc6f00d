"""Rotation of query and key halves by their positions' angles (RoPE).

Each head is P parts of two halves of H: (u, v) -> (u cos - v sin, v cos + u sin), the same angles for all heads. Half
types: every product and sum is rounded, as hardware without a fused form does and the released model does.
"""

from osp_mindspore.kernels.layout import swapped_pairs
from osp_mindspore.kernels.precision import HALF

import mindspore as ms
from mindspore import ops


def rotary_cpu(x_BNAD, cos_NPH, sin_NPH):
    """x (cos, cos) + (v, u) (-sin, sin) on equal shapes: slices and operators that broadcast are slow on CPU."""
    dtype = x_BNAD.dtype
    half = dtype in HALF
    x, cos, sin = (t.astype(ms.float32) if half else t for t in (x_BNAD, cos_NPH, sin_NPH))
    swapped = swapped_pairs(x, cos.shape[2])  # (v, u)
    a = x * _heads(cos, cos, x.shape)
    b = swapped * _heads(-sin, sin, x.shape)
    return (a.astype(dtype).astype(ms.float32) + b.astype(dtype).astype(ms.float32)).astype(dtype) if half else a + b


def _heads(u_NPH, v_NPH, shape):
    """A table for both halves, repeated for samples and heads: (B, N, A, D)."""
    B, N, A, D = shape
    table = ops.cat((u_NPH, v_NPH), -1).reshape(1, N, 1, D)
    return ops.tile(table, (B, 1, A, 1))


def rotary_ascend(x_BNAD, cos_NPH, sin_NPH):
    B, N, A, D = x_BNAD.shape
    P, H = cos_NPH.shape[1:]
    cos, sin = cos_NPH.reshape(1, N, 1, P, H), sin_NPH.reshape(1, N, 1, P, H)
    x = x_BNAD.reshape(B, N, A, P, 2, H)
    u, v = x[:, :, :, :, 0], x[:, :, :, :, 1]
    return ops.cat((u * cos - v * sin, v * cos + u * sin), -1).reshape(B, N, A, D)
