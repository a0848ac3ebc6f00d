"""The one place that sets MindSpore up. `import osp_mindspore` runs `start()`; nothing else touches global state.

Each rule answers a trap that costs a factor of 50 in speed or is silently wrong:

1. numpy 2: MindSpore's C extension is built against numpy 1.x and fails at the first operator.
2. `import decord` before `import mindspore` aborts the process.
3. oneDNN's convolutions (MindSpore 2.9 and later) fall to a reference loop on AVX-512 machines: its instruction set is
   capped at AVX2 through MindSpore's own library, so that torch in the same process keeps its own.
4. Asynchronous execution reports the error of operator A at operator B: launches are blocking on CPU.
5. In-place arithmetic (`t.add_` and others, and the optimisers built on it) returns the right value and changes
   nothing on CPU: it raises instead.
6. A mixed-precision cell that raises leaves its precision to the whole process: `reset_precision()`.
7. A failed graph compilation writes dumps into the current folder: they go to a temporary one.

On Ascend the device is selected, and float32 stays float32 (no hf32 in convolutions and products).
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import sys
import tempfile

from osp_shared.errors import OspError

AVX2 = 0x7  # dnnl_cpu_isa_avx2
IN_PLACE = ("add_", "sub_", "mul_", "div_", "exp_")  # Tensor methods that are silent no-ops on CPU

_device: str | None = None


def start() -> None:
    """Import and configure MindSpore once; OSP_DEVICE (CPU or Ascend) overrides the choice of device.

    Raises:
        OspError: numpy 2, decord imported first, MindSpore missing, or a device that is not here.
    """
    global _device
    if _device is not None:
        return
    _check_environment()
    os.environ.setdefault("GLOG_v", "3")  # read at import: later is too late
    os.environ.setdefault("MS_OM_PATH", tempfile.gettempdir())
    wanted = os.environ.get("OSP_DEVICE", "").upper()
    if wanted not in ("", "CPU", "ASCEND"):
        raise OspError(f"OSP_DEVICE={wanted}: the device must be CPU or Ascend")

    import mindspore as ms

    has_ascend = bool(ms.device_context.ascend.is_available())
    if wanted == "ASCEND" and not has_ascend:
        raise OspError("device Ascend: MindSpore finds no Ascend here (driver, CANN); use --device CPU")
    if has_ascend and wanted != "CPU":
        _start_ascend(ms)
        _device = "Ascend"
    else:
        _start_cpu(ms)
        _device = "CPU"


def device() -> str:
    """"CPU" or "Ascend": fixed when the package is imported."""
    if _device is None:
        raise OspError("MindSpore is not set up: import osp_mindspore first")
    return _device


def on_ascend() -> bool:
    return device() == "Ascend"


def select(wanted: str | None) -> None:
    """Check a caller's device against the one in force.

    Raises:
        OspError: when they differ: the device is fixed at import, OSP_DEVICE selects it.
    """
    if wanted is not None and wanted.split(":")[0].upper() != device().upper():
        raise OspError(f"device {wanted}: this process runs MindSpore on {device()}; set OSP_DEVICE before it starts")


def reset_precision() -> None:
    """Forget the precision that a mixed-precision cell left behind when it raised."""
    from mindspore.common.api import _pynative_executor

    _pynative_executor.clear_res()


def clean_precision(function):
    """Decorator for entry points: an exception inside must not change the precision of the next call."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except Exception:
            reset_precision()
            raise

    return guarded


def _check_environment() -> None:
    import numpy

    if int(numpy.__version__.split(".")[0]) >= 2:
        raise OspError(f"numpy {numpy.__version__}: MindSpore needs numpy 1.x; pip install 'numpy<2'")
    if importlib.util.find_spec("mindspore") is None:
        raise OspError("mindspore is not installed: pip install -e '.[mindspore]'")
    if "decord" in sys.modules and "mindspore" not in sys.modules:
        raise OspError("decord was imported before mindspore, which aborts the process: import osp_mindspore first")


def _start_cpu(ms) -> None:
    cap_onednn()
    ms.set_device("CPU")
    ms.runtime.launch_blocking()
    _refuse_in_place(ms)


def _start_ascend(ms) -> None:
    ms.set_device("Ascend", int(os.environ.get("DEVICE_ID", "0")))
    ms.device_context.ascend.op_precision.conv_allow_hf32(False)
    ms.device_context.ascend.op_precision.matmul_allow_hf32(False)
    if limit := os.environ.get("OSP_MAX_DEVICE_MEMORY"):
        ms.runtime.set_memory(max_size=limit)


def cap_onednn(isa: int = AVX2) -> list[int]:
    """Limit MindSpore's bundled oneDNN to `isa`; one status a library: 0 done, 2 too late (a primitive exists).

    x86 only: elsewhere the bundled library has no such entry point, and nothing to cap.
    """
    root = os.path.dirname(importlib.util.find_spec("mindspore").origin)
    codes = []
    for path in sorted(glob.glob(os.path.join(root, "lib", "libdnnl.so.*"))):
        cap = getattr(ctypes.CDLL(path), "dnnl_set_max_cpu_isa", None)
        if cap is not None:
            codes.append(int(cap(ctypes.c_int(isa))))
    return codes


def _refuse_in_place(ms) -> None:
    def refusal(name):
        def refuse(self, *args, **kwargs):
            raise OspError(f"Tensor.{name} changes nothing on MindSpore's CPU: use ops.assign, or out of place")

        return refuse

    for name in IN_PLACE:
        setattr(ms.Tensor, name, refusal(name))

    def refuse_optimiser(self, *args, **kwargs):
        raise OspError(
            f"mint.optim.{type(self).__name__} trains nothing on MindSpore's CPU (its in-place updates are lost): "
            "use mindspore.experimental.optim.AdamW"
        )

    for name in ("Adam", "SGD"):
        getattr(ms.mint.optim, name).__init__ = refuse_optimiser
