"""Questions, one file a data set: with options (`load`), or with reference answers (`load_open`); `score` for both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from cache2cache.errors import C2CError
from cache2cache.tasks import arc, commonsenseqa, gsm8k, mmlu, mmlu_redux, openbookqa
from cache2cache.tasks.base import OpenQuestion, Question
from cache2cache.tasks.metrics import score

__all__ = ["OPEN_TASKS", "TASKS", "OpenQuestion", "Question", "is_open", "load", "load_open", "score"]

TASKS: dict[str, Callable[[str, Path | None], list[Question]]] = {
    "arc-easy": arc.easy,
    "arc-challenge": arc.challenge,
    "commonsenseqa": commonsenseqa.load,
    "mmlu": mmlu.load,
    "mmlu-redux": mmlu_redux.load,
    "openbookqa": openbookqa.load,
}


# Answered in words, and scored against references.
OPEN_TASKS: dict[str, Callable[[str, Path | None], list[OpenQuestion]]] = {
    "gsm8k": gsm8k.load,
}


def load(name: str, split: str = "validation", data_dir: str | Path | None = None) -> list[Question]:
    """The questions with options of one split, in the order of the data set.

    `name` is a task of `TASKS`, or the path of a JSONL file of one's own (whose rows are then all read, whatever the
    split). `data_dir` is a local mirror of the hub, see `base.read_rows`. Raises C2CError for an unknown task, split
    or malformed row.
    """
    if name in TASKS:
        return TASKS[name](split, None if data_dir is None else Path(data_dir))
    if name.endswith(".jsonl"):
        from cache2cache.tasks.own import read_questions  # brings pydantic, which the command line's help does without

        return read_questions(Path(name))
    raise _unknown(name, TASKS, "load_open" if name in OPEN_TASKS else "")


def load_open(name: str, split: str = "test", data_dir: str | Path | None = None) -> list[OpenQuestion]:
    """The questions with reference answers of one split: like `load`, for a task of `OPEN_TASKS` or a JSONL file."""
    if name in OPEN_TASKS:
        return OPEN_TASKS[name](split, None if data_dir is None else Path(data_dir))
    if name.endswith(".jsonl"):
        from cache2cache.tasks.own import read_open_questions

        return read_open_questions(Path(name))
    raise _unknown(name, OPEN_TASKS, "load" if name in TASKS else "")


def is_open(name: str) -> bool:
    """Whether a task has reference answers instead of options; of a JSONL file its first row says so."""
    if name.endswith(".jsonl"):
        from cache2cache.tasks.own import has_references

        return has_references(Path(name))
    return name in OPEN_TASKS


def _unknown(name: str, tasks: Iterable[str], other: str) -> C2CError:
    expected = f"expected one of {', '.join(sorted(tasks))}, or the path of a .jsonl file"
    return C2CError(f"the task {name!r} is for {other}; {expected}" if other else f"unknown task {name!r}; {expected}")
