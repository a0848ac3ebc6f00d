"""Writing clips and pictures: mp4, gif, jpg, png.

Frames are uint8 RGB (H, W, 3). Every file is written under a temporary name in its folder and renamed when it is
complete: a reader, or a rerun that looks for finished files, never meets half of one.

mp4 is H.264. Even sizes are stored as yuv420p, which everything plays. 4:2:0 cannot hold an odd width or height; such
clips (grids of samples have odd sizes) keep their exact size and are stored as yuv444p, which ffmpeg, VLC, mpv and
Chrome play and some players refuse; a line in the log says so. Nothing is ever resized or padded.
"""

from __future__ import annotations

import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from osp_shared.errors import OspError

VIDEO_SUFFIXES = (".mp4", ".gif")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
CRF = 20  # x264's scale; imageio's `quality=6`, with which the original writes its samples
JPEG_QUALITY = 95
SMPTE_170M, LIMITED_RANGE = 6, 1  # FFmpeg's numbers

log = logging.getLogger(__name__)


def check_writable(folder: str | Path) -> Path:
    """The folder as a Path, if files can be written there or it can be created; an OspError otherwise.

    Call it before the work starts. Nothing is left behind: the folder itself is created by the first file.
    """
    target = Path(folder)
    existing = next(parent for parent in (target.absolute(), *target.absolute().parents) if os.path.lexists(parent))
    if not existing.is_dir():
        raise OspError(f"cannot write to folder {folder}: {existing} is not a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".osp-"):
            pass
    except OSError as error:
        raise OspError(
            f"cannot write to folder {folder} ({error.strerror or error}): choose a folder you may write to"
        ) from None
    return target


def write_video(
    path: str | Path, frames: Iterable[np.ndarray], fps: float, *, crf: int = CRF, lossless: bool = False
) -> Path:
    """Writes frames (an array (T, H, W, 3) or any iterable of (H, W, 3)) to an .mp4 or .gif, by the path's suffix.

    fps: frames a second. crf: quality of an mp4, 0 best, 51 worst. lossless: mp4 with the exact pixels (H.264 in RGB,
    large; for tests and measurements). An iterable is consumed frame by frame.
    """
    suffix = _suffix(path, VIDEO_SUFFIXES, "video")
    if not fps > 0:
        raise OspError(f"fps {fps} for {path}: must be more than 0")
    if lossless and suffix == ".gif":
        raise OspError(f"{path} cannot be lossless: a gif has 256 colours a frame; use .mp4")
    checked = _checked_frames(frames, path)
    if suffix == ".gif":
        return _replacing(path, lambda temporary: _write_gif(temporary, checked, fps))
    return _replacing(path, lambda temporary: _write_mp4(temporary, checked, fps, crf, lossless, path))


def write_image(path: str | Path, image_HWC: np.ndarray) -> Path:
    """Writes one picture, uint8 (H, W, 3), to a .jpg or .png, by the path's suffix. A png holds the exact pixels."""
    from PIL import Image

    suffix = _suffix(path, IMAGE_SUFFIXES, "picture")
    image_HWC = next(_checked_frames([image_HWC], path))
    options = {"format": "PNG"} if suffix == ".png" else {"format": "JPEG", "quality": JPEG_QUALITY}
    return _replacing(path, lambda temporary: Image.fromarray(image_HWC).save(temporary, **options))


# ------------------------------------------------------------------------------------------------------- encoders


def _write_mp4(temporary: Path, frames: Iterator[np.ndarray], fps: float, crf: int, lossless: bool, path) -> None:
    import av

    first = next(frames)
    height, width = first.shape[:2]
    even = height % 2 == 0 and width % 2 == 0
    codec, pix_fmt = ("libx264rgb", "rgb24") if lossless else ("libx264", "yuv420p" if even else "yuv444p")
    if not even and not lossless:
        log.warning("%s: %dx%d has an odd side, stored as H.264 4:4:4, which some players refuse", path, height, width)
    options = {"qp": "0"} if lossless else {"crf": str(crf)}
    try:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
            stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(65535), options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            if not lossless:
                # FFmpeg converts with the BT.601 matrix; untagged, players take large pictures for BT.709
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = SMPTE_170M
                context.color_range = LIMITED_RANGE
            for frame in chain([first], frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    except av.error.FFmpegError as error:
        raise OspError(f"cannot write {path} ({error.strerror or error})") from None


def _write_gif(temporary: Path, frames: Iterator[np.ndarray], fps: float) -> None:
    from PIL import Image

    first = Image.fromarray(next(frames))
    rest = [Image.fromarray(frame) for frame in frames]
    # Delays are whole hundredths of a second, at least two (browsers slow down shorter ones): round the running time,
    # so that the clip's length is right.
    ends = [round(100 * i / fps) for i in range(len(rest) + 2)]
    delays = [10 * max(end - start, 2) for start, end in pairwise(ends)]
    first.save(temporary, format="GIF", save_all=True, append_images=rest, duration=delays, loop=0)


# --------------------------------------------------------------------------------------------------------- checks


def _suffix(path: str | Path, known: tuple[str, ...], kind: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in known:
        raise OspError(f"{path}: a {kind} is written as {' or '.join(known)}")
    return suffix


def _checked_frames(frames: Iterable[np.ndarray], path: str | Path) -> Iterator[np.ndarray]:
    """The frames, contiguous, each checked against the first."""
    shape = None
    for number, frame in enumerate(frames):
        shape = shape or frame.shape
        if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
            raise TypeError(f"{path}: frame {number} is {frame.dtype} {frame.shape}; frames are uint8 (H, W, 3), alike")
        yield np.ascontiguousarray(frame)
    if shape is None:
        raise OspError(f"{path}: there are no frames to write")


def _replacing(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Runs write(temporary path) and renames the result to `path`; on any failure nothing stays."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        temporary.replace(target)
        return target
    except OSError as error:
        raise OspError(f"cannot write {path} ({error.strerror or error}): choose a folder you may write to") from None
    finally:
        if target.parent.is_dir():
            temporary.unlink(missing_ok=True)
