"""Several evaluations of the same questions side by side: fusers trained with other seeds, and their baselines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..errors import C2CError
from .answers import GENERATION, LIKELIHOOD, Answer, read_asked, read_settings, split_of
from .asking import METHODS
from .summary import AVERAGE, POOLED, better_way, marks_of, paired, sets_of, summarize_all

EVERY = "all"  # the questions of all sets
_Run = tuple[Path, Mapping[str, Any], Sequence[Answer]]  # folder, settings, C2C's answers that are compared


def compare(runs: Sequence[Path], against: Sequence[Path] = ()) -> dict[str, Any]:
    """C2C's accuracy in each run, per task, averaged over tasks and on all questions, and McNemar's p of any two runs.

    Args:
        runs: output folders of `c2c evaluate`; mean and spread are theirs.
        against: more such folders, of baselines, which are compared with but not part of the mean.

    Returns:
        `runs`: per run its columns, each with accuracy and recovered (see `summary.effects`; None where the run doesn't
        say), and whether it is a baseline; `mean`: per column mean and spread, the standard deviation of the runs;
        `paired`: per two runs see `summary.paired`.

    Raises:
        C2CError: fewer than two runs, or answers to other questions.
    """
    folders = [*runs, *against]
    if len(folders) < 2 or not runs:
        raise C2CError(f"{len(folders)} runs were given; expected two or more, at least one of them not a baseline")
    if len({f.resolve() for f in folders}) != len(folders):
        raise C2CError("a run was given twice; name each once")
    answers, settings = {}, {}
    for folder in folders:
        settings[folder] = read_settings(folder)
        answers[folder] = read_asked(folder)[0]
    first = folders[0]
    c2c = {folder: [a for a in rows if a.method == "c2c"] for folder, rows in answers.items()}
    # By likelihood where every run has that, else in words.
    everywhere = set.intersection(*({(a.task, a.answers) for a in rows} for rows in c2c.values()))
    if not everywhere:
        asked = [f"{folder}: {', '.join(sorted({a.task for a in rows})) or 'none'}" for folder, rows in c2c.items()]
        raise C2CError(f"no set was answered by C2C in all runs ({'; '.join(asked)}); give runs of the same")
    ways = {a.task: LIKELIHOOD if (a.task, LIKELIHOOD) in everywhere else GENERATION for a in c2c[first]}
    of_way = {folder: [a for a in rows if a.answers == ways.get(a.task, a.answers)] for folder, rows in c2c.items()}
    for folder in folders:
        _check_alike((first, settings[first], of_way[first]), (folder, settings[folder], of_way[folder]))
    rows = [
        {
            "run": str(folder),
            "baseline": folder in against,
            "fuser": settings[folder]["fuser"],
            "fuser_hash": settings[folder]["fuser_hash"],
            "columns": _columns(answers[folder], ways),
        }
        for folder in folders
    ]
    mean: dict[str, Any] = {}
    for column in rows[0]["columns"]:
        mean[column] = {}
        for key in ("accuracy", "recovered"):
            values = [row["columns"][column][key] for row in rows if not row["baseline"]]
            known = [v for v in values if v is not None]
            mean[column][key] = round(statistics.mean(known), 2) if len(known) == len(values) else None
            mean[column][f"{key}_spread"] = round(statistics.stdev(known), 2) if len(known) == len(values) > 1 else None
    pairs = [
        {"runs": [str(a), str(b)], "columns": _pairs(of_way[a], of_way[b], list(ways))}
        for a, b in combinations(folders, 2)
    ]
    return {"runs": rows, "mean": mean, "paired": pairs}


def _check_alike(first: _Run, other: _Run) -> None:
    """Refuse runs of other questions, or that put them otherwise."""
    (one, about, mine), (two, theirs, found) = first, other
    changed = ["prompt"] if about.get("prompt") != theirs.get("prompt") else []
    if any(split_of(about, a.task) != split_of(theirs, a.task) for a in mine):
        changed.append("split")
    if changed:
        raise C2CError(f"{two} was made with another {', '.join(changed)} than {one}; give runs of the same")
    asked, there = ({(a.task, a.id): a.asked for a in rows} for rows in (mine, found))
    if not there or asked.keys() != there.keys():
        raise C2CError(
            f"{two} has {len(there)} answers of C2C and {one} {len(asked)}, {len(asked.keys() ^ there.keys())} of them "
            "to other questions; give runs of the same questions that went to their ends"
        )
    # Runs of earlier versions don't know what was asked.
    if differ := [key for key, text in asked.items() if text and there[key] and text != there[key]]:
        raise C2CError(
            f"{len(differ)} questions have one id in {one} and {two} and differ, the first {differ[0][1]}; give "
            "runs of the same questions"
        )


def _columns(answers: Sequence[Answer], ways: Mapping[str, str]) -> dict[str, dict[str, float | None]]:
    """Per task and over all of them, C2C's accuracy and the share of the gap that is recovered."""
    mine = [a for a in answers if a.method in METHODS]
    found = {task: [a for a in mine if a.task == task and a.answers == way] for task, way in ways.items()}
    rows = [a for some in found.values() for a in some]
    asked = marks_of(rows, "c2c").keys()
    methods = [m for m in METHODS if marks_of(rows, m).keys() >= asked]
    summary = summarize_all(found, methods, {task: better_way(mine, task) for task in ways})
    columns = {**summary["tasks"], AVERAGE: summary[AVERAGE], EVERY: summary[POOLED]}
    return {name: {"accuracy": c["c2c"]["accuracy"], "recovered": c.get("recovered")} for name, c in columns.items()}


def _pairs(first: Sequence[Answer], second: Sequence[Answer], tasks: Sequence[str]) -> dict[str, dict[str, Any]]:
    one, two = marks_of(first, "c2c"), marks_of(second, "c2c")
    each = {}
    for task in tasks:
        rows = [a for a in (*first, *second) if a.task == task and a.method == "c2c"]
        mine = {k: v for k, v in one.items() if k[0] == task}
        each[task] = paired(mine, two, graded=any(a.graded for a in rows), sets=sets_of(rows))
    graded = any(a.graded for a in (*first, *second) if a.method == "c2c")
    return {**each, EVERY: paired(one, two, graded=graded)}


def tables(result: dict[str, Any]) -> list[Table]:
    """Accuracies, with % of the gap that is recovered behind them, and p-values."""
    columns = list(result["mean"])
    names = {run: escape(name) for run, name in _short([row["run"] for row in result["runs"]]).items()}
    accuracies = Table(title="C2C, accuracy in % (% of the gap from the receiver to the sharer)")
    for heading in ("", *columns):
        accuracies.add_column(escape(heading), justify="right" if heading else "left")
    for baseline in (False, True):
        for row in (r for r in result["runs"] if r["baseline"] is baseline):
            cells = (_cell(row["columns"][c]) for c in columns)
            accuracies.add_row(names[row["run"]], *cells, style="dim" if baseline else None)
        if not baseline and sum(not row["baseline"] for row in result["runs"]) > 1:
            accuracies.add_row("mean ± spread", *(_cell(result["mean"][c]) for c in columns), style="bold")
    tests = Table(title="better than the other, each way, and p (McNemar, exact) where answers are right or wrong")
    tested = [c for c in columns if c != AVERAGE]
    for heading in ("", *tested):
        tests.add_column(escape(heading), justify="right" if heading else "left")
    for pair in result["paired"]:
        label = " / ".join(names[run] for run in pair["runs"])
        cells = (_split(pair["columns"][c]) for c in tested)
        tests.add_row(label, *cells)
    return [accuracies, tests]


def _split(found: Mapping[str, Any]) -> str:
    if "p" not in found:
        return f"{found['better']}:{found['worse']}"
    return f"{found['only_first']}:{found['only_second']}  {found['p']:.2g}"


def _short(runs: Sequence[str]) -> dict[str, str]:
    """Each folder by as much of its end as tells it from the others."""
    parts = {run: Path(run).parts for run in runs}
    for length in range(1, max(map(len, parts.values())) + 1):
        short = {run: str(Path(*p[-length:])) for run, p in parts.items()}
        if len(set(short.values())) == len(runs):
            return short
    return {run: run for run in runs}


def _cell(column: dict[str, float | None]) -> str:
    def with_spread(key: str) -> str:
        value, spread = column[key], column.get(f"{key}_spread")
        if value is None:
            return "–"
        return f"{value:.1f}" if spread is None else f"{value:.1f} ± {spread:.1f}"

    return f"{with_spread('accuracy')} ({with_spread('recovered')})"
