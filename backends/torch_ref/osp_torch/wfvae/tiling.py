"""Chunks in time and tiles in space: what bounds the memory of an encode or decode.

A cache lives for one pass over one video (or tile) and is handed down with every chunk, so nothing can leak from one
call into the next. Its three questions:
    extend(layer, x)         x behind the frames that a causal window reaches back to
    upsample_time(layer, x)  x with time doubled as in a whole pass
    align(name, x, frames)   the first `frames` frames not yet taken of a side path that runs ahead of the main one
"""

from __future__ import annotations

import numpy as np
import torch

from osp_shared.errors import OspError
from osp_shared.geometry.chunks import CELL, UPSTREAM, Chunk, Tiling, decoder_chunks, encoder_chunks, spans
from osp_torch.wfvae.modules import CausalConv3d, first_repeated


class ExactCache:
    """Chunks that together equal the whole pass.

    A layer emits every frame that its input so far decides and keeps the rest back: linear interpolation in time
    waits for the next frame, and the wavelet paths beside it wait with it.
    """

    def __init__(self):
        self.kept = {}
        self.first = self.last = False

    def begin(self, chunk: Chunk, frames: int):
        self.first, self.last = chunk.start == 0, chunk.stop == frames

    def extend(self, layer, x_BCTHW):
        if self.first:
            x_BCTHW = first_repeated(layer, x_BCTHW)
        elif self.kept[layer] is not None:
            x_BCTHW = torch.cat([self.kept[layer], x_BCTHW], 2)
        windows = (x_BCTHW.shape[2] - layer.kernel_t) // layer.stride_t + 1
        self._keep(layer, x_BCTHW, windows * layer.stride_t)
        return x_BCTHW

    def upsample_time(self, layer, x_BCTHW):
        """The first chunk is the first frame at every depth, which takes no part in the interpolation."""
        if self.first:
            self.kept[layer] = None
            return x_BCTHW
        past = self.kept[layer]
        self._keep(layer, x_BCTHW, x_BCTHW.shape[2] - 1)
        h = layer.double_time(x_BCTHW if past is None else torch.cat([past, x_BCTHW], 2))
        # Of the frame before only the second half is due; of the newest frame the second half needs the next one.
        return h[:, :, 0 if past is None else 1 : None if self.last else -1]

    def align(self, name, x_BCTHW, frames: int):
        if self.kept.get(name) is not None:
            x_BCTHW = torch.cat([self.kept[name], x_BCTHW], 2)
        self._keep(name, x_BCTHW, frames)
        return x_BCTHW[:, :, :frames]

    def _keep(self, key, x_BCTHW, start: int):
        """Frames from `start` on, as a copy: a view would hold the whole chunk."""
        self.kept[key] = x_BCTHW[:, :, start:].clone() if start < x_BCTHW.shape[2] else None


class UpstreamCache:
    """The original's queues, errors included.

    Decoder chunks are run with frames of look-ahead whose outputs are cut off at the end. A causal layer must not keep
    these; `offsets` says how many there are at its depth. They are skipped even when a chunk goes without look-ahead,
    which corrupts what follows.
    """

    def __init__(self, offsets: dict):
        self.offsets = offsets
        self.kept = {}
        self.first = False

    def begin(self, chunk: Chunk, frames: int):
        self.first = chunk.start == 0

    def extend(self, layer, x_BCTHW):
        keep = (layer.kernel_t - 1) // layer.stride_t
        if self.first:
            x_BCTHW = first_repeated(layer, x_BCTHW)
        elif keep:
            self._check(self.kept[layer].shape[2], keep)
            x_BCTHW = torch.cat([self.kept[layer], x_BCTHW], 2)
        self._check(x_BCTHW.shape[2], layer.kernel_t)
        if keep:
            known = x_BCTHW[:, :, : x_BCTHW.shape[2] - self.offsets.get(layer, 0)]
            self.kept[layer] = known[:, :, -keep:].clone()
        return x_BCTHW

    def upsample_time(self, layer, x_BCTHW):
        if layer not in self.kept:
            self.kept[layer] = x_BCTHW[:, :, -1:].clone()
            return layer.upsample_time(x_BCTHW)
        h = torch.cat([self.kept[layer], x_BCTHW], 2)
        self.kept[layer] = h[:, :, -2:-1].clone()
        return layer.double_time(h)[:, :, 2:]

    def align(self, name, x_BCTHW, frames: int):
        return x_BCTHW

    def _check(self, frames: int, needed: int):
        if frames < needed:
            raise OspError(
                f"the original's temporal chunks cannot do this length: a layer has {frames} of {needed} frames it "
                "needs; use exact chunks, or none"
            )


def look_ahead_offsets(decoder) -> dict:
    """Causal layer -> frames of look-ahead at its depth: one before the level-2 upsampler, two from it on."""
    before = [decoder.conv_in, decoder.mid, decoder.connect_l2, *list(decoder.up2)[:-2]]
    behind = [*list(decoder.up2)[-2:], decoder.up1, decoder.connect_l1, decoder.layer]
    return {
        layer: offset
        for offset, parts in ((1, before), (2, behind))
        for part in parts
        for layer in part.modules()
        if isinstance(layer, CausalConv3d)
    }


LOOK_AHEAD_OUTPUT = 4  # output frames of a look-ahead frame; the original cuts four for 8x8x8 too


def encode(model, video_B3THW, plan: Tiling):
    """Moments of a video, chunk by chunk and tile by tile."""
    if plan.tile_size is None:
        return _encode_chunks(model, video_B3THW, plan)
    B, _, T, H, W = video_B3THW.shape
    t, h, w = model.spec.latent_size(T, H, W)
    size, overlap = plan.tile_size // CELL, plan.tile_overlap // CELL
    moments = _zeros(video_B3THW, (B, 2 * model.spec.latent_dim, t, h, w))
    for row in spans(h, size, overlap):
        for column in spans(w, size, overlap):
            bottom = H if row.stop == h else row.stop * CELL  # rows and columns that fill no cell go to the last tile
            right = W if column.stop == w else column.stop * CELL
            tile = video_B3THW[..., row.start * CELL : bottom, column.start * CELL : right]
            part = _encode_chunks(model, tile, plan) * _window(row, column, moments)
            moments[..., row.start : row.stop, column.start : column.stop] += part
    return moments.to(video_B3THW.dtype)


def decode(model, latents_BCTHW, plan: Tiling):
    """Video of latents, chunk by chunk and tile by tile."""
    if plan.tile_size is None:
        return _decode_chunks(model, latents_BCTHW, plan)
    size, overlap = plan.tile_size // CELL, plan.tile_overlap // CELL
    h, w = latents_BCTHW.shape[3:]
    video = None
    for row in spans(h, size, overlap, CELL):
        for column in spans(w, size, overlap, CELL):
            tile = latents_BCTHW[..., row.start : row.stop, column.start : column.stop]
            part = _decode_chunks(model, tile, plan)
            if video is None:
                video = _zeros(part, (*part.shape[:3], h * CELL, w * CELL))
            part = part * _window(row, column, video)
            video[..., row.start * CELL : row.stop * CELL, column.start * CELL : column.stop * CELL] += part
    return video.to(latents_BCTHW.dtype)


def _zeros(like, shape):
    """Where tiles are summed: float32 for half types."""
    return torch.zeros(shape, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)


def _window(row, column, like):
    return torch.from_numpy(np.outer(row.window, column.window)).to(like.device, like.dtype)


def _encode_chunks(model, video_B3THW, plan: Tiling):
    if plan.temporal is None:
        return model.encoder(video_B3THW)[0]
    chunks = encoder_chunks(video_B3THW.shape[2], plan, model.spec.stride[0])
    cache = UpstreamCache({}) if plan.temporal == UPSTREAM else ExactCache()
    parts = []
    for chunk in chunks:
        cache.begin(chunk, chunks[-1].stop)
        parts.append(model.encoder(video_B3THW[:, :, chunk.start : chunk.stop], cache)[0])
    return torch.cat(parts, 2)


def _decode_chunks(model, latents_BCTHW, plan: Tiling):
    if plan.temporal is None:
        return model.decoder(latents_BCTHW)[0]
    chunks = decoder_chunks(latents_BCTHW.shape[2], plan)
    cache = UpstreamCache(look_ahead_offsets(model.decoder)) if plan.temporal == UPSTREAM else ExactCache()
    parts = []
    for chunk in chunks:
        cache.begin(chunk, chunks[-1].stop)
        part = model.decoder(latents_BCTHW[:, :, chunk.start : chunk.stop + chunk.look_ahead], cache)[0]
        parts.append(part[:, :, : part.shape[2] - LOOK_AHEAD_OUTPUT * chunk.look_ahead])
    return torch.cat(parts, 2)
