"""How many floating-point operations a forward pass needs, from the spec alone: products only, two a multiply-add.

Norms, activations and interpolation are left out: they cost time but not products.
"""

from __future__ import annotations

import math

from osp_shared.specs.dit import DiTSpec
from osp_shared.specs.wfvae import WFVAESpec

Size = tuple[int, int, int]


def transformer(spec: DiTSpec, latent_size: Size, text_tokens: int, batch: int = 1) -> int:
    """A forward of the transformer on latents (T, h, w)."""
    tokens, D = math.prod(spec.token_grid(*latent_size)), spec.hidden_size
    total = 0
    for name, shape in spec.parameters().items():
        if len(shape) < 2 or "scale_shift_table" in name:
            continue
        if name.startswith("adaln_single"):
            rows = 1
        elif name.startswith("caption_projection") or ".attn2.to_k" in name or ".attn2.to_v" in name:
            rows = text_tokens
        else:
            rows = tokens
        total += 2 * rows * math.prod(shape)
    for i in range(spec.num_layers):
        rule = spec.block_rule(i)
        padded = tokens + rule.padding(tokens)
        total += 4 * D * (padded * padded // rule.n + tokens * text_tokens)
    return batch * total


def autoencoder(spec: WFVAESpec, video_size: Size) -> tuple[int, int]:
    """(encode, decode) of a video (T, H, W)."""
    places = _places(spec, video_size)
    totals = {"encoder": 0, "decoder": 0}
    for name, shape in spec.parameters().items():
        if len(shape) < 4 or "wavelet" in name:
            continue
        half = name.split(".")[0]
        totals[half] += 2 * math.prod(shape) * math.prod(_place(name, spec, places))
    if spec.use_attention:
        t, h, w = places["latent"]
        attention = 4 * t * (h * w) ** 2 * 4 * spec.base_channels
        totals = {half: total + attention for half, total in totals.items()}
    return totals["encoder"], totals["decoder"]


def _places(spec: WFVAESpec, video_size: Size) -> dict[str, Size]:
    """Positions (t, h, w) at each depth. enc1, enc2: wavelet levels; dec1, dec2: after the first, second upsampler."""
    T, H, W = video_size
    deep = spec.level1_is_3d
    enc1 = ((T + 1) // 2, H // 2, W // 2)
    enc2 = ((enc1[0] + 1) // 2 if deep else enc1[0], H // 4, W // 4)
    t, h, w = spec.latent_size(T, H, W)
    dec1 = (2 * t - 1, 2 * h, 2 * w)
    dec2 = (2 * dec1[0] - 1 if deep else dec1[0], 4 * h, 4 * w)
    return {"enc1": enc1, "enc2": enc2, "latent": (t, h, w), "dec1": dec1, "dec2": dec2}


def _place(name: str, spec: WFVAESpec, places: dict[str, Size]) -> Size:
    """Where a convolution's outputs lie."""
    half, part, *rest = name.split(".")
    index = int(rest[0]) if rest[0].isdigit() else 0
    if half == "encoder":
        last = index == spec.encoder_num_resblocks + 1
        if part == "down1":
            return places["enc2" if last else "enc1"]
        if part == "down2":
            return places["latent" if last else "enc2"]
        return places["enc2" if part == "connect_l1" else "latent"]
    upsampled = index >= spec.decoder_num_resblocks
    if part == "up2":
        return places["dec1" if upsampled else "latent"]
    if part == "up1":
        return places["dec2" if upsampled else "dec1"]
    return places[{"connect_l1": "dec1", "layer": "dec2", "conv_out": "dec2"}.get(part, "latent")]
