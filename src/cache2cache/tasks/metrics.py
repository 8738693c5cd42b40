"""How an answer in words is scored: `score(question, text)`, from 0 to 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cache2cache.errors import C2CError
from cache2cache.tasks.base import OpenQuestion, Question
from cache2cache.tasks.prompts import extract_letter


def exact(text: str, reference: str, classes: Sequence[str]) -> float:
    """1 where both are the same but for case and the white space around them."""
    return float(text.strip().casefold() == reference.strip().casefold())


# What an answer, one reference and the question's classes are worth together.
METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "exact": exact,
}


def score(question: Question | OpenQuestion, text: str) -> float:
    """What the answer `text` is worth, from 0 to 1.

    For a question with options 1 where the letter read out of the text is the right one; otherwise the question's
    metric, with the reference that fits best.
    """
    if isinstance(question, Question):
        return float(extract_letter(text, len(question.options)) == question.letter)
    if question.metric not in METRICS:
        raise C2CError(f"unknown metric {question.metric!r}; expected one of {', '.join(METRICS)}")
    answer = text.lstrip("\n").split("\n")[0] if question.first_line else text
    metric = METRICS[question.metric]
    return max(metric(answer, reference, question.classes) for reference in question.references)
