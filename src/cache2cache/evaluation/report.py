"""What a run, or several, say: a table on the terminal, a Markdown file, and the words for what C2C is not worth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from ..errors import C2CError
from ..files import replace_text
from .answers import (
    GENERATION,
    LIKELIHOOD,
    SAMPLES,
    SUMMARY,
    TASK,
    WAYS,
    Answer,
    Asked,
    read_asked,
    split_of,
)
from .summary import AVERAGE, POOLED
from .timing import LENGTHS, line_of_times
from .writing import line_of

LABELS = {
    "receiver": "receiver alone",
    "sharer": "sharer alone",
    "single": "receiver fine-tuned alone",
    "few-shot": "receiver with examples",
    "text": "text-to-text",
    "text-options": "text-to-text, the sharer sees the options",
    "text-answer": "text-to-text, the sharer may answer",
    "route": "routing, learned",
    "route-confidence": "routing by confidence",
    "c2c": "C2C",
    "skip": "C2C that skips the sharer",
    "other": "C2C, another question's cache",
    "zeroed": "C2C, a cache of zeros",
    "gaussian": "C2C, noise of the same moments",
    "self": "C2C, the receiver as its own sharer",
    "off": "C2C, fusion off",
}
EFFECTS = {
    "gain": "gain of C2C over the receiver",
    "presence": "… presence: with another question's cache",
    "content": "… content: of C2C over that",
    "recovered": "% of the gap to the sharer",
}
FAILURES = 50  # that the report lists
WORDS = {LIKELIHOOD: "by option likelihood", GENERATION: "by generation"}


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    folder: Path
    summary: dict[str, Any]
    answers: Sequence[Answer]
    questions: Mapping[tuple[str, str], Asked]
    apart: str = ""  # what tells it from another run of the same sharers

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.summary["settings"]
        return found

    @property
    def sharer(self) -> str:
        return " + ".join(s["name"] for s in self.settings.get("sharers", [self.settings["sharer"]])) + self.apart

    @property
    def ways(self) -> list[str]:
        return [way for way in WAYS if way in self.summary]


def read_run(folder: Path) -> Run:
    """Raises C2CError where there is no run that went to its end."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise C2CError(
            f"{folder} holds no evaluation that went to its end; give the output folder of c2c evaluate, or run that "
            "again"
        ) from error
    if not any(way in summary for way in WAYS):
        raise C2CError(
            f"{folder} was summarized by an earlier version; run c2c evaluate on it again, which asks nothing anew"
        )
    answers, asked = read_asked(folder)
    # Of the methods and sets that the summary is of: it may be of a piece of what the folder holds.
    shown = {(way, t, m) for way in WAYS if way in summary for t, found in summary[way]["tasks"].items() for m in found}
    return Run(folder, summary, [a for a in answers if (a.answers, a.task, a.method) in shown], asked)


def label_of(method: str) -> str:
    return LABELS.get(method, f"sharer {method.removeprefix('sharer-')} alone")


def methods_of(columns: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The methods of any column, in the order of the labels."""
    there = {m for result in columns.values() for m, v in result.items() if isinstance(v, dict) and "accuracy" in v}
    further = sorted(m for m in there if m not in LABELS)
    return [m for known in LABELS for m in ([known, *further] if known == "sharer" else [known]) if m in there]


def columns_of(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A way's tasks, and of several the average and the pool."""
    columns = dict(found["tasks"])
    return columns | {"average": found[AVERAGE], "all": found[POOLED]} if len(columns) > 1 else columns


# ---- the terminal ----------------------------------------------------------------------------------------------------


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """One for each way to answer."""
    settings = summary["settings"]
    asked = f"{' and '.join(splits_of(settings))}, {settings['prompt']} prompt"
    return [table(summary[way], f"accuracy {WORDS[way]}, % [95% interval]; {asked}") for way in WAYS if way in summary]


def splits_of(settings: Mapping[str, Any]) -> dict[str, list[str]]:
    """The splits that were asked, each with its tasks."""
    asked: dict[str, list[str]] = {}
    for task in [key.removeprefix(TASK) for key in settings if key.startswith(TASK)]:
        asked.setdefault(split_of(settings, task), []).append(task)
    return asked or {settings["split"]: []}  # of earlier versions


def table(found: Mapping[str, Any], title: str) -> Table:
    """A row per method, a column per task, and of several tasks the average and the pool."""
    columns = columns_of(found)
    made = Table(title=title)
    made.add_column("")
    for name, result in columns.items():
        made.add_column(escape(_task(name, result)), justify="right")
    for method in methods_of(columns):
        made.add_row(label_of(method), *(_cell(r.get(method), most_of(r)) for r in columns.values()))
    for key, label in EFFECTS.items():
        if all(key in result for result in columns.values()):
            made.add_row(label, *(_points(result, key) for result in columns.values()), style="bold")
    for method in methods_of(columns):
        if any("p" in result.get("paired", {}).get(method, {}) for result in columns.values()):
            cells = (_p(r.get("paired", {}).get(method, {}).get("p")) for r in columns.values())
            made.add_row(f"p, C2C against {label_of(method)}", *cells)
    return made


def most_of(result: Mapping[str, Any]) -> int:
    """How many questions the method was asked that was asked most."""
    return max((v.get("questions", 0) for v in result.values() if isinstance(v, dict) and "accuracy" in v), default=0)


def _said_of(measured: Mapping[str, Any], digits: int, most: int) -> str:
    """An accuracy, of how many questions where others were asked more; where every answer failed there is none."""
    count = measured.get("questions", most)
    if count and measured.get("failed") == count:
        return "all failed"
    return f"{measured['accuracy']:.{digits}f}" + (f" of {count}" if count < most else "")


def _cell(measured: Mapping[str, Any] | None, most: int = 0) -> str:
    if measured is None:
        return "–"
    cell = _said_of(measured, 1, most)
    if cell == "all failed":
        return cell
    if "interval" in measured:
        cell += "  [{:.1f}, {:.1f}]".format(*measured["interval"])
    if "failed" in measured:
        cell += f", {measured['failed']} failed"
    return f"{measured['skipped']:.1f} skipped: {cell}" if "skipped" in measured else cell


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _interval(pair: Sequence[float] | None) -> str:
    return "" if pair is None else " [{:+.1f}, {:+.1f}]".format(*pair)


# ---- Markdown --------------------------------------------------------------------------------------------------------

Rows = list[list[str]]


def markdown(runs: Sequence[Run]) -> str:
    """The report of one run, or of several one below the other in each table."""
    parts = ["# Evaluation", *(_md(setup_of(run)) for run in runs)]
    for title, header, rows, note in sections(runs):
        if rows:
            parts += [f"## {title}", *([note] if note else []), grid(header, rows)]
    for run in runs:
        parts.append(f"## What it is worth{_md(which(run, runs))}")
        parts.append("\n".join(f"- {_md(line)}" for line in verdict(run.summary)))
    return "\n\n".join(parts) + "\n"


def setup_of(run: Run) -> str:
    """A run's setup in one line."""
    s, splits = run.settings, splits_of(run.settings)
    asked = [f"{split} split{' of ' + ', '.join(tasks) if len(splits) > 1 else ''}" for split, tasks in splits.items()]
    return (
        f"Receiver {s['receiver']['name']}, sharer {run.sharer}, fuser {s['fuser']} ({s['fuser_hash'][:12]}); "
        f"{', '.join(asked)}, {s['prompt']} prompt, seed {s.get('seed')}."
    )


def which(run: Run, runs: Sequence[Run]) -> str:
    """What a title says of which of several runs it is about."""
    return f" of {run.sharer}" if len(runs) > 1 else ""


def sections(runs: Sequence[Run]) -> Iterator[tuple[str, list[str], Rows, str]]:
    """The report's tables: title, header, rows, a note."""
    every = [
        (run, way, task, result)
        for run in runs
        for way in run.ways
        for task, result in columns_of(run.summary[way]).items()
    ]
    yield (
        "Accuracy",
        ["Sharer", "Task", "Answers", "Receiver", "Sharer alone", "Routing", "Text-to-text", "C2C"],
        [[run.sharer, _task(task, result), way, *_table_4(run, way, task, result)] for run, way, task, result in every],
        "In %, and behind the stroke median seconds of an answer in words, of the set that was clocked.",
    )
    yield (
        "Every method",
        ["Sharer", "Task", "Answers", "Method", "Accuracy [95%]", "C2C better : worse", "p", "C2C over it [95%]"],
        [
            [
                run.sharer,
                task,
                way,
                label_of(m),
                _cell(result[m], most_of(result)),
                *_paired(result.get("paired", {}).get(m)),
            ]
            for run, way, task, result in every
            for m in methods_of({task: result})
        ],
        "Intervals are Wilson's (scores: bootstrap); comparisons are paired, on the questions that both were asked; p "
        "is McNemar's (exact), of answers that are right or wrong; differences have bootstrap intervals.",
    )
    yield (
        "Where the gain comes from",
        ["Sharer", "Task", "Answers", "Gain", "Presence", "Content", "Recovered gap, %", "Rescued", "Harmed"],
        [
            [run.sharer, task, way, *(_effect(result, key) for key in ("gain", "presence", "content", "recovered")),
             str(result.get("rescued", "")), _harmed(result)]
            for run, way, task, result in every
            if "gain" in result
        ],
        "Presence is what another question's cache gives as well; only content is communication. Harmed: right for the "
        "receiver, wrong with C2C; scores have neither.",
    )  # fmt: skip
    yield (
        "Routers",
        ["Sharer", "Task", "Answers", "Router", "Sent to sharer, %", "Accuracy", "As many at random", "Over it [95%]"],
        [
            [run.sharer, task, way, label_of(m), f"{r['sent']:.1f}", f"{r['accuracy']:.1f}", f"{r['random']:.1f}",
             _signed(r["over_random"]) + _interval(r["over_random_interval"])]
            for run, way, task, result in every
            for m in ("route", "route-confidence")
            if "sent" in (r := result.get(m, {}))
        ],
        "",
    )  # fmt: skip
    words = [(run, task, result) for run, way, task, result in every if way == GENERATION]
    yield (
        "Answers in words",
        ["Sharer", "Task", "Method", "Tokens", "No letter", "Message tokens", "Message bytes"],
        [
            [
                run.sharer,
                task,
                label_of(m),
                *(_plain(result[m].get(k)) for k in ("tokens", "no_letter", "message_tokens", "message_bytes")),
            ]
            for run, task, result in words
            for m in methods_of({task: result})
            if "tokens" in result[m]
        ],
        "Medians; answers without a letter are counted.",
    )
    yield (
        "Time",
        ["Sharer", "Method", "Prompts", "First token, s", *(f"{n} tokens, s" for n in LENGTHS), "Bytes", "Memory, GB"],
        [
            [run.sharer, label_of(m), str(t["prompts"]), _times(t["first_token"]),
             *(_times(t["seconds"].get(str(n))) for n in LENGTHS),
             f"{t['bytes_passed']:,.0f}", "" if t["memory"] is None else f"{t['memory'] / 1e9:.2f}"]
            for run in runs
            for m, t in run.summary.get("timing", {}).items()
            if isinstance(t, dict)
        ],
        "One by one; median / 95th percentile.",
    )  # fmt: skip
    for name in ("subjects", "buckets"):
        parts = [
            (run, way, task, part, r) for run, way, task, result in every for part, r in result.get(name, {}).items()
        ]
        shown = [m for m in ("receiver", "sharer", "text", "c2c", "other") if any(m in r for *_, r in parts)]
        yield (
            {"subjects": "By subject", "buckets": "By length"}[name],
            ["Sharer", "Task", "Answers", name[:-1].capitalize(), "Questions", *map(label_of, shown),
             "C2C over the receiver", "p"],
            [
                [run.sharer, task, way, part, str(most_of(r)),
                 *(_cell(r.get(m), most_of(r)) for m in shown), *_difference(r.get("paired", {}).get("receiver"))]
                for run, way, task, part, r in parts
            ],
            "",
        )  # fmt: skip
    for run in runs:
        failed = run.summary.get("failed", [])
        yield (
            f"{len(failed)} failed, counted as wrong{which(run, runs)}",
            ["Task", "Id", "Method", "Answers", "Error"],
            [[f["task"], f["id"], label_of(f["method"]), f["answers"], f["error"]] for f in failed[:FAILURES]],
            "" if len(failed) <= FAILURES else f"The first {FAILURES}; all of them are in {SUMMARY}.",
        )


def _task(task: str, result: Mapping[str, Any]) -> str:
    count = most_of(result)
    return f"{task} ({count})" if count else task


def _table_4(run: Run, way: str, task: str, result: Mapping[str, Any]) -> list[str]:
    router = "route" if "route" in result else "route-confidence"
    clocked = way == GENERATION and task == run.summary.get("timing", {}).get("task")
    return [_with_seconds(run, clocked, result, m) for m in ("receiver", "sharer", router, "text", "c2c")]


def _with_seconds(run: Run, clocked: bool, result: Mapping[str, Any], method: str) -> str:
    if method not in result:
        return "–"
    cell = _said_of(result[method], 2, most_of(result))
    seconds = seconds_of(run.summary, method, result) if clocked else None
    return cell if seconds is None else f"{cell} / {seconds:.2f}"


def seconds_of(summary: Mapping[str, Any], method: str, result: Mapping[str, Any]) -> float | None:
    """Median seconds of an answer of this method's median length; a router's are those of whom it asks."""
    timed = summary.get("timing", {})
    measured = result.get(method, {})
    if "sent" in measured:
        mine, theirs = (seconds_of(summary, m, result) for m in ("receiver", "sharer"))
        share = measured["sent"] / 100
        return None if mine is None or theirs is None else share * theirs + (1 - share) * mine
    if method not in timed or measured.get("tokens") is None:
        return None
    first, step = line_of_times(timed[method])
    return float(first + step * max(0.0, measured["tokens"] - 1))


def _paired(found: Mapping[str, Any] | None) -> list[str]:
    return ["", "", ""] if found is None else [" : ".join(map(str, _counts(found))), *reversed(_difference(found))]


def _counts(found: Mapping[str, Any]) -> tuple[int, int]:
    """How often the first of two methods is better, and the second."""
    return (found["only_first"], found["only_second"]) if "p" in found else (found["better"], found["worse"])


def _difference(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["", ""]
    return [_signed(found["difference"]) + _interval(found["interval"]), _p(found.get("p"))]


def _effect(result: Mapping[str, Any], key: str) -> str:
    return _points(result, key) + _interval(result.get(f"{key}_interval")) if key in result else ""


def _points(result: Mapping[str, Any], key: str) -> str:
    """An effect, and of how many questions where the gain is of more."""
    few = result.get("parts_of") if key in ("presence", "content") else None
    return _signed(result[key]) + (f" of {few}" if few else "")


def _harmed(result: Mapping[str, Any]) -> str:
    share = result.get("harmed_share")
    return "" if "harmed" not in result else str(result["harmed"]) + (f" ({share:.1f}%)" if share is not None else "")


def _plain(value: Any) -> str:
    return "" if value is None else f"{value:g}"


def _times(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['median']:.2f} / {found['p95']:.2f}"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(_md(cell) for cell in line) + " |" for line in lines)


def _md(text: str) -> str:
    """Text that Markdown shows as it is."""
    text = " ".join(str(text).split())
    for sign in "\\|`*_[]":
        text = text.replace(sign, "\\" + sign)
    return text.replace("&", "&amp;").replace("<", "&lt;")


# ---- words -----------------------------------------------------------------------------------------------------------


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """Plain words: against the receiver, another question's cache, text, the sharer alone, and the clock."""
    said = []
    for way in WAYS:
        for task, result in summary.get(way, {}).get("tasks", {}).items():
            where, pairs = f"{task}, {WORDS[way]}", result.get("paired", {})
            if "receiver" in pairs:
                said.append(f"{where}: {_against(pairs['receiver'], 'the receiver alone')}.")
            if "other" in pairs and result.get("gain", 0) > 0:
                interval = result.get("content_interval", pairs["other"]["interval"])
                said.append(
                    f"{where}: {_CONTENT if interval[0] > 0 else _NO_CONTENT}, "
                    f"{_signed(result['content'])} points{_interval(interval)}."
                )
            for form in ("text", "text-options", "text-answer"):
                if form in pairs:
                    said.append(f"{where}: {_against(pairs[form], label_of(form))}.")
            if "sharer" in pairs:
                worse = pairs["sharer"]["interval"][1] < 0
                better = pairs["sharer"]["interval"][0] > 0
                said.append(
                    f"{where}: {_against(pairs['sharer'], 'the sharer alone')}."
                    + ("" if better else _not_worth(summary, worse))
                )
            if result.get("off_differs"):
                said.append(
                    f"{where}: with fusion off {result['off_differs']} answers differ from the receiver's, an error."
                )
    if {"c2c", "sharer"} <= summary.get("timing", {}).keys():
        said += list(_clock(summary["timing"]))
    return said or ["C2C was not measured."]


_CONTENT = "some of the gain is content"
_NO_CONTENT = "no content is shown: another question's cache may do as well"


def _against(found: Mapping[str, Any], whom: str) -> str:
    low, high = found["interval"]
    p = f", p {_p(found['p'])}" if "p" in found else ""
    by = f"{abs(found['difference']):.1f} points [{low:+.1f}, {high:+.1f}]{p}"
    if low > 0:
        return f"C2C is better than {whom} by {by}"
    if high < 0:
        return f"C2C is worse than {whom} by {by}"
    by = f"{_signed(found['difference'])} points [{low:+.1f}, {high:+.1f}]{p}"
    return f"no difference between C2C and {whom} is shown ({by})"


def _not_worth(summary: Mapping[str, Any], worse: bool) -> str:
    """Where the sharer alone is no worse, C2C is worth it only for its time."""
    reason = "the sharer alone is better" if worse else "the sharer alone is as good, as far as can be told"
    timed = summary.get("timing", {})
    if "cheaper_from" not in timed:
        return f" C2C is worth it here only where it is cheaper, which was not measured: {reason}."
    length = timed["cheaper_from"]
    if length is None:
        quick = timed["c2c"]["first_token"]["median"] < timed["sharer"]["first_token"]["median"]
        when = "but in short answers" if quick else "at any length"
        return f" C2C is not worth it here: {reason}, and takes less time {when}."
    if length == 1:
        return f" C2C is worth it here only for its time, being quicker at any length: {reason}."
    return f" C2C is not worth it here for answers below {length} tokens: {reason}, and quicker."


def _clock(timed: Mapping[str, Any]) -> Iterator[str]:
    for n in LENGTHS:
        both = [timed[m]["seconds"].get(str(n)) for m in ("c2c", "sharer")]
        if all(both):
            mine, theirs = (times["median"] for times in both)
            yield f"An answer of {n} tokens takes C2C {mine:.2f} s and the sharer alone {theirs:.2f} s."
    length = timed.get("cheaper_from")
    if length is None and timed["c2c"]["first_token"]["median"] < timed["sharer"]["first_token"]["median"]:
        yield "C2C is cheaper than the sharer alone for short answers only."
    elif length is None:
        yield "C2C is never cheaper than the sharer alone."
    else:
        yield f"C2C is cheaper than the sharer alone from {length} {'token' if length == 1 else 'tokens'} of answer on."


def told_apart(runs: Sequence[Run]) -> list[Run]:
    """The runs, those of the same sharers by their folders."""
    names = [run.sharer for run in runs]
    return [replace(run, apart=f" ({run.folder})") if names.count(run.sharer) > 1 else run for run in runs]


def write(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Put `report.md` and `report.html` into a folder."""
    from .page import page

    runs = told_apart(runs)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "report.md", folder / "report.html"]
    for path, text in zip(paths, (markdown(runs), page(runs)), strict=True):
        replace_text(path, text)
    return paths


def publish(run: Run, folder: Path) -> None:
    """Numbers and ids without any text: what may be shown where the questions may not. Of errors their kind: what they
    say may quote a question."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [replace(a, text=None, message=None, error=_kind(a.error)) for a in run.answers]
    failed = [{**f, "error": _kind(f["error"])} for f in run.summary.get("failed", [])]
    shown = replace(run, summary={**run.summary, "failed": failed})
    replace_text(folder / SAMPLES, "".join(map(line_of, rows)))
    replace_text(folder / SUMMARY, json.dumps(shown.summary, indent=2) + "\n")
    replace_text(folder / "report.md", markdown([shown]))


def _kind(error: str | None) -> str | None:
    return None if error is None else error.split(":")[0]
