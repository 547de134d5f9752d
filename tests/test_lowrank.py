"""The product of two thin matrices that is added to a tile: rounded once, wherever tiles begin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardmerge.kernels.lowrank import LANES, add_product, fill_columns, fill_rows, panels_shape


def summed(values, start, left, right, scale):
    """What the kernel makes of elements from ``start`` on."""
    rank, columns = right.shape
    panels = np.full(panels_shape(rank, columns), np.nan)
    fill_rows(panels, 0, right)
    out = values.copy()
    add_product(out, start, left, panels, columns, scale)
    return out


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 3 * LANES))
    rank = draw(st.integers(1, 7))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    left, right = rng.normal(size=(rows, rank)), rng.normal(size=(rank, columns))
    kind = draw(st.sampled_from((np.float32, np.float64)))
    return rng.normal(size=(rows, columns)).astype(kind), left, right


def exactly(stored, left, right, scale):
    """Summed in extended precision, rounded once."""
    wide = np.longdouble
    product = (left.astype(wide)[:, :, None] * right.astype(wide)[None]).sum(axis=1)
    return (stored.astype(wide) + wide(scale) * product).astype(stored.dtype)


@settings(max_examples=200, deadline=None)
@given(matrices(), st.floats(-3, 3))
def test_it_is_the_sum(found, scale):
    stored, left, right = found
    left, right = (x.astype(np.float32).astype(np.float64) for x in (left, right))
    got = summed(stored.reshape(-1), 0, left, right, scale).reshape(stored.shape)
    want = exactly(stored, left, right, scale)
    # The sums themselves are float64: at a tie, the last bit of a float32 may be the other.
    assert np.abs(got - want).max() <= np.spacing(np.abs(want) + np.abs(stored)).max()
    if stored.dtype == np.float32:
        assert (got == want).mean() > 0.99 or stored.size < 100


@settings(max_examples=100, deadline=None)
@given(matrices(), st.data())
def test_no_bit_depends_on_where_a_tile_begins(found, data):
    stored, left, right = found
    whole = summed(stored.reshape(-1), 0, left, right, 0.7)
    start = data.draw(st.integers(0, stored.size - 1))
    stop = data.draw(st.integers(start + 1, stored.size))
    part = summed(stored.reshape(-1)[start:stop], start, left, right, 0.7)
    assert part.tobytes() == whole[start:stop].tobytes()


@pytest.mark.parametrize("columns", (1, LANES - 1, LANES, 2 * LANES + 5))
def test_panels_are_the_same_by_rows_and_by_columns(columns):
    right = np.random.default_rng(0).normal(size=(3, columns))
    by_rows, by_columns = (np.zeros(panels_shape(3, columns)) for _ in range(2))
    for row in range(3):
        fill_rows(by_rows, row, right[row : row + 1])
    for first in range(0, columns, LANES):
        fill_columns(by_columns, first, right.T[first : first + LANES])
    assert np.array_equal(by_rows, by_columns)
    flat = by_rows.swapaxes(1, 2).reshape(-1, 3)[:columns]
    assert np.array_equal(flat, right.T)


def test_infinity_and_nan_come_through():
    stored = np.array([[np.inf, 1.0], [np.nan, 1.0]], np.float32)
    got = summed(stored.reshape(-1), 0, np.ones((2, 1)), np.ones((1, 2)), 1.0)
    assert got[0] == np.inf and np.isnan(got[2]) and got[1] == got[3] == 2
