"""What the process keeps of what it freed, seen from outside: in a process of its own, as it cannot be undone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cache2cache import heap

SCRIPT = """
import torch
from cache2cache import heap

heap.bound(0)
assert not heap.tidy()  # nobody asked for anything to be kept
heap.keep()
assert not heap.tidy()  # nor for a bound
before = heap.status("RssAnon")
heap.bound(10**9)
small = []
for size in range(20, 30):  # holes of ever other sizes
    large = torch.ones(size, 250_000)
    small.append(torch.ones(3000))
    del large
held = heap.status("RssAnon") - before
assert held > 20e6, held
assert not heap.tidy()
heap._most = before + 10_000_000
assert heap.tidy()
left = heap.status("RssAnon") - before
assert left < held / 4, (held, left)
assert all(float(x.sum()) == 3000 for x in small)
"""


@pytest.mark.skipif(heap.status("RssAnon") is None, reason="the system doesn't tell")
def test_what_is_kept_is_given_back_above_a_bound() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=120)
