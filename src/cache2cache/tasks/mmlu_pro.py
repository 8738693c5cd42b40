"""MMLU-Pro: harder questions with up to ten options, A to J (Wang et al., 2024; TIGER-Lab/MMLU-Pro)."""

from __future__ import annotations

from pathlib import Path

from cache2cache.tasks.base import Question, read_rows


def load(split: str, data_dir: Path | None) -> list[Question]:
    """Test, and validation: five questions of each subject, for examples."""
    made = []
    for row in read_rows("TIGER-Lab/MMLU-Pro", "default", split, data_dir):
        real = [number for number, option in enumerate(row["options"]) if option != "N/A"]  # fills up to ten
        made.append(
            Question(
                id=str(row["question_id"]),
                question=row["question"],
                options=tuple(row["options"][number] for number in real),
                answer=real.index(row["answer_index"]),
                subject=row["category"],
            )
        )
    return made
