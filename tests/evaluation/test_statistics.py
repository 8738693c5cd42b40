"""Intervals and the paired test against published examples and against the plain definitions."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from cache2cache import C2CError
from cache2cache.evaluation.statistics import RESAMPLES, bootstrap, mcnemar, recovered, wilson


def test_wilson() -> None:
    """The examples of Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3."""
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 1 - 0.1611, 1.0),
    ):
        assert wilson(right, total) == pytest.approx((low, high), abs=6e-5)
    with pytest.raises(C2CError, match="nothing was measured"):
        wilson(0, 0)


def test_mcnemar_by_hand() -> None:
    """A fair coin: 5 of 5 is 2 / 32; 1 of 6 is 2 * (1 + 6) / 64; an even split says nothing."""
    assert mcnemar(0, 0) == 1 and mcnemar(4, 4) == 1 and mcnemar(0, 1) == 1
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 5) == 14 / 64
    # Agresti, Categorical Data Analysis (2002), approval ratings: 150 against 86, z = 4.17, p = 3e-5.
    assert mcnemar(150, 86) == pytest.approx(3.7e-5, abs=1e-6)


def test_mcnemar_is_the_sum_of_both_tails() -> None:
    for n in range(1, 25):
        for k in range(n + 1):
            tails = sum(comb(n, i) for i in range(n + 1) if comb(n, i) <= comb(n, k))
            assert mcnemar(k, n - k) == pytest.approx(tails / 2**n, abs=1e-12)
    assert 0 < mcnemar(2400, 2600) < 0.005 and mcnemar(0, 5000) == 0  # smaller than any float


def test_recovered() -> None:
    assert recovered(60, 40, 80) == 0.5 and recovered(30, 40, 80) == -0.25
    assert recovered(60, 80, 80) is None and recovered(60, 80, 70) is None


def test_bootstrap_is_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    low, high = bootstrap(400, lambda times: times @ values / 400)
    error = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - error, abs=0.03)
    assert high == pytest.approx(values.mean() + error, abs=0.03)
    assert bootstrap(400, lambda times: times @ values / 400) == (low, high)
    assert bootstrap(3, lambda times: times @ np.ones(3)) == (3, 3)


def test_bootstrap_draws_within_groups() -> None:
    """Each group keeps its number of rows in every draw, whatever the values are; and draws come in parts."""
    seen: list[int] = []

    def second(times: np.ndarray) -> np.ndarray:
        seen.append(len(times))
        assert (times[:, :3].sum(1) == 3).all() and (times[:, 3:].sum(1) == 2).all()
        return times[:, 3:] @ np.array([0.0, 1.0])

    assert bootstrap((3, 2), second) == (0, 2) and sum(seen) == RESAMPLES and max(seen) < RESAMPLES
    with pytest.raises(C2CError, match="nothing was measured"):
        bootstrap(0, second)
