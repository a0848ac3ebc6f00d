"""The sampling loop around stand-in models, its noise, guidance and conditions; and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_files
from osp_shared import inpaint, sampling, schedules
from osp_shared.errors import OspError
from osp_shared.sampling import PhiloxNoise, TextEmbeddings
from osp_shared.text import templates
from osp_shared.video.grid import video_grid
from osp_shared.video.resize import aspect_crop, max_area_size, stride_crop, to_uint8
from sampling_support import SHORT_NAMES, FakeAutoencoder, FakeDenoiser, check_record, embeddings, request, tagged

# ------------------------------------------------------------------------------------------------------------ golden


def label(item: dict) -> str:
    words = [
        item["kind"],
        *(str(item[k]) for k in ("guidance_rescale", "zero_snr", "dtype", "b", "h", "w", "T") if k in item),
    ]
    return "-".join(words)


@pytest.mark.parametrize("golden, item", golden_files.items("scheduler", "misc", label))
def test_golden_helpers(golden, item):
    CHECKS[item["kind"]](item, golden)


def check_rescale(item, golden):
    guided, text = (tagged(tag, item["shape"], golden) for tag in item["inputs"])
    # a deviation over 72 float32 numbers, and four operations
    check_record(item["out"], sampling.rescale_guided(guided, text, item["guidance_rescale"]), 1e-6)


def check_noising(item, golden):
    function = {"ddpm_add_noise": schedules.add_noise, "ddpm_get_velocity": schedules.velocity}[item["kind"]]
    schedule = schedules.noise_schedule("DDPM", zero_snr=item["zero_snr"])
    shape = item["out"][1]
    x0, noise = (tagged(tag, shape, golden) for tag in item["inputs"])
    result = function(schedule, x0, noise, np.array(item["t"]))
    assert result.dtype == np.float32
    check_record(item["out"], result, 1e-6)


def check_uint8(item, golden):
    dtype = SHORT_NAMES[item["dtype"]]
    values = np.array(item["in"], np.float32).astype(sampling.NUMPY_TYPES[dtype]).astype(np.float32)
    assert to_uint8(values, dtype).tolist() == item["out"]


def check_video_grid(item, golden):
    clips = np.stack([np.full((item["t"], item["h"], item["w"], 3), i + 1, np.uint8) for i in range(item["b"])])
    grid = video_grid(clips)
    assert list(grid.shape[:3]) == item["shape"][:3]
    assert grid[0, :, :, 0].tolist() == item["frame0_channel0"]


def check_max_area(item, golden):
    size = max_area_size(item["h"], item["w"], item["max_hxw"])
    assert list(size) == item["resized"]
    assert list(stride_crop(*size, 32)) == item["stride32_crop_i_j_h_w"]


def check_center_crop(item, golden):
    assert list(aspect_crop(item["h"], item["w"], *item["target"])) == [*item["i_j"], *item["crop_h_w"]]


def check_mask_compressor(item, golden):
    mask = np.ones((1, 1, item["T"], 16, 24), np.float32)
    mask[:, :, 0] = 0
    if item["T"] > 2:
        mask[:, :, -1] = 0
        mask[:, :, 2, :, 0:11] = 0
    small = inpaint.compress_mask(mask, 2, 3)
    assert list(small.shape) == item["shape"]
    np.testing.assert_array_equal(small.ravel(), item["value"])


CHECKS = {
    "rescale_noise_cfg": check_rescale,
    "ddpm_add_noise": check_noising,
    "ddpm_get_velocity": check_noising,
    "to_uint8": check_uint8,
    "video_grid": check_video_grid,
    "maxhwresize": check_max_area,
    "center_crop": check_center_crop,
    "mask_compressor": check_mask_compressor,
}


# ---------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("method", schedules.METHODS)
def test_every_method_samples_a_video(method):
    records = []
    asked = request(sample_method=method, num_samples_per_prompt=2)
    denoiser = FakeDenoiser()
    video = sampling.sample_prompt(asked, 0, embeddings(), denoiser, FakeAutoencoder(), observer=records.append)
    assert video.shape == (2, 9, 32, 48, 3) and video.dtype == np.uint8
    assert len(records) == len(denoiser.calls) == len(asked.table.steps)
    assert [r.k for r in records] == list(range(records[0].total))
    for record, (seen, timestep, *_) in zip(records, denoiser.calls, strict=True):
        assert seen.shape == (4, 8, 3, 4, 6)
        np.testing.assert_array_equal(seen[:2], seen[2:])
        np.testing.assert_array_equal(record.timestep, timestep)
    assert (video[0] != video[1]).any()


def test_guidance_puts_the_negative_half_first():
    denoiser, text = FakeDenoiser(), embeddings()
    sampling.denoise(request(num_samples_per_prompt=3), denoiser, text, (3, 4, 6), PhiloxNoise(0))
    _, timestep, B1LC, B1L, video_mask = denoiser.calls[0]
    assert timestep.tolist() == [999.0] * 6 and video_mask is None
    assert B1LC.shape == (6, 1, 6, 4) and B1L.shape == (6, 1, 6)
    assert B1L[:, 0].sum(axis=-1).tolist() == [2, 2, 2, 4, 4, 4]
    np.testing.assert_array_equal(B1LC[3:, 0], text.positive.repeat(3, axis=0))


def test_no_guidance_calls_the_model_once():
    denoiser = FakeDenoiser()
    sampling.denoise(request(guidance_scale=1.0), denoiser, embeddings(guided=False), (3, 4, 6), PhiloxNoise(0))
    assert denoiser.calls[0][0].shape[0] == 1


def test_samples_of_several_prompts_keep_their_masks():
    """Prompts are the outer order of embeddings and masks alike."""
    text = TextEmbeddings(np.arange(2.0).reshape(2, 1, 1), np.array([[0], [1]]))
    B1LC, B1L = text.for_samples(2)
    assert B1LC.ravel().tolist() == B1L.ravel().tolist() == [0, 0, 1, 1]


def test_guidance_formula():
    u, c = (tagged(t, (2, 3, 1, 4, 4)) for t in "uc")
    np.testing.assert_allclose(sampling.guide(u, c, 7.5), u + 7.5 * (c - u), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(sampling.guide(u, c, 0.0), u)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_guidance_rounds_as_torch_does(dtype):
    import torch

    kind = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    u, c = (tagged(t, (2, 3, 2, 9, 9)) for t in "uc")
    tu, tc = (torch.from_numpy(a).to(kind) for a in (u, c))
    nu, nc = (a.astype(sampling.NUMPY_TYPES[dtype]) for a in (u, c))
    guided, expected = sampling.guide(nu, nc, 7.3), tu + 7.3 * (tc - tu)
    np.testing.assert_array_equal(guided.astype(np.float32), expected.float().numpy())
    axes = (1, 2, 3, 4)
    scaled = expected * (tc.std(dim=axes, keepdim=True) / expected.std(dim=axes, keepdim=True))
    expected = 0.3 * scaled + (1 - 0.3) * expected
    np.testing.assert_array_equal(sampling.rescale_guided(guided, nc, 0.3).astype(np.float32), expected.float().numpy())


@pytest.mark.parametrize("dtype, told", [("fp32", 999.0), ("fp16", 999.0), ("bf16", 1000.0)])
def test_timestep_is_rounded_to_the_latents_type(dtype, told):
    denoiser = FakeDenoiser(dtype)
    latents = sampling.denoise(request(), denoiser, embeddings(), (3, 4, 6), PhiloxNoise(0))
    assert latents.dtype == sampling.NUMPY_TYPES[dtype]
    assert denoiser.calls[0][1].tolist() == [told, told]
    seen = denoiser.calls[0][0]
    np.testing.assert_array_equal(seen, seen.astype(sampling.NUMPY_TYPES[dtype]).astype(np.float32))


def test_flow_matching_tells_time_in_float32():
    denoiser = FakeDenoiser("bf16")
    sampling.denoise(request(sample_method="FlowMatchEulerDiscrete"), denoiser, embeddings(), (3, 4, 6), PhiloxNoise(0))
    told = [call[1][0] for call in denoiser.calls]
    assert told == pytest.approx([1000.0, 750.25, 500.5, 250.75, 1.0], rel=1e-6)


def test_nan_names_the_step():
    with pytest.raises(OspError, match=r"NaN at step 3 of 5 \(timestep 599\)"):
        sampling.denoise(request(), FakeDenoiser(fail_at=2), embeddings(), (3, 4, 6), PhiloxNoise(0))


def test_decode_cuts_to_the_wanted_size():
    latents = tagged("latents", (1, 8, 3, 4, 6))
    whole = sampling.decode(FakeAutoencoder(), latents, 9, 32, 48)
    np.testing.assert_array_equal(sampling.decode(FakeAutoencoder(), latents, 7, 30, 41), whole[:, :7, :30, :41])


def test_prompts_are_encoded_in_their_templates():
    seen = []

    def tokenize(texts, length):
        seen.append((texts, length))
        return np.zeros((1, length), np.int64), np.ones((1, length), np.int64)

    def encoder(ids, mask):
        return np.zeros((*ids.shape, 4), np.float32)

    text = sampling.encode_prompt(request(max_sequence_length=7), 1, encoder, tokenize)
    assert seen == [([templates.positive("a dog")], 7), ([templates.NEGATIVE_PROMPT], 7)]
    assert text.negative_mask.shape == (1, 7)
    text = sampling.encode_prompt(request(guidance_scale=1.0), 0, encoder, tokenize)
    assert text.negative is None and len(seen) == 3


# -------------------------------------------------------------------------------------------------------------- noise


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.integers(0, 2000), st.integers(0, 50), st.integers(0, 3))
def test_noise_depends_on_its_key_alone(seed, prompt, draw, sample, purpose):
    noise = PhiloxNoise(seed, prompt, purpose)
    one = noise.one(draw, sample, (3, 4))
    assert one.dtype == np.float32
    np.testing.assert_array_equal(PhiloxNoise(seed, prompt, purpose).one(draw, sample, (3, 4)), one)
    for other in (
        PhiloxNoise(seed ^ 1, prompt, purpose).one(draw, sample, (3, 4)),
        PhiloxNoise(seed, prompt + 1, purpose).one(draw, sample, (3, 4)),
        PhiloxNoise(seed, prompt, purpose + 1).one(draw, sample, (3, 4)),
        noise.one(draw + 1, sample, (3, 4)),
        noise.one(draw, sample + 1, (3, 4)),
    ):
        assert not (other == one).any()


def test_noise_is_what_it_was():
    """Philox and the normal transform are part of a video's identity: a change of either must be noticed."""
    expected = [[-0.4284385144710541, 0.3587815761566162], [1.6100672483444214, 0.3920513987541199]]
    assert PhiloxNoise(42, 1)(3, (2, 2)).tolist() == expected


def test_samples_do_not_depend_on_their_batch():
    """Sample 1 of 3 is sample 1 of 2, to the bit; prompts do not see each other."""
    videos = {
        n: sampling.denoise(
            request(num_samples_per_prompt=n), FakeDenoiser(), embeddings(), (3, 4, 6), PhiloxNoise(5, 1)
        )
        for n in (2, 3)
    }
    np.testing.assert_array_equal(videos[2], videos[3][:2])


def test_another_noise_source():
    drawn = []

    def noise(k, shape):
        drawn.append((k, shape))
        return tagged(f"n{k}", shape)

    latents = sampling.denoise(request(sample_method="DDPM"), FakeDenoiser(), embeddings(), (3, 4, 6), noise)
    assert drawn == [(k, (1, 8, 3, 4, 6)) for k in range(6)]
    assert np.isfinite(latents).all()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_frames": 92}, r"num_frames 92: must be 4n\+1, such as 89 or 93"),
        ({"num_frames": 0}, r"num_frames 0: must be 4n\+1, such as 1"),
        (
            {"height": 360},
            "height 360: must be a multiple of 16 pixels; multiples of 32 are recommended, such as 352 or 384",
        ),
        ({"width": 8}, "width 8: must be a multiple of 16"),
        ({"width": -32}, "width -32: must be a multiple of 16"),
        ({"sample_method": "Euler"}, "unknown sample_method 'Euler'.*KDPM2AncestralDiscrete"),
        ({"num_sampling_steps": 103}, "num_sampling_steps 103.*overshoots"),
        ({"num_sampling_steps": 0}, "num_sampling_steps 0"),
        ({"prediction_type": "v"}, "unknown prediction_type 'v'"),
        ({"guidance_scale": float("nan")}, "guidance_scale nan"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale 1.5: must be in 0\.\.1"),
        ({"guidance_rescale": 0.7, "guidance_scale": 1.0}, "has no effect"),
        ({"guidance_rescale": 0.7, "sample_method": "FlowMatchEulerDiscrete"}, "has no effect"),
        ({"num_samples_per_prompt": 0}, "num_samples_per_prompt 0: must be at least 1"),
        ({"max_sequence_length": 1}, "max_sequence_length 1: must be at least 2"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**64}, "seed 18446744073709551616"),
        ({"text_prompt": ()}, "text_prompt"),
        ({"text_prompt": "a cat"}, "text_prompt"),
    ],
)
def test_bad_requests(changes, message):
    with pytest.raises(OspError, match=message) as error:
        request(**changes)
    assert "\n" not in str(error.value)


def test_16_is_enough():
    assert request(height=48, width=16).height == 48


def test_frames_must_fit_the_autoencoder():
    with pytest.raises(OspError, match=r"num_frames 13: this autoencoder needs 8n\+1 frames"):
        sampling.latent_size(request(num_frames=13), FakeAutoencoder(stride=8))
    assert sampling.latent_size(request(num_frames=17), FakeAutoencoder(stride=8)) == (3, 4, 6)


def test_an_inpaint_model_is_not_sampled_without_condition():
    with pytest.raises(OspError, match="20 input channels.*needs model_type inpaint"):
        sampling.denoise(request(), FakeDenoiser(condition=12), embeddings(), (3, 4, 6), PhiloxNoise(0))
