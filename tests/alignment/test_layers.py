from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache2cache.alignment.layers import layer_map
from cache2cache.errors import C2CError

depths = st.integers(1, 40)


def test_the_default_pair() -> None:
    assert layer_map("terminal", 30, 28) == [(t, t - 2) for t in range(2, 30)]
    assert layer_map("terminal", 4, 6) == [(0, 2), (1, 3), (2, 4), (3, 5)]
    assert layer_map("last_aligned", 5, 3) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)]
    assert layer_map("k_nearest", 3, 5) == [(0, 0), (1, 2), (2, 4)]


@given(depths, depths)
def test_k_nearest_by_fractions(lr: int, ls: int) -> None:
    def depth(i: int, n: int) -> Fraction:
        return Fraction(i, n - 1) if n > 1 else Fraction(0)

    for t, s in layer_map("k_nearest", lr, ls):
        best = min(abs(depth(t, lr) - depth(x, ls)) for x in range(ls))
        nearest = [x for x in range(ls) if abs(depth(t, lr) - depth(x, ls)) == best]
        assert s == nearest[0]


@given(depths, depths)
def test_top_meets_top(lr: int, ls: int) -> None:
    for kind in ("terminal", "last_aligned"):
        pairs = layer_map(kind, lr, ls)
        assert pairs[-1] == (lr - 1, ls - 1)
        assert all(0 <= t < lr and 0 <= s < ls for t, s in pairs)
    assert len(layer_map("terminal", lr, ls)) == min(lr, ls)
    assert len(layer_map("last_aligned", lr, ls)) == lr


@pytest.mark.parametrize(
    ("given_map", "word"),
    [
        ("nearest", "unknown layer map"),
        ([(5, 0)], "outside the models"),
        ([(0, 1), (0, 2)], "twice"),
        ([], "at least one"),
    ],
)
def test_wrong_maps(given_map: object, word: str) -> None:
    with pytest.raises(C2CError, match=word):
        layer_map(given_map, 5, 4)  # type: ignore[arg-type]
