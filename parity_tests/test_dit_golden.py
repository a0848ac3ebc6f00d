"""The transformer against the golden numbers: every unit, every case with its layer records and gradients.

Gates are those the files name (`tolerance_hint`): relative 1e-5 on the L2 norm, 1e-4 on samples; the reference's own
float32 rounding takes 2e-6 and 2e-5 of them. Records inside blocks are [tokens, batch, ...] in the files.
"""

from __future__ import annotations

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest

import dit_models
import golden_files
from osp_shared import fill
from osp_shared.geometry import rope
from osp_shared.geometry.skiparse import Skiparse
from osp_shared.geometry.timestep import sinusoid
from osp_shared.geometry.tokens import HIDDEN
from osp_shared.specs.dit import TIME_CHANNELS, DiTSpec, InpaintSpec

L2, SAMPLES = 1e-5, 1e-4
UNITS = golden_files.items("dit", "units", lambda u: u["unit"])
CASES = golden_files.items("dit", "cases", lambda c: c["name"])
backends = pytest.mark.parametrize("backend", dit_models.BACKENDS)


def units(kind: str):
    return pytest.mark.parametrize(("file", "unit"), [p for p in UNITS if p.values[1]["unit"] == kind])


def salt_of(file, item) -> str:
    return item.get("salt", file["header"].get("salt", ""))


def errors(record, value) -> tuple[float, float]:
    """(relative error of the norm, largest error of mean, deviation and samples) of [name, shape, mean, ...]."""
    name, shape, mean, std, l2, samples = record
    value = np.asarray(value, np.float64)
    assert list(value.shape) == shape, f"{name}: shape {value.shape}, golden {shape}"
    flat = value.ravel()
    index = [int((j + 1) * 0.6180339887498949 % 1 * flat.size) for j in range(len(samples))]
    norm = abs(np.linalg.norm(flat) - l2) / (l2 or 1.0)  # a bias that hides nothing is zero
    return norm, max(abs(flat.mean() - mean), abs(flat.std() - std), np.abs(flat[index] - samples).max())


def check(record, value) -> None:
    norm, largest = errors(record, value)
    assert norm <= L2 and largest <= SAMPLES, f"{record[0]}: norm off by {norm:.2e}, samples by {largest:.2e}"


# ------------------------------------------------------------------------------------------------------------- units


@units("skiparse_map")
def test_skiparse_map(file, unit):
    rule = Skiparse(unit["sparse_n"], unit["group"])
    assert rule.padding(unit["N"]) == unit["pad"]
    assert rule.positions(unit["N"]).tolist() == unit["map"]


@units("sparse_mask")
def test_sparse_mask(file, unit):
    rule = Skiparse(unit["sparse_n"], unit["group"])
    visible = np.arange(unit["N"]) < np.array(unit["valid"])[:, None]
    bias = rule.key_bias(np.where(visible, 0, HIDDEN).astype(np.float32), len(visible), unit["N"])
    X, heads, _, S = unit["self_shape"]
    assert heads == unit["head_num"] and bias.shape == (X, 1, 1, S)
    assert bias.reshape(X, S).tolist() == unit["self_head0"]
    # Cross-attention is not rearranged here: each of the n copies of a sample sees that sample's text mask.
    text = np.where(np.arange(unit["cross_shape"][3]) < np.array(unit["text_valid"])[:, None], 0, HIDDEN)
    assert np.tile(text, (unit["sparse_n"], 1)).tolist() == unit["cross_head0"]


def first_filled(grid_thw, scale_thw):
    """Scales as the original's cache hands them out: axes of one extent share the first one's."""
    return tuple(scale_thw[grid_thw.index(extent)] for extent in grid_thw)


def rotated(backend, unit, scale_thw, salt):
    side = dit_models.backend(backend)
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[unit["dtype"]]
    x = fill.input_tensor("rope", tuple(unit["out"][1]), salt).transpose(1, 0, 2, 3)
    tables = rope.tables(tuple(unit["grid"]), unit["head_dim"], scale_thw, unit["dtype"])
    cos, sin = (side.tensor(t.astype(np.float32), short) for t in tables)
    return side.numpy(side.kernels.rotary(side.tensor(x.copy(), short), cos, sin)).transpose(1, 0, 2, 3)


@backends
@units("rope3d")
def test_rope(backend, file, unit):
    """Half types exactly: samples are representable numbers, printed with nine digits."""
    grid, scale = tuple(unit["grid"]), tuple(unit["scale_thw"])
    effective = first_filled(grid, scale)
    out = rotated(backend, unit, effective, salt_of(file, unit))
    check(unit["out"], out)
    if unit["dtype"] != "float32":
        norm, largest = errors(unit["out"], out)
        assert norm < 1e-8 and largest < 1e-8
    if effective != scale:
        # Expected difference: the original's cache ignores the scale (see test_case_rope_collision).
        assert errors(unit["out"], rotated(backend, unit, scale, salt_of(file, unit)))[1] > 100 * SAMPLES


@units("timestep_embedding")
def test_timestep_embedding(file, unit):
    check(unit["out"], sinusoid(np.array([unit["t"]]), TIME_CHANNELS)[0])
    for kind, key in ((ml_dtypes.bfloat16, "as_bfloat16"), (np.float16, "as_float16")):
        assert float(np.float32(unit["t"]).astype(kind)) == unit[key]


@backends
@units("attention")
def test_attention(backend, file, unit):
    """One attention module; head width 12, text of 7 tokens of which sample 0 shows 3."""
    side, salt = dit_models.backend(backend), salt_of(file, unit)
    N, B, D = unit["out"][1]
    rule = Skiparse(unit["sparse_n"], unit["group"])
    spec = DiTSpec(
        num_attention_heads=D // 12, attention_head_dim=12, in_channels=1, patch_size=1, patch_size_t=1,
        caption_channels=1,
    )  # fmt: skip
    kind = side.modules.CrossAttention if unit["cross"] else side.modules.SelfAttention
    shapes = {n.split("attn1.")[1]: s for n, s in spec.parameters().items() if ".attn1." in n}
    module = side.checkpoint.build(kind, spec, lambda n: fill.parameter("unit_attn." + n, shapes[n], salt))
    x = side.tensor(fill.input_tensor("unit_x", (N, B, D), salt).transpose(1, 0, 2).copy())
    text_bias, video_bias = np.zeros((B, 1, 1, 7), np.float32), np.zeros((B, N), np.float32)
    text_bias[0, ..., 3:], video_bias[1, -4:] = HIDDEN, HIDDEN
    if unit["cross"]:
        text = side.tensor(fill.input_tensor("unit_text", (7, B, D), salt).transpose(1, 0, 2).copy())
        out = side.call(module, x, text, side.tensor(text_bias))
    else:
        tables = [side.tensor(t) for t in rope.tables(tuple(unit["grid"]), 12, (1.0, 1.0, 1.0), "float32")]
        out = side.call(module, x, tables, rule, side.tensor(rule.key_bias(video_bias, B, N)))
    check(unit["out"], side.numpy(out).transpose(1, 0, 2))


@backends
@units("unpatchify_one_patch")
def test_unpatchify(backend, file, unit):
    side = dit_models.backend(backend)
    C, p = unit["out_channels"], unit["patch"]
    features = side.tensor(np.arange(C * p * p, dtype=np.float32).reshape(1, 1, -1))
    assert side.numpy(side.model.unpatchify(features, (1, 1, 1), p))[0, :, 0].tolist() == unit["out"]


# ------------------------------------------------------------------------------------------------------------- cases


def spec_of(case) -> DiTSpec:
    return {"t2v": DiTSpec, "inpaint": InpaintSpec}[case["model"]].from_config(case["config"])


def inputs_of(file, case, spec):
    given, salt = case["inputs"], salt_of(file, case)
    size, tokens = tuple(given["latents"][2:]), given["text"][2]
    boxes = [size] * given["latents"][0] if given["video_mask"] == "ones" else given["video_mask"]
    return dit_models.inputs(spec, size, given["timesteps"], tokens, boxes, given["text_lens"], salt)


class Records:
    """What a golden record's name stands for in a recorded run."""

    def __init__(self, trace, spec, inputs):
        self.trace, self.spec = trace, spec
        self.grid = spec.token_grid(*inputs[0].shape[2:])
        self.batch, self.tokens = inputs[0].shape[0], inputs[2].shape[2]

    def value(self, name: str) -> np.ndarray:
        if found := re.fullmatch(r"(.*\.attn1)\.rope_([qk])", name):
            return self.get(f"{found[1]}/rotary", call="qk".index(found[2])).transpose(1, 0, 2, 3)
        if found := re.fullmatch(r"(.*\.(\d+)\.(attn[12]))\.sdpa\.(\w+)\[.*", name):
            part = self.attention_part(found[1], found[4])
            return part if found[3] == "attn1" else self.rearranged(part, found[1], found[4], int(found[2]))
        value = self.get(name)
        return value.swapaxes(0, 1) if name.startswith("transformer_blocks.") else value

    def get(self, path, kind="output", slot="0", call=0):
        value = self.trace.get(path, kind, slot, call)
        assert value is not None, f"no {kind} of {path} was recorded"
        return value

    def attention_part(self, path, part):
        if part == "out":
            return self.get(f"{path}/attention")
        if part != "mask":
            return self.get(f"{path}/attention", "input", str("qkv".index(part)))
        X, A, S, _ = self.get(f"{path}/attention", "input", "1").shape
        bias = self.trace.get(f"{path}/attention", "input", "4")
        return np.broadcast_to(np.zeros(1) if bias is None else bias, (X, A, 1, S))  # none is built when all is visible

    def rearranged(self, part_value, path, part, index):
        """Cross-attention as the original records it: queries by sub-sequence, text copied; ours has neither."""
        rule, N = self.spec.block_rule(index), int(np.prod(self.grid))
        if part not in ("q", "out"):
            return np.tile(part_value, (rule.n, 1, 1, 1))
        B, A, _, d = part_value.shape
        pad = np.zeros((B, A, 1, d))
        if part == "out":  # a pad's query is zero: it averages the visible values
            visible = np.exp(self.attention_part(path, "mask").astype(np.float64))
            pad = visible / visible.sum(-1, keepdims=True) @ self.attention_part(path, "v").astype(np.float64)
        padded = np.concatenate([part_value, pad], 2)[:, :, rule.positions(N)]  # position -1 is the last: the pad
        return padded.transpose(2, 0, 1, 3, 4).reshape(rule.n * B, A, -1, d)


def check_case(backend, file, case, spec):
    """Every record, the output, and loss and gradients where the case has them."""
    side, arrays = dit_models.backend(backend), inputs_of(file, case, spec)
    model = dit_models.build(side, spec, salt_of(file, case))
    output, trace = dit_models.run(side, model, dit_models.arguments(side, arrays))
    records = Records(trace, spec, arrays)
    for record in case["records"]:
        check(record, records.value(record[0]))
    check(case["output"], output)


def collides(case) -> bool:
    """Axes share an extent but not a scale."""
    spec = spec_of(case)
    grid = spec.token_grid(*case["inputs"]["latents"][2:])
    return first_filled(grid, spec.rope_scale) != spec.rope_scale


@backends
@pytest.mark.parametrize(("file", "case"), [p for p in CASES if not collides(p.values[1])])
def test_case(backend, file, case):
    check_case(backend, file, case, spec_of(case))


@backends
@pytest.mark.parametrize(("file", "case"), [p for p in CASES if collides(p.values[1])])
def test_case_rope_collision(backend, file, case):
    """Expected difference: the original keeps RoPE tables by extent and forgets the scale, so axes of one extent all
    get the first one's scale. Ours gives each axis its own; given the wrong scales, it reproduces the golden file."""
    spec = spec_of(case)
    t, h, w = first_filled(spec.token_grid(*case["inputs"]["latents"][2:]), spec.rope_scale)
    wrong = dataclasses.replace(spec, interpolation_scale_t=t, interpolation_scale_h=h, interpolation_scale_w=w)
    check_case(backend, file, case, wrong)

    side, arrays = dit_models.backend(backend), inputs_of(file, case, spec)
    model = dit_models.build(side, spec, salt_of(file, case))
    output, trace = dit_models.run(side, model, dit_models.arguments(side, arrays))
    assert errors(case["output"], output)[1] > 10 * SAMPLES
    path = "transformer_blocks.0.attn1"
    q, turned = trace.get(f"{path}.to_q"), trace.get(f"{path}/rotary")
    np.testing.assert_allclose(turned.reshape(q.shape), by_definition(q, spec, arrays), atol=1e-5)


def by_definition(q_BND, spec, arrays):
    """RoPE written out for one token, axis and pair at a time, each axis with its own scale."""
    d, out = spec.attention_head_dim, np.empty_like(q_BND, np.float64)
    third, half = d // 3, d // 6
    for token, place in enumerate(np.ndindex(*spec.token_grid(*arrays[0].shape[2:]))):
        for head in range(spec.num_attention_heads):
            for axis in range(3):
                for j in range(half):
                    angle = place[axis] / spec.rope_scale[axis] * 10000.0 ** (-2 * j / third)
                    u = head * d + axis * third + j
                    v = u + half
                    a, b = q_BND[:, token, u].astype(np.float64), q_BND[:, token, v].astype(np.float64)
                    out[:, token, u] = a * np.cos(angle) - b * np.sin(angle)
                    out[:, token, v] = b * np.cos(angle) + a * np.sin(angle)
    return out


@backends
@pytest.mark.parametrize(("file", "case"), [p for p in CASES if p.values[1].get("grads")])
def test_gradients(backend, file, case):
    side, spec = dit_models.backend(backend), spec_of(case)
    model = dit_models.build(side, spec, salt_of(file, case))
    weight = side.tensor(fill.input_tensor("gradw", tuple(case["output"][1]), salt_of(file, case)))
    arguments = dit_models.arguments(side, inputs_of(file, case, spec))
    loss, latents, gradients = side.gradients(model, arguments, weight)
    assert abs(loss - case["loss_mean_out_times_gradw"]) < 1e-6
    gradients["latents"] = latents
    for record in case["grads"]:
        value = gradients[record[0].removeprefix("d ")]
        scale = record[4] / np.sqrt(value.size)  # gradients of a mean are small: samples count relative to their size
        norm, largest = errors(record, value)
        assert norm <= L2 and largest <= SAMPLES * scale, f"{record[0]}: {norm:.2e}, {largest / scale:.2e}"
