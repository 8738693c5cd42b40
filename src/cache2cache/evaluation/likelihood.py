"""Accuracy by option likelihood: the option whose letter is likeliest behind "The correct answer is" (paper protocol).

Four methods on the same questions: the receiver alone, the sharer alone, C2C, and C2C with the sharer's cache taken
from another question of like length. The last one separates what the sharer knows of the question from the mere
presence of a cache: only the rest of a gain is communication. A fifth, with a threshold, is C2C that skips the sharer
where the receiver is confident (`evaluation.skipping`); a sixth is the receiver fine-tuned alone (`training.single`).
Two more write tokens, which takes longer: the receiver's own
answer in words, and text-to-text as published, whose message the receiver reads before it chooses an option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from ..alignment.chat import render
from ..decode import confidence, score, threshold
from ..errors import C2CError
from ..fuser import C2CFuser
from ..kv import KV, Prefilled, pad_left, prefill, prefill_prompts, prefilled
from ..methods.base import Ask
from ..methods.text_to_text import BACKGROUND, MAX_MESSAGE_TOKENS
from ..models.load import LM
from ..pair import C2C, FusedCache, PromptIds
from ..tasks import Question
from ..tasks.prompts import ANSWER_PREFIX, extract_letter, paper_prompt, short_prompt
from ..training.store import Store
from .writing import add_rows, read_rows, write

METHODS = ("receiver", "sharer", "c2c", "other")
WRITTEN = ("receiver-generate", "text")  # only where asked for
SKIP = "skip"  # asked for with a threshold
SINGLE = "single"  # asked for with an adapter
READ_SHARER = {"sharer", "c2c", "other"}
MAX_NEW_TOKENS = 64  # of receiver-generate, as in the paper
PROMPTS = {"paper": paper_prompt, "short": short_prompt}


@dataclass(frozen=True)
class Answer:
    """One method's answer to one question: the index it chose, and the letters' log-likelihoods.

    Attributes:
        choice: -1 where an answer in words names no option.
        logprobs: empty where the answer is in words.
        text: what was written: the receiver's answer, or the sharer's message.
        confidence: the receiver's own (`decode.confidence`), in its rows: what `c2c calibrate` reads.
        skipped: whether the sharer was skipped, in the rows of the method skip.
    """

    task: str
    prompt: str
    id: str
    method: str
    choice: int
    correct: bool
    logprobs: list[float]
    confidence: float | None = None
    skipped: bool | None = None
    text: str | None = None


def evaluate(
    pair: C2C,
    task: str,
    questions: Sequence[Question],
    samples: Path,
    *,
    prompt: str = "paper",
    methods: Sequence[str] = METHODS,
    skip: float | None = None,
    single: LM | None = None,
    batch_size: int = 16,
    store: Store | None = None,
    max_bytes: int = 20 * 10**9,
    progress: Callable[[int], None] = lambda questions: None,
) -> list[Answer]:
    """Answer questions with every method; each question's sharer prefill is computed once for all of them.

    Args:
        pair: with one sharer.
        task: a name for the rows written.
        questions: what to ask.
        samples: JSONL file that a row per answer is added to; what stands there already is not asked again.
        prompt: "paper" or "short".
        methods: of METHODS and WRITTEN, SKIP and SINGLE.
        skip: the threshold of the method skip.
        single: the fine-tuned receiver of the method single.
        batch_size: questions at once, of like length.
        store: where the sharer's prefills are read from, and put first where they are missing; None computes them.
        max_bytes: refuse to start where they would take more than that.
        progress: called with the number of questions of each batch done.
    """
    check_names(prompt, methods, skip)
    if SINGLE in methods and single is None:
        raise C2CError("the method single needs a fine-tuned receiver; give one as single")
    if len({q.id for q in questions}) != len(questions):
        raise C2CError(f"two questions of {task} have the same id; give each row its own")
    check_pair(pair)
    done = [a for a in read_answers(samples) if a.task == task and a.prompt == prompt]
    have = {(a.id, a.method) for a in done}
    encoded = [
        (q, pair.encode([{"role": "user", "content": PROMPTS[prompt](q)}], prefix=ANSWER_PREFIX)) for q in questions
    ]
    encoded.sort(key=lambda item: (len(item[1].sharers[0]), item[0].id))
    if store is not None and any((q.id, m) not in have for q, _ in encoded for m in READ_SHARER & set(methods)):
        store.check_room([p.sharers[0] for _, p in encoded], max_bytes)
    for batch in batches_of(encoded, batch_size):
        if wanted := [m for m in methods if any((q.id, m) not in have for q, _ in batch)]:
            answers = _answer(pair, task, prompt, batch, wanted, skip, single, store)
            new = [a for a in answers if (a.id, a.method) not in have]
            add_rows(samples, new)
            done += new
        progress(len(batch))
    ids = {q.id for q in questions}
    return [a for a in done if a.id in ids and a.method in methods]


def check_names(prompt: str, methods: Sequence[str], skip: float | None = None) -> None:
    """Raise a C2CError for a prompt or method that doesn't exist, and for skipping without a threshold."""
    known_methods = (*METHODS, *WRITTEN, SKIP, SINGLE)
    for name, given, known in (("prompt", [prompt], tuple(PROMPTS)), ("method", methods, known_methods)):
        if wrong := [g for g in given if g not in known]:
            raise C2CError(f"unknown {name} {wrong[0]!r}; expected one of {', '.join(known)}")
    if SKIP in methods and skip is None:
        raise C2CError("the method skip needs a threshold; give one, from 0 to 1, as skip")
    threshold(skip)


def check_pair(pair: C2C) -> None:
    """Raise a C2CError for a pair that can't be compared with its sharer."""
    if len(pair.sharers) != 1:
        raise C2CError(f"this evaluation takes a pair with one sharer, {len(pair.sharers)} were given")
    if (token_map := pair.fusers[0].config.token_map) != "span":  # type: ignore[union-attr]
        raise C2CError(
            f"the fuser's token map {token_map!r} doesn't let the sharer read its own tokens, so this evaluation would "
            "not measure the sharer alone; give a fuser with the token map span"
        )


def read_answers(samples: Path) -> list[Answer]:
    """The rows of a samples file; a last line that a kill cut short is dropped from the file."""
    return read_rows(samples, Answer)


Item = TypeVar("Item")


def batches_of(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Batches of nearly equal size, none with a single item, which has no other: three at once for a size of 2."""
    count = max(1, min(math.ceil(len(items) / size), len(items) // 2))
    bounds = [round(i * len(items) / count) for i in range(count + 1)]
    return [items[a:b] for a, b in pairwise(bounds)]


def sharer_caches(pair: C2C, prompts: Sequence[PromptIds], store: Store | None, *, alone: bool = True) -> KV:
    """The sharer's caches of whole prompts, from a store that is given them first where they are missing, or computed.

    From a store they are as training reads them, in float32 where it holds int8.
    `alone`: the sharer is to answer from them; otherwise only the layers that the fuser reads are sure to be there.
    """
    sharer, fuser = pair.sharers[0], pair.fusers[0]
    assert isinstance(fuser, C2CFuser)
    rows = [list(p.sharers[0]) for p in prompts]
    if store is None:
        return prefill(sharer, *pad_left(rows, sharer.pad_token_id, sharer.device))
    if store.missing(rows):
        store.fill(sharer, rows, batch_tokens=len(rows) * max(map(len, rows)))
    layers = None if alone else (int(fuser.sharer_layers.min()), int(fuser.sharer_layers.max()) + 1)
    return store.read(rows, layers=layers).to(sharer.device)


def _answer(
    pair: C2C,
    task: str,
    prompt: str,
    batch: Sequence[tuple[Question, PromptIds]],
    methods: Sequence[str],
    skip: float | None,
    single: LM | None,
    store: Store | None,
) -> Iterator[Answer]:
    questions, prompts = [q for q, _ in batch], [p for _, p in batch]
    cache = None
    if READ_SHARER & set(methods) or (SKIP in methods and store is not None):
        cache = sharer_caches(pair, prompts, store, alone="sharer" in methods)
    known = None if cache is None else [(cache, [len(p.sharers[0]) for p in prompts])]
    clean = None
    if set(methods) - {"sharer", SINGLE, *WRITTEN}:
        clean = prefill_prompts(pair.receiver, [p.receiver for p in prompts])
    for method in methods:
        state: Prefilled
        lm = pair.receiver
        sure: Sequence[float | None] = [None] * len(batch)
        skipped: Sequence[bool | None] = [None] * len(batch)
        texts: Sequence[str | None] = [None] * len(batch)
        if method == "receiver-generate":
            chats = [Ask.of(q, prompt=PROMPTS[prompt]).chat() for q in questions]
            made = write(lm, [_rendered(pair, lm, chat) for chat in chats], MAX_NEW_TOKENS)
            for question, answer in zip(questions, made, strict=True):
                letter = extract_letter(answer.text, len(question.options))
                choice = -1 if letter is None else question.letters.index(letter)
                right = choice == question.answer
                yield Answer(task, prompt, question.id, method, choice, right, [], text=answer.text)
            continue
        if method == "text":
            state, texts = _behind_messages(pair, prompt, questions)
        elif method == SINGLE:
            assert single is not None
            lm, state = single, prefill_prompts(single, [p.receiver for p in prompts])
        elif method == "sharer":
            assert cache is not None
            lm = pair.sharers[0]
            state = prefilled(lm, [p.sharers[0] for p in prompts], cache)
        else:
            assert clean is not None
            if method == "receiver":
                state, sure = clean, [round(p, 6) for p in confidence(lm, clean)]
            elif method == SKIP:  # without a store the sharer reads here as it does when answering: what isn't skipped
                state = fused = pair.fuse(prompts, clean=clean, skip=skip, sharers=known if store is not None else None)
                skipped = fused.skipped
            elif method == "c2c":
                state = pair.fuse(prompts, clean=clean, sharers=known)
            else:
                assert cache is not None
                state = fuse_others(pair, prompts, clean, cache)
        letters = [[lm.continuation_ids(f" {letter}") for letter in q.letters] for q in questions]
        found = score(lm, state, letters)
        for question, scores, own, without, text in zip(questions, found, sure, skipped, texts, strict=True):
            logprobs = [round(s.logprob, 5) for s in scores]
            choice = max(range(len(logprobs)), key=logprobs.__getitem__)
            right = choice == question.answer
            yield Answer(task, prompt, question.id, method, choice, right, logprobs, own, without, text)


def _behind_messages(pair: C2C, prompt: str, questions: Sequence[Question]) -> tuple[Prefilled, list[str]]:
    """The receiver's prompts of text-to-text, up to the letter, and the messages of the sharer that stand in them."""
    sharer, receiver = pair.sharers[0], pair.receiver
    asks = [Ask.of(q, prompt=PROMPTS[prompt]) for q in questions]
    turns = [("user", BACKGROUND.format(question=ask.stem)) for ask in asks]
    rows = [_rendered(pair, sharer, ask.chat(turn)) for ask, turn in zip(asks, turns, strict=True)]
    messages = [w.text for w in write(sharer, rows, MAX_MESSAGE_TOKENS)]
    chats = [
        ask.chat(turn, ("assistant", message), ("user", ask.prompt))
        for ask, turn, message in zip(asks, turns, messages, strict=True)
    ]
    return prefill_prompts(receiver, [_rendered(pair, receiver, chat, ANSWER_PREFIX) for chat in chats]), messages


def _rendered(pair: C2C, lm: LM, chat: list[dict[str, str]], prefix: str = "") -> list[int]:
    kwargs = pair.chat_template_kwargs
    return list(render(lm.need_tokenizer(), chat, prefix=prefix, chat_template_kwargs=kwargs).ids)


def fuse_others(pair: C2C, prompts: Sequence[PromptIds], clean: Prefilled, cache: KV) -> FusedCache:
    """Each prompt fused with the sharer's cache of the next prompt of the batch (of the first, for the last one)."""
    if len(prompts) < 2:
        raise C2CError("the control needs another question; give at least two")
    turned = [(row + 1) % len(prompts) for row in range(len(prompts))]
    swapped = [with_others_cache(p, prompts[i]) for p, i in zip(prompts, turned, strict=True)]
    others = KV(cache.keys[:, turned], cache.values[:, turned]), [len(p.sharers[0]) for p in swapped]
    return pair.fuse(swapped, clean=clean, sharers=[others])


def with_others_cache(prompt: PromptIds, other: PromptIds) -> PromptIds:
    """The prompt with the sharer tokens of another one. Both ends of the prompts are template, so the map is kept
    counted from the end, and what would lie before the other's start reads its first token."""
    maps, sharers = [], []
    for index, mine, theirs in zip(prompt.maps, prompt.sharers, other.sharers, strict=True):
        shift = len(theirs) - len(mine)
        maps.append([-1 if i < 0 else max(0, i + shift) for i in index])
        sharers.append(theirs)
    return PromptIds(prompt.receiver, sharers, maps)
