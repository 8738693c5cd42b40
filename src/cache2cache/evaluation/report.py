"""An evaluation run: models in, samples and a summary out, a table on the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..config import ModelIdentity, ModelSpec
from ..errors import C2CError
from ..fuser import checkpoint
from ..pair import C2C, identity
from ..tasks import load
from .likelihood import SKIP, Answer, check_names, evaluate
from .statistics import wilson

LABELS = {
    "receiver": "receiver alone",
    "sharer": "sharer alone",
    "c2c": "C2C",
    "skip": "C2C that skips the sharer",
    "other": "C2C, another question's cache",
}


def run(
    fuser: str | None,
    *,
    tasks: Sequence[str],
    split: str,
    data_dir: Path | None,
    prompt: str,
    methods: Sequence[str],
    limit: int | None,
    batch_size: int,
    receiver: tuple[str | None, str],
    sharer: tuple[str | None, str],
    output: Path,
    skip: float | None = None,
    subfolder: str | None = None,
) -> dict[str, Any]:
    """Evaluate and write `samples.jsonl` and `summary.json` to `output`; prints a table. Returns the summary."""
    check_names(prompt, methods, skip)
    questions = {task: load(task, split, data_dir)[:limit] for task in tasks}
    if empty := [task for task, rows in questions.items() if not rows]:
        raise C2CError(f"{empty[0]} holds no questions; give at least one")
    folder = checkpoint.resolve(fuser, subfolder=subfolder)
    config = checkpoint.read_config(folder)[0]

    def spec(given: tuple[str | None, str], trained_for: ModelIdentity | None) -> ModelSpec:
        source, dtype = given
        if source is not None:
            return ModelSpec(source=source, dtype=dtype)
        assert trained_for is not None  # a saved fuser names its models
        return ModelSpec(source=trained_for.name, revision=trained_for.revision, dtype=dtype)

    pair = C2C.from_pretrained(folder, receiver=spec(receiver, config.receiver), sharers=spec(sharer, config.sharer))
    settings: dict[str, Any] = {
        "receiver": {**identity(pair.receiver).model_dump(), "dtype": str(pair.receiver.dtype)},
        "sharer": {**identity(pair.sharers[0]).model_dump(), "dtype": str(pair.sharers[0].dtype)},
        "fuser": "/".join([fuser or checkpoint.DEFAULT, *([subfolder] if subfolder else [])]),
        "fuser_hash": fuser_hash(folder),
        "split": split,
        "prompt": prompt,
        "limit": limit,
    }
    if SKIP in methods:
        settings["skip"] = skip
    _claim(output, settings)
    console = Console(stderr=True)
    summary: dict[str, Any] = {"settings": settings, "tasks": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for task, rows in questions.items():
        with Progress(*columns, console=console) as bar:
            row = bar.add_task(task, total=len(rows))
            answers = evaluate(
                pair, task, rows, output / "samples.jsonl", prompt=prompt, methods=methods, skip=skip,
                batch_size=batch_size, progress=lambda n: bar.advance(row, n),  # noqa: B023
            )  # fmt: skip
        summary["tasks"][task] = summarize(answers, methods)
    partial = output / f".summary.{os.getpid()}"
    partial.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(partial, output / "summary.json")
    Console().print(table(summary))
    return summary


def _claim(output: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix the answers of two settings in one folder."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else settings
    known = {"skip": settings.get("skip"), **before}  # a folder where nothing was skipped so far takes any threshold
    if changed := sorted(k for k in settings if known.get(k) != settings[k]):
        raise C2CError(
            f"{output} holds an evaluation with another {', '.join(changed)}; choose another --output, or remove it"
        )
    if not path.exists() or "skip" in settings.keys() - before.keys():
        partial = output / f".settings.{os.getpid()}"
        partial.write_text(json.dumps({**before, **settings}, indent=2) + "\n")
        os.replace(partial, path)


def summarize(answers: Sequence[Answer], methods: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its 95% Wilson interval per method, and the parts of C2C's gain over the receiver, in points."""
    result: dict[str, Any] = {}
    for method in methods:
        mine = [a.correct for a in answers if a.method == method]
        low, high = wilson(sum(mine), len(mine))
        result[method] = {
            "questions": len(mine),
            "accuracy": round(100 * sum(mine) / len(mine), 2),
            "interval": [round(100 * low, 2), round(100 * high, 2)],
        }
    if SKIP in methods:
        skipped = [bool(a.skipped) for a in answers if a.method == SKIP]
        result[SKIP]["skipped"] = round(100 * sum(skipped) / len(skipped), 2)
    if {"receiver", "c2c"} <= set(methods):
        result["gain"] = round(result["c2c"]["accuracy"] - result["receiver"]["accuracy"], 2)
        right = {m: {a.id for a in answers if a.method == m and a.correct} for m in ("receiver", "c2c")}
        result["rescued"], result["harmed"] = (
            len(right["c2c"] - right["receiver"]),
            len(right["receiver"] - right["c2c"]),
        )
        if "other" in methods:
            result["presence"] = round(result["other"]["accuracy"] - result["receiver"]["accuracy"], 2)
    return result


def table(summary: dict[str, Any]) -> Table:
    """The summary as a table: a row per method, a column per task."""
    tasks = summary["tasks"]
    made = Table(
        title="accuracy by option likelihood, % [95% interval]; {split}, {prompt} prompt".format(**summary["settings"])
    )
    made.add_column("")
    for task, result in tasks.items():
        made.add_column(f"{task} ({next(iter(result.values()))['questions']})", justify="right")
    for method, label in LABELS.items():
        if all(method in result for result in tasks.values()):
            made.add_row(label, *(_cell(result[method]) for result in tasks.values()))
    for key, label in (
        ("gain", "gain of C2C over the receiver"),
        ("presence", "… of it with another question's cache"),
    ):
        if all(key in result for result in tasks.values()):
            made.add_row(label, *(f"{result[key]:+.1f}" for result in tasks.values()), style="bold")
    return made


def _cell(measured: dict[str, Any]) -> str:
    low, high = measured["interval"]
    cell = f"{measured['accuracy']:.1f}  [{low:.1f}, {high:.1f}]"
    return f"{measured['skipped']:.1f} skipped: {cell}" if "skipped" in measured else cell


def fuser_hash(folder: Path) -> str:
    """SHA-256 of a fuser's one file, or, of a published one, of the hashes of its files."""
    import hashlib

    hashes = [file_hash(path) for path in checkpoint.weight_files(folder)]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    import hashlib

    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
