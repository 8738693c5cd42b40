"""Partial fusion: accuracy where only some positions are fused, from the front, from the back, or by what they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..alignment.positions import Positions
from ..decode import score
from ..errors import C2CError
from ..evaluation.runner import batches_of
from ..evaluation.statistics import accuracy
from ..evaluation.summary import paired
from ..evaluation.writing import add_rows, read_rows
from ..pair import C2C, PromptIds
from ..progress import Bar
from ..tasks import Question
from ..tasks.prompts import ANSWER_PREFIX
from ..training.store import Store
from . import plots, runs
from .runs import Data, Setup

SHARES = (0.1, 0.25, 0.5, 0.75, 0.9)
SIDES = ("front", "back")
WHOLE = {"none": "receiver alone", "all": "all positions", "content": "content only", "template": "template only"}


@dataclass(frozen=True)
class Placed:
    """The answer to a question where some positions were fused: how many, of a prompt of `length` tokens."""

    task: str
    id: str
    positions: str
    correct: bool
    probability: float
    fused: int
    length: int


def run(setup: Setup, data: Data, against: Sequence[Path] = (), *, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """Measure, and write `answers.jsonl`, `result.json` and `positions.png|svg`; goes on where it was stopped.

    Args:
        setup, data: what is run on what; question sets.
        against: output folders of other runs, drawn beside this one.
        shares: of the positions that are fused from either side.
    """
    plots.check()
    if wrong := [s for s in shares if not 0 < s < 1]:
        raise C2CError(f"a share of {wrong[0]:g} was given; expected numbers between 0 and 1, which are there anyway")
    others = runs.earlier(against, "positions")
    questions = runs.questions_of(data, setup.seed)
    pair, store, settings = runs.open_pair(setup)
    names = choices(shares)
    settings |= {"data": data.record(), "shares": sorted(set(shares))}
    about = runs.begin(setup, settings, "positions", [(task, q) for task, rows in questions.items() for q in rows])
    asked = encoded(pair, questions, data.prompt)
    runs.check_store(store, [p for _, _, p in asked], setup.max_bytes)
    with Bar() as bar:
        row = bar.add_task("questions", total=len(asked))
        answers = answer(
            pair, asked, names, setup.output / "answers.jsonl", store, setup.batch_size, lambda n: bar.advance(row, n)
        )
    result = {"about": about, **summarize(answers, names)}
    runs.finish(setup.output, result)
    draw([*others, (setup.output.name, result)], setup.output)
    Console().print(table(result))
    return result


def choices(shares: Sequence[float]) -> list[str]:
    """The names of what is fused, from nothing to everything."""
    return [*WHOLE, *(f"{side}:{share:g}" for side in SIDES for share in sorted(set(shares)))]


def encoded(pair: C2C, questions: dict[str, list[Question]], prompt: str) -> list[tuple[str, Question, PromptIds]]:
    """Questions as token ids, those of like length together."""
    made = [
        (task, q, pair.encode(list(runs.question_chat(q, prompt)), prefix=ANSWER_PREFIX))
        for task, rows in questions.items()
        for q in rows
    ]
    return sorted(made, key=lambda one: (len(one[2].sharers[0]), one[0], one[1].id))


def chosen(prompt: PromptIds, name: str) -> Positions:
    """What `C2C.fuse` takes for one of `choices`."""
    if name == "none":
        return [False] * len(prompt.receiver)
    return [not inside for inside in prompt.content] if name == "template" else name


def answer(
    pair: C2C,
    asked: Sequence[tuple[str, Question, PromptIds]],
    names: Sequence[str],
    path: Path,
    store: Store | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda questions: None,
) -> list[Placed]:
    """Answer every question with each choice of positions; rows that stand in the file are not computed again."""
    done = read_rows(path, Placed)
    have = {(a.task, a.id, a.positions) for a in done}
    for batch in batches_of(asked, batch_size):
        wanted = [n for n in names if any((task, q.id, n) not in have for task, q, _ in batch)]
        if wanted:
            new = [a for a in _answer(pair, batch, wanted, store) if (a.task, a.id, a.positions) not in have]
            add_rows(path, new)
            done += new
        progress(len(batch))
    known = {(task, q.id) for task, q, _ in asked}
    return [a for a in done if (a.task, a.id) in known and a.positions in names]


def _answer(
    pair: C2C, batch: Sequence[tuple[str, Question, PromptIds]], names: Sequence[str], store: Store | None
) -> Iterator[Placed]:
    prompts = [p for _, _, p in batch]
    clean, cache = runs.read(pair, prompts, store)
    known = [(cache, runs.lengths_of(prompts))]
    letters = [[pair.receiver.continuation_ids(f" {letter}") for letter in q.letters] for _, q, _ in batch]
    for name in names:
        fused = pair.fuse(prompts, positions=[chosen(p, name) for p in prompts], clean=clean, sharers=known)
        found = score(pair.receiver, fused, letters)
        for (task, q, prompt), scores, count in zip(batch, found, fused.fused_positions, strict=True):
            logprobs = [s.logprob for s in scores]
            best = max(logprobs)
            right = math.exp(logprobs[q.answer] - best) / sum(math.exp(x - best) for x in logprobs)
            correct = logprobs.index(best) == q.answer
            yield Placed(task, q.id, name, correct, round(right, 6), count, len(prompt.receiver))


def summarize(answers: Sequence[Placed], names: Sequence[str]) -> dict[str, Any]:
    """Per task and for all questions, per choice of positions: accuracy in % with its 95% Wilson interval, the mean
    probability of the right letter among the letters, the share of positions that were fused, and against "all" and
    "none" the questions that one of the two alone answers right, with McNemar's p."""
    tasks = list(dict.fromkeys(a.task for a in answers))
    result = {task: _summary([a for a in answers if a.task == task], names) for task in tasks}
    return {"tasks": result, "pooled": _summary(answers, names)}


def _summary(answers: Sequence[Placed], names: Sequence[str]) -> dict[str, Any]:
    rows = {name: [a for a in answers if a.positions == name] for name in names}
    right = {name: {(a.task, a.id): a.correct for a in found} for name, found in rows.items()}
    result = {}
    for name, found in rows.items():
        count = len(found)
        result[name] = {
            **accuracy(list(right[name].values())),
            "probability": round(sum(a.probability for a in found) / count, 5),
            "fused": round(sum(a.fused / max(1, a.length - 1) for a in found) / count, 4),
            **{f"against_{other}": paired(right[name], right[other]) for other in ("all", "none")},
        }
    return result


def curve(summary: dict[str, Any], side: str) -> list[tuple[float, dict[str, Any]]]:
    """The shares fused from one side, with their figures, from nothing to everything."""
    inner = [(float(name.partition(":")[2]), one) for name, one in summary.items() if name.startswith(side)]
    return [(0.0, summary["none"]), *sorted(inner, key=lambda point: point[0]), (1.0, summary["all"])]


def draw(results: Sequence[tuple[str, dict[str, Any]]], output: Path) -> None:
    """Accuracy, and the right letter's probability, against the share fused; one dash style a run."""
    made, axes = plots.figure(1, 2, (8.5, 3.6))
    panels = (("accuracy", "accuracy, % (95% interval)"), ("probability", "probability of the right letter"))
    for axis, (key, label) in zip(axes[0], panels, strict=True):
        for index, (_, result) in enumerate(results):
            pooled, style = result["pooled"], plots.DASHES[index % len(plots.DASHES)]
            for side in SIDES:
                shares, points = zip(*curve(pooled, side), strict=True)
                colour = plots.COLOURS[side]
                name = plots.titled(results, index, f"from the {side}")
                axis.plot(shares, [p[key] for p in points], style, marker="o", markersize=3, color=colour, label=name)
                if key == "accuracy":
                    low, high = zip(*(p["interval"] for p in points), strict=True)
                    axis.fill_between(shares, low, high, color=colour, alpha=0.1, linewidth=0)
            for name, marker in (("content", "D"), ("template", "X")):
                label_ = plots.titled(results, index, WHOLE[name])
                axis.plot([pooled[name]["fused"]], [pooled[name][key]], marker, color="black", markersize=5,
                          fillstyle="full" if index == 0 else "none", label=label_)  # fmt: skip
        axis.set_xlabel("share of the prompt's positions that may be fused")
        axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=7)
    counts = ", ".join(f"{result['pooled']['all']['questions']}" for _, result in results)
    made.suptitle(f"Partial fusion ({counts} questions)", fontsize=10)
    plots.name_runs(made, [(label, result["about"]) for label, result in results])
    plots.save(made, output, "positions")


def table(result: dict[str, Any]) -> Table:
    """Accuracy per choice of positions and task."""
    columns = {**result["tasks"], **({"all": result["pooled"]} if len(result["tasks"]) > 1 else {})}
    made = Table(title="accuracy, % [95% interval], by what is fused; {split}, {prompt} prompt".format(
        **result["about"]["data"]))  # fmt: skip
    made.add_column("")
    for name, column in columns.items():
        made.add_column(f"{name} ({column['all']['questions']})", justify="right")
    for name in result["pooled"]:
        cells = ("{:.1f}  [{:.1f}, {:.1f}]".format(c[name]["accuracy"], *c[name]["interval"]) for c in columns.values())
        made.add_row(WHOLE.get(name, name), *cells)
    return made
