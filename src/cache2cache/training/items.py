"""A recipe's examples as token ids, and the hold-out set aside."""

from __future__ import annotations

import math
import time
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from ..alignment.chat import answer_ids, end_of_turn
from ..config import TrainConfig
from ..errors import C2CError
from ..models.load import LM
from ..pair import PromptIds
from .data import Example, examples, mix, shortened, split


@dataclass(frozen=True, slots=True)
class Item:
    """An example as token ids: the encoded prompt and the response that follows it."""

    id: str
    prompt: PromptIds
    response: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.prompt.receiver) + len(self.response)


@dataclass(frozen=True)
class Prepared:
    """The items of a recipe: to train on, to watch, and what `max_tokens` did.

    Attributes:
        train, holdout: the items; with weights those of `train` may repeat.
        too_long: how many examples were left out, their prompts leaving no room for the response.
        shortened: how many of the others lost old turns.
        cut: how many of the others lost the end of their response.
        share: how much of the recipe's examples this is; below 1 for a sample.
        seconds: what encoding it took.
    """

    train: list[Item]
    holdout: list[Item]
    too_long: int
    shortened: int = 0
    cut: int = 0
    share: float = 1.0
    seconds: float = field(default=0.0, compare=False)

    @property
    def truncation(self) -> str:
        """What to say of it."""
        more = [f"{n} {what}" for n, what in ((self.shortened, "without old turns"), (self.cut, "cut")) if n]
        return ", ".join([f"{self.too_long} too long", *more])


class Encoder(Protocol):
    """What turns prompts into token ids: a pair, or a receiver without sharers (`single.Alone`)."""

    receiver: LM
    sharers: list[LM]

    def encode(self, prompt: Any, *, prefix: str = "") -> PromptIds: ...


def prepare(
    pair: Encoder,
    config: TrainConfig,
    found: Sequence[Example] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    most: int | None = None,
) -> Prepared:
    """Encode a recipe's examples and set the hold-out aside, the same ones in every run and for all models.

    What is too long is left out behind that split, so the hold-out may be smaller than asked for. Each of several
    processes encodes a part of the examples, and all of them have all in the end.

    Args:
        found: the recipe's `examples`, where they are read already.
        progress: called with how many of how many examples were encoded here.
        most: encode every n-th example only, so that there are about as many; None: all.
    """
    began = time.perf_counter()
    learned, watched = split(examples(config) if found is None else found, config.holdout)
    every = 1 if most is None else max(1, math.ceil((len(learned) + len(watched)) / most))
    sampled = learned[::every]
    # Of a source that has few rows one at least: `mix` takes something of each.
    absent = {e.source for e in learned} - {e.source for e in sampled}
    sampled += [next(e for e in learned if e.source == source) for source in sorted(absent)]
    asked = [*watched[::every], *sampled]
    share = len(asked) / (len(learned) + len(watched))
    held = len(watched[::every])
    del learned, watched
    made: list[tuple[Item | None, list[str]] | C2CError] = []
    process = this_process()
    parts = [len(asked) * i // process.num_processes for i in range(process.num_processes + 1)]
    mine = asked[parts[process.process_index] : parts[process.process_index + 1]]
    for number, example in enumerate(mine, 1):
        try:
            item, changes = fit_tokens(pair, example, config)
            made.append((item and compact(item), changes))
        except C2CError as error:  # such as a template that refuses the order of the turns
            made.append(error)
        progress(number, len(mine))
    # Errors travel too: a process that ends by itself would leave the others waiting.
    made = gather_object(made)

    train: list[Item] = []
    holdout: list[Item] = []
    sources: list[list[Item]] = [[] for _ in config.data]
    counts, bad = Counter(too_long=0, shortened=0, cut=0), []
    for number, (example, result) in enumerate(zip(asked, made, strict=True)):
        if isinstance(result, C2CError):
            if config.data[example.source].on_bad_rows == "error":
                raise result
            bad.append(str(result))
            continue
        item, changes = result
        counts.update(changes)
        if item is not None and number < held:
            holdout.append(item)
        elif item is not None:
            train.append(item)
            sources[example.source].append(item)
    if bad:
        warnings.warn(f"{len(bad)} examples cannot be encoded and are left out; the first: {bad[0]}", stacklevel=2)
    if not train or (config.holdout and not holdout):
        raise C2CError(
            f"{len(train) + len(holdout)} examples are left ({counts['too_long']} longer than max_tokens "
            f"{config.max_tokens} or a model's context), {len(holdout)} of them for the hold-out of {config.holdout}; "
            "give more data, raise max_tokens or lower holdout"
        )
    weights = [source.weight for source in config.data if source.weight is not None]
    return Prepared(
        mix(sources, weights, config.drawn_by) if weights else train,
        holdout,
        **counts,
        share=share,
        seconds=time.perf_counter() - began,
    )


def compact(item: Item) -> Item:
    """An example without what training doesn't read, in four bytes a number, a fifth of what lists take.

    It is trained on the token map `span`, by which positions count up.
    """
    prompt = item.prompt
    receiver, response = array("i", prompt.receiver), array("i", item.response)
    sharers, maps = ([array("i", numbers) for numbers in each] for each in (prompt.sharers, prompt.maps))
    return Item(item.id, PromptIds(receiver, sharers, maps), response)


def fit_tokens(pair: Encoder, example: Example, config: TrainConfig) -> tuple[Item | None, list[str]]:
    """An example as token ids within `max_tokens` and what the models have room for, and the counters of `Prepared`
    that what was done to it falls under.

    A response keeps its first `min_response_tokens` tokens, or all that it has (all, where `too_long` says drop); where
    the prompt leaves less room, the oldest turns go if `truncate` says so, else the example.
    """
    response = response_ids(pair.receiver.need_tokenizer(), example)
    needed = len(response) if config.too_long == "drop" else min(config.min_response_tokens, len(response))
    changes: list[str] = []
    for messages in shortened(example.messages) if config.truncate == "oldest" else [example.messages]:
        try:
            prompt = pair.encode(list(messages), prefix=example.prefix)
        except C2CError as error:
            raise C2CError(f"{example.id}: {error}") from error
        room = min(config.max_tokens, pair.receiver.context_length) - len(prompt.receiver)
        read = zip(prompt.sharers, pair.sharers, strict=True)
        fits = (len(ids) <= min(config.max_tokens, lm.context_length) for ids, lm in read)
        if room >= needed and all(fits):
            cut = ["cut"] if room < len(response) else []
            return Item(example.id, prompt, response[:room]), changes + cut
        changes = ["shortened"]
    return None, ["too_long"]


def response_ids(tokenizer: Any, example: Example) -> list[int]:
    """The response's tokens, with the one that ends a turn where it ends. Control tokens spelled out in a response are
    read as text, as in a prompt."""
    ids = answer_ids(tokenizer, example.response, example.prefix)
    if example.ends and (end := end_of_turn(tokenizer)) is not None:
        ids.append(end)
    if not ids:
        raise C2CError(f"the response of {example.id} has no tokens; leave the row out")
    return ids


def this_process() -> PartialState:
    """Which of a launcher's processes this is, alone unless one started several; it has a GPU of its own from now on.

    They wait for each other for hours before that is an error: one may still fetch models and data that others have.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))
