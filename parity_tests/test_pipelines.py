"""Whole pipelines around the real transformers of both backends, against the original's: latents, calls and frames."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pytest

import dit_models
import golden_files
from osp_shared import inpaint, sampling
from osp_shared.checkpoints import write_safetensors
from osp_shared.sampling import SampleRequest, StepRecord, TextEmbeddings
from osp_shared.specs.dit import DiTSpec, InpaintSpec
from osp_tools import demo_weights
from sampling_support import UNIT, FakeAutoencoder, check_record, largest, norm, salt_of, samples, tagged

TEXT = (1, 16, 32)  # the golden prompts: 16 tokens of 32 numbers, of which so many are valid
VALID = {"pipe_text_pos": 11, "pipe_text_neg": 6}


@dataclass
class TracedDenoiser:
    """A backend's transformer behind the sampling loop's protocol, that keeps what it was called with first."""

    side: dit_models.Torch | dit_models.MindSpore
    model: object
    spec: DiTSpec
    dtype: str = "fp32"
    calls: int = 0
    first: tuple = field(default=())

    def __call__(self, latents, timestep, text, text_mask, video_mask=None):
        self.first = self.first or (latents, timestep, text, text_mask)
        self.calls += 1
        arrays = (latents, timestep, text, video_mask, text_mask.astype(np.float32))
        return self.side.numpy(self.side.call(self.model, *dit_models.arguments(self.side, arrays))).astype(np.float32)


@lru_cache(maxsize=4)
def transformer(backend: str, spec: DiTSpec, salt: str):
    side = dit_models.backend(backend)
    return side, dit_models.build(side, spec, salt)


def denoiser_of(golden: dict, item: dict, backend: str) -> TracedDenoiser:
    spec_class = InpaintSpec if "inpaint" in item else DiTSpec
    spec = spec_class.from_config({**item["model_config"], "_class_name": spec_class.class_name()})
    return TracedDenoiser(*transformer(backend, spec, salt_of(golden)), spec)


def request_of(item: dict) -> SampleRequest:
    return SampleRequest(
        text_prompt=("",),
        num_frames=item["num_frames"],
        height=item["height"],
        width=item["width"],
        guidance_scale=item["guidance_scale"],
        guidance_rescale=item["guidance_rescale"],
        sample_method=item["method"],
        num_sampling_steps=item["steps"],
        prediction_type=item["prediction_type"],
        rescale_betas_zero_snr=item["zero_snr"],
        num_samples_per_prompt=item["num_samples_per_prompt"],
    )


def text_of(golden: dict, guided: bool) -> TextEmbeddings:
    tags = ["pipe_text_pos", "pipe_text_neg"][: 1 + guided]
    arrays = []
    for tag in tags:
        arrays += [tagged(tag, TEXT, golden), (np.arange(TEXT[1]) < VALID[tag]).astype(np.int64)[None]]
    return TextEmbeddings(*arrays)


def pictures(names: list[int]) -> list[np.ndarray]:
    """The golden pictures: uint8 (1, 3, H, W)."""
    result = []
    for k in names:
        y, x = np.mgrid[0 : (120, 131)[k], 0 : (171, 160)[k]]
        planes = (3 * x + 5 * y + 40 * k) % 256, (x * y + 7 * k) % 256, (x + 2 * y * (k + 1)) % 256
        result.append(np.stack(planes).astype(np.uint8)[None])
    return result


def latents_tolerance(item: dict, first: np.ndarray, records: list[StepRecord], step: int) -> float:
    """Relative to the root mean square of the latents after `step`.

    One call of the transformer agrees with the original to 5e-6 (its goldens); guidance by g takes the difference of
    two calls g times, and the next steps carry on what the first ones got wrong. The original's Euler steps subtract
    numbers of the size of x (4096 at first) to leave a fraction of them: a few units of x's last place, while the
    table's weights are exact. A condition's cells may be a grey level off in one of their 64 pixels (2/255/64).
    """
    tolerance = 5e-6 * (2 * item["guidance_scale"] if item["guidance_scale"] > 1 else 1)
    if item["method"].startswith("Euler"):
        states = [first, *(record.latents for record in records[: step + 1])]
        tolerance += 4 * UNIT * max(largest(x) / rms(y) for x, y in zip(states[:-1], states[1:], strict=True))
    return tolerance + (1.3e-4 if "inpaint" in item else 0)


def rms(x: np.ndarray) -> float:
    return norm(x) / np.sqrt(x.size)


@pytest.mark.parametrize("backend", dit_models.BACKENDS)
@pytest.mark.parametrize("golden, item", golden_files.items("scheduler", "pipelines", lambda item: item["name"]))
def test_pipelines(golden, item, backend):
    request, denoiser, vae = request_of(item), denoiser_of(golden, item, backend), FakeAutoencoder()
    records: list[StepRecord] = []
    draws: list[int] = []

    def noise(k: int, shape: tuple[int, ...]) -> np.ndarray:
        draws.append(k)
        return tagged(f"{item['noise_tag']}_{k}", shape, golden)

    options = dict(noise=noise, observer=records.append)
    text = text_of(golden, request.guided)
    if "inpaint" in item:
        condition = condition_of(item, request, vae)
        video = inpaint.sample_prompt(request, 0, text, condition, denoiser, vae, **options)
    else:
        video = sampling.sample_prompt(request, 0, text, denoiser, vae, **options)

    assert draws == list(range(item["noise_calls"]))
    check_first_call(item, denoiser)
    first = np.float32(request.table.init_noise_sigma) * noise(0, records[0].latents.shape)
    for record in item["latents"]:
        step = int(record[0].removeprefix("latents_after_"))
        check_record(record, records[step].latents, latents_tolerance(item, first, records, step))
    check_video(item["video"], video)


def condition_of(item: dict, request: SampleRequest, vae: FakeAutoencoder) -> inpaint.Condition:
    given = inpaint.ConditionRequest(crop_for_hw=item["inpaint"]["crop_for_hw"])
    condition = inpaint.build_condition(pictures(item["inpaint"]["images"]), "image", request, given, vae)
    # The original's resize of bytes and ours may differ by one grey level (2/255) in a pixel out of a hundred: 8e-4 in
    # the root mean square, relative to values of about 1. A cell's mean over 64 pixels is closer.
    check_record(item["vae_encode_input"], vae.encoded[0][0], 1e-3)
    halves = np.concatenate([condition.channels] * (1 + request.guided))
    check_record(item["masked_latents"], halves[:, :8], 1e-3)
    check_record(item["mask"], halves[:, 8:], 0.0)
    return condition


def check_first_call(item: dict, denoiser: TracedDenoiser) -> None:
    latents, timestep, text, text_mask = denoiser.first
    assert denoiser.calls == item["model_calls"]
    # initial noise times sigma, divided by sqrt(sigma^2 + 1): two roundings
    check_record(item["first_model_input"], latents, 1e-3 if "inpaint" in item else 1e-6)
    assert timestep.tolist() == item["first_timestep"]
    assert [len(latents), *latents.shape[2:]] == item["attention_mask_shape"]  # every cell visible: no mask is made
    assert list(text.shape) == item["text_shape"]
    assert list(text_mask.shape) == item["text_mask_shape"]
    assert text_mask.sum(axis=(1, 2)).tolist() == item["text_mask_sums"]


def check_video(record: list, video: np.ndarray) -> None:
    """uint8 frames: truncation turns a difference in the last float32 digits into a grey level, here and there.

    Latents are good to about 1e-4, 0.01 grey levels: one value in a hundred may fall on the other side. The stand-in
    repeats each value in 64 pixels of 4 frames, which the bounds therefore count as one.
    """
    _, shape, mean, std, l2, values = record
    assert list(video.shape) == shape and video.dtype == np.uint8
    assert np.abs(samples(video) - values).max() <= 1
    assert abs(video.mean() - mean) <= 0.01
    assert abs(video.std() - std) <= 0.01
    # sum of squares: twice 255 times the difference of the mean, at most
    assert abs(norm(video) ** 2 - l2**2) <= 2 * 255 * 0.01 * video.size + 1e-8 * l2**2


# --------------------------------------------------------------------------------------- one seed, one video, anywhere


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    spec = dit_models.tiny()
    models = {"dit": (spec, demo_weights.filled(spec)), "vae": (demo_weights.VAE, demo_weights.autoencoder())}
    for name, (spec, tensors) in models.items():
        write_safetensors(folder / name, tensors.items())
        (folder / name / "config.json").write_text(json.dumps(spec.to_config()), encoding="utf-8")
    backends = [importlib.import_module(f"osp_{backend}.backend") for backend in dit_models.BACKENDS]
    return [(module.load_dit(folder / "dit"), module.load_vae(folder / "vae")) for module in backends]


@pytest.mark.parametrize("method", ["EulerAncestralDiscrete", "DPMSolverMultistep"])
def test_the_same_seed_is_the_same_video_on_both_backends(tiny_models, method):
    """Through the backends' own loaders: at most one grey level apart, on at least 99.9 % of the values."""
    request = SampleRequest(
        text_prompt=("",),
        num_frames=5,
        height=48,
        width=64,
        guidance_scale=1.5,
        sample_method=method,
        num_sampling_steps=5,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        num_samples_per_prompt=2,
        seed=11,
    )
    videos = []
    for dit, vae in tiny_models:
        videos.append(sampling.sample_prompt(request, 3, text_of({}, True), dit, vae).astype(int))
    assert videos[0].shape == (2, 5, 48, 64, 3)
    # neither black and white, nor twice the same
    assert ((videos[0] > 0) & (videos[0] < 255)).mean() > 0.5 and (videos[0][0] != videos[0][1]).mean() > 0.5
    difference = np.abs(videos[0] - videos[1])
    assert (difference <= 1).mean() >= 0.999
    assert (difference == 0).mean() >= 0.99
