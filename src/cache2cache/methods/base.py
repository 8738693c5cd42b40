"""What is asked, what is answered, and the clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, cast

from cache2cache import decode
from cache2cache.alignment.chat import render
from cache2cache.decode import Chunk
from cache2cache.kv import prefill_prompts
from cache2cache.models.load import LM
from cache2cache.tasks.base import Question
from cache2cache.tasks.prompts import option_lines, short_prompt


@dataclass(frozen=True)
class Ask:
    """One question as the methods need it.

    Attributes:
        prompt: the user turn that is to be answered.
        stem: the question without its options, and
        full: the question with them: what a sharer is told in the forms of text-to-text.
        system: a system message for every chat.
        skip: the receiver's confidence from which C2C leaves out the sharer, see `C2C.fuse`.
    """

    prompt: str
    stem: str
    full: str
    system: str | None = None
    skip: float | None = None

    @classmethod
    def of(
        cls,
        question: str | Question,
        *,
        prompt: Callable[[Question], str] = short_prompt,
        system: str | None = None,
        skip: float | None = None,
    ) -> Ask:
        """From a multiple-choice question, put with `prompt`; or from any text, put as it is."""
        if isinstance(question, str):
            return cls(question, question, question, system, skip)
        return cls(prompt(question), question.question, f"{question.question}\n{option_lines(question)}", system, skip)

    def chat(self, *turns: tuple[str, str]) -> list[dict[str, str]]:
        """A chat of `turns` (role, content), the prompt by default, behind the system message."""
        system = [("system", self.system)] if self.system else []
        return [{"role": role, "content": text} for role, text in (*system, *(turns or [("user", self.prompt)]))]


@dataclass(frozen=True)
class Answer:
    """An answer, whole or so far. The clock starts before the prompt is tokenized and stops at the newest token.

    Attributes:
        method: a name of `METHODS`.
        text: the answer.
        message: what the sharer wrote to the receiver, in text-to-text.
        first_token_s, total_s: seconds to the first and to the newest token of the answer, the message included.
        new_tokens, message_tokens: tokens written, end tokens included.
        bytes_passed: from the sharer to the receiver: cache entries that the fuser reads, or the message in UTF-8.
        transfer_bytes, transfer_s: what came over the wire from sharers served elsewhere, and the slowest of them.
        skipped: whether C2C left out the sharer.
    """

    method: str
    text: str = ""
    message: str = ""
    first_token_s: float = 0.0
    total_s: float = 0.0
    new_tokens: int = 0
    message_tokens: int = 0
    bytes_passed: int = 0
    transfer_bytes: int = 0
    transfer_s: float = 0.0
    skipped: bool = False


def stream_lm(
    lm: LM, messages: list[dict[str, str]], max_new_tokens: int, chat_template_kwargs: Mapping[str, Any]
) -> Iterator[Chunk]:
    """One model answers a chat on its own, greedily, on the same path as the pair: prefill, then decode."""
    ids = render(lm.need_tokenizer(), messages, chat_template_kwargs=chat_template_kwargs).ids
    decode.check_room(lm, len(ids), max_new_tokens)
    return decode.stream(lm, prefill_prompts(lm, [ids]), do_sample=False, max_new_tokens=max_new_tokens)


def grow(answer: Answer, began: float, chunks: Iterator[Chunk], *, message: bool = False) -> Iterator[Answer]:
    """`answer` with the pieces of its text, or of its message, added one by one.

    `began` is the clock's start (`time.perf_counter`). Closing the iterator closes `chunks`, which stops the model.
    """
    with closing(cast("Generator[Chunk, None, None]", chunks)):
        for chunk in chunks:
            now = time.perf_counter() - began
            changes: dict[str, Any]
            if message:
                text = answer.message + chunk.text
                changes = {
                    "message": text,
                    "message_tokens": answer.message_tokens + (chunk.token is not None),
                    "bytes_passed": len(text.encode()),
                }
            else:
                first = answer.first_token_s or now
                changes = {
                    "text": answer.text + chunk.text,
                    "new_tokens": answer.new_tokens + (chunk.token is not None),
                    "first_token_s": first,
                }
            answer = replace(answer, total_s=now, **changes)
            yield answer
