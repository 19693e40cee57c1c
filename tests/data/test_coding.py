"""Ids become numbers by first appearance, whatever the pieces."""

import numpy as np
import polars as pl
import pytest

from tim4rec_jax.data.coding import IdCoder


def pieces(rng, sizes, most):
    return [[f"id {number}" for number in rng.integers(0, most, size)] for size in sizes]


@pytest.mark.parametrize("sizes", [[], [0], [0, 5, 0, 7], [1, 1, 1], [2000, 1, 3000]])
def test_numbers_go_by_first_appearance_over_all_pieces(sizes):
    given = pieces(np.random.default_rng(3), sizes, 900)
    numbers, coder = {}, IdCoder()
    for piece in given:
        expected = [numbers.setdefault(one, len(numbers)) for one in piece]
        codes = coder.codes(pl.Series(piece, dtype=pl.String))
        assert codes.dtype == np.int32
        assert codes.tolist() == expected
    assert coder.ids.dtype == pl.String
    assert coder.ids.to_list() == list(numbers)


def test_coders_know_nothing_of_each_other():
    first, second = IdCoder(), IdCoder()
    assert first.codes(pl.Series(["a", "b"])).tolist() == [0, 1]
    assert second.codes(pl.Series(["b", "c", "a"])).tolist() == [0, 1, 2]
    assert first.codes(pl.Series(["c", "a"])).tolist() == [2, 0]
    assert second.ids.to_list() == ["b", "c", "a"]
