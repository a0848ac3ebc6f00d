"""Doubling of axes. Half-pixel centres, edges clamped (align_corners false)."""

from osp_mindspore.kernels.precision import raised

from mindspore import mint, ops


@raised
def upsample_nearest2d_cpu(x):
    """(B, C, H, W) -> (B, C, 2H, 2W), each value four times."""
    return ops.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="nearest")


def upsample_nearest2d_ascend(x):
    return mint.nn.functional.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="nearest")


def _doubled(x, axis):
    axes = (axis,) if isinstance(axis, int) else axis
    return tuple(n * 2 if i in axes else n for i, n in enumerate(x.shape))[2:]


@raised
def upsample_linear_cpu(x, axis):
    """(B, C, T, H, W) with `axis` (one of 2, 3, 4, or a tuple of them) doubled linearly."""
    return ops.interpolate(x, size=_doubled(x, axis), mode="trilinear", align_corners=False)


def upsample_linear_ascend(x, axis):
    return mint.nn.functional.interpolate(x, size=_doubled(x, axis), mode="trilinear", align_corners=False)
