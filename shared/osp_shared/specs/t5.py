"""The T5 / mT5 text encoder (v1.1 form: gated GELU, no biases): config keys and every encoder entry.

Only the encoder is used: decoder keys of a full checkpoint are allowed and ignored, as are config keys that concern
the decoder, generation or a tokeniser.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from osp_shared.errors import OspError
from osp_shared.specs import fields

ALIAS = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
_ATTENTION = "layer.0.SelfAttention"
_FEED_FORWARD = "layer.1.DenseReluDense"
_BUCKETS = f"encoder.block.0.{_ATTENTION}.relative_attention_bias.weight"


@dataclass(frozen=True)
class T5Spec:
    """Config keys with the library's defaults, except that v1.1's gated GELU is the only feed-forward form.

    Raises:
        OspError: another feed-forward form (T5 v1.0 has `wi` instead of `wi_0` and `wi_1`).
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def __post_init__(self):
        if self.feed_forward_proj != "gated-gelu":
            form = self.feed_forward_proj
            raise OspError(f"T5 config: feed_forward_proj is {form!r}, must be 'gated-gelu' (mT5, T5 v1.1)")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> T5Spec:
        """The spec of a transformers config; keys of other parts are skipped."""
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in known})

    @classmethod
    def from_folder(cls, path) -> T5Spec:
        return fields.from_folder(cls, path)

    def to_config(self) -> dict[str, Any]:
        return {"architectures": ["T5EncoderModel"], "model_type": "t5", **fields.to_config(self)}

    @property
    def inner_size(self) -> int:
        """Width of all heads together; not always d_model."""
        return self.num_heads * self.d_kv

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every entry, in released order."""
        D, inner, F = self.d_model, self.inner_size, self.d_ff
        found: dict[str, tuple[int, ...]] = {"shared.weight": (self.vocab_size, D)}
        for i in range(self.num_layers):
            block = f"encoder.block.{i}"
            for part, shape in (("q", (inner, D)), ("k", (inner, D)), ("v", (inner, D)), ("o", (D, inner))):
                found[f"{block}.{_ATTENTION}.{part}.weight"] = shape
            if i == 0:
                found[_BUCKETS] = (self.relative_attention_num_buckets, self.num_heads)
            found[f"{block}.layer.0.layer_norm.weight"] = (D,)
            for part, shape in (("wi_0", (F, D)), ("wi_1", (F, D)), ("wo", (D, F))):
                found[f"{block}.{_FEED_FORWARD}.{part}.weight"] = shape
            found[f"{block}.layer.1.layer_norm.weight"] = (D,)
        found["encoder.final_layer_norm.weight"] = (D,)
        return found

    def optional(self) -> frozenset[str]:
        return frozenset()

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(shape) for shape in self.parameters().values())

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare a checkpoint's shapes with this spec; decoder keys and the alias may be there.

        Raises:
            OspError: names that are missing, unexpected or of another shape.
        """
        ignored = [n for n in shapes if n.startswith("decoder.") or n in (ALIAS, "lm_head.weight")]
        fields.check_shapes("T5 encoder", self.parameters(), shapes, ignored=ignored)

    @classmethod
    def derive(cls, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None) -> T5Spec:
        """Topology of a checkpoint by its own keys; the rest (norm eps, largest distance) from `config`.

        Raises:
            OspError: not a gated T5 encoder, or a config that says something else than the weights.
        """
        found = _topology(shapes)
        values = {key: value for key, (value, _) in found.items()}
        if config is None:
            return cls(**values)
        spec = cls.from_config(config)
        for key, (value, witness) in found.items():
            if getattr(spec, key) != value:
                raise OspError(f"config.json says {key} {getattr(spec, key)}, the weights {value}: see {witness}")
        return spec


def _topology(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, str]]:
    """Config key -> (value, the tensor that shows it)."""
    q, wi = f"encoder.block.0.{_ATTENTION}.q.weight", f"encoder.block.0.{_FEED_FORWARD}.wi_0.weight"
    for name in ("shared.weight", q, wi, _BUCKETS):
        if len(shapes.get(name, ())) != 2:
            raise OspError(f"not the weights of a gated T5 encoder (mT5, T5 v1.1): no matrix {name}")
    blocks = {n.split(".")[2] for n in shapes if n.startswith("encoder.block.")}
    last = len(blocks) - 1  # a count, so that no number inside a name decides how long the list gets
    buckets, heads = shapes[_BUCKETS]
    if not heads:
        raise OspError(f"not the weights of a gated T5 encoder (mT5, T5 v1.1): {_BUCKETS} is empty")
    return {
        "vocab_size": (shapes["shared.weight"][0], "shared.weight"),
        "d_model": (shapes["shared.weight"][1], "shared.weight"),
        "num_layers": (last + 1, f"encoder.block.{last}"),
        "relative_attention_num_buckets": (buckets, _BUCKETS),
        "num_heads": (heads, _BUCKETS),
        "d_kv": (shapes[q][0] // heads, q),
        "d_ff": (shapes[wi][0], wi),
    }


RELEASED = T5Spec(  # mT5-xxl
    vocab_size=250112, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, dropout_rate=0.1
)  # fmt: skip
