"""Questions of one's own: a JSONL file."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, StrictInt, ValidationError

from cache2cache.errors import C2CError
from cache2cache.tasks.base import LETTERS, Question

_INDEX = {letter: index for index, letter in enumerate(LETTERS)}


def read_questions(path: Path) -> list[Question]:
    """The questions of a JSONL file: {"question", "options", "answer"} and perhaps {"id", "subject"} in each row.

    The answer is a letter or an index from 0.
    """
    if not path.is_file():
        raise C2CError(f"no file {path}; expected JSON lines with question, options and answer; check the path")
    with path.open(encoding="utf-8") as lines:
        return [
            _own_row(line, f"{path}, line {number}", str(number))
            for number, line in enumerate(lines, 1)
            if line.strip()
        ]


class _Row(BaseModel):
    id: str | int | None = None
    question: str
    options: tuple[str, ...]
    answer: StrictInt | str
    subject: str = ""


def _own_row(line: str, where: str, default_id: str) -> Question:
    try:
        row = _Row.model_validate_json(line)
        answer = row.answer if isinstance(row.answer, int) else _INDEX.get(row.answer, -1)
        return Question(str(row.id or default_id), row.question, row.options, answer, row.subject)
    except ValidationError as error:
        first = error.errors()[0]
        raise C2CError(
            f"{where} is no question ({'.'.join(map(str, first['loc'])) or 'row'}: {first['msg']}); "
            'expected {"question": …, "options": [… , …], "answer": "A" or 0}; mend the row'
        ) from error
    except C2CError as error:
        raise C2CError(f"{where}: {error}; mend the row") from error
