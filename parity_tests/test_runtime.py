"""Every trap that osp_mindspore.runtime answers is shown to be answered."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from osp_shared.errors import OspError


@pytest.fixture(scope="module")
def ms():
    import osp_mindspore  # noqa: F401  sets MindSpore up

    import mindspore

    return mindspore


def python(code: str, **env) -> subprocess.CompletedProcess:
    env = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_onednn_is_capped_and_convolutions_are_not_the_reference_loop(ms):
    """Uncapped on an AVX-512 machine this convolution takes some 6 s, capped some 15 ms: a factor of 20 decides it."""
    from osp_mindspore import kernels, runtime

    x, w = (ms.Tensor(np.ones(s, np.float32)) for s in ((1, 64, 4, 32, 32), (64, 64, 3, 3, 3)))
    a = ms.Tensor(np.ones((2048, 1024), np.float32))
    kernels.conv3d(x, w, None, (1, 1, 1), (0, 1, 1)), kernels.linear(a, a)

    def fastest(f):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        return min(times)

    assert set(runtime.cap_onednn()) <= {2}, "2: too late, a primitive exists, made under the first cap"
    conv_flops = 2 * 64 * 64 * 27 * 2 * 32 * 32
    conv = conv_flops / fastest(lambda: kernels.conv3d(x, w, None, (1, 1, 1), (0, 1, 1)))
    matmul = 2 * 2048 * 2048 * 1024 / fastest(lambda: kernels.linear(a, a))
    assert conv > matmul / 20, f"convolution {conv / 1e9:.1f} GFLOP/s against matmul {matmul / 1e9:.1f}"


def test_errors_are_raised_where_they_happen(ms):
    """Blocking launches: the failing operator raises inside its own `with`, not at a later one."""
    from mindspore import ops

    x = ms.Tensor(np.ones((2, 3), np.float32))
    with pytest.raises((TypeError, RuntimeError), match="MatMul"):
        ops.MatMul()(x.astype(ms.bfloat16), x.astype(ms.bfloat16).T)
    assert float((x + 1).sum()) == 12.0


@pytest.mark.parametrize("name", ["add_", "sub_", "mul_", "div_", "exp_"])
def test_in_place_arithmetic_raises(ms, name):
    t = ms.Tensor(np.ones(3, np.float32))
    with pytest.raises(OspError, match=name):
        getattr(t, name)(*(() if name == "exp_" else (2.0,)))


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_optimisers_that_train_nothing_raise(ms, name):
    with pytest.raises(OspError, match=name):
        getattr(ms.mint.optim, name)([ms.Parameter(ms.Tensor(np.ones(3, np.float32)))], lr=0.1)


def test_assignment_works_where_in_place_does_not(ms):
    p = ms.Parameter(ms.Tensor(np.ones(3, np.float32)))
    ms.ops.assign_add(p, ms.Tensor(np.ones(3, np.float32)))
    assert p.asnumpy().tolist() == [2, 2, 2]


def test_precision_left_behind_by_an_exception_is_cleaned(ms):
    """A cell in half precision that raises: without the guard, the next float32 product is computed in float16."""
    from osp_mindspore import runtime

    from mindspore import nn, ops

    class Breaks(nn.Cell):
        def construct(self, x):
            raise ValueError("inside a mixed-precision cell")

    @runtime.clean_precision
    def entry_point(cell, x):
        return cell(x)

    x = ms.Tensor(np.full((4, 4), 1.0001, np.float32))
    with pytest.raises(ValueError, match="inside"):
        entry_point(Breaks().to_float(ms.float16), x)

    class Product(nn.Cell):
        def construct(self, a):
            return ops.matmul(a, a)

    assert Product()(x).dtype == ms.float32
    np.testing.assert_allclose(Product()(x).asnumpy(), x.asnumpy() @ x.asnumpy(), rtol=1e-6)


def test_device_is_fixed_and_checked(ms):
    from osp_mindspore import runtime

    assert runtime.device() == "CPU" and not runtime.on_ascend()
    runtime.select("CPU")
    runtime.select(None)
    with pytest.raises(OspError, match="Ascend"):
        runtime.select("Ascend")


def test_log_level_and_dump_folder_are_set_before_import(ms):
    assert os.environ["GLOG_v"] == "3"
    assert os.path.isdir(os.environ["MS_OM_PATH"])


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("import sys, types; sys.modules['decord'] = types.ModuleType('decord')", "decord was imported before"),
        ("import numpy; numpy.__version__ = '2.1.0'", "needs numpy 1.x"),
        ("import os; os.environ['OSP_DEVICE'] = 'GPU'", "must be CPU or Ascend"),
        ("import os; os.environ['OSP_DEVICE'] = 'Ascend'", "finds no Ascend"),
    ],
)
def test_a_wrong_start_is_one_clear_error(setup, message):
    result = python(f"{setup}\nimport osp_mindspore")
    assert result.returncode != 0 and message in result.stderr.strip().splitlines()[-1]


def test_decord_after_mindspore_is_harmless_or_absent():
    """The abort is a crash of the process: this shows the order that the project uses."""
    result = python("import osp_mindspore\ntry:\n    import decord\nexcept ImportError:\n    pass\nprint('alive')")
    assert result.stdout.strip().endswith("alive"), result.stderr
