"""Accuracy by option likelihood: the option whose letter is likeliest behind "The correct answer is" (paper protocol).

Four methods on the same questions: the receiver alone, the sharer alone, C2C, and C2C with the sharer's cache taken
from another question of like length. The last one separates what the sharer knows of the question from the mere
presence of a cache: only the rest of a gain is communication. A fifth, with a threshold, is C2C that skips the sharer
where the receiver is confident (`evaluation.skipping`); a sixth is the receiver fine-tuned alone (`training.single`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from ..decode import confidence, score, threshold
from ..errors import C2CError
from ..kv import KV, Prefilled, pad_left, prefill, prefill_prompts
from ..models.load import LM
from ..pair import C2C, FusedCache, PromptIds
from ..tasks import Question
from ..tasks.prompts import ANSWER_PREFIX, paper_prompt, short_prompt

METHODS = ("receiver", "sharer", "c2c", "other")
SKIP = "skip"  # asked for with a threshold
SINGLE = "single"  # asked for with an adapter
PROMPTS = {"paper": paper_prompt, "short": short_prompt}


@dataclass(frozen=True)
class Answer:
    """One method's answer to one question: the index it chose, and the letters' log-likelihoods.

    Attributes:
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
    progress: Callable[[int], None] = lambda questions: None,
) -> list[Answer]:
    """Answer questions with every method; each question's sharer prefill is computed once for all of them.

    Args:
        pair: with one sharer.
        task: a name for the rows written.
        questions: what to ask.
        samples: JSONL file that a row per answer is added to; what stands there already is not asked again.
        prompt: "paper" or "short".
        methods: of METHODS, SKIP and SINGLE.
        skip: the threshold of the method skip.
        single: the fine-tuned receiver of the method single.
        batch_size: questions at once, of like length.
        progress: called with the number of questions of each batch done.
    """
    check_names(prompt, methods, skip)
    if SINGLE in methods and single is None:
        raise C2CError("the method single needs a fine-tuned receiver; give one as single")
    if len({q.id for q in questions}) != len(questions):
        raise C2CError(f"two questions of {task} have the same id; give each row its own")
    if len(pair.sharers) != 1:
        raise C2CError(f"this evaluation takes a pair with one sharer, {len(pair.sharers)} were given")
    if (token_map := pair.fusers[0].config.token_map) != "span":  # type: ignore[union-attr]
        raise C2CError(
            f"the fuser's token map {token_map!r} doesn't let the sharer read its own tokens, so this evaluation would "
            "not measure the sharer alone; give a fuser with the token map span"
        )
    done = [a for a in read_answers(samples) if a.task == task and a.prompt == prompt]
    have = {(a.id, a.method) for a in done}
    encoded = [
        (q, pair.encode([{"role": "user", "content": PROMPTS[prompt](q)}], prefix=ANSWER_PREFIX)) for q in questions
    ]
    encoded.sort(key=lambda item: (len(item[1].sharers[0]), item[0].id))
    with samples.open("a") as file:
        for batch in _split(encoded, batch_size):
            wanted = [m for m in methods if any((q.id, m) not in have for q, _ in batch)]
            if wanted:
                for answer in _answer(pair, task, prompt, batch, wanted, skip, single):
                    if (answer.id, answer.method) not in have:
                        row = {name: value for name, value in asdict(answer).items() if value is not None}
                        file.write(json.dumps(row) + "\n")
                        done.append(answer)
                file.flush()
                os.fsync(file.fileno())
            progress(len(batch))
    ids = {q.id for q in questions}
    return [a for a in done if a.id in ids and a.method in methods]


def check_names(prompt: str, methods: Sequence[str], skip: float | None = None) -> None:
    """Raise a C2CError for a prompt or method that doesn't exist, and for skipping without a threshold."""
    for name, given, known in (("prompt", [prompt], tuple(PROMPTS)), ("method", methods, (*METHODS, SKIP, SINGLE))):
        if wrong := [g for g in given if g not in known]:
            raise C2CError(f"unknown {name} {wrong[0]!r}; expected one of {', '.join(known)}")
    if SKIP in methods and skip is None:
        raise C2CError("the method skip needs a threshold; give one, from 0 to 1, as skip")
    threshold(skip)


def read_answers(samples: Path) -> list[Answer]:
    """The rows of a samples file; a last line that a kill cut short is dropped from the file."""
    if not samples.exists():
        return []
    lines = samples.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        partial = samples.with_suffix(f".{os.getpid()}")
        partial.write_text("".join(lines[:-1]))
        os.replace(partial, samples)
        lines.pop()
    try:
        return [Answer(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise C2CError(f"{samples} holds other rows than answers ({error}); choose another output") from error


def _split(items: list[tuple[Question, PromptIds]], size: int) -> list[list[tuple[Question, PromptIds]]]:
    """Batches of nearly equal size, none with a single question, which has no other: three at once for a size of 2."""
    count = max(1, min(math.ceil(len(items) / size), len(items) // 2))
    bounds = [round(i * len(items) / count) for i in range(count + 1)]
    return [items[a:b] for a, b in pairwise(bounds)]


def _answer(
    pair: C2C,
    task: str,
    prompt: str,
    batch: list[tuple[Question, PromptIds]],
    methods: Sequence[str],
    skip: float | None,
    single: LM | None,
) -> list[Answer]:
    sharer, receiver = pair.sharers[0], pair.receiver
    prompts = [p for _, p in batch]
    cache = None
    if set(methods) - {"receiver", SKIP, SINGLE}:
        rows = [p.sharers[0] for p in prompts]
        ids, mask = pad_left(rows, sharer.pad_token_id, sharer.device)
        cache = prefill(sharer, ids, mask)
    clean = prefill_prompts(receiver, [p.receiver for p in prompts])
    answers = []
    for method in methods:
        state: Prefilled
        lm = receiver
        sure: Sequence[float | None] = [None] * len(batch)
        skipped: Sequence[bool | None] = [None] * len(batch)
        if method == "receiver":
            state, sure = clean, [round(p, 6) for p in confidence(lm, clean)]
        elif method == SINGLE:
            assert single is not None
            lm, state = single, prefill_prompts(single, [p.receiver for p in prompts])
        elif method == SKIP:  # the sharer reads here as it does when answering: only what isn't skipped
            state = fused = pair.fuse(prompts, clean=clean, skip=skip)
            skipped = fused.skipped
        else:
            assert cache is not None
            if method == "sharer":
                lm, state = sharer, Prefilled(ids, mask, KV(cache.keys[:, :, :, :-1], cache.values[:, :, :, :-1]))
            elif method == "c2c":
                state = pair.fuse(prompts, clean=clean, sharers=[(cache, [len(p.sharers[0]) for p in prompts])])
            else:
                state = fuse_others(pair, prompts, clean, cache)
        letters = [[lm.continuation_ids(f" {letter}") for letter in q.letters] for q, _ in batch]
        found = score(lm, state, letters)
        for (question, _), scores, own, without in zip(batch, found, sure, skipped, strict=True):
            logprobs = [round(s.logprob, 5) for s in scores]
            choice = max(range(len(logprobs)), key=logprobs.__getitem__)
            right = choice == question.answer
            answers.append(Answer(task, prompt, question.id, method, choice, right, logprobs, own, without))
    return answers


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


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95% Wilson interval of a share, as shares."""
    if total == 0:
        raise C2CError("nothing was measured; give at least one question")
    z, p = 1.959964, right / total
    middle = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)
