"""An evaluation run: models in, samples and a summary out, a table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..config import ModelIdentity, ModelSpec
from ..errors import C2CError
from ..files import replace_text
from ..fuser import checkpoint
from ..models.load import LM
from ..pair import C2C, identity
from ..tasks import load
from ..training.single import load_single
from ..training.store import Store
from .likelihood import SINGLE, SKIP, Answer, check_names, evaluate
from .statistics import mcnemar, recovered, wilson

LABELS = {
    "receiver": "receiver alone",
    "receiver-generate": "receiver alone, in words",
    "sharer": "sharer alone",
    "text": "text-to-text",
    "c2c": "C2C",
    "single": "receiver fine-tuned alone",
    "skip": "C2C that skips the sharer",
    "other": "C2C, another question's cache",
}
EFFECTS = {
    "gain": "gain of C2C over the receiver",
    "presence": "… of it with another question's cache",
    "recovered": "% of the gap to the sharer",
}
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


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
    single: Path | None = None,
    subfolder: str | None = None,
    store: tuple[Path | None, str | None] = (None, None),
    max_bytes: int = 20 * 10**9,
) -> dict[str, Any]:
    """Evaluate and write `samples.jsonl` and `summary.json` to `output`; prints a table. Returns the summary."""
    check_names(prompt, methods, skip)
    questions = {task: load(task, split, data_dir)[:limit] for task in tasks}
    if empty := [task for task, rows in questions.items() if not rows]:
        raise C2CError(f"{empty[0]} holds no questions; give at least one")
    pair, settings = load_pair(fuser, subfolder, receiver, sharer)
    prefills = open_store(*store, pair.sharers[0])
    settings |= {
        "store": prefills.config["precision"] if prefills else None,
        "split": split,
        "prompt": prompt,
        "limit": limit,
    }
    if SKIP in methods:
        settings["skip"] = skip
    tuned = None
    if SINGLE in methods:
        if single is None:
            raise C2CError("the method single needs an adapter; give its folder with --single")
        tuned = load_single(pair.receiver, single)
        settings["single"] = file_hash(single / "adapter_model.safetensors")
    claim(output, settings)
    found: dict[str, list[Answer]] = {}
    for task, rows in questions.items():
        with Progress(*COLUMNS, console=Console(stderr=True)) as bar:
            row = bar.add_task(task, total=len(rows))
            found[task] = evaluate(
                pair, task, rows, output / "samples.jsonl", prompt=prompt, methods=methods, skip=skip, single=tuned,
                batch_size=batch_size, store=prefills, max_bytes=max_bytes,
                progress=lambda n: bar.advance(row, n),  # noqa: B023
            )  # fmt: skip
    summary = {"settings": settings, **summarize_all(found, methods)}
    replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    Console().print(table(summary))
    return summary


def load_pair(
    fuser: str | None, subfolder: str | None, receiver: tuple[str | None, str], sharer: tuple[str | None, str]
) -> tuple[C2C, dict[str, Any]]:
    """A trained pair, its models given as source (None: the fuser's own) and dtype, and what identifies it."""
    folder = checkpoint.resolve(fuser, subfolder=subfolder)
    config = checkpoint.read_config(folder)[0]

    def spec(given: tuple[str | None, str], trained_for: ModelIdentity | None) -> ModelSpec:
        source, dtype = given
        if source is not None:
            return ModelSpec(source=source, dtype=dtype)
        assert trained_for is not None  # a saved fuser names its models
        return ModelSpec(source=trained_for.name, revision=trained_for.revision, dtype=dtype)

    pair = C2C.from_pretrained(folder, receiver=spec(receiver, config.receiver), sharers=spec(sharer, config.sharer))
    return pair, {
        "receiver": {**identity(pair.receiver).model_dump(), "dtype": str(pair.receiver.dtype)},
        "sharer": {**identity(pair.sharers[0]).model_dump(), "dtype": str(pair.sharers[0].dtype)},
        "fuser": "/".join([fuser or checkpoint.DEFAULT, *([subfolder] if subfolder else [])]),
        "fuser_hash": fuser_hash(folder),
    }


def open_store(folder: Path | None, precision: str | None, sharer: LM) -> Store | None:
    """The store in a folder, a new one being of bfloat16 unless `precision` says otherwise; None without a folder."""
    if folder is None:
        if precision is not None:
            raise C2CError(f"a precision, {precision}, was given without a store; name its folder too")
        return None
    new = precision is None and not (folder / "store.json").exists()
    return Store(folder, sharer, "bfloat16" if new else precision)


def claim(output: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix the answers of two settings in one folder."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "settings.json"
    before = json.loads(path.read_text()) if path.exists() else settings
    # A folder where nothing was skipped so far takes any threshold, and likewise any adapter; earlier versions knew of
    # no store.
    known = {**{name: settings[name] for name in ("skip", "single") if name in settings}, "store": None, **before}
    if changed := sorted(k for k in settings if known.get(k) != settings[k]):
        raise C2CError(
            f"{output} holds an evaluation with another {', '.join(changed)}; choose another --output, or remove it"
        )
    if not path.exists() or settings.keys() - before.keys():
        replace_text(path, json.dumps({**before, **settings}, indent=2) + "\n")


def summarize_all(found: Mapping[str, Sequence[Answer]], methods: Sequence[str]) -> dict[str, Any]:
    """Each task's summary; the average, in which every task counts alike; and all questions pooled."""
    tasks = {task: summarize(answers, methods) for task, answers in found.items()}
    mean = {m: sum(accuracy(answers, m) for answers in found.values()) / len(found) for m in methods}
    average = {m: {"accuracy": round(value, 2)} for m, value in mean.items()}
    pooled = summarize([a for answers in found.values() for a in answers], methods)
    return {"tasks": tasks, "average": {**average, **effects(mean)}, "pooled": pooled}


def summarize(answers: Sequence[Answer], methods: Sequence[str]) -> dict[str, Any]:
    """Accuracy with its 95% Wilson interval per method, what `effects` says, and C2C against every other method.

    `paired`: the questions that C2C alone answers right, those that the other method alone does, and McNemar's exact p.
    """
    right = {m: right_of(answers, m) for m in methods}
    result: dict[str, Any] = {}
    for method, marks in right.items():
        low, high = wilson(sum(marks.values()), len(marks))
        result[method] = {
            "questions": len(marks),
            "accuracy": round(accuracy(answers, method), 2),
            "interval": [round(100 * low, 2), round(100 * high, 2)],
        }
    if SKIP in methods:
        skipped = [bool(a.skipped) for a in answers if a.method == SKIP]
        result[SKIP]["skipped"] = round(100 * sum(skipped) / len(skipped), 2)
    result |= effects({m: accuracy(answers, m) for m in methods})
    if "c2c" in methods:
        result["paired"] = {m: paired(right["c2c"], right[m]) for m in methods if m != "c2c"}
        if "receiver" in methods:
            against = result["paired"]["receiver"]
            result["rescued"], result["harmed"] = against["only_first"], against["only_second"]
    return result


def right_of(answers: Sequence[Answer], method: str) -> dict[tuple[str, str], bool]:
    """Per question (task, id), whether a method is right."""
    return {(a.task, a.id): a.correct for a in answers if a.method == method}


def accuracy(answers: Sequence[Answer], method: str) -> float:
    """In %."""
    right = right_of(answers, method)
    return 100 * sum(right.values()) / max(1, len(right))


def paired(first: Mapping[Any, bool], second: Mapping[Any, bool]) -> dict[str, Any]:
    """How often each of two methods alone is right, on the questions that both answered, and McNemar's exact p."""
    both = [(first[key], second[key]) for key in first.keys() & second.keys()]
    counts = both.count((True, False)), both.count((False, True))
    return {"only_first": counts[0], "only_second": counts[1], "p": float(f"{mcnemar(*counts):.3g}")}


def effects(accuracies: Mapping[str, float]) -> dict[str, Any]:
    """What C2C gains, from accuracies in %, rounded. Only what the measured methods allow.

    gain, presence: of C2C, and of C2C with another question's cache, over the receiver, in points.
    presence_share: the latter in % of the former; None where there is no gain.
    recovered: % of the gap between the receiver (by likelihood or in words, whichever is better) and the sharer that
        C2C closes; None where the sharer isn't better.
    """
    result: dict[str, Any] = {}
    if not {"receiver", "c2c"} <= accuracies.keys():
        return result
    receiver, c2c = accuracies["receiver"], accuracies["c2c"]
    result["gain"] = round(c2c - receiver, 2)
    if "other" in accuracies:
        result["presence"] = round(accuracies["other"] - receiver, 2)
        result["presence_share"] = _percent(recovered(accuracies["other"], receiver, c2c))
    if "sharer" in accuracies:
        baseline = max(receiver, accuracies.get("receiver-generate", receiver))
        result["recovered"] = _percent(recovered(c2c, baseline, accuracies["sharer"]))
    return result


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)


def table(summary: dict[str, Any]) -> Table:
    """The summary as a table: a row per method, a column per task, and of several tasks the average and the pool."""
    columns = dict(summary["tasks"])
    if len(columns) > 1:
        columns |= {"average": summary["average"], "all": summary["pooled"]}
    made = Table(
        title="accuracy by option likelihood, % [95% interval]; {split}, {prompt} prompt".format(**summary["settings"])
    )
    made.add_column("")
    for name, result in columns.items():
        count = next(iter(result.values())).get("questions")
        made.add_column(name if count is None else f"{name} ({count})", justify="right")
    for method, label in LABELS.items():
        if all(method in result for result in columns.values()):
            made.add_row(label, *(_cell(result[method]) for result in columns.values()))
    for key, label in EFFECTS.items():
        if all(key in result for result in columns.values()):
            cells = (_signed(result[key]) for result in columns.values())
            made.add_row(label, *cells, style="bold")
    for method, label in LABELS.items():
        if all(method in result.get("paired", {}) for result in summary["tasks"].values()):
            cells = (_p(result["paired"][method]["p"]) if "paired" in result else "" for result in columns.values())
            made.add_row(f"p, C2C against {label}", *cells)
    return made


def _cell(measured: dict[str, Any]) -> str:
    cell = f"{measured['accuracy']:.1f}"
    if "interval" in measured:
        cell += "  [{:.1f}, {:.1f}]".format(*measured["interval"])
    return f"{measured['skipped']:.1f} skipped: {cell}" if "skipped" in measured else cell


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.1f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


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
