"""WFVAE's configuration: released names and shapes, topology from a checkpoint's keys, values it must refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest

import golden_files
import wfvae_models as vaes
from osp_shared.errors import OspError
from osp_shared.specs.haar import haar_2d, haar_3d
from osp_shared.specs.wfvae import RELEASED, WFVAESpec

KEY_FILES = [pytest.param(golden_files.load(p), id=p.stem) for p in golden_files.files("wfvae", "entries")]
SMALL = WFVAESpec(
    base_channels=8, encoder_energy_flow_hidden_size=4, decoder_energy_flow_hidden_size=12, norm_type="layernorm",
    connect_res_layer_num=2, encoder_num_resblocks=1, decoder_num_resblocks=3,
)  # fmt: skip
DEEP = {
    "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
}


@pytest.mark.parametrize("keys", KEY_FILES)
def test_entries(keys):
    """Names, shapes and kinds in state-dict order, and the number of parameters."""
    spec = WFVAESpec.from_config(keys["config"])
    assert [[n, list(s)] for n, s in spec.parameters().items()] == [entry[:2] for entry in keys["entries"]]
    assert spec.optional() == {name for name, _, kind in keys["entries"] if kind != "param"}
    assert spec.parameter_count == keys["num_parameters_total_incl_frozen"]


@pytest.mark.parametrize("backend", vaes.BACKENDS)
@pytest.mark.parametrize("keys", KEY_FILES)
def test_models_have_the_released_entries(keys, backend):
    """At full size, without allocating a weight."""
    spec = WFVAESpec.from_config(keys["config"])
    if backend == "torch":
        import torch

        from osp_torch.wfvae import WFVAEModel

        with torch.device("meta"):
            model = WFVAEModel(spec)
        entries = model.state_dict()
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {name for name, _, kind in keys["entries"] if kind == "frozen"}
    else:
        import osp_mindspore  # noqa: F401
        from osp_mindspore.wfvae import WFVAEModel

        from mindspore.nn.utils import no_init_parameters

        with no_init_parameters():
            model = WFVAEModel(spec)
        entries = model.parameters_dict()
        assert [p.name for p in entries.values()] == list(entries)
        trained = {p.name for p in model.trainable_params()}
    assert [[n, list(p.shape)] for n, p in entries.items()] == [entry[:2] for entry in keys["entries"]]
    assert trained == {name for name, _, kind in keys["entries"] if kind == "param"}


def test_released_is_not_the_constructor_default():
    assert RELEASED.parameter_count == 147_347_788
    assert RELEASED != WFVAESpec()
    assert WFVAESpec.from_config({"_class_name": "WFVAEModel", "_diffusers_version": "0.30"}) == WFVAESpec()


def test_config_round_trip(tmp_path):
    spec = WFVAESpec(latent_dim=2, scale=(0.5, 2.0), shift=(0, -1), norm_type="layernorm", **DEEP)
    config = spec.to_config()
    assert config["l1_dowmsample_block"] == "Spatial2xTime2x3DDownsample" and config["scale"] == [0.5, 2.0]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert WFVAESpec.from_folder(tmp_path) == spec
    assert spec.stride == (8, 8, 8) and SMALL.stride == (4, 8, 8)


def test_latent_sizes():
    assert [SMALL.latent_size(t, 44, 37) for t in (1, 4, 5, 8, 9)] == [(n, 5, 4) for n in (1, 1, 2, 2, 3)]
    assert SMALL.video_size(24, 80, 80) == (93, 640, 640)
    with pytest.raises(OspError, match="at least 1 frame of 8x8"):
        SMALL.latent_size(1, 7, 64)


def test_scale_and_shift():
    assert RELEASED.scale_and_shift() == ((0.18215,) * 8, (0.0,) * 8)
    with pytest.raises(OspError, match="no scale.*latent_dim is 4"):
        WFVAESpec(latent_dim=4).scale_and_shift()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"norm_type": "batchnorm"}, "norm_type is 'batchnorm', must be groupnorm or layernorm"),
        ({"t_interpolation": "linear"}, "t_interpolation is 'linear'"),
        ({"attention_type": "AttnBlock3D"}, "attention_type"),
        ({"l2_dowmsample_block": "Downsample"}, "l2_dowmsample_block is 'Downsample'"),
        ({"l1_dowmsample_block": "Upsample"}, "l1_dowmsample_block is 'Upsample'"),
        ({"l1_dowmsample_block": "Spatial2xTime2x3DDownsample"}, "all be 2-D .* or all 3-D"),
        ({"base_channels": 48}, "base_channels has 48 channels"),
        ({"encoder_energy_flow_hidden_size": 16}, "encoder.mid .* has 272 channels"),
        ({"decoder_energy_flow_hidden_size": 48}, "decoder.mid .* has 560 channels"),
        ({"scale": [1.0, 2.0]}, "scale is .* latent_dim = 8 numbers"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"latent_dim": 0}, "latent_dim is 0"),
        ({"decoder_num_resblocks": 0}, "decoder_num_resblocks is 0"),
        ({"base_channels": "128"}, "base_channels is '128'"),
        ({"use_attention": 1}, "use_attention is 1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"l1_downsample_block": "Downsample"}, "unknown config keys l1_downsample_block"),
    ],
)
def test_wrong_configs(wrong, message):
    with pytest.raises(OspError, match=message) as caught:
        WFVAESpec.from_config(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, message", [(None, "No such file"), ("{", "not JSON"), ("[]", "JSON object")])
def test_wrong_config_files(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(OspError, match=message):
        WFVAESpec.from_folder(tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {}, {"latent_dim": 4}, {"base_channels": 64}, {"encoder_energy_flow_hidden_size": 128},
        {"decoder_energy_flow_hidden_size": 96}, {"encoder_num_resblocks": 0}, {"decoder_num_resblocks": 1},
        {"connect_res_layer_num": 0}, {"connect_res_layer_num": 1}, {"use_attention": False},
        {"norm_type": "groupnorm"}, DEEP,
    ],
)  # fmt: skip
def test_topology_from_keys(changed):
    """Everything that shapes show is found without a config, and a config that disagrees is told by key and tensor."""
    spec = WFVAESpec.from_config({**RELEASED.to_config(), **changed})
    shapes = spec.parameters()
    assert WFVAESpec.derive(shapes) == spec
    assert WFVAESpec.derive(shapes, spec.to_config()) == spec
    spec.check(shapes)
    for key in changed:
        with pytest.raises(OspError, match="the weights"):
            RELEASED.check(shapes)
        if key in ("latent_dim", "connect_res_layer_num", "norm_type", "use_attention"):
            with pytest.raises(OspError, match=f"config.json says {key} .*see (en|de)coder"):
                WFVAESpec.derive(shapes, RELEASED.to_config())


def test_what_keys_cannot_tell_comes_from_the_config():
    config = {**SMALL.to_config(), "t_interpolation": "nearest", "scale": [0.5] * 8}
    assert WFVAESpec.derive(SMALL.parameters()).t_interpolation == "trilinear"
    assert WFVAESpec.derive(SMALL.parameters(), config) == WFVAESpec.from_config(config)


def test_check_names_the_faults():
    shapes = dict(SMALL.parameters())
    shapes["encoder.conv_out.conv.bias"] = (8,)
    shapes["loss.logvar"] = ()
    for name in [n for n in shapes if n.startswith("decoder.mid.1.")]:  # a norm and four convolutions
        del shapes[name]
    with pytest.raises(OspError) as caught:
        SMALL.check(shapes)
    text = str(caught.value)
    assert "10 missing: decoder.mid.1.norm.norm.weight, " in text and "and 5 more; 1 unexpected: loss.logvar" in text
    assert "encoder.conv_out.conv.bias (8,) instead of (16,)" in text and "\n" not in text
    with pytest.raises(OspError, match="not the weights of a WFVAE"):
        WFVAESpec.derive({"x": (1,)})


@pytest.mark.parametrize("keys", KEY_FILES)
def test_haar_entries_may_be_absent_or_old(keys):
    """EMA checkpoints leave them out; early releases spell two of them `tranform` and have no others."""
    spec = WFVAESpec.from_config(keys["config"])
    old = {f"{a[:-1]}": b for a, b in keys["names_in_earlier_code_(v1.3.0/v1.3.1 tags)"].items()}
    shapes = {}
    for name, shape in spec.parameters().items():
        prefix = next((p for p in old if name.startswith(p)), None)
        if prefix is None:
            shapes[name] = shape
        elif old[prefix] != "(absent)":
            shapes[old[prefix][:-1] + name[len(prefix) :]] = shape
    assert len(shapes) < len(spec.parameters()) and any("tranform" in n for n in shapes)
    spec.check(shapes)
    assert WFVAESpec.derive(shapes) == spec
    assert {spec.legacy_names().get(n, n) for n in shapes} <= set(spec.parameters())
    spec.check({n: s for n, s in shapes.items() if "tranform" not in n})


def test_constants():
    constants = RELEASED.constants()
    assert set(constants) == RELEASED.optional()
    tap = constants["encoder.wavelet_transform_in.g_v_conv.conv.weight"]
    assert tap.dtype == np.float32 and tap.shape == (1, 1, 2, 2, 2)
    # earlier minus later, left minus right, summed over height
    assert np.array_equal(tap[0, 0], np.float32(0.3536) * np.array([[[1, -1]] * 2, [[-1, 1]] * 2], np.float32))
    assert np.array_equal(haar_2d()["ad"], np.float32([[0.5, 0.5], [-0.5, -0.5]]))
    assert list(haar_3d()) == ["h", "g", "hh", "gh", "h_v", "g_v", "hh_v", "gh_v"]
