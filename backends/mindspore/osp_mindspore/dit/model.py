"""The Skiparse diffusion transformer of Open-Sora Plan v1.3: text to video, and inpainting / image to video.

Shapes: B batch, C channels, T H W latent frames, rows and columns; N = t h w tokens, L text tokens, D hidden size.
Attribute paths are the released state dict's names, in its order.
"""

from __future__ import annotations

from functools import lru_cache

from osp_mindspore import kernels
from osp_mindspore.dit.modules import AdaLayerNormSingle, PatchEmbed2D, TextProjection, TransformerBlock
from osp_mindspore.layers import LayerNorm, Linear
from osp_shared.geometry import rope
from osp_shared.specs.dit import DiTSpec, InpaintSpec

import mindspore as ms
from mindspore import Parameter, Tensor, nn
from mindspore.common.initializer import Normal, initializer


def unpatchify(x_BNF, grid_thw, patch: int):
    """Features (dy, dx, channel), channel fastest, to pixels: (B, C, t, h patch, w patch)."""
    (t, h, w), B = grid_thw, x_BNF.shape[0]
    x = x_BNF.reshape(B, t, h, w, patch, patch, -1).permute(0, 6, 1, 2, 4, 3, 5)
    return x.reshape(B, -1, t, h * patch, w * patch)


@lru_cache(maxsize=8)
def rope_tables(grid_thw, head_dim: int, scale_thw, dtype):
    """(cos, sin), each (N, 3, head_dim / 6), on the device: made once for a shape."""
    pair = rope.tables(grid_thw, head_dim, scale_thw, str(dtype).lower())
    return tuple(Tensor(table.astype("float64")).astype(dtype) for table in pair)


class DiT(nn.Cell):
    """Denoiser of latents (B, in_channels, T, H, W); an odd last row or column is dropped.

    gradient_checkpointing: recompute each block in the backward pass (training mode only); changes no number.
    """

    def __init__(self, spec: DiTSpec):
        super().__init__()
        D = spec.hidden_size
        self.spec = spec
        self.gradient_checkpointing = False
        self.scale_shift_table = Parameter(initializer(Normal(D**-0.5), (2, D)), name="scale_shift_table")
        self.caption_projection = TextProjection(spec)
        self.pos_embed = PatchEmbed2D(spec.in_channels, spec)
        self.transformer_blocks = nn.CellList([TransformerBlock(spec, i) for i in range(spec.num_layers)])
        self.norm_out = LayerNorm(D, 1e-6, affine=False)
        self.proj_out = Linear(D, spec.patch_size**2 * spec.out_channels)
        self.adaln_single = AdaLayerNormSingle(D)

    def construct(self, hidden_BCTHW, timestep_B, text_B1LC, video_mask_BTHW=None, text_mask_B1L=None):
        """Model output (B, out_channels, T, h p, w p) in the parameters' dtype.

        text: (B, 1, L, caption_channels). Masks: 1 = visible; None = all visible. A token is visible when any cell of
        its patch is.

        Raises:
            OspError: shapes that do not fit the config or each other.
        """
        self.spec.check_inputs(hidden_BCTHW.shape, text_B1LC.shape)
        dtype = self.scale_shift_table.dtype
        grid = self.spec.token_grid(*hidden_BCTHW.shape[2:])
        video_bias, text_bias = self.key_biases(hidden_BCTHW.shape, text_B1LC.shape, video_mask_BTHW, text_mask_B1L)
        x_BND = self.embed(hidden_BCTHW.astype(dtype))
        emb_BD, modulation_B6D = self.adaln_single(timestep_B, dtype)
        y_BLD = self.caption_projection(text_B1LC.astype(dtype)).squeeze(1)
        angles = rope_tables(grid, self.spec.attention_head_dim, self.spec.rope_scale, dtype)
        for block in self.transformer_blocks:
            args = (x_BND, y_BLD, modulation_B6D, angles, video_bias[block.rule], text_bias)
            x_BND = ms.recompute(block, *args) if self._recomputes() else block(*args)
        return unpatchify(self.head(x_BND, emb_BD), grid, self.spec.patch_size)

    def embed(self, hidden_BCTHW):
        """Tokens (B, N, D)."""
        return self.pos_embed(hidden_BCTHW)

    def head(self, x_BND, emb_BD):
        """Patches (B, N, p p C) of the last block's tokens; modulated by the embedding before its activation."""
        shift, scale = (self.scale_shift_table + emb_BD.expand_dims(1)).chunk(2, 1)
        return self.proj_out(kernels.modulate(self.norm_out(x_BND), shift, scale))

    def key_biases(self, hidden_shape, text_shape, video_mask=None, text_mask=None):
        """Additive key biases: a dict by block rule, and one for the text; None wherever every key is visible."""
        masks = (None if m is None else m.astype(ms.float32).asnumpy() for m in (video_mask, text_mask))
        video, text = self.spec.key_biases(hidden_shape, text_shape, *masks)
        return {rule: self._constant(bias) for rule, bias in video.items()}, self._constant(text)

    def _constant(self, array):
        return None if array is None else Tensor(array).astype(self.scale_shift_table.dtype)

    def _recomputes(self) -> bool:
        return self.gradient_checkpointing and self.training


class MaskedStem(nn.CellList):
    """A patch embedding and a linear layer that starts at zero: what it adds is nothing before training."""

    def __init__(self, channels: int, spec: DiTSpec):
        linear = Linear(spec.hidden_size, spec.hidden_size, bias=False)
        linear.weight = Parameter(initializer("zeros", linear.weight.shape), name="weight")
        super().__init__([PatchEmbed2D(channels, spec), linear])

    def construct(self, x_BCTHW):
        embed, linear = self
        return linear(embed(x_BCTHW))


class InpaintDiT(DiT):
    """Input channels: noisy latents, latents of the masked video (in_channels each), and the mask folded in time.

    Mask values: 1 = to be generated, 0 = given.
    """

    def __init__(self, spec: InpaintSpec):
        super().__init__(spec)
        self.pos_embed_masked_hidden_states = MaskedStem(spec.in_channels, spec)
        self.pos_embed_mask = MaskedStem(spec.vae_scale_factor_t, spec)

    def embed(self, hidden_BCTHW):
        c = self.spec.in_channels
        x = self.pos_embed(hidden_BCTHW[:, :c])
        masked = self.pos_embed_masked_hidden_states(hidden_BCTHW[:, c : 2 * c])
        return x + masked + self.pos_embed_mask(hidden_BCTHW[:, 2 * c :])


def model_class(spec: DiTSpec) -> type[DiT]:
    return InpaintDiT if isinstance(spec, InpaintSpec) else DiT
