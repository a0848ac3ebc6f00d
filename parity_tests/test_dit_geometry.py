"""Token grids, masks, Skiparse maps and rotary tables: integers and float64 against their definitions."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dit_models
from osp_shared.errors import OspError
from osp_shared.geometry import rope, tokens
from osp_shared.geometry.skiparse import Skiparse

rules = st.builds(Skiparse, st.integers(1, 5), st.booleans())


@given(rules, st.integers(1, 200))
def test_skiparse_is_a_bijection_by_its_definition(rule, count):
    n, places = rule.n, rule.positions(count)
    padded = count + rule.padding(count)
    assert padded % (n * n) == 0 and padded - count < n * n and places.shape == (n, padded // n)
    found = {}
    for s in range(n):
        for j in range(padded // n):
            i = (j // n) * n * n + s * n + j % n if rule.group else j * n + s
            found[i] = places[s, j]
    assert [found[i] for i in range(padded)] == [*range(count), *[-1] * (padded - count)]


@given(rules, st.integers(1, 60), st.integers(1, 3))
def test_split_follows_the_map_and_merge_inverts_it(rule, count, batch):
    x = np.arange(batch * count * 2 * 3, dtype=np.float32).reshape(batch, count, 2, 3) + 1
    padded = np.concatenate([x, np.zeros((batch, 1, 2, 3), np.float32)], 1)  # -1 is a pad of zeros
    expected = padded[:, rule.positions(count)].transpose(1, 0, 3, 2, 4).reshape(rule.n * batch, 2, -1, 3)
    for name in dit_models.BACKENDS:
        side = SIDES.setdefault(name, dit_models.backend(name))
        parts = side.modules.split(side.tensor(x), rule)
        assert np.array_equal(side.numpy(parts), expected)
        assert np.array_equal(side.numpy(side.modules.merge(parts, rule, count)), x.reshape(batch, count, 6))


SIDES: dict = {}


def test_skiparse_of_the_documentation():
    """sparse_n 4: 0, 4, 8, ... and 0-3, 16-19, ...; typical sizes have no pad."""
    assert Skiparse(4, False).positions(880)[1, :3].tolist() == [1, 5, 9]
    assert Skiparse(4, True).positions(880)[1, :6].tolist() == [4, 5, 6, 7, 20, 21]
    for size, count, pad in (((24, 44, 80), 21120, 0), ((24, 80, 80), 38400, 0), ((1, 60, 60), 900, 12)):
        assert tokens.count(tokens.grid(*size, 2)) == count and Skiparse(4).padding(count) == pad
    with pytest.raises(OspError, match="sparse_n is 0"):
        Skiparse(0)


def test_maps_and_biases_are_made_once_and_read_only():
    rule = Skiparse(3, True)
    assert rule.positions(20) is Skiparse(3, True).positions(20)
    assert rule.key_bias(None, 2, 20) is rule.key_bias(None, 2, 20)
    assert rope.angles((2, 3, 4), 12) is rope.angles((2, 3, 4), 12)
    for array in (rule.positions(20), rule.key_bias(None, 2, 20), rope.angles((2, 3, 4), 12)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@given(rules, st.integers(1, 60), st.integers(1, 3))
def test_pad_bias_hides_pads_alone(rule, count, batch):
    bias = rule.key_bias(None, batch, count)
    if not rule.padding(count):
        assert bias is None
        return
    expected = np.where(rule.positions(count) < 0, tokens.PAD, 0).repeat(batch, 0)
    assert np.array_equal(bias[:, 0, 0], expected)
    visible = np.zeros((batch, count), np.float32)
    assert np.array_equal(rule.key_bias(visible, batch, count), bias)


def test_biases_in_half_types():
    """-9980 is no float16: it becomes -9984; in bfloat16 pads and masked keys are equal."""
    both = np.array([tokens.HIDDEN, tokens.PAD])
    assert both.astype(np.float16).tolist() == [-10000.0, -9984.0]
    assert both.astype(ml_dtypes.bfloat16).astype(float).tolist() == [-9984.0, -9984.0]


@given(st.integers(1, 3), st.integers(2, 7), st.integers(2, 7), st.integers(0, 2**32 - 1))
def test_a_token_is_visible_when_any_of_its_cells_is(T, H, W, seed):
    mask = (np.random.default_rng(seed).random((2, T, H, W)) < 0.2).astype(np.float32)
    h, w = H // 2, W // 2
    expected = [
        [mask[b, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].any() for t in range(T) for y in range(h) for x in range(w)]
        for b in range(2)
    ]
    assert tokens.pool_mask(mask, 2).astype(bool).tolist() == expected


def test_key_bias_is_none_only_when_all_is_visible():
    assert tokens.key_bias(np.ones((2, 3))) is None
    assert tokens.key_bias(np.array([1, 0, 1])).tolist() == [0, -10000, 0]


def test_grid_needs_a_token():
    assert tokens.grid(3, 9, 11, 2) == (3, 4, 5)
    with pytest.raises(OspError, match="at least 1 frame of 2x2"):
        tokens.grid(1, 1, 8, 2)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_angles_are_rounded_before_their_cosine(dtype):
    """Checked one by one against exact angles: of the float32 kind in float64, of the dtype's below."""
    grid, d, scale = (3, 40, 2), 24, (1.0, 0.5, 2.0)
    kind = rope.DTYPES[dtype]
    cos, sin = rope.tables(grid, d, scale, dtype)
    assert cos.dtype == kind and cos.shape == (240, 3, 4)
    seen = set()
    for token, place in enumerate(np.ndindex(*grid)):
        for axis in range(3):
            for j in range(4):
                angle = np.float32(place[axis] / scale[axis]) * np.float32(10000.0 ** (-2 * j / 8))
                angle = float(np.asarray(angle).astype(kind))
                seen.add(angle)
                assert cos[token, axis, j] == np.cos(angle).astype(kind)
                assert sin[token, axis, j] == np.sin(angle).astype(kind)
    if dtype == "bfloat16":
        assert all(a % 0.25 == 0 for a in seen if a >= 32) and 78.0 in seen
