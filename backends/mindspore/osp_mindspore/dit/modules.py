"""Layers of the Skiparse diffusion transformer.

Shapes: B batch, C channels, T H W latent frames, rows and columns; N = t h w tokens, L text tokens, D hidden size,
A heads, d head width; n sub-sequences of S entries. A rule is an `osp_shared.geometry.skiparse.Skiparse`.
"""

from __future__ import annotations

from osp_mindspore import kernels
from osp_mindspore.layers import Conv2d, LayerNorm, Linear
from osp_shared.geometry.skiparse import Skiparse
from osp_shared.geometry.timestep import sinusoid
from osp_shared.specs.dit import ACTIVATIONS, TIME_CHANNELS, DiTSpec

import mindspore as ms
from mindspore import Parameter, Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer

# ------------------------------------------------------------------------------------------------------------ stems


class PatchEmbed2D(nn.Cell):
    """Patches of every frame: (B, C, T, H, W) -> (B, N, D). Positions come from RoPE, not from here."""

    def __init__(self, channels: int, spec: DiTSpec):
        super().__init__()
        self.proj = Conv2d(channels, spec.hidden_size, spec.patch_size, stride=spec.patch_size)

    def construct(self, x_BCTHW):
        B, C, T, H, W = x_BCTHW.shape
        patches = self.proj(x_BCTHW.swapaxes(1, 2).reshape(B * T, C, H, W))
        return patches.reshape(B, T, patches.shape[1], -1).swapaxes(2, 3).reshape(B, -1, patches.shape[1])


class Timesteps(nn.Cell):
    """(B,) -> (B, 256) in `dtype`, cosines first."""

    def construct(self, timestep_B, dtype):
        table = sinusoid(timestep_B.astype(ms.float32).asnumpy(), TIME_CHANNELS)
        return Tensor(table).astype(dtype)


class TimestepEmbedding(nn.Cell):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = Linear(TIME_CHANNELS, width)
        self.linear_2 = Linear(width, width)

    def construct(self, x_BC):
        return self.linear_2(kernels.silu(self.linear_1(x_BC)))


class TimestepProjection(nn.Cell):
    def __init__(self, width: int):
        super().__init__()
        self.time_proj = Timesteps()
        self.timestep_embedder = TimestepEmbedding(width)

    def construct(self, timestep_B, dtype):
        return self.timestep_embedder(self.time_proj(timestep_B, dtype))


class AdaLayerNormSingle(nn.Cell):
    """One modulation for all blocks (PixArt-alpha, Chen et al. 2023)."""

    def __init__(self, width: int):
        super().__init__()
        self.emb = TimestepProjection(width)
        self.linear = Linear(width, 6 * width)

    def construct(self, timestep_B, dtype):
        """Embedding (B, D) for the head, and modulation (B, 6, D) for the blocks."""
        emb_BD = self.emb(timestep_B, dtype)
        return emb_BD, self.linear(kernels.silu(emb_BD)).reshape(emb_BD.shape[0], 6, -1)


class TextProjection(nn.Cell):
    """(B, 1, L, C) -> (B, 1, L, D); padding tokens are projected too, the mask hides them."""

    def __init__(self, spec: DiTSpec):
        super().__init__()
        self.linear_1 = Linear(spec.caption_channels, spec.hidden_size)
        self.linear_2 = Linear(spec.hidden_size, spec.hidden_size)

    def construct(self, x_B1LC):
        return self.linear_2(kernels.gelu_tanh(self.linear_1(x_B1LC)))


# ------------------------------------------------------------------------------------------------------ feed forward


class Activation(nn.Cell):
    """The first linear of the feed forward and what follows it, by the config's `activation_fn`."""

    def __init__(self, spec: DiTSpec):
        super().__init__()
        self.kind = spec.activation_fn
        self.proj = Linear(spec.hidden_size, ACTIVATIONS[self.kind][0] * spec.hidden_size)

    def construct(self, x_BND):
        h = self.proj(x_BND)
        if self.kind == "gelu-approximate":
            return kernels.gelu_tanh(h)
        if self.kind == "gelu":
            return kernels.gelu_erf(h)
        if self.kind == "geglu-approximate":  # h sigmoid(1.702 h); not gated, despite its name
            return kernels.silu(h * 1.702) / 1.702
        value, gate = h.chunk(2, -1)
        return value * (kernels.gelu_erf(gate) if self.kind == "geglu" else kernels.silu(gate))


class FeedForward(nn.Cell):
    def __init__(self, spec: DiTSpec):
        super().__init__()
        inner = ACTIVATIONS[spec.activation_fn][1] * spec.hidden_size
        self.net = nn.CellList(
            [Activation(spec), nn.Dropout(p=spec.dropout), Linear(inner, spec.hidden_size)]
        )

    def construct(self, x_BND):
        for layer in self.net:
            x_BND = layer(x_BND)
        return x_BND


# --------------------------------------------------------------------------------------------------------- attention


HEADS_FIRST = (0, 2, 1, 3)  # its own inverse


def split(x_BNAd, rule: Skiparse):
    """Heads and sub-sequences into the batch: (n B, A, S, d), zeros for pads, sub-sequence slowest."""
    if rule.n == 1:
        return kernels.permute(x_BNAd, HEADS_FIRST)
    B, N, A, d = x_BNAd.shape
    if rule.padding(N):
        x_BNAd = ops.cat((x_BNAd, ops.zeros((B, rule.padding(N), A, d), x_BNAd.dtype)), 1)
    outer, n, inner = rule.factors(N)
    parts = kernels.permute(x_BNAd.reshape(B, outer, n, inner, A, d), (2, 0, 4, 1, 3, 5))
    return parts.reshape(n * B, A, outer * inner, d)


def merge(x_XASd, rule: Skiparse, N: int):
    """The inverse of `split`, pads dropped, heads joined: (B, N, A d)."""
    X, A, S, d = x_XASd.shape
    if rule.n == 1:
        return kernels.permute(x_XASd, HEADS_FIRST).reshape(X, N, A * d)
    outer, n, inner = rule.factors(N)
    parts = kernels.permute(x_XASd.reshape(n, X // n, A, outer, inner, d), (1, 3, 0, 4, 2, 5))
    joined = parts.reshape(X // n, S * n, A * d)
    return joined[:, :N] if rule.padding(N) else joined


class Attention(nn.Cell):
    """Projections of queries, keys and values, and of the result."""

    def __init__(self, spec: DiTSpec):
        super().__init__()
        D = spec.hidden_size
        self.heads, self.scale = spec.num_attention_heads, spec.attention_head_dim**-0.5
        self.to_q = Linear(D, D, spec.attention_bias)
        self.to_k = Linear(D, D, spec.attention_bias)
        self.to_v = Linear(D, D, spec.attention_bias)
        self.to_out = nn.CellList([Linear(D, D), nn.Dropout(p=spec.dropout)])

    def split_heads(self, x_BND):
        return x_BND.reshape(x_BND.shape[:2] + (self.heads, -1))

    def project_out(self, x_BND):
        return self.to_out[1](self.to_out[0](x_BND))


class SelfAttention(Attention):
    """Among the tokens of a sub-sequence; RoPE comes before the split, so positions are those in the video."""

    def construct(self, x_BND, rope, rule, key_bias):
        """rope: (cos, sin), each (N, 3, d / 6). key_bias: (n B, 1, 1, S), None when every key is visible."""
        cos, sin = rope
        q, k, v = (self.split_heads(to(x_BND)) for to in (self.to_q, self.to_k, self.to_v))
        q, k = kernels.rotary(q, cos, sin), kernels.rotary(k, cos, sin)
        out = kernels.attention(split(q, rule), split(k, rule), split(v, rule), self.scale, key_bias)
        return self.project_out(merge(out, rule, x_BND.shape[1]))


class CrossAttention(Attention):
    """From every token to the text. Sub-sequences would change nothing here, so there are none."""

    def construct(self, x_BND, y_BLD, key_bias):
        """key_bias: (B, 1, 1, L), None when every text token is visible."""
        q = kernels.permute(self.split_heads(self.to_q(x_BND)), HEADS_FIRST)
        k, v = (kernels.permute(self.split_heads(to(y_BLD)), HEADS_FIRST) for to in (self.to_k, self.to_v))
        out = kernels.attention(q, k, v, self.scale, key_bias)
        return self.project_out(kernels.permute(out, HEADS_FIRST).reshape(x_BND.shape))


# ------------------------------------------------------------------------------------------------------------- block


class TransformerBlock(nn.Cell):
    """Self-attention and feed forward are normalised, modulated and gated; cross-attention is none of these."""

    def __init__(self, spec: DiTSpec, index: int):
        super().__init__()
        D, affine = spec.hidden_size, spec.norm_elementwise_affine
        self.rule = spec.block_rule(index)
        self.scale_shift_table = Parameter(initializer(Normal(D**-0.5), (6, D)), name="scale_shift_table")
        self.norm1 = LayerNorm(D, spec.norm_eps, affine)
        self.attn1 = SelfAttention(spec)
        self.norm2 = LayerNorm(D, spec.norm_eps, affine)
        self.attn2 = CrossAttention(spec)
        self.ff = FeedForward(spec)

    def construct(self, x_BND, y_BLD, modulation_B6D, rope, video_bias, text_bias):
        m = (self.scale_shift_table + modulation_B6D).chunk(6, 1)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = m
        z = kernels.modulate(self.norm1(x_BND), shift_a, scale_a)
        x_BND = kernels.gated_add(x_BND, gate_a, self.attn1(z, rope, self.rule, video_bias))
        x_BND = x_BND + self.attn2(x_BND, y_BLD, text_bias)
        z = kernels.modulate(self.norm2(x_BND), shift_f, scale_f)
        return kernels.gated_add(x_BND, gate_f, self.ff(z))
