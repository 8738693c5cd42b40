"""A multiple-choice answer by option likelihood: the likeliest letter behind the prompt."""

from __future__ import annotations

from collections.abc import Sequence

from ..decode import score
from ..kv import Prefilled
from ..models.load import LM
from ..tasks import Question


def letter_logprobs(lm: LM, prompts: Prefilled, questions: Sequence[Question], space: str = " ") -> list[list[float]]:
    """Per prompt the log-likelihood of each letter of its question's options as the next token(s), to 5 digits."""
    letters = [[lm.continuation_ids(f"{space}{letter}") for letter in question.letters] for question in questions]
    return [[round(s.logprob, 5) for s in scores] for scores in score(lm, prompts, letters)]


def likeliest(logprobs: Sequence[float]) -> int:
    """The index of the likeliest option, the first of those that are equally likely."""
    return max(range(len(logprobs)), key=logprobs.__getitem__)
