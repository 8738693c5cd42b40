"""A row of samples.jsonl: one method's answer to one question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ..errors import C2CError
from ..tasks.metrics import RIGHT_OR_WRONG
from .writing import read_rows

LIKELIHOOD, GENERATION = "likelihood", "generation"
WAYS = (LIKELIHOOD, GENERATION)

# The files of a run's folder.
SAMPLES, SUMMARY, SETTINGS, QUESTIONS = "samples.jsonl", "summary.json", "settings.json", "questions.jsonl"
ROUTED_ROWS, ROUTER, ROUTER_ROWS, TIMES = "routed.jsonl", "router.json", "router-samples.jsonl", "timing.jsonl"
TASK = "task "  # begins the key of settings.json that says what a task's questions are


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run's folder, or its published results, were asked with.

    Raises:
        C2CError: it is neither.
    """
    for path in (folder / SETTINGS, folder / SUMMARY):
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            return dict(found["settings"] if path.name == SUMMARY else found)
    raise C2CError(f"{folder} holds no evaluation; expected the output folder of c2c evaluate, or its --results")


def split_of(settings: Mapping[str, Any], task: str) -> Any:
    """The split that a task's questions are of."""
    return settings.get(TASK + task, {}).get("split", settings.get("split"))


@dataclass(frozen=True)
class Answer:
    """One method's answer to one question.

    Attributes:
        choice: the index of the chosen option; -1 where an answer in words names none, and without options.
        correct: whether it is right; with reference answers whether its score is 1.
        logprobs: the options' letters' log-likelihoods; empty where the answer is in words.
        confidence: the receiver's own (`decode.confidence`), in its rows: what `c2c calibrate` reads.
        skipped: whether the sharer was skipped, in the rows of the method skip.
        text: what was answered in words.
        answers: likelihood or generation.
        subject, bucket: of the question: what results are broken down by.
        score: from 0 to 1, of an answer scored against references, and
        metric: by what it is.
        message: what the sharer wrote to the receiver.
        tokens, message_tokens: written, without the one that ends a text.
        message_bytes: of the message, which what is published leaves out.
        partner: whose cache was fused instead, in the rows of the control other.
        sent: whether a router sent the question to the sharer.
        asked: what was asked, as a hash of its text: a question that was changed is another one, and asked again.
        error: why there is no answer, which counts as a wrong one.
    """

    task: str
    prompt: str
    id: str
    method: str
    choice: int
    correct: bool
    logprobs: list[float]
    confidence: float | None = None
    skipped: bool | None = None
    text: str | None = None
    answers: str = LIKELIHOOD
    subject: str | None = None
    bucket: str | None = None
    score: float | None = None
    message: str | None = None
    tokens: int | None = None
    message_tokens: int | None = None
    message_bytes: int | None = None
    partner: str | None = None
    sent: bool | None = None
    metric: str | None = None
    asked: str | None = None
    error: str | None = None

    @property
    def value(self) -> float:
        """What it is worth, from 0 to 1."""
        return float(self.correct) if self.score is None else self.score

    @property
    def graded(self) -> bool:
        """Whether it may be right in part: then tests that count right answers don't apply. Rows of earlier versions
        don't name their metric."""
        if self.score is None or self.metric is None:
            return self.score not in (None, 0, 1)
        return self.metric not in RIGHT_OR_WRONG

    @property
    def key(self) -> Key:
        return self.task, self.prompt, self.id, self.method, self.answers


Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Asked:
    """A question as a report shows it."""

    task: str
    id: str
    prompt: str
    answer: str


def read_answers(samples: Path) -> list[Answer]:
    """The rows of a samples file, see `read_rows`."""
    return read_rows(samples, _answer)


def read_asked(folder: Path) -> tuple[list[Answer], dict[tuple[str, str], Asked]]:
    """The answers in a run's folder, or in its published results, to the questions that it was last asked, and these as
    far as they are there: a folder may hold answers to more from before."""
    answers = [a for name in (SAMPLES, ROUTED_ROWS) for a in read_answers(folder / name)]
    asked = {(q.task, q.id): q for q in read_rows(folder / QUESTIONS, Asked)}
    return [a for a in answers if not asked or (a.task, a.id) in asked], asked


def _answer(**row: Any) -> Answer:
    """A row as it is, or one of earlier versions, where a method's name said that the answer is in words."""
    if row.get("method") == "receiver-generate":
        row |= {"method": "receiver", "answers": GENERATION}
    elif row.get("method") == "text" and "answers" not in row:
        row["message"] = row.pop("text", None)
    if row.get("message") is not None:
        row.setdefault("message_bytes", len(row["message"].encode()))
    return Answer(**row)


class Named(Protocol):
    @property
    def id(self) -> str: ...


Some = TypeVar("Some", bound=Named)


def drawn(questions: Sequence[Some], limit: int | None, seed: int) -> list[Some]:
    """At most that many of the questions, in their order; a smaller limit draws from the same ones.

    By the hash of seed and id, so that a draw depends on no other question.
    """
    ranked = sorted(questions, key=lambda q: hashlib.sha256(f"{seed}:{q.id}".encode()).digest())
    chosen = {q.id for q in ranked[:limit]}
    return [q for q in questions if q.id in chosen]
