"""torch -> file -> MindSpore -> file -> torch: every bit of every tensor comes back, whatever lies in between."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import golden_files
from checkpoint_support import KINDS, SPECS, bits, config, same_bits, same_state, to_torch, weights
from osp_shared.checkpoints import Options, convert, fingerprint, open_checkpoint, write_safetensors
from osp_shared.checkpoints.names import to_mindspore
from osp_shared.specs.auxiliary import DiscriminatorSpec, LPIPSSpec

PREFIXES = ("", "module.", "network.", "autoencoder.", "module.network.", "_orig_mod.")
SOURCES = ("zip", "legacy", "safetensors", "state_dict", "ema", "sharded bin")


@pytest.fixture(scope="module", autouse=True)
def frameworks():
    """Imported before hypothesis looks at the recursion limit, which MindSpore raises."""
    import osp_mindspore  # noqa: F401


def save_torch(folder: Path, tensors: dict, form: str, prefix: str) -> Path:
    """A torch checkpoint in one of the forms that are published; returns the path to give to a reader."""
    import torch
    from safetensors.torch import save_file

    named = {prefix + name: t for name, t in tensors.items()}
    path = folder / ("a.safetensors" if form == "safetensors" else "a.ckpt")
    if form == "safetensors":
        save_file(named, path, metadata={"format": "pt"})
    elif form == "sharded bin":
        halves = list(named)[::2], list(named)[1::2]
        files = [f"pytorch_model-0000{k}-of-00002.bin" for k in (1, 2)]
        for file, half in zip(files, halves, strict=True):
            torch.save({name: named[name] for name in half}, folder / file)
        where = {name: file for file, half in zip(files, halves, strict=True) for name in half}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
        return folder
    else:
        nested = {
            "state_dict": {"state_dict": named, "epoch": 3},
            "ema": {"ema_state_dict": {"module." + n: t for n, t in named.items()}, "state_dict": {"gen_model": {}}},
        }.get(form, named)
        torch.save(nested, path, _use_new_zipfile_serialization=form != "legacy")
    return path


def through_mindspore(path: Path, folder: Path) -> Path:
    """Load with MindSpore itself, and save again with MindSpore itself, in the other of its two formats."""
    import mindspore as ms

    form = path.suffix[1:]
    loaded = ms.load_checkpoint(str(path), format=form)
    other = folder / ("ms.safetensors" if form == "ckpt" else "ms.ckpt")
    ms.save_checkpoint([{"name": n, "data": v} for n, v in loaded.items()], str(other), format=other.suffix[1:])
    return other


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_torch_to_mindspore_to_torch(kind, data):
    from safetensors.torch import load_file

    dtype = data.draw(st.sampled_from(("fp32", "fp16", "bf16")), "dtype")
    form, prefix = data.draw(st.sampled_from(SOURCES), "form"), data.draw(st.sampled_from(PREFIXES), "prefix")
    middle = data.draw(st.sampled_from(("m.ckpt", "m.safetensors")), "MindSpore format")
    shard = data.draw(st.integers(1, 4000) | st.just(5 << 30), "shard size")
    arrays = weights(kind, dtype, str(shard))
    folder = Path(tempfile.mkdtemp())
    try:
        with open_checkpoint(save_torch(folder, to_torch(arrays), form, prefix)) as source:
            assert source.kind == kind
            same_state(source, arrays)
            first = convert(source, folder / middle, Options("mindspore"), config(kind))
        (folder / "back").mkdir()
        with open_checkpoint(through_mindspore(folder / middle, folder / "back")) as returned:
            same_state(returned, arrays)
            assert returned.fingerprint() == first.fingerprint
            last = convert(returned, folder / "torch", Options(shard_bytes=shard), config(kind))
        assert last.fingerprint == first.fingerprint
        files = sorted((folder / "torch").glob("*.safetensors"))
        assert len(files) > 1 or shard >= 4000 or sum(a.nbytes for a in arrays.values()) <= shard
        loaded = {n: t for file in files for n, t in load_file(file).items()}
        same_bits(loaded, arrays)
        assert json.loads((folder / "torch" / "config.json").read_text()) == config(kind)
    finally:
        shutil.rmtree(folder)


def test_mindspore_layers_take_the_names():
    """Our MindSpore names are the ones that MindSpore's own layers have."""
    from mindspore import nn

    layers = {
        "t5": ({"shared": nn.Embedding(3, 2)}, {"shared.weight": "shared.embedding_table"}),
        "dit": ({"transformer_blocks.0.norm1": nn.LayerNorm((2,))}, None),
        "wfvae": ({"encoder.mid.0.norm1": nn.GroupNorm(1, 2)}, None),
        "discriminator": ({"main.3": nn.BatchNorm3d(2)}, None),
    }
    for kind, (cells, expected) in layers.items():
        for parent, cell in cells.items():
            leaves = [p.name.rpartition(".")[2] for p in cell.get_parameters()]
            torch_leaves = ("weight", "bias", "running_mean", "running_var")[: len(leaves)]
            renamed = to_mindspore([f"{parent}.{leaf}" for leaf in torch_leaves], kind)
            assert sorted(renamed.values()) == sorted(f"{parent}.{leaf}" for leaf in leaves)
            assert expected is None or renamed == expected


@pytest.mark.parametrize("kind", KINDS)
def test_names_go_both_ways(kind):
    from osp_shared.checkpoints.names import canonical

    own = list(weights(kind))
    there = to_mindspore(own, kind)
    assert len(set(there.values())) == len(own)
    assert canonical(there.values(), kind, "x").names == there


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,9}\.[a-z]{1,9}", fullmatch=True), st.integers(0, 3000), min_size=1, max_size=9
    ),
    st.integers(1, 9000),
)
def test_fingerprint_ignores_the_layout(sizes, shard):
    arrays = {n: np.arange(k, dtype=np.float32) for n, k in sizes.items()}
    expected = fingerprint.of_set({n: fingerprint.of_array(a) for n, a in arrays.items()})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "m"
        assert write_safetensors(folder, arrays.items(), shard) == expected
        with open_checkpoint(folder) as checkpoint:
            assert checkpoint.fingerprint() == checkpoint.fingerprint(recompute=True) == expected
            for n, a in arrays.items():
                assert bits(checkpoint.read(n)) == bits(a)


def test_fingerprint_sees_every_bit_and_the_shape():
    a = np.arange(24, dtype=np.float32).reshape(4, 6)
    seen = {fingerprint.of_array(a), fingerprint.of_array(a.reshape(6, 4)), fingerprint.of_array(a.view(np.int32))}
    for at in (0, 11, 23):
        b = a.copy()
        b.reshape(-1).view(np.int32)[at] ^= 1
        seen.add(fingerprint.of_array(b))
    assert len(seen) == 6
    assert fingerprint.of_array(np.asfortranarray(a)) == fingerprint.of_array(a)


@pytest.mark.parametrize("kind", KINDS)
def test_specs_describe_the_weights(kind):
    """A kind is recognised from its names, and the spec is derived from them with and without a config."""
    folder = Path(tempfile.mkdtemp())
    try:
        write_safetensors(folder / "m", weights(kind).items())
        with open_checkpoint(folder / "m") as checkpoint:
            assert checkpoint.kind == kind
            assert checkpoint.spec(config(kind)).parameters() == SPECS[kind].parameters()
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("file", golden_files.files("wfvae", "loss_module_entries"), ids=lambda f: f.stem)
def test_loss_networks_have_the_original_entries(file):
    """Names, shapes and order of the discriminator and LPIPS, as the original's loss module lists them."""
    golden = golden_files.load(file)
    entries = {name: tuple(shape) for name, shape, _ in golden["loss_module_entries"]}
    for prefix, spec in (("discriminator.", DiscriminatorSpec()), ("perceptual_loss.", LPIPSSpec())):
        listed = {n.removeprefix(prefix): s for n, s in entries.items() if n.startswith(prefix)}
        assert list(spec.parameters().items()) == list(listed.items())
    assert DiscriminatorSpec().parameter_count == golden["discriminator_parameters"]
