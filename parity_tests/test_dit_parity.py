"""The transformer, MindSpore against torch on the same weights and inputs: every module and kernel, every gradient.

Truth is torch in float64. What float32 costs is measured on torch itself: MindSpore may err FACTOR times as much, plus
one rounding, and twice that in gradients, where biases are sums over all tokens that MindSpore takes in one lane. The
worst seen over the cases below is 0.8 of the bound in values (silu's sigmoid) and 0.6 in gradients.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

import dit_models
from osp_shared.traces import cases
from osp_shared.traces.compare import compare

FACTOR, ROUNDING = 4.0, 2.0**-24
backends = pytest.mark.parametrize("backend", dit_models.BACKENDS)

CASES = {
    "t2v": cases.dit(),
    "pads": cases.dit(sparse_n=4, size=(3, 6, 10)),
    "image": cases.dit(size=(1, 8, 8), sparse_n=3),
    "dense": cases.dit(sparse1d=False, num_layers=3, size=(2, 5, 7)),
    "options": cases.dit(activation_fn="geglu", norm_elementwise_affine=True, attention_bias=False),
    "inpaint": cases.dit(True, sparse_n=3),
    "deep": cases.dit(num_layers=9, salt="deep"),
}


def allowed(row) -> float:
    factor = 2 * FACTOR if row.record.kind == "param_grad" else FACTOR
    return factor * row.yardstick.rel_l2 + ROUNDING


@pytest.mark.parametrize("name", CASES)
def test_every_module_and_gradient(name):
    from osp_mindspore import capture as mindspore
    from osp_torch import capture as torch

    case = CASES[name]
    truth, reference = (torch.run_case(case, dtype, backward=True) for dtype in ("float64", "float32"))
    found = compare(mindspore.run_case(case, "float32", backward=True), reference, truth)
    assert found.alignment.complete, (found.alignment.missing[:3], found.alignment.extra[:3])
    gradients = {f"{r.record.path}.{r.record.slot}".lstrip(".") for r in found.rows if r.record.kind == "param_grad"}
    assert gradients == set(case.spec().parameters())
    faults = [
        f"{row.title}: {row.error.rel_l2:.1e}, torch's own {row.yardstick.rel_l2:.1e}"
        for row in found.rows
        if row.yardstick and not row.error.rel_l2 <= allowed(row)
    ]
    assert not faults, faults[:5]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_types(dtype):
    """MindSpore in a half type errs no more than FACTOR times torch in it, and returns that type."""
    spec = dit_models.tiny()
    arrays = dit_models.inputs(spec, (3, 6, 10), video_box=[(3, 6, 10), (2, 6, 5)], text_lens=[3, 7])
    outputs = {}
    for name, kind in (("torch", "fp64"), ("torch", dtype), ("mindspore", dtype)):
        side = dit_models.backend(name)
        out = side.call(dit_models.build(side, spec, dtype=kind), *dit_models.arguments(side, arrays, kind))
        assert out.dtype == side.checkpoint.DTYPES[kind]
        outputs[name, kind] = side.numpy(out)
    exact = outputs["torch", "fp64"]
    own = np.linalg.norm(outputs["torch", dtype] - exact)
    assert 0 < np.linalg.norm(outputs["mindspore", dtype] - exact) <= FACTOR * own


@pytest.mark.parametrize("kind", ["gelu", "gelu-approximate", "geglu-approximate", "geglu", "swiglu"])
@backends
def test_activations_by_their_definition(backend, kind):
    side, spec = dit_models.backend(backend), dit_models.tiny(activation_fn=kind, num_layers=1)
    model, x = dit_models.build(side, spec), np.linspace(-6, 6, 2 * 48, dtype=np.float32).reshape(1, 2, 48)
    layer = model.transformer_blocks[0].ff.net[0]
    weight, bias = side.numpy(layer.proj.weight), side.numpy(layer.proj.bias)
    h = x.astype(np.float64) @ weight.T + bias
    value, gate = (h, h) if h.shape[2] == 192 else np.split(h, 2, -1)
    erf = np.vectorize(math.erf)
    expected = {
        "gelu": lambda: 0.5 * h * (1 + erf(h / math.sqrt(2))),
        "gelu-approximate": lambda: 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
        "geglu-approximate": lambda: h / (1 + np.exp(-1.702 * h)),
        "geglu": lambda: value * 0.5 * gate * (1 + erf(gate / math.sqrt(2))),
        "swiglu": lambda: value * gate / (1 + np.exp(-gate)),
    }[kind]()
    out = side.numpy(side.call(layer, side.tensor(x)))
    assert out.shape == (1, 2, 192)
    np.testing.assert_allclose(out, expected, atol=4e-6 * np.abs(expected).max())


def attention_biases(trace):
    """Key bias shape of every attention call, None where there is none."""
    found = {}
    for record in trace.records:
        if record.path.endswith("/attention") and record.kind == "output":
            bias = trace.by_key.get((-1, record.path, record.call, "input", "4"))
            found[record.path.split("/")[0]] = None if bias is None else bias.shape
    return found


@backends
def test_no_mask_is_built_when_all_is_visible(backend):
    side, spec = dit_models.backend(backend), dit_models.tiny(num_layers=4)
    model, size = dit_models.build(side, spec), (4, 6, 8)  # 48 tokens: no pad
    arrays = dit_models.inputs(spec, size)
    output, trace = dit_models.run(side, model, dit_models.arguments(side, arrays))
    assert set(attention_biases(trace).values()) == {None}
    shown = dit_models.inputs(spec, size, video_box=[size] * 2, text_lens=[7, 7])
    same, trace = dit_models.run(side, model, dit_models.arguments(side, shown))
    assert set(attention_biases(trace).values()) == {None} and np.array_equal(output, same)


@backends
def test_masks_are_one_row_of_keys(backend):
    """Pads alone: sparse self-attention has a bias, nothing else; masks: all have; never one row per query."""
    side, spec = dit_models.backend(backend), dit_models.tiny(num_layers=4)
    model, size = dit_models.build(side, spec), (3, 6, 10)  # 45 tokens: 3 pads
    _, trace = dit_models.run(side, model, dit_models.arguments(side, dit_models.inputs(spec, size)))
    sparse, dense = (8, 1, 1, 12), (2, 1, 1, 45)
    expected = {f"transformer_blocks.{i}.attn1": sparse if i >= 2 else None for i in range(4)}
    text = {f"transformer_blocks.{i}.attn2": None for i in range(4)}
    assert attention_biases(trace) == expected | text
    arrays = dit_models.inputs(spec, size, video_box=[(3, 6, 10), (1, 2, 2)], text_lens=[3, 7])
    _, trace = dit_models.run(side, model, dit_models.arguments(side, arrays))
    masked = {f"transformer_blocks.{i}.attn1": sparse if i >= 2 else dense for i in range(4)}
    assert attention_biases(trace) == masked | dict.fromkeys(text, (2, 1, 1, 7))


def test_nothing_of_size_tokens_squared_torch(monkeypatch):
    """With the block of logits limited, no operator of a forward pass returns N x N numbers."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    Largest.size = max(Largest.size, tensor.numel())
            return out

    side, spec = dit_models.backend("torch"), dit_models.tiny(num_layers=4, caption_channels=6)
    monkeypatch.setattr(side.kernels, "_LOGITS", 65536)
    model = dit_models.build(side, spec)
    arguments = dit_models.arguments(side, dit_models.inputs(spec, (8, 16, 16), timestep=[5.0], tokens=4))
    tokens = 8 * 8 * 8
    with Largest():
        side.call(model, *arguments)
    assert tokens * 4 * 48 <= Largest.size < tokens * tokens  # the feed forward's width is what is largest


def test_nothing_of_size_tokens_squared_mindspore(monkeypatch):
    """With the block of logits limited, softmax never sees N x N numbers, and attention gets no mask."""
    from mindspore import ops

    side, spec = dit_models.backend("mindspore"), dit_models.tiny(num_layers=4, caption_channels=6)
    seen, softmax = [], ops.softmax

    def watched(x, axis):
        seen.append(x.size)
        return softmax(x, axis)

    monkeypatch.setattr(sys.modules["osp_mindspore.kernels.attention"], "_LOGITS", 65536)
    monkeypatch.setattr(ops, "softmax", watched)
    model = dit_models.build(side, spec)
    arrays = dit_models.inputs(spec, (8, 16, 16), timestep=[5.0], tokens=4)
    _, trace = dit_models.run(side, model, dit_models.arguments(side, arrays))
    assert max(seen) <= 65536 and len(seen) > 2 * 4 * 512 * 512 // 65536
    assert max(r.size for r in trace.records) < 512 * 512


@backends
def test_tables_are_made_once_for_a_shape(backend):
    side, spec = dit_models.backend(backend), dit_models.tiny(num_layers=3)
    model = dit_models.build(side, spec)
    side.model.rope_tables.cache_clear()
    for size in ((2, 4, 6), (2, 4, 6), (2, 6, 6)):
        side.call(model, *dit_models.arguments(side, dit_models.inputs(spec, size)))
    info = side.model.rope_tables.cache_info()
    assert (info.misses, info.hits) == (2, 1)


@backends
def test_gradient_checkpointing_changes_no_number(backend):
    """Each block runs a second time in the backward pass, in training mode only. Gradients that several blocks add to
    may be summed in another order."""
    side, spec = dit_models.backend(backend), dit_models.tiny(num_layers=3)
    model = dit_models.build(side, spec)
    calls, block = [], model.transformer_blocks[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    arrays = dit_models.inputs(spec, (3, 6, 10), video_box=[(3, 6, 10), (1, 6, 5)], text_lens=[3, 7])
    arguments = dit_models.arguments(side, arrays)
    weight = side.tensor(np.ones((2, 8, 3, 6, 10), np.float32))
    results, counts = [], []
    for training, flag in ((False, True), (True, False), (True, True)):
        model.train(training) if backend == "torch" else model.set_train(training)
        model.gradient_checkpointing = flag
        calls.clear()
        results.append(side.gradients(model, arguments, weight))
        counts.append(len(calls))
    assert counts == [1, 1, 2]
    for loss, first, rest in results[1:]:
        assert loss == results[0][0] and np.array_equal(first, results[0][1])
        for name, value in results[0][2].items():
            np.testing.assert_allclose(rest[name], value, rtol=0, atol=4 * ROUNDING * np.abs(value).max(), err_msg=name)
