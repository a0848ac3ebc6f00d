"""The Ascend form of every kernel, on a machine without one.

Two checks. Shape inference: MindSpore's front end compiles each form with its real operator (argument names, layouts,
ranks, gradients) and stops before it looks for a device kernel. Meaning: the fused operator is replaced by a numpy
statement of its documented contract, so that an inverted mask, a wrong layout or the wrong one of several outputs
changes numbers here.
"""

import importlib
import pkgutil

import numpy as np
import pytest

import osp_mindspore  # noqa: F401  sets MindSpore up
from osp_mindspore import kernels
from osp_shared import fill

import mindspore as ms
from mindspore import nn

FORMS = {
    m.name: importlib.import_module(f"osp_mindspore.kernels.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)
}


def zeros(*shape, dtype=ms.float16):
    return ms.Tensor(np.zeros(shape, np.float32)).astype(dtype)


def ids(*shape):
    return ms.Tensor(np.zeros(shape, np.int32))


class Call(nn.Cell):
    """One kernel as a network; the expected output shape is decided at compile time."""

    def __init__(self, function, shape, constants):
        super().__init__()
        self.function, self.shape, self.constants = function, shape, constants

    def construct(self, *tensors):
        out = self.function(*tensors, *self.constants)
        if out.shape != self.shape:
            raise ValueError("the Ascend form returns another shape than the CPU form")
        return out


def compile_only(monkeypatch, function, shape, tensors, constants=()):
    monkeypatch.setenv("MS_DEV_PRECOMPILE_ONLY", "1")
    Call(function, shape, constants).compile(*tensors)


HALF = {  # form -> (output shape, tensors, constants)
    "attention.attention": ((2, 4, 64, 96), (zeros(2, 4, 64, 96),) * 3, (0.1,)),
    "conv.conv2d": ((1, 6, 4, 4), (zeros(1, 4, 8, 8), zeros(6, 4, 3, 3), zeros(6)), ((2, 2), (0, 1, 0, 1))),
    "conv.conv3d": ((1, 6, 3, 8, 8), (zeros(1, 4, 7, 8, 8), zeros(6, 4, 3, 3, 3), zeros(6)), ((2, 1, 1), (0, 1, 1))),
    "linear.linear": ((3, 4, 6), (zeros(3, 4, 8), zeros(6, 8), zeros(6)), ()),
    "linear.embedding": ((2, 3, 8), (zeros(10, 8), ids(2, 3)), ()),
    "haar.haar": ((1, 12, 3, 2, 3), (zeros(1, 3, 3, 5, 6), zeros(4, 1, 2, 2)), ()),
    "haar.inverse_haar": ((1, 3, 4, 4, 6), (zeros(1, 24, 2, 2, 3), zeros(8, 2, 2, 2)), ()),
    "norm.layer_norm": ((2, 3, 8), (zeros(2, 3, 8), zeros(8), zeros(8)), ()),
    "norm.channel_layer_norm": ((2, 8, 3, 4, 5), (zeros(2, 8, 3, 4, 5), zeros(8), zeros(8)), ()),
    "norm.rms_norm": ((2, 3, 8), (zeros(2, 3, 8), zeros(8)), ()),
    "activation.gelu_tanh": ((3, 8), (zeros(3, 8),), ()),
    "activation.gelu_erf": ((3, 8), (zeros(3, 8),), ()),
    "activation.exp": ((3, 8), (zeros(3, 8),), ()),
    "activation.silu": ((3, 8), (zeros(3, 8),), ()),
    "activation.softmax": ((3, 8), (zeros(3, 8),), ()),
    "layout.permute": ((2, 3, 5, 4), (zeros(2, 5, 3, 4),), ((0, 2, 1, 3),)),
    "modulation.modulate": ((2, 5, 8), (zeros(2, 5, 8), zeros(2, 1, 8), zeros(2, 1, 8)), ()),
    "modulation.gated_add": ((2, 5, 8), (zeros(2, 5, 8), zeros(2, 1, 8), zeros(2, 5, 8)), ()),
    "rotary.rotary": ((2, 5, 3, 12), (zeros(2, 5, 3, 12), zeros(5, 3, 2), zeros(5, 3, 2)), ()),
    "resize.upsample_nearest2d": ((1, 2, 6, 8), (zeros(1, 2, 3, 4),), ()),
    "resize.upsample_linear": ((1, 2, 3, 8, 10), (zeros(1, 2, 3, 4, 5),), ((3, 4),)),
}


def form(name):
    module, kernel = name.split(".")
    return getattr(FORMS[module], f"{kernel}_ascend")


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("dtype", [ms.float16, ms.float32])
def test_shape_inference(monkeypatch, name, dtype):
    shape, tensors, constants = HALF[name]
    cast = [t if t.dtype == ms.int32 else t.astype(dtype) for t in tensors]
    compile_only(monkeypatch, form(name), shape, cast, constants)


def test_group_norm_shape_inference(monkeypatch):
    def four_groups(x, w, b):
        return FORMS["norm"].group_norm_ascend(x, 4, w, b)

    compile_only(monkeypatch, four_groups, (2, 8, 3, 4, 5), (zeros(2, 8, 3, 4, 5), zeros(8), zeros(8)))


def test_all_kernels_are_covered():
    forms = {f"{m}.{n[:-7]}" for m, module in FORMS.items() for n in vars(module) if n.endswith("_ascend")}
    assert forms == set(HALF) | {"norm.group_norm"}


@pytest.mark.parametrize("window", [(1, 2, 2), (2, 2, 2)])
def test_haar_forms_agree(window):
    """A matrix product of moved windows on Ascend, a strided convolution on CPU: the same sums of 4 or 8 products."""
    filters = ms.Tensor(fill.input_tensor("filters", (int(np.prod(window)), *window)))
    x = ms.Tensor(fill.input_tensor("video", (2, 3, 5, 6, 7)))
    bands = FORMS["haar"].haar_cpu(x, filters)
    pairs = [(FORMS["haar"].haar_ascend(x, filters), bands)]
    pairs += [(FORMS["haar"].inverse_haar_ascend(bands, filters), FORMS["haar"].inverse_haar_cpu(bands, filters))]
    for ascend, cpu in pairs:
        assert ascend.shape == cpu.shape
        bound = 8 * 2.0**-24 * np.abs(cpu.asnumpy()).max() * 8  # eight products, each below the largest sum
        assert np.abs(ascend.asnumpy() - cpu.asnumpy()).max() <= bound


@pytest.mark.parametrize("name", ["layout.permute", "modulation.modulate", "modulation.gated_add", "rotary.rotary"])
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16, ms.bfloat16])
def test_token_kernels_agree(name, dtype):
    """Values and gradients: the CPU forms gather rows and tile where the Ascend forms slice and broadcast."""
    _, tensors, constants = HALF[name]
    cpu = getattr(FORMS[name.split(".")[0]], name.split(".")[1] + "_cpu")
    given = [ms.Tensor(fill.input_tensor(f"{name}{i}", t.shape)).astype(dtype) for i, t in enumerate(tensors)]
    a, b = (f(*given, *constants) for f in (form(name), cpu))
    unit = {ms.float32: 2.0**-24, ms.float16: 2.0**-11, ms.bfloat16: 2.0**-8}[dtype]
    exact = dtype == ms.float32 or name in ("layout.permute", "rotary.rotary")  # the others round once, or each time
    a, b = (t.astype(ms.float32).asnumpy() for t in (a, b))
    assert np.array_equal(a, b) if exact else np.abs(a - b).max() <= 4 * unit * np.abs(a).max()
    if dtype == ms.float32:
        weight = ms.Tensor(fill.input_tensor("w", a.shape))
        places = tuple(range(len(given)))
        expected, found = (
            ms.grad(lambda *x, f=f: (f(*x, *constants) * weight).sum(), places)(*given) for f in (form(name), cpu)
        )
        for p, q in zip(expected, found, strict=True):
            assert np.abs(p.asnumpy() - q.asnumpy()).max() <= 8 * unit * np.abs(p.asnumpy()).max()


def test_inference_rejects_wrong_shapes(monkeypatch):
    """The check has teeth: the same call with a weight of another width does not compile."""
    with pytest.raises((ValueError, RuntimeError)):
        compile_only(monkeypatch, form("linear.linear"), (3, 4, 6), (zeros(3, 4, 8), zeros(6, 7), zeros(6)))


def test_our_own_shape_checks(monkeypatch):
    q = zeros(2, 4, 64, 96)
    attention = form("attention.attention")
    with pytest.raises(ValueError, match="do not fit"):
        attention(q, q, zeros(2, 4, 32, 96), 0.1)
    with pytest.raises(ValueError, match="key bias"):
        attention(q, q, q, 0.1, zeros(2, 1, 64, 64))


class FlashAttentionContract:
    """FlashAttentionScore as documented, in numpy: dtypes, layout, mask meaning, order of outputs."""

    calls: list = []

    def __init__(self, head_num, keep_prob=1.0, scale_value=1.0, input_layout="BSH", sparse_mode=0):
        assert input_layout == "BNSD" and keep_prob == 1.0 and sparse_mode == 0
        self.heads, self.scale = head_num, scale_value

    def __call__(self, query, key, value, real_shift, drop_mask, padding_mask, attn_mask, prefix):
        B, N, S, D = query.shape
        assert {query.dtype, key.dtype, value.dtype} in ({ms.float16}, {ms.bfloat16}), "half types only"
        assert N == self.heads and D % 16 == 0 and D <= 512 and key.shape == value.shape
        assert (real_shift, drop_mask, padding_mask, prefix) == (None,) * 4
        q, k, v = (t.astype(ms.float32).asnumpy() for t in (query, key, value))
        logits = self.scale * q @ k.swapaxes(2, 3)
        if attn_mask is not None:
            assert attn_mask.dtype in (ms.uint8, ms.bool_) and attn_mask.shape == (B, 1, S, key.shape[2])
            logits = np.where(attn_mask.asnumpy() != 0, -np.inf, logits)
        FlashAttentionContract.calls.append(attn_mask is not None)
        top = logits.max(-1, keepdims=True)
        weights = np.exp(logits - top)
        total = weights.sum(-1, keepdims=True)
        out = ms.Tensor((weights / total @ v).astype(np.float32)).astype(query.dtype)
        wide = (B, N, S, 8)
        return ms.Tensor(np.broadcast_to(top, wide)), ms.Tensor(np.broadcast_to(total, wide)), ms.Tensor([0.0]), out


@pytest.fixture
def contract(monkeypatch):
    monkeypatch.setattr(FORMS["attention"].nn_ops, "FlashAttentionScore", FlashAttentionContract)
    FlashAttentionContract.calls = []
    return FlashAttentionContract


def bias(rows):
    return ms.Tensor(np.array(rows, np.float32)[:, None, None])


@pytest.mark.parametrize("width", [16, 12, 96])
@pytest.mark.parametrize("dtype", [ms.float16, ms.bfloat16, ms.float32])
@pytest.mark.parametrize(
    "key_bias",
    [
        None,
        bias([[0, 0, 0, -10000, -10000, -10000], [0, 0, 0, 0, 0, -10000]]),
        bias([[-10000, -10000, -10000, -10000, -9980, -9980], [0, 0, -10000, -10000, -9980, -9980]]),
        bias([[-10000] * 6, [0] * 6]),
    ],
    ids=["all visible", "hidden keys", "pads win", "nothing visible"],
)
def test_attention_means_the_same_on_both_devices(contract, width, dtype, key_bias):
    """Error scale: one rounding of operands, weights and result each, 3 units of the half type (8 or 11 bits)."""
    q, k, v = (ms.Tensor(fill.input_tensor(t, (2, 3, 5 if t == "q" else 6, width))).astype(dtype) for t in "qkv")
    fused = FORMS["attention"].attention_ascend(q, k, v, width**-0.5, key_bias)
    plain = FORMS["attention"].attention_cpu(q, k, v, width**-0.5, key_bias)
    assert fused.dtype == dtype and contract.calls == [key_bias is not None]
    unit = 2.0**-11 if dtype == ms.float16 else 2.0**-8
    difference = np.abs(fused.astype(ms.float32).asnumpy() - plain.astype(ms.float32).asnumpy()).max()
    assert difference <= 3 * unit * np.abs(v.astype(ms.float32).asnumpy()).max()


def test_heads_that_the_operator_cannot_take_use_the_plain_form(contract):
    q = ms.Tensor(fill.input_tensor("wide", (1, 1, 3, 528))).astype(ms.float16)
    FORMS["attention"].attention_ascend(q, q, q, 0.05)
    assert contract.calls == []


def test_an_inverted_mask_would_be_seen(contract, monkeypatch):
    """The contract check has teeth: flipping the mask changes the result by far more than its bound."""
    q, k, v = (ms.Tensor(fill.input_tensor(t, (2, 3, 6, 16))).astype(ms.float16) for t in "qkv")
    row = bias([[0, 0, 0, -10000, -10000, -10000], [0, 0, 0, 0, 0, -10000]])
    right = FORMS["attention"].attention_ascend(q, k, v, 0.25, row).asnumpy()
    flipped = FORMS["attention"].attention_ascend(q, k, v, 0.25, -10000 - row).asnumpy()
    assert np.abs(right - flipped).max() > 0.1
