"""The Skiparse diffusion transformer of Open-Sora Plan v1.3 and its inpaint / image-to-video variant.

Configuration, named variants, every state-dict entry in released order, which blocks are sparse, and the topology of a
checkpoint by its own keys. Width letters: D hidden size, p patch, c latent channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from functools import cached_property
from typing import Any

import numpy as np

from osp_shared.errors import OspError
from osp_shared.geometry import tokens
from osp_shared.geometry.skiparse import Skiparse
from osp_shared.specs import fields

Shape = tuple[int, ...]
T2V_CLASS, INPAINT_CLASS = "OpenSoraT2V_v1_3", "OpenSoraInpaint_v1_3"

# Activation -> width of the FFN's first linear over D, and of its second: the gated ones project twice the width.
ACTIVATIONS = {
    "gelu": (4, 4), "gelu-approximate": (4, 4), "geglu-approximate": (4, 4), "geglu": (8, 4), "swiglu": (8, 4),
}  # fmt: skip
TIME_CHANNELS = 256  # width of the timestep's sinusoid
# Literals of the release, whatever num_layers is: a 6-layer model has no dense block at its end.
FIRST_SPARSE, LAST_SPARSE = 2, 29


@dataclass(frozen=True)
class DiTSpec:
    """Config keys with the original constructor's defaults; None for a required key is an error.

    sample_size_*: kept as they are (training writes lists here), never used. upcast_attention: without effect.

    Raises:
        OspError: a value that the topology cannot have.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 88
    in_channels: int | None = None
    out_channels: int | None = None
    num_layers: int = 1
    dropout: float = 0.0
    cross_attention_dim: int | None = None
    attention_bias: bool = True
    sample_size_h: int | tuple[int, ...] | None = None
    sample_size_w: int | tuple[int, ...] | None = None
    sample_size_t: int | tuple[int, ...] | None = None
    patch_size: int | None = None
    patch_size_t: int | None = None
    activation_fn: str = "geglu"
    only_cross_attention: bool = False
    double_self_attention: bool = False
    upcast_attention: bool = False
    norm_elementwise_affine: bool = False
    norm_eps: float = 1e-6
    caption_channels: int | None = None
    interpolation_scale_h: float = 1.0
    interpolation_scale_w: float = 1.0
    interpolation_scale_t: float = 1.0
    sparse1d: bool = False
    sparse_n: int = 2

    def __post_init__(self):
        self._check_numbers()
        self._check_choices()
        if self.out_channels is None:
            object.__setattr__(self, "out_channels", self.in_channels)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DiTSpec:
        """The spec of a config; `_class_name` may name the inpaint class.

        Raises:
            OspError: unknown keys, values that cannot be, or the config of another class.
        """
        named = config.get("_class_name", cls.class_name())
        if named not in CLASSES:
            raise OspError(f"config _class_name is {named!r}: a v1.3 transformer is {' or '.join(CLASSES)}")
        if not issubclass(CLASSES[named], cls):
            raise OspError(f"config _class_name is {named!r}, expected {cls.class_name()}")
        return fields.from_config(CLASSES[named], config)

    @classmethod
    def from_folder(cls, path) -> DiTSpec:
        return fields.from_folder(cls, path)

    def to_config(self) -> dict[str, Any]:
        return {"_class_name": self.class_name(), **fields.to_config(self)}

    @classmethod
    def class_name(cls) -> str:
        return T2V_CLASS

    # ------------------------------------------------------------------------------------------------ derived values

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def input_channels(self) -> int:
        """Channels of the model's first input."""
        return self.in_channels

    @property
    def rope_scale(self) -> tuple[float, float, float]:
        """Divisors of the positions along (t, y, x)."""
        return self.interpolation_scale_t, self.interpolation_scale_h, self.interpolation_scale_w

    def block_rule(self, index: int) -> Skiparse:
        """Which tokens block `index` lets see each other: dense, single-skip (even) or group-skip (odd)."""
        if not self.sparse1d or not FIRST_SPARSE <= index <= LAST_SPARSE:
            return Skiparse(1, False)
        return Skiparse(self.sparse_n, index % 2 == 1)

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along (t, y, x) of a latent of this size; an odd last row or column is dropped.

        Raises:
            OspError: no token at all.
        """
        return tokens.grid(frames, height, width, self.patch_size)

    def check_inputs(self, latents: Shape, text: Shape) -> None:
        """Raises OspError unless the shapes are (B, input_channels, T, H, W) and (B, 1, L, caption_channels)."""
        if len(latents) != 5 or latents[1] != self.input_channels:
            raise OspError(
                f"the transformer takes latents (batch, {self.input_channels}, frames, height, width), not {latents}"
            )
        if len(text) != 4 or text[0] != latents[0] or text[1] != 1 or text[3] != self.caption_channels:
            raise OspError(
                f"the transformer takes text ({latents[0]}, 1, tokens, {self.caption_channels}) for these latents, "
                f"not {text}"
            )

    def key_biases(
        self, latents: Shape, text: Shape, video_mask: np.ndarray | None, text_mask: np.ndarray | None
    ) -> tuple[dict[Skiparse, np.ndarray | None], np.ndarray | None]:
        """Additive key biases of a call on latents and text of these shapes, float32; None where all is visible.

        video_mask (B, T, H, W), text_mask (B, 1, L): 1 = visible; None = all visible.

        Returns:
            Self-attention's biases by block rule, each (n B, 1, 1, N' / n), and cross-attention's (B, 1, 1, L).

        Raises:
            OspError: a mask of another shape.
        """
        B, _, T, H, W = latents
        L = text[2]
        for name, mask, shape in (("video mask", video_mask, (B, T, H, W)), ("text mask", text_mask, (B, 1, L))):
            if mask is not None and mask.shape != shape:
                raise OspError(f"{name} of shape {mask.shape}, must be {shape} for these latents and text")
        count = tokens.count(self.token_grid(T, H, W))
        tokens_bias = None if video_mask is None else tokens.key_bias(tokens.pool_mask(video_mask, self.patch_size))
        rules = dict.fromkeys(self.block_rule(index) for index in range(self.num_layers))
        video = {rule: rule.key_bias(tokens_bias, B, count) for rule in rules}
        text_bias = None if text_mask is None else tokens.key_bias(text_mask)
        return video, None if text_bias is None else text_bias.reshape(B, 1, 1, L)

    # ---------------------------------------------------------------------------------------------------- parameters

    @cached_property
    def _entries(self) -> dict[str, Shape]:
        return dict(entries(self))

    def parameters(self) -> dict[str, Shape]:
        """Name -> shape of every state-dict entry, in released order."""
        return dict(self._entries)

    def optional(self) -> frozenset[str]:
        """No entry may be absent."""
        return frozenset()

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self._entries.values())

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Compare a checkpoint's shapes with this spec.

        Raises:
            OspError: names that are missing, unexpected or of another shape.
        """
        fields.check_shapes(self.class_name(), self._entries, shapes)

    @classmethod
    def derive(cls, shapes: Mapping[str, Shape], config: Mapping[str, Any] | None = None) -> DiTSpec:
        """Topology of a checkpoint by its own keys, an `InpaintSpec` when it has the inpaint stems.

        What keys cannot tell (heads, activation, sparsity, scales) is taken from `config`, else from the release.

        Raises:
            OspError: other weights than a v1.3 transformer's, or a config that says something else than the weights.
        """
        target = InpaintSpec if INPAINT_WITNESS in shapes else DiTSpec
        if not issubclass(target, cls):
            raise OspError(f"not the weights of {cls.class_name()}: no tensor {INPAINT_WITNESS}")
        found = topology(shapes)
        if config is None:
            return _released_with(target, found)
        if "_class_name" in config and CLASSES.get(config["_class_name"]) is not target:
            raise OspError(
                f"config.json says _class_name {config['_class_name']!r}, the weights {target.class_name()!r}: "
                f"see {INPAINT_WITNESS}"
            )
        spec = fields.from_config(target, config)
        _agree(spec, found)
        return spec

    # -------------------------------------------------------------------------------------------------------- checks

    def _check_numbers(self) -> None:
        required = ("in_channels", "patch_size", "caption_channels")
        counts = ("num_attention_heads", "attention_head_dim", "num_layers", "sparse_n", *required, "out_channels")
        for key in counts:
            value = getattr(self, key)
            if value is None and key == "out_channels":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OspError(f"{self.class_name()} config: {key} is {value!r}, must be an integer of at least 1")
        if self.attention_head_dim % 6:
            raise OspError(
                f"{self.class_name()} config: attention_head_dim is {self.attention_head_dim}, must be a multiple of 6 "
                "(a third for each of t, y, x, in two halves)"
            )
        for axis in "hwt":
            if not getattr(self, key := f"interpolation_scale_{axis}") > 0:
                raise OspError(f"{self.class_name()} config: {key} must be positive")
        if not 0 <= self.dropout < 1:
            raise OspError(f"{self.class_name()} config: dropout is {self.dropout!r}, must lie in [0, 1)")

    def _check_choices(self) -> None:
        if self.patch_size_t != 1:
            raise OspError(f"{self.class_name()} config: patch_size_t is {self.patch_size_t!r}, must be 1")
        if self.activation_fn not in ACTIVATIONS:
            raise OspError(
                f"{self.class_name()} config: activation_fn is {self.activation_fn!r}, "
                f"must be one of {', '.join(ACTIVATIONS)}"
            )
        if self.cross_attention_dim not in (None, self.hidden_size):
            raise OspError(
                f"{self.class_name()} config: cross_attention_dim is {self.cross_attention_dim}, must equal "
                f"num_attention_heads * attention_head_dim = {self.hidden_size}: text is projected to that width"
            )
        for key in ("only_cross_attention", "double_self_attention"):
            if getattr(self, key):
                raise OspError(f"{self.class_name()} config: {key} must be false: v1.3 blocks have self-attention once")


@dataclass(frozen=True)
class InpaintSpec(DiTSpec):
    """Inpainting and image-to-video: 2 c + vae_scale_factor_t input channels and two more stems."""

    vae_scale_factor_t: int = 4

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.vae_scale_factor_t, int) or self.vae_scale_factor_t < 1:
            raise OspError(f"{INPAINT_CLASS} config: vae_scale_factor_t is {self.vae_scale_factor_t!r}, must be >= 1")

    @classmethod
    def class_name(cls) -> str:
        return INPAINT_CLASS

    @property
    def input_channels(self) -> int:
        """Noisy latents, latents of the masked video, and the mask folded to the latents' size."""
        return 2 * self.in_channels + self.vae_scale_factor_t


CLASSES = {T2V_CLASS: DiTSpec, INPAINT_CLASS: InpaintSpec}

_2B = {
    "num_attention_heads": 24, "attention_head_dim": 96, "in_channels": 8, "out_channels": 8, "num_layers": 32,
    "cross_attention_dim": 2304, "patch_size": 2, "patch_size_t": 1, "activation_fn": "gelu-approximate",
    "caption_channels": 4096, "sparse1d": True, "sparse_n": 4,
}  # fmt: skip
RELEASED = DiTSpec(**_2B)
RELEASED_INPAINT = InpaintSpec(**_2B)
# The ending names the patch sizes (t, y, x).
VARIANTS = {f"{T2V_CLASS}-2B/122": RELEASED, f"{INPAINT_CLASS}-2B/122": RELEASED_INPAINT}


def variant(name: str, **changes: Any) -> DiTSpec:
    """A named variant with some config keys changed.

    Raises:
        OspError: no such variant, or a value that cannot be.
    """
    if name not in VARIANTS:
        raise OspError(f"no model {name!r}; one of {', '.join(VARIANTS)}")
    known = {f.name for f in dataclass_fields(VARIANTS[name])}
    if unknown := sorted(set(changes) - known):
        raise OspError(f"{name}: unknown config keys {fields.some(unknown)}")
    return replace(VARIANTS[name], **changes)


# ---------------------------------------------------------------------------------------------------------- entries

Entry = tuple[str, Shape]
MASKED_STEM, MASK_STEM = "pos_embed_masked_hidden_states", "pos_embed_mask"


def entries(spec: DiTSpec) -> Iterator[Entry]:
    """Every state-dict entry in released order."""
    D, p = spec.hidden_size, spec.patch_size
    yield "scale_shift_table", (2, D)
    yield from _linear("caption_projection.linear_1", D, spec.caption_channels)
    yield from _linear("caption_projection.linear_2", D, D)
    yield from _patches("pos_embed", spec.in_channels, spec)
    for i in range(spec.num_layers):
        yield from _block(f"transformer_blocks.{i}", spec)
    yield from _linear("proj_out", p * p * spec.out_channels, D)
    yield from _linear("adaln_single.emb.timestep_embedder.linear_1", D, TIME_CHANNELS)
    yield from _linear("adaln_single.emb.timestep_embedder.linear_2", D, D)
    yield from _linear("adaln_single.linear", 6 * D, D)
    if isinstance(spec, InpaintSpec):
        for stem, channels in ((MASKED_STEM, spec.in_channels), (MASK_STEM, spec.vae_scale_factor_t)):
            yield from _patches(f"{stem}.0", channels, spec)
            yield from _linear(f"{stem}.1", D, D, bias=False)


def _linear(name: str, out: int, width: int, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (out, width)
    if bias:
        yield f"{name}.bias", (out,)


def _patches(name: str, channels: int, spec: DiTSpec) -> Iterator[Entry]:
    yield f"{name}.proj.weight", (spec.hidden_size, channels, spec.patch_size, spec.patch_size)
    yield f"{name}.proj.bias", (spec.hidden_size,)


def _block(name: str, spec: DiTSpec) -> Iterator[Entry]:
    D = spec.hidden_size
    first, second = ACTIVATIONS[spec.activation_fn]
    yield f"{name}.scale_shift_table", (6, D)
    for i in (1, 2):
        if spec.norm_elementwise_affine:
            yield f"{name}.norm{i}.weight", (D,)
            yield f"{name}.norm{i}.bias", (D,)
        for part in ("to_q", "to_k", "to_v"):
            yield from _linear(f"{name}.attn{i}.{part}", D, D, spec.attention_bias)
        yield from _linear(f"{name}.attn{i}.to_out.0", D, D)
    yield from _linear(f"{name}.ff.net.0.proj", first * D, D)
    yield from _linear(f"{name}.ff.net.2", D, second * D)


# ------------------------------------------------------------------------------------------------ from a checkpoint

INPAINT_WITNESS = f"{MASK_STEM}.0.proj.weight"
Found = dict[str, tuple[Any, str]]  # config key -> (value, the tensor that shows it)


def topology(shapes: Mapping[str, Shape]) -> Found:
    """What the keys of a checkpoint say; `hidden_size` and `gated` stand for what several config keys decide together.

    Raises:
        OspError: other weights than a v1.3 transformer's.
    """

    def need(name: str, rank: int) -> Shape:
        if len(shapes.get(name, ())) != rank:
            raise OspError(f"not the weights of a v1.3 transformer: no tensor {name} with {rank} axes")
        return tuple(shapes[name])

    blocks = {n.split(".")[1] for n in shapes if n.startswith("transformer_blocks.")}
    last = max(len(blocks) - 1, 0)  # a count, so that no number inside a name decides how long the list gets
    first, final = "transformer_blocks.0", f"transformer_blocks.{last}.scale_shift_table"
    table, patch, head = "scale_shift_table", "pos_embed.proj.weight", "proj_out.weight"
    caption, inner, text = "caption_projection.linear_1.weight", f"{first}.ff.net.0.proj.weight", f"{first}.attn2.to_k"
    D, p = need(table, 2)[1], need(patch, 4)[2]
    bias, norm = f"{first}.attn1.to_q.bias", f"{first}.norm1.weight"
    need(final, 2)
    if not D or not p:
        raise OspError(f"not the weights of a v1.3 transformer: {patch} is empty")
    found: Found = {
        "hidden_size": (D, table),
        "in_channels": (need(patch, 4)[1], patch),
        "out_channels": (need(head, 2)[0] // (p * p), head),
        "num_layers": (last + 1, final),
        "cross_attention_dim": (need(f"{text}.weight", 2)[1], f"{text}.weight"),
        "attention_bias": (bias in shapes, bias),
        "patch_size": (p, patch),
        "gated": (need(inner, 2)[0] == 8 * D, inner),
        "norm_elementwise_affine": (norm in shapes, norm),
        "caption_channels": (need(caption, 2)[1], caption),
    }
    if INPAINT_WITNESS in shapes:
        found["vae_scale_factor_t"] = (need(INPAINT_WITNESS, 4)[1], INPAINT_WITNESS)
    return found


def _released_with(target: type[DiTSpec], found: Found) -> DiTSpec:
    """The release with what the weights say; without a config, heads have the released width."""
    values = {key: value for key, (value, _) in found.items()}
    D, gated = values.pop("hidden_size"), values.pop("gated")
    d = RELEASED.attention_head_dim
    if D % d or gated:
        what = f"heads in a width of {D}" if D % d else "which of geglu and swiglu"
        raise OspError(f"the weights do not tell {what}: put their config.json beside them")
    base = RELEASED_INPAINT if target is InpaintSpec else RELEASED
    return replace(base, num_attention_heads=D // d, **values)


def _agree(spec: DiTSpec, found: Found) -> None:
    """Raises OspError naming the config key, both values and the tensor where a config contradicts the weights."""
    said = {key: getattr(spec, key) for key in found if key not in ("hidden_size", "gated", "cross_attention_dim")}
    said |= {"hidden_size": spec.hidden_size, "cross_attention_dim": spec.cross_attention_dim or spec.hidden_size}
    said["gated"] = ACTIVATIONS[spec.activation_fn][0] == 8
    titles = {
        "hidden_size": "num_attention_heads * attention_head_dim",
        "gated": f"activation_fn {spec.activation_fn!r}, gated:",
    }
    for key, (value, witness) in found.items():
        if said[key] != value:
            raise OspError(
                f"config.json says {titles.get(key, key)} {said[key]!r}, the weights {value!r}: see {witness}"
            )


# ------------------------------------------------------------------------------------------------------ T2V to I2V

ZEROS, RANDOM = "zeros", "random"


def t2v_to_i2v(name: str) -> str:
    """Where an inpaint model that starts from a T2V checkpoint takes entry `name` from: a T2V name, ZEROS or RANDOM.

    The linear layers behind the two new stems are zero, so at the start the model is the T2V model. The stem for the
    masked latents is a copy of the T2V patch embedding; the one for the mask keeps its random initial values.
    """
    if name in (f"{MASKED_STEM}.1.weight", f"{MASK_STEM}.1.weight"):
        return ZEROS
    if name.startswith(f"{MASKED_STEM}.0."):
        return name.replace(f"{MASKED_STEM}.0", "pos_embed")
    if name.startswith(f"{MASK_STEM}.0."):
        return RANDOM
    return name
