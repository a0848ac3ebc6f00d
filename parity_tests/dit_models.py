"""Builds and runs the DiT of either backend on numpy arrays, with every module and kernel call recorded."""

from __future__ import annotations

import contextlib

import numpy as np

from osp_shared import fill
from osp_shared.specs.dit import DiTSpec, InpaintSpec
from osp_shared.traces.format import Header, Recorder, Trace

BACKENDS = ("torch", "mindspore")
TINY = {
    "num_attention_heads": 4, "attention_head_dim": 12, "in_channels": 8, "num_layers": 5, "patch_size": 2,
    "patch_size_t": 1, "activation_fn": "gelu-approximate", "caption_channels": 32, "sparse1d": True, "sparse_n": 4,
}  # fmt: skip


def tiny(inpaint: bool = False, **changes) -> DiTSpec:
    return (InpaintSpec if inpaint else DiTSpec)(**{**TINY, **changes})


class Torch:
    name = "torch"

    def __init__(self):
        import torch

        from osp_torch import capture, checkpoint, kernels
        from osp_torch.dit import model, modules

        self.framework, self.capture, self.kernels = torch, capture, kernels
        self.checkpoint, self.model, self.modules = checkpoint, model, modules

    def tensor(self, array, dtype="fp32"):
        return None if array is None else self.checkpoint.to_tensor(array).to(self.checkpoint.DTYPES[dtype])

    def call(self, function, *args):
        with self.framework.no_grad():
            return function(*args)

    def gradients(self, model, inputs, weight):
        """Loss = mean(output * weight), and its gradients of the first input and of every parameter."""
        first = inputs[0].clone().requires_grad_(True)
        loss = (model(first, *inputs[1:]) * weight).mean()
        named = dict(model.named_parameters())
        first_grad, *rest = self.framework.autograd.grad(loss, [first, *named.values()])
        return loss.item(), self.numpy(first_grad), {n: self.numpy(g) for n, g in zip(named, rest, strict=True)}

    def numpy(self, tensor):
        return tensor.detach().double().numpy()


class MindSpore:
    name = "mindspore"

    def __init__(self):
        from osp_mindspore import capture, checkpoint, kernels
        from osp_mindspore.dit import model, modules

        import mindspore

        self.framework, self.capture, self.kernels = mindspore, capture, kernels
        self.checkpoint, self.model, self.modules = checkpoint, model, modules

    def tensor(self, array, dtype="fp32"):
        return None if array is None else self.checkpoint.to_tensor(array).astype(self.checkpoint.DTYPES[dtype])

    def call(self, function, *args):
        return function(*args)

    def gradients(self, model, inputs, weight):
        parameters = list(model.trainable_params())

        def loss(first):
            return (model(first, *inputs[1:]) * weight).mean()

        value, (first_grad, rest) = self.framework.value_and_grad(loss, 0, parameters)(inputs[0])
        return float(value), self.numpy(first_grad), {
            p.name: self.numpy(g) for p, g in zip(parameters, rest, strict=True)
        }

    def numpy(self, tensor):
        if tensor.dtype != self.framework.float64:
            tensor = tensor.astype(self.framework.float32)
        return tensor.asnumpy().astype(np.float64)


def backend(name: str):
    return {"torch": Torch, "mindspore": MindSpore}[name]()


def build(side, spec: DiTSpec, salt: str = "", dtype: str = "fp32"):
    shapes = spec.parameters()
    model_class = side.model.model_class(spec)
    return side.checkpoint.build(model_class, spec, lambda name: fill.parameter(name, shapes[name], salt), dtype)


def arguments(side, arrays, dtype: str = "fp32"):
    """(latents, timestep, text, video mask or None, text mask or None) as tensors; the timestep stays float32."""
    latents, timestep, text, *masks = arrays
    return [side.tensor(latents, dtype), side.tensor(timestep), side.tensor(text, dtype)] + [
        side.tensor(m, dtype) for m in masks
    ]


@contextlib.contextmanager
def recorded(side, model):
    """Records every module output, and kernels' arguments and results as `<module>/<kernel>`."""
    recorder = Recorder(Header("dit", {}, "", "", side.name, "float32"), full_limit=1 << 40)
    with side.capture.tapped(model, recorder):
        yield recorder


def run(side, model, inputs) -> tuple[np.ndarray, Trace]:
    with recorded(side, model) as recorder:
        output = side.call(model, *inputs)
    return side.numpy(output), recorder.trace()


def inputs(spec: DiTSpec, size, timestep=(999.0, 7.0), tokens=7, video_box=None, text_lens=None, salt=""):
    """(latents, timestep, text, video mask, text mask); box and lengths None: masks are None.

    video_box: per sample the leading (t, h, w) that is visible.
    """
    B = len(timestep)
    latents = fill.input_tensor("latents", (B, spec.input_channels, *size), salt)
    text = fill.input_tensor("text", (B, 1, tokens, spec.caption_channels), salt)
    video_mask = text_mask = None
    if video_box is not None:
        video_mask = np.zeros((B, *size), np.float32)
        for mask, (t, h, w) in zip(video_mask, video_box, strict=True):
            mask[:t, :h, :w] = 1
    if text_lens is not None:
        text_mask = (np.arange(tokens) < np.array(text_lens)[:, None, None]).astype(np.float32)
    return latents, np.array(timestep, np.float32), text, video_mask, text_mask
