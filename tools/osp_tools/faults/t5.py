"""Porting faults of the text encoder."""

from osp_tools.faults import fault

M = "osp_mindspore.t5:"
K = "osp_mindspore.kernels."
B = "osp_shared.geometry.relative:bucket"
T5 = "t5"
TABLE = r"^$"  # buckets are made by the stack's own code, which this model's traces count to the root
ATTENTION = r"SelfAttention"

FAULTS = [
    fault("t5-eps", "RMS norm with eps 1e-5", T5, r"layer_norm",
          (K + "norm:rms_norm_cpu", " + eps)", " + 1e-5)")),
    fault("t5-layer-norm", "layer norm (mean removed) in place of RMS norm", T5, r"layer_norm",
          (K + "norm:rms_norm_cpu", "h = h * ops", "h = h - h.mean(-1, keep_dims=True)\n    h = h * ops")),
    fault("t5-gelu-erf", "exact GELU in the gated feed forward", T5, r"DenseReluDense",
          (M + "DenseReluDense.construct", "gelu_tanh", "gelu_erf")),
    fault("t5-gate-order", "activation on the other branch", T5, r"DenseReluDense",
          (M + "DenseReluDense.construct", "kernels.gelu_tanh(self.wi_0(x_BLD)) * self.wi_1(x_BLD)",
           "self.wi_0(x_BLD) * kernels.gelu_tanh(self.wi_1(x_BLD))")),
    fault("t5-scaled", "logits divided by sqrt(d)", T5, ATTENTION,
          (M + "SelfAttention.construct", "(q, k, v, 1.0, ", "(q, k, v, q.shape[-1] ** -0.5, ")),
    fault("t5-bucket-edge", "bucket boundary one too early", T5, TABLE,
          (B, "distance < exact", "distance <= exact - 2")),
    fault("t5-bucket-sign", "buckets of query minus key", T5, TABLE,
          ("osp_shared.geometry.relative:bucket_table", "position[None, :] - position[:, None]",
           "position[:, None] - position[None, :]")),
    fault("t5-bucket-oneway", "buckets of the decoder (one direction)", T5, TABLE,
          (B, "half * (relative > 0)", "0 * (relative > 0)")),
    fault("t5-bucket-distance", "maximum distance 64", T5, TABLE,
          (B, "math.log(max_distance / exact)", "math.log(64 / exact)")),
    fault("t5-bias-own-block", "position bias only in the first block", T5, ATTENTION,
          (M + "Stack.construct", "x_BLD = block(x_BLD, bias_1NLL, key_bias_B11L)",
           "x_BLD, bias_1NLL = block(x_BLD, bias_1NLL, key_bias_B11L), bias_1NLL * 0.0")),
    fault("t5-mask-inverted", "padding mask inverted", T5, ATTENTION,
          (M + "T5Encoder.construct", "mask_BL == 0", "mask_BL != 0")),
    fault("t5-final-norm", "last norm forgotten", T5, r"^$|final_layer_norm|encoder",
          (M + "Stack.construct", "return self.final_layer_norm(x_BLD)", "return x_BLD")),
    fault("t5-residual", "residual taken after the norm", T5, r"layer\.1$",
          (M + "LayerFF.construct", "x_BLD + self", "self.layer_norm(x_BLD) + self")),
    fault("t5-bias-transposed", "position bias of (key, query)", T5, TABLE,
          (M + "SelfAttention.position_bias", "permute((2, 0, 1))", "permute((2, 1, 0))")),
]  # fmt: skip
