"""The same questions by our own evaluation and through our model of the lm-evaluation-harness, one by one.

    python benchmarks/adapter.py --data-dir data --limit 20
    python benchmarks/adapter.py --data-dir data --task arc-easy

Prints for the receiver and for C2C the accuracy of both, how many questions got another answer, and the largest
difference between two log-likelihoods of a letter. Ends with status 1 where an answer differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from lm_eval import evaluator, simple_evaluate
from lm_eval.tasks import TaskManager

from cache2cache import C2C, heap, tasks
from cache2cache.evaluation.answers import drawn
from cache2cache.evaluation.lm_eval import HarnessLM, task_of
from cache2cache.evaluation.runner import evaluate


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
    given = parser.parse_args()
    heap.keep()  # as our commands do
    questions = drawn(tasks.load(given.task, given.split, given.data_dir), given.limit, 0)
    pair = C2C.from_pretrained(given.fuser, receiver=given.receiver, sharers=given.sharer, dtype=given.dtype)
    evaluator.add_env_info = lambda results: None  # what is installed, which takes it longer than a few questions
    different = 0
    with tempfile.TemporaryDirectory() as work:
        for method in ("receiver", "c2c"):
            samples = Path(work) / f"{method}.jsonl"
            ours = evaluate(pair, given.task, questions, samples, methods=[method], batch_size=given.batch_size)
            mine = {a.id: a for a in ours}
            model = HarnessLM(pair, method=method, batch_size=given.batch_size)
            found = simple_evaluate(
                model, tasks=[task_of(questions)], task_manager=TaskManager(include_defaults=False),
                apply_chat_template=True, bootstrap_iters=0,
            )  # fmt: skip
            assert found is not None
            rows = {row["doc"]["id"]: row for row in found["samples"]["own"]}
            assert rows.keys() == mine.keys()
            apart = sum(row["acc"] != mine[name].correct for name, row in rows.items())
            largest = max(
                abs(theirs - own)
                for name, row in rows.items()
                for (theirs, _), own in zip(row["filtered_resps"], mine[name].logprobs, strict=True)
            )
            accuracy = 100 * sum(a.correct for a in ours) / len(ours)
            print(
                f"{method}, {given.task} ({len(rows)}): ours {accuracy:.2f}%, harness "
                f"{100 * found['results']['own']['acc,none']:.2f}%, answers that differ {apart}, "
                f"log-likelihoods by at most {largest:.1e}"
            )
            different += apart
    sys.exit(different > 0)


if __name__ == "__main__":
    main()
