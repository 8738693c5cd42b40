"""How a question is answered: by either model alone, through a message in words, or through the caches.

Each method is a function `(pair, ask, max_new_tokens) -> Iterator[Answer]` that yields the answer as it grows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cache2cache.methods import c2c, single, text_to_text
from cache2cache.methods.base import Answer, Ask
from cache2cache.pair import C2C

__all__ = ["METHODS", "Answer", "Ask", "Method"]

Method = Callable[[C2C, Ask, int], Iterator[Answer]]
METHODS: dict[str, Method] = {
    "receiver": single.receiver,
    "sharer": single.sharer,
    "text": text_to_text.published,
    "text-options": text_to_text.with_options,
    "text-answer": text_to_text.with_answer,
    "c2c": c2c.c2c,
}
