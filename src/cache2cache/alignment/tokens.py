"""Token map `span`: which sharer token goes with each receiver token.

Both models read the same chat, each in its own template and tokens. The rule (ours; the published `first` and
`longest` re-encode each token alone, and so lose the pieces of multi-byte characters):

1. Characters of the receiver's text are matched to characters of the sharer's text. The content of a message matches
   itself; of the template text between two contents, what both texts share at its start and at its end.
2. A receiver token goes with the sharer token that covers most of its matched characters. On a tie it is the later
   one: a causal model has read there all that the earlier token holds, and more. So the pieces of a multi-byte
   character go with the sharer's last piece of it.
3. A token none of whose characters is matched has no sharer token (-1). A special token without text that starts both
   prompts ("begin of sequence") goes with its like.

Everything is intervals of characters, swept once from left to right, so the cost is linear in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from cache2cache.alignment.chat import Rendered, Segment, common_prefix, common_suffix


@dataclass(frozen=True)
class TokenMap:
    """`index` (T_receiver,): the sharer position of each receiver token, -1 where there is none.

    `coverage` is the share of the receiver's characters, of the whole text, that the chosen sharer tokens cover.
    """

    index: torch.Tensor
    coverage: float


def span_map(receiver: Rendered, sharer: Rendered) -> TokenMap:
    """Map each receiver token to the sharer token that covers most of its characters (see the module)."""
    matches = _matches(receiver, sharer)
    # Matched characters are numbered from left to right. The matching keeps their order, so the n-th of the receiver
    # is the n-th of the sharer, and spans of both texts become intervals on the same line.
    ours = _intervals(len(receiver.text), [(a, n) for a, _, n in matches], receiver.offsets)
    spans = _intervals(len(sharer.text), [(b, n) for _, b, n in matches], sharer.offsets)
    last = {interval: j for j, interval in enumerate(spans)}  # of tokens with one interval only the last can be chosen
    theirs = list(last)
    index: list[int] = []
    covered = reached = 0  # covered characters; the interval up to which they are counted
    first = 0
    for i, (low, high) in enumerate(ours):
        if i and (low, high) == ours[i - 1]:
            index.append(index[-1])
            continue
        while first < len(theirs) and theirs[first][1] <= low:
            first += 1
        best, most, j = None, 1, first
        while j < len(theirs) and theirs[j][0] < high:
            overlap = min(high, theirs[j][1]) - max(low, theirs[j][0])
            if overlap >= most:
                best, most = theirs[j], overlap
            j += 1
        index.append(-1 if best is None else last[best])
        if best is not None:
            end = min(high, best[1])
            covered += max(0, end - max(low, best[0], reached))
            reached = max(reached, end)
    if _starts_without_text(receiver) and _starts_without_text(sharer):
        index[0] = 0
    return TokenMap(torch.tensor(index, dtype=torch.long), covered / max(1, len(receiver.text)))


def _matches(receiver: Rendered, sharer: Rendered) -> list[tuple[int, int, int]]:
    """Runs of equal characters (start in the receiver's text, start in the sharer's, length), in order in both."""
    runs = []
    a = b = 0
    for ours, theirs in [*_pairs(receiver.segments, sharer.segments), (None, None)]:
        a_end = len(receiver.text) if ours is None else ours.start
        b_end = len(sharer.text) if theirs is None else theirs.start
        left, right = receiver.text[a:a_end], sharer.text[b:b_end]
        head = common_prefix(left, right)
        tail = common_suffix(left[head:], right[head:])
        runs += [(a, b, head), (a_end - tail, b_end - tail, tail)]
        if ours is not None and theirs is not None:
            left, right = receiver.text[ours.start : ours.end], sharer.text[theirs.start : theirs.end]
            x, y, n = _match_contents(left, right)
            runs.append((ours.start + x, theirs.start + y, n))
            a, b = ours.end, theirs.end
    return [run for run in runs if run[2]]


def _match_contents(left: str, right: str) -> tuple[int, int, int]:
    """Match two renderings of one content: they are equal unless a template trimmed it or dropped its beginning."""
    core, other = left.rstrip(), right.rstrip()
    tail = common_suffix(core, other)
    space = common_prefix(left[len(core) :], right[len(other) :])
    return len(core) - tail, len(other) - tail, tail + space


def _pairs(ours: list[Segment], theirs: list[Segment]) -> list[tuple[Segment, Segment]]:
    """Segments of the same content, in an order that holds on both sides.

    A template may move a message (Mistral puts the system message into the last user turn). Then the choice that
    keeps most characters is taken.
    """
    other = {segment.key: (place, segment) for place, segment in enumerate(theirs)}
    both = [(segment, *other[segment.key]) for segment in ours if segment.key in other]
    places = [place for _, place, _ in both]
    if places != sorted(places):
        best: list[tuple[int, list[int]]] = []  # per pair: characters of the best chain that ends in it, and the chain
        for i, (segment, place, _) in enumerate(both):
            before = max((best[j] for j in range(i) if places[j] < place), default=(0, []), key=lambda c: c[0])
            best.append((before[0] + segment.end - segment.start, [*before[1], i]))
        both = [both[i] for i in max(best, key=lambda c: c[0])[1]]
    return [(segment, match) for segment, _, match in both]


def _intervals(length: int, runs: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of a text as intervals on the line of its matched characters (runs of start and length)."""
    matched = bytearray(length)
    for start, n in runs:
        matched[start : start + n] = b"\x01" * n
    before = [0, *accumulate(matched)]  # how many matched characters lie before each place
    return [(before[start], before[end]) for start, end in spans]


def _starts_without_text(rendered: Rendered) -> bool:
    start, end = rendered.offsets[0]
    return start == end
