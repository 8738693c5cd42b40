"""How far a measured difference can be trusted: intervals, a paired test, and the part of a gap that is recovered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import C2CError

RESAMPLES, PART = 2000, 200


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share, as shares."""
    if total == 0:
        raise C2CError("nothing was measured; give at least one question")
    z, p = 1.959964, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """Of how many answers how many % are right, with the 95% Wilson interval."""
    low, high = wilson(sum(right), len(right))
    return {
        "questions": len(right),
        "accuracy": round(100 * sum(right) / len(right), 2),
        "interval": [round(100 * low, 2), round(100 * high, 2)],
    }


def mcnemar(only_one: int, only_other: int) -> float:
    """The exact two-sided p of McNemar's test: how likely a split at least as uneven is if neither method is better.

    Only the questions count that one of two methods alone answers right; each is then a fair coin's throw.
    """
    n, fewer = only_one + only_other, min(only_one, only_other)
    ways = choose = 1
    for i in range(fewer):
        choose = choose * (n - i) // (i + 1)
        ways += choose
    return min(1.0, 2 * ways / 2**n)


def recovered(reached: float, baseline: float, ceiling: float) -> float | None:
    """The share of the gap from a baseline to a ceiling that is closed; None where the ceiling isn't above."""
    return None if ceiling <= baseline else (reached - baseline) / (ceiling - baseline)


def bootstrap(
    sizes: int | Sequence[int], statistic: Callable[[np.ndarray], np.ndarray], seed: int = 0
) -> tuple[float, float]:
    """The 95% percentile interval of a statistic over rows that are drawn anew, with replacement.

    Args:
        sizes: how many rows there are; or, of rows in groups one behind the other, how many in each, which are then
            drawn from within each group.
        statistic: from (N, rows), how often each row is in each of N draws, to (N,). What it compares is computed from
            the same draw, so the interval is that of a paired comparison.
        seed: of the draws.
    """
    groups = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    values = [statistic(times) for times in draws(groups, seed)]
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return float(low), float(high)


def draws(sizes: Sequence[int], seed: int) -> Iterator[np.ndarray]:
    """How often each row is in each of RESAMPLES draws with replacement, some draws at a time: (N, rows) each."""
    drawn = _drawn(tuple(sizes), seed)
    for start in range(0, RESAMPLES, PART):
        yield drawn[start : start + PART].astype(float)


@lru_cache(maxsize=1)  # a run compares many methods on the same questions
def _drawn(sizes: tuple[int, ...], seed: int) -> np.ndarray:
    """(RESAMPLES, rows), in two bytes each: of twenty thousand questions 80 MB."""
    if min(sizes, default=0) < 1:
        raise C2CError("nothing was measured; give at least one question")
    random = np.random.default_rng(seed)
    made = np.empty((RESAMPLES, sum(sizes)), dtype=np.uint16)
    at = 0
    for size in sizes:
        for start in range(0, RESAMPLES, PART):
            part = random.multinomial(size, np.full(size, 1 / size), size=min(PART, RESAMPLES - start))
            made[start : start + PART, at : at + size] = part
        at += size
    return made
