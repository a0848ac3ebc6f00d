"""The commands: every spelling that users know, every kind of target, interruption, disk space, whole releases."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest

from checkpoint_support import KINDS, SPECS, bits, config, osp, same_state, snapshot, to_torch, weights
from osp_shared.checkpoints import Options, convert, open_checkpoint, write_safetensors
from osp_shared.errors import OspError


def save_release(root, dtype="fp32"):
    """A download folder like LanguageBind/Open-Sora-Plan-v1.3.0, tiny."""
    import torch

    for folder, kind in (("any93x640x640", "dit"), ("any93x640x640_i2v", "inpaint")):
        write_safetensors(root / folder, weights(kind, dtype).items(), 3000)
        (root / folder / "config.json").write_text(json.dumps(config(kind)))
    write_safetensors(root / "prompt_refiner", weights("llama", dtype).items(), 300, stem="model")
    (root / "prompt_refiner" / "config.json").write_text(json.dumps(config("llama")))
    (root / "prompt_refiner" / "tokenizer.json").write_text("{}")
    (root / "vae").mkdir()
    (root / "vae" / "config.json").write_text(json.dumps(config("wfvae")))
    torch.save({"state_dict": {"gen_model": to_torch(weights("wfvae", dtype))}}, root / "vae" / "merged.ckpt")
    (root / "README.md").write_text("card")
    return root


@pytest.fixture
def vae_folder(tmp_path):
    import torch

    folder = tmp_path / "vae"
    folder.mkdir()
    torch.save({"ema_state_dict": to_torch(weights("wfvae"))}, folder / "merged.ckpt")
    (folder / "config.json").write_text(json.dumps(config("wfvae")))
    return folder


# ------------------------------------------------------------------------------------------------ commands


def test_convert_wfvae_as_the_readme_types_it(vae_folder):
    src, target = vae_folder / "merged.ckpt", vae_folder / "diffusion_pytorch_model.safetensors"
    command = ("convert", "wfvae", "--src", src, "--target", target, "--config", vae_folder / "config.json")
    status, out, err = osp(*command)
    assert status == 0, err
    assert "fingerprint" in out and "EMA weights" in out
    with open_checkpoint(vae_folder) as c:  # the folder is now read from the safetensors file
        assert c.format == "safetensors"
        same_state(c, weights("wfvae"))
    assert "nothing to do" in osp(*command)[1]
    from safetensors import safe_open

    with safe_open(target, "pt") as f:
        assert f.metadata()["format"] == "pt"


def test_convert_torch_bin_as_the_readme_types_it(tmp_path):
    import torch

    named = to_torch(weights("t5")) | {
        "decoder.final_layer_norm.weight": torch.ones(8),
        "lm_head.weight": torch.ones(2),
    }
    torch.save(named, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "config.json").write_text(json.dumps(config("t5")))
    target = tmp_path / "model.safetensors"
    command = ("convert", "torch-bin", "--src", tmp_path / "pytorch_model.bin", "--target", target)
    status, out, err = osp(*command, "--config", tmp_path / "config.json")
    assert status == 0, err
    with open_checkpoint(target) as c:
        same_state(c, weights("t5"))
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(**config("t5")))
    from safetensors.torch import load_file

    missing, unexpected = model.load_state_dict(load_file(target), strict=False)
    assert missing == ["encoder.embed_tokens.weight"] and not unexpected  # the library ties the alias itself


def test_torch_bin_of_an_unknown_model(tmp_path):
    import torch

    torch.save({"module.LayerNorm.gamma": torch.ones(3), "b": torch.zeros(2, 2)}, tmp_path / "a.bin")
    status, _, err = osp("convert", "--src", tmp_path / "a.bin", "--target", tmp_path / "o.safetensors")
    assert status == 2 and "not a known model" in err
    status, _, err = osp("convert", "torch-bin", "--src", tmp_path / "a.bin", "--target", tmp_path / "o.safetensors")
    assert status == 0, err
    with open_checkpoint(tmp_path / "o.safetensors") as c:
        assert set(c.shapes) == {"module.LayerNorm.gamma", "b"}


def test_merge_as_the_readme_types_it(tmp_path):
    root = save_release(tmp_path / "r")
    folder = root / "any93x640x640"
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    status, _, err = osp("merge", "-i", folder, "-o", root / "diffusion_pytorch_model.safetensors", "-f", index)
    assert status == 0, err
    with open_checkpoint(root / "diffusion_pytorch_model.safetensors") as c:
        same_state(c, weights("dit"))
        assert c.config == config("dit") and c.spec() == SPECS["dit"]  # the config travels in the file
    status, _, err = osp("merge", "--input_folder", folder, "--output_file", root / "x.bin")
    assert status == 2 and ".safetensors" in err


@pytest.mark.parametrize("kind", KINDS)
def test_inspect_tells_what_it_is(tmp_path, kind):
    write_safetensors(tmp_path / "m", weights(kind, "bf16").items())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config(kind)))
    status, out, err = osp("inspect", tmp_path / "m", "--json")
    found = json.loads(out)
    assert status == 0, err
    assert found["kind"] == kind and found["problem"] is None and found["recorded"]
    assert found["parameters"] == SPECS[kind].parameter_count
    assert found["nbytes"] == sum(a.nbytes for a in weights(kind, "bf16").values())
    assert (
        found["topology"].items()
        >= {k: v for k, v in config(kind).items() if k in ("num_layers", "ndf", "d_ff")}.items()
    )
    status, out, _ = osp("inspect", tmp_path / "m", "--tensors", "--verify")
    assert status == 0 and found["fingerprint"] in out and "BF16" in out and "verified" in out


def test_inspect_says_what_is_wrong(tmp_path):
    arrays = weights("dit")
    arrays.pop("proj_out.bias")
    write_safetensors(tmp_path / "m", arrays.items())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config("dit")))
    status, out, _ = osp("inspect", tmp_path / "m")
    assert status == 1 and "1 missing: proj_out.bias" in out


def test_another_model_than_asked_for(vae_folder, tmp_path):
    status, _, err = osp("convert", "dit", "--src", vae_folder, "--target", tmp_path / "o")
    assert status == 2 and "holds WFVAE video autoencoder, not text-to-video" in err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("--dtype", "int8"), "choose fp32, fp16, bf16"),
        (("--shard_size", "many"), "give a size such as 5GB"),
        (("--config", "nowhere/config.json"), "config.json: no such file"),
        (("--config", "model.json"), "names a config.json"),
    ],
)
def test_bad_arguments(vae_folder, tmp_path, arguments, expected):
    status, _, err = osp("convert", "--src", vae_folder, "--target", tmp_path / "o", *arguments)
    assert status == 2 and expected in err and err.count("\n") == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("target", ("o.bin", "o.pt", "vae/merged.ckpt"))
def test_targets_that_are_refused(vae_folder, tmp_path, target):
    before = snapshot(tmp_path)
    assert osp("convert", "--src", vae_folder, "--target", tmp_path / target)[0] == 2
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------------------ casts and layouts


@pytest.mark.parametrize("to", ("fp16", "bf16", "fp64"))
def test_casts_round_once_and_leave_integers(tmp_path, to):
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s).astype(np.float32) for n, s in SPECS["discriminator"].parameters().items()}
    arrays |= {n: np.array(5, np.int64) for n in arrays if n.endswith("num_batches_tracked")}
    write_safetensors(tmp_path / "m", arrays.items())
    status, _, err = osp(
        "convert", "--src", tmp_path / "m", "--target", tmp_path / "o", "--dtype", to, "--shard_size", "1KB"
    )
    assert status == 0, err
    kind = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp64": np.float64}[to]
    expected = {n: a.astype(kind) if a.dtype == np.float32 else a for n, a in arrays.items()}
    with open_checkpoint(tmp_path / "o") as c:
        same_state(c, expected)


def test_cast_across_chunk_borders(tmp_path):
    """A tensor of several chunks, in both directions, so that pieces are split and joined."""
    array = np.random.default_rng(1).standard_normal(5_000_003).astype(np.float32)
    write_safetensors(tmp_path / "m", [("x", array)])
    for to, kind in (("F16", np.float16), ("F64", np.float64)):
        with open_checkpoint(tmp_path / "m") as c:
            convert(c, tmp_path / f"{to}.safetensors", Options(dtype=to), unknown=True)
        with open_checkpoint(tmp_path / f"{to}.safetensors") as c:
            assert bits(c.read("x")) == bits(array.astype(kind))
            assert c.fingerprint(recompute=True) == c.fingerprint()


def test_fp16_overflow_is_an_error(tmp_path):
    write_safetensors(tmp_path / "m", [("x", np.array([1.0, 7e4], np.float32))])
    with open_checkpoint(tmp_path / "m") as c, pytest.raises(OspError, match="x has values beyond fp16"):
        convert(c, tmp_path / "o", Options(dtype="F16"), unknown=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m"]


def test_big_tensor_becomes_mindspore_slices(tmp_path, monkeypatch):
    """Slices as MindSpore makes them, read by MindSpore itself."""
    import osp_mindspore  # noqa: F401
    from osp_shared.checkpoints import write_ckpt

    import mindspore as ms

    monkeypatch.setattr(write_ckpt, "_SLICE", 8 << 20)
    array = np.random.default_rng(1).standard_normal((3, 1_700_001)).astype(np.float32)
    write_safetensors(tmp_path / "m", [("x", array)])
    with open_checkpoint(tmp_path / "m") as c:
        convert(c, tmp_path / "o.ckpt", Options("mindspore"), unknown=True)
    assert np.array_equal(ms.load_checkpoint(str(tmp_path / "o.ckpt"))["x"].asnumpy(), array)
    with open_checkpoint(tmp_path / "o.ckpt") as c:
        assert len(c.extents["x"].segments) == 3 and np.array_equal(c.read("x"), array)


def test_converting_in_place_keeps_what_is_there(vae_folder):
    (vae_folder / "notes").mkdir()
    (vae_folder / "notes" / "a.txt").write_text("mine")
    status, _, err = osp("convert", "--src", vae_folder, "--target", vae_folder, "--dtype", "bf16")
    assert status == 0, err
    names = sorted(snapshot(vae_folder))
    assert names == ["config.json", "diffusion_pytorch_model.safetensors", "merged.ckpt", "notes/a.txt"]


def test_overwriting_has_to_be_said(vae_folder, tmp_path):
    command = ("convert", "--src", vae_folder, "--target", tmp_path / "o")
    assert osp(*command)[0] == 0
    status, _, err = osp(*command, "--dtype", "bf16")
    assert status == 2 and "--overwrite" in err
    assert osp(*command, "--dtype", "bf16", "--overwrite", "--shard_size", "1KB")[0] == 0
    with open_checkpoint(tmp_path / "o") as c:
        assert set(c.dtypes.values()) == {"BF16"}
    assert not (tmp_path / "o" / "diffusion_pytorch_model.safetensors").exists()  # the shards took its place


# ------------------------------------------------------------------------------------------------ releases


@pytest.mark.parametrize("to", ("torch", "mindspore"))
def test_a_whole_release_in_one_call(tmp_path, to):
    root, target = save_release(tmp_path / "Open-Sora-Plan-v1.3.0"), tmp_path / "out"
    before = snapshot(root)
    status, out, err = osp("convert", "release", "--src", root, "--target", target, "--to", to)
    assert status == 0, err
    for folder, kind in {
        "any93x640x640": "dit",
        "any93x640x640_i2v": "inpaint",
        "prompt_refiner": "llama",
        "vae": "wfvae",
    }.items():
        with open_checkpoint(target / folder) as c:
            same_state(c, weights(kind))
            assert c.spec().parameters() == SPECS[kind].parameters()
            assert c.fingerprint() in out
    assert (target / "prompt_refiner" / "tokenizer.json").exists() and (target / "README.md").read_text() == "card"
    assert snapshot(root) == before
    assert osp("convert", "release", "--src", root, "--target", target, "--to", to)[1].count("nothing to do") == 4


def test_release_is_checked_before_anything_is_written(tmp_path):
    root = save_release(tmp_path / "r")
    (root / "vae" / "config.json").write_text(json.dumps(config("wfvae") | {"latent_dim": 7}))
    status, _, err = osp("convert", "release", "--src", root, "--target", tmp_path / "out")
    assert status == 2 and "latent_dim" in err
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ image to video


def test_i2v_starts_from_t2v(tmp_path):
    arrays = weights("dit", "bf16")
    write_safetensors(tmp_path / "t2v", arrays.items())
    (tmp_path / "t2v" / "config.json").write_text(json.dumps(config("dit")))
    for target in ("a", "b"):
        status, _, err = osp("convert", "i2v", "--src", tmp_path / "t2v", "--target", tmp_path / target)
        assert status == 0, err
    with open_checkpoint(tmp_path / "a") as c, open_checkpoint(tmp_path / "b") as again:
        assert c.kind == "inpaint" and c.spec() == SPECS["inpaint"]
        assert c.fingerprint() == again.fingerprint()
        for name, array in arrays.items():
            assert bits(c.read(name)) == bits(array)
        for leaf in ("weight", "bias"):
            copied = c.read(f"pos_embed_masked_hidden_states.0.proj.{leaf}")
            assert bits(copied) == bits(arrays[f"pos_embed.proj.{leaf}"])
        for stem in ("pos_embed_masked_hidden_states", "pos_embed_mask"):
            assert not c.read(f"{stem}.1.weight").view(np.uint8).any()
        mask = c.read("pos_embed_mask.0.proj.weight").astype(np.float32)
        bound = 1 / math.sqrt(4 * 2 * 2)
        assert mask.std() > 0.8 * bound / math.sqrt(3) and np.abs(mask).max() <= bound
    status, _, err = osp("convert", "i2v", "--src", tmp_path / "a", "--target", tmp_path / "c")
    assert status == 2 and "starts from a text-to-video" in err
