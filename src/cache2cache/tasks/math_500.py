"""MATH-500: competition mathematics (Hendrycks et al., 2021; selection of Lightman et al., HuggingFaceH4/MATH-500)."""

from __future__ import annotations

from pathlib import Path

from cache2cache.tasks.base import OpenQuestion, read_rows

PROMPT = "{problem}\n\nThink step by step, then put the final answer into \\boxed{{}}."


def load(split: str, data_dir: Path | None) -> list[OpenQuestion]:
    """The one split, test."""
    return [
        OpenQuestion(
            id=row["unique_id"],
            prompt=PROMPT.format(problem=row["problem"]),
            references=(row["answer"],),
            metric="boxed",
            max_new_tokens=1024,
            subject=row["subject"],
        )
        for row in read_rows("HuggingFaceH4/MATH-500", "default", split, data_dir)
    ]
