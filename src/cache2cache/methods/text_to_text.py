"""Text-to-text: the sharer writes the receiver a message, and the receiver answers behind it.

Three forms. As published, the sharer sees the question without its options and is told not to solve it. The two others
keep the baseline from being handicapped: the sharer sees the options too, or sees them and may answer outright.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from cache2cache.methods.base import Answer, Ask, grow, stream_lm
from cache2cache.pair import C2C

MAX_MESSAGE_TOKENS = 256
BACKGROUND = (
    "In one clear sentence, describe the most essential background knowledge needed to answer the question: {question} "
    "Do NOT directly solve or give answer to the question."
)
_ANSWER = (
    "In one clear sentence, describe the most essential background knowledge needed to answer the question, and say "
    "which answer is right: {question}"
)


# What the sharer is told, by the form's name.
FORMS: dict[str, Callable[[Ask], str]] = {
    "text": lambda ask: BACKGROUND.format(question=ask.stem),
    "text-options": lambda ask: BACKGROUND.format(question=ask.full),
    "text-answer": lambda ask: _ANSWER.format(question=ask.full),
}


def published(pair: C2C, ask: Ask, max_new_tokens: int) -> Iterator[Answer]:
    """As published: background knowledge for the question without its options (arXiv 2510.03215)."""
    return _relay("text", pair, ask, max_new_tokens)


def with_options(pair: C2C, ask: Ask, max_new_tokens: int) -> Iterator[Answer]:
    """The sharer sees the options too."""
    return _relay("text-options", pair, ask, max_new_tokens)


def with_answer(pair: C2C, ask: Ask, max_new_tokens: int) -> Iterator[Answer]:
    """The sharer sees the options and may answer."""
    return _relay("text-answer", pair, ask, max_new_tokens)


def relayed(ask: Ask, form: str, message: str) -> list[dict[str, str]]:
    """What the receiver reads: the instruction, the sharer's message, and the question."""
    return ask.chat(("user", FORMS[form](ask)), ("assistant", message), ("user", ask.prompt))


def _relay(form: str, pair: C2C, ask: Ask, max_new_tokens: int) -> Iterator[Answer]:
    began = time.perf_counter()
    answer = blank = Answer(form)
    chat = ask.chat(("user", FORMS[form](ask)))
    words = stream_lm(pair.sharers[0], chat, MAX_MESSAGE_TOKENS, pair.chat_template_kwargs)
    for answer in grow(blank, began, words, message=True):
        yield answer
    chat = relayed(ask, form, answer.message)
    yield from grow(answer, began, stream_lm(pair.receiver, chat, max_new_tokens, pair.chat_template_kwargs))
