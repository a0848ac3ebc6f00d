"""Tiny models of every kind with their full key sets, and what the checkpoint tests compare them with."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from osp_shared import fill
from osp_shared.specs.auxiliary import DiscriminatorSpec, LlamaSpec, LPIPSSpec
from osp_shared.specs.dit import DiTSpec, InpaintSpec
from osp_shared.specs.t5 import T5Spec
from osp_shared.specs.wfvae import WFVAESpec

NUMPY = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}

_DIT = {
    "num_attention_heads": 2, "attention_head_dim": 6, "in_channels": 2, "num_layers": 3, "cross_attention_dim": 12,
    "patch_size": 2, "patch_size_t": 1, "activation_fn": "gelu-approximate", "caption_channels": 10, "sparse1d": True,
    "sparse_n": 4,
}  # fmt: skip
SPECS = {
    "wfvae": WFVAESpec(
        base_channels=4, latent_dim=2, encoder_energy_flow_hidden_size=2, decoder_energy_flow_hidden_size=4,
        norm_type="layernorm", t_interpolation="trilinear", connect_res_layer_num=2,
        scale=(0.5, 0.25), shift=(0.0, 1.0),
    ),
    "dit": DiTSpec(**_DIT),
    "inpaint": InpaintSpec(**_DIT),
    "t5": T5Spec(vocab_size=23, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2),
    "llama": LlamaSpec(19, 8, 12, 2, 8, 4),
    "discriminator": DiscriminatorSpec(ndf=2, n_layers=2),
    "lpips": LPIPSSpec(width=32),
}  # fmt: skip
KINDS = tuple(SPECS)
CONFIGS = {
    "llama": {
        "vocab_size": 19, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "model_type": "llama",
    }
}  # fmt: skip


def config(kind: str) -> dict:
    return CONFIGS.get(kind) or SPECS[kind].to_config()


def weights(kind: str, dtype: str = "fp32", salt: str = "") -> dict[str, np.ndarray]:
    """Every state-dict entry with random bits, so not-a-numbers and denormals are among the values."""
    arrays = {}
    for name, shape in SPECS[kind].parameters().items():
        if name.endswith("num_batches_tracked"):
            arrays[name] = np.array(7, np.int64)
        elif kind == "t5" and name == "encoder.embed_tokens.weight":
            continue  # the alias
        else:
            bits = fill.rng(name, salt).integers(0, 256, (*shape, np.dtype(NUMPY[dtype]).itemsize), np.uint8)
            arrays[name] = bits.view(NUMPY[dtype]).reshape(shape)
    return arrays


def to_torch(arrays: dict[str, np.ndarray]) -> dict:
    import torch

    half = {ml_dtypes.bfloat16: torch.bfloat16, np.float16: torch.float16}

    def convert(a: np.ndarray):
        if a.dtype.type in half:
            return torch.from_numpy(a.reshape(-1).view(np.int16).copy()).view(half[a.dtype.type]).reshape(a.shape)
        return torch.from_numpy(a.copy())

    return {name: convert(a) for name, a in arrays.items()}


def bits(array) -> tuple[tuple[int, ...], str, bytes]:
    """Shape, type name and bytes of a numpy array or a torch tensor."""
    if isinstance(array, np.ndarray):
        return tuple(array.shape), array.dtype.name, array.tobytes()
    import torch

    name = str(array.dtype).removeprefix("torch.")
    raw = array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tuple(array.shape), name, raw


def same_bits(found: dict, expected: dict) -> None:
    """The same names, each with the same shape, type and bits."""
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())[:6]
    for name in expected:
        assert bits(found[name]) == bits(expected[name]), name


def same_state(checkpoint, expected: dict[str, np.ndarray]) -> None:
    same_bits({name: checkpoint.read(name) for name in checkpoint.shapes}, expected)


@contextlib.contextmanager
def environment(name: str, value: str | None):
    old = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if old is not None:
            os.environ[name] = old


def osp(*arguments: str) -> tuple[int, str, str]:
    """Run an `osp` command in this process: exit status, stdout, stderr."""
    from osp_tools import cli

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main([str(a) for a in arguments])
    return status, out.getvalue(), err.getvalue()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
