"""Every form in which the weights are found, and one clear line for everything that is not one of them."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from checkpoint_support import CONFIGS, SPECS, bits, environment, same_state, to_torch, weights
from osp_shared.checkpoints import open_checkpoint, write_safetensors
from osp_shared.checkpoints.names import to_mindspore
from osp_shared.errors import OspError


@pytest.fixture(scope="module")
def vae():
    return weights("wfvae")


def saved(path, obj, **options):
    import torch

    torch.save(obj, path, **options)
    return path


# ------------------------------------------------------------------------------------------------ nested forms


def training_checkpoint(vae, ema_names) -> dict:
    """What the autoencoder's trainer writes; the EMA set holds other values than gen_model."""
    ema = {"module." + n: t for n, t in to_torch({n: vae[n] for n in ema_names}).items()}
    generator = to_torch({n: np.zeros_like(a) for n, a in vae.items()})
    loss = {"logvar": generator["encoder.conv_out.conv.bias"][0]}
    loss |= {f"discriminator.{n}": t for n, t in to_torch(weights("discriminator")).items()}
    loss |= {f"perceptual_loss.{n}": t for n, t in to_torch(weights("lpips")).items()}
    return {"epoch": 1, "state_dict": {"gen_model": generator, "dics_model": loss}, "ema_state_dict": ema}


def test_ema_comes_first(tmp_path, vae):
    path = saved(tmp_path / "c.ckpt", training_checkpoint(vae, list(vae)))
    with environment("NOT_USE_EMA_MODEL", None), open_checkpoint(path) as c:
        same_state(c, vae)
        assert any("EMA" in note for note in c.notes)


@pytest.mark.parametrize("value", ("1", "0", ""))
def test_ema_can_be_declined(tmp_path, vae, value):
    path = saved(tmp_path / "c.ckpt", training_checkpoint(vae, list(vae)))
    with environment("NOT_USE_EMA_MODEL", value), open_checkpoint(path) as c:
        assert all(not c.read(n).view(np.uint8).any() for n in vae)


def test_ema_without_the_frozen_encoder(tmp_path, vae):
    trained = [n for n in vae if n.startswith("decoder.") and "wavelet" not in n]
    path = saved(tmp_path / "c.ckpt", training_checkpoint(vae, trained))
    with environment("NOT_USE_EMA_MODEL", None), open_checkpoint(path) as c:
        assert c.shapes.keys() == vae.keys()
        assert bits(c.read("decoder.conv_out.weight")) == bits(vae["decoder.conv_out.weight"])
        assert not c.read("encoder.conv_out.conv.weight").any()
        assert any(f"{len(vae) - len(trained)} tensors" in note for note in c.notes)


def test_empty_ema_is_ignored(tmp_path, vae):
    obj = {"ema_state_dict": {}, "state_dict": {"gen_model": to_torch(vae)}}
    with open_checkpoint(saved(tmp_path / "c.ckpt", obj)) as c:
        same_state(c, vae)


@pytest.mark.parametrize("kind", ("discriminator", "lpips"))
def test_loss_networks_of_a_training_checkpoint(tmp_path, vae, kind):
    path = saved(tmp_path / "c.ckpt", training_checkpoint(vae, list(vae)))
    with open_checkpoint(path, kind) as c:
        same_state(c, weights(kind))
        c.spec()


@pytest.mark.parametrize("wrap", ("{}", "autoencoder.{}", "network.autoencoder._backbone.{}", "module.{}"))
def test_prefixes(tmp_path, vae, wrap):
    with open_checkpoint(saved(tmp_path / "c.pt", {wrap.format(n): t for n, t in to_torch(vae).items()})) as c:
        same_state(c, vae)


def test_backbone_inside_a_path(tmp_path):
    dit = weights("dit")
    named = {n.replace(".attn1.", ".attn1._backbone."): t for n, t in to_torch(dit).items()}
    with open_checkpoint(saved(tmp_path / "c.pt", named)) as c:
        same_state(c, dit)


def test_two_names_for_one_tensor_are_an_error(tmp_path, vae):
    one = to_torch(vae)
    both = one | {"autoencoder." + n: t for n, t in one.items()}
    with pytest.raises(OspError, match="are both the tensor"):
        open_checkpoint(saved(tmp_path / "c.pt", both))


def test_earlier_haar_spelling(tmp_path, vae):
    old = {
        n.replace("wavelet_transform_l", "wavelet_tranform_l"): a
        for n, a in vae.items()
        if "wavelet_transform_in" not in n and "wavelet_transform_out" not in n
    }
    write_safetensors(tmp_path / "m", old.items())
    with open_checkpoint(tmp_path / "m") as c:
        same_state(c, {n: a for n, a in vae.items() if n in c.shapes})
        assert "encoder.wavelet_transform_l1.aa" in c.shapes
        assert c.spec(SPECS["wfvae"].to_config()) == SPECS["wfvae"]


def test_haar_of_the_earlier_mindspore_port(tmp_path, vae):
    port = {n + ".weight" if n.startswith("decoder.inverse_wavelet_transform_l1.") else n: a for n, a in vae.items()}
    write_safetensors(tmp_path / "m", port.items())
    with open_checkpoint(tmp_path / "m") as c:
        same_state(c, vae)


def test_training_state_of_mindspore_is_left_out(tmp_path, vae):
    extra = {f"adam_m.autoencoder.{n}": a for n, a in vae.items()}
    extra |= {"epoch_num": np.array(3), "loss_scale": np.array(65536.0), "ema.x": np.ones(2), "global_step": np.ones(1)}
    named = {f"autoencoder.{n}": a for n, a in vae.items()} | extra
    write_safetensors(tmp_path / "m", named.items())
    with open_checkpoint(tmp_path / "m") as c:
        same_state(c, vae)
        assert c.notes == [f"left out: {len(extra)} training state"]


# ------------------------------------------------------------------------------------------------ models with quirks


@pytest.mark.parametrize("alias", ("none", "alias", "both"))
def test_t5_embedding_and_decoder(tmp_path, alias):
    t5 = weights("t5")
    named = to_torch(t5)
    if alias == "both":
        named["encoder.embed_tokens.weight"] = named["shared.weight"]
    elif alias == "alias":
        named["encoder.embed_tokens.weight"] = named.pop("shared.weight")
    named |= {"decoder.block.0.layer.0.SelfAttention.q.weight": named["encoder.final_layer_norm.weight"]}
    named |= {"decoder.embed_tokens.weight": next(iter(named.values())), "lm_head.weight": next(iter(named.values()))}
    with open_checkpoint(saved(tmp_path / "pytorch_model.bin", named, _use_new_zipfile_serialization=False)) as c:
        expected = t5 | ({"encoder.embed_tokens.weight": t5["shared.weight"]} if alias == "both" else {})
        same_state(c, expected)
        assert c.notes[-1] == "left out: 3 decoder tensors"
        c.spec()
        assert c.fingerprint() == fingerprint_of(tmp_path / "plain", t5)


def fingerprint_of(folder, arrays) -> str:
    return write_safetensors(folder, arrays.items())


def test_t5_mindspore_names(tmp_path):
    t5 = weights("t5")
    own = to_mindspore(list(t5), "t5")
    assert own["shared.weight"] == "shared.embedding_table"
    assert own["encoder.block.0.layer.0.layer_norm.weight"].endswith("layer_norm.weight")
    write_safetensors(tmp_path / "m", ((own[n], a) for n, a in t5.items()))
    with open_checkpoint(tmp_path / "m") as c:
        same_state(c, t5)


def vgg_layouts():
    lpips = weights("lpips")
    heads = {n: a for n, a in lpips.items() if n.startswith("lin")}
    net = {n.removeprefix("net.slice"): a for n, a in lpips.items() if n.startswith("net.")}
    features = {f"features.{n[2:]}": a for n, a in net.items()}
    first = {"1": 0, "2": 4, "3": 9, "4": 16, "5": 23}

    def local(name: str) -> str:  # indices counted from the slice's first layer
        s, i, leaf = name.split(".")
        return f"net.slice{s}.{int(i) - first[s]}.{leaf}"

    bare = {local(n): a for n, a in net.items() if n.endswith("weight")}
    return lpips, heads, features, {local(n): a for n, a in net.items()}, bare


def test_lpips_layouts(tmp_path):
    lpips, heads, features, local, _ = vgg_layouts()
    plain = {n: a for n, a in lpips.items() if not n.startswith("scaling_layer")}
    # torchvision's VGG-16 (with its classifier) and the LPIPS heads are published as two files.
    vgg = to_torch(features) | {"classifier.0.weight": to_torch(heads)["lin0.model.1.weight"]}
    parts = (
        saved(tmp_path / "vgg16.pth", vgg, _use_new_zipfile_serialization=False),
        saved(tmp_path / "l.pth", to_torch(heads)),
    )
    with open_checkpoint(parts) as c:
        assert c.kind == "lpips"
        same_state(c, plain)
        c.spec()
    write_safetensors(tmp_path / "local", {**local, **heads}.items())
    with open_checkpoint(tmp_path / "local") as c:
        same_state(c, plain)


def test_lpips_without_biases(tmp_path):
    """The MindSpore file: the VGG's convolutions have no biases, so the published network computes with zeros."""
    lpips, heads, _, _, bare = vgg_layouts()
    write_safetensors(tmp_path / "m", {**bare, **heads}.items())
    with open_checkpoint(tmp_path / "m") as c:
        c.spec()
        assert bits(c.read("net.slice3.12.weight")) == bits(lpips["net.slice3.12.weight"])
        assert not c.read("net.slice3.12.bias").any()
        assert any("without biases" in note for note in c.notes)


def test_lpips_heads_alone_do_not_pass(tmp_path):
    _, heads, *_ = vgg_layouts()
    write_safetensors(tmp_path / "m", heads.items())
    with open_checkpoint(tmp_path / "m") as c, pytest.raises(OspError, match="net.slice1.0.weight"):
        c.spec()


def test_llama_config_of_the_library(tmp_path):
    write_safetensors(tmp_path / "m", weights("llama").items(), stem="model")
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIGS["llama"]))
    with open_checkpoint(tmp_path / "m") as c:
        assert c.spec() == SPECS["llama"]


# ------------------------------------------------------------------------------------------------ formats


def test_torch_objects_beside_tensors(tmp_path):
    """Views, transposes, scalars, parameters, every dtype, and the plain values that trainers add."""
    import torch

    base = torch.arange(24, dtype=torch.float32)
    tensors = {
        "t": base.reshape(4, 6).t(), "view": base[3:9], "scalar": torch.tensor(5), "p": torch.nn.Parameter(base[:2]),
        "half": base.half(), "bf16": base.bfloat16(), "double": base.double(), "bool": base > 3, "u8": base.byte(),
        "expanded": torch.ones(3, 1).expand(3, 5), "empty": torch.zeros(0, 3), "f8": base.to(torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64), "i16": base.short(),
    }  # fmt: skip
    odd = {
        "size": torch.Size([1]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "set": {1},
        "b": b"x",
        "n": None,
    }
    for protocol in (2, 3, 4, 5):
        path = saved(
            tmp_path / f"{protocol}.pt", {**tensors, **odd, "nested": [1, (2.5, "x")]}, pickle_protocol=protocol
        )
        with open_checkpoint(path) as c:
            assert c.shapes.keys() == tensors.keys()
            for name, t in tensors.items():
                assert bits(c.read(name))[2] == bits(t.detach())[2], name
                assert b"".join(p.tobytes() for p in c.chunks(name, 16)) == bits(t.detach())[2], name


def test_legacy_views_share_a_storage(tmp_path):
    import torch

    base = torch.arange(100, dtype=torch.float32)
    path = saved(
        tmp_path / "a.pth", {"a": base[:50], "b": base[50:].reshape(5, 10)}, _use_new_zipfile_serialization=False
    )
    with open_checkpoint(path) as c:
        assert c.format == "torch legacy"
        assert c.read("b")[4, 9] == 99 and c.read("a")[49] == 49


def test_mindspore_ckpt_of_mindspore_itself(tmp_path, monkeypatch):
    import osp_mindspore  # noqa: F401

    import mindspore as ms
    from mindspore.train import serialization

    values = {
        "f32": ms.Tensor(np.arange(3000, dtype=np.float32).reshape(30, 100)),
        "bf16": ms.Tensor(np.ones((700, 3)), ms.bfloat16),
        "f16": ms.Tensor(np.ones(7), ms.float16), "scalar": ms.Tensor(3, ms.int64), "bool": ms.Tensor([True, False]),
        "f64": ms.Tensor(np.eye(2)), "u8": ms.Tensor([1, 2], ms.uint8),
    }  # fmt: skip
    for slice_kib, crc in ((512 * 1024, False), (1, False), (1, True)):
        monkeypatch.setattr(serialization, "SLICE_SIZE", slice_kib)
        path = tmp_path / f"{slice_kib}{crc}.ckpt"
        ms.save_checkpoint([{"name": n, "data": t} for n, t in values.items()], str(path), crc_check=crc)
        with open_checkpoint(path) as c:
            assert c.format == "MindSpore ckpt" and c.shapes == {n: tuple(t.shape) for n, t in values.items()}
            assert (len(c.extents["f32"].segments) > 1) == (slice_kib == 1)
            for n, t in values.items():
                expected = t.float().asnumpy() if n == "bf16" else t.asnumpy()
                assert np.array_equal(c.read(n).astype(expected.dtype), expected), n
                assert b"".join(p.tobytes() for p in c.chunks(n, 24)) == c.read(n).tobytes()


def test_format_is_told_by_content(tmp_path):
    """safetensors headers may be of any length, also one whose first byte starts a pickle or a protobuf."""
    for pad in range(300):
        header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(64 + pad)
        path = tmp_path / "weights"
        path.write_bytes(len(header).to_bytes(8, "little") + header + np.float32(pad).tobytes())
        with open_checkpoint(path) as c:
            assert c.read("a")[0] == pad


# ------------------------------------------------------------------------------------------------ errors


def error_of(path) -> str:
    with pytest.raises(OspError) as e:
        open_checkpoint(path)
    message = str(e.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_paths_that_hold_nothing(tmp_path):
    assert "no such file or folder" in error_of(tmp_path / "absent")
    assert "the folder" in error_of(tmp_path / "absent" / "x.safetensors")
    assert "no weights found" in error_of(tmp_path)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"")
    assert "subfolder sub" in error_of(tmp_path)


def test_several_weight_files(tmp_path):
    for name in ("a.ckpt", "b.ckpt"):
        (tmp_path / name).write_bytes(b"x")
    assert "2 weight files (a.ckpt, b.ckpt" in error_of(tmp_path)


@pytest.fixture
def shards(tmp_path):
    write_safetensors(tmp_path / "m", {f"w{k}": np.ones(100, np.float32) for k in range(3)}.items(), 400)
    return tmp_path / "m"


def test_missing_shard(shards):
    gone = sorted(shards.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in error_of(shards) and "is missing" in error_of(shards)


def test_index_of_another_set(shards):
    index = next(shards.glob("*.index.json"))
    names = json.loads(index.read_text())
    names["weight_map"]["w9"] = names["weight_map"]["w0"]
    index.write_text(json.dumps(names))
    assert "tensor w9 is not in" in error_of(shards)
    names["weight_map"] = {"w0": "../../secret.safetensors"}
    index.write_text(json.dumps(names))
    assert "not a plain file name" in error_of(index)


@pytest.mark.parametrize("cut", (0, 4, 300, -1))
def test_cut_off_file(shards, cut):
    file = sorted(shards.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:cut])
    assert file.name in error_of(shards)


def test_file_that_shrinks_while_open(shards):
    with open_checkpoint(shards) as c:
        file = sorted(shards.glob("*.safetensors"))[0]
        with file.open("r+b") as f:
            f.truncate(file.stat().st_size - 40)
        with pytest.raises(OspError, match="ended early"):
            c.read("w0")


@pytest.mark.parametrize("at", (0, 399))
def test_damage_inside_a_tensor_is_noticed(shards, at):
    """One flipped bit: found by the fingerprint that was recorded when the file was written."""
    file = sorted(shards.glob("*.safetensors"))[0]
    data = bytearray(file.read_bytes())
    data[len(data) - 400 + at] ^= 4
    file.write_bytes(data)
    with open_checkpoint(shards) as c:
        with pytest.raises(OspError, match="w0 is not what was written"):
            c.read("w0")
        with pytest.raises(OspError, match="w0 is not what was written"):
            list(c.chunks("w0"))
        c.read("w1")


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "tar"),
        (b"hello, world, this is no checkpoint", "not a format"),
    ],
)
def test_files_that_are_something_else(tmp_path, content, expected):
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    assert expected in error_of(path)


def test_plain_pickle_and_bare_tensor(tmp_path):
    import pickle

    import torch

    (tmp_path / "a.bin").write_bytes(pickle.dumps({"a": 1}, 2))
    assert "torch.save" in error_of(tmp_path / "a.bin")
    assert "one bare tensor" in error_of(saved(tmp_path / "b.bin", torch.ones(3)))
    assert "no state dict" in error_of(saved(tmp_path / "c.bin", {"epoch": 3, "args": {"lr": 1.0}}))


def test_missing_unexpected_and_other_shapes_are_named(tmp_path, vae):
    arrays = dict(vae)
    del arrays["encoder.conv_out.conv.bias"]
    arrays["encoder.extra"] = np.ones(3, np.float32)
    arrays["decoder.norm_out.norm.bias"] = np.ones(9, np.float32)
    write_safetensors(tmp_path / "m", arrays.items())
    with open_checkpoint(tmp_path / "m") as c, pytest.raises(OspError) as e:
        c.spec(SPECS["wfvae"].to_config())
    for part in ("1 missing: encoder.conv_out.conv.bias", "1 unexpected: encoder.extra", "decoder.norm_out.norm.bias"):
        assert part in str(e.value)


def test_config_that_contradicts_the_weights(tmp_path, vae):
    write_safetensors(tmp_path / "m", vae.items())
    (tmp_path / "m" / "config.json").write_text(json.dumps(SPECS["wfvae"].to_config() | {"connect_res_layer_num": 1}))
    with open_checkpoint(tmp_path / "m") as c, pytest.raises(OspError, match="connect_res_layer_num 1, the weights 2"):
        c.spec()


def test_ema_config_of_the_trainer(tmp_path):
    """The trainer writes the average's bookkeeping into the config of `model_ema/`."""
    write_safetensors(tmp_path / "m", weights("dit").items())
    ema = {"decay": 0.9999, "min_decay": 0.0, "optimization_step": 5, "update_after_step": 0, "use_ema_warmup": False}
    text = json.dumps(SPECS["dit"].to_config() | ema | {"inv_gamma": 1.0, "power": 2 / 3})
    (tmp_path / "m" / "config.json").write_text(text)
    with open_checkpoint(tmp_path / "m") as c:
        assert c.spec() == SPECS["dit"]


def test_reading_needs_no_framework(tmp_path):
    """The whole package in a process where torch and MindSpore cannot be imported."""
    import subprocess
    import sys

    write_safetensors(tmp_path / "m", weights("discriminator").items())
    code = (
        "import sys; sys.modules.update(torch=None, mindspore=None, safetensors=None)\n"
        "from osp_shared.checkpoints import open_checkpoint, convert\n"
        f"c = open_checkpoint({str(tmp_path / 'm')!r}); convert(c, {str(tmp_path / 'o.ckpt')!r})\n"
        f"print(open_checkpoint({str(tmp_path / 'o.ckpt')!r}).fingerprint() == c.fingerprint())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.stdout.strip() == "True", found.stderr


def test_folder_prefers_safetensors(tmp_path, vae):
    folder = tmp_path / "vae"
    write_safetensors(folder, vae.items())
    saved(folder / "merged.ckpt", {n: t * 0 for n, t in to_torch(vae).items()})
    with open_checkpoint(folder) as c:
        assert c.format == "safetensors"
    shutil.rmtree(folder)
