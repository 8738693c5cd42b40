"""ARC, easy and challenge: science questions of school exams (Clark et al., 2018; allenai/ai2_arc)."""

from __future__ import annotations

from pathlib import Path

from cache2cache.tasks.base import Question, read_rows


def easy(split: str, data_dir: Path | None) -> list[Question]:
    """ARC-Easy: train, validation, test."""
    return _load("ARC-Easy", "", split, data_dir)


def challenge(split: str, data_dir: Path | None) -> list[Question]:
    """ARC-Challenge: train, validation, test."""
    return _load("ARC-Challenge", "", split, data_dir)


def easy_paper(split: str, data_dir: Path | None) -> list[Question]:
    """ARC-Easy without the rows that the paper's authors skip: those whose answer key is none of A to D."""
    return _load("ARC-Easy", "ABCD", split, data_dir)


def challenge_paper(split: str, data_dir: Path | None) -> list[Question]:
    """ARC-Challenge without the rows that the paper's authors skip."""
    return _load("ARC-Challenge", "ABCD", split, data_dir)


def _load(config: str, keys: str, split: str, data_dir: Path | None) -> list[Question]:
    """All rows, or those whose answer key is in `keys`."""
    return [
        Question(
            id=row["id"],
            question=row["question"],
            options=tuple(row["choices"]["text"]),  # four as a rule, sometimes three or five
            answer=row["choices"]["label"].index(row["answerKey"]),  # labels are A, B, … or 1, 2, …
        )
        for row in read_rows("allenai/ai2_arc", config, split, data_dir)
        if not keys or row["answerKey"] in keys
    ]
