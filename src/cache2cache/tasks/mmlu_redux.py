"""MMLU-Redux 2.0: 100 questions of each MMLU subject, checked by hand (Gema et al., 2024; edinburgh-dawg)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cache2cache.tasks.base import Question, configs_there, read_rows
from cache2cache.tasks.mmlu import SUBJECTS

REPO = "edinburgh-dawg/mmlu-redux-2.0"


def load(split: str, data_dir: Path | None) -> list[Question]:
    """Every subject is a configuration with the one split `test`. Of a mirror, the subjects that it has.

    Rows are left out as the paper's authors do, so that figures can be compared: see `right_option`.
    """
    return [
        Question(f"{subject}-{number}", row["question"], tuple(row["choices"]), answer, subject)
        for subject in configs_there(REPO, SUBJECTS, split, data_dir)
        for number, row in enumerate(read_rows(REPO, subject, split, data_dir))
        if (answer := right_option(row)) is not None
    ]


def right_option(row: Mapping[str, Any]) -> int | None:
    """The index of a row's right option; None for a row that is left out.

    `no_correct_answer` and `expert` (undecided) have none. `wrong_groundtruth` has it in `correct_answer`, a letter or
    a digit from 0; without one that can be read the row is left out, for its label is known to be wrong. Unclear
    questions, unclear options and those with several right ones keep MMLU's label, which is one that was meant: what
    is asked may be poor, but is asked of all methods alike, and the paper counts them.
    """
    if row["error_type"] in ("no_correct_answer", "expert"):
        return None
    if row["error_type"] != "wrong_groundtruth":
        return int(row["answer"])
    stated = str(row["correct_answer"] or "").strip().upper()
    found = "ABCD".find(stated) if stated.isalpha() else "0123".find(stated)
    return found if len(stated) == 1 and 0 <= found < len(row["choices"]) else None
