"""CommonsenseQA: everyday knowledge, five options (Talmor et al., 2019; tau/commonsense_qa)."""

from __future__ import annotations

from pathlib import Path

from cache2cache.errors import C2CError
from cache2cache.tasks.base import Question, read_rows


def load(split: str, data_dir: Path | None) -> list[Question]:
    """Train and validation; the test split's answers are not public."""
    rows = read_rows("tau/commonsense_qa", "default", split, data_dir)
    if hidden := next((row for row in rows if not row["answerKey"]), None):
        raise C2CError(f"tau/commonsense_qa ({split}) row {hidden['id']} has no answer; take train or validation")
    return [
        Question(
            id=row["id"],
            question=row["question"],
            options=tuple(row["choices"]["text"]),
            answer=row["choices"]["label"].index(row["answerKey"]),
        )
        for row in rows
    ]
