"""Training examples: a chat, perhaps the start of an answer, and the response that is learned."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataSource, TrainConfig
from ..errors import C2CError
from ..tasks import Question, load
from ..tasks.base import read_rows
from ..tasks.prompts import ANSWER_PREFIX, paper_prompt, short_prompt

# Rows of train splits that ask, word for word, what a row of a validation split of these sets or of MMLU-Redux asks.
# They are never trained on. tests/training/test_data.py finds this list again from the data.
HELD_OUT = {
    "arc-easy": ["Mercury_7068793", "NYSEDREGENTS_2016_4_12"],
    "arc-challenge": ["Mercury_7219643"],
    "openbookqa": [
        "923", "10-230", "11-742", "12-140", "12-194", "12-209", "12-244", "12-253", "12-353", "12-474", "12-589",
        "12-605", "12-1001", "13-106", "13-497", "13-631", "13-892", "13-914", "14-377", "14-380", "14-895", "14-1396",
        "14-1449", "14-1485",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """What is learned from one row.

    Attributes:
        id: source and row, the same in every run.
        messages: the chat up to the response.
        prefix: the start of the answer that counts as prompt ("" mostly).
        response: the text whose tokens carry the loss.
        ends: whether the response is followed by the end of the turn.
    """

    id: str
    messages: tuple[Mapping[str, str], ...]
    prefix: str
    response: str
    ends: bool = True


def examples(config: TrainConfig) -> list[Example]:
    """All examples of a recipe, each source drawn with the run's seed, in an order that depends on nothing else.

    Rows of `HELD_OUT` are dropped at the end, so a `limit` can give a few rows less.

    Raises:
        C2CError: a source that is empty, unreadable or holds rows without a response.
    """
    found: list[Example] = []
    for source in config.data:
        rows = _task(source, config) if source.task else _instructions(source, config)
        if source.max_prompt_chars:
            rows = [e for e in rows if sum(len(m["content"]) for m in e.messages) <= source.max_prompt_chars]
        if not rows:
            raise C2CError(f"no rows are left of {source.task or source.rows or source.jsonl}; check split and limits")
        if source.limit and source.limit < len(rows):
            rows = random.Random(f"{config.seed}:{source.task or source.rows or source.jsonl}").sample(
                rows, source.limit
            )
        found += rows
    if len({e.id for e in found}) != len(found):
        raise C2CError("two sources of the recipe give the same rows; name each source once")
    random.Random(config.seed).shuffle(found)
    dropped = {f"{task}:{row}" for task, rows in HELD_OUT.items() for row in rows}
    return [e for e in found if e.id not in dropped]


def question_example(task: str, question: Question) -> Example:
    """A question in one of four forms, chosen by its id: the paper's prompt or the short one; answering in full, or the
    letter alone behind "The correct answer is"."""
    form = hashlib.sha256(f"{task}:{question.id}".encode()).digest()[0]
    prompt = paper_prompt(question) if form & 1 else short_prompt(question)
    messages = ({"role": "user", "content": prompt},)
    if form & 2:
        return Example(f"{task}:{question.id}", messages, ANSWER_PREFIX, f" {question.letter}", ends=False)
    return Example(f"{task}:{question.id}", messages, "", f"{ANSWER_PREFIX} {question.letter}")


def _task(source: DataSource, config: TrainConfig) -> list[Example]:
    assert source.task is not None
    return [question_example(source.task, q) for q in load(source.task, source.split, config.data_dir)]


def _instructions(source: DataSource, config: TrainConfig) -> list[Example]:
    name = str(source.rows or source.jsonl)
    if source.rows:
        owner, repo, *rest = source.rows.split("/")
        rows = read_rows(f"{owner}/{repo}", rest[0] if rest else "default", source.split, config.data_dir)
    else:
        assert source.jsonl is not None
        rows = _read_jsonl(source.jsonl)
    made = []
    for index, row in enumerate(rows):
        messages, response = read_chat(row, f"{name}, row {index}")
        if source.max_response_chars and len(response) > source.max_response_chars:
            response, ends = response[: source.max_response_chars].rsplit(maxsplit=1)[0], False
        else:
            ends = True
        made.append(Example(f"{name}:{index}", messages, "", response, ends))
    return made


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise C2CError(f"{path} cannot be read as JSON lines ({error}); give one JSON object per line") from error


_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_chat(row: Mapping[str, Any], where: str) -> tuple[tuple[Mapping[str, str], ...], str]:
    """Chat and response of a row in one of the usual layouts.

    `messages` (role, content), `conversations` (from, value), instruction with context or input and response or
    output, prompt with completion or response. The last assistant turn is the response.
    """
    if not isinstance(row, Mapping):
        raise C2CError(f"{where} is {type(row).__name__}; expected an object with fields")
    if turns := row.get("messages") or row.get("conversations"):
        chat = []
        for turn in turns:
            if not isinstance(turn, Mapping):
                raise C2CError(f"{where}: a turn is {type(turn).__name__}; expected an object with role and content")
            role = _ROLES.get(str(turn.get("role", turn.get("from"))))
            content = turn.get("content", turn.get("value"))
            if role is None or not isinstance(content, str):
                raise C2CError(
                    f"{where}: a turn with fields {', '.join(turn)} has no known role and text; expected role and "
                    "content, or from and value"
                )
            chat.append({"role": role, "content": content})
        while chat and chat[-1]["role"] != "assistant":
            chat.pop()
        if len(chat) < 2 or not chat[-1]["content"].strip():
            raise C2CError(f"{where} has no assistant turn behind a user turn; leave the row out")
        return tuple(chat[:-1]), chat[-1]["content"].strip()
    prompt = _first(row, ("instruction", "prompt"))
    response = _first(row, ("response", "output", "completion"))
    if not prompt or not response:
        raise C2CError(
            f"{where} has fields {', '.join(row)}; expected messages, conversations, instruction and response, or "
            "prompt and completion, all filled"
        )
    context = _first(row, ("context", "input"))
    return ({"role": "user", "content": f"{prompt}\n\n{context}" if context else prompt},), response


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((row[n].strip() for n in names if isinstance(row.get(n), str) and row[n].strip()), "")
