"""One model of the pair answers alone."""

from __future__ import annotations

import time
from collections.abc import Iterator

from cache2cache.methods.base import Answer, Ask, grow, stream_lm
from cache2cache.models.load import LM
from cache2cache.pair import C2C


def receiver(pair: C2C, ask: Ask, max_new_tokens: int) -> Iterator[Answer]:
    """The receiver alone."""
    yield from _alone("receiver", pair.receiver, pair, ask, max_new_tokens)


def sharer(pair: C2C, ask: Ask, max_new_tokens: int) -> Iterator[Answer]:
    """The sharer alone, the first of several."""
    yield from _alone("sharer", pair.sharers[0], pair, ask, max_new_tokens)


def _alone(method: str, lm: LM, pair: C2C, ask: Ask, max_new_tokens: int) -> Iterator[Answer]:
    began = time.perf_counter()
    chunks = stream_lm(lm, ask.chat(), max_new_tokens, pair.chat_template_kwargs)
    yield from grow(Answer(method), began, chunks)
