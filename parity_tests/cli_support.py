"""Tiny model folders, clips and calls for the tests of the `osp` command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

from osp_shared.checkpoints import write_safetensors
from osp_shared.specs import dit
from osp_shared.video.writer import write_video
from osp_tools import cli, demo_weights

VAE = demo_weights.VAE
DIT = dataclasses.replace(
    demo_weights.DIT, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24, num_layers=4
)
INPAINT = dit.InpaintSpec(**{f.name: getattr(DIT, f.name) for f in dataclasses.fields(DIT)})
WORDS = "<pad> </s> <unk> a red fox in snow on the moon high quality , aesthetic low worst".split()
T5 = dataclasses.replace(demo_weights.T5, num_layers=2, vocab_size=len(WORDS) + 3)


def write_model(folder: Path, spec, tensors, **how) -> Path:
    folder.mkdir(parents=True)
    write_safetensors(folder, tensors.items(), **how)
    (folder / "config.json").write_text(json.dumps(spec.to_config()))
    return folder


def write_transformer(folder: Path, spec=DIT, **how) -> Path:
    tensors = demo_weights.filled(spec)
    tensors["proj_out.weight"] *= 0.1
    return write_model(folder, spec, tensors, **how)


def write_text_encoder(folder: Path) -> Path:
    """A two-layer T5 and a tokenizer that knows a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    write_model(folder, T5, demo_weights.filled(T5), stem="model")
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_models(root: Path) -> Path:
    """vae/, transformer/ (three shards) and text_encoder/ under `root`."""
    write_model(root / "vae", VAE, demo_weights.autoencoder())
    write_transformer(root / "transformer", shard_bytes=100_000)
    write_text_encoder(root / "text_encoder")
    return root


def moving_clip(frames: int = 12, height: int = 48, width: int = 64, shift: int = 0) -> np.ndarray:
    """uint8 (T, H, W, 3): smooth colours that drift."""
    t, y, x = np.meshgrid(np.arange(frames) + shift, np.arange(height), np.arange(width), indexing="ij")
    waves = [np.sin(0.1 * x + 0.2 * t), np.cos(0.13 * y - 0.1 * t), np.sin(0.05 * (x + y) + 0.3 * t)]
    return np.stack([127.5 + 100 * wave for wave in waves], -1).astype(np.uint8)


def write_clip(path: Path, **size) -> Path:
    return write_video(path, moving_clip(**size), 25, lossless=True)


def osp(*argv) -> int:
    """The command in this process; its exit status."""
    return cli.main([str(a) for a in argv])


def flags(options: dict) -> list[str]:
    """{"seed": 3, "grid": True} as ["--seed", "3", "--grid"]; None and False leave a flag out."""
    argv = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        argv += [f"--{name}", *map(str, values)]
    return argv
