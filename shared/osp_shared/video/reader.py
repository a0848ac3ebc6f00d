"""Reading pictures and clips: which frames, and their pixels.

PyAV is the default reader. decord (x86 only) is optional; frame for frame both give the same bytes, rotation marks of
phone videos included. Frames are decoded one after the other and only the wanted ones are kept, so the memory of a
read is the memory of its result. Arrays are uint8 RGB (H, W, 3), or what `load_video` makes of them.

A decoder conceals damage: flipped bits give wrong pixels, not errors. PyAV marks most such frames, and a marked frame
at or before the last wanted one is an error here; what the decoder does not notice, only a checksum could.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from osp_shared.errors import OspError
from osp_shared.video.resize import center_crop_resize, normalise, resize_bilinear, short_side_size

READERS = ("pyav", "decord")
FOLDER_PATTERNS = ("*.avi", "*.mp4", "*.webm")


@dataclass(frozen=True)
class VideoInfo:
    """What the file says of itself. frames: number of frames; height, width: pixels as shown; fps: frames a second."""

    path: str
    frames: int
    height: int
    width: int
    fps: float


# --------------------------------------------------------------------------------------------------- which frames


def frame_ids(
    num_frames: int,
    sample_rate: int = 1,
    *,
    available: int | None = None,
    start: int = 0,
    allow_short: bool = False,
    path: str | Path = "the video",
) -> np.ndarray:
    """Frames of a reconstruction: truncated linspace from `start` to `start + sample_rate * num_frames - 1`, int64.

    The spacing is therefore not exactly `sample_rate`: 100 frames at rate 2 are 0, 2, 4, ..., 195, 197, 199. With
    `available` (frames in the file) a range that ends beyond it is an error, or, with allow_short, is cut to what is
    there with proportionally fewer frames (at least one), which is what the MindSpore port of Open-Sora Plan does.
    """
    if num_frames < 1 or sample_rate < 1 or start < 0:
        raise OspError(
            f"num_frames {num_frames}, sample_rate {sample_rate}, start {start}: "
            "the first two must be at least 1, the start at least 0"
        )
    span = sample_rate * num_frames
    if available is not None and start + span > available:
        if not allow_short or available <= start:
            raise OspError(
                f"{path} has {available} frames, but {num_frames} frames at sample rate {sample_rate} from frame "
                f"{start} need {start + span}: ask for at most {max(available - start, 0) // sample_rate} frames"
            )
        span = available - start
        num_frames = max(span // sample_rate, 1)
    return np.linspace(start, start + span - 1, num_frames, dtype=np.int64)


def folder_videos(folder: str | Path) -> list[Path]:
    """Every avi, mp4 and webm file under a folder, in that order and then by path."""
    root = Path(folder)
    if not root.is_dir():
        raise OspError(f"{folder} is not a folder: it must be a folder that holds avi, mp4 or webm files")
    found = [path for pattern in FOLDER_PATTERNS for path in sorted(root.rglob(pattern)) if path.is_file()]
    if not found:
        raise OspError(f"{folder} holds no video: looked for {', '.join(FOLDER_PATTERNS)} in it and its subfolders")
    return found


# ------------------------------------------------------------------------------------------------------- decoding


def probe(path: str | Path, reader: str = "pyav") -> VideoInfo:
    """Metadata of a video; decodes its first frame, so that what passes can be read at least that far."""
    if _checked(path, reader) == "decord":
        video = _open_decord(path)
        height, width = video[0].shape[:2]
        return VideoInfo(str(path), len(video), height, width, float(video.get_avg_fps()))
    with _open_pyav(path) as (container, stream):
        frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        rate = stream.average_rate or stream.guessed_rate
    with closing(read_frames(path, [0])) as first:
        height, width = next(first).shape[:2]
    return VideoInfo(str(path), frames, height, width, float(rate or 0))


def read_frames(path: str | Path, ids: Sequence[int], reader: str = "pyav") -> Iterator[np.ndarray]:
    """The frames of the given numbers, uint8 RGB (H, W, 3), one after the other.

    ids: not decreasing; a number may repeat. A file that ends before the last of them is an OspError that tells how
    many frames could be decoded.
    """
    ids = [int(i) for i in ids]
    if any(a > b for a, b in zip(ids, ids[1:], strict=False)) or (ids and ids[0] < 0):
        raise ValueError("read_frames takes non-negative frame numbers in order")
    if _checked(path, reader) == "decord":
        return _frames_decord(path, ids)
    return _frames_pyav(path, ids)


def load_video(
    path: str | Path,
    num_frames: int,
    height: int,
    width: int,
    *,
    sample_rate: int = 1,
    start: int = 0,
    allow_short: bool = False,
    reader: str = "pyav",
) -> np.ndarray:
    """A clip as the reconstruction commands feed it: float32 (3, T, height, width) in [-1, 1].

    Frames as `frame_ids`; each is cropped to the aspect ratio and resized (CenterCropResize on [0, 1]), then 2 x - 1.
    """
    available = probe(path, reader).frames
    ids = frame_ids(num_frames, sample_rate, available=available, start=start, allow_short=allow_short, path=path)
    clip_CTHW = np.empty((3, len(ids), height, width), np.float32)
    for t, frame_HWC in enumerate(read_frames(path, ids, reader)):
        unit_CHW = frame_HWC.transpose(2, 0, 1).astype(np.float32, order="C") / np.float32(255)
        clip_CTHW[:, t] = normalise(center_crop_resize(unit_CHW, height, width))
    return clip_CTHW


def read_image(path: str | Path) -> np.ndarray:
    """A picture file as uint8 RGB (H, W, 3), upright; grey becomes RGB, an alpha channel is dropped."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    _check_file(path, "picture")
    try:
        with Image.open(path) as image:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = _first_line(error)
        raise OspError(f"{path} cannot be read as a picture ({reason}): give a jpg, png or similar") from None


def load_image(path: str | Path, short_size: int) -> np.ndarray:
    """A picture as rec-image feeds it: float32 (3, 1, H, W) in [-1, 1], short side resized to `short_size`.

    Plain bilinear without antialias, as the torchvision version of the original does to tensors. The long side is
    whatever the aspect ratio gives: cut it to the autoencoder's multiple with `resize.stride_crop`.
    """
    picture_CHW = normalise(np.ascontiguousarray(read_image(path).transpose(2, 0, 1)))
    size = short_side_size(*picture_CHW.shape[1:], short_size)
    return resize_bilinear(picture_CHW, *size, antialias=False, align_corners=False)[:, None]


# ---------------------------------------------------------------------------------------------------------- PyAV


@contextmanager
def _open_pyav(path: str | Path):
    """(container, video stream); every FFmpeg error inside becomes an OspError that names the file."""
    import av

    try:
        with av.open(str(path)) as container:
            # FFmpeg can draw any text file as a terminal: that is not a video
            if not container.streams.video or container.format.name == "tty":
                raise OspError(f"{path} holds no video: it must be a video file such as mp4, webm or avi")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except av.error.FFmpegError as error:
        raise OspError(
            f"{path} cannot be decoded ({error.strerror or _first_line(error)}): "
            "it is not a video, or it is damaged or cut short"
        ) from None


def _frames_pyav(path: str | Path, ids: list[int]) -> Iterator[np.ndarray]:
    if not ids:
        return
    wanted = iter(ids)
    want, count, shape = next(wanted), 0, None
    with _open_pyav(path) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            count = number + 1
            if frame.is_corrupt:
                raise OspError(f"{path} is damaged at frame {number}: the decoder could only guess its pixels")
            if number < want:
                continue
            rgb_HWC = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            if rgb_HWC.shape != (shape or rgb_HWC.shape):
                raise OspError(f"{path} changes its size from {shape[:2]} to {rgb_HWC.shape[:2]} at frame {number}")
            shape = rgb_HWC.shape
            while want == number:
                yield np.ascontiguousarray(rgb_HWC)
                want = next(wanted, -1)
            if want < 0:
                return
    raise OspError(f"{path} ends after {count} frames, but frame {want} is wanted: ask for fewer frames")


# --------------------------------------------------------------------------------------------------------- decord


def _import_decord():
    """Only when a video is read: decord's runtime, once loaded, makes a later import of mindspore abort the process."""
    try:
        import decord
    except ImportError:
        raise OspError('reader "decord" needs the package decord (pip install decord), or use reader "pyav"') from None
    return decord


def _open_decord(path: str | Path):
    decord = _import_decord()
    try:
        video = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        if len(video):
            return video
    except (RuntimeError, decord.DECORDError) as error:
        raise OspError(
            f"{path} cannot be decoded ({_first_line(error)}): it is not a video, or it is damaged or cut short"
        ) from None
    raise OspError(f"{path} holds no frames: it must be a video file such as mp4, webm or avi")


def _frames_decord(path: str | Path, ids: list[int]) -> Iterator[np.ndarray]:
    decord = _import_decord()
    video = _open_decord(path)
    for number in ids:
        if number >= len(video):
            raise OspError(f"{path} ends after {len(video)} frames, but frame {number} is wanted: ask for fewer frames")
        try:
            yield video[number].asnumpy()
        except (RuntimeError, decord.DECORDError) as error:
            raise OspError(f"{path} cannot be decoded at frame {number} ({_first_line(error)})") from None


# --------------------------------------------------------------------------------------------------------- checks


def _checked(path: str | Path, reader: str) -> str:
    if reader not in READERS:
        raise OspError(f"reader {reader!r}: must be one of {', '.join(READERS)}")
    if reader == "decord" and importlib.util.find_spec("decord") is None:
        _import_decord()
    _check_file(path, "video")
    return reader


def _check_file(path: str | Path, kind: str) -> None:
    file = Path(path)
    if file.is_dir():
        raise OspError(f"{path} is a folder: give the {kind} file itself")
    if not file.exists():
        raise OspError(f"{path} does not exist: give a {kind} file")
    if file.stat().st_size == 0:
        raise OspError(f"{path} is empty (0 bytes): give a {kind} file")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else type(error).__name__
