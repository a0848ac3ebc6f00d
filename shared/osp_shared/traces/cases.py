"""What is captured: a model, its configuration, its weights and its inputs, as numbers no framework is needed for.

A case is the same on every machine: weights and inputs come from the deterministic fill (or a checkpoint), so two
machines that never meet capture the same run.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from osp_shared import fill
from osp_shared.errors import OspError
from osp_shared.geometry.chunks import Tiling
from osp_shared.traces.format import Header, fingerprint

SHORT = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
LONG = {short: long for long, short in SHORT.items()}


@dataclass(frozen=True)
class Model:
    """Where a model stands in both backends: module and class inside the package, and the method that is traced."""

    module: str
    cls: str
    spec: str  # module:class inside osp_shared.specs
    entry: str = ""  # "" is the forward pass itself
    kernels: bool = True  # whether both backends compute it from their kernels
    common_only: bool = False  # a side is a library's own module tree: compare the modules that both have
    skip: tuple[str, ...] = ()  # of these, modules whose first arguments differ

    def spec_class(self):
        module, cls = self.spec.split(":")
        return getattr(importlib.import_module(f"osp_shared.specs.{module}"), cls)


MODELS = {
    "wfvae-encode": Model("wfvae.model", "WFVAEModel", "wfvae:WFVAESpec", "encode_scaled"),
    "wfvae-decode": Model("wfvae.model", "WFVAEModel", "wfvae:WFVAESpec", "decode_scaled"),
    "dit": Model("dit.model", "DiT", "dit:DiTSpec"),
    "inpaint": Model("dit.model", "InpaintDiT", "dit:InpaintSpec"),
    "dit-sampler": Model("dit.model", "DiT", "dit:DiTSpec"),
    "t5": Model("t5", "T5Encoder", "t5:T5Spec", kernels=False, common_only=True, skip=("encoder",)),
}


@dataclass(frozen=True)
class Case:
    """One captured run. `inputs` are the traced method's arguments in order; floating ones take the run's dtype."""

    name: str
    model: str
    config: Mapping[str, object]
    inputs: Mapping[str, np.ndarray | None]
    salt: str = ""
    read: Callable[[str], np.ndarray | None] | None = field(default=None, compare=False)
    weights: str = ""  # fingerprint, when `read` reads a checkpoint
    exact: tuple[str, ...] = ()  # inputs that stay float32 whatever the run's dtype
    options: Mapping[str, object] = field(default_factory=dict)  # other keyword arguments of the traced method

    @property
    def place(self) -> Model:
        return MODELS[self.model]

    def spec(self):
        return self.place.spec_class().from_config(self.config)

    def reader(self) -> Callable[[str], np.ndarray | None]:
        """state-dict name -> float32 array."""
        if self.read is not None:
            return self.read
        spec = self.spec()
        shapes = spec.parameters()
        constants = spec.constants() if hasattr(spec, "constants") else {}
        return lambda name: constants[name] if name in constants else fill.parameter(name, shapes[name], self.salt)

    def header(self, backend: str, dtype: str, **rest: object) -> Header:
        """Header of a trace of this case; fingerprints are of the float32 originals, whatever the run's dtype."""
        given = {k: v for k, v in self.inputs.items() if v is not None}
        if not self.weights:
            read, spec = self.reader(), self.spec()
            found = ((name, read(name)) for name in spec.parameters() if name not in spec.optional())
            object.__setattr__(self, "weights", fingerprint(found))
        options = {f"_{k}": str(v) for k, v in self.options.items()}
        return Header(
            self.model, {**self.config, **options}, self.weights, fingerprint(given.items()), backend, dtype,
            salt=self.salt, **rest,
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------------- tiny models

WFVAE_TINY = {
    "latent_dim": 8, "base_channels": 16, "encoder_energy_flow_hidden_size": 8, "decoder_energy_flow_hidden_size": 16,
    "encoder_num_resblocks": 1, "decoder_num_resblocks": 1, "norm_type": "layernorm", "t_interpolation": "trilinear",
    "connect_res_layer_num": 1,
}  # fmt: skip
WFVAE_GROUPS = {
    **WFVAE_TINY, "base_channels": 32, "encoder_energy_flow_hidden_size": 32, "decoder_energy_flow_hidden_size": 32,
    "norm_type": "groupnorm", "t_interpolation": "nearest",
}  # fmt: skip
DIT_TINY = {
    "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 8, "out_channels": 8, "num_layers": 5,
    "cross_attention_dim": 48, "attention_bias": True, "patch_size": 2, "patch_size_t": 1,
    "activation_fn": "gelu-approximate", "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 32,
    "sparse1d": True, "sparse_n": 2,
}  # fmt: skip


def wfvae(part: str, config: Mapping = WFVAE_TINY, size: tuple[int, int, int] = (9, 32, 40), salt: str = "") -> Case:
    """Encode (with posterior noise) or decode a video of `size` (frames, height, width)."""
    spec = MODELS[f"wfvae-{part}"].spec_class().from_config(config)
    latent = (1, spec.latent_dim, *spec.latent_size(*size))
    if part == "encode":
        video, noise = fill.input_tensor("video", (1, 3, *size), salt), fill.input_tensor("noise", latent, salt)
        inputs = {"video": video, "noise": noise}
    else:
        inputs = {"latents": fill.input_tensor("latents", latent, salt) * np.float32(0.18215)}
    suffix = "" if config["norm_type"] == "layernorm" else "-groupnorm"
    return Case(f"wfvae-{part}{suffix}", f"wfvae-{part}", dict(config), inputs, salt)


def wfvae_tiled(salt: str = "") -> Case:
    """Decoding in the temporal chunks of the original, with their caches: 5 latent frames, two a chunk."""
    case = wfvae("decode", size=(17, 16, 16), salt=salt)
    return dataclasses.replace(case, name="wfvae-decode-tiled", options={"plan": Tiling()})


def dit(
    inpaint: bool = False, size: tuple[int, int, int] = (3, 6, 8), tokens: int = 7, salt: str = "", **changes: object
) -> Case:
    """One denoising call: latents of `size` (frames, height, width), a text of `tokens`, part of both masked."""
    config = {**DIT_TINY, **changes}
    c = int(config["in_channels"])
    channels = c
    if inpaint:
        config["vae_scale_factor_t"] = 4
        channels = 2 * c + 4
    video_mask = np.ones((2, *size), np.float32)
    video_mask[1, :, :, -2:] = 0
    text_mask = np.ones((2, 1, tokens), np.float32)
    text_mask[0, :, -3:] = 0
    inputs = {
        "latents": fill.input_tensor("latents", (2, channels, *size), salt),
        "timestep": np.array([999.0, 7.0], np.float32),
        "text": fill.input_tensor("text", (2, 1, tokens, int(config["caption_channels"])), salt),
        "video_mask": video_mask,
        "text_mask": text_mask,
    }
    return Case("inpaint" if inpaint else "dit", "inpaint" if inpaint else "dit", config, inputs, salt)


def sampler(
    method: str = "EulerAncestralDiscrete", steps: int = 3, salt: str = "", size: tuple[int, int, int] = (2, 4, 4),
    **changes: object,
) -> Case:  # fmt: skip
    """A guided sampling run: the model's text and mask of both halves, and options of the request."""
    case = dit(size=size, tokens=5, salt=salt, **(changes or {"num_layers": 3}))
    inputs = {
        "text": fill.input_tensor("sampler-text", (2, 5, int(case.config["caption_channels"])), salt),
        "text_mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], np.int64),
    }
    request = {
        "sample_method": method, "num_sampling_steps": steps, "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True, "guidance_scale": 7.5,
        "num_frames": 4 * (size[0] - 1) + 1, "height": 8 * size[1], "width": 8 * size[2],
    }  # fmt: skip
    return dataclasses.replace(case, name="dit-sampler", model="dit-sampler", inputs=inputs, options=request)


def require(name: str) -> Model:
    """The model of that name, or OspError naming those there are."""
    if name not in MODELS:
        raise OspError(f"no model {name!r} to trace; one of {', '.join(MODELS)}")
    return MODELS[name]


def with_changes(case: Case, **changes: object) -> Case:
    return dataclasses.replace(case, **changes)


T5_TINY = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def t5(config: Mapping = T5_TINY, tokens: int = 40, salt: str = "") -> Case:
    """Two prompts of `tokens` ids, the second one padded."""
    ids = fill.rng("input:ids", salt).integers(2, int(config["vocab_size"]), (2, tokens))
    mask = np.ones((2, tokens), np.int64)
    ids[1, tokens // 2 :], mask[1, tokens // 2 :] = 0, 0
    return Case("t5", "t5", dict(config), {"ids": ids.astype(np.int64), "mask": mask}, salt)


def default_case(model: str, config: Mapping | None, size: tuple[int, int, int] | None, salt: str) -> Case:
    """The case of a model's name: the tiny configuration unless one is given, small inputs unless a size is."""
    place = {"size": size} if size is not None else {}
    if model.startswith("wfvae"):
        return wfvae(model.removeprefix("wfvae-"), config or WFVAE_TINY, salt=salt, **place)
    if model == "t5":
        if size is not None:
            raise OspError("--size: a text encoder takes tokens, not a video")
        return t5(config or T5_TINY, salt=salt)
    if model == "dit-sampler":
        return sampler(salt=salt, **place, **(config or {}))
    return dit(model == "inpaint", salt=salt, **place, **(config or {}))
