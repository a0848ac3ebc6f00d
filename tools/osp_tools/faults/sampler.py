"""Porting faults of the sampling loop, made in the shared loop while the candidate runs: a port's own loop had them."""

from osp_tools.faults import fault

S = "osp_shared.sampling:"
C = "osp_shared.schedules."
RUN = "dit-sampler"
ROOT = r"^$"

FAULTS = [
    fault("cfg-order", "guidance with conditional and unconditional exchanged", RUN, ROOT,
          (S + "guide", "negative + _times(positive - negative, scale)",
           "positive + _times(negative - positive, scale)")),
    fault("cfg-batch", "text halves in the other order", RUN, ROOT,
          (S + "TextEmbeddings.for_samples", "halves.insert(0, ", "halves.append(")),
    fault("cfg-scale", "guidance of scale - 1", RUN, ROOT,
          (S + "guide", "negative, scale)", "negative, scale - 1)")),
    fault("zero-snr-clamp", "smallest alpha clamped to 1e-5 instead of 2^-24", RUN, ROOT,
          (C + "noise:noise_schedule", "SMALLEST_A", "np.float32(1e-5)")),
    fault("zero-snr-lost", "betas not rescaled to zero SNR", RUN, ROOT,
          (C + "noise:noise_schedule", "if zero_snr", "if False and zero_snr")),
    fault("timestep-cast", "timesteps rounded to bfloat16", RUN, ROOT,
          (S + "timestep_vector", "vector.astype(dtype)", "vector.astype(ml_dtypes.bfloat16)")),
    fault("timestep-off", "timestep one too low", RUN, ROOT,
          (S + "timestep_vector", "np.full(count, timestep, np.float32)", "np.full(count, timestep - 1, np.float32)")),
    fault("sampler-down", "ancestral noise level from sigma instead of the next one", RUN, ROOT,
          (C + "euler:euler", "up * NOISE", "0.99 * up * NOISE")),
    fault("sampler-slope", "slope for epsilon though the model predicts velocity", RUN, ROOT,
          (C + "euler:euler", "slope(prediction, X, out(), sigma)", 'slope("epsilon", X, out(), sigma)')),
    fault("sampler-input-scale", "model input not scaled", RUN, ROOT,
          (C + "table:model_input", "if step.input_scale == 1.0", "if True")),
    fault("sampler-init", "initial noise without its level", RUN, ROOT,
          (C + "table:initial_latents", "* table.init_noise_sigma", "* 1.0")),
    fault("sampler-noise-draw", "the same noise at every step", RUN, ROOT,
          (S + "denoise", "noise(draws, shape)", "noise(1, shape)")),
    fault("sampler-coefficient", "velocity's weight without the signal factor", RUN, ROOT,
          (C + "predictions:data", "sigma / math.sqrt(sigma**2 + 1) * output", "sigma * output")),
    fault("sampler-next-slope", "slope at the next noise level", RUN, ROOT,
          (C + "euler:euler", "X, out(), sigma)", "X, out(), sigma_next or sigma)")),
]  # fmt: skip
