"""WFVAE: its configuration, every state-dict entry in released order, and the Haar constants.

WF-VAE (Li et al. 2024): a causal video autoencoder with a low-frequency wavelet path beside the convolutions.
Width letters: b base_channels, e and d energy-flow widths of encoder and decoder, z latent_dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from osp_shared.errors import OspError
from osp_shared.specs import fields
from osp_shared.specs.haar import HAAR_2D_BANDS, HAAR_3D_BANDS, haar_2d, haar_3d

# ------------------------------------------------------------------------------------------------ configuration

_FLAT = {  # level 1 halves space only: 4x8x8
    "l1_dowmsample_block": "Downsample",
    "l1_downsample_wavelet": "HaarWaveletTransform2D",
    "l1_upsample_block": "Upsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform2D",
}
_DEEP = {  # level 1 halves time too: 8x8x8
    "l1_dowmsample_block": "Spatial2xTime2x3DDownsample",
    "l1_downsample_wavelet": "HaarWaveletTransform3D",
    "l1_upsample_block": "Spatial2xTime2x3DUpsample",
    "l1_upsample_wavelet": "InverseHaarWaveletTransform3D",
}
_LEVEL2 = {k.replace("l1", "l2"): v for k, v in _DEEP.items()}

# Scale and shift are not in the released config; these are the constructor's, for its eight channels.
_DEFAULT_CHANNELS, _DEFAULT_SCALE, _DEFAULT_SHIFT = 8, 0.18215, 0.0


@dataclass(frozen=True)
class WFVAESpec:
    """Config keys with the original constructor's defaults (`dowmsample` is the released spelling).

    scale, shift: one number a latent channel; None stands for the constructor's eight defaults.

    Raises:
        OspError: a value that the topology cannot have.
    """

    latent_dim: int = 8
    base_channels: int = 128
    encoder_num_resblocks: int = 2
    encoder_energy_flow_hidden_size: int = 64
    decoder_num_resblocks: int = 2
    decoder_energy_flow_hidden_size: int = 128
    attention_type: str = "AttnBlock3DFix"
    use_attention: bool = True
    dropout: float = 0.0
    norm_type: str = "groupnorm"
    t_interpolation: str = "nearest"
    connect_res_layer_num: int = 1
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    l1_dowmsample_block: str = "Downsample"
    l1_downsample_wavelet: str = "HaarWaveletTransform2D"
    l2_dowmsample_block: str = "Spatial2xTime2x3DDownsample"
    l2_downsample_wavelet: str = "HaarWaveletTransform3D"
    l1_upsample_block: str = "Upsample"
    l1_upsample_wavelet: str = "InverseHaarWaveletTransform2D"
    l2_upsample_block: str = "Spatial2xTime2x3DUpsample"
    l2_upsample_wavelet: str = "InverseHaarWaveletTransform3D"

    def __post_init__(self):
        self._check_numbers()
        self._check_choices()
        if self.norm_type == "groupnorm":
            for where, width in self._normed_widths():
                if width % 32:
                    raise OspError(f"WFVAE config: groupnorm has 32 groups, but {where} has {width} channels")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> WFVAESpec:
        return fields.from_config(cls, config)

    @classmethod
    def from_folder(cls, path) -> WFVAESpec:
        return fields.from_folder(cls, path)

    def to_config(self) -> dict[str, Any]:
        return {"_class_name": "WFVAEModel", **fields.to_config(self)}

    # -------------------------------------------------------------------------------------------- derived sizes

    @property
    def level1_is_3d(self) -> bool:
        """8x8x8: level 1 of the wavelet pyramid halves time as well."""
        return self.l1_dowmsample_block != "Downsample"

    @property
    def level1_channels(self) -> int:
        """Wavelet coefficients of three colours at level 1."""
        return 24 if self.level1_is_3d else 12

    @property
    def stride(self) -> tuple[int, int, int]:
        """Pixels per latent cell in (time, height, width)."""
        return (8 if self.level1_is_3d else 4, 8, 8)

    def latent_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Latent (frames, height, width) of a video; rests are floored, as the strided layers drop them.

        Raises:
            OspError: no frame, or less than one latent cell.
        """
        t, h, w = self.stride
        if frames < 1 or height < h or width < w:
            raise OspError(f"video of {frames} frames {height}x{width}: WFVAE needs at least 1 frame of {h}x{w}")
        return (frames - 1) // t + 1, height // h, width // w

    def video_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Pixel (frames, height, width) that a latent of this size decodes to."""
        t, h, w = self.stride
        return (frames - 1) * t + 1, height * h, width * w

    def check_video(self, shape: tuple[int, ...]) -> None:
        """Raises OspError unless `shape` is a video (B, 3, T, H, W) of at least one latent cell."""
        if len(shape) != 5 or shape[1] != 3:
            raise OspError(f"WFVAE encodes videos of shape (batch, 3, frames, height, width), not {tuple(shape)}")
        self.latent_size(*shape[2:])

    def check_latents(self, shape: tuple[int, ...]) -> None:
        """Raises OspError unless `shape` is a latent (B, latent_dim, T, H, W)."""
        if len(shape) != 5 or shape[1] != self.latent_dim or min(shape) < 1:
            raise OspError(
                f"WFVAE decodes latents of shape (batch, {self.latent_dim}, frames, height, width), not {tuple(shape)}"
            )

    def scale_and_shift(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel factors of (latent - shift) * scale.

        Raises:
            OspError: the config has none and the eight defaults do not fit `latent_dim`.
        """
        lists = []
        for key, default in (("scale", _DEFAULT_SCALE), ("shift", _DEFAULT_SHIFT)):
            given = getattr(self, key)
            if given is None and self.latent_dim != _DEFAULT_CHANNELS:
                raise OspError(
                    f"WFVAE config: no {key}; the default is for {_DEFAULT_CHANNELS} latent channels, "
                    f"latent_dim is {self.latent_dim}: give a list of {self.latent_dim} numbers"
                )
            lists.append((default,) * self.latent_dim if given is None else given)
        return lists[0], lists[1]

    # -------------------------------------------------------------------------------------------- parameters

    @cached_property
    def _entries(self) -> dict[str, tuple[tuple[int, ...], str]]:
        return {name: (shape, kind) for name, shape, kind in entries(self)}

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every state-dict entry, constants included, in released order."""
        return {name: shape for name, (shape, _) in self._entries.items()}

    def constants(self) -> dict[str, np.ndarray]:
        """Name -> built-in value of every Haar filter; a checkpoint's own values come before these."""
        tables = {5: haar_3d(), 4: haar_2d()}
        values = {}
        for name, (shape, kind) in self._entries.items():
            if kind != "param":
                band = name.split(".")[2].removesuffix("_conv")
                values[name] = tables[len(shape)][band].reshape(shape)
        return values

    def optional(self) -> frozenset[str]:
        """Haar filters: EMA checkpoints and early releases leave them out."""
        return frozenset(name for name, (_, kind) in self._entries.items() if kind != "param")

    def legacy_names(self) -> dict[str, str]:
        """Early spelling (`tranform`, sic) -> today's name; a checkpoint may hold these instead."""
        inner = [name for name in self.constants() if "_l1." in name or "_l2." in name]
        return {name.replace("wavelet_transform", "wavelet_tranform"): name for name in inner}

    @property
    def parameter_count(self) -> int:
        """Numbers in all parameters, frozen Haar taps included, buffers not."""
        return sum(math.prod(shape) for shape, kind in self._entries.values() if kind != "buffer")

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare a checkpoint's shapes with this spec.

        Raises:
            OspError: names that are missing, unexpected or of another shape.
        """
        fields.check_shapes("WFVAE", self.parameters(), shapes, self.optional(), self.legacy_names())

    @classmethod
    def derive(cls, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None) -> WFVAESpec:
        """Topology of a checkpoint by its own keys; what keys cannot tell is taken from `config`, else from RELEASED.

        Raises:
            OspError: not a WFVAE checkpoint, or a config that says something else than the weights.
        """
        found = _topology(shapes)
        if config is None:
            return replace(RELEASED, **{key: value for key, (value, _) in found.items()})
        spec = cls.from_config(config)
        for key, (value, witness) in found.items():
            if getattr(spec, key) != value:
                raise OspError(f"config.json says {key} {getattr(spec, key)!r}, the weights {value!r}: see {witness}")
        return spec

    # -------------------------------------------------------------------------------------------- checks

    def _check_numbers(self) -> None:
        lowest = {
            "latent_dim": 1, "base_channels": 1, "encoder_num_resblocks": 0, "decoder_num_resblocks": 1,
            "encoder_energy_flow_hidden_size": 1, "decoder_energy_flow_hidden_size": 1, "connect_res_layer_num": 0,
        }  # fmt: skip
        for key, low in lowest.items():
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise OspError(f"WFVAE config: {key} is {value!r}, must be an integer of at least {low}")
        if not isinstance(self.use_attention, bool):
            raise OspError(f"WFVAE config: use_attention is {self.use_attention!r}, must be true or false")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise OspError(f"WFVAE config: dropout is {self.dropout!r}, must be a number in [0, 1)")
        for key in ("scale", "shift"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, tuple) or len(value) != self.latent_dim):
                raise OspError(
                    f"WFVAE config: {key} is {value!r}, must be a list of latent_dim = {self.latent_dim} numbers"
                )

    def _check_choices(self) -> None:
        choices = {
            "norm_type": ("groupnorm", "layernorm"),
            "t_interpolation": ("nearest", "trilinear"),
            "attention_type": ("AttnBlock3DFix",),
            **{key: (value,) for key, value in _LEVEL2.items()},
            **{key: (_FLAT[key], _DEEP[key]) for key in _FLAT},
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise OspError(f"WFVAE config: {key} is {getattr(self, key)!r}, must be {' or '.join(known)}")
        level1 = {key: getattr(self, key) for key in _FLAT}
        if level1 not in (_FLAT, _DEEP):
            raise OspError(
                "WFVAE config: the four l1_* classes must all be 2-D (4x8x8) or all 3-D (8x8x8), not "
                + ", ".join(f"{k} {v}" for k, v in level1.items())
            )

    def _normed_widths(self) -> Iterator[tuple[str, int]]:
        b, e, d = self.base_channels, self.encoder_energy_flow_hidden_size, self.decoder_energy_flow_hidden_size
        yield "a block of base_channels", b
        yield "encoder.mid (2 * base_channels + encoder_energy_flow_hidden_size)", 2 * b + e
        yield "decoder.mid (4 * base_channels + decoder_energy_flow_hidden_size)", 4 * b + d
        if self.connect_res_layer_num:
            yield "decoder.connect_l1 (decoder_energy_flow_hidden_size)", d


# The 8-channel release, v1.3: not the constructor's defaults.
RELEASED = WFVAESpec(norm_type="layernorm", t_interpolation="trilinear", connect_res_layer_num=2)


# ------------------------------------------------------------------------------------------------ entries

Entry = tuple[str, tuple[int, ...], str]  # name, shape, "param" | "frozen" | "buffer"


def entries(spec: WFVAESpec) -> Iterator[Entry]:
    """Every state-dict entry in released order."""
    yield from _encoder(spec)
    yield from _decoder(spec)


def _conv(name: str, out: int, cin: int, *kernel: int) -> Iterator[Entry]:
    yield f"{name}.weight", (out, cin, *kernel), "param"
    yield f"{name}.bias", (out,), "param"


def _norm(spec: WFVAESpec, name: str, width: int) -> Iterator[Entry]:
    level = ".norm" if spec.norm_type == "layernorm" else ""
    yield f"{name}{level}.weight", (width,), "param"
    yield f"{name}{level}.bias", (width,), "param"


def _resnet2d(spec: WFVAESpec, name: str, width: int) -> Iterator[Entry]:
    for i in (1, 2):
        yield from _norm(spec, f"{name}.norm{i}", width)
        yield from _conv(f"{name}.conv{i}", width, width, 3, 3)


def _resnet3d(spec: WFVAESpec, name: str, cin: int, out: int) -> Iterator[Entry]:
    for i, width in ((1, cin), (2, out)):
        yield from _norm(spec, f"{name}.norm{i}", width)
        yield from _conv(f"{name}.conv{i}.conv", out, width, 3, 3, 3)
    if cin != out:
        yield from _conv(f"{name}.nin_shortcut.conv", out, cin, 1, 1, 1)


def _attention(spec: WFVAESpec, name: str, width: int) -> Iterator[Entry]:
    yield from _norm(spec, f"{name}.norm", width)
    for part in ("q", "k", "v", "proj_out"):
        yield from _conv(f"{name}.{part}.conv", width, width, 1, 1, 1)


def _mid(spec: WFVAESpec, name: str, widths: tuple[int, int, int]) -> Iterator[Entry]:
    cin, width, out = widths
    yield from _resnet3d(spec, f"{name}.0", cin, width)
    if spec.use_attention:
        yield from _attention(spec, f"{name}.1", width)
    yield from _resnet3d(spec, f"{name}.{2 if spec.use_attention else 1}", width, out)


def _haar(name: str, ndim: int, inverse: bool) -> Iterator[Entry]:
    if ndim == 2:
        yield from ((f"{name}.{band}", (1, 1, 2, 2), "buffer") for band in HAAR_2D_BANDS)
    elif inverse:
        yield from ((f"{name}.{band}", (1, 1, 2, 2, 2), "buffer") for band in HAAR_3D_BANDS)
    else:
        yield from ((f"{name}.{band}_conv.conv.weight", (1, 1, 2, 2, 2), "frozen") for band in HAAR_3D_BANDS)


def _encoder(spec: WFVAESpec) -> Iterator[Entry]:
    b, e, n = spec.base_channels, spec.encoder_energy_flow_hidden_size, spec.encoder_num_resblocks
    level1 = 3 if spec.level1_is_3d else 2
    yield from _conv("encoder.down1.0", b, 24, 3, 3)
    for i in range(n):
        yield from _resnet2d(spec, f"encoder.down1.{i + 1}", b)
    yield from _conv(f"encoder.down1.{n + 1}" + (".conv.conv" if spec.level1_is_3d else ".conv"), b, b, *(3,) * level1)
    yield from _conv("encoder.down2.0", 2 * b, b + e, 3, 3)
    for i in range(n):
        yield from _resnet3d(spec, f"encoder.down2.{i + 1}", 2 * b, 2 * b)
    yield from _conv(f"encoder.down2.{n + 1}.conv.conv", 2 * b, 2 * b, 3, 3, 3)
    yield from _conv("encoder.connect_l1", e, spec.level1_channels, 3, 3)
    yield from _conv("encoder.connect_l2", e, 24, 3, 3)
    yield from _mid(spec, "encoder.mid", (2 * b + e, 4 * b, 4 * b))
    yield from _norm(spec, "encoder.norm_out", 4 * b)
    yield from _conv("encoder.conv_out.conv", 2 * spec.latent_dim, 4 * b, 3, 3, 3)
    for name, ndim in (("in", 3), ("l1", level1), ("l2", 3)):
        yield from _haar(f"encoder.wavelet_transform_{name}", ndim, inverse=False)


def _decoder(spec: WFVAESpec) -> Iterator[Entry]:
    b, d, n = spec.base_channels, spec.decoder_energy_flow_hidden_size, spec.decoder_num_resblocks
    level1 = 3 if spec.level1_is_3d else 2
    yield from _conv("decoder.conv_in.conv", 4 * b, spec.latent_dim, 3, 3, 3)
    yield from _mid(spec, "decoder.mid", (4 * b, 4 * b, 4 * b + d))
    for i in range(n):
        yield from _resnet3d(spec, f"decoder.up2.{i}", 4 * b, 4 * b)
    yield from _conv(f"decoder.up2.{n}.conv.conv", 4 * b, 4 * b, 3, 3, 3)
    yield from _resnet3d(spec, f"decoder.up2.{n + 1}", 4 * b, 4 * b + d)
    for i in range(n):
        yield from _resnet3d(spec, f"decoder.up1.{i}", 2 * b if i else 4 * b, 2 * b)
    up = ".conv.conv" if spec.level1_is_3d else ".conv"
    yield from _conv(f"decoder.up1.{n}{up}", 2 * b, 2 * b, *(3,) * level1)
    yield from _resnet3d(spec, f"decoder.up1.{n + 1}", 2 * b, 2 * b)
    yield from _resnet3d(spec, "decoder.layer.0", 2 * b, b)
    yield from _resnet3d(spec, "decoder.layer.1", b, b)
    r = spec.connect_res_layer_num
    for name, out in (("connect_l1", spec.level1_channels), ("connect_l2", 24)):
        for i in range(r):
            yield from _resnet3d(spec, f"decoder.{name}.{i}", d, d)
        yield from _conv(f"decoder.{name}.{r}", out, d, 3, 3)
    yield from _norm(spec, "decoder.norm_out", b)
    yield from _conv("decoder.conv_out", 24, b, 3, 3)
    for name, ndim in (("out", 3), ("l1", level1), ("l2", 3)):
        yield from _haar(f"decoder.inverse_wavelet_transform_{name}", ndim, inverse=True)


# ------------------------------------------------------------------------------------------------ from a checkpoint


def _topology(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Any, str]]:
    """Config key -> (value, the tensor that shows it)."""

    def need(name: str, rank: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != rank:
            raise OspError(f"not the weights of a WFVAE: no tensor {name} with {rank} axes")
        return tuple(shapes[name])

    def present(prefix: str, suffix: str) -> list[int]:
        found = (n[len(prefix) : -len(suffix)] for n in shapes if n.startswith(prefix) and n.endswith(suffix))
        return sorted(int(i) for i in found if i.isdigit())

    def count(prefix: str, suffix: str, minus: int = 0) -> tuple[int, str]:
        found = present(prefix, suffix)
        return len(found) - minus, f"{prefix}{found[-1] if found else 0}{suffix}"

    b, z = "encoder.down1.0.weight", "decoder.conv_in.conv.weight"
    e, q = "encoder.connect_l1.weight", "encoder.mid.1.q.conv.weight"
    layer, group = "encoder.norm_out.norm.weight", "encoder.norm_out.weight"
    if layer not in shapes:
        need(group, 1)
    connect = len(present("decoder.connect_l1.", ".conv1.conv.weight"))  # its residual blocks; a convolution follows
    last = f"decoder.connect_l1.{connect}.weight"
    found = {
        "latent_dim": (need(z, 5)[1], z),
        "base_channels": (need(b, 4)[0], b),
        "encoder_energy_flow_hidden_size": (need(e, 4)[0], e),
        "decoder_energy_flow_hidden_size": (need(last, 4)[1], last),
        "encoder_num_resblocks": count("encoder.down2.", ".conv1.conv.weight"),
        "decoder_num_resblocks": count("decoder.up2.", ".conv1.conv.weight", minus=1),
        "connect_res_layer_num": (connect, last),
        "use_attention": (q in shapes, q if q in shapes else "encoder.mid.1 (a residual block)"),
        "norm_type": ("layernorm", layer) if layer in shapes else ("groupnorm", group),
    }
    level1 = _DEEP if need(e, 4)[1] == 24 else _FLAT
    return found | {key: (value, e) for key, value in level1.items()}
