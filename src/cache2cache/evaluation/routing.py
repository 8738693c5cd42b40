"""Query-level routing: each question goes to the receiver or to the sharer as a whole.

Two routers. A learned one, a regression on a cheap embedding of the question (the mean of the receiver's input
embeddings), fitted on questions of a train split that one of the two models alone answers right; and one that needs no
training: what the receiver is least confident about goes to the sharer. Both send the same share of a set's questions,
those that rank highest, as the paper's router sends the top half. What sending that share at random would give is
computed, not sampled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import C2CError
from ..files import replace_text
from ..models.load import LM
from .answers import LIKELIHOOD, Answer

LEARNED = "route"
DIRECTIONS = 64  # of the embeddings, the rest being noise to some hundreds of examples


@dataclass(frozen=True)
class Router:
    """The chance that the sharer, and not the receiver, is the one that is right: sigmoid(weight · (x - mean) + bias).

    Attributes:
        weight, mean: (D,) float64.
        examples: what it was fitted on: question ids, those the sharer alone answers right first.
    """

    weight: Tensor
    mean: Tensor
    bias: float
    examples: tuple[list[str], list[str]]

    def score(self, embeddings: Tensor) -> list[float]:
        """Per question (N, D), the higher the more for the sharer."""
        scores: list[float] = ((embeddings.double() - self.mean) @ self.weight + self.bias).tolist()
        return scores

    def save(self, path: Path) -> None:
        replace_text(
            path,
            json.dumps(
                {
                    "weight": self.weight.tolist(),
                    "mean": self.mean.tolist(),
                    "bias": self.bias,
                    "sharer_alone_right": self.examples[0],
                    "receiver_alone_right": self.examples[1],
                }
            )
            + "\n",
        )

    @property
    def hash(self) -> str:
        """What tells one fit from another."""
        return hashlib.sha256(repr((self.weight.tolist(), self.bias)).encode()).hexdigest()


@torch.no_grad()
def embed(lm: LM, texts: Sequence[str]) -> Tensor:
    """The mean of a model's input embeddings over each text's tokens, (N, D) float64 on the CPU."""
    tokenizer, table = lm.need_tokenizer(), lm.model.get_input_embeddings()
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] or [lm.pad_token_id]
        rows.append(table(torch.tensor(ids, device=lm.device)).double().mean(0).cpu())
    return torch.stack(rows)


def fit(
    embeddings: Tensor, sharer: Sequence[bool], receiver: Sequence[bool], ids: Sequence[str], penalty: float
) -> Router:
    """A logistic regression on the questions that one of the two alone answers right.

    The inputs are whitened first: in units of the deviation along each of the first principal directions of all
    questions. The loss is the mean over the examples and half the `penalty` times the squared weights.
    """
    apart = [n for n, (s, r) in enumerate(zip(sharer, receiver, strict=True)) if s != r]
    target = torch.tensor([float(sharer[n]) for n in apart], dtype=torch.float64)
    examples = [ids[n] for n in apart if sharer[n]], [ids[n] for n in apart if not sharer[n]]
    if not (examples[0] and examples[1]):
        raise C2CError(
            f"a router learns from questions that one model alone answers right; of {len(ids)} the sharer has "
            f"{len(examples[0])} and the receiver {len(examples[1])}: raise router.limit, or leave the method route out"
        )
    mean = embeddings.double().mean(0)
    centred = embeddings.double() - mean
    _, deviations, directions = torch.linalg.svd(centred / max(1, len(ids) - 1) ** 0.5, full_matrices=False)
    kept = (deviations > 1e-6 * deviations.max().clamp(min=1e-300)) & (torch.arange(len(deviations)) < DIRECTIONS)
    whiten = directions[kept].T / deviations[kept]  # (D, K)
    inputs = (centred @ whiten)[apart]
    weight = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def loss() -> Tensor:
        solver.zero_grad()
        logits = inputs @ weight[:-1] + weight[-1]
        wrong = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        total: Tensor = wrong + penalty / 2 * weight[:-1].square().sum()
        total.backward()
        return total

    solver.step(loss)
    found = weight.detach()
    return Router(whiten @ found[:-1], mean, float(found[-1]), examples)


def routed(
    answers: Sequence[Answer], method: str, share: float, scores: Mapping[str, float] | None = None
) -> list[Answer]:
    """Each question answered by the sharer, if it is among the `share` that ranks highest, or by the receiver.

    Args:
        answers: of receiver and sharer, in one way, to the questions of one set.
        method: `route`, which ranks by `scores` (per id), or `route-confidence`, which ranks by the receiver's
            confidence, the lowest first.
        share: of the questions, rounded to a whole number of them.
    """
    receiver = {a.id: a for a in answers if a.method == "receiver"}
    sharer = {a.id: a for a in answers if a.method == "sharer"}
    both = [i for i in receiver if i in sharer]
    if scores is None:
        # A failed question has no confidence: the sharer may have it.
        scores = {i: -(c if (c := receiver[i].confidence) is not None else 0.0) for i in both}
    ranked = sorted(both, key=lambda i: (-scores[i], i))
    sent = set(ranked[: round(share * len(both))])
    return [
        replace((sharer if i in sent else receiver)[i], method=method, sent=i in sent, confidence=None) for i in both
    ]


def with_confidence(answers: Sequence[Answer]) -> list[Answer]:
    """The receiver's answers in words with its confidence in an option, where it was asked for one: how sure it is of
    the first word of an answer says nothing of the answer."""
    sure = {(a.task, a.id): a.confidence for a in answers if a.method == "receiver" and a.answers == LIKELIHOOD}
    return [
        replace(a, confidence=sure.get((a.task, a.id), a.confidence)) if a.method == "receiver" else a for a in answers
    ]


def at_random(answers: Sequence[Answer], method: str) -> dict[tuple[str, str], float]:
    """Per question (task, id), what sending it to the sharer with the chance that the router does is worth."""
    value = {m: {(a.task, a.id): a.value for a in answers if a.method == m} for m in ("receiver", "sharer")}
    rows = [a for a in answers if a.method == method]
    tasks = {a.task for a in rows}
    share = {t: sum(bool(a.sent) for a in rows if a.task == t) / sum(a.task == t for a in rows) for t in tasks}
    return {
        (a.task, a.id): share[a.task] * value["sharer"][a.task, a.id]
        + (1 - share[a.task]) * value["receiver"][a.task, a.id]
        for a in rows
    }


def record(router: Router, share: float, penalty: float) -> dict[str, Any]:
    """What the settings of a run say of its router."""
    return {
        "hash": router.hash,
        "share": share,
        "penalty": penalty,
        "examples": sum(map(len, router.examples)),
    }
