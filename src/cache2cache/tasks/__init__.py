"""Questions, one file a data set: with options (`load`), or with reference answers (`load_open`); `score` for both."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from cache2cache.errors import C2CError
from cache2cache.tasks import (
    arc,
    ceval,
    commonsenseqa,
    gpqa,
    gsm8k,
    longbench,
    math_500,
    minilongbench,
    mmlu,
    mmlu_pro,
    mmlu_redux,
    openbookqa,
)
from cache2cache.tasks.base import OpenQuestion, Question
from cache2cache.tasks.metrics import score

__all__ = [
    "OPEN_TASKS",
    "TASKS",
    "WITHOUT_VALIDATION",
    "OpenQuestion",
    "Question",
    "is_open",
    "load",
    "load_open",
    "score",
]

TASKS: dict[str, Callable[[str, Path | None], list[Question]]] = {
    "arc-easy": arc.easy,
    "arc-easy-paper": arc.easy_paper,
    "arc-challenge": arc.challenge,
    "arc-challenge-paper": arc.challenge_paper,
    "c-eval": ceval.load,
    "commonsenseqa": commonsenseqa.load,
    "gpqa-diamond": gpqa.diamond,
    "mmlu": mmlu.load,
    "mmlu-pro": mmlu_pro.load,
    "mmlu-redux": mmlu_redux.load,
    "openbookqa": openbookqa.load,
}


# Answered in words, and scored against references.
OPEN_TASKS: dict[str, Callable[[str, Path | None], list[OpenQuestion]]] = {
    "gsm8k": gsm8k.load,
    "longbench": longbench.load,
    "longbench-e": longbench.load_even,
    "math-500": math_500.load,
    "minilongbench": minilongbench.load,
}


# Sets without a split `validation`, and the one that they are measured on.
WITHOUT_VALIDATION = {"gpqa-diamond": "train", "mmlu-redux": "test", **dict.fromkeys(OPEN_TASKS, "test")}


def load(name: str, split: str = "validation", data_dir: str | Path | None = None) -> list[Question]:
    """The questions with options of one split, in the order of the data set.

    `name` is a task of `TASKS`, one subject of it ("mmlu/virology"), or the path of a JSONL file of one's own (whose
    rows are then all read, whatever the split). `data_dir` is a local mirror of the hub, see `base.read_rows`. Raises
    C2CError for an unknown task, subject or split and for a malformed row.
    """
    if name.endswith(".jsonl"):
        from cache2cache.tasks.own import read_questions  # brings pydantic, which the command line's help does without

        return read_questions(Path(name))
    return _load(TASKS, name, split, data_dir)


def load_open(name: str, split: str = "test", data_dir: str | Path | None = None) -> list[OpenQuestion]:
    """The questions with reference answers of one split: as `load`, for a task of `OPEN_TASKS` or a JSONL file."""
    if name.endswith(".jsonl"):
        from cache2cache.tasks.own import read_open_questions

        return read_open_questions(Path(name))
    return _load(OPEN_TASKS, name, split, data_dir)


def is_open(name: str) -> bool:
    """Whether a task has reference answers instead of options; of a JSONL file its first row says so."""
    if name.endswith(".jsonl"):
        from cache2cache.tasks.own import has_references

        return has_references(Path(name))
    return name.split("/")[0] in OPEN_TASKS


_AnyQuestion = TypeVar("_AnyQuestion", Question, OpenQuestion)


def _load(
    tasks: Mapping[str, Callable[[str, Path | None], list[_AnyQuestion]]],
    name: str,
    split: str,
    data_dir: str | Path | None,
) -> list[_AnyQuestion]:
    task, _, subject = name.partition("/")
    if task not in tasks:
        expected = f"expected one of {', '.join(sorted(tasks))}, or the path of a .jsonl file"
        if task in TASKS or task in OPEN_TASKS:
            kinds = ("options", "reference answers")
            has, needed = kinds if task in TASKS else reversed(kinds)
            raise C2CError(f"the questions of {task} have {has}, and {needed} are needed here; {expected}")
        close = difflib.get_close_matches(task, [*TASKS, *OPEN_TASKS], n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}? " if close else ""
        others = "" if tasks is OPEN_TASKS else f"; in words only {', '.join(sorted(OPEN_TASKS))}"
        raise C2CError(f"unknown task {name!r}; {hint}{expected}{others}")
    questions = tasks[task](split, None if data_dir is None else Path(data_dir))
    chosen = [question for question in questions if subject in ("", question.subject)]
    if not chosen:
        there = sorted({question.subject for question in questions} - {""})
        raise C2CError(f"{task} ({split}) has no subject {subject!r}; expected one of {', '.join(there) or 'none'}")
    return chosen
