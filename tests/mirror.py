"""A small mirror of the data sets that recipes name, with rows of our own in their layouts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SETS = {
    "arc-easy": "allenai/ai2_arc/ARC-Easy",
    "arc-challenge": "allenai/ai2_arc/ARC-Challenge",
    "openbookqa": "allenai/openbookqa/main",
    "commonsenseqa": "tau/commonsense_qa/default",
    "mmlu": "cais/mmlu/all",
    "mmlu-redux": "edinburgh-dawg/mmlu-redux-2.0/anatomy",
    "c-eval": "ceval/ceval-exam/logic",
}


def mirror(folder: Path, sources: Iterable[Mapping[str, Any]], count: int, start: int = 0) -> Path:
    """`count` rows of every source of a recipe, as it stands in YAML; with another start they are other rows."""
    for source in sources:
        split = source.get("split", "train")
        if task := source.get("task"):
            rows = [question(task, f"{split}-{i}", i) for i in range(start, start + count)]
            write_rows(folder / SETS[task] / f"{split}.jsonl.gz", rows)
        elif name := source.get("rows"):
            config = name if name.count("/") == 2 else f"{name}/default"
            write_rows(folder / config / f"{split}.jsonl.gz", [instruction(name, i) for i in range(count)])
    return folder


def question(task: str, name: str, i: int) -> dict[str, Any]:
    options = [str(i + (k - i) % 4 + 1) for k in range(4)]
    asked, right = f"What is {i} plus 1 ({task})?", options.index(str(i + 1))
    if task == "mmlu":
        return {"question": asked, "choices": options, "answer": right, "subject": "anatomy"}
    if task == "mmlu-redux":
        return {"question": asked, "choices": options, "answer": right, "error_type": "ok", "correct_answer": None}
    if task == "c-eval":
        return {"id": i, "question": asked, **dict(zip("ABCD", options, strict=True)), "answer": "ABCD"[right]}
    return {
        "id": f"made-up-{name}",
        "question_stem" if task == "openbookqa" else "question": asked,
        "choices": {"text": options, "label": list("ABCD")},
        "answerKey": "ABCD"[right],
    }


def instruction(name: str, i: int) -> dict[str, Any]:
    asked, answer = f"What is {i} plus 2?", f"It is {i + 2}."
    if "LongBench" in name:
        _, _, config = name.split("/")
        return {"_id": f"{i:024x}", "context": "1 2 3 " * i, "input": asked, "answers": [answer], "dataset": config}
    if "gsm8k" in name:
        return {"question": asked, "answer": answer}
    if "OpenHermes" in name or "t0-mix" in name:
        return {"id": None, "conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}
    return {"instruction": asked, "context": "", "response": answer, "category": "open_qa"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
