"""What comes after the prefill, for any model and any cache, fused or not: generate, stream, score."""

from __future__ import annotations

import copy
import operator
import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .errors import C2CError
from .kv import CACHE, Prefilled, positions_of
from .models.load import LM


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer: the token and the text that it completes ("" inside a character).

    `token` is None for what is left of a character that the answer never completed.
    """

    text: str
    token: int | None


@dataclass(frozen=True)
class Score:
    """How likely a continuation is: `logprob` is the sum over its `num_tokens` tokens, in nats.

    `is_greedy`: whether greedy decoding would write exactly these tokens.
    """

    logprob: float
    num_tokens: int
    is_greedy: bool


def generate(lm: LM, prompt: Prefilled, **kwargs: Any) -> Any:
    """Stock `model.generate` on top of a prefilled cache; every option of transformers passes through, but for those
    of `_UNFIT`, which are refused.

    `cache_implementation="static"` copies the prompt's cache into one of fixed length, for `max_new_tokens` more or
    up to `max_cache_len` positions, which is what transformers compiles the decoding steps for.

    Returns:
        What `generate` returns: token ids (B, T + new), prompt included, or its output object.
    """
    given = copy.deepcopy(kwargs.get("generation_config"))
    # In the model's own settings `use_cache: false` is of a training that checkpointed gradients.
    ours: dict[str, Any] = {"use_cache": True, "pad_token_id": lm.pad_token_id}
    if ends := lm.end_tokens:
        ours["eos_token_id"] = sorted(ends)
    if given is None:
        kwargs = {**ours, **kwargs}
    else:  # transformers deprecates options beside it
        given.update(**{name: value for name, value in ours.items() if getattr(given, name) is None})
        kwargs["generation_config"] = given
    if twice := {"input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", CACHE} & kwargs.keys():
        raise C2CError(f"{min(twice)} comes from the prompt; leave it out, and give prompts without padding")
    asked = partial(_asked, lm, kwargs)
    for name, (fits, reason) in _UNFIT.items():
        if not fits(asked(name)):
            raise C2CError(f"{name} doesn't go with a prefilled cache: {reason}; leave it out")
    tokens, new = prompt.input_ids.shape[1], asked("max_new_tokens")
    check_room(lm, tokens, new or 0)
    static_length = None
    if asked("cache_implementation") == "static":
        if new is None:
            raise C2CError("a static cache has a fixed length: say how long the answer may get, max_new_tokens")
        static_length = max(tokens + new - 1, asked("max_cache_len") or 0)  # the last token is never read
        # Or transformers would want to make one of its own.
        if given is None:
            kwargs["cache_implementation"] = None
        else:
            kwargs.pop("cache_implementation", None)
            given.cache_implementation = None
    copies = max(asked(name) or 1 for name in ("num_beams", "num_return_sequences"))
    inputs = prompt.inputs(copies, static_length)
    # A prompt may bring a criterion of its own, see `response`.
    criteria = [*inputs.pop("stopping_criteria", []), *_criteria(kwargs.pop("stopping_criteria", None))]
    return lm.model.generate(**inputs, stopping_criteria=StoppingCriteriaList(criteria), **kwargs)  # type: ignore[operator]


def _asked(lm: LM, kwargs: Mapping[str, Any], name: str) -> Any:
    """An option as `generate` looks it up: among the arguments, in the given settings, in the model's."""
    if name in kwargs:
        return kwargs[name]
    every = (
        getattr(settings, name, None) for settings in (kwargs.get("generation_config"), lm.model.generation_config)
    )
    return next((value for value in every if value is not None), None)


# Seen in transformers 5.23 and 5.24, where all but the last would give a wrong answer without a word.
_REREADS = "so told, transformers reads the whole prompt again on top of it"
_UNFIT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "assistant_model": (operator.not_, _REREADS),
    "assistant_early_exit": (operator.not_, _REREADS),
    "prompt_lookup_num_tokens": (operator.not_, _REREADS),
    "token_healing": (operator.not_, "it makes other tokens of the prompt's end"),
    "use_cache": (lambda value: value in (None, True), _REREADS),
    # Gemma's settings ask for a hybrid cache, which transformers no longer heeds.
    "cache_implementation": (lambda value: value in (None, "static", "hybrid"), "it is there already, or made static"),
}


def check_room(lm: LM, prompt_tokens: int, new_tokens: int) -> None:
    """Raise a C2CError if the prompt and the answer don't fit the model's context."""
    if prompt_tokens + new_tokens > lm.context_length:
        raise C2CError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones don't fit the context of {lm.name}, "
            f"{lm.context_length} tokens; shorten the prompt or ask for fewer new tokens"
        )


class Words:
    """The text of an answer that grows token by token. `behind`: it goes on in a text, where the space that some
    decoders drop from a text's beginning belongs to it."""

    def __init__(self, lm: LM, behind: bool = False) -> None:
        self.lm, self.behind = lm, behind
        self.ids: list[int] = []
        self._text = self._done = ""

    def add(self, token: int) -> str:
        """What this token completes: "" inside a character, and for a model without a tokenizer."""
        self.ids.append(token)
        self._text = "" if self.lm.tokenizer is None else self.lm.text(self.ids, self.behind)
        # A character whose bytes are not complete yet decodes to U+FFFD: wait for the rest of it.
        new = "" if self._text.endswith("\ufffd") else self.rest()
        self._done += new
        return new

    def rest(self) -> str:
        """What is left of a character that was never completed."""
        return self._text[len(self._done) :]


class _Tokens(BaseStreamer):
    """Hands the tokens of a running `generate` to another thread; also the means to stop it."""

    def __init__(self) -> None:
        self.queue: queue.Queue[int | BaseException | None] = queue.Queue()
        self.prompt_seen = False
        self.stopped = threading.Event()

    def put(self, value: Tensor) -> None:
        if self.prompt_seen:
            for token in value.flatten().tolist():
                self.queue.put(token)
        self.prompt_seen = True  # generate hands over the prompt first

    def end(self) -> None:
        pass  # the end is marked by `stream`, behind a possible exception


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


def stream(lm: LM, prompt: Prefilled, **kwargs: Any) -> Generator[Chunk, None, None]:
    """As `generate`, but yields the answer of the one prompt token by token. Closing the iterator stops the model."""
    if len(prompt.input_ids) != 1:
        raise C2CError(
            f"stream answers one prompt at a time, {len(prompt.input_ids)} were given; use generate for a batch"
        )
    if "streamer" in kwargs:
        raise C2CError("stream is a streamer itself; take what it yields, or use generate with a streamer")
    if (_asked(lm, kwargs, "num_return_sequences") or 1) > 1:
        raise C2CError("stream gives one answer token by token; use generate for num_return_sequences")
    if _asked(lm, kwargs, "cache_implementation") == "static":
        raise C2CError(
            "stream runs the model in a thread of its own, and steps compiled for a static cache belong to the thread "
            "that compiled them; use generate with a streamer"
        )
    tokens = _Tokens()
    criteria = StoppingCriteriaList([_Stop(tokens.stopped), *_criteria(kwargs.pop("stopping_criteria", None))])

    def run() -> None:
        try:
            generate(lm, prompt, streamer=tokens, stopping_criteria=criteria, **kwargs)
            tokens.queue.put(None)
        except BaseException as error:  # handed to the thread that reads
            tokens.queue.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    words = Words(lm, any(prompt.behind))
    try:
        while (item := tokens.queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield Chunk(words.add(item), item)
        if rest := words.rest():
            yield Chunk(rest, None)
    finally:
        tokens.stopped.set()
        thread.join()


def _criteria(given: Any) -> list[StoppingCriteria]:
    """As transformers takes them: None, one, or several."""
    return [given] if isinstance(given, StoppingCriteria) else list(given or [])


def threshold(skip: float | None) -> float | None:
    """A confidence from which the sharers are skipped, as it is; raises a C2CError for what is no probability."""
    if skip is not None and not 0 <= skip <= 1:
        raise C2CError(f"skip is {skip}; expected a confidence from 0 (always skip) to 1, or None to never skip")
    return skip


@torch.no_grad()
def next_token(lm: LM, prompt: Prefilled) -> Tensor:
    """Per prompt, the distribution of the next token over the whole vocabulary, (B, V) float32."""
    return _logits(lm, prompt, prompt.input_ids[:, -1:], owner=None)[:, -1].softmax(-1)


def confidence(lm: LM, prompt: Prefilled) -> list[float]:
    """Per prompt, the probability that the model gives its likeliest next token (over the whole vocabulary)."""
    return next_token(lm, prompt).amax(-1).tolist()


@torch.no_grad()
def score(lm: LM, prompt: Prefilled, continuations: Sequence[Sequence[Sequence[int]]]) -> list[list[Score]]:
    """Log-likelihoods of continuations of each prompt.

    Args:
        lm: the model.
        prompt: B prompts.
        continuations: for each prompt, any number of continuations as token ids, none of them empty.
    """
    fits = len(continuations) == len(prompt.input_ids) and any(continuations)
    if not fits or any(not ids for group in continuations for ids in group):
        raise C2CError(
            f"{len(prompt.input_ids)} prompts and {len(continuations)} groups of {sum(map(len, continuations))} "
            "continuations were given; expected one group per prompt and at least one token per continuation"
        )
    flat = [ids for group in continuations for ids in group]
    if wrong := next((i for ids in flat for i in ids if not 0 <= i < lm.vocab_size), None):
        raise C2CError(f"continuations hold the token id {wrong}; {lm.name} has {lm.vocab_size:,}, from 0 on")
    check_room(lm, prompt.input_ids.shape[1], max(map(len, flat)))
    device = prompt.input_ids.device
    owner = torch.tensor([row for row, group in enumerate(continuations) for _ in group], device=device)
    if max(map(len, flat)) == 1:
        # One token each: the distribution behind the prompt scores all of a prompt's continuations at once.
        logprobs = _logits(lm, prompt, prompt.input_ids[:, -1:], owner=None)[:, -1].log_softmax(-1)[owner][:, None]
    else:
        longest = max(map(len, flat))
        tails = torch.tensor([[*ids[:-1], *[0] * (longest - len(ids))] for ids in flat], device=device)
        ids_in = torch.cat([prompt.input_ids[owner, -1:], tails], dim=1)
        logprobs = _logits(lm, prompt, ids_in, owner=owner).log_softmax(-1)
    scores = []
    for row, ids in zip(logprobs, flat, strict=True):
        target = torch.tensor(ids, device=device)
        row = row[: len(ids)]
        logprob = row.gather(1, target[:, None]).sum().item()
        scores.append(Score(logprob, len(ids), bool((row.argmax(-1) == target).all())))
    grouped = iter(scores)
    return [[next(grouped) for _ in group] for group in continuations]


def _logits(lm: LM, prompt: Prefilled, ids: Tensor, owner: Tensor | None) -> Tensor:
    """Float32 logits (rows, n, vocabulary) behind each of `ids` (rows, n), which starts with the prompts' last tokens.

    `owner` (rows,) names each row's prompt; None: row i belongs to prompt i. Positions behind a row's end are padding
    on the right, which earlier ones never see.
    """
    kv, mask = prompt.kv, prompt.attention_mask
    if owner is not None:
        kv, mask = kv.rows(owner), mask[owner]
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - 1)], dim=1)
    positions = positions_of(mask)[:, -ids.shape[1] :]
    if prompt.position_ids is not None:
        last = prompt.position_ids[:, -1:] if owner is None else prompt.position_ids[owner, -1:]
        positions = last + torch.arange(ids.shape[1], device=last.device)
    output = lm.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=True,
        **{CACHE: kv.to_cache()},
    )
    return output.logits.float()
