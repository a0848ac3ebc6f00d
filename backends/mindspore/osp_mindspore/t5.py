"""The T5 / mT5 text encoder (v1.1 form: gated GELU, RMS norms, no biases; Raffel et al. 2020, Shazeer 2020).

Shapes: B batch, L tokens, D model width, N heads, d head width. Attribute paths are the released state dict's names.
In float16 `wo` stays float32, which makes the residual stream float32 from the first feed-forward on: norms round
their result to their weight's type.
"""

from __future__ import annotations

import numpy as np

from osp_mindspore import kernels
from osp_mindspore.layers import Embedding, Linear, RMSNorm
from osp_shared.geometry.relative import bucket_table
from osp_shared.specs.t5 import T5Spec

import mindspore as ms
from mindspore import nn, ops

KEEP_FLOAT32 = ("wo.weight",)  # the library's rule: this product overflows float16


class SelfAttention(nn.Cell):
    """Logits are not divided by sqrt(d); the relative-position table of block 0 serves every block."""

    def __init__(self, spec: T5Spec, has_table: bool):
        super().__init__()
        self.spec, self.heads = spec, spec.num_heads
        self.q = Linear(spec.d_model, spec.inner_size, bias=False)
        self.k = Linear(spec.d_model, spec.inner_size, bias=False)
        self.v = Linear(spec.d_model, spec.inner_size, bias=False)
        self.o = Linear(spec.inner_size, spec.d_model, bias=False)
        if has_table:
            self.relative_attention_bias = Embedding(spec.relative_attention_num_buckets, spec.num_heads)

    def position_bias(self, L: int):
        """(1, N, L, L)."""
        buckets = bucket_table(
            L, self.spec.relative_attention_num_buckets, self.spec.relative_attention_max_distance
        )
        return self.relative_attention_bias(ms.Tensor(buckets)).permute((2, 0, 1)).expand_dims(0)

    def construct(self, x_BLD, bias_1NLL, key_bias_B11L):
        B, L, _ = x_BLD.shape
        q, k, v = (p(x_BLD).reshape(B, L, self.heads, -1).permute((0, 2, 1, 3)) for p in (self.q, self.k, self.v))
        out_BNLd = kernels.attention(q, k, v, 1.0, key_bias_B11L, bias_1NLL)
        return self.o(out_BNLd.permute((0, 2, 1, 3)).reshape(B, L, -1))


class LayerSelfAttention(nn.Cell):
    def __init__(self, spec: T5Spec, has_table: bool):
        super().__init__()
        self.SelfAttention = SelfAttention(spec, has_table)
        self.layer_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)

    def construct(self, x_BLD, bias_1NLL, key_bias_B11L):
        return clamp_half(x_BLD + self.SelfAttention(self.layer_norm(x_BLD), bias_1NLL, key_bias_B11L))


class DenseReluDense(nn.Cell):
    def __init__(self, spec: T5Spec):
        super().__init__()
        self.wi_0 = Linear(spec.d_model, spec.d_ff, bias=False)
        self.wi_1 = Linear(spec.d_model, spec.d_ff, bias=False)
        self.wo = Linear(spec.d_ff, spec.d_model, bias=False)

    def construct(self, x_BLD):
        h = kernels.gelu_tanh(self.wi_0(x_BLD)) * self.wi_1(x_BLD)
        return self.wo(h.astype(self.wo.weight.dtype))


class LayerFF(nn.Cell):
    def __init__(self, spec: T5Spec):
        super().__init__()
        self.DenseReluDense = DenseReluDense(spec)
        self.layer_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)

    def construct(self, x_BLD):
        return clamp_half(x_BLD + self.DenseReluDense(self.layer_norm(x_BLD)))


class Block(nn.Cell):
    def __init__(self, spec: T5Spec, has_table: bool):
        super().__init__()
        self.layer = nn.CellList([LayerSelfAttention(spec, has_table), LayerFF(spec)])

    def construct(self, x_BLD, bias_1NLL, key_bias_B11L):
        return self.layer[1](self.layer[0](x_BLD, bias_1NLL, key_bias_B11L))


class Stack(nn.Cell):
    def __init__(self, spec: T5Spec):
        super().__init__()
        self.block = nn.CellList([Block(spec, has_table=i == 0) for i in range(spec.num_layers)])
        self.final_layer_norm = RMSNorm(spec.d_model, spec.layer_norm_epsilon)

    def construct(self, x_BLD, key_bias_B11L):
        bias_1NLL = self.block[0].layer[0].SelfAttention.position_bias(x_BLD.shape[1])
        for block in self.block:
            x_BLD = block(x_BLD, bias_1NLL, key_bias_B11L)
        return self.final_layer_norm(x_BLD)


class T5Encoder(nn.Cell):
    """ids, mask (B, L) -> last hidden state (B, L, D); keys where mask is 0 are hidden."""

    def __init__(self, spec: T5Spec):
        super().__init__()
        self.spec = spec
        self.shared = Embedding(spec.vocab_size, spec.d_model)
        self.encoder = Stack(spec)

    def construct(self, ids_BL, mask_BL):
        hidden = (mask_BL == 0).astype(ms.float32) * float(np.finfo(np.float32).min)
        return self.encoder(self.shared(ids_BL), hidden.expand_dims(1).expand_dims(1))


def clamp_half(x):
    """The library's guard: a float16 stream that overflowed is held just below the largest number."""
    if x.dtype != ms.float16:
        return x
    largest = 65504.0
    limit = largest - 1000 if bool(ops.isinf(x.astype(ms.float32)).any()) else largest
    return x.clip(-limit, limit)
