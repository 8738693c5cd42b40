"""The token map against its definition, written out character by character."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.brute import span_map_by_definition
from cache2cache.alignment import tokens
from cache2cache.alignment.chat import Rendered, Segment, render
from cache2cache.alignment.tokens import TokenMap, span_map
from tiny import tiny_tokenizer

ALPHABET = "ab \n你👨"


def rendered(
    text: str, spans: list[tuple[int, int]], segments: list[tuple[int, int, int | str]] | None = None
) -> Rendered:
    segments = [(0, len(text), 0)] if segments is None else segments
    return Rendered(text, list(range(len(spans))), spans, [Segment(*segment) for segment in segments])


def pair(ours: list[tuple[int, int]], theirs: list[tuple[int, int]], text: str = "abcdefgh") -> list[int]:
    return span_map(rendered(text, ours), rendered(text, theirs)).index.tolist()


@st.composite
def spans(draw: st.DrawFn, length: int) -> list[tuple[int, int]]:
    """A tiling, with characters in several pieces, or any spans that go from left to right (overlaps, gaps, empty)."""
    place = st.integers(0, length)
    if draw(st.booleans()):
        cuts = sorted({0, length, *draw(st.lists(place, max_size=length))})
        tiles = list(pairwise(cuts)) or [(0, 0)]
        return [tile for tile in tiles for _ in range(draw(st.integers(1, 3)))]
    count = draw(st.integers(1, 12))
    starts = sorted(draw(st.lists(place, min_size=count, max_size=count)))
    ends = sorted(draw(st.lists(place, min_size=count, max_size=count)))
    return [(min(start, end), end) for start, end in zip(starts, ends, strict=True)]


@st.composite
def sides(draw: st.DrawFn) -> tuple[Rendered, Rendered]:
    """One chat in two templates: texts around the contents, contents trimmed, cut at the front or left out."""
    words = st.text(ALPHABET, max_size=6)
    contents = draw(st.lists(st.text(ALPHABET, min_size=1, max_size=8).filter(str.strip), max_size=3))
    result = []
    for _ in range(2):
        text, segments = draw(words), []
        for key, content in enumerate(contents):
            change = draw(st.sampled_from(["keep", "keep", "strip", "lstrip", "rstrip", "cut", "drop"]))
            if change == "cut":
                content = content[draw(st.integers(0, len(content.rstrip()) - 1)) :]
            elif change not in ("keep", "drop"):
                content = getattr(content, change)()
            if change != "drop":
                segments.append((len(text), len(text) + len(content), key))
                text += content
            text += draw(words)
        result.append(rendered(text, draw(spans(len(text))), segments))
    return result[0], result[1]


@settings(max_examples=1500, deadline=None)
@given(sides())
def test_equals_the_definition(two: tuple[Rendered, Rendered]) -> None:
    fast, slow = span_map(*two), span_map_by_definition(*two)
    assert fast.index.tolist() == slow.index.tolist()
    assert fast.coverage == pytest.approx(slow.coverage)


@settings(max_examples=500, deadline=None)
@given(sides())
def test_is_monotone(two: tuple[Rendered, Rendered]) -> None:
    chosen = [j for j in span_map(*two).index.tolist() if j >= 0]
    assert chosen == sorted(chosen)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_same_tiling_is_the_identity(data: st.DataObject) -> None:
    text = data.draw(st.text(ALPHABET, min_size=1, max_size=20))
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text))))})
    side = rendered(text, list(pairwise(cuts)))
    assert span_map(side, side) == _Close(list(range(len(side.ids))), 1.0)


class _Close:
    """Equal to a TokenMap of this index and coverage."""

    def __init__(self, index: list[int], coverage: float) -> None:
        self.index, self.coverage = index, coverage

    def __eq__(self, other: object) -> bool:
        assert isinstance(other, TokenMap)
        return other.index.tolist() == self.index and other.coverage == pytest.approx(self.coverage)


def test_most_characters_win() -> None:
    assert pair([(0, 4), (4, 8)], [(0, 1), (1, 4), (4, 7), (7, 8)]) == [1, 2]


def test_ties_go_to_the_later_token() -> None:
    assert pair([(0, 8)], [(0, 2), (2, 4), (4, 6), (6, 8)]) == [3]
    assert pair([(0, 3)], [(0, 1), (1, 2), (2, 3)]) == [2]


def test_pieces_of_a_character_go_to_its_last_piece() -> None:
    ours = rendered("a👨b", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)])
    theirs = rendered("a👨b", [(0, 1), (1, 2), (1, 2), (2, 3)])
    assert span_map(ours, theirs).index.tolist() == [0, 2, 2, 2, 3]
    assert span_map(theirs, ours).index.tolist() == [0, 3, 3, 4]
    # A space that is joined to the first piece of a character overlaps all of its pieces.
    joined = rendered(" 👨", [(0, 2), (1, 2)])
    assert span_map(joined, rendered(" 👨", [(0, 1), (1, 2), (1, 2)])).index.tolist() == [2, 2]


def test_coverage_counts_characters_once_and_only_those_covered() -> None:
    ours = rendered("abcd", [(0, 4)])
    assert span_map(ours, rendered("abcd", [(0, 3), (3, 4)])).coverage == pytest.approx(0.75)
    shared = rendered("abcd", [(0, 4), (0, 4)])
    assert span_map(shared, rendered("abcd", [(0, 4)])).coverage == 1.0
    assert span_map(ours, rendered("xyz", [(0, 3)], segments=[])) == _Close([-1], 0.0)


def test_special_tokens_without_text_go_together_at_the_start_only() -> None:
    ours = rendered("ab", [(0, 0), (0, 2), (2, 2)])
    theirs = rendered("ab", [(0, 0), (0, 1), (1, 2), (2, 2)])
    assert span_map(ours, theirs).index.tolist() == [0, 2, -1]
    bare = rendered("ab", [(0, 2)])
    assert span_map(ours, bare).index.tolist() == [-1, 0, -1]
    assert span_map(bare, ours).index.tolist() == [1]


def test_templates_match_from_both_ends() -> None:
    ours = rendered("<a>user\nHi", [(0, 3), (3, 7), (7, 8), (8, 10)], [(8, 10, 0)])
    theirs = rendered("<bos>user\nHi", [(0, 5), (5, 9), (9, 10), (10, 12)], [(10, 12, 0)])
    assert span_map(ours, theirs) == _Close([0, 1, 2, 3], 0.9)  # all but the "a"


def test_content_that_one_side_trims() -> None:
    ours = rendered("[  ab ]", [(0, 1), (1, 2), (2, 4), (4, 5), (5, 6), (6, 7)], [(1, 6, 0)])
    theirs = rendered("<ab>", [(0, 1), (1, 2), (2, 3), (3, 4)], [(1, 3, 0)])
    assert span_map(ours, theirs).index.tolist() == [-1, -1, 1, 2, -1, -1]
    assert span_map(theirs, ours).index.tolist() == [-1, 2, 3, -1]


def test_content_whose_beginning_one_side_drops() -> None:
    ours = rendered("ab.ab", [(i, i + 1) for i in range(5)])
    theirs = rendered("ab", [(0, 1), (1, 2)])
    assert span_map(ours, theirs).index.tolist() == [-1, -1, -1, 0, 1]


def test_content_that_one_side_leaves_out() -> None:
    ours = rendered("|sys|hey", [(0, 1), (1, 4), (4, 5), (5, 8)], [(1, 4, 0), (5, 8, 1)])
    theirs = rendered("|hey", [(0, 1), (1, 4)], [(1, 4, 1)])
    assert span_map(ours, theirs).index.tolist() == [0, -1, -1, 1]


def test_moved_message_keeps_the_larger_part() -> None:
    """Some templates put the system message into the last user turn: the order of the longer contents is kept."""
    ours = rendered("sy|first|last", [(0, 2), (2, 3), (3, 8), (8, 9), (9, 13)], [(0, 2, 0), (3, 8, 1), (9, 13, 2)])
    theirs = rendered("first|sy|last", [(0, 5), (5, 6), (6, 8), (8, 9), (9, 13)], [(0, 5, 1), (6, 8, 0), (9, 13, 2)])
    assert span_map(ours, theirs).index.tolist() == [-1, -1, 0, 1, 4]


CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "  水是生命之源 👨‍👩‍👧, e\u0301?\n"},
    {"role": "assistant", "content": "Plants need light.\n    x = 12345"},
    {"role": "user", "content": "What is the capital of France?"},
]
KINDS = ("bytes", "words", "pieces", "plain")


@pytest.mark.parametrize("ours", KINDS)
@pytest.mark.parametrize("theirs", KINDS)
def test_chats_of_different_models(ours: str, theirs: str) -> None:
    left, right = [render(tiny_tokenizer(kind), CHAT, prefix="The answer is") for kind in (ours, theirs)]
    fast, slow = span_map(left, right), span_map_by_definition(left, right)
    assert fast.index.tolist() == slow.index.tolist()
    assert fast.coverage == pytest.approx(slow.coverage)
    if ours == theirs:
        assert fast.coverage == 1.0
    for mine, other in zip(left.segments, right.segments, strict=True):
        assert mine.key == other.key
        for (start, end), j in zip(left.offsets, fast.index.tolist(), strict=True):
            if mine.start <= start and end <= mine.end and left.text[start:end].strip():
                low, high = right.offsets[j]
                assert j >= 0 and low < other.end and other.start < high  # content goes to the same content


@pytest.mark.parametrize("shape", ["tokens", "pieces of characters", "pieces of one long span"])
def test_work_grows_with_the_prompt_not_its_square(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def comparisons(length: int) -> int:
        ours = [(i, min(i + 3, length)) for i in range(0, length, 3)]
        theirs = [(i, min(i + 5, length)) for i in range(0, length, 5)]
        if shape == "pieces of characters":
            ours, theirs = [[(i, i + 1) for i in range(length) for _ in range(4)] for _ in range(2)]
        if shape == "pieces of one long span":
            ours, theirs = [(0, length)] * length, [(0, length)] * length
        count = 0

        def counting(a: int, b: int) -> int:
            nonlocal count
            count += 1
            return min(a, b)

        text = "x" * length
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "min", counting, raising=False)
            span_map(rendered(text, ours), rendered(text, theirs))
        assert count > 0
        return count

    assert comparisons(4000) <= 2.1 * comparisons(2000)
