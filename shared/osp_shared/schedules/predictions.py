"""From what the model predicts to what a sampler needs: the clean data x0 or the noise e.

A model trained for epsilon-prediction outputs e; for v-prediction it outputs v = alpha e - s x0 (Salimans and Ho 2022).
Two scalings of the sample are in use: x_t = alpha x0 + s e with alpha^2 + s^2 = 1, and the one of Karras et al. 2022,
x = x0 + sigma e, whose sample is larger by sqrt(sigma^2 + 1).
"""

from __future__ import annotations

import math

from osp_shared.errors import OspError
from osp_shared.schedules.table import Weights

PREDICTION_TYPES = ("epsilon", "v_prediction")


def check_prediction(prediction: str) -> None:
    """OspError unless `prediction` is one of PREDICTION_TYPES."""
    if prediction not in PREDICTION_TYPES:
        raise OspError(f"unknown prediction_type {prediction!r}: must be one of {', '.join(PREDICTION_TYPES)}")


def data_and_noise(prediction: str, x: Weights, output: Weights, alpha: float, s: float) -> tuple[Weights, Weights]:
    """(x0, e) for x = alpha x0 + s e."""
    if prediction == "epsilon":
        return (x - s * output) / alpha, output
    return alpha * x - s * output, alpha * output + s * x


def data(prediction: str, x: Weights, output: Weights, sigma: float) -> Weights:
    """x0 for x = x0 + sigma e; the model was given x / sqrt(sigma^2 + 1)."""
    if prediction == "epsilon":
        return x - sigma * output
    return x / (sigma**2 + 1) - sigma / math.sqrt(sigma**2 + 1) * output


def alpha_and_s(sigma: float) -> tuple[float, float]:
    """(alpha, s) with s / alpha = sigma and alpha^2 + s^2 = 1."""
    alpha = 1 / math.sqrt(sigma**2 + 1)
    return alpha, sigma * alpha
