"""Skipping the sharer where the receiver is confident: the threshold, from an evaluation run with receiver and C2C.

A question is skipped when the receiver's confidence (`decode.confidence`) reaches the threshold, which is the rule of
`C2C.fuse(skip=…)`; so from both methods' answers to the same questions follows what any threshold would have given.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from ..errors import C2CError
from .answers import LIKELIHOOD, Answer, read_asked, read_settings, split_of
from .statistics import wilson


@dataclass(frozen=True)
class Case:
    """One question: how confident the receiver alone is, and whether it and C2C answer right."""

    confidence: float
    receiver: bool
    c2c: bool


@dataclass(frozen=True)
class Outcome:
    """What a threshold gives on some questions, as counts.

    Attributes:
        questions, skipped: all, and those answered without the sharer.
        receiver, c2c, rule: right answers of the receiver alone, of C2C, and of C2C that skips.
        gained, lost: skipped questions that only the receiver answers right, and that only C2C does.
    """

    questions: int
    skipped: int
    receiver: int
    c2c: int
    rule: int
    gained: int
    lost: int


def apply(cases: Sequence[Case], threshold: float | None) -> Outcome:
    """What skipping from `threshold` on gives; None: never."""
    skipped = [c for c in cases if threshold is not None and c.confidence >= threshold]
    gained = sum(c.receiver and not c.c2c for c in skipped)
    lost = sum(c.c2c and not c.receiver for c in skipped)
    receiver, c2c = sum(c.receiver for c in cases), sum(c.c2c for c in cases)
    return Outcome(len(cases), len(skipped), receiver, c2c, c2c + gained - lost, gained, lost)


def calibrate(cases: Sequence[Case], tolerance: float = 0.0) -> float | None:
    """The lowest threshold at which C2C that skips is at most `tolerance` points less accurate than C2C.

    None where no question can be skipped at that price. Of the thresholds that part the questions alike, one midway
    between two confidences, in as few digits as do: a rounding difference then moves no question.
    """
    if not cases:
        raise C2CError("there are no questions to calibrate on; give at least one")
    if not tolerance >= 0:
        raise C2CError(f"the tolerance is {tolerance} points; expected 0 or more")
    groups = [list(group) for _, group in groupby(sorted(cases, key=_falling), key=_falling)]
    balance, found = 0, None
    for group, below in zip(groups, [*(g[0].confidence for g in groups[1:]), 0.0], strict=True):
        balance += sum(c.receiver - c.c2c for c in group)
        if -100 * balance <= tolerance * len(cases) + 1e-9:
            found = _between(below, group[0].confidence)
    return found


def _falling(case: Case) -> float:
    return -case.confidence


def _between(below: float, at: float) -> float:
    """The number with the fewest decimals in the middle half between two confidences, near its middle."""
    margin = (at - below) / 4
    for digits in range(1, 17):
        if below + margin <= (value := round((below + at) / 2, digits)) <= at - margin:
            return value
    return at


def cases_of(answers: Sequence[Answer]) -> list[Case]:
    """Both methods' answers to the same questions, paired.

    Raises:
        C2CError: a question that only one of them has answered; answers without confidences.
    """
    failed = {(a.task, a.prompt, a.id) for a in answers if a.error is not None and a.method in ("receiver", "c2c")}
    if failed:
        warnings.warn(f"{len(failed)} questions are left out, of which an answer failed", stacklevel=2)
    rows = [a for a in answers if a.answers == LIKELIHOOD and (a.task, a.prompt, a.id) not in failed]
    methods = {m: {(a.task, a.prompt, a.id): a for a in rows if a.method == m} for m in ("receiver", "c2c")}
    receiver, c2c = methods["receiver"], methods["c2c"]
    if not receiver or (missing := receiver.keys() ^ c2c.keys()):
        count = len(missing) if receiver else len(c2c)
        raise C2CError(
            f"{len(receiver)} answers of the receiver and {len(c2c)} of C2C, {count} without the other; expected both "
            "to every question: run c2c evaluate with both methods, to the end"
        )
    if any(a.confidence is None for a in receiver.values()):
        raise C2CError("answers of the receiver come without its confidence; run c2c evaluate anew, to a new folder")
    return [Case(a.confidence, a.correct, c2c[key].correct) for key, a in receiver.items() if a.confidence is not None]


# ---- runs -----------------------------------------------------------------------------------------------------------


def calibration(run: Path, check: Path | None = None, *, tolerance: float = 0.0) -> dict[str, Any]:
    """Calibrate on one evaluation's folder, and report what the threshold gives there and in another's.

    Args:
        run: a folder of `c2c evaluate` with the methods receiver and c2c.
        check: another such folder, of other questions.
        tolerance: as for `calibrate`.
    """
    settings, answers = _read(run)
    cases = cases_of(answers)
    threshold = calibrate(cases, tolerance)
    result = {"threshold": threshold, "tolerance": tolerance, "calibrated": summarize(run, apply(cases, threshold))}
    if check is not None:
        others, theirs = _read(check)
        if changed := [k for k in ("receiver", "sharer", "fuser") if _weights(settings, k) != _weights(others, k)]:
            raise C2CError(f"{check} was made with another {', '.join(changed)} than {run}; give runs of one pair")
        if others.get("prompt") != settings.get("prompt"):
            raise C2CError(
                f"{check} has the prompt {others.get('prompt')}, {run} has {settings.get('prompt')}; a threshold holds "
                "for questions that are put alike: give runs with one prompt"
            )
        # By their texts too, as far as rows say these: one set may go by two names.
        asked = [
            {(split_of(about, a.task), a.task, a.id) for a in rows} | {a.asked for a in rows if a.asked}
            for about, rows in ((settings, answers), (others, theirs))
        ]
        if asked[0] & asked[1]:
            known = [a for a in theirs if a.asked in asked[0] or (split_of(others, a.task), a.task, a.id) in asked[0]]
            count = len({(a.task, a.id) for a in known})
            raise C2CError(f"{count} questions of {check} are in {run} too; check on other questions")
        result["checked"] = summarize(check, apply(cases_of(theirs), threshold))
    return result


def _read(folder: Path) -> tuple[dict[str, Any], list[Answer]]:
    """Settings and answers of an evaluation run."""
    return read_settings(folder), read_asked(folder)[0]


def _weights(settings: Mapping[str, Any], part: str) -> Any:
    """What tells the weights of one part of a pair, whatever they were computed in."""
    return settings["fuser_hash"] if part == "fuser" else settings[part]["fingerprint"]


def summarize(folder: Path, outcome: Outcome) -> dict[str, Any]:
    """An outcome in %, with 95% Wilson intervals.

    `chance` is what skipping as many questions at random would give: only what the rule has above it is owed to the
    confidence.
    """
    n, share = outcome.questions, outcome.skipped / outcome.questions

    def accuracy(right: int) -> dict[str, Any]:
        return {"accuracy": _percent(right / n), "interval": [_percent(x) for x in wilson(right, n)]}

    return {
        "run": str(folder),
        "questions": n,
        "skipped": {"share": _percent(share), "interval": [_percent(x) for x in wilson(outcome.skipped, n)]},
        "receiver": accuracy(outcome.receiver),
        "c2c": accuracy(outcome.c2c),
        "skip": accuracy(outcome.rule),
        "chance": _percent((share * outcome.receiver + (1 - share) * outcome.c2c) / n),
        "gained": outcome.gained,
        "lost": outcome.lost,
    }


def _percent(share: float) -> float:
    return round(100 * share, 2)


def table(result: dict[str, Any]) -> Table:
    """A calibration as a table: a column for the questions it was made on, and one for those it was checked on."""
    columns = [(label, result[key]) for key, label in COLUMNS.items() if key in result]
    made = Table(title="C2C that skips the sharer, % [95% interval]")
    made.add_column("")
    for label, column in columns:
        made.add_column(f"{label} ({column['questions']})", justify="right")
    for key, label in ROWS.items():
        made.add_row(label, *(_cell(column[key]) for _, column in columns))
    return made


COLUMNS = {"calibrated": "calibrated on", "checked": "checked on"}
ROWS = {
    "skipped": "questions skipped",
    "gained": "… only the receiver right (number)",
    "lost": "… only C2C right (number)",
    "skip": "C2C that skips",
    "c2c": "C2C",
    "receiver": "receiver alone",
    "chance": "as many skipped at random",
}


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        middle, (low, high) = value.get("accuracy", value.get("share")), value["interval"]
        return f"{middle:.1f}  [{low:.1f}, {high:.1f}]"
    return str(value) if isinstance(value, int) else f"{value:.1f}"
