"""The token map's definition, as slow and plain as it reads. Kept apart from the code under test."""

from __future__ import annotations

import torch

from cache2cache.alignment.chat import Rendered
from cache2cache.alignment.tokens import TokenMap


def span_map_by_definition(receiver: Rendered, sharer: Rendered) -> TokenMap:
    """O(tokens × tokens × characters). Contents must come in the same order on both sides."""
    partner: dict[int, int] = {}  # receiver character -> sharer character
    shared = [s.key for s in receiver.segments if s.key in {t.key for t in sharer.segments}]
    a = b = 0
    for key in [*shared, None]:
        if key is None:
            ours, theirs = (len(receiver.text), 0), (len(sharer.text), 0)
        else:
            ours = next((s.start, s.end) for s in receiver.segments if s.key == key)
            theirs = next((s.start, s.end) for s in sharer.segments if s.key == key)
        # Template text: forward from the left as long as it agrees, then backward from the right.
        i, j = a, b
        while i < ours[0] and j < theirs[0] and receiver.text[i] == sharer.text[j]:
            partner[i] = j
            i, j = i + 1, j + 1
        x, y = ours[0], theirs[0]
        while x > i and y > j and receiver.text[x - 1] == sharer.text[y - 1]:
            x, y = x - 1, y - 1
            partner[x] = y
        if key is None:
            break
        # Content: the last visible characters lie on each other; from there forward and backward.
        x, y = _visible_end(receiver.text, *ours), _visible_end(sharer.text, *theirs)
        p, q = x, y
        while p < ours[1] and q < theirs[1] and receiver.text[p] == sharer.text[q]:
            partner[p] = q
            p, q = p + 1, q + 1
        while x > ours[0] and y > theirs[0] and receiver.text[x - 1] == sharer.text[y - 1]:
            x, y = x - 1, y - 1
            partner[x] = y
        a, b = ours[1], theirs[1]

    index, covered = [], set()
    for i, (start, end) in enumerate(receiver.offsets):
        best, most = -1, 0
        for j, (low, high) in enumerate(sharer.offsets):
            count = sum(1 for c in range(start, end) if c in partner and low <= partner[c] < high)
            if count and count >= most:
                best, most = j, count
        if i == 0 and start == end and sharer.offsets[0][0] == sharer.offsets[0][1]:
            best = 0
        index.append(best)
        if best >= 0:
            low, high = sharer.offsets[best]
            covered |= {c for c in range(start, end) if c in partner and low <= partner[c] < high}
    return TokenMap(torch.tensor(index), len(covered) / max(1, len(receiver.text)))


def _visible_end(text: str, start: int, end: int) -> int:
    while end > start and text[end - 1].isspace():
        end -= 1
    return end
