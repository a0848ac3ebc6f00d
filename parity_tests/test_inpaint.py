"""What the inpaint model is shown: geometry, masks, pixel values, noise; and what is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest

from osp_shared import inpaint, sampling
from osp_shared.errors import OspError
from sampling_support import FakeAutoencoder, FakeDenoiser, embeddings, request


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, 3, height, width), np.uint8)


def test_mask_types():
    rng = random.Random(0)
    masks = {kind: inpaint.frame_mask(kind, 9, rng).astype(int).tolist() for kind in inpaint.MASK_TYPES}
    assert masks["t2iv"] == [1] * 9
    assert masks["i2v"] == [0] + [1] * 8
    assert masks["transition"] == [0] + [1] * 7 + [0]
    assert masks["clear"] == [0] * 9
    assert masks["continuation"] in ([0] * 4 + [1] * 5, [0] * 5 + [1] * 4)
    assert sum(masks["random_temporal"]) in (4, 5)
    counts = {int(inpaint.frame_mask("continuation", 9, rng, 0, 1).sum()) for _ in range(200)}
    assert counts == set(range(10))
    with pytest.raises(OspError, match="unknown mask_type 'all'"):
        inpaint.frame_mask("all", 9, rng)


def test_pictures_stand_at_their_indices():
    clip = np.concatenate([picture(4, 4, i) for i in range(3)])
    given = inpaint.ConditionRequest(indices=(2, -1, 0))
    pixels, mask = inpaint.place_frames(clip, 9, given, "image", random.Random(0))
    assert mask.astype(int).tolist() == [0, 1, 0, 1, 1, 1, 1, 1, 0]
    np.testing.assert_array_equal(pixels[[2, 8, 0]], clip)
    assert not pixels[[1, 3, 4, 5, 6, 7]].any()


@pytest.mark.parametrize("count, given", [(1, [0]), (2, [0, 8])])
def test_default_indices(count, given):
    clip = np.concatenate([picture(4, 4, i) for i in range(count)])
    _, mask = inpaint.place_frames(clip, 9, inpaint.ConditionRequest(), "image", random.Random(0))
    assert np.flatnonzero(mask == 0).tolist() == given


def test_mask_type_decides_when_every_frame_is_given():
    clip = np.concatenate([picture(4, 4, i) + 1 for i in range(9)])
    pixels, mask = inpaint.place_frames(clip, 9, inpaint.ConditionRequest("transition"), "video", random.Random(0))
    assert np.flatnonzero(mask == 0).tolist() == [0, 8]
    np.testing.assert_array_equal(pixels[[0, 8]], clip[[0, 8]])
    assert not pixels[1:8].any()
    _, mask = inpaint.place_frames(clip, 9, inpaint.ConditionRequest(), "video", random.Random(0))
    assert (mask == 0).sum() in (4, 5)


def condition_of(clips, asked, vae=None, kind="image", dtype="fp32", **options):
    vae = vae or FakeAutoencoder()
    return vae, inpaint.build_condition(clips, kind, asked, inpaint.ConditionRequest(**options), vae, dtype=dtype)


def test_geometry_keeps_the_aspect_ratio():
    _, condition = condition_of([picture(120, 171), picture(131, 160)], request())
    assert (condition.height, condition.width) == (96, 160)
    assert condition.channels.shape == (1, 12, 3, 12, 20)
    _, condition = condition_of([picture(120, 171)], request(), crop_for_hw=True)
    assert (condition.height, condition.width) == (32, 48)
    _, condition = condition_of([picture(600, 640)], request(), max_hxw=102400)
    assert condition.height * condition.width <= 102400 and condition.height % 32 == condition.width % 32 == 0


def test_condition_channels():
    vae, condition = condition_of([picture(32, 48)], request(num_samples_per_prompt=2), crop_for_hw=True)
    video, noise = vae.encoded[0]
    assert video.shape == (2, 3, 9, 32, 48) and noise.shape == (2, 8, 3, 4, 6)
    assert (noise[0] != noise[1]).any()
    assert (video[:, :, 1:] == -1).all()
    np.testing.assert_allclose(video[0, :, 0], picture(32, 48)[0] / 127.5 - 1, atol=1e-6)
    mask = condition.channels[:, 8:]
    assert (mask[:, :, 0] == 0).all() and (mask[:, :, 1:] == 1).all()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_condition_pixels_round_in_the_models_type(dtype):
    import torch

    pixels = picture(32, 48)
    ours = inpaint.pixel_values(pixels, sampling.NUMPY_TYPES[dtype])
    theirs = torch.from_numpy(pixels).to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]) / 255.0 * 2.0 - 1.0
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().permute(1, 0, 2, 3).numpy())


def test_noise_only_on_given_frames():
    clean, _ = condition_of([picture(32, 48)], request(), crop_for_hw=True)
    noisy, _ = condition_of([picture(32, 48)], request(), crop_for_hw=True, noise_strength=0.25)
    difference = noisy.encoded[0][0] - clean.encoded[0][0]
    assert not difference[:, :, 1:].any()
    # 4608 normal numbers: their deviation is good to 1 %; ln sigma deviates by 1 %
    assert difference[:, :, 0].std() == pytest.approx(0.25, rel=0.06)


def test_condition_enters_every_call_unscaled():
    asked = request()
    vae, condition = condition_of([picture(32, 48)], asked, crop_for_hw=True)
    denoiser = FakeDenoiser(condition=12)
    video = inpaint.sample_prompt(asked, 0, embeddings(), condition, denoiser, vae)
    assert video.shape == (1, 9, 32, 48, 3)
    for seen, *_ in denoiser.calls:
        assert seen.shape == (2, 20, 3, 4, 6)
        np.testing.assert_array_equal(seen[:, 8:], condition.channels.repeat(2, axis=0))


def test_one_seed_one_condition():
    conditions = [condition_of([picture(40, 60)] * 9, request(seed=s), kind="image")[1] for s in (1, 1, 2)]
    np.testing.assert_array_equal(conditions[0].channels, conditions[1].channels)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: inpaint.ConditionRequest(mask_type="half"), "unknown mask_type 'half'.*random_temporal"),
        (lambda: inpaint.ConditionRequest(max_hxw=1000), r"max_hxw 1000: must be in 102400\.\.236544"),
        (lambda: inpaint.ConditionRequest(noise_strength=-0.1), r"noise_strength -0.1: must be in 0\.\.1"),
        (lambda: inpaint.condition_kind([]), "at least one picture"),
        (lambda: inpaint.condition_kind(["a.txt"]), "a.txt: must be a picture"),
        (lambda: inpaint.condition_kind(["a.mp4", "b.mp4"]), "only one video"),
        (lambda: inpaint.default_indices(3), "3 pictures: their frame indices must be given"),
        (lambda: place(3, (0, 1)), "2 frame indices for 3 pictures"),
        (lambda: place(2, (0, 9)), r"must be in -9\.\.8"),
        (lambda: place(10, None), "10 frames given for a video of 9"),
        (lambda: inpaint.compress_mask(np.ones((1, 1, 7, 16, 16), np.float32), 2, 2), "mask of 7 frames"),
    ],
)
def test_bad_conditions(build, message):
    with pytest.raises(OspError, match=message) as error:
        build()
    assert "\n" not in str(error.value)


def place(count: int, indices):
    clip = np.zeros((count, 3, 4, 4), np.uint8)
    return inpaint.place_frames(clip, 9, inpaint.ConditionRequest(indices=indices), "image", random.Random(0))


def test_autoencoder_and_mask_must_have_one_stride():
    with pytest.raises(OspError, match="4 frames in a latent frame, the autoencoder 8"):
        condition_of([picture(32, 48)], request(), FakeAutoencoder(stride=8), crop_for_hw=True)


def test_flow_matching_does_not_inpaint():
    asked = request(sample_method="FlowMatchEulerDiscrete")
    vae, condition = condition_of([picture(32, 48)], asked, crop_for_hw=True)
    with pytest.raises(OspError, match="not for inpainting"):
        inpaint.sample_prompt(asked, 0, embeddings(), condition, FakeDenoiser(condition=12), vae)


def test_pictures_are_loaded_from_files(tmp_path):
    from PIL import Image

    path = tmp_path / "a.png"
    Image.fromarray(picture(20, 30)[0].transpose(1, 2, 0)).save(path)
    assert inpaint.condition_kind([str(path)]) == "image"
    (clip,) = inpaint.load_clips([str(path)], 9)
    np.testing.assert_array_equal(clip, picture(20, 30))
