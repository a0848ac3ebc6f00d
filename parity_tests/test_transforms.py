"""Crops, resampling, grey levels, frame numbers, metrics and grids: golden numbers and what must hold of any size."""

import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import golden_files
from osp_shared.errors import OspError
from osp_shared.fill import input_tensor, rng
from osp_shared.video import grid, metrics, resize
from osp_shared.video.reader import frame_ids

EPS = 2.0**-24  # unit round-off of float32


def u8(shape, salt=""):
    """Golden input of kind u8."""
    return rng(f"input:u8:{'x'.join(map(str, shape))}", salt).integers(0, 256, shape, dtype=np.uint8)


def shape_of(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split("x"))


def check_row(array: np.ndarray, row: list, tolerance: float, what: str) -> float:
    """Compares with a golden row [shape, mean, std, l2, samples] or [shape, every value]; the largest error."""
    assert list(array.shape) == row[0], what
    flat = array.astype(np.float64).ravel()
    samples = row[-1]
    full = len(row) == 2
    if full:
        taken = flat
    else:
        index = [(2654435761 * j + 97) % flat.size for j in range(len(samples))]
        taken = flat[index]
        np.testing.assert_allclose([flat.mean(), flat.std()], row[1:3], rtol=1e-7, atol=tolerance, err_msg=what)
        # the norm of an error of `tolerance` everywhere, and the nine digits that are stored
        assert abs(np.linalg.norm(flat) - row[3]) <= tolerance * math.sqrt(flat.size) + 1e-7 * row[3], what
    error = np.abs(taken - samples).max()
    assert error <= tolerance, f"{what}: {error:.3g} > {tolerance:.3g}"
    return float(error)


def resampling_tolerance(*sizes: int) -> float:
    """Two float32 sums of up to 2 n / m + 2 products of numbers up to 1, and their weights, then 2 x - 1."""
    taps = max(2 * max(sizes) / min(sizes) + 2, 4)
    return 2 * (2 * taps + 8) * EPS


# ----------------------------------------------------------------------------------------------- golden `transforms`


def golden_rec_video(match, row, state, salt):
    source, target = shape_of(match["shape"]), shape_of(match["target"])
    unit = u8(source, salt).astype(np.float32) / np.float32(255)
    got = resize.normalise(resize.center_crop_resize(unit, *target))
    check_row(got, row, resampling_tolerance(*source[2:], *target), match.string)


def golden_eval_resize(match, row, state, salt):
    source, size = shape_of(match["shape"]), int(match["size"])
    unit = u8(source, salt).astype(np.float32) / np.float32(255)
    target = resize.eval_short_side_size(*source[2:], size)
    state["resized"] = resize.resize_bilinear(unit, *target)
    state["tolerance"] = resampling_tolerance(*source[2:], *target)
    check_row(state["resized"], row, state["tolerance"], match.string)


def golden_crop(match, row, state, salt):
    size = int(match["size"])
    before = state["resized"]
    check_row(resize.center_crop(*before.shape[2:], size, size).of(before), row, state["tolerance"], match.string)


def golden_frame_ids(match, row, state, salt):
    n = int(match["frames"])
    ids = frame_ids(n, int(match["rate"]))
    assert len(ids) == n
    assert [int(ids[i]) for i in (0, 1, n // 2, n - 2, n - 1)] == row


def golden_ids_note(match, row, state, salt):
    assert row == "positions 0, 1, n//2, n-2, n-1"  # which golden_frame_ids relies on


def golden_uint8(match, row, state, salt):
    video_TCHW = input_tensor("video", shape_of(match["shape"]), salt)
    check_row(resize.to_uint8(video_TCHW).transpose(0, 2, 3, 1), row, 0, match.string)


FORMS = [
    (r"rec_video preprocess u8 (?P<shape>[\dx]+) -> (?P<target>[\dx]+)", golden_rec_video),
    (r"eval short-side resize (?P<shape>[\dx]+) -> (?P<size>\d+)", golden_eval_resize),
    (r"then centre crop (?P<size>\d+)", golden_crop),
    (r"frame ids num_frames=(?P<frames>\d+) sample_rate=(?P<rate>\d+)", golden_frame_ids),
    (r"frame ids listed", golden_ids_note),
    (r"to uint8 \(clamp, /2\+\.5, x255, truncate\) of input:video:(?P<shape>[\dx]+) -> t,h,w,c", golden_uint8),
]


@pytest.mark.parametrize("path", golden_files.files("wfvae", "transforms"), ids=lambda p: p.stem)
def test_golden_transforms(path):
    content = golden_files.load(path)
    salt, state = content["header"].get("salt", ""), {}
    assert content["transforms"]
    for key, row in content["transforms"].items():
        matches = [(m, check) for form, check in FORMS if (m := re.fullmatch(form, key))]
        assert len(matches) == 1, f"golden entry of an unknown form: {key!r}"
        match, check = matches[0]
        check(match, row, state, salt)


def test_golden_files_are_there():
    assert golden_files.files("wfvae", "transforms") and golden_files.files("wfvae", "metrics")


# -------------------------------------------------------------------------------------------------- golden `metrics`


@pytest.mark.parametrize("path", golden_files.files("wfvae", "metrics"), ids=lambda p: p.stem)
def test_golden_psnr_and_ssim(path):
    content = golden_files.load(path)
    salt, gold = content["header"].get("salt", ""), content["metrics"]
    form = (
        r"a=input:u8:([\dx]+)/255, b=clip\(([\d.]+)a\+([\d.]+)\+([\d.]+)\*input:noise:([\dx]+),0,1\); layout b,t,c,h,w"
    )
    match = re.fullmatch(form, gold["pair"])
    assert match, f"golden pair of an unknown form: {gold['pair']!r}"
    gain, offset, noise = (np.float32(match[i]) for i in (2, 3, 4))
    a = u8(shape_of(match[1]), salt).astype(np.float32) / np.float32(255)
    b = np.clip(gain * a + offset + noise * input_tensor("noise", shape_of(match[5]), salt), 0, 1).astype(np.float32)
    mean, std = metrics.over_videos(metrics.psnr(a, b))
    # The reference squares and averages in float32: a relative n eps of the mse, 4.35 dB a unit, is far above that.
    np.testing.assert_allclose(mean, gold["psnr_per_frame_mean_over_videos"], rtol=1e-6)
    np.testing.assert_allclose(std, gold["psnr_per_frame_std"], atol=2e-6 * max(mean))
    assert metrics.psnr(a, a).mean() == gold["psnr_identical"]
    mean, _ = metrics.over_videos(metrics.ssim(a, b))
    np.testing.assert_allclose(mean, gold["ssim_per_frame_mean_over_videos"], rtol=1e-6)
    np.testing.assert_array_equal(metrics.ssim(a, a), 1.0)


def test_metrics_refuse_other_shapes():
    x = np.zeros((1, 1, 3, 16, 16))
    with pytest.raises(OspError, match="the same"):
        metrics.psnr(x, x[:, :, :, 1:])
    with pytest.raises(OspError, match="at least 11"):
        metrics.ssim(x[..., :10], x[..., :10])


# --------------------------------------------------------------------------- golden `misc` of the samplers' area


def misc(kind: str) -> list:
    """Items of the scheduler files' `misc` section of one kind."""
    return [
        pytest.param(item, id=f"{p.stem}-{kind}-{n}")
        for p in golden_files.files("scheduler", "misc")
        for n, item in enumerate(golden_files.load(p)["misc"])
        if item["kind"] == kind
    ]


@pytest.mark.parametrize("item", misc("to_uint8"))
def test_golden_to_uint8_in_each_dtype(item):
    dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[item["dtype"]]
    assert resize.to_uint8(np.array(item["in"], np.float32), dtype).tolist() == item["out"]


@pytest.mark.parametrize("item", misc("video_grid"))
def test_golden_video_grid(item):
    b, t, h, w = (item[k] for k in "bthw")
    clips = np.broadcast_to(np.arange(1, b + 1, dtype=np.uint8).reshape(b, 1, 1, 1, 1), (b, t, h, w, 3))
    got = grid.video_grid(clips)
    assert list(got.shape) == item["shape"]
    assert got[0, :, :, 0].tolist() == item["frame0_channel0"]


@pytest.mark.parametrize("item", misc("maxhwresize"))
def test_golden_max_area(item):
    size = resize.max_area_size(item["h"], item["w"], item["max_hxw"])
    assert list(size) == item["resized"]
    assert list(resize.stride_crop(*size, 32)) == item["stride32_crop_i_j_h_w"]


@pytest.mark.parametrize("item", misc("center_crop"))
def test_golden_aspect_crop(item):
    crop = resize.aspect_crop(item["h"], item["w"], *item["target"])
    assert [list(crop[:2]), list(crop[2:])] == [item["i_j"], item["crop_h_w"]]


# ------------------------------------------------------------------------------------------------ resampling itself


SIZE = st.integers(2, 90)


def direct_weights(n_in: int, n_out: int) -> np.ndarray:
    """The formula, one weight after the other: antialias + align_corners."""
    scale = (n_in - 1) / (n_out - 1) if n_out > 1 else 0.0
    support = max(scale, 1.0)
    matrix = np.zeros((n_out, n_in))
    for i in range(n_out):
        center = scale * (i + 0.5)
        for j in range(max(int(center - support + 0.5), 0), min(int(center + support + 0.5), n_in)):
            matrix[i, j] = max(0.0, 1 - abs(j + 0.5 - center) / support)
    return matrix / matrix.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE)
def test_resize_is_the_formula(h, w, height, width):
    x = rng(f"resize {h} {w}").random((2, h, w), dtype=np.float32)
    want = direct_weights(h, height) @ x.astype(np.float64) @ direct_weights(w, width).T
    # A centre near n carries an error of n eps, over a support of at least 1, between pixels that differ by at most 1.
    tolerance = resampling_tolerance(h, w, height, width) + 4 * max(h, w) * EPS
    np.testing.assert_allclose(resize.resize_bilinear(x, height, width), want, atol=tolerance)


@settings(max_examples=60, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE)
def test_resizes_are_the_librarys(h, w, height, width):
    """Against PyTorch's own kernels: floats to rounding, bytes bit for bit."""
    torch = pytest.importorskip("torch")
    from torch.nn.functional import interpolate

    pixels = rng(f"library {h} {w}").integers(0, 256, (1, 3, h, w), dtype=np.uint8)
    unit = pixels.astype(np.float32) / np.float32(255)
    for antialias, corners in ((True, True), (True, False), (False, False)):
        kind = {"size": (height, width), "mode": "bilinear", "antialias": antialias, "align_corners": corners}
        want = interpolate(torch.from_numpy(unit), **kind).numpy()
        got = resize.resize_bilinear(unit, height, width, antialias=antialias, align_corners=corners)
        np.testing.assert_allclose(got, want, atol=resampling_tolerance(h, w, height, width))
    want = interpolate(torch.from_numpy(pixels), size=(height, width), mode="bilinear", antialias=True,
                       align_corners=True).numpy()  # fmt: skip
    np.testing.assert_array_equal(resize.resize_bilinear_uint8(pixels, height, width), want)


@settings(max_examples=40, deadline=None)
@given(SIZE, SIZE, SIZE, SIZE)
def test_resize_keeps_what_it_must(h, w, height, width):
    x = rng(f"keeps {h} {w}").random((h, w), dtype=np.float32)
    assert resize.resize_bilinear(x, h, w).tobytes() == x.tobytes()
    got = resize.resize_bilinear(x, height, width)
    slack = resampling_tolerance(h, w, height, width)
    assert x.min() - slack <= got.min() and got.max() <= x.max() + slack
    for antialias, corners in ((True, True), (True, False), (False, False)):
        flat = resize.resize_bilinear(np.ones((h, w), np.float32), height, width, antialias=antialias,
                                      align_corners=corners)  # fmt: skip
        np.testing.assert_allclose(flat, 1, atol=slack)
    grey = np.full((h, w), 200, np.uint8)
    assert (resize.resize_bilinear_uint8(grey, height, width) == 200).all()


def test_layout_of_the_leading_axes_does_not_matter():
    """Contiguous, transposed and sliced clips, and one plane at a time, give the same bytes."""
    clip = u8((4, 40, 52, 3))
    views = clip.transpose(0, 3, 1, 2)[:, :, 3:37, 5:41]
    for x in (views, (views.astype(np.float32) / np.float32(255))):
        whole = resize.center_crop_resize(x, 24, 16)
        again = resize.center_crop_resize(np.ascontiguousarray(x), 24, 16)
        single = np.stack([[resize.center_crop_resize(plane, 24, 16) for plane in frame] for frame in x])
        assert whole.dtype == x.dtype
        np.testing.assert_array_equal(whole, again)
        np.testing.assert_array_equal(whole, single)


def test_crops():
    assert resize.center_crop(11, 14, 6, 7) == (2, 4, 6, 7)  # 2.5 to the even 2, 3.5 to the even 4
    assert resize.stride_crop(11, 14, 4) == (1, 1, 8, 12)
    assert resize.short_side_size(37, 53, 24) == (24, 34)
    assert resize.short_side_size(53, 37, 24) == (34, 24)
    assert resize.eval_short_side_size(53, 37, 32) == (45, 32)
    x = np.arange(11 * 14).reshape(11, 14)
    assert resize.center_crop(11, 14, 6, 7).of(x)[0, 0] == 32
    for wrong in (
        lambda: resize.center_crop(5, 9, 6, 6),
        lambda: resize.aspect_crop(1, 7, 640, 352),
        lambda: resize.stride_crop(30, 64, 32),
        lambda: resize.resize_bilinear(x, 0, 4),
    ):
        with pytest.raises(OspError):
            wrong()


def test_grey_levels():
    assert resize.normalise(np.array([0, 255], np.uint8)).tolist() == [-1.0, 1.0]
    assert resize.to_uint8(np.array([np.nan, np.inf, -np.inf], np.float32)).tolist() == [0, 255, 0]
    assert resize.to_uint8(np.array([np.nan, np.inf, -np.inf], np.float32), "bf16").tolist() == [0, 255, 0]
    levels = np.arange(256, dtype=np.uint8)
    back = resize.to_uint8(resize.normalise(levels)).astype(int)
    assert set(levels - back) <= {0, 1}  # truncation may lose a level, never two
    with pytest.raises(OspError, match="fp32, fp16 or bf16"):
        resize.to_uint8(np.zeros(3), "fp8")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_grey_levels_are_the_librarys(dtype):
    torch = pytest.importorskip("torch")
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    video = input_tensor("video", (3, 5, 16, 16))
    want = ((torch.from_numpy(video).to(kind) / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).numpy()
    np.testing.assert_array_equal(resize.to_uint8(video, dtype), want)


# ------------------------------------------------------------------------------------------------------ frame numbers


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 8), st.integers(0, 50), st.integers(1, 400))
def test_frame_ids(num_frames, rate, start, available):
    ids = frame_ids(num_frames, rate, start=start)
    assert len(ids) == num_frames and ids[0] == start
    assert num_frames == 1 or ids[-1] == start + rate * num_frames - 1
    assert (np.diff(ids) >= 0).all()
    if start + rate * num_frames <= available:
        assert frame_ids(num_frames, rate, start=start, available=available).tolist() == ids.tolist()
        return
    with pytest.raises(OspError, match=f"{available} frames"):
        frame_ids(num_frames, rate, start=start, available=available)
    if available > start:
        short = frame_ids(num_frames, rate, start=start, available=available, allow_short=True)
        assert 1 <= len(short) <= num_frames and short[-1] < available


def test_frame_ids_refuse_nonsense():
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(OspError):
            frame_ids(*wrong)


# ------------------------------------------------------------------------------------------------------ grids, names


def test_side_by_side():
    left, right = u8((2, 4, 6, 3)), u8((2, 4, 6, 3), "other")
    both = grid.side_by_side(left, right)
    assert both.shape == (2, 4, 12, 3)
    np.testing.assert_array_equal(both[:, :, :6], left)
    np.testing.assert_array_equal(both[:, :, 6:], right)
    with pytest.raises(OspError, match="same frames and size"):
        grid.side_by_side(left, right[:1])


@pytest.mark.parametrize("count,rows,columns", [(2, 1, 2), (3, 2, 2), (4, 2, 2), (5, 2, 3), (9, 3, 3), (10, 3, 4)])
def test_image_grid(count, rows, columns):
    images = u8((count, 5, 7, 3)) | 1  # never black
    canvas = grid.image_grid(images)
    assert canvas.shape == (rows * 7 + 2, columns * 9 + 2, 3)
    for i, image in enumerate(images):
        top, left = i // columns * 7 + 2, i % columns * 9 + 2
        np.testing.assert_array_equal(canvas[top : top + 5, left : left + 7], image)
    assert (canvas > 0).sum() == images.size  # the rest is black
    np.testing.assert_array_equal(grid.image_grid(images[:1]), images[0])


def test_names():
    name = grid.sample_name
    assert name("PNDM", 7.5, 50, "mp4", index=3) == "PNDM_3_gs7.5_s50.mp4"
    assert name("PNDM", 7, 50, ".jpg", index=0, sample=1) == "PNDM_0_gs7.0_s50_i1.jpg"
    assert name("PNDM", 7.5, 50, "mp4") == "PNDM_gs7.5_s50.mp4"
    assert grid.reconstruction_name("a/b.avi", 5) == "a/b.mp4"
    assert grid.reconstruction_name("b.mp4", 1) == "b.jpg"
    assert grid.reconstruction_name("b.gif", 9) == "b.gif"
