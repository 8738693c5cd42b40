"""What text loses and a cache keeps: questions about the structure of documents, by text and by cache.

Two settings, never mixed:

both      receiver and sharer read the document and the question: the paper's setting
private   only the sharer reads the document, the receiver the question alone: not the paper's setting, and nothing a
          fuser was trained for unless it was so

The sharer reads the document as a system message and the question behind it, once for both settings. By text it writes
a message, which the receiver reads; by cache its cache at the tokens of the receiver's prompt is fused. An answer is
the likeliest letter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..alignment.tokens import span_map
from ..errors import C2CError
from ..evaluation.chat import check_pair
from ..evaluation.controls import fuse_others, next_rows, rows_of
from ..evaluation.letters import letter_logprobs, likeliest
from ..evaluation.runner import batches_of
from ..evaluation.statistics import accuracy
from ..evaluation.writing import Written, add_rows, read_rows, write_on
from ..fuser import C2CFuser
from ..kv import KV, Prefilled, Read, pad_left, prefill, prefill_prompts, prefilled
from ..methods.text_to_text import BACKGROUND
from ..models.load import LM
from ..pair import C2C, PromptIds
from ..progress import Bar
from ..tasks.base import Question
from ..tasks.prompts import ANSWER_PREFIX, short_prompt
from . import study
from .documents import KINDS, Document, generate

SETTINGS = {
    "both": "both models read the document (the paper's setting)",
    "private": "only the sharer reads the document (private context, not the paper's setting)",
}
# What the sharer is asked to write. `tell` may say everything, the answer too; `published` is the paper's instruction,
# which forbids that.
FORMS = {
    "tell": "In one clear sentence, say what in the document is needed to answer this question: {question}",
    "published": BACKGROUND,
}


def methods(forms: Sequence[str]) -> list[str]:
    """In the order of tables: text by form; `other` is C2C with another question's cache."""
    alone = ["receiver", "sharer"]
    return [*alone, *(f"text:{form}" for form in forms), "c2c", "other"]


@dataclass(frozen=True)
class Row:
    """One method's answer to one question in one setting.

    Attributes:
        bytes: what went from the sharer to the receiver: the message in UTF-8, or the cache entries that the fuser
            reads; None where nothing did.
        message: what the sharer wrote. message_tokens: its length; ended: whether it came to its end by itself.
    """

    setting: str
    kind: str
    id: str
    method: str
    choice: int
    correct: bool
    logprobs: list[float]
    bytes: int | None = None
    message: str | None = None
    message_tokens: int | None = None
    ended: bool | None = None


# ---- prompts --------------------------------------------------------------------------------------------------------

Chat = list[dict[str, str]]


def _chat(document: Document | None, *turns: str) -> Chat:
    """User and assistant in turn, behind the document."""
    system = [{"role": "system", "content": document.text}] if document else []
    return [*system, *({"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns))]


def encode(pair: C2C, document: Document, setting: str) -> PromptIds:
    """The prompt of C2C. In the setting `private` the receiver's only message is the sharer's second."""
    asked = short_prompt(document.question)
    theirs = pair.rendered(pair.sharers[0], _chat(document, asked), ANSWER_PREFIX)
    mine = pair.rendered(pair.receiver, _chat(document if setting == "both" else None, asked), ANSWER_PREFIX)
    if setting == "private":
        segments = [replace(s, key=s.key + 1 if isinstance(s.key, int) else s.key) for s in mine.segments]
        mine = replace(mine, segments=segments)
    matched = span_map(mine, theirs)
    return PromptIds(mine.ids, [theirs.ids], [matched.index.tolist()], [matched.coverage])


# ---- answers --------------------------------------------------------------------------------------------------------


def _reads(rows: Sequence[Sequence[int]], kv: KV) -> list[Read]:
    """What is known of each row of a left-padded cache of all tokens but the last, or of all."""
    padded = max(map(len, rows))
    return [
        Read(list(row), kv.tail(i, len(row) - padded + kv.length)) for i, row in enumerate(rows)
    ]  # fmt: skip


def messages(pair: C2C, batch: Sequence[Document], form: str, max_tokens: int, past: Sequence[Read]) -> list[Written]:
    """What the sharer writes about each document; `past` is what it has read, which begins with the document."""
    sharer = pair.sharers[0]
    asked = [FORMS[form].format(question=d.question.question) for d in batch]
    rows = [pair.rendered(sharer, _chat(d, text)).ids for d, text in zip(batch, asked, strict=True)]
    prompt = prefill_prompts(sharer, rows, past=past)
    return write_on(sharer, prompt, [max_tokens] * len(rows))


def cache_bytes(fuser: C2CFuser, prompt: PromptIds, cache: KV) -> int:
    """Bytes of the sharer's cache that are read for one prompt."""
    used = len({s for s in prompt.maps[0][:-1] if s >= 0})
    return int(used * fuser.sharer_reads * cache.keys[0, 0, :, 0].nbytes)


def answer(
    pair: C2C, batch: Sequence[Document], wanted: Mapping[str, Sequence[str]], max_message_tokens: int
) -> list[Row]:
    """Every wanted method's answers, per setting, to a batch of at least two documents."""
    receiver, sharer, fuser = pair.receiver, pair.sharers[0], pair.fusers[0]
    rows: list[Row] = []
    prompts = {setting: [encode(pair, d, setting) for d in batch] for setting in wanted}
    theirs = [list(p.sharers[0]) for p in next(iter(prompts.values()))]
    cache = prefill(sharer, *pad_left(theirs, sharer.pad_token_id, sharer.device))
    known = [(cache, [len(ids) for ids in theirs])]

    def add(setting: str, method: str, lm: LM, state: Prefilled, more: Sequence[dict[str, Any]] | None = None) -> None:
        questions = [d.question for d in batch]
        for i, (q, logprobs) in enumerate(zip(questions, letter_logprobs(lm, state, questions), strict=True)):
            choice = likeliest(logprobs)
            extra = more[i] if more else {}
            rows.append(Row(setting, q.subject, q.id, method, choice, choice == q.answer, logprobs, **extra))

    forms = {m.removeprefix("text:"): m for chosen in wanted.values() for m in chosen if m.startswith("text:")}
    past = _reads(theirs, cache)
    made = {form: messages(pair, batch, form, max_message_tokens, past) for form in forms}
    for setting, chosen in wanted.items():
        clean = prefill_prompts(receiver, [p.receiver for p in prompts[setting]])
        mine = _reads([list(p.receiver) for p in prompts[setting]], clean.kv)
        passed = [{"bytes": cache_bytes(fuser, p, cache)} for p in prompts[setting]]
        for method in chosen:
            if method == "receiver":
                add(setting, method, receiver, clean)
            elif method == "sharer":
                add(setting, method, sharer, prefilled(sharer, theirs, cache))
            elif method == "c2c":
                add(setting, method, receiver, pair.fuse(prompts[setting], clean=clean, sharers=known), passed)
            elif method == "other":
                turned = next_rows(len(batch))
                others = [prompts[setting][i] for i in turned]
                fused = fuse_others(pair, prompts[setting], others, clean, rows_of(known, turned))
                add(setting, method, receiver, fused, passed)
            else:
                form = method.removeprefix("text:")
                state, more = _behind_messages(pair, batch, setting, form, made[form], mine)
                add(setting, method, receiver, state, more)
    return rows


def _behind_messages(
    pair: C2C, batch: Sequence[Document], setting: str, form: str, made: Sequence[Written], past: Sequence[Read]
) -> tuple[Prefilled, list[dict[str, Any]]]:
    """The receiver's prompts behind the messages; `past` is what it has read, whose beginning may be the same."""
    chats = [
        _chat(
            d if setting == "both" else None,
            FORMS[form].format(question=d.question.question),
            message.text,
            short_prompt(d.question),
        )
        for d, message in zip(batch, made, strict=True)
    ]
    state = prefill_prompts(
        pair.receiver, [pair.rendered(pair.receiver, chat, ANSWER_PREFIX).ids for chat in chats], past=past
    )
    more = [
        {"bytes": len(m.text.encode()), "message": m.text, "message_tokens": len(m.ids), "ended": m.ended} for m in made
    ]
    return state, more


def ask_all(
    pair: C2C,
    documents: Sequence[Document],
    path: Path,
    *,
    settings: Sequence[str] = tuple(SETTINGS),
    forms: Sequence[str] = ("tell",),
    max_message_tokens: int = 64,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda documents: None,
) -> list[Row]:
    """Every method's answer to every question in every setting; rows that stand in the file are not asked again."""
    done = read_rows(path, Row)
    have = {(row.setting, row.id, row.method) for row in done}
    wanted = {setting: methods(forms) for setting in settings}
    ordered = sorted(documents, key=lambda d: (len(d.text), d.question.id))
    for batch in batches_of(ordered, batch_size):
        if any((s, d.question.id, m) not in have for s, names in wanted.items() for m in names for d in batch):
            found = answer(pair, batch, wanted, max_message_tokens)
            new = [row for row in found if (row.setting, row.id, row.method) not in have]
            add_rows(path, new)
            done += new
        progress(len(batch))
    return done


# ---- the study ------------------------------------------------------------------------------------------------------


def names_it(question: Question, message: str) -> bool:
    """Whether a message names the right option, in whole words, and none of the others."""
    named = [re.search(rf"(?<!\w){re.escape(option)}(?!\w)", message) is not None for option in question.options]
    return named == [i == question.answer for i in range(len(named))]


def summarize(rows: Sequence[Row], names: Sequence[str], questions: Mapping[str, Question]) -> dict[str, Any]:
    """One setting, per kind of structure and over all: accuracies, lengths and bytes, and C2C against each other
    method on the same questions. Of messages also the share that names the right option alone (`named`), and the
    receiver's accuracy behind those: is a wrong answer the message's fault or its reader's?"""

    def table(kind: str | None) -> dict[str, Any]:
        mine = {m: {r.id: r for r in rows if r.method == m and kind in (None, r.kind)} for m in names}
        ids = sorted(mine[names[0]])
        right = {m: [mine[m][i].correct for i in ids] for m in names}
        result: dict[str, Any] = {}
        for m in names:
            result[m] = accuracy(right[m])
            some = [mine[m][i] for i in ids]
            if sent := [r.bytes for r in some if r.bytes is not None]:
                result[m]["bytes"] = round(sum(sent) / len(sent), 1)
            if lengths := [r.message_tokens for r in some if r.message_tokens is not None]:
                result[m]["message_tokens"] = round(sum(lengths) / len(lengths), 1)
                result[m]["cut"] = sum(r.ended is False for r in some)
                clear = [r.message is not None and names_it(questions[r.id], r.message) for r in some]
                result[m]["named"] = accuracy(clear)
                if any(clear):
                    result[m]["behind_named"] = accuracy([r.correct for r, it in zip(some, clear, strict=True) if it])
            if m != "c2c":
                result[m]["c2c_against"] = study.against(right["c2c"], right[m])
        return result

    return {"all": table(None), **{kind: table(kind) for kind in KINDS if any(r.kind == kind for r in rows)}}


def run(
    pair: C2C,
    output: Path,
    *,
    count: int = 210,
    settings: Sequence[str] = tuple(SETTINGS),
    forms: Sequence[str] = ("tell",),
    max_message_tokens: int = 64,
    batch_size: int = 8,
    seed: int = 0,
    data: Mapping[str, Any] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """The study; writes its folder's rows and numbers, and returns these.

    Args:
        pair: with one sharer.
        output: folder.
        count, seed: of the generated documents.
        settings: of SETTINGS. forms: of FORMS.
        max_message_tokens: longest message of the sharer.
        batch_size: documents at once.
        data: what the settings say of the pair.
        command: how the study was called, for the record.
    """
    check_pair(pair)
    for name, given, known in (("setting", settings, SETTINGS), ("form of text", forms, FORMS)):
        if wrong := [g for g in given if g not in known] or ([] if given else ["none"]):
            raise C2CError(f"unknown {name} {wrong[0]!r}; expected one of {', '.join(known)}")
    documents = generate(count, seed)
    if count < 2:
        raise C2CError("the control needs another question; ask for at least two")
    recorded = {
        **(data or {}),
        "count": count,
        "batch_size": batch_size,  # the other question of the control is the next one in its batch
        "settings": list(settings),
        "forms": {form: FORMS[form] for form in forms},
        "max_message_tokens": max_message_tokens,
    }
    about = study.begin(output, recorded, "structure", documents, seed, command)
    with Bar() as bar:
        task = bar.add_task("structure", total=count)
        rows = ask_all(
            pair, documents, output / "rows.jsonl", settings=settings, forms=forms,
            max_message_tokens=max_message_tokens, batch_size=batch_size, progress=lambda n: bar.advance(task, n),
        )  # fmt: skip
    tokens = [len(pair.sharers[0].continuation_ids(d.text)) for d in documents]
    questions = {d.question.id: d.question for d in documents}
    results = {
        "document_tokens": round(sum(tokens) / count, 1),
        "meaning": {setting: SETTINGS[setting] for setting in settings},
        **{s: summarize([r for r in rows if r.setting == s], methods(forms), questions) for s in settings},
    }
    return study.finish(output, about, results)
