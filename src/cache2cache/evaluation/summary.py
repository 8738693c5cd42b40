"""Figures of a run, from its rows: accuracies with intervals, paired comparisons, and where a gain comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from ..errors import C2CError
from .answers import GENERATION, WAYS, Answer
from .asking import ROUTED, SKIP
from .routing import at_random
from .statistics import bootstrap, draws, mcnemar, recovered, wilson

AVERAGE, POOLED = "average", "pooled"
Marks = dict[tuple[str, str], float]  # per question (task, id) what an answer is worth, from 0 to 1


def marks_of(answers: Sequence[Answer], method: str) -> Marks:
    """Per question, what a method's answer is worth."""
    return {(a.task, a.id): a.value for a in answers if a.method == method}


def summarize_run(
    answers: Sequence[Answer], tasks: Sequence[str], methods: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """For each way to answer that was measured, what `summarize_all` says; and the questions that failed."""
    result: dict[str, Any] = {}
    baseline: dict[str, float] = {}  # the receiver's better way, per column
    for way in WAYS:
        rows = {t: [a for a in answers if a.task == t and a.answers == way and a.method == "receiver"] for t in tasks}
        for task, own in rows.items():
            if own:
                baseline[task] = max(baseline.get(task, 0.0), accuracy(own, "receiver"))
    for way in WAYS:
        found = {t: [a for a in answers if a.task == t and a.answers == way] for t in tasks}
        found = {t: rows for t, rows in found.items() if rows}
        if found:
            measured = [m for m in methods if all(any(a.method == m for a in rows) for rows in found.values())]
            result[way] = summarize_all(found, measured, baseline, seed)
    if not result:
        raise C2CError("nothing was measured; give at least one question and one method that answers")
    result["failed"] = [
        {"task": a.task, "id": a.id, "method": a.method, "answers": a.answers, "error": a.error}
        for a in answers
        if a.error is not None
    ]
    return result


def summarize_all(
    found: Mapping[str, Sequence[Answer]],
    methods: Sequence[str],
    baseline: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Each task's summary; the average, in which every task counts alike; and all questions pooled.

    `baseline`: per task the receiver's accuracy from which the gap to the sharer is counted; its own without it.
    """
    known = baseline or {}
    tasks = {task: summarize(answers, methods, known.get(task), seed) for task, answers in found.items()}
    mean = {m: sum(accuracy(answers, m) for answers in found.values()) / len(found) for m in methods}
    average = {m: {"accuracy": round(value, 2)} for m, value in mean.items()}
    lowest = sum(known.get(t, mean.get("receiver", 0.0)) for t in found) / len(found) if known else None
    rows = [a for answers in found.values() for a in answers]
    sizes = {t: len({a.id for a in answers}) for t, answers in found.items()}
    every = sum(known.get(t, 0.0) * n for t, n in sizes.items()) / sum(sizes.values()) if known else None
    return {
        "tasks": tasks,
        AVERAGE: {**average, **effects(mean, lowest)},
        POOLED: summarize(rows, methods, every, seed, breakdown=False),
    }


def summarize(
    answers: Sequence[Answer],
    methods: Sequence[str],
    baseline: float | None = None,
    seed: int = 0,
    *,
    breakdown: bool = True,
) -> dict[str, Any]:
    """Accuracy with its 95% interval per method, what `effects` says, and C2C against every other method.

    Answers that are right or wrong have Wilson's interval, those with a score one by the bootstrap.
    `paired`: see `paired`. `subjects`, `buckets`: the same for parts of the questions, without their own parts.
    """
    marks = {m: marks_of(answers, m) for m in methods}
    result: dict[str, Any] = {}
    for method, own in marks.items():
        result[method] = _measured([a for a in answers if a.method == method], own, seed)
    if SKIP in methods:
        skipped = [bool(a.skipped) for a in answers if a.method == SKIP]
        result[SKIP]["skipped"] = round(100 * sum(skipped) / len(skipped), 2)
    for method in ROUTED:
        if method in methods and {"receiver", "sharer"} <= set(methods):
            result[method] |= _against_random(answers, method, seed)
    result |= effects({m: accuracy(answers, m) for m in methods}, baseline)
    if "off" in methods and "receiver" in methods:
        result["off_differs"] = sum(a != b for a, b in _both(marks["off"], marks["receiver"]))
    if "c2c" in methods:
        result["paired"] = {m: paired(marks["c2c"], marks[m], seed) for m in methods if m != "c2c"}
        if "receiver" in methods:
            against = result["paired"]["receiver"]
            result["rescued"], result["harmed"] = against["only_first"], against["only_second"]
            right = sum(mark == 1 for mark in marks["receiver"].values())
            result["harmed_share"] = round(100 * against["only_second"] / right, 2) if right else None
        if {"receiver", "sharer"} <= set(methods) and result.get("recovered") is not None:
            result["recovered_interval"] = _recovered_interval(marks, accuracy(answers, "receiver"), baseline, seed)
        if {"receiver", "other"} <= set(methods):
            result["gain_interval"] = result["paired"]["receiver"]["interval"]
            result["presence_interval"] = paired(marks["other"], marks["receiver"], seed)["interval"]
            result["content_interval"] = result["paired"]["other"]["interval"]
    for name in ("subject", "bucket") if breakdown else ():
        parts = dict.fromkeys(getattr(a, name) for a in answers)
        if len(parts) > 1:
            result[f"{name}s"] = {
                part or "": summarize(
                    [a for a in answers if getattr(a, name) == part], methods, None, seed, breakdown=False
                )
                for part in sorted(parts, key=str)
            }
    return result


def _measured(rows: Sequence[Answer], marks: Marks, seed: int) -> dict[str, Any]:
    """What there is to say of one method alone."""
    if not marks:
        raise C2CError("nothing was measured; give at least one question")
    values = np.array(list(marks.values()))
    if set(marks.values()) <= {0.0, 1.0}:
        low, high = wilson(int(values.sum()), len(values))
    else:
        low, high = bootstrap(len(values), lambda times: times @ values / len(values), seed)
    found: dict[str, Any] = {
        "questions": len(values),
        "accuracy": round(100 * _mean(rows), 2),
        "interval": [round(100 * low, 2), round(100 * high, 2)],
    }
    if failed := sum(a.error is not None for a in rows):
        found["failed"] = failed
    if tokens := [a.tokens for a in rows if a.tokens is not None]:
        found["tokens"] = median(tokens)
    if all(a.answers == GENERATION and a.score is None for a in rows):
        found["no_letter"] = sum(a.choice < 0 for a in rows)
    if messages := [a.message_tokens for a in rows if a.message_tokens is not None]:
        found["message_tokens"] = median(messages)
        found["message_bytes"] = median(len((a.message or "").encode()) for a in rows)
    return found


def _mean(rows: Sequence[Answer]) -> float:
    """The mean over questions; of LongBench, whose subjects are data sets, the mean over subjects of their means."""
    if rows and "longbench" in rows[0].task.lower():
        subjects: dict[str | None, list[float]] = {}
        for a in rows:
            subjects.setdefault(a.subject, []).append(a.value)
        return sum(sum(s) / len(s) for s in subjects.values()) / len(subjects)
    return sum(a.value for a in rows) / max(1, len(rows))


def accuracy(answers: Sequence[Answer], method: str) -> float:
    """In %."""
    return 100 * _mean([a for a in answers if a.method == method])


def _both(first: Mapping[Any, float], second: Mapping[Any, float]) -> list[tuple[float, float]]:
    return [(first[key], second[key]) for key in first if key in second]


def paired(first: Mapping[Any, float], second: Mapping[Any, float], seed: int = 0) -> dict[str, Any]:
    """How often either of two methods is better, on the questions that both answered, and McNemar's exact p; the mean
    difference in points, with its 95% interval by the bootstrap over questions.

    Of answers that are right or wrong the one that is better is the one that alone is right.
    """
    both = _both(first, second)
    if not both:
        raise C2CError("two methods have answered no question in common; nothing was measured")
    counts = sum(a > b for a, b in both), sum(a < b for a, b in both)
    differences = np.array([100 * (a - b) for a, b in both])
    interval = bootstrap(len(both), lambda times: times @ differences / len(both), seed)
    return {
        "only_first": counts[0],
        "only_second": counts[1],
        "p": float(f"{mcnemar(*counts):.3g}"),
        "difference": round(float(differences.mean()), 2),
        "interval": [round(x, 2) for x in interval],
    }


def _against_random(answers: Sequence[Answer], method: str, seed: int) -> dict[str, Any]:
    """How many questions a router sends to the sharer, and how it compares with sending as many at random."""
    rows = [a for a in answers if a.method == method]
    random = at_random(answers, method)
    differences = np.array([100 * (a.value - random[a.task, a.id]) for a in rows])
    interval = bootstrap(len(rows), lambda times: times @ differences / len(rows), seed)
    return {
        "sent": round(100 * sum(bool(a.sent) for a in rows) / len(rows), 2),
        "random": round(100 * sum(random.values()) / len(random), 2),
        "over_random": round(float(differences.mean()), 2),
        "over_random_interval": [round(x, 2) for x in interval],
    }


def _recovered_interval(
    marks: Mapping[str, Marks], receiver: float, baseline: float | None, seed: int
) -> list[float] | None:
    """The 95% interval of the recovered gap, in %; None where the sharer is so little better that a draw has no gap.
    What the better baseline has above the receiver is taken as certain."""
    keys = [k for k in marks["c2c"] if k in marks["receiver"] and k in marks["sharer"]]
    c2c, own, ceiling = (np.array([100 * marks[m][k] for k in keys]) for m in ("c2c", "receiver", "sharer"))
    above = max(0.0, (baseline or 0.0) - receiver)

    def gap(times: np.ndarray) -> Any:
        return times @ (ceiling - own) / len(keys) - above

    def share(times: np.ndarray) -> Any:
        return 100 * (times @ (c2c - own) / len(keys) - above) / gap(times)

    if gap(draws(len(keys), seed)).min() <= 0:
        return None
    return [round(x, 2) for x in bootstrap(len(keys), share, seed)]


def effects(accuracies: Mapping[str, float], baseline: float | None = None) -> dict[str, Any]:
    """What C2C gains, from accuracies in %, rounded. Only what the measured methods allow.

    gain: of C2C over the receiver, in points. It is the sum of
    presence: of C2C with another question's cache over the receiver, and
    content: of C2C over that.
    presence_share: presence in % of the gain; None where there is no gain.
    recovered: % of the gap between the receiver (by likelihood or in words, whichever is better: `baseline`) and the
        sharer that C2C closes; None where the sharer isn't better.
    """
    result: dict[str, Any] = {}
    if not {"receiver", "c2c"} <= accuracies.keys():
        return result
    receiver, c2c = accuracies["receiver"], accuracies["c2c"]
    result["gain"] = round(c2c - receiver, 2)
    if "other" in accuracies:
        result["presence"] = round(accuracies["other"] - receiver, 2)
        result["content"] = round(c2c - accuracies["other"], 2)
        result["presence_share"] = _percent(recovered(accuracies["other"], receiver, c2c))
    if "sharer" in accuracies:
        result["recovered"] = _percent(recovered(c2c, max(receiver, baseline or 0.0), accuracies["sharer"]))
    return result


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)
