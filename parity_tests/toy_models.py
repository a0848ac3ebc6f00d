"""A small network written once over a backend's layers and kernels: what the capture tests run in both frameworks."""

from __future__ import annotations

import importlib

import numpy as np

from osp_shared import fill

DIM, HEADS, TOKENS = 48, 4, 20


def build(backend: str, dtype: str = "fp32", blocks: int = 3):
    """The network of `osp_torch` or `osp_mindspore`, filled deterministically, in inference mode."""
    layers = importlib.import_module(f"{backend}.layers")
    kernels = importlib.import_module(f"{backend}.kernels")
    checkpoint = importlib.import_module(f"{backend}.checkpoint")
    nn = importlib.import_module("torch.nn" if backend == "osp_torch" else "mindspore.nn")
    base, cells = (nn.Module, nn.ModuleList) if backend == "osp_torch" else (nn.Cell, nn.CellList)

    class Attention(base):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (layers.Linear(DIM, DIM) for _ in range(3))
            self.out = layers.Linear(DIM, DIM)

        def construct(self, x):
            B, S, _ = x.shape
            q, k, v = (self._heads(f(x)) for f in (self.q, self.k, self.v))
            y = kernels.attention(q, k, v, (DIM // HEADS) ** -0.5)
            return self.out(y.swapaxes(1, 2).reshape(B, S, DIM))

        def _heads(self, x):
            return x.reshape(x.shape[0], x.shape[1], HEADS, DIM // HEADS).swapaxes(1, 2)

        forward = construct

    class Block(base):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = layers.LayerNorm(DIM), layers.LayerNorm(DIM)
            self.attn = Attention()
            self.up, self.down = layers.Linear(DIM, 2 * DIM), layers.Linear(2 * DIM, DIM)

        def construct(self, x, shift):
            x = x + self.attn(self.norm1(x) * 1.5 + shift)
            return x + self.down(kernels.gelu_tanh(self.up(self.norm2(x))))

        forward = construct

    class Toy(base):
        def __init__(self, spec):
            super().__init__()
            self.stem = layers.Linear(DIM, DIM)
            self.blocks = cells([Block() for _ in range(blocks)])
            self.norm = layers.LayerNorm(DIM)
            self.head = layers.Linear(DIM, 6)

        def construct(self, x, shift):
            x = self.stem(x)
            for block in self.blocks:
                x = block(x, shift)
            return self.head(self.norm(x))

        forward = construct

    class Spec:
        def optional(self):
            return frozenset()

    shapes = {name: tuple(p.shape) for name, p in _parameters(Toy(None))}
    return checkpoint.build(Toy, Spec(), lambda name: fill.parameter(name, shapes[name], "toy"), dtype)


def _parameters(model):
    return model.named_parameters() if hasattr(model, "named_parameters") else model.parameters_dict().items()


def inputs() -> dict[str, np.ndarray]:
    shapes = {"x": (2, TOKENS, DIM), "shift": (2, 1, DIM)}
    return {name: fill.input_tensor(name, shape, "toy") for name, shape in shapes.items()}
