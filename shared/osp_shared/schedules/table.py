"""What a sampler is: a table with one row for each call of the model.

Every sampler here moves the latents by sums of a few arrays with known weights:

    x  <-  w_x x  +  w_base base  +  sum_j w_j out_j  +  w_noise noise

x is the current sample, base an earlier one (of the last call that `keeps` it), out_0 the model's output of this call,
out_j the output of j calls ago, noise fresh standard normal numbers. The weights are plain numbers, worked out in
float64 before any tensor exists; what the model predicts (noise or velocity) is folded into them. So a row tells all:
at which timestep the model is called, by what its input is scaled, and what becomes of the sample. `print(table)`
shows the rows.

Sampler formulas are written with the symbols X, BASE, NOISE and out(j), which add and multiply like the arrays they
stand for; the sum that comes out is the row's weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class Weights:
    """A weighted sum of the current sample, the base sample, model outputs (by age in calls) and fresh noise."""

    x: float = 0.0
    base: float = 0.0
    outputs: tuple[tuple[int, float], ...] = ()
    noise: float = 0.0

    def __add__(self, other: Weights) -> Weights:
        outputs = dict(self.outputs)
        for age, weight in other.outputs:
            outputs[age] = outputs.get(age, 0.0) + weight
        return Weights(
            self.x + other.x, self.base + other.base, tuple(sorted(outputs.items())), self.noise + other.noise
        )

    def __mul__(self, k: float) -> Weights:
        k = float(k)
        return Weights(self.x * k, self.base * k, tuple((age, w * k) for age, w in self.outputs), self.noise * k)

    __rmul__ = __mul__

    def __neg__(self) -> Weights:
        return self * -1.0

    def __sub__(self, other: Weights) -> Weights:
        return self + -other

    def __truediv__(self, k: float) -> Weights:
        return self * (1.0 / float(k))


X = Weights(x=1.0)
BASE = Weights(base=1.0)
NOISE = Weights(noise=1.0)


def out(age: int = 0) -> Weights:
    """The model's output, `age` calls ago."""
    return Weights(outputs=((age, 1.0),))


@dataclass(frozen=True)
class HalfEuler:
    """An Euler step as the original computes it in float16 and bfloat16: float32 numbers, in this order.

    x0 = round(out * out_scale) + x / x_divisor;  x <- x + (x - x0) / sigma * dt + round(noise * noise_scale)

    x is widened to float32 first; round() is to the half type, and so is the result. noise_scale None: no noise term.
    The model's input is x / input_divisor. round_out_scale: out_scale itself is rounded (see `Step.round_weights`).
    """

    input_divisor: float
    out_scale: float
    x_divisor: float
    sigma: float
    dt: float
    noise_scale: float | None = None
    round_out_scale: bool = False


@dataclass(frozen=True)
class Step:
    """One row: one call of the model.

    timestep: what the model is told, in 0..1000, as its table type holds it
    input_scale: the model sees x * input_scale
    weights: the next sample
    draws: fresh noise is drawn here (by the original too: even where its weight is 0, the random stream moves on)
    keeps: x, as it was before this step, becomes the base sample of later calls
    half: the step's rounding points in half precision, where they are not those of any row (see `evaluate`)
    round_weights: in half precision the output's weight is rounded too. The original writes "number * output"; in that
        order PyTorch brings the number to the tensor's type, in the other order it does not
    """

    timestep: float
    weights: Weights
    input_scale: float = 1.0
    draws: bool = False
    keeps: bool = False
    half: HalfEuler | None = None
    round_weights: bool = False


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """A sampler for a fixed number of steps.

    steps: one row a model call, in order; there can be more or fewer than num_sampling_steps of them
    init_noise_sigma: initial latents are standard normal noise times this
    timestep_dtype: type of the original's timesteps, "int64" or "float32"
    sigmas: float32 noise levels at the grid points and at the end, for the samplers that work with them
    flow: flow matching: timesteps are given to the model in float32 whatever the latents' type
    """

    method: str
    prediction_type: str
    steps: tuple[Step, ...]
    init_noise_sigma: float = 1.0
    timestep_dtype: str = "int64"
    sigmas: np.ndarray | None = None
    flow: bool = False
    history: int = field(init=False)

    def __post_init__(self) -> None:
        ages = [age for step in self.steps for age, weight in step.weights.outputs if weight]
        object.__setattr__(self, "history", max(ages, default=0))

    @property
    def timesteps(self) -> np.ndarray:
        """(calls,) in the original's type."""
        return np.array([step.timestep for step in self.steps], self.timestep_dtype)

    @property
    def noise_draws(self) -> int:
        """Arrays of fresh noise that the whole run draws, initial latents not counted."""
        return sum(step.draws for step in self.steps)

    def __str__(self) -> str:
        lines = [f"{self.method} ({self.prediction_type}): initial noise x {self.init_noise_sigma:.6g}"]
        for k, s in enumerate(self.steps):
            w = s.weights
            terms = [(w.x, "x"), (w.base, "base"), *((v, f"out[-{a}]" if a else "out") for a, v in w.outputs)]
            terms += [(w.noise, "noise")]
            rule = " ".join(f"{v:+.6g} {name}" for v, name in terms if v)
            notes = [
                n for n, on in (("keep x as base", s.keeps), ("noise drawn, not used", s.draws and not w.noise)) if on
            ]
            note = f"   ({', '.join(notes)})" if notes else ""
            lines.append(f"{k:4d}  t={s.timestep:<8.6g} model(x * {s.input_scale:.6g})   x <- {rule}{note}")
        return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True)
class Memory:
    """What a sampler carries from call to call: the base sample and the recent outputs, newest first."""

    base: Any = None
    outputs: tuple = ()


def initial_latents(table: SamplerTable, noise):
    """Standard normal noise to the sample that the first step starts from, in the noise's type."""
    return _cast(_wide(noise) * table.init_noise_sigma, noise.dtype)


def model_input(step: Step, x):
    """What the model sees for the sample x; the type stays."""
    if step.half is not None and is_half(x):
        return _cast(_wide(x) / step.half.input_divisor, x.dtype)
    return x if step.input_scale == 1.0 else _cast(_wide(x) * step.input_scale, x.dtype)


def evaluate(table: SamplerTable, k: int, x, output, memory: Memory, noise=None):
    """The k-th row applied: (next sample, memory for the next call).

    x, output and noise are arrays of one shape and type of numpy, torch or MindSpore (float32, float64, float16 or
    bfloat16); noise is needed where the row's weight of it is not 0. Only + and * touch them (and / in the
    half-precision Euler step), so the result is the same on all three up to their rounding.
    """
    step = table.steps[k]
    outputs = (output, *memory.outputs)
    if step.half is not None and is_half(x):
        result = _half_euler(step.half, x, output, noise)
    else:
        result = _weighted_sum(step, x, memory.base, outputs, noise)
    return result, Memory(x if step.keeps else memory.base, outputs[: table.history])


def _weighted_sum(step: Step, x, base, outputs: tuple, noise):
    """The row's sum. In half precision samples are widened to float32, products with outputs and noise are rounded."""
    w, dtype = step.weights, x.dtype
    terms = [_wide(a) * v for a, v in ((x, w.x), (base, w.base)) if v]
    products = [*((outputs[age], v) for age, v in w.outputs if v), *([(noise, w.noise)] if w.noise else [])]
    terms += [_product(a, _rounded(v, dtype) if step.round_weights else v) for a, v in products]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return _cast(total, dtype)


def _half_euler(h: HalfEuler, x, output, noise):
    half, x = x.dtype, _wide(x)
    x0 = _product(output, _rounded(h.out_scale, half) if h.round_out_scale else h.out_scale) + x / h.x_divisor
    x = x + (x - x0) / h.sigma * h.dt
    if h.noise_scale is not None:
        x = x + _product(noise, h.noise_scale)
    return _cast(x, half)


def _product(x, k: float):
    """x * k, rounded to the type of x, in float32 or wider."""
    return _wide(_cast(_wide(x) * k, x.dtype))


def _rounded(k: float, dtype) -> float:
    """A number as a half type holds it; other types leave it alone (they round it by themselves)."""
    if str(dtype).lower().endswith("bfloat16"):
        return float(ml_dtypes.bfloat16(k))
    return float(np.float16(k)) if str(dtype).lower().endswith("float16") else k


def is_half(x) -> bool:
    """Whether an array of numpy, torch or MindSpore is float16 or bfloat16."""
    return str(x.dtype).lower().endswith("float16")


def _wide(x):
    """To float32; wider types stay."""
    if not is_half(x):
        return x
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()


def _cast(x, dtype):
    return x if x.dtype == dtype else x.astype(dtype) if hasattr(x, "astype") else x.to(dtype)
