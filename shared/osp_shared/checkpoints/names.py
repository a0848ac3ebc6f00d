"""Every name that differs between frameworks, trainers and releases, in one place, used both ways.

The canonical names are those of the released torch state dicts. Reading turns whatever a file uses into them; writing
for MindSpore turns them into the names that MindSpore's own layers have.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from osp_shared.errors import OspError
from osp_shared.specs.auxiliary import VGG_FIRST, VGG_SLICES

# Parameter names of MindSpore's nn layers and of torch's.
NORM = (("gamma", "weight"), ("beta", "bias"))
BATCH_NORM = (*NORM, ("moving_mean", "running_mean"), ("moving_variance", "running_var"))
EMBEDDING = (("embedding_table", "weight"),)
_TO_TORCH = dict((*BATCH_NORM, *EMBEDDING))

# Which layers of each model those are in MindSpore: parents of a parameter, and the table that renames it.
_MINDSPORE_LAYERS: dict[str, tuple[tuple[str, tuple[tuple[str, str], ...]], ...]] = {
    "wfvae": ((r".*\.norm(\d|_out)?", NORM),),  # group norms; the layer norms are a level deeper, see to_mindspore
    "dit": ((r".*\.norm[12]", NORM),),
    "inpaint": ((r".*\.norm[12]", NORM),),
    "t5": ((r"shared|encoder\.embed_tokens|.*\.relative_attention_bias", EMBEDDING),),
    "llama": ((r"model\.embed_tokens", EMBEDDING),),
    "discriminator": ((r"main\.\d+", BATCH_NORM),),  # of these, the ones with running statistics
    "lpips": (),
}

# Prefixes that trainers and wrappers put before a model's own names.
WRAPPERS = ("module.", "network.", "autoencoder.", "_orig_mod.")
_WRAPPER = re.compile("(?:" + "|".join(re.escape(w) for w in WRAPPERS) + ")+")
_ANYWHERE = "_backbone."  # inserted by MindSpore's cell wrappers at any level

# What a training checkpoint holds beside weights: optimiser moments, EMA copies, counters.
_TRAINING_STATE = re.compile(
    r"(?:moments?\d?|adam_[mv]|exp_avg(?:_sq)?|accum(?:ulation)?|accu_grads|ema|swap|learning_rate|optimizer)\..*"
    r"|(?:learning_rate|global_step|current_iterator_step|last_overflow_iterator_step|epoch_num|cur_step|step"
    r"|beta[12]_power|loss_scale|scale_sense|ema_step|updates|state_step|train_step)"
)
# What a trainer adds to the config of its EMA model: the average's bookkeeping, no part of the model.
EMA_CONFIG = frozenset(
    ("decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power")
)

_LPIPS_HEAD = re.compile(r"(?:perceptual_loss\.|lpips\.)?lin([0-4])(?:\.model)?(?:\.\d)?\.weight")
_LPIPS_SLICE = re.compile(r"(?:perceptual_loss\.|lpips\.)?net\.(?:model\.)?slice([1-5])\.(\d{1,2})\.(weight|bias)")
_VGG = re.compile(r"(?:perceptual_loss\.)?(?:net\.)?(?:model\.)?features\.(\d{1,2})\.(weight|bias)")
_HAAR_2D_INVERSE = re.compile(r"(decoder\.inverse_wavelet_transform_l1\.(?:aa|ad|da|dd))\.weight")
_VGG_INDEX = {i: s for s, convolutions in VGG_SLICES.items() for i, _, _ in convolutions}


@dataclass
class Renamed:
    """`names`: canonical name -> name in the file. `dropped`: reason -> number of tensors left out."""

    names: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1


def common(name: str) -> str | None:
    """Without wrappers and in torch's spelling; None for training state."""
    name = name.replace(_ANYWHERE, "")
    if wrapped := _WRAPPER.match(name):
        name = name[wrapped.end() :]
    if _TRAINING_STATE.fullmatch(name):
        return None
    parent, dot, leaf = name.rpartition(".")
    return parent + dot + _TO_TORCH.get(leaf, leaf)


def canonical(names: Iterable[str], kind: str | None, path) -> Renamed:
    """Canonical names of a model of `kind` (None, an unknown model: as they are). OspError when two names meet."""
    names, result = list(names), Renamed()
    if kind is None:
        return Renamed({name: name for name in names})
    aliases = kind == "t5" and {common(n) for n in names} >= {"shared.weight", "encoder.embed_tokens.weight"}
    for raw in names:
        name = common(raw)
        if name is None:
            result.drop("training state")
            continue
        name, reason = _OF_KIND.get(kind, _unchanged)(name)
        if aliases and name == "shared.weight" and common(raw) != name:
            name, reason = "encoder.embed_tokens.weight", ""
        if name is None:
            result.drop(reason)
            continue
        if name in result.names:
            raise OspError(f"{path}: {result.names[name]} and {raw} are both the tensor {name}")
        result.names[name] = raw
    return result


def _unchanged(name: str) -> tuple[str | None, str]:
    return name, ""


def _wfvae(name: str) -> tuple[str | None, str]:
    name = name.replace("wavelet_tranform", "wavelet_transform")  # the spelling of the releases up to v1.3.1
    if port := _HAAR_2D_INVERSE.fullmatch(name):
        name = port[1]  # in the earlier MindSpore port a transposed convolution holds this filter
    return name, ""


def _t5(name: str) -> tuple[str | None, str]:
    if name.startswith("decoder.") or name.startswith("lm_head."):
        return None, "decoder tensors"
    return ("shared.weight" if name == "encoder.embed_tokens.weight" else name), ""


def _llama(name: str) -> tuple[str | None, str]:
    if name.endswith(".rotary_emb.inv_freq"):
        return None, "rotary tables"
    return name, ""


def _discriminator(name: str) -> tuple[str | None, str]:
    if name.startswith("discriminator."):
        return name.removeprefix("discriminator."), ""
    if name == "logvar" or name.startswith(("perceptual_loss.", "encoder.", "decoder.")):
        return None, "tensors of other networks"
    return name, ""


def _lpips(name: str) -> tuple[str | None, str]:
    """Heads `lin<k>`, slices with indices of the whole feature stack or counted from each slice, or plain VGG-16."""
    if head := _LPIPS_HEAD.fullmatch(name):
        return f"lin{head[1]}.model.1.weight", ""
    if cut := _LPIPS_SLICE.fullmatch(name):
        s, i = int(cut[1]), int(cut[2])
        i = i if _VGG_INDEX.get(i) == s else i + VGG_FIRST[s]
        return f"net.slice{s}.{i}.{cut[3]}", ""
    if plain := _VGG.fullmatch(name):
        i = int(plain[1])
        return f"net.slice{_VGG_INDEX.get(i, 0)}.{i}.{plain[2]}", ""
    if name.startswith(("classifier.", "net.classifier.", "lins.")):
        return None, "tensors that LPIPS does not use"
    if name == "logvar" or name.startswith(("discriminator.", "encoder.", "decoder.")):
        return None, "tensors of other networks"
    return name.removeprefix("perceptual_loss."), ""


_OF_KIND = {"wfvae": _wfvae, "t5": _t5, "llama": _llama, "discriminator": _discriminator, "lpips": _lpips}


def to_mindspore(names: Collection[str], kind: str) -> dict[str, str]:
    """Canonical name -> the name that MindSpore's layers give it; `canonical` is the way back."""
    layer_norm = kind == "wfvae" and "encoder.norm_out.norm.weight" in names  # keeps weight and bias in MindSpore
    rules = [] if layer_norm else [(re.compile(p), {t: m for m, t in table}) for p, table in _MINDSPORE_LAYERS[kind]]
    statistics = {n.removesuffix(".running_mean") for n in names if n.endswith(".running_mean")}
    renamed = {}
    for name in names:
        parent, dot, leaf = name.rpartition(".")
        for pattern, table in rules:
            if pattern.fullmatch(parent) and (kind != "discriminator" or parent in statistics):
                leaf = table.get(leaf, leaf)
                break
        renamed[name] = parent + dot + leaf
    return renamed
