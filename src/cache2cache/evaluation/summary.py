"""Figures of a run, from its rows: accuracies with intervals, paired comparisons, and where a gain comes from.

Methods may have been asked different numbers of questions (`limits`): whatever compares them is computed on the
questions that all of them were asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from ..errors import C2CError
from ..tasks.longbench import KINDS
from .answers import GENERATION, WAYS, Answer
from .asking import ROUTED, SKIP
from .routing import at_random
from .statistics import bootstrap, draws, mcnemar, recovered, wilson

AVERAGE, POOLED = "average", "pooled"
Question = tuple[str, str]  # task, id
Marks = Mapping[Question, float]  # what an answer is worth, from 0 to 1
Level = Callable[[Sequence[str]], dict[str, float]]  # accuracies of methods in %, on the questions all of them have


def marks_of(answers: Sequence[Answer], method: str) -> Marks:
    """Per question, what a method's answer is worth."""
    return {(a.task, a.id): a.value for a in answers if a.method == method}


def sets_of(answers: Sequence[Answer]) -> dict[Question, str]:
    """Per question its data set, where a mean is one over data sets, as LongBench's is: there a subject is a data set.
    Empty where every question counts alike."""
    subjects = {a.subject or "" for a in answers}
    if len({a.task for a in answers}) > 1 or not subjects <= KINDS.keys():
        return {}
    return {(a.task, a.id): a.subject or "" for a in answers}


class Mean:
    """A mean over questions, or over data sets of their means.

    Attributes:
        keys: the questions, those of a data set one behind the other.
        sizes: how many of each data set; of one, where all questions count alike.
        weights: (questions,) of each question in the mean.
    """

    def __init__(self, keys: Iterable[Question], sets: Mapping[Question, str]) -> None:
        self.keys = sorted(keys, key=lambda k: sets.get(k, ""))
        counts: dict[str, int] = {}
        for key in self.keys:
            counts[sets.get(key, "")] = counts.get(sets.get(key, ""), 0) + 1
        self.sizes = tuple(counts.values())
        self.weights = np.array([1 / (len(counts) * counts[sets.get(key, "")]) for key in self.keys])

    def values(self, marks: Marks) -> np.ndarray:
        """In %."""
        return np.array([100 * marks[key] for key in self.keys])

    def of(self, marks: Marks) -> float:
        """In %."""
        return float(self.weights @ self.values(marks))

    def interval(self, values: np.ndarray, seed: int) -> list[float]:
        """Of the mean of `values`, 95% by the bootstrap, within each data set."""
        weighted = self.weights * values
        return [round(x, 2) for x in bootstrap(self.sizes, lambda times: times @ weighted, seed)]


def summarize_run(
    answers: Sequence[Answer], tasks: Sequence[str], methods: Sequence[str], seed: int = 0
) -> dict[str, Any]:
    """For each way to answer that was measured, what `summarize_all` says; and the questions that failed."""
    result: dict[str, Any] = {}
    best = {task: better_way(answers, task) for task in tasks}
    for way in WAYS:
        found = {t: [a for a in answers if a.task == t and a.answers == way] for t in tasks}
        found = {t: rows for t, rows in found.items() if any(a.method in methods for a in rows)}
        if found:
            result[way] = summarize_all(found, methods, best, seed)
    if not result:
        raise C2CError("nothing was measured; give at least one question and one method that answers")
    result["failed"] = [
        {"task": a.task, "id": a.id, "method": a.method, "answers": a.answers, "error": a.error}
        for a in answers
        if a.error is not None
    ]
    return result


def better_way(answers: Sequence[Answer], task: str) -> Marks:
    """The receiver's marks in whichever of its two ways to answer is better, of those that answer every question."""
    own = [[a for a in answers if a.task == task and a.answers == w and a.method == "receiver"] for w in WAYS]
    ways = [rows for rows in own if rows and len(rows) == max(map(len, own))]
    marks = [marks_of(rows, "receiver") for rows in ways]
    means = [Mean(m, sets_of(rows)).of(m) for m, rows in zip(marks, ways, strict=True)]
    return marks[means.index(max(means))] if marks else {}


def summarize_all(
    found: Mapping[str, Sequence[Answer]],
    methods: Sequence[str],
    best: Mapping[str, Marks] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Each task's summary; the average, in which every task counts alike; and all questions pooled, each alike.

    The average and the pool have the methods that every task has. `best`: per task the receiver's marks from which the
    gap to the sharer is counted, where they are better than its own.
    """
    known = best or {}
    columns = {task: Column(rows, methods, known.get(task)) for task, rows in found.items()}
    tasks = {task: summarize(rows, methods, known.get(task), seed) for task, rows in found.items()}
    everywhere = [m for m in methods if all(c.marks.get(m) for c in columns.values())]

    def level(names: Sequence[str]) -> dict[str, float]:
        each = [column.level(names) for column in columns.values()]
        return {name: sum(one[name] for one in each) / len(each) for name in each[0]} if all(each) else {}

    average: dict[str, Any] = {}
    for method in everywhere:
        average[method] = {
            "questions": sum(t[method]["questions"] for t in tasks.values()),
            "accuracy": round(level([method])[method], 2),
        }
        if failed := sum(t[method].get("failed", 0) for t in tasks.values()):
            average[method]["failed"] = failed
    rows = [a for some in found.values() for a in some]
    pool = {key: mark for marks in known.values() for key, mark in marks.items()}
    return {
        "tasks": tasks,
        AVERAGE: {**average, **effects(level, everywhere)},
        POOLED: summarize(rows, everywhere, pool, seed, breakdown=False),
    }


BEST = "the receiver's better way"


class Column:
    """The marks of all methods on one set of questions."""

    def __init__(self, answers: Sequence[Answer], methods: Sequence[str], best: Marks | None = None) -> None:
        self.sets = sets_of(answers)
        self.marks = {m: marks for m in methods if (marks := marks_of(answers, m))}
        if best and best.keys() >= self.marks.get("receiver", {}).keys():
            self.marks[BEST] = best

    def common(self, methods: Sequence[str]) -> Mean:
        """The questions that all of the methods have."""
        keys = [k for k in self.marks[methods[0]] if all(k in self.marks[m] for m in methods)]
        return Mean(keys, self.sets)

    def level(self, methods: Sequence[str]) -> dict[str, float]:
        """See `Level`; with the receiver also BEST, its better way, of which there may be only the one."""
        mean = self.common(methods)
        found = {m: mean.of(self.marks[m]) for m in methods} if mean.keys else {}
        if "receiver" in found:
            found[BEST] = max(found["receiver"], mean.of(self.marks.get(BEST, self.marks["receiver"])))
        return found


def summarize(
    answers: Sequence[Answer],
    methods: Sequence[str],
    best: Marks | None = None,
    seed: int = 0,
    *,
    breakdown: bool = True,
) -> dict[str, Any]:
    """Accuracy with its 95% interval per method, what `effects` says, and C2C against every other method.

    Answers that are right or wrong have Wilson's interval, those with a score one by the bootstrap. Only methods that
    were asked some of these questions are in it.
    `paired`: see `paired`. `subjects`, `buckets`: the same for parts of the questions, without their own parts.
    """
    column = Column(answers, methods, best)
    methods = [m for m in methods if m in column.marks]
    if not methods:
        raise C2CError("nothing was measured; give at least one question")
    graded = any(a.graded for a in answers)
    result: dict[str, Any] = {}
    for method in methods:
        result[method] = _measured([a for a in answers if a.method == method], column, method, graded, seed)
    if SKIP in methods:
        skipped = [bool(a.skipped) for a in answers if a.method == SKIP]
        result[SKIP]["skipped"] = round(100 * sum(skipped) / len(skipped), 2)
    for method in ROUTED:
        if method in methods and {"receiver", "sharer"} <= set(methods):
            result[method] |= _against_random(answers, column, method, seed)
    result |= effects(column.level, methods)
    if "presence" in result and (few := len(column.common(["c2c", "receiver", "other"]).keys)) < len(
        column.common(["c2c", "receiver"]).keys
    ):
        result["parts_of"] = few
    if {"off", "receiver"} <= set(methods):
        result["off_differs"] = _differ(answers)
    if "c2c" in methods:
        result["paired"] = {
            m: paired(column.marks["c2c"], column.marks[m], seed, graded=graded, sets=column.sets)
            for m in methods
            if m != "c2c" and column.common(["c2c", m]).keys
        }
        result |= _intervals(column, result, graded, seed)
    for name in ("subject", "bucket") if breakdown else ():
        parts = dict.fromkeys(getattr(a, name) for a in answers)
        if len(parts) > 1:
            result[f"{name}s"] = {}
            for part in sorted(parts, key=str):
                rows = [a for a in answers if getattr(a, name) == part]
                keys = {(a.task, a.id) for a in rows}
                own = {key: mark for key, mark in (best or {}).items() if key in keys}
                result[f"{name}s"][part or ""] = summarize(rows, methods, own, seed, breakdown=False)
    return result


def _measured(rows: Sequence[Answer], column: Column, method: str, graded: bool, seed: int) -> dict[str, Any]:
    """What there is to say of one method alone."""
    mean, marks = column.common([method]), column.marks[method]
    if graded:
        interval = mean.interval(mean.values(marks), seed)
    else:
        interval = [round(100 * x, 2) for x in wilson(sum(mark == 1 for mark in marks.values()), len(marks))]
    found: dict[str, Any] = {"questions": len(marks), "accuracy": round(mean.of(marks), 2), "interval": interval}
    if failed := sum(a.error is not None for a in rows):
        found["failed"] = failed
    if tokens := [a.tokens for a in rows if a.tokens is not None]:
        found["tokens"] = median(tokens)
    if all(a.answers == GENERATION and a.score is None for a in rows):
        found["no_letter"] = sum(a.choice < 0 for a in rows)
    if messages := [a for a in rows if a.message_tokens is not None]:
        found["message_tokens"] = median(a.message_tokens or 0 for a in messages)
        if sizes := [a.message_bytes for a in messages if a.message_bytes is not None]:
            found["message_bytes"] = median(sizes)
    return found


def _differ(answers: Sequence[Answer]) -> int:
    """How many answers with fusion off are others than the receiver's. Likelihoods may differ by the rounding of sums,
    as of a question that was asked again by itself."""
    own = {(a.task, a.id, a.answers): a for a in answers if a.method == "receiver"}
    pairs = [(a, own[key]) for a in answers if a.method == "off" and (key := (a.task, a.id, a.answers)) in own]
    return sum(
        one.text != two.text
        or len(one.logprobs) != len(two.logprobs)
        or any(abs(x - y) > ROUNDING for x, y in zip(one.logprobs, two.logprobs, strict=True))
        for one, two in pairs
        if one.error is None and two.error is None
    )


ROUNDING = 0.05


def paired(
    first: Mapping[Any, float],
    second: Mapping[Any, float],
    seed: int = 0,
    *,
    graded: bool = False,
    sets: Mapping[Any, str] | None = None,
) -> dict[str, Any]:
    """Two methods on the questions that both answered: the mean difference in points, with its 95% interval by the
    bootstrap over questions (within each of `sets`, whose means are then averaged), and

    only_first, only_second, p: of answers that are right or wrong, how many only one of them has right, and McNemar's
        exact p;
    better, worse: of `graded` ones, whose scores may be anything from 0 to 1, how often the first has the higher, and
        the lower score. McNemar's test is for right and wrong, so there is none.
    """
    mean = Mean([k for k in first if k in second], sets or {})
    if not mean.keys:
        raise C2CError("two methods have no question in common; ask both of them the same ones")
    differences = mean.values(first) - mean.values(second)
    counts = int((differences > 0).sum()), int((differences < 0).sum())
    if graded:
        found: dict[str, Any] = {"better": counts[0], "worse": counts[1]}
    else:
        found = {"only_first": counts[0], "only_second": counts[1], "p": float(f"{mcnemar(*counts):.3g}")}
    return {
        "questions": len(mean.keys),
        **found,
        "difference": round(float(mean.weights @ differences), 2),
        "interval": mean.interval(differences, seed),
    }


def _intervals(column: Column, result: Mapping[str, Any], graded: bool, seed: int) -> dict[str, Any]:
    """Intervals of the effects, and, of answers that are right or wrong, how many C2C rescues and harms."""
    found: dict[str, Any] = {}
    if "receiver" not in result["paired"]:
        return found
    against = result["paired"]["receiver"]
    if not graded:
        found["rescued"], found["harmed"] = against["only_first"], against["only_second"]
        both = column.common(["c2c", "receiver"])
        right = sum(column.marks["receiver"][key] == 1 for key in both.keys)
        found["harmed_share"] = round(100 * against["only_second"] / right, 2) if right else None
    if result.get("recovered") is not None:
        found["recovered_interval"] = _recovered_interval(column, seed)
    found["gain_interval"] = against["interval"]
    if "presence" in result:
        mean = column.common(["c2c", "receiver", "other"])
        c2c, own, other = (mean.values(column.marks[m]) for m in ("c2c", "receiver", "other"))
        found["presence_interval"] = mean.interval(other - own, seed)
        found["content_interval"] = mean.interval(c2c - other, seed)
    return found


def _against_random(answers: Sequence[Answer], column: Column, method: str, seed: int) -> dict[str, Any]:
    """How many questions a router sends to the sharer, and how it compares with sending as many at random."""
    rows = [a for a in answers if a.method == method]
    random, mean = at_random(answers, method), column.common([method])
    differences = mean.values(column.marks[method]) - mean.values(random)
    return {
        "sent": round(100 * sum(bool(a.sent) for a in rows) / len(rows), 2),
        "random": round(mean.of(random), 2),
        "over_random": round(float(mean.weights @ differences), 2),
        "over_random_interval": mean.interval(differences, seed),
    }


def _recovered_interval(column: Column, seed: int) -> list[float] | None:
    """The 95% interval of the recovered gap, in %; None where the sharer is so little better that a draw has no gap."""
    mean = column.common(["receiver", "sharer", "c2c"])
    own = column.marks["receiver"]
    if BEST in column.marks and mean.of(column.marks[BEST]) > mean.of(own):
        own = column.marks[BEST]
    c2c, low, high = (mean.values(marks) for marks in (column.marks["c2c"], own, column.marks["sharer"]))
    gap, closed = mean.weights * (high - low), mean.weights * (c2c - low)
    if min(float((times @ gap).min()) for times in draws(mean.sizes, seed)) <= 0:
        return None
    found = bootstrap(mean.sizes, lambda times: 100 * (times @ closed) / (times @ gap), seed)
    return [round(x, 2) for x in found]


def effects(level: Level, methods: Sequence[str]) -> dict[str, Any]:
    """What C2C gains, in points, rounded. Only what the measured methods allow, each on the questions that all methods
    it compares were asked.

    gain: of C2C over the receiver. On the questions that the control was asked too (`parts_of`, where these are fewer)
        it is the sum of
    presence: of C2C with another question's cache over the receiver, and
    content: of C2C over that.
    presence_share: presence in % of the gain; None where there is no gain.
    recovered: % of the gap between the receiver (by likelihood or in words, whichever is better) and the sharer that
        C2C closes; None where the sharer isn't better.
    """
    result: dict[str, Any] = {}
    if not {"receiver", "c2c"} <= set(methods):
        return result
    if at := level(["c2c", "receiver"]):
        result["gain"] = round(at["c2c"] - at["receiver"], 2)
    if "other" in methods and (at := level(["c2c", "receiver", "other"])):
        result["presence"] = round(at["other"] - at["receiver"], 2)
        result["content"] = round(at["c2c"] - at["other"], 2)
        result["presence_share"] = _percent(recovered(at["other"], at["receiver"], at["c2c"]))
    if "sharer" in methods and (at := level(["c2c", "receiver", "sharer"])):
        result["recovered"] = _percent(recovered(at["c2c"], at[BEST], at["sharer"]))
    return result


def _percent(share: float | None) -> float | None:
    return None if share is None else round(100 * share, 2)
