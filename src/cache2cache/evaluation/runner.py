"""The runner: questions in batches of like length, a row of samples.jsonl per answer, resumable at any point.

What is done in which order follows from the questions and the configuration alone. So a run that was killed goes on
where it was, several processes share the batches among themselves, and the file is the same in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, TypeVar

from .. import heap
from ..errors import C2CError
from ..files import replace_text
from ..methods.base import Ask
from ..methods.text_to_text import FORMS
from ..models.load import LM
from ..pair import C2C
from ..tasks import OpenQuestion, Question
from ..tasks.prompts import few_shot_prompt
from ..training.store import Store, check_room
from .answers import GENERATION, LIKELIHOOD, WAYS, Answer, Key, drawn, read_answers
from .asking import (
    FEW_SHOT,
    METHODS,
    PROMPTS,
    READ_SHARER,
    Batch,
    Case,
    Messages,
    Setup,
    asked_of,
    check_names,
    check_setup,
    cut,
    limit_of,
    messages_of,
)
from .controls import next_rows
from .writing import add_rows, line_of

AnyQuestion = Question | OpenQuestion


@dataclass(frozen=True)
class Unit:
    """A batch, and what is asked of it, in order. Of text-to-text it is several, whose messages are written together.

    Attributes:
        asked: (way, method).
        size: questions that are answered at once.
    """

    cases: Sequence[Case]
    partners: Sequence[Case]
    asked: Sequence[tuple[str, str]]
    prompt: str
    size: int

    @property
    def keys(self) -> list[Key]:
        """The rows that it gives, in order."""
        return [(c.task, self.prompt, c.id, method, way) for way, method in self.asked for c in self.cases]

    def batches(self, receiver: LM, messages: Messages) -> list[Unit]:
        """What is answered at once. Prompts with examples or messages in them are long, the latter of very unlike
        lengths: those of one method that are of like length go together, at most POSITIONS tokens of them."""
        made = []
        for method in dict.fromkeys(m for _, m in self.asked):
            if method not in (FEW_SHOT, *FORMS):
                return [self]
            asked = [(way, m) for way, m in self.asked if m == method]
            made += [replace(self, cases=part, asked=asked) for part in self._parts(method, receiver, messages)]
        return made

    def _parts(self, method: str, receiver: LM, messages: Messages) -> list[list[Case]]:
        def read(case: Case) -> str:
            if method == FEW_SHOT:
                return case.few_shot or ""
            return messages.get((case.task, method, case.id), ("", 0))[0] + case.ask.prompt

        tokenizer = receiver.need_tokenizer()
        lengths = {c.id: len(tokenizer(read(c), add_special_tokens=False)["input_ids"]) for c in self.cases}
        parts: list[list[Case]] = []
        for case in sorted(self.cases, key=lambda c: (lengths[c.id], c.id)):  # the longest of a part is its last
            if not parts or len(parts[-1]) == self.size or (len(parts[-1]) + 1) * lengths[case.id] > POSITIONS:
                parts.append([])
            parts[-1].append(case)
        return parts


POSITIONS = 16_384  # of prompts that are answered at once: a cache of SmolLM2 takes 46 kB for each in float32
# A batch of messages decodes until its longest ends, and its last rows take nearly as long as all of them: so messages
# are written in batches that many times larger, of at most so many positions.
MORE_MESSAGES, MESSAGE_POSITIONS = 4, 8192
HELD = 1_000_000_000  # bytes of buffers that are kept from one batch to the next
Item = TypeVar("Item")


def batches_of(items: Sequence[Item], size: int, least: int = 2) -> list[Sequence[Item]]:
    """Batches of nearly equal size, by default none with a single item, which has no other: three at once for a size
    of 2."""
    count = max(1, min(math.ceil(len(items) / size), len(items) // least))
    bounds = [round(i * len(items) / count) for i in range(count + 1)]
    return [items[a:b] for a, b in pairwise(bounds)]


def plan(
    setup: Setup,
    task: str,
    questions: Sequence[AnyQuestion],
    *,
    methods: Sequence[str] = METHODS,
    answers: str = LIKELIHOOD,
    limits: Mapping[str, int] | None = None,
    batch_size: int = 16,
    examples: Sequence[Question] = (),
    shots: int = 5,
    max_prompt_tokens: int | None = None,
    buckets: Mapping[str, str] | None = None,
) -> tuple[list[Unit], list[Answer]]:
    """All that is to be done for a set of questions, in order; and rows for questions that can't even be put.

    Args:
        setup: who answers.
        task: a name for the rows.
        questions: what to ask.
        methods: of `asking.EVERY`; a router asks nobody, its answers follow from others'.
        answers: likelihood, generation or both; questions without options are answered in words whatever it says.
        limits: per method, how many of the questions, drawn with the seed; all where it says nothing.
        batch_size: questions at once.
        examples, shots: questions with answers for few-shot, and how many of them each question gets.
        max_prompt_tokens: questions without options lose their middle to be no longer, for every model.
        buckets: per id, what results are broken down by beside the subject.
    """
    if len({q.id for q in questions}) != len(questions):
        raise C2CError(f"two questions of {task} have the same id; give each row its own")
    options = {isinstance(q, Question) for q in questions}
    if len(options) > 1:
        raise C2CError(f"{task} mixes questions with options and without; make two sets of them")
    ways = list(WAYS) if answers == "both" else [answers]
    ways = ways if options == {True} else [GENERATION]
    check_names(setup.prompt, methods, answers)
    check_setup(setup, methods)
    options_there = options == {True}
    # Examples are questions with options, so few-shot is for such questions alone.
    asked = [(w, m) for w, m in asked_of(methods, ways, setup.pair) if m != FEW_SHOT or options_there]
    if FEW_SHOT in methods and not examples and (options_there or not asked):
        raise C2CError(f"few-shot needs examples for {task}, questions with options; name their task and split")
    words = any(way == GENERATION for way, _ in asked)
    groups: dict[tuple[int, str], list[tuple[str, str]]] = {}
    for way, method in asked:
        limit = limit_of(limits or {}, way, method, methods)
        count = len(questions) if limit is None else min(limit, len(questions))
        kind = method if method == FEW_SHOT else "text" if method in FORMS else ""
        groups.setdefault((count, kind), []).append((way, method))
    cases: dict[str, Case | C2CError] = {}
    shown: dict[str, Case | C2CError] = {}  # for few-shot
    for question in questions:
        bucket = (buckets or {}).get(question.id)
        try:
            cases[question.id] = shown[question.id] = made = _case(
                setup, task, question, words, bucket, max_prompt_tokens
            )
        except C2CError as error:
            cases[question.id] = shown[question.id] = error
            continue
        if isinstance(question, Question) and examples:
            try:
                shown[question.id] = replace(made, few_shot=few_shot_prompt(question, examples, shots))
            except C2CError as error:  # the other methods need none
                shown[question.id] = error
    units: list[Unit] = []
    failed: list[Answer] = []
    for (count, kind), group in groups.items():
        few_shot = kind == FEW_SHOT
        size = batch_size * MORE_MESSAGES if kind == "text" and batch_size > 1 else batch_size
        chosen: list[Case] = []
        for question in drawn(questions, count, setup.seed):
            case = (shown if few_shot else cases)[question.id]
            if isinstance(case, Case):
                chosen.append(case)
                continue
            bucket = (buckets or {}).get(question.id)
            failed += [_failure(task, setup.prompt, question, bucket, m, way, case) for way, m in group]
        paired = any(method == "other" for _, method in group)
        if paired and count == 1 < len(questions):
            raise C2CError(
                "the control other is to be asked one question, and needs another one's cache; raise its limit"
            )
        if paired and len(chosen) == 1 and len(questions) > 1:
            # The others of its set can't be put, so it has no other; what else it is asked is asked without.
            only, lonely = chosen[0], C2CError("no other question of the set could be put")
            failed += [
                _failure(task, setup.prompt, only.question, only.bucket, m, way, lonely)
                for way, m in group
                if m == "other"
            ]
            group, paired = [(way, m) for way, m in group if m != "other"], False
        # Questions of one subject begin with the same examples, which a batch of them reads once.
        about = partial(_subject, few_shot)
        for _, alike in groupby(sorted(chosen, key=about), key=about):
            alike_cases = sorted(alike, key=_like)
            for batch in batches_of(alike_cases, size, 2 if paired else 1):
                partners = _partners(batch, alike_cases) if paired else []
                units.append(Unit(batch, partners, group, setup.prompt, batch_size))
    return units, failed


def _partners(batch: Sequence[Case], alike: Sequence[Case]) -> list[Case]:
    """Per case whose caches the control other is given: the next in its batch that is about another text, or behind it
    where its batch has none; where there is none at all, the next."""
    place = {case.id: n for n, case in enumerate(alike)}
    found = []
    for row, following in enumerate(next_rows(len(batch))):
        mine, begin = batch[row], place[batch[row].id]
        behind = (alike[n % len(alike)] for n in range(begin + 1, begin + len(alike)))
        others = chain(batch[following:], batch[:following], behind)
        found.append(next((c for c in others if _text(c) != _text(mine)), batch[following]))
    return found


def _text(case: Case) -> str:
    """What tells the text that a question is about from others'."""
    return (isinstance(case.question, OpenQuestion) and case.question.document) or case.id


def _subject(few_shot: bool, case: Case) -> str:
    return case.question.subject if few_shot else ""


def _like(case: Case) -> tuple[int, int, str]:
    """Questions in a batch are alike in the length of their answers, then of their prompts."""
    longest = case.question.max_new_tokens if isinstance(case.question, OpenQuestion) else 0
    return longest, len(case.whole.sharers[0]), case.id


def _case(setup: Setup, task: str, question: AnyQuestion, words: bool, bucket: str | None, limit: int | None) -> Case:
    pair = setup.pair
    if isinstance(question, OpenQuestion):
        ask = Ask.of(question.prompt if limit is None else cut([pair.receiver, *pair.sharers], question.prompt, limit))
        encoded = pair.encode(ask.chat())
        return Case(task, question, ask, encoded, encoded, bucket)
    ask = Ask.of(question, prompt=PROMPTS[setup.prompt])
    whole = pair.encode(ask.chat(), prefix=setup.prefix)
    return Case(task, question, ask, whole, pair.encode(ask.chat()) if words else None, bucket)


def _failure(
    task: str, prompt: str, question: AnyQuestion, bucket: str | None, method: str, way: str, error: Exception
) -> Answer:
    score, metric = (0.0, question.metric) if isinstance(question, OpenQuestion) else (None, None)
    words = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    return Answer(
        task, prompt, question.id, method, -1, False, [], answers=way, subject=question.subject or None, bucket=bucket,
        score=score, metric=metric, error=words,
    )  # fmt: skip


def work(
    setup: Setup,
    units: Sequence[Unit],
    have: Mapping[Key, Answer],
    into: Path,
    progress: Callable[[int], None] = lambda questions: None,
) -> list[Answer]:
    """Do the units, but for rows that there are, and add each method's rows to a file as soon as they are there."""
    messages = {
        (a.task, a.method, a.id): (a.message, a.message_tokens or 0)
        for a in have.values()
        if a.method in FORMS and a.message is not None
    }
    made = []
    heap.bound(HELD)
    for unit in units:
        if not any(_missing(unit, way, method, have) for way, method in unit.asked):
            progress(len(unit.cases))
            continue
        if len(unit.cases) > unit.size:
            messages |= _messages(setup, unit, have, messages)
        last = unit.asked[-1][1]
        for batch in unit.batches(setup.pair.receiver, messages):
            heap.tidy()
            todo = [(w, m) for w, m in batch.asked if _missing(batch, w, m, have)]
            for rows in _answered(setup, batch, todo, messages) if todo else ():
                new = [a for a in rows if a.key not in have]
                add_rows(into, new)
                made += new
            if last in (m for _, m in batch.asked):  # each question once
                progress(len(batch.cases))
    return made


def _missing(unit: Unit, way: str, method: str, have: Mapping[Key, Answer]) -> bool:
    return any((c.task, unit.prompt, c.id, method, way) not in have for c in unit.cases)


def _messages(
    setup: Setup, unit: Unit, have: Mapping[Key, Answer], messages: Messages
) -> dict[tuple[str, str, str], tuple[str, int]]:
    """The sharer's messages about all questions of a unit, as far as its rows need any that aren't known.

    Where one is missing all are written, so that an interrupted run writes what it would have written.
    """
    made: dict[tuple[str, str, str], tuple[str, int]] = {}
    longest = max(len(c.whole.sharers[0]) for c in unit.cases)
    parts = batches_of(unit.cases, max(unit.size, MESSAGE_POSITIONS // longest), least=1)
    for form in dict.fromkeys(m for w, m in unit.asked if m in FORMS and _missing(unit, w, m, have)):
        if all((c.task, form, c.id) in messages for c in unit.cases):
            continue
        for part in parts:
            try:
                found = messages_of(setup, form, part)
            except OSError:
                raise
            except Exception:  # then each batch tries for itself, and at last each question
                continue
            made |= {(c.task, form, c.id): message for c, message in zip(part, found, strict=True)}
    return made


def _answered(
    setup: Setup,
    unit: Unit,
    todo: Sequence[tuple[str, str]],
    messages: Messages,
) -> Iterator[list[Answer]]:
    both = len({m for _, m in unit.asked}) < len(unit.asked)
    batch = Batch(setup, unit.cases, unit.partners, [m for _, m in todo], messages, both)
    for way, method in todo:
        try:
            yield batch.answers(method, way)
        except OSError:  # a full disk is nobody's wrong answer
            raise
        except Exception:
            yield [_alone(setup, unit, row, method, way, messages) for row in range(len(unit.cases))]


def _alone(
    setup: Setup,
    unit: Unit,
    row: int,
    method: str,
    way: str,
    messages: Messages,
) -> Answer:
    """One question of a batch that failed: perhaps it is not the one that made it fail."""
    case, partners = unit.cases[row], unit.partners[row : row + 1]
    try:
        return Batch(setup, [case], partners, [method], messages).answers(method, way)[0]
    except OSError:
        raise
    except Exception as error:
        return _failure(case.task, setup.prompt, case.question, case.bucket, method, way, error)


def unchanged(answers: Sequence[Answer], units: Sequence[Unit]) -> dict[Key, Answer]:
    """The rows by their keys, without those to questions that have another text, options or answer now, or that were
    given the cache of one that has."""
    cases = {
        (c.task, unit.prompt, c.id, method, way): c for unit in units for way, method in unit.asked for c in unit.cases
    }

    def is_same(answer: Answer) -> bool:
        case, partner = cases.get(answer.key), None
        if answer.partner is not None:
            partner = cases.get(replace(answer, id=answer.partner).key)
            if partner is None:  # no longer among the questions
                return True
        # Rows of earlier versions don't say what they were asked.
        return answer.asked is None or case is None or answer.asked == case.asked_with(partner)

    return {a.key: a for a in answers if is_same(a)}


def check_stores(setup: Setup, units: Sequence[Unit], have: Mapping[Key, Answer], max_bytes: int) -> None:
    """Refuse to start where the stores would grow by more than `max_bytes`."""
    fills = []
    for j, store in enumerate(setup.stores):
        prompts = [
            c.whole.sharers[j]
            for unit in units
            if any(k not in have and k[3].split("-")[0] in READ_SHARER for k in unit.keys)
            for c in unit.cases
        ]
        if store is not None and prompts:
            fills.append((store, prompts))
    check_room(fills, max_bytes)


# ---- the file of rows ------------------------------------------------------------------------------------------------


def gather(samples: Path, order: Sequence[Key] = ()) -> list[Answer]:
    """All rows of a run: those that processes wrote to files of their own go into its one file, and those that stand
    there take the order of one uninterrupted run, others in front. Rows of failures are dropped unless in `order`."""
    parts = sorted(samples.parent.glob(f"{samples.stem}-[0-9]*{samples.suffix}"))
    rows = {a.key: a for path in [samples, *parts] for a in read_answers(path)}
    place = {key: n for n, key in enumerate(order)}
    kept = sorted(rows.values(), key=lambda a: place.get(a.key, -1))
    if not order:
        kept = [a for a in kept if a.error is None]
    text = "".join(map(line_of, kept))
    if parts or (samples.exists() and samples.read_text(encoding="utf-8") != text):
        replace_text(samples, text)
    for path in parts:
        path.unlink()
    return kept


def evaluate(
    pair: C2C,
    task: str,
    questions: Sequence[AnyQuestion],
    samples: Path,
    *,
    prompt: str = "paper",
    methods: Sequence[str] = METHODS,
    answers: str = LIKELIHOOD,
    skip: float | None = None,
    single: LM | None = None,
    identical: C2C | None = None,
    store: Store | None = None,
    max_bytes: int = 20 * 10**9,
    max_new_tokens: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] = lambda questions: None,
    **options: Any,
) -> list[Answer]:
    """Answer questions with every method, in this process; what stands in the file already is not asked again.

    Args:
        pair, prompt, skip, single, identical, max_new_tokens, seed: see `asking.Setup`.
        task, questions, methods, answers: as for `plan`, and further `options`.
        samples: JSONL file that a row per answer is added to; it is made, with its folder, where it is not there.
        store: of the first sharer, see `asking.Setup.stores`.
        max_bytes: refuse to start where its prefills would take more than that.
        progress: called with the number of questions of each batch done.
    """
    stores = [] if store is None else [store, *[None] * (len(pair.sharers) - 1)]
    setup = Setup(pair, prompt, skip, single, identical, stores, max_new_tokens, seed)
    units, failed = plan(setup, task, questions, methods=methods, answers=answers, **options)
    have = unchanged(gather(samples), units)
    check_stores(setup, units, have, max_bytes)
    samples.parent.mkdir(parents=True, exist_ok=True)
    add_rows(samples, failed)
    order = [key for unit in units for key in unit.keys]
    work(setup, units, have, samples, progress)
    wanted = {*order, *(a.key for a in failed)}
    return [a for a in gather(samples, [*(a.key for a in failed), *order]) if a.key in wanted]
