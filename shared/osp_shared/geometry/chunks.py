"""Where a video is cut for an autoencoder: chunks in time, overlapping tiles in space.

Integers and float64 windows only; the backends' tiling.py carries tensors through them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from osp_shared.errors import OspError

CELL = 8  # pixels a latent cell covers in height and in width
UPSTREAM, EXACT = "upstream", "exact"


@dataclass(frozen=True)
class Tiling:
    """How an encode or decode is cut to bound its memory.

    temporal: None, the whole video at once; "exact", chunks that together equal the whole pass at every length;
        "upstream", the original's chunks, bit for bit in what they cache: at (T - 2) % t_chunk_dec == 0 the last six
        frames of a decode are wrong, and some lengths cannot be done at all.
        With groupnorm either kind is lossy: statistics are taken per chunk.
    t_chunk_enc: pixel frames in an encoder chunk; t_chunk_dec: latent frames in a decoder chunk; the first chunk is
        always the first frame alone.
    tile_size: pixels in the side of a spatial tile, None for no spatial tiling; tile_overlap: pixels that neighbours
        share at least. Blended tiles are an approximation: attention sees one tile, and so does groupnorm.

    Raises:
        OspError: a value outside its range.
    """

    temporal: str | None = UPSTREAM
    t_chunk_enc: int = 8
    t_chunk_dec: int = 2
    tile_size: int | None = None
    tile_overlap: int = 64

    def __post_init__(self):
        if self.temporal not in (None, UPSTREAM, EXACT):
            raise OspError(f"tiling: temporal is {self.temporal!r}, must be {UPSTREAM}, {EXACT} or None")
        for key in ("t_chunk_enc", "t_chunk_dec"):
            if getattr(self, key) < 1:
                raise OspError(f"tiling: {key} is {getattr(self, key)}, must be at least 1 frame")
        if self.tile_size is None:
            return
        if self.tile_size < 2 * CELL or self.tile_size % CELL:
            raise OspError(f"tiling: tile_size is {self.tile_size}, must be a multiple of {CELL}, at least {2 * CELL}")
        if self.tile_overlap % CELL or not 0 <= self.tile_overlap <= self.tile_size // 2:
            raise OspError(
                f"tiling: tile_overlap is {self.tile_overlap}, must be a multiple of {CELL} "
                f"from 0 to half of tile_size = {self.tile_size}"
            )


class Chunk(NamedTuple):
    """Frames [start, stop) of the input, run together with `look_ahead` frames behind them."""

    start: int
    stop: int
    look_ahead: int = 0


def chunks(frames: int, size: int) -> list[Chunk]:
    """The first frame alone, then `size` frames at a time; the last chunk is what is left."""
    starts = [0, *range(1, frames, size)]
    return [Chunk(start, stop) for start, stop in zip(starts, starts[1:] + [frames], strict=True)]


def encoder_chunks(frames: int, tiling: Tiling, stride: int) -> list[Chunk]:
    """Chunks of pixel frames; `stride` is the encoder's in time.

    Exact chunks leave out the (frames - 1) % stride frames at the end: the strided layers of a whole pass drop them
    too, and no layer looks ahead, so nothing depends on them.

    Raises:
        OspError: exact chunks that are not whole strides.
    """
    if tiling.temporal == UPSTREAM:
        return chunks(frames, tiling.t_chunk_enc)
    if tiling.t_chunk_enc % stride:
        raise OspError(f"tiling: t_chunk_enc is {tiling.t_chunk_enc}, exact chunks need a multiple of {stride} frames")
    return chunks((frames - 1) // stride * stride + 1, tiling.t_chunk_enc)


def decoder_chunks(frames: int, tiling: Tiling) -> list[Chunk]:
    """Chunks of latent frames.

    The original runs each chunk with one frame of look-ahead, but the test for it is off by one: the chunk before a
    last one of a single frame goes without. Exact chunks need no look-ahead: layers keep back what the next frame
    decides.
    """
    plain = chunks(frames, tiling.t_chunk_dec)
    if tiling.temporal == EXACT:
        return plain
    return [Chunk(c.start, c.stop, int(c.stop + 1 < frames)) for c in plain]


class Span(NamedTuple):
    """One tile along one axis: cells [start, stop) and the window (float64) that blends it with its neighbours."""

    start: int
    stop: int
    window: np.ndarray


def spans(cells: int, size: int, overlap: int, scale: int = 1) -> list[Span]:
    """Tiles of equal size over an axis, evenly spread, sharing at least `overlap` cells with each neighbour.

    scale: window entries per cell, for an output finer than the cells. Where tiles meet, each fades out over the
    middle of the shared stretch; windows of all tiles sum to one everywhere.
    """
    if cells <= size:
        return [Span(0, cells, np.ones(cells * scale))]
    count = math.ceil((cells - overlap) / (size - overlap))
    starts = [round(i * (cells - size) / (count - 1)) for i in range(count)]
    raw = np.zeros((count, cells * scale))
    for i, start in enumerate(starts):
        before = (starts[i - 1] + size - start) * scale if i else 0
        after = (start + size - starts[i + 1]) * scale if i + 1 < count else 0
        raw[i, start * scale : (start + size) * scale] = _fade(size * scale, before, after)
    raw /= raw.sum(0)
    return [Span(s, s + size, w[s * scale : (s + size) * scale]) for s, w in zip(starts, raw, strict=True)]


def _fade(length: int, before: int, after: int) -> np.ndarray:
    """One inside, falling to zero towards an end over the middle half of the entries shared there with a neighbour.

    The quarter next to the cut is left to the neighbour: it saw zeros where the picture goes on.
    """
    i = np.arange(length) + 0.5
    rise = np.clip(2 * i / before - 0.5, 0.0, 1.0) if before else np.ones(length)
    fall = np.clip(2 * (length - i) / after - 0.5, 0.0, 1.0) if after else np.ones(length)
    return np.minimum(rise, fall)
