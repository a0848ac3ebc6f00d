"""All that depends on the device: one function a kernel, with an Ascend form and a CPU form.

Model files call `kernels.<name>` and never ask where they run. The form is chosen once, when the package is imported;
both forms stay importable under `<name>_cpu` and `<name>_ascend` from their modules, so that the Ascend forms can be
checked (argument names, layouts, shape inference) on a machine without one.

Precision of every CPU form: float32 and float64 as they are; float16 and bfloat16 operands are raised to float32, the
result is rounded back once. That is what an Ascend does in its half types (float32 accumulation), so a laptop can
rehearse an Ascend run.
"""

from osp_mindspore.kernels import activation, conv, layout, norm, resize
from osp_mindspore.kernels import attention as _attention
from osp_mindspore.kernels import haar as _haar
from osp_mindspore.kernels import linear as _linear
from osp_mindspore.kernels import modulation as _modulation
from osp_mindspore.kernels import rotary as _rotary
from osp_mindspore.runtime import on_ascend


def _forms(module, *names):
    suffix = "_ascend" if on_ascend() else "_cpu"
    return [getattr(module, name + suffix) for name in names]


(attention,) = _forms(_attention, "attention")
linear, embedding = _forms(_linear, "linear", "embedding")
conv2d, conv3d = _forms(conv, "conv2d", "conv3d")
layer_norm, channel_layer_norm, group_norm, rms_norm = _forms(
    norm, "layer_norm", "channel_layer_norm", "group_norm", "rms_norm"
)
exp, gelu_tanh, gelu_erf, silu, softmax = _forms(activation, "exp", "gelu_tanh", "gelu_erf", "silu", "softmax")
(rotary,) = _forms(_rotary, "rotary")
modulate, gated_add = _forms(_modulation, "modulate", "gated_add")
(permute,) = _forms(layout, "permute")
haar, inverse_haar = _forms(_haar, "haar", "inverse_haar")
upsample_nearest2d, upsample_linear = _forms(resize, "upsample_nearest2d", "upsample_linear")

__all__ = [
    "attention", "channel_layer_norm", "conv2d", "conv3d", "embedding", "exp", "gated_add", "gelu_erf", "gelu_tanh",
    "group_norm", "haar", "inverse_haar", "layer_norm", "linear", "modulate", "permute", "rms_norm", "rotary", "silu",
    "softmax", "upsample_linear", "upsample_nearest2d",
]
