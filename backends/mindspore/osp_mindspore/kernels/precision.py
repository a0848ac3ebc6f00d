"""Half types on a CPU: operands raised to float32, the result rounded back once."""

from __future__ import annotations

import functools

import mindspore as ms

HALF = (ms.float16, ms.bfloat16)


def raised(function):
    """CPU form of a kernel whose first argument sets the dtype: half operands are computed in float32."""

    @functools.wraps(function)
    def form(x, *args, **kwargs):
        if x.dtype not in HALF:
            return function(x, *args, **kwargs)
        args = [a.astype(ms.float32) if isinstance(a, ms.Tensor) and a.dtype in HALF else a for a in args]
        kwargs = {
            k: a.astype(ms.float32) if isinstance(a, ms.Tensor) and a.dtype in HALF else a for k, a in kwargs.items()
        }
        return function(x.astype(ms.float32), *args, **kwargs).astype(x.dtype)

    return form
