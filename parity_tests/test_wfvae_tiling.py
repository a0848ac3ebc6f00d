"""Chunks in time and tiles in space: exact where they claim to be, bounded in memory, nothing left behind."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import wfvae_models as vaes
from osp_shared import fill
from osp_shared.errors import OspError
from osp_shared.geometry.chunks import Chunk, Tiling, decoder_chunks, encoder_chunks, spans
from osp_shared.specs.wfvae import WFVAESpec

NARROW = {
    "latent_dim": 4, "base_channels": 8, "encoder_energy_flow_hidden_size": 4, "decoder_energy_flow_hidden_size": 4,
    "norm_type": "layernorm", "t_interpolation": "trilinear",
}  # fmt: skip
SPEC = WFVAESpec(**NARROW, connect_res_layer_num=2)
NEAREST = WFVAESpec(**{**NARROW, "t_interpolation": "nearest"}, encoder_num_resblocks=1, decoder_num_resblocks=1)
DEEP = WFVAESpec(
    **NARROW, encoder_num_resblocks=1, decoder_num_resblocks=1, l1_dowmsample_block="Spatial2xTime2x3DDownsample",
    l1_downsample_wavelet="HaarWaveletTransform3D", l1_upsample_block="Spatial2xTime2x3DUpsample",
    l1_upsample_wavelet="InverseHaarWaveletTransform3D",
)  # fmt: skip
LOCAL = WFVAESpec(  # every output depends on a neighbourhood: no attention, layernorm
    **NARROW, use_attention=False, encoder_num_resblocks=1, decoder_num_resblocks=1, connect_res_layer_num=0
)


def encode(backend, spec, frames, plan=None, height=16, width=8):
    vae = vaes.build(backend, spec)
    with vae.no_grad():
        video = vae.tensor(fill.input_tensor("video", (1, 3, frames, height, width)))
        return vae.array(vae.model.encode(video, plan).mean)


def decode(backend, spec, frames, plan=None, height=2, width=1):
    vae = vaes.build(backend, spec)
    with vae.no_grad():
        latents = vae.tensor(fill.input_tensor("latent", (1, spec.latent_dim, frames, height, width)))
        return vae.array(vae.model.decode(latents, plan))


def rms(array):
    return float(np.sqrt((array.astype(np.float64) ** 2).mean()))


# ------------------------------------------------------------------------------------------------ exact chunks


def assert_exact(run, spec, frames, plan):
    """In float64: a chunked pass is a thousand times nearer to the whole one than float32 could tell."""
    whole, chunked = run("truth", spec, frames), run("truth", spec, frames, plan)
    assert chunked.shape == whole.shape
    float32 = np.abs(run("torch", spec, frames) - whole).max()
    assert np.abs(chunked - whole).max() <= 1e-3 * float32


@pytest.mark.parametrize("frames", range(1, 15))
def test_exact_decode_at_every_length(frames):
    assert_exact(decode, SPEC, frames, Tiling("exact"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.sampled_from([SPEC, NEAREST, DEEP]), st.integers(1, 10), st.integers(1, 10))
def test_exact_decode_in_any_chunks(spec, frames, size):
    assert_exact(decode, spec, frames, Tiling("exact", t_chunk_dec=size))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from([SPEC, NEAREST, DEEP]), st.integers(1, 30), st.integers(1, 4))
def test_exact_encode_in_any_chunks(spec, frames, strides):
    assert_exact(encode, spec, frames, Tiling("exact", t_chunk_enc=spec.stride[0] * strides))


@pytest.mark.parametrize("spec", [SPEC, DEEP], ids=["4x8x8", "8x8x8"])
@pytest.mark.parametrize("frames", [1, 2, 3, 4, 6])
def test_exact_decode_in_mindspore(spec, frames):
    whole = decode("truth", spec, frames)
    allowed = vaes.Allowance()(whole, decode("torch", spec, frames))
    assert np.abs(decode("mindspore", spec, frames, Tiling("exact")) - whole).max() <= allowed


@pytest.mark.parametrize("spec", [SPEC, DEEP], ids=["4x8x8", "8x8x8"])
@pytest.mark.parametrize("frames", [1, 2, 10, 12, 17])
def test_exact_encode_in_mindspore(spec, frames):
    whole = encode("truth", spec, frames)
    allowed = vaes.Allowance()(whole, encode("torch", spec, frames))
    assert np.abs(encode("mindspore", spec, frames, Tiling("exact")) - whole).max() <= allowed


def test_groupnorm_chunks_are_lossy():
    """Statistics are taken over a chunk: allowed, and not equal."""
    config = {"base_channels": 32, "encoder_energy_flow_hidden_size": 32, "decoder_energy_flow_hidden_size": 32}
    spec = WFVAESpec(**config, encoder_num_resblocks=1, decoder_num_resblocks=1)
    whole, chunked = decode("torch", spec, 4), decode("torch", spec, 4, Tiling("exact"))
    assert chunked.shape == whole.shape
    assert 1e-3 < rms(chunked - whole) / rms(whole) < 1.0


# ------------------------------------------------------------------------------------------------ upstream chunks


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_upstream_decode_spoils_the_last_six_frames(backend):
    """(T - 2) % t_chunk_dec == 0: the chunk before the last goes without look-ahead. Exact chunks do not."""
    whole = decode("truth", SPEC, 8)
    noise = vaes.Allowance()(whole, decode("torch", SPEC, 8))
    wrong = np.abs(decode(backend, SPEC, 8, Tiling("upstream")) - whole).max((0, 1, 3, 4))
    assert wrong.shape == (29,) and wrong[:-6].max() <= noise and wrong[-6:].min() > 100 * noise
    assert np.abs(decode(backend, SPEC, 7, Tiling("upstream")) - decode("truth", SPEC, 7)).max() <= noise


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_upstream_decode_of_8x8x8_has_the_wrong_length(backend):
    assert decode(backend, DEEP, 3, Tiling("upstream")).shape[2] == 21  # 17 frames, had it been made for this


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_upstream_lengths_that_cannot_be_done(backend):
    for run, frames in ((decode, 2), (encode, 3), (encode, 10)):
        with pytest.raises(OspError, match="use exact chunks"):
            run(backend, SPEC, frames, Tiling("upstream"))


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_nothing_is_left_behind(backend):
    """Chunked, failed and whole passes in any order give what a fresh model gives, bit for bit."""
    exact, upstream = Tiling("exact"), Tiling("upstream")
    first = [decode(backend, SPEC, 5, plan) for plan in (None, exact, upstream)]
    for plan in (upstream, exact):
        encode(backend, SPEC, 9, plan)
    with pytest.raises(OspError):
        decode(backend, SPEC, 2, upstream)
    again = [decode(backend, SPEC, 5, plan) for plan in (upstream, None, exact)]
    for a, b in zip(first, (again[1], again[2], again[0]), strict=True):
        assert np.array_equal(a, b)


# ------------------------------------------------------------------------------------------------ plans


def test_chunk_boundaries():
    assert encoder_chunks(20, Tiling("upstream"), 4) == [Chunk(0, 1), Chunk(1, 9), Chunk(9, 17), Chunk(17, 20)]
    assert encoder_chunks(20, Tiling("exact"), 4) == [Chunk(0, 1), Chunk(1, 9), Chunk(9, 17)]  # 3 frames decide nothing
    assert decoder_chunks(6, Tiling("upstream")) == [Chunk(0, 1, 1), Chunk(1, 3, 1), Chunk(3, 5, 0), Chunk(5, 6, 0)]
    assert decoder_chunks(6, Tiling("exact")) == [Chunk(0, 1), Chunk(1, 3), Chunk(3, 5), Chunk(5, 6)]
    assert decoder_chunks(1, Tiling("upstream")) == [Chunk(0, 1)]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temporal": "causal"}, "temporal is 'causal'"),
        ({"t_chunk_enc": 0}, "t_chunk_enc is 0"),
        ({"t_chunk_dec": 0}, "t_chunk_dec is 0"),
        ({"tile_size": 100}, "tile_size is 100"),
        ({"tile_size": 64, "tile_overlap": 40}, "tile_overlap is 40"),
        ({"tile_size": 64, "tile_overlap": 12}, "tile_overlap is 12"),
    ],
)
def test_wrong_plans(wrong, message):
    with pytest.raises(OspError, match=message):
        Tiling(**wrong)


def test_exact_chunks_are_whole_strides():
    with pytest.raises(OspError, match="t_chunk_enc is 6, exact chunks need a multiple of 4"):
        encode("torch", SPEC, 9, Tiling("exact", t_chunk_enc=6))


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_wrong_inputs(backend):
    vae = vaes.build(backend, SPEC)
    for method, shape, message in (
        (vae.model.encode, (3, 5, 16, 16), "not \\(3, 5, 16, 16\\)"),
        (vae.model.encode, (1, 4, 5, 16, 16), "\\(batch, 3, frames"),
        (vae.model.encode, (1, 3, 5, 7, 16), "at least 1 frame of 8x8"),
        (vae.model.decode, (1, 8, 2, 2, 2), "\\(batch, 4, frames"),
    ):
        with pytest.raises(OspError, match=message):
            method(vae.tensor(np.zeros(shape)))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 200), st.integers(2, 40), st.data(), st.sampled_from([1, 8]))
def test_spans_cover_and_sum_to_one(cells, size, data, scale):
    overlap = data.draw(st.integers(0, size // 2))
    tiles = spans(cells, size, overlap, scale)
    total = np.zeros(cells * scale)
    for tile in tiles:
        assert tile.stop - tile.start == min(size, cells) and (tile.window >= 0).all()
        total[tile.start * scale : tile.stop * scale] += tile.window
    assert np.allclose(total, 1.0, rtol=0, atol=1e-12)
    assert tiles[0].start == 0 and tiles[-1].stop == cells
    assert all(a.stop - b.start >= overlap for a, b in zip(tiles, tiles[1:], strict=False))
    assert len(tiles) == 1 or (len(tiles) - 1) * (size - overlap) + overlap < cells  # one less would not do


# ------------------------------------------------------------------------------------------------ tiles


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_a_tile_as_large_as_the_video_changes_nothing(backend):
    plan = Tiling(None, tile_size=32, tile_overlap=8)
    assert np.array_equal(decode(backend, SPEC, 2, plan, 4, 3), decode(backend, SPEC, 2, None, 4, 3))
    assert np.array_equal(encode(backend, SPEC, 5, plan, 35, 24), encode(backend, SPEC, 5, None, 35, 24))


def test_tiles_are_exact_beyond_the_receptive_field():
    """Convolutions and layernorm alone: what one tile decides, far enough from its cut edges, is the whole pass's."""
    whole = decode("truth", LOCAL, 2, None, 2, 48)
    tiled = decode("truth", LOCAL, 2, Tiling("exact", tile_size=256, tile_overlap=128), 2, 48)
    error = np.abs(tiled - whole).max((0, 1, 2, 3))  # tiles are cells 0..32 and 16..48: each alone for 16 of them
    alone = np.r_[error[: 16 * 8], error[32 * 8 :]]
    assert alone.max() <= 1e-12 * np.abs(whole).max() < error.max()


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_blending_hides_what_hard_cuts_show(backend):
    """Tiles approximate; the wider they share, the less they differ from the whole pass."""
    errors = []
    for overlap in (0, 32, 64):
        plan = Tiling("exact", tile_size=128, tile_overlap=overlap)
        whole, tiled = decode(backend, SPEC, 2, None, 2, 64), decode(backend, SPEC, 2, plan, 2, 64)
        assert tiled.shape == whole.shape
        errors.append(rms(tiled - whole) / rms(whole))
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_tiled_encode(backend):
    """Odd sizes: rows and columns that fill no cell belong to the last tile."""
    whole = encode(backend, LOCAL, 5, None, 44, 421)
    tiled = encode(backend, LOCAL, 5, Tiling("exact", tile_size=256, tile_overlap=64), 44, 421)
    assert tiled.shape == whole.shape == (1, 4, 2, 5, 52)
    error = np.abs(tiled - whole).max((0, 1, 2, 3))
    ends = np.r_[error[:18], error[34:]]  # cells that one tile alone decides, ten from its cut edge
    assert ends.max() <= 1e-5 * np.abs(whole).max()
    assert rms(tiled - whole) < 0.5 * rms(whole)


@pytest.mark.parametrize("backend", vaes.BACKENDS)
def test_no_layer_grows_with_the_picture(backend):
    plan = Tiling("exact", tile_size=32, tile_overlap=8)
    vae = vaes.build(backend, NEAREST)
    largest = []
    for height, width in ((4, 4), (7, 10)):
        with vae.no_grad(), vae.record() as layers:
            vae.model.decode(vae.tensor(fill.input_tensor("latent", (1, 4, 4, height, width))), plan)
        largest.append(max(array.size for calls in layers.values() for array in calls))
    assert largest[0] == largest[1]
