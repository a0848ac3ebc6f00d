"""Specs of the networks around the three models: the losses' discriminator and LPIPS, and the caption refiner.

Discriminator: 3-D PatchGAN (Isola et al. 2017). LPIPS: Zhang et al. 2018 on VGG-16. Refiner: a LLaMA-style causal
language model (Touvron et al. 2023), for checking a checkpoint only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from osp_shared.errors import OspError
from osp_shared.specs import fields

Shapes = Mapping[str, tuple[int, ...]]


class _Spec:
    """What the specs below share: strict configs, name and shape checks, counting."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]):
        return fields.from_config(cls, config)

    @classmethod
    def from_folder(cls, path):
        return fields.from_folder(cls, path)

    def to_config(self) -> dict[str, Any]:
        return {"_class_name": type(self).__name__.removesuffix("Spec"), **fields.to_config(self)}

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(s) for n, s in self.parameters().items() if n not in self.optional())

    def check(self, shapes: Shapes) -> None:
        """Raises OspError naming what is missing, unexpected or of another shape."""
        fields.check_shapes(type(self).__name__.removesuffix("Spec"), self.parameters(), shapes, self.optional())

    @classmethod
    def _agree(cls, found: dict[str, tuple[Any, str]], config: Mapping[str, Any] | None):
        """Spec of a topology {field: (value, witness)}; a config that says something else is an error."""
        if config is None:
            return cls(**{key: value for key, (value, _) in found.items()})
        spec = cls.from_config(config)
        for key, (value, witness) in found.items():
            if getattr(spec, key) != value:
                raise OspError(f"config.json says {key} {getattr(spec, key)!r}, the weights {value!r}: see {witness}")
        return spec


def _need(shapes: Shapes, name: str, what: str, rank: int) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != rank:
        raise OspError(f"not the weights of {what}: no tensor {name} with {rank} axes")
    return tuple(shapes[name])


# ------------------------------------------------------------------------------------------------ discriminator


@dataclass(frozen=True)
class DiscriminatorSpec(_Spec):
    """Entries `main.<i>`: convolution, then n_layers x (convolution, batch norm), then the convolution to one map.

    ndf: width of the first layer; width i is ndf * min(2^i, 8). n_layers: 4 upstream, 3 in the earlier MindSpore port.
    """

    in_channels: int = 3
    ndf: int = 64
    n_layers: int = 4

    def widths(self) -> tuple[int, ...]:
        return tuple(self.ndf * min(2**i, 8) for i in range(self.n_layers + 1))

    def parameters(self) -> dict[str, tuple[int, ...]]:
        widths, kernel = self.widths(), (3, 3, 3)
        entries = {"main.0.weight": (self.ndf, self.in_channels, *kernel), "main.0.bias": (self.ndf,)}
        for i, (cin, out) in enumerate(zip(widths, widths[1:], strict=False)):
            conv, norm = 3 * i + 2, 3 * i + 3
            entries[f"main.{conv}.weight"] = (out, cin, *kernel)
            entries |= {f"main.{norm}.{leaf}": (out,) for leaf in ("weight", "bias", "running_mean", "running_var")}
            entries[f"main.{norm}.num_batches_tracked"] = ()
        last = 3 * self.n_layers + 2
        return entries | {f"main.{last}.weight": (1, widths[-1], *kernel), f"main.{last}.bias": (1,)}

    def optional(self) -> frozenset[str]:
        """Batch counters, which MindSpore does not have."""
        return frozenset(n for n in self.parameters() if n.endswith(".num_batches_tracked"))

    @property
    def parameter_count(self) -> int:
        """Trained numbers: running statistics are not among them."""
        return sum(math.prod(s) for n, s in self.parameters().items() if n.endswith((".weight", ".bias")))

    @classmethod
    def derive(cls, shapes: Shapes, config: Mapping[str, Any] | None = None) -> DiscriminatorSpec:
        first = "main.0.weight"
        ndf, channels, *_ = _need(shapes, first, "the discriminator", 5)
        norms = [n for n in shapes if re.fullmatch(r"main\.\d{1,4}\.running_mean", n)]
        witness = max(norms, key=lambda n: int(n.split(".")[1]), default="main.2.weight")
        found = {"in_channels": (channels, first), "ndf": (ndf, first), "n_layers": (len(norms), witness)}
        return cls._agree(found, config)


# ------------------------------------------------------------------------------------------------ LPIPS

# slice -> the convolutions in it: (index in VGG-16's feature stack, input channels, output channels)
VGG_SLICES = {
    1: ((0, 3, 64), (2, 64, 64)),
    2: ((5, 64, 128), (7, 128, 128)),
    3: ((10, 128, 256), (12, 256, 256), (14, 256, 256)),
    4: ((17, 256, 512), (19, 512, 512), (21, 512, 512)),
    5: ((24, 512, 512), (26, 512, 512), (28, 512, 512)),
}
VGG_WIDTHS = (64, 128, 256, 512, 512)
VGG_FIRST = {1: 0, 2: 4, 3: 9, 4: 16, 5: 23}  # slice -> index of its first layer in the feature stack


@dataclass(frozen=True)
class LPIPSSpec(_Spec):
    """VGG-16's convolutions `net.slice<s>.<index>` and the five linear heads `lin<k>.model.1`.

    width: divisor of every width, 1 for the published network; tests use a narrow one.
    """

    width: int = 1

    def parameters(self) -> dict[str, tuple[int, ...]]:
        entries = {"scaling_layer.shift": (1, 3, 1, 1), "scaling_layer.scale": (1, 3, 1, 1)}
        for s, convolutions in VGG_SLICES.items():
            for i, cin, out in convolutions:
                cin = cin if cin == 3 else cin // self.width
                entries[f"net.slice{s}.{i}.weight"] = (out // self.width, cin, 3, 3)
                entries[f"net.slice{s}.{i}.bias"] = (out // self.width,)
        return entries | {f"lin{k}.model.1.weight": (1, c // self.width, 1, 1) for k, c in enumerate(VGG_WIDTHS)}

    def optional(self) -> frozenset[str]:
        """Constants of the input scaling."""
        return frozenset(n for n in self.parameters() if n.startswith("scaling_layer."))

    @classmethod
    def derive(cls, shapes: Shapes, config: Mapping[str, Any] | None = None) -> LPIPSSpec:
        first = "net.slice1.0.weight"
        out = _need(shapes, first, "LPIPS with VGG-16", 4)[0]
        if out < 1 or 64 % out:
            raise OspError(f"not the weights of LPIPS with VGG-16: {first} has {out} rows instead of 64")
        return cls._agree({"width": (64 // out, first)}, config)


# ------------------------------------------------------------------------------------------------ refiner


@dataclass(frozen=True)
class LlamaSpec(_Spec):
    """The sizes that decide names and shapes; the other keys of a LLaMA config.json are left to the library."""

    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    attention_size: int = 4096
    key_value_size: int = 1024
    tie_word_embeddings: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LlamaSpec:
        """From a transformers config.json; sizes of the projections are heads times head width."""
        try:
            heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
            head = int(config.get("head_dim") or hidden // heads)
            return cls(
                int(config["vocab_size"]), hidden, int(config["intermediate_size"]), int(config["num_hidden_layers"]),
                heads * head, int(config.get("num_key_value_heads") or heads) * head,
                bool(config.get("tie_word_embeddings", False)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            raise OspError(f"config.json of the refiner: missing or impossible {e}") from None

    def parameters(self) -> dict[str, tuple[int, ...]]:
        h, a, k, m = self.hidden_size, self.attention_size, self.key_value_size, self.intermediate_size
        entries: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for i in range(self.num_hidden_layers):
            block = f"model.layers.{i}"
            for part, shape in (("q", (a, h)), ("k", (k, h)), ("v", (k, h)), ("o", (h, a))):
                entries[f"{block}.self_attn.{part}_proj.weight"] = shape
            for part, shape in (("gate", (m, h)), ("up", (m, h)), ("down", (h, m))):
                entries[f"{block}.mlp.{part}_proj.weight"] = shape
            entries[f"{block}.input_layernorm.weight"] = (h,)
            entries[f"{block}.post_attention_layernorm.weight"] = (h,)
        return entries | {"model.norm.weight": (h,), "lm_head.weight": (self.vocab_size, h)}

    def optional(self) -> frozenset[str]:
        """The output matrix when it is the embedding."""
        return frozenset({"lm_head.weight"} if self.tie_word_embeddings else ())

    @classmethod
    def derive(cls, shapes: Shapes, config: Mapping[str, Any] | None = None) -> LlamaSpec:
        table, block = "model.embed_tokens.weight", "model.layers.0"
        vocab, hidden = _need(shapes, table, "a LLaMA-style model", 2)
        q, k, m = f"{block}.self_attn.q_proj.weight", f"{block}.self_attn.k_proj.weight", f"{block}.mlp.up_proj.weight"
        layers = [n for n in shapes if re.fullmatch(r"model\.layers\.\d{1,4}\.input_layernorm\.weight", n)]
        last = max(layers, key=lambda n: int(n.split(".")[2]), default=table)
        found = {
            "vocab_size": (vocab, table),
            "hidden_size": (hidden, table),
            "intermediate_size": (_need(shapes, m, "a LLaMA-style model", 2)[0], m),
            "num_hidden_layers": (len(layers), last),
            "attention_size": (_need(shapes, q, "a LLaMA-style model", 2)[0], q),
            "key_value_size": (_need(shapes, k, "a LLaMA-style model", 2)[0], k),
        }
        if config is None:
            found["tie_word_embeddings"] = ("lm_head.weight" not in shapes, "lm_head.weight")
        return cls._agree(found, config)
