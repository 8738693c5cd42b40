"""Questions of one's own: a JSONL file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, PositiveInt, StrictInt, ValidationError

from cache2cache.errors import C2CError
from cache2cache.tasks.base import LETTERS, OpenQuestion, Question
from cache2cache.tasks.metrics import METRICS

_INDEX = {letter: index for index, letter in enumerate(LETTERS)}
_AnyRow = TypeVar("_AnyRow", bound=BaseModel)


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSONL file: {"question", "options", "answer"} and perhaps {"id", "subject"} in each row.

    The answer is a letter or an index from 0.
    """
    return [_own_row(*numbered) for numbered in _lines(path)]


def read_open_questions(path: Path) -> list[OpenQuestion]:
    """The questions of a JSONL file with reference answers: {"question", "references"} in each row.

    Perhaps also "metric" (of `metrics.METRICS`; `exact` otherwise), "max_new_tokens" (64), "id" and "subject".
    """
    return [_own_open_row(*numbered) for numbered in _lines(path)]


def has_references(path: Path) -> bool:
    """Whether the first row of a JSONL file has reference answers instead of options."""
    try:
        row = json.loads(_lines(path)[0][0])
    except (ValueError, IndexError):
        return False  # reading the questions says what is wrong
    return isinstance(row, dict) and "references" in row


def _lines(path: Path) -> list[tuple[str, str, str]]:
    """The rows that aren't blank: text, place in words, and line number."""
    if not path.is_file():
        raise C2CError(f"no file {path}; expected JSON lines with question, options and answer; check the path")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            return [(line, f"{path}, line {n}", str(n)) for n, line in enumerate(lines, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise C2CError(f"{path} is no text in UTF-8 ({error}); save it as such") from error


class _Row(BaseModel):
    id: str | int | None = None
    question: str
    options: tuple[str, ...]
    answer: StrictInt | str
    subject: str = ""


class _OpenRow(BaseModel):
    id: str | int | None = None
    question: str
    references: tuple[str, ...]
    metric: str = "exact"
    max_new_tokens: PositiveInt = 64
    subject: str = ""


def _own_row(line: str, where: str, default_id: str) -> Question:
    row = _valid(_Row, line, where, '{"question": …, "options": [… , …], "answer": "A" or 0}')
    answer = row.answer if isinstance(row.answer, int) else _INDEX.get(row.answer.strip().upper(), -1)
    try:
        if answer < 0:
            raise C2CError(f"the answer is {row.answer!r}; expected a letter or an index from 0")
        return Question(default_id if row.id is None else str(row.id), row.question, row.options, answer, row.subject)
    except C2CError as error:
        raise C2CError(f"{where}: {error}; mend the row") from error


def _own_open_row(line: str, where: str, default_id: str) -> OpenQuestion:
    row = _valid(_OpenRow, line, where, '{"question": …, "references": […]}')
    if row.metric not in METRICS:
        raise C2CError(f"{where}: unknown metric {row.metric!r}; expected one of {', '.join(METRICS)}; mend the row")
    try:
        if not any(reference.strip() for reference in row.references):
            raise C2CError("there is no reference answer; expected at least one that isn't blank")
        return OpenQuestion(
            default_id if row.id is None else str(row.id),
            row.question,
            row.references,
            row.metric,
            row.max_new_tokens,
            row.subject,
        )
    except C2CError as error:
        raise C2CError(f"{where}: {error}; mend the row") from error


def _valid(kind: type[_AnyRow], line: str, where: str, expected: str) -> _AnyRow:
    try:
        return kind.model_validate_json(line)
    except ValidationError as error:
        first = error.errors()[0]
        raise C2CError(
            f"{where} is no question ({'.'.join(map(str, first['loc'])) or 'row'}: {first['msg']}); "
            f"expected {expected}; mend the row"
        ) from error
