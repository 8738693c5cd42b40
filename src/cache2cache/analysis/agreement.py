"""Agreement: which questions receiver, sharer, text-to-text and C2C get right together, from evaluation runs."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import C2CError
from ..evaluation.answers import LIKELIHOOD, Answer, read_asked, read_settings
from ..evaluation.report import LABELS
from ..evaluation.statistics import accuracy
from ..evaluation.summary import paired
from ..files import replace_text
from . import plots

METHODS = ("receiver", "sharer", "text", "c2c")
NEEDED = ("receiver", "sharer", "c2c")
BINS = 5  # of the sharer's confidence, with as many questions each
SUBJECT_QUESTIONS = 5  # fewer show nothing in a figure


@dataclass(frozen=True)
class Judged:
    """One question: who is right, and how sure the sharer is of its letter (its probability among the letters)."""

    task: str
    id: str
    subject: str
    right: dict[str, bool]
    confidence: float


def run(
    folders: Sequence[Path],
    output: Path,
    *,
    bins: int = BINS,
    command: str = "",
) -> dict[str, Any]:
    """Write `result.json`, a `questions-N.jsonl` for each run, and `venn`, `confidence` and `subjects` as PNG and SVG.

    Args:
        folders: output folders of `c2c evaluate` with receiver, sharer and C2C, and perhaps text.
        output: a folder.
        bins: of the sharer's confidence.
        command: for the record.
    """
    plots.check()
    if bins < 2:
        raise C2CError(f"{bins} bins were asked for; expected two or more")
    if not folders:
        raise C2CError("no run was given; expected output folders of c2c evaluate")
    results: list[tuple[str, dict[str, Any]]] = []
    files = {}
    for number, folder in enumerate(folders):
        answers = [a for a in read_asked(folder)[0] if a.answers == LIKELIHOOD]
        settings = _settings(folder)
        rows = judged(answers, folder)
        found = {"run": str(folder), "settings": settings, **summarize(rows, bins)}
        results.append((_name(folder, folders), found))
        files[f"questions-{number}.jsonl"] = "".join(json.dumps(_row(r)) + "\n" for r in rows)
    about = {"kind": "agreement", "command": command}
    output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        replace_text(output / name, text)
    result = {"about": about, "runs": [found for _, found in results]}
    replace_text(output / "result.json", json.dumps(result, indent=1) + "\n")
    draw_venn(results, output)
    draw_confidence(results, output)
    draw_subjects(results, output)
    for name, found in results:
        Console().print(table(name, found))
    return result


def _settings(folder: Path) -> dict[str, Any]:
    found = read_settings(folder)
    return {k: found[k] for k in ("receiver", "sharer", "fuser", "fuser_hash", "split", "prompt") if k in found}


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """The folder's own name, with its parent's where two have the same."""
    same = [f for f in folders if f.name == folder.name]
    return folder.name if len(same) == 1 else "/".join(folder.parts[-2:])


def judged(answers: Sequence[Answer], folder: Path) -> list[Judged]:
    """The questions that every method of the run has answered. Without a subject a question goes by its task."""
    if len({a.prompt for a in answers}) > 1:
        raise C2CError(f"{folder} holds answers to several prompts; give runs of one")
    by_method = {m: {(a.task, a.id): a for a in answers if a.method == m} for m in METHODS}
    if absent := [m for m in NEEDED if not by_method[m]]:
        raise C2CError(f"{folder} holds no answers of {', '.join(absent)}; run c2c evaluate with these methods into it")
    methods = [m for m in METHODS if by_method[m]]
    common = [key for key in by_method["c2c"] if all(key in by_method[m] for m in methods)]
    failed = {key for key in common if any(by_method[m][key].error is not None for m in methods)}
    if failed:
        warnings.warn(f"{len(failed)} questions of {folder} are left out, of which an answer failed", stacklevel=2)
    common = [key for key in common if key not in failed]
    if not common:
        raise C2CError(f"{folder} has no question that {', '.join(methods)} all answer; let the evaluation end")
    return [
        Judged(
            *key,
            by_method["c2c"][key].subject or key[0],
            {m: by_method[m][key].correct for m in methods},
            confidence(by_method["sharer"][key].logprobs),
        )
        for key in common
    ]


def confidence(logprobs: Sequence[float]) -> float:
    """The largest probability among the letters alone."""
    best = max(logprobs)
    return 1 / sum(math.exp(x - best) for x in logprobs)


def _row(question: Judged) -> dict[str, Any]:
    about = {"task": question.task, "id": question.id, "subject": question.subject}
    return {**about, **question.right, "sharer_confidence": round(question.confidence, 6)}


# ---- numbers ---------------------------------------------------------------------------------------------------------


def summarize(rows: Sequence[Judged], bins: int = BINS) -> dict[str, Any]:
    """Everything that the figures show, and on which questions C2C is right given what both models know."""
    methods = list(rows[0].right)
    return {
        "questions": len(rows),
        "methods": methods,
        "accuracy": {m: _share([r.right[m] for r in rows]) for m in methods},
        "regions": regions(rows, methods),
        "given": given(rows),
        "by_confidence": by_confidence(rows, methods, bins),
        "by_subject": by_subject(rows, methods),
    }


def _share(right: Sequence[bool]) -> dict[str, Any]:
    """Of how many how many are right, in % with the 95% Wilson interval; None of none."""
    if not right:
        return {"questions": 0, "right": 0, "accuracy": None, "interval": None}
    return {**accuracy(right), "right": sum(right)}


def regions(rows: Sequence[Judged], methods: Sequence[str]) -> list[dict[str, Any]]:
    """For every set of methods the questions that exactly these answer right; they add up to all questions."""
    found = []
    for marks in product((True, False), repeat=len(methods)):
        who = [m for m, mark in zip(methods, marks, strict=True) if mark]
        count = sum(all(r.right[m] == mark for m, mark in zip(methods, marks, strict=True)) for r in rows)
        found.append({"right": who, "questions": count})
    return found


def given(rows: Sequence[Judged]) -> dict[str, Any]:
    """C2C's accuracy, and text-to-text's, where both models, one of them, or none is right alone."""
    methods = [m for m in ("c2c", "text") if m in rows[0].right]
    found = {}
    for name, receiver, sharer in (
        ("both", True, True), ("receiver_only", True, False), ("sharer_only", False, True), ("neither", False, False),
    ):  # fmt: skip
        some = [r for r in rows if (r.right["receiver"], r.right["sharer"]) == (receiver, sharer)]
        found[name] = {m: _share([r.right[m] for r in some]) for m in methods}
    return found


def by_confidence(rows: Sequence[Judged], methods: Sequence[str], bins: int) -> list[dict[str, Any]]:
    """Questions in the order of the sharer's confidence, in `bins` parts of nearly equal size."""
    order = sorted(rows, key=lambda r: (r.confidence, r.task, r.id))
    bins = min(bins, len(order))
    bounds = [round(i * len(order) / bins) for i in range(bins + 1)]
    found = []
    for start, end in pairwise(bounds):
        some = order[start:end]
        found.append(
            {
                "from": round(some[0].confidence, 4),
                "to": round(some[-1].confidence, 4),
                "mean": round(sum(r.confidence for r in some) / len(some), 4),
                **{m: _share([r.right[m] for r in some]) for m in methods},
                "paired": _against_receiver(some),
            }
        )
    return found


def by_subject(rows: Sequence[Judged], methods: Sequence[str]) -> dict[str, Any]:
    """Per subject each method's accuracy and the shift in points from the receiver's, largest gain of C2C first."""
    found = {}
    for subject in sorted({r.subject for r in rows}):
        some = [r for r in rows if r.subject == subject]
        shares = {m: _share([r.right[m] for r in some]) for m in methods}
        base = shares["receiver"]["accuracy"]
        shift = {m: round(shares[m]["accuracy"] - base, 2) for m in methods if m != "receiver"}
        found[subject] = {**shares, "shift": shift, "paired": _against_receiver(some)}
    return dict(sorted(found.items(), key=lambda one: -one[1]["shift"]["c2c"]))


def _against_receiver(rows: Sequence[Judged]) -> dict[str, Any]:
    mine, theirs = ({(r.task, r.id): r.right[m] for r in rows} for m in ("c2c", "receiver"))
    return paired(mine, theirs)


# ---- figures ---------------------------------------------------------------------------------------------------------

Results = Sequence[tuple[str, dict[str, Any]]]
SHADES = ("#444444", "#999999", "#c8c8c8", "#707070")  # of several runs


def draw_venn(results: Results, output: Path) -> None:
    """Circles of receiver, sharer and C2C for the first run, and beside them every combination of all runs as bars."""
    made, axes = plots.figure(1, 2, (10, 4), width_ratios=(1, 1.5))
    first_name, first = results[0]
    _circles(axes[0, 0], first)
    axes[0, 0].set_title(f"right answers of {first['questions']} ({first_name})", fontsize=9)
    axis = axes[0, 1]
    methods = [m for m in METHODS if all(m in found["methods"] for _, found in results)]
    sets = [r["right"] for r in _merged(first, methods)]
    width = 0.8 / len(results)
    for index, (name, found) in enumerate(results):
        counts = [r["questions"] for r in _merged(found, methods)]
        share = [100 * c / found["questions"] for c in counts]
        places = [i + (index - (len(results) - 1) / 2) * width for i in range(len(sets))]
        bars = axis.bar(places, share, width, label=name, color=SHADES[index % len(SHADES)])
        if len(results) == 1:
            axis.bar_label(bars, [str(c) for c in counts], fontsize=7)
    axis.set_xlim(-0.6, len(sets) - 0.4)
    axis.set_xticks([])
    axis.set_ylabel("% of the questions")
    axis.set_title("exactly these are right", fontsize=9)
    below = axis.get_xaxis_transform()  # x as in the bars, y in heights of the axis
    for row, method in enumerate(methods):
        y = -0.06 * (row + 1)
        colour = plots.COLOURS[method]
        axis.text(-0.7, y, _label(method), transform=below, ha="right", va="center", fontsize=8, color=colour)
        for x, who in enumerate(sets):
            face = colour if method in who else "none"
            axis.scatter(x, y, s=36, transform=below, clip_on=False, facecolors=face, edgecolors=colour, linewidths=0.8)
    if len(results) > 1:
        axis.legend(fontsize=7)
    plots.name_runs(made, [(name, found["settings"]) for name, found in results])
    plots.save(made, output, "venn")


def _merged(found: dict[str, Any], methods: Sequence[str]) -> list[dict[str, Any]]:
    """The regions of some of the methods, summed over the others."""
    total: dict[tuple[str, ...], int] = {}
    for region in found["regions"]:
        who = tuple(m for m in region["right"] if m in methods)
        total[who] = total.get(who, 0) + region["questions"]
    return [{"right": list(who), "questions": count} for who, count in total.items()]


def _label(method: str) -> str:
    return {"receiver": "receiver", "sharer": "sharer", "text": "text-to-text", "c2c": "C2C"}[method]


def _circles(axis: Any, found: dict[str, Any]) -> None:
    from matplotlib.patches import Circle

    count = {tuple(r["right"]): r["questions"] for r in _merged(found, NEEDED)}
    middles = {"receiver": (-0.5, 0.35), "sharer": (0.5, 0.35), "c2c": (0.0, -0.5)}
    for method, place in middles.items():
        axis.add_patch(Circle(place, 0.85, alpha=0.28, color=plots.COLOURS[method], linewidth=0))
        axis.add_patch(Circle(place, 0.85, fill=False, color=plots.COLOURS[method], linewidth=1.5))
    names = {"receiver": (-1.05, 1.3), "sharer": (1.05, 1.3), "c2c": (0, -1.55)}
    for method, (x, y) in names.items():
        share = found["accuracy"][method]["accuracy"]
        text = f"{_label(method)} {share:.1f}%"
        axis.text(x, y, text, ha="center", va="center", color=plots.COLOURS[method], fontweight="bold")
    for who, (x, y) in {
        ("receiver",): (-0.85, 0.55), ("sharer",): (0.85, 0.55), ("c2c",): (0.0, -0.95),
        ("receiver", "sharer"): (0.0, 0.72), ("receiver", "c2c"): (-0.5, -0.18), ("sharer", "c2c"): (0.5, -0.18),
        ("receiver", "sharer", "c2c"): (0.0, 0.1), (): (1.35, -1.3),
    }.items():  # fmt: skip
        axis.text(x, y, f"{count[who]}" if who else f"none: {count[who]}", ha="center", va="center", fontsize=10)
    axis.set_xlim(-1.7, 1.7)
    axis.set_ylim(-1.75, 1.5)
    axis.set_aspect("equal")
    axis.axis("off")


def draw_confidence(results: Results, output: Path) -> None:
    """Accuracy of each method where the sharer is ever surer of itself; one dash style a run."""
    made, axes = plots.figure(1, 1, (6.5, 4))
    axis = axes[0, 0]
    for index, (_, found) in enumerate(results):
        middles = [part["mean"] for part in found["by_confidence"]]
        for method in found["methods"]:
            points = [part[method] for part in found["by_confidence"]]
            colour = plots.COLOURS[method]
            label = plots.titled(results, index, _label(method))
            style = plots.DASHES[index % len(plots.DASHES)]
            axis.plot(
                middles, [p["accuracy"] for p in points], style, marker="o", markersize=3, color=colour, label=label
            )
            if len(results) == 1 and method in ("receiver", "c2c"):
                low, high = zip(*(p["interval"] for p in points), strict=True)
                axis.fill_between(middles, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set_xlabel("the sharer's confidence in its letter, mean of each part")
    axis.set_ylabel("accuracy, %")
    axis.set_title("accuracy by the sharer's confidence", fontsize=9)
    axis.legend(fontsize=7)
    plots.name_runs(made, [(name, found["settings"]) for name, found in results])
    plots.save(made, output, "confidence")


def draw_subjects(results: Results, output: Path) -> None:
    """Per subject the shift of C2C and the others from the receiver; those with too few questions are left out."""
    first = results[0][1]["by_subject"]
    subjects = [s for s, one in first.items() if one["c2c"]["questions"] >= SUBJECT_QUESTIONS] or list(first)
    subjects = [s for s in subjects if all(s in found["by_subject"] for _, found in results)]
    if not subjects:  # runs of other questions have no subject in common
        subjects = list(first)
    made, axes = plots.figure(1, 1, (7, max(2.2, 1.2 + 0.2 * len(subjects))))
    axis = axes[0, 0]
    for index, (_, found) in enumerate(results):
        for method, marker in (("sharer", "|"), ("text", "x"), ("c2c", "o")):
            known = [(y, s) for y, s in enumerate(subjects) if method in found["by_subject"].get(s, {})]
            if not known:
                continue
            lower = 0.25 * (index - (len(results) - 1) / 2)
            shifts = [found["by_subject"][s]["shift"][method] for _, s in known]
            filled = {} if marker in "|x" else {"markerfacecolor": plots.COLOURS[method] if index == 0 else "none"}
            axis.plot(shifts, [y + lower for y, _ in known], marker, color=plots.COLOURS[method], markersize=6,
                      label=plots.titled(results, index, _label(method)), **filled)  # fmt: skip
    axis.axvline(0, color=plots.COLOURS["receiver"], linewidth=1)
    labels = [f"{Path(s).name} ({first[s]['c2c']['questions']})" for s in subjects]
    axis.set_yticks(range(len(subjects)), labels, fontsize=7)
    axis.set_ylim(len(subjects) - 0.5, -0.5)
    axis.set_xlabel("accuracy less the receiver's, in points")
    axis.legend(fontsize=7)
    plots.name_runs(made, [(name, found["settings"]) for name, found in results])
    plots.save(made, output, "subjects")


def table(name: str, found: dict[str, Any]) -> Table:
    """Who is right, and C2C given who is right alone."""
    made = Table(title=f"{name}: {found['questions']} questions, accuracy in % [95% interval]")
    made.add_column("")
    methods = [m for m in ("c2c", "text") if m in found["methods"]]
    for method in methods:
        made.add_column(LABELS[method], justify="right")
    for key, label in (
        ("both", "both models right alone"), ("receiver_only", "receiver alone right"),
        ("sharer_only", "sharer alone right"), ("neither", "neither right"),
    ):  # fmt: skip
        made.add_row(label, *(_cell(found["given"][key][m]) for m in methods))
    made.add_row("all", *(_cell(found["accuracy"][m]) for m in methods), style="bold")
    return made


def _cell(one: dict[str, Any]) -> str:
    if one["accuracy"] is None:
        return "– (0)"
    return "{:.1f}  [{:.1f}, {:.1f}] ({})".format(one["accuracy"], *one["interval"], one["questions"])
