"""Rotation of query and key halves by their positions' angles (RoPE)."""

from osp_mindspore.kernels.precision import HALF

import mindspore as ms
from mindspore import ops


def rotary_cpu(x_BNAD, cos_NPH, sin_NPH):
    """Each head is P parts of two halves: (u, v) -> (u cos - v sin, v cos + u sin), the same angles for all heads.

    Half types: every product and sum is rounded, as hardware without a fused form does and the released model does.
    """
    dtype = x_BNAD.dtype
    if dtype in HALF:
        x_BNAD, cos_NPH, sin_NPH = (t.astype(ms.float32) for t in (x_BNAD, cos_NPH, sin_NPH))
        return _rotate(x_BNAD, cos_NPH, sin_NPH, lambda t: t.astype(dtype).astype(ms.float32)).astype(dtype)
    return _rotate(x_BNAD, cos_NPH, sin_NPH, lambda t: t)


def rotary_ascend(x_BNAD, cos_NPH, sin_NPH):
    return _rotate(x_BNAD, cos_NPH, sin_NPH, lambda t: t)


def _rotate(x_BNAD, cos_NPH, sin_NPH, rounded):
    B, N, A, D = x_BNAD.shape
    P, H = cos_NPH.shape[1:]
    cos, sin = cos_NPH.reshape(1, N, 1, P, H), sin_NPH.reshape(1, N, 1, P, H)
    x = x_BNAD.reshape(B, N, A, P, 2, H)
    u, v = x[:, :, :, :, 0], x[:, :, :, :, 1]
    first = rounded(rounded(u * cos) - rounded(v * sin))
    second = rounded(rounded(v * cos) + rounded(u * sin))
    return ops.cat((first, second), -1).reshape(B, N, A, D)
