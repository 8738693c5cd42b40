"""The same questions by our own evaluation and through our model of the lm-evaluation-harness, one by one.

    python benchmarks/adapter.py --data-dir data --limit 20
    python benchmarks/adapter.py --data-dir data --task arc-easy --output runs/adapter

Prints for the receiver and for C2C the accuracy of both, how many questions got another answer, and the largest
difference between two log-likelihoods of a letter. Ends with status 1 where an answer differs. What is answered stands
in the folder --output, and a run that was interrupted goes on from there; give another run another folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import evaluator, simple_evaluate
from lm_eval.tasks import TaskManager

from cache2cache import C2C, heap, tasks
from cache2cache.evaluation.answers import drawn
from cache2cache.evaluation.lm_eval import HarnessLM, task_of
from cache2cache.evaluation.runner import evaluate
from cache2cache.files import replace_text
from cache2cache.tasks import Question

PART = 96  # questions that the harness is asked before their rows are written


def harness_rows(model: HarnessLM, questions: Sequence[Question], file: Path) -> dict[str, dict[str, Any]]:
    """What the harness finds of each question, by id: acc, and the log-likelihoods of the letters."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {row["id"]: row for row in rows}
    left = [q for q in questions if q.id not in known]
    for begin in range(0, len(left), PART):
        found = simple_evaluate(
            model, tasks=[task_of(left[begin : begin + PART])], task_manager=TaskManager(include_defaults=False),
            apply_chat_template=True, bootstrap_iters=0,
        )  # fmt: skip
        assert found is not None
        more = {
            row["doc"]["id"]: {
                "id": row["doc"]["id"], "acc": row["acc"], "logprobs": [value for value, _ in row["filtered_resps"]],
            }
            for row in found["samples"]["own"]
        }  # fmt: skip
        known |= more
        replace_text(file, "".join(json.dumps(row) + "\n" for row in known.values()))
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", help="folder or hub id; otherwise the packaged one")
    parser.add_argument("--receiver")
    parser.add_argument("--sharer")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--task", default="arc-easy")
    parser.add_argument("--split", default="validation")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, help="folder of the answers, which an interrupted run goes on from")
    given = parser.parse_args()
    heap.keep()  # as our commands do
    questions = drawn(tasks.load(given.task, given.split, given.data_dir), given.limit, 0)
    pair = C2C.from_pretrained(given.fuser, receiver=given.receiver, sharers=given.sharer, dtype=given.dtype)
    evaluator.add_env_info = lambda results: None  # what is installed, which takes it longer than a few questions
    different = 0
    with contextlib.ExitStack() as stack:
        work = given.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for method in ("receiver", "c2c"):
            samples = work / f"{method}.jsonl"
            ours = evaluate(pair, given.task, questions, samples, methods=[method], batch_size=given.batch_size)
            model = HarnessLM(pair, method=method, batch_size=given.batch_size)
            rows = harness_rows(model, questions, work / f"harness-{method}.jsonl")
            mine = {a.id: a for a in ours}
            assert rows.keys() == mine.keys()
            apart = sum(row["acc"] != mine[name].correct for name, row in rows.items())
            largest = max(
                abs(theirs - own)
                for name, row in rows.items()
                for theirs, own in zip(row["logprobs"], mine[name].logprobs, strict=True)
            )
            print(
                f"{method}, {given.task} ({len(rows)}): ours {100 * sum(a.correct for a in ours) / len(ours):.2f}%, "
                f"harness {100 * sum(row['acc'] for row in rows.values()) / len(rows):.2f}%, answers that differ "
                f"{apart}, log-likelihoods by at most {largest:.1e}",
                flush=True,
            )
            different += apart
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
