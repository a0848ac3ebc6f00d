"""Both backends load the original downloads as they are, and what any conversion made of them, to the same outputs."""

from __future__ import annotations

import importlib
import json

import numpy as np
import pytest

from checkpoint_support import SPECS, config, to_torch
from osp_shared import fill
from osp_shared.checkpoints import Options, convert, open_checkpoint
from osp_shared.errors import OspError

LOADERS = {"wfvae": "load_vae", "dit": "load_dit", "inpaint": "load_dit", "t5": "load_text_encoder"}
BACKENDS = ("osp_torch", "osp_mindspore")


def outputs(model, kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)

    def noise(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    if kind == "wfvae":
        return model.encode(noise(1, 3, 5, 16, 16))
    if kind == "t5":
        return model(np.array([[3, 1, 4, 1, 5]]), np.array([[1, 1, 1, 1, 0]]))
    text, mask = noise(1, 1, 4, 10), np.ones((1, 1, 4), np.float32)
    return model(noise(1, SPECS[kind].input_channels, 1, 4, 4), np.array([500]), text, mask)


@pytest.fixture(scope="module", params=tuple(LOADERS))
def forms(request, tmp_path_factory):
    """The kind, its download, and conversions of it into every format."""
    import torch

    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    arrays = {n: fill.parameter(n, s) for n, s in SPECS[kind].parameters().items()}
    if kind == "wfvae":
        arrays |= SPECS[kind].constants()
        names = {n: t for n, t in to_torch(arrays).items() if "wavelet" not in n}  # an EMA set has no constants
        obj = {"ema_state_dict": {"module." + n: t for n, t in names.items()}, "state_dict": {"gen_model": {}}}
    else:
        obj = to_torch(arrays)
    if kind == "t5":
        obj |= {"encoder.embed_tokens.weight": obj["shared.weight"], "decoder.block.0.x.weight": torch.ones(3)}
    original = folder / "original"
    original.mkdir()
    name = {"wfvae": "merged.ckpt", "t5": "pytorch_model.bin"}.get(kind, "model.pt")
    torch.save(obj, original / name, _use_new_zipfile_serialization=kind != "t5")
    (original / "config.json").write_text(json.dumps(config(kind)))
    made = [original]
    for target, options in {
        "folder": Options(), "shards": Options(shard_bytes=2000),
        "m.ckpt": Options("mindspore"), "ms": Options("mindspore"),
    }.items():  # fmt: skip
        with open_checkpoint(original) as c:
            made.append(convert(c, folder / target, options).target)
    return kind, made


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_form_gives_the_same_outputs(forms, backend):
    kind, (original, *others) = forms
    load = getattr(importlib.import_module(f"{backend}.backend"), LOADERS[kind])
    expected = outputs(load(original), kind)
    assert np.isfinite(expected).all() and expected.std() > 0
    for path in others:
        assert np.array_equal(outputs(load(path), kind), expected), path.name


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_backends_check_the_fingerprints(forms, backend, tmp_path):
    """One bit of one tensor, in a file that a conversion wrote: loading it is an error that names the tensor."""
    kind, made = forms
    file = next(made[1].glob("*.safetensors"))
    with open_checkpoint(file) as c:
        name = next(n for n in c.shapes if len(c.shapes[n]) == 2 or "conv_out" in n)
        segment = c.extents[name].segments[0]
    data = bytearray(file.read_bytes())
    data[segment.offset + 2] ^= 1
    (tmp_path / "config.json").write_text(json.dumps(config(kind)))
    (tmp_path / file.name).write_bytes(data)
    load = getattr(importlib.import_module(f"{backend}.backend"), LOADERS[kind])
    with pytest.raises(OspError, match=f"{name} is not what was written"):
        load(tmp_path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_another_model_is_named(forms, backend):
    kind, (original, *_) = forms
    wrong = "load_text_encoder" if kind != "t5" else "load_vae"
    load = getattr(importlib.import_module(f"{backend}.backend"), wrong)
    with pytest.raises(OspError, match="not the weights of") as e:
        load(original)
    assert "\n" not in str(e.value)
