"""Several pictures in one, and the names of output files.

Shapes: B clips or pictures, T frames, H W pixels, three channels last; uint8.
"""

from __future__ import annotations

import math
from pathlib import PurePath

import numpy as np

from osp_shared.errors import OspError


def side_by_side(original_THWC: np.ndarray, reconstruction_THWC: np.ndarray) -> np.ndarray:
    """The original on the left, the reconstruction on the right: (T, H, 2 W, 3). Also without the T axis."""
    if original_THWC.shape != reconstruction_THWC.shape:
        raise OspError(
            f"original {original_THWC.shape} and reconstruction {reconstruction_THWC.shape} cannot stand side by "
            "side: both must have the same frames and size"
        )
    return np.concatenate([original_THWC, reconstruction_THWC], axis=-2)


def image_grid(images_BHWC: np.ndarray, padding: int = 2) -> np.ndarray:
    """Pictures in rows of ceil(sqrt(B)), black lines of `padding` pixels between and around.

    The layout of torchvision's make_grid: one picture alone stays as it is.
    """
    count, height, width, channels = images_BHWC.shape
    if count == 1:
        return images_BHWC[0].copy()
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    step_h, step_w = height + padding, width + padding
    canvas = np.zeros((rows * step_h + padding, columns * step_w + padding, channels), images_BHWC.dtype)
    for i, image in enumerate(images_BHWC):
        top, left = i // columns * step_h + padding, i % columns * step_w + padding
        canvas[top : top + height, left : left + width] = image
    return canvas


def video_grid(videos_BTHWC: np.ndarray) -> np.ndarray:
    """Clips in ceil(sqrt(B)) rows on black, (T, rows (H + 1) + 1, columns (W + 1) + 1, 3).

    One black pixel between clips and, as in the original, none before the first and two after the last.
    """
    count, frames, height, width, channels = videos_BTHWC.shape
    rows = math.ceil(math.sqrt(count))
    columns = math.ceil(count / rows)
    canvas = np.zeros((frames, rows * (height + 1) + 1, columns * (width + 1) + 1, channels), videos_BTHWC.dtype)
    for i, clip in enumerate(videos_BTHWC):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        canvas[:, top : top + height, left : left + width] = clip
    return canvas


# ---------------------------------------------------------------------------------------------------------- names


def sample_name(
    method: str,
    guidance_scale: float,
    steps: int,
    extension: str,
    *,
    index: int | None = None,
    sample: int | None = None,
) -> str:
    """File name of a sample: `{method}_{index}_gs{g}_s{steps}_i{sample}.{extension}`.

    Without `sample`: the prompt's grid, or its only sample. Without `index`: the grid of all prompts.
    """
    parts = [method, None if index is None else str(index), f"gs{float(guidance_scale)}", f"s{steps}"]
    parts.append(None if sample is None else f"i{sample}")
    return "_".join(part for part in parts if part is not None) + "." + extension.lstrip(".")


def reconstruction_name(rec_path: str, frames: int) -> str:
    """File name of a reconstruction: one frame is written as .jpg (a .png stays), .avi becomes .mp4."""
    path = PurePath(rec_path)
    if frames == 1 and path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        return str(path.with_suffix(".jpg"))
    return str(path.with_suffix(".mp4")) if path.suffix.lower() == ".avi" else rec_path
