"""ARC, easy and challenge: science questions of school exams (Clark et al., 2018; allenai/ai2_arc)."""

from __future__ import annotations

from pathlib import Path

from cache2cache.tasks.base import Question, read_rows


def easy(split: str, data_dir: Path | None) -> list[Question]:
    """ARC-Easy: train, validation, test."""
    return _load("ARC-Easy", split, data_dir)


def challenge(split: str, data_dir: Path | None) -> list[Question]:
    """ARC-Challenge: train, validation, test."""
    return _load("ARC-Challenge", split, data_dir)


def _load(config: str, split: str, data_dir: Path | None) -> list[Question]:
    return [
        Question(
            id=row["id"],
            question=row["question"],
            options=tuple(row["choices"]["text"]),  # four as a rule, sometimes three or five
            answer=row["choices"]["label"].index(row["answerKey"]),  # labels are A, B, … or 1, 2, …
        )
        for row in read_rows("allenai/ai2_arc", config, split, data_dir)
    ]
