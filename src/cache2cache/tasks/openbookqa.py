"""OpenBookQA: elementary science that takes a fact and a step of reasoning (Mihaylov et al., 2018)."""

from __future__ import annotations

from pathlib import Path

from cache2cache.tasks.base import Question, read_rows


def load(split: str, data_dir: Path | None) -> list[Question]:
    """Configuration `main`: train, validation, test."""
    return [
        Question(
            id=row["id"],
            question=row["question_stem"],
            options=tuple(row["choices"]["text"]),
            answer=row["choices"]["label"].index(row["answerKey"]),
        )
        for row in read_rows("allenai/openbookqa", "main", split, data_dir)
    ]
