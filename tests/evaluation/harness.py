"""Questions put through the lm-evaluation-harness, and compared with our own scoring."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from cache2cache import C2C
from cache2cache.evaluation import runner
from cache2cache.evaluation.lm_eval import HarnessLM, task_of
from cache2cache.tasks import Question

own_tasks_only = partial(TaskManager, include_defaults=False)


def run_task(
    model: HarnessLM | str, questions: Sequence[Question], task: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    settings = {"apply_chat_template": True, "bootstrap_iters": 0, "task_manager": own_tasks_only(), **options}
    found = simple_evaluate(model=model, tasks=[task_of(questions) | (task or {})], **settings)
    assert found is not None
    return dict(found)


def compare(pair: C2C, questions: Sequence[Question], folder: Path, methods: Sequence[str], tolerance: float) -> None:
    """Sample by sample: the letters' log-likelihoods, whether the answer is right, and the accuracy."""
    ours = runner.evaluate(pair, "own", questions, folder / "samples.jsonl", methods=methods, batch_size=4)
    for method in methods:
        mine = {a.id: a for a in ours if a.method == method}
        found = run_task(HarnessLM(pair, method=method, batch_size=5), questions)  # type: ignore[arg-type]
        samples = {row["doc"]["id"]: row for row in found["samples"]["own"]}
        assert samples.keys() == mine.keys()
        for name, row in samples.items():
            logprobs = [logprob for logprob, _ in row["filtered_resps"]]
            assert logprobs == pytest.approx(mine[name].logprobs, abs=tolerance), (method, name)
            assert row["acc"] == mine[name].correct, (method, name)
        assert found["results"]["own"]["acc,none"] == sum(a.correct for a in mine.values()) / len(mine)
