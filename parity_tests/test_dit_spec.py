"""The transformer's spec: released names and shapes, models built from it, topology from keys, impossible values."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import dit_models
import golden_files
from osp_shared import fill
from osp_shared.errors import OspError
from osp_shared.specs import dit
from osp_shared.specs.dit import RANDOM, RELEASED, RELEASED_INPAINT, VARIANTS, ZEROS, DiTSpec, InpaintSpec, t2v_to_i2v


def key_files():
    """(golden key list, spec) of each released configuration."""
    for area in ("dit", "inpaint"):
        for path in golden_files.files(area, "keys"):
            released = golden_files.load(path)
            spec = VARIANTS[released["header"]["class"] + "-2B/122"]
            yield pytest.param(released, spec, id=path.stem)


full_size = pytest.mark.parametrize(("released", "spec"), list(key_files()))


@full_size
def test_full_size_entries(released, spec):
    """Without a framework: exactly the released names and shapes, in the released order."""
    assert list(spec.parameters().items()) == [(n, tuple(s)) for n, s in released["keys"].items()]
    assert spec.parameter_count == released["header"]["num_parameters"]
    assert spec.class_name() == released["header"]["class"]


@full_size
def test_full_size_torch_model(released, spec):
    import torch

    from osp_torch.dit.model import model_class

    with torch.device("meta"):
        state = model_class(spec)(spec).state_dict()
    assert [(n, tuple(t.shape)) for n, t in state.items()] == list(spec.parameters().items())


@full_size
def test_full_size_mindspore_model(released, spec):
    from osp_mindspore.dit.model import model_class

    from mindspore.nn.utils import no_init_parameters

    with no_init_parameters():
        found = model_class(spec)(spec).parameters_dict()
    assert [(n, tuple(p.shape)) for n, p in found.items()] == list(spec.parameters().items())
    assert all(p.has_init for p in found.values()), "a weight was allocated"


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_bias": False}, {"norm_elementwise_affine": True}, {"activation_fn": "geglu"}, {"out_channels": 4},
     {"sparse1d": False}, {"patch_size": 1}],
)  # fmt: skip
@pytest.mark.parametrize("inpaint", [False, True])
def test_models_have_the_spec_entries(changes, inpaint):
    spec = dit_models.tiny(inpaint, **changes)
    for name in dit_models.BACKENDS:
        side = dit_models.backend(name)
        model = dit_models.build(side, spec)
        state = model.state_dict() if name == "torch" else model.parameters_dict()
        assert [(n, tuple(t.shape)) for n, t in state.items()] == list(spec.parameters().items())


def test_variants():
    assert VARIANTS["OpenSoraT2V_v1_3-2B/122"] is RELEASED
    assert VARIANTS["OpenSoraInpaint_v1_3-2B/122"] is RELEASED_INPAINT
    assert dit.variant("OpenSoraT2V_v1_3-2B/122", num_layers=3).num_layers == 3
    with pytest.raises(OspError, match="no model 'x'.*OpenSoraT2V_v1_3-2B/122"):
        dit.variant("x")
    with pytest.raises(OspError, match="unknown config keys skip_connection"):
        dit.variant("OpenSoraT2V_v1_3-2B/122", skip_connection=True)


def test_constructor_defaults():
    """The original constructor's, which are not the release's."""
    spec = DiTSpec(in_channels=8, patch_size=2, patch_size_t=1, caption_channels=4, attention_head_dim=6)
    assert (spec.num_attention_heads, spec.num_layers, spec.sparse_n, spec.sparse1d) == (16, 1, 2, False)
    assert (spec.activation_fn, spec.norm_eps, spec.attention_bias, spec.out_channels) == ("geglu", 1e-6, True, 8)
    assert {f.name: f.default for f in dataclasses.fields(DiTSpec)}["attention_head_dim"] == 88


def test_block_rules_are_absolute():
    rules = [RELEASED.block_rule(i) for i in range(32)]
    assert [r.n for r in rules] == [1, 1] + [4] * 28 + [1, 1]
    assert [r.group for r in rules[2:30]] == [False, True] * 14
    assert {dit_models.tiny(num_layers=6).block_rule(5).n, dit_models.tiny(sparse1d=False).block_rule(5).n} == {4, 1}


@pytest.mark.parametrize("inpaint", [False, True])
def test_config_round_trip(inpaint):
    spec = dit_models.tiny(inpaint, sample_size_h=[8, 10], sample_size_t=3)  # training writes a pair for each
    config = json.loads(json.dumps(spec.to_config()))
    assert config["sample_size_h"] == [8, 10] and config["_class_name"] == spec.class_name()
    again = DiTSpec.from_config({**config, "_diffusers_version": "0.30.3"})
    assert type(again) is type(spec) and again.to_config() == config


def test_topology_from_keys():
    for spec in (RELEASED, RELEASED_INPAINT):
        assert DiTSpec.derive(spec.parameters()) == spec
    spec = dit_models.tiny(True, activation_fn="swiglu", attention_bias=False, out_channels=4, vae_scale_factor_t=8)
    assert DiTSpec.derive(spec.parameters(), spec.to_config()) == spec
    with pytest.raises(OspError, match="do not tell heads in a width of 48"):
        DiTSpec.derive(dit_models.tiny().parameters())
    with pytest.raises(OspError, match="not the weights of a v1.3 transformer: no tensor scale_shift_table"):
        DiTSpec.derive({"a": (1, 2)})
    with pytest.raises(OspError, match="not the weights of OpenSoraInpaint_v1_3: no tensor pos_embed_mask.0"):
        InpaintSpec.derive(RELEASED.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": 4}, r"num_layers 4, the weights 5: see transformer_blocks\.4"),
        ({"in_channels": 4}, r"in_channels 4, the weights 8: see pos_embed\.proj\.weight"),
        ({"out_channels": 2}, r"out_channels 2, the weights 8: see proj_out\.weight"),
        ({"caption_channels": 64}, r"caption_channels 64, the weights 32: see caption_projection"),
        ({"num_attention_heads": 2}, r"num_attention_heads \* attention_head_dim 24, the weights 48: see scale_shift"),
        ({"activation_fn": "geglu"}, r"activation_fn 'geglu', gated: True, the weights False: see .*ff\.net\.0\.proj"),
        ({"attention_bias": False}, r"attention_bias False, the weights True: see .*attn1\.to_q\.bias"),
        ({"norm_elementwise_affine": True}, r"norm_elementwise_affine True, the weights False: see .*norm1\.weight"),
        ({"_class_name": "OpenSoraInpaint_v1_3"}, r"_class_name 'OpenSoraInpaint_v1_3', the weights 'OpenSoraT2V"),
    ],
)
def test_config_that_contradicts_the_weights(changes, message):
    spec = dit_models.tiny()
    with pytest.raises(OspError, match=message):
        DiTSpec.derive(spec.parameters(), {**spec.to_config(), **changes})


def test_check_names_what_is_wrong():
    spec = dit_models.tiny()
    shapes = dict(spec.parameters())
    spec.check(shapes)
    del shapes["proj_out.bias"]
    shapes["extra"], shapes["proj_out.weight"] = (3,), (1, 1)
    with pytest.raises(OspError, match=r"1 missing: proj_out\.bias; 1 unexpected: extra; 1 of another shape: proj_out"):
        spec.check(shapes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size_t": 2}, "patch_size_t is 2, must be 1"),
        ({"attention_head_dim": 10}, "attention_head_dim is 10, must be a multiple of 6"),
        ({"cross_attention_dim": 40}, "cross_attention_dim is 40, must equal .* 48"),
        ({"activation_fn": "relu"}, "activation_fn is 'relu', must be one of gelu, gelu-approximate"),
        ({"in_channels": None}, "in_channels is None, must be an integer"),
        ({"sparse_n": 0}, "sparse_n is 0, must be an integer of at least 1"),
        ({"double_self_attention": True}, "double_self_attention must be false"),
        ({"interpolation_scale_w": 0.0}, "interpolation_scale_w must be positive"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(OspError, match=message):
        dit_models.tiny(**changes)


def test_unknown_keys():
    with pytest.raises(OspError, match="unknown config keys sparse_m"):
        DiTSpec.from_config({**dit_models.TINY, "sparse_m": 3})
    with pytest.raises(OspError, match="_class_name is 'Latte'"):
        DiTSpec.from_config({**dit_models.TINY, "_class_name": "Latte"})


@pytest.mark.parametrize("name", dit_models.BACKENDS)
def test_inputs_that_do_not_fit(name):
    side, spec = dit_models.backend(name), dit_models.tiny(num_layers=1)
    model = dit_models.build(side, spec)
    good = list(dit_models.inputs(spec, (2, 4, 4), video_box=[(2, 4, 4)] * 2, text_lens=[3, 7]))
    for place, value, message in (
        (0, good[0][:, :4], r"latents \(batch, 8, frames, height, width\), not \(2, 4, 2, 4, 4\)"),
        (0, good[0][..., :1], r"at least 1 frame of 2x2 is needed"),
        (2, good[2][..., :5], r"text \(2, 1, tokens, 32\)"),
        (3, good[3][:, :1], r"video mask of shape \(2, 1, 4, 4\), must be \(2, 2, 4, 4\)"),
        (4, good[4][:, 0], r"text mask of shape \(2, 7\), must be \(2, 1, 7\)"),
    ):
        arrays = [*good[:place], value.copy(), *good[place + 1 :]]
        with pytest.raises(OspError, match=message):
            side.call(model, *dit_models.arguments(side, arrays))


def test_i2v_starts_as_t2v():
    """Every inpaint entry has a source of its shape, and with the rule's weights the model equals the T2V model."""
    t2v, i2v = dit_models.tiny(), dit_models.tiny(True)
    for name, shape in i2v.parameters().items():
        source = t2v_to_i2v(name)
        assert source in (ZEROS, RANDOM) or t2v.parameters()[source] == shape, name
    assert t2v_to_i2v("pos_embed_masked_hidden_states.0.proj.bias") == "pos_embed.proj.bias"

    def read(name):
        source, shape = t2v_to_i2v(name), i2v.parameters()[name]
        if source == ZEROS:
            return np.zeros(shape, np.float32)
        return fill.parameter(name if source == RANDOM else source, shape)

    for backend in dit_models.BACKENDS:
        side = dit_models.backend(backend)
        arrays = dit_models.inputs(i2v, (2, 4, 6))
        model = side.checkpoint.build(side.model.InpaintDiT, i2v, read)
        output = side.call(model, *dit_models.arguments(side, arrays))
        noisy = (arrays[0][:, :8].copy(), *arrays[1:])
        plain = side.call(dit_models.build(side, t2v), *dit_models.arguments(side, noisy))
        assert np.array_equal(side.numpy(output), side.numpy(plain))
        fresh = side.model.InpaintDiT(i2v)
        assert not side.numpy(fresh.pos_embed_mask[1].weight).any()
