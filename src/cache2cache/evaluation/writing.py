"""Greedy answers in batches, and the files that rows of an evaluation go to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .. import decode
from ..errors import C2CError
from ..kv import CACHE, Prefilled, prefill_prompts
from ..models.load import LM
from ..response import Answering

Row = TypeVar("Row")


@dataclass(frozen=True)
class Written:
    """An answer's tokens without the one that ends it, its text, and whether it came to that end by itself."""

    ids: list[int]
    text: str
    ended: bool


def write(lm: LM, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[Written]:
    """What one model alone answers to prompts given as token ids, greedily."""
    return write_on(lm, prefill_prompts(lm, rows), [max_new_tokens] * len(rows))


def write_on(
    lm: LM, prompts: Prefilled, limits: Sequence[int], until: Sequence[str] = (), **options: Any
) -> list[Written]:
    """What a model answers on top of prefilled caches, in at most that many tokens each.

    Answers differ in length, and an ended row would cost as much as a live one until the longest has ended: whenever a
    share of the batch has, what is left goes on in a smaller one.

    Args:
        lm: the model.
        prompts: what it has read.
        limits: of tokens, one for each prompt.
        until: texts that end an answer too, which is as long as the token that completes one.
        options: of `generate`, for one answer each without beams; greedily without any.
    """
    options = {"do_sample": False, **options}
    least = options.pop("min_new_tokens", lm.model.generation_config.min_new_tokens)
    whole = isinstance(prompts, Answering)  # which keeps more than a cache of each row
    made: dict[int, Written] = {}
    rows, start = list(range(len(limits))), prompts.input_ids.shape[1]
    while rows:
        left = [limits[row] for row in rows]
        ended = Ended(lm, start, left, until, each=whole)
        new = prompts.input_ids.shape[1] - start
        more: dict[str, Any] = {"max_new_tokens": max(left) - new, "stopping_criteria": [ended]}
        if least:  # which `generate` counts from here on
            more["min_new_tokens"] = max(0, least - new)
        output = decode.generate(lm, prompts, return_dict_in_generate=True, **options, **more)
        done = ended.rows(output.sequences)
        finished, live = done.nonzero().flatten(), (~done).nonzero().flatten()
        answers = written(lm, output.sequences[finished, start:], ended.limits[finished].tolist())
        made |= {rows[place]: answer for place, answer in zip(finished.tolist(), answers, strict=True)}
        rows = [rows[place] for place in live.tolist()]
        if rows:
            prompts = prompts.grown(output.sequences, getattr(output, CACHE), live)
        del output  # a cache of all rows, which would stay beside the next one
    return [made[row] for row in range(len(limits))]


class Ended(StoppingCriteria):
    """Stops `generate` for all rows as soon as a quarter of them is done: by an end token, by one of some texts, or by
    their limits. With `each`, for each row once it is.

    Attributes:
        limits: (B,) int64, of new tokens; a row with one of the texts has come to its limit.
    """

    def __init__(
        self, lm: LM, start: int, limits: Sequence[int], until: Sequence[str] = (), *, each: bool = False
    ) -> None:
        self.start, self.each = start, each
        self.ends = torch.tensor(sorted(lm.end_tokens), device=lm.device)
        self.limits = torch.tensor(list(limits), device=lm.device)
        self.until = [text for text in until if text]
        self.tokenizer = lm.need_tokenizer() if self.until else None
        # A token is a byte at least; one more, as a tokenizer may drop the space in front of the first one.
        self.tail = 1 + max((len(text.encode()) for text in self.until), default=0)

    def rows(self, sequences: Tensor) -> Tensor:
        """Which rows are done, (B,) bool."""
        new = sequences[:, self.start :]
        return torch.isin(new, self.ends).any(-1) | (self.limits <= new.shape[1])

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.tokenizer is not None:
            length = input_ids.shape[1]
            tails = self.tokenizer.batch_decode(input_ids[:, max(self.start, length - self.tail) :])
            for row, tail in enumerate(tails):
                if any(text in tail for text in self.until):
                    self.limits[row].clamp_(max=length - self.start)
        done = self.rows(input_ids)
        return done if self.each else torch.full_like(done, 4 * int(done.sum()) >= len(done))


def written(lm: LM, new: Tensor, limits: Sequence[int] | None = None) -> list[Written]:
    """Each row of what `generate` added (B, new), up to its first end token: padding follows behind that."""
    stops = lm.end_tokens
    made = []
    for row, limit in zip(new.tolist(), limits or [new.shape[1]] * len(new), strict=True):
        row = row[:limit]
        length = next((i for i, token in enumerate(row) if token in stops), len(row))
        text = lm.text(row[:length])
        made.append(Written(row[:length], text, length < len(row)))
    return made


# ---- files ----------------------------------------------------------------------------------------------------------


def read_rows(path: Path, make: Callable[..., Row]) -> list[Row]:
    """The rows of a JSONL file, if there is one, but for a last line that isn't complete: its writer was killed, or is
    at it."""
    if not path.exists():
        return []
    whole = path.read_bytes()
    try:
        lines = whole[: whole.rfind(b"\n") + 1].decode().split("\n")[:-1]
        return [make(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise C2CError(f"{path} holds other rows than answers ({error}); choose another output") from error


def line_of(row: Any) -> str:
    """A dataclass row as a line of JSON, without what is None in it."""
    return json.dumps({name: value for name, value in asdict(row).items() if value is not None}) + "\n"


def add_rows(path: Path, rows: Sequence[Any]) -> None:
    """Add dataclass rows to a JSONL file, in place of a last line that a kill cut short, and see them on the disk."""
    if not rows:
        return
    with path.open("a+b") as file:
        _cut_short(file)
        file.write("".join(map(line_of, rows)).encode())
        file.flush()
        os.fsync(file.fileno())


def _cut_short(file: BinaryIO) -> None:
    """Remove from a file, open to append to, what stands behind its last line break."""
    size = end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 4096)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        end = begin if found < 0 else begin + found + 1
        if found >= 0:
            break
    if end < size:
        file.truncate(end)
