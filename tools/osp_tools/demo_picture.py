"""The demo's picture and film: original and both backends side by side, labelled."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

GAIN = 64  # how much the picture of differences is amplified
BAR = 22  # pixels of a caption
NOTE = "weights: untrained, set by hand (autoencoder) or random (transformer)"


def caption(text: str, width: int, colour: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """A black bar with text, uint8 (BAR, width, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    bar = Image.new("RGB", (width, BAR))
    try:
        font = ImageFont.load_default(size=13)
    except TypeError:  # Pillow before 10.1 has one size
        font = ImageFont.load_default()
    ImageDraw.Draw(bar).text((5, 3), text, fill=colour, font=font)
    return np.array(bar)


def labelled(text: str, picture_HWC: np.ndarray) -> np.ndarray:
    return np.concatenate([caption(text, picture_HWC.shape[1]), picture_HWC])


def apart(a_HWC: np.ndarray, b_HWC: np.ndarray) -> np.ndarray:
    """|a - b| times GAIN: one grey level is visible, black is equality."""
    return np.minimum(np.abs(a_HWC.astype(int) - b_HWC) * GAIN, 255).astype(np.uint8)


def sheet(original_THWC: np.ndarray, torch: dict, mindspore: dict) -> np.ndarray:
    """The middle frame of both jobs: uint8 (H, W, 3)."""
    t = len(original_THWC) // 2
    a, b = torch["rec"][t], mindspore["rec"][t]
    rows = [
        [("clip: Big Buck Bunny, Blender Foundation, CC BY 3.0", original_THWC[t]), ("its reconstruction, PyTorch", a)],
        [("its reconstruction, MindSpore", b), (f"difference PyTorch - MindSpore, {GAIN} times", apart(a, b))],
    ]
    k = max(original_THWC.shape[2] * 2 // (3 * torch["sample"].shape[2]), 1)
    c, d = (np.kron(r["sample"][t], np.ones((k, k, 1), np.uint8)) for r in (torch, mindspore))
    rows.append(
        [
            ("sample (random weights), PyTorch", c),
            ("MindSpore, same seed", d),
            (f"difference, {GAIN} times", apart(c, d)),
        ]
    )
    stacked = [np.concatenate([labelled(text, picture) for text, picture in row], 1) for row in rows]
    width = max(row.shape[1] for row in stacked)
    stacked = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0))) for row in stacked]
    return np.concatenate([caption(NOTE, width, (255, 200, 80)), *stacked])


def film(original_THWC: np.ndarray, torch: dict, mindspore: dict) -> Iterator[np.ndarray]:
    """Frames of the reconstruction: original, PyTorch, MindSpore from top to bottom."""
    for frame, a, b in zip(original_THWC, torch["rec"], mindspore["rec"], strict=True):
        parts = [
            ("clip: Big Buck Bunny, Blender Foundation, CC BY 3.0", frame),
            ("PyTorch, untrained weights", a),
            ("MindSpore, untrained weights", b),
        ]
        yield np.concatenate([labelled(text, picture) for text, picture in parts])
