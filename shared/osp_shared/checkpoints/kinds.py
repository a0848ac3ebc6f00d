"""The models that checkpoints hold: how to recognise one, its spec, and what loads it."""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from osp_shared.checkpoints import fingerprint


@dataclass(frozen=True)
class Kind:
    """`markers`: a pattern for each tensor that must be there. `constants`: names that are no part of the content,
    because they are constants or copies. `stem`: usual file name. `loader`: what takes such a checkpoint."""

    name: str
    title: str
    markers: tuple[str, ...]
    constants: str
    stem: str
    spec_class: str
    loader: str

    def spec(self) -> Any:
        """The class of the model's spec (`WFVAESpec`, ...)."""
        module, _, name = self.spec_class.rpartition(".")
        return getattr(importlib.import_module(f"osp_shared.specs.{module}"), name)

    def is_constant(self, name: str) -> bool:
        return re.search(self.constants, name) is not None


_NONE = r"(?!)"
_DIT = (r"transformer_blocks\.0\.attn1\.to_q\.weight", r"adaln_single\.linear\.weight")
_STEM = "diffusion_pytorch_model"
KINDS = (
    Kind(
        "wfvae", "WFVAE video autoencoder", (r"encoder\.down1\.0\.weight", r"decoder\.conv_in\.conv\.weight"),
        r"wavelet_transform", _STEM, "wfvae.WFVAESpec", "--ae_path of osp sample, rec-video (-folder), rec-image",
    ),
    Kind(
        "inpaint", "inpaint / image-to-video diffusion transformer",
        (*_DIT, r"pos_embed_masked_hidden_states\.1\.weight"), _NONE, _STEM, "dit.InpaintSpec",
        "--model_path of osp sample",
    ),
    Kind(
        "dit", "text-to-video diffusion transformer", _DIT, _NONE, _STEM, "dit.DiTSpec",
        "--model_path of osp sample",
    ),
    Kind(
        "t5", "T5 / mT5 text encoder", (r"encoder\.block\.0\.layer\.0\.SelfAttention\.q\.weight",),
        r"^encoder\.embed_tokens\.weight$", "model", "t5.T5Spec", "--text_encoder_name_1 of osp sample",
    ),
    Kind(
        "llama", "LLaMA-style caption refiner", (r"model\.layers\.0\.self_attn\.q_proj\.weight",),
        _NONE, "model", "auxiliary.LlamaSpec", "no command yet; osp convert checks and converts it",
    ),
    Kind(
        "discriminator", "3-D patch discriminator", (r"(discriminator\.)?main\.0\.weight",), r"num_batches_tracked$",
        _STEM, "auxiliary.DiscriminatorSpec", "no command yet; osp convert checks and converts it",
    ),
    Kind(
        "lpips", "LPIPS with VGG-16", (r"(\w+\.)?(lin[0-4](\.model)?(\.\d)?|(net\.)?(model\.)?features\.0)\.weight",),
        r"^scaling_layer\.", _STEM, "auxiliary.LPIPSSpec", "no command yet; osp convert checks and converts it",
    ),
)  # fmt: skip
BY_NAME: Mapping[str, Kind] = {kind.name: kind for kind in KINDS}


def detect(names: Collection[str]) -> Kind | None:
    """The model that these names (without wrappers) belong to, or None."""
    for kind in KINDS:
        if all(any(re.fullmatch(marker, name) for name in names) for marker in kind.markers):
            return kind
    return None


def set_fingerprint(digests: Mapping[str, str]) -> str:
    """Fingerprint of a model from its tensors' fingerprints by canonical name, without constants and copies."""
    kind = detect(digests)
    return fingerprint.of_set({n: d for n, d in digests.items() if kind is None or not kind.is_constant(n)})
