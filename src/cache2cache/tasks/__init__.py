"""Multiple-choice questions, one file a data set: `tasks.load("arc-easy", "validation")`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cache2cache.errors import C2CError
from cache2cache.tasks import arc, commonsenseqa, mmlu, mmlu_redux, openbookqa
from cache2cache.tasks.base import Question

__all__ = ["TASKS", "Question", "load"]

TASKS: dict[str, Callable[[str, Path | None], list[Question]]] = {
    "arc-easy": arc.easy,
    "arc-challenge": arc.challenge,
    "commonsenseqa": commonsenseqa.load,
    "mmlu": mmlu.load,
    "mmlu-redux": mmlu_redux.load,
    "openbookqa": openbookqa.load,
}


def load(name: str, split: str = "validation", data_dir: str | Path | None = None) -> list[Question]:
    """The questions of one split, in the order of the data set.

    `name` is a task of `TASKS`, or the path of a JSONL file of one's own (whose rows are then all read, whatever the
    split). `data_dir` is a local mirror of the hub, see `base.read_rows`. Raises C2CError for an unknown task, split
    or malformed row.
    """
    if name in TASKS:
        return TASKS[name](split, None if data_dir is None else Path(data_dir))
    if name.endswith(".jsonl"):
        from cache2cache.tasks.own import read_questions  # brings pydantic, which the command line's help does without

        return read_questions(Path(name))
    raise C2CError(f"unknown task {name!r}; expected one of {', '.join(sorted(TASKS))}, or the path of a .jsonl file")
