"""Tiny weights for the demo: the released topology at narrow widths, made from names alone, trained on nothing.

The transformer and the text encoder are filled with random numbers (osp_shared.fill): what they sample is noise.

The autoencoder's numbers are set by hand. WFVAE has a path of wavelet coefficients around its convolutions (the
"energy flow"), which can be opened like a valve: the eight latent channels are then the lowest bands of the wavelet
pyramid, and a real clip comes back as a coarse but recognisable picture. Every other layer is filled with random
numbers and added at a few per cent, so that a wrong layer shows.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from osp_shared import fill
from osp_shared.checkpoints import write_safetensors
from osp_shared.specs import dit, t5, wfvae
from osp_shared.specs.wfvae import WFVAESpec

# Everything but the widths is the release's: 32 blocks with Skiparse 4, 24 text layers, the whole mT5 vocabulary.
VAE = dataclasses.replace(
    wfvae.RELEASED, base_channels=8, encoder_energy_flow_hidden_size=8, decoder_energy_flow_hidden_size=8
)
DIT = dataclasses.replace(
    dit.RELEASED, num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48, caption_channels=8
)
T5 = dataclasses.replace(t5.RELEASED, d_model=8, d_kv=4, d_ff=16, num_heads=2)

BRANCH = 0.1  # gain of what a random branch adds to its residual stream
SPREAD = 5.5  # standard deviation a latent should have: the inverse of the released scale, 0.18215
PEDESTAL = 256.0  # constant channels in front of the encoder's last norm: they keep its divisor nearly constant

# Latents 0 to 2 are the colours of the mean; the others are differences of the grey value, one Haar band each.
MEAN_GAIN = 0.7
DETAILS = {3: (1, 2.0), 4: (2, 2.0), 5: (3, 3.0), 6: (4, 2.0), 7: (5, 3.0)}  # latent: (3-D Haar band, gain)


def write(folder: Path, tokenizer: Path) -> dict[str, Path]:
    """Write vae/, transformer/ (in shards) and text_encoder/ (with the vocabulary files of `tokenizer`) into `folder`.

    A few MB; the text encoder's table is bfloat16. Returns their paths by role.
    """
    paths = {name: folder / name for name in ("vae", "transformer", "text_encoder")}
    write_model(paths["vae"], VAE, autoencoder())
    transformer = filled(DIT)
    transformer["proj_out.weight"] *= 0.1  # guidance multiplies what it predicts: without this, every pixel is clipped
    write_model(paths["transformer"], DIT, transformer, shard_bytes=2 << 20)
    text = filled(T5)
    text["shared.weight"] = text["shared.weight"].astype(ml_dtypes.bfloat16)
    write_model(paths["text_encoder"], T5, text, stem="model")
    for file in tokenizer.iterdir():
        shutil.copyfile(file, paths["text_encoder"] / file.name)
    return paths


def write_model(folder: Path, spec, tensors: Mapping[str, np.ndarray], **how) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder, tensors.items(), metadata={"note": "untrained weights of the demo"}, **how)
    config = {**spec.to_config(), "_note": "untrained weights of the demo"}
    if isinstance(spec, t5.T5Spec):
        config["transformers_version"] = "4.57.0"  # as in a released folder; without it the tokenizer's loader warns
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def filled(spec, salt: str = "demo") -> dict[str, np.ndarray]:
    """Random weights for every entry of a spec."""
    return {name: fill.parameter(name, shape, salt) for name, shape in spec.parameters().items()}


def autoencoder(spec: WFVAESpec = VAE, salt: str = "demo") -> dict[str, np.ndarray]:
    """State dict of a WFVAE whose latents are wavelet coefficients."""
    w = filled(spec, salt)
    for name in w:
        if ".conv2." in name or "proj_out" in name:
            w[name] *= BRANCH
    _open_encoder(w, spec)
    _open_decoder(w, spec)
    return w | spec.constants()


def _open_encoder(w: dict[str, np.ndarray], spec: WFVAESpec) -> None:
    """Top-level coefficients -> connect_l2 -> mid -> norm, swish, conv_out -> latents."""
    z, b = spec.latent_dim, spec.base_channels
    clear(w, "encoder.connect_l2")
    for k in range(3):
        tap(w, "encoder.connect_l2", k, k, MEAN_GAIN)
    for k, (band, gain) in DETAILS.items():
        for colour in range(3):
            tap(w, "encoder.connect_l2", k, 3 * band + colour, gain / 3)
    # Each latent travels as a pair (+s, -s): its mean is zero for the norm, and swish(s) - swish(-s) = s.
    shortcut = w["encoder.mid.0.nin_shortcut.conv.weight"]
    shortcut *= BRANCH * 0.25
    shortcut[:, 2 * b :] = 0
    for k in range(z):
        tap(w, "encoder.mid.0.nin_shortcut.conv", 2 * k, 2 * b + k, 1.0)
        tap(w, "encoder.mid.0.nin_shortcut.conv", 2 * k + 1, 2 * b + k, -1.0)
    width = 4 * b
    last = "encoder.mid.2" if spec.use_attention else "encoder.mid.1"
    w[f"{last}.conv2.conv.bias"][2 * z : 2 * z + 2] = PEDESTAL, -PEDESTAL
    w["encoder.norm_out.norm.weight"][:] = 1
    w["encoder.norm_out.norm.bias"][:] = 0
    clear(w, "encoder.conv_out.conv")
    divisor = PEDESTAL * np.sqrt(2 / width)
    for k in range(z):
        tap(w, "encoder.conv_out.conv", k, 2 * k, divisor)
        tap(w, "encoder.conv_out.conv", k, 2 * k + 1, -divisor)
    w["encoder.conv_out.conv.bias"][z:] = -8.0  # log-variance: sampling the posterior changes next to nothing


def _open_decoder(w: dict[str, np.ndarray], spec: WFVAESpec) -> None:
    """Latents -> conv_in -> mid -> connect_l2 -> top-level coefficients."""
    z, b = spec.latent_dim, spec.base_channels
    w["decoder.conv_in.conv.weight"] /= SPREAD
    w["decoder.conv_in.conv.weight"][:z] = 0
    w["decoder.conv_in.conv.bias"][:z] = 0
    for k in range(z):
        tap(w, "decoder.conv_in.conv", k, k, 1.0)
    last = "decoder.mid.2" if spec.use_attention else "decoder.mid.1"
    for name in (f"{last}.nin_shortcut.conv", f"decoder.up2.{spec.decoder_num_resblocks + 1}.nin_shortcut.conv"):
        clear(w, name)
        for k in range(4 * b):
            tap(w, name, k, k, 1.0)
        for k in range(z):
            tap(w, name, 4 * b + k, k, 1.0)
    clear(w, f"decoder.connect_l2.{spec.connect_res_layer_num}")
    for k in range(3):
        tap(w, f"decoder.connect_l2.{spec.connect_res_layer_num}", k, k, 1 / MEAN_GAIN)
    for k, (band, gain) in DETAILS.items():
        for colour in range(3):
            tap(w, f"decoder.connect_l2.{spec.connect_res_layer_num}", 3 * band + colour, k, 1 / gain)
    link = f"decoder.connect_l1.{spec.connect_res_layer_num}"
    w[f"{link}.weight"] *= 0.02
    w[f"{link}.bias"][:] = 0
    w["decoder.conv_out.weight"] *= 0.02
    w["decoder.conv_out.bias"][:] = 0


def clear(w: dict[str, np.ndarray], layer: str) -> None:
    w[f"{layer}.weight"][:] = 0
    w[f"{layer}.bias"][:] = 0


def tap(w: dict[str, np.ndarray], layer: str, out: int, cin: int, value: float) -> None:
    """Weight of the present position: the middle in space, the last in time."""
    kernel = w[f"{layer}.weight"]
    centre = (kernel.shape[-1] // 2,) * 2
    kernel[(out, cin, *((kernel.shape[2] - 1,) if kernel.ndim == 5 else ()), *centre)] = value
