"""GSM8K: arithmetic in words, answered with a number (Cobbe et al., 2021; openai/gsm8k)."""

from __future__ import annotations

from pathlib import Path

from cache2cache.tasks.base import OpenQuestion, read_rows

PROMPT = "{question}\n\nThink step by step, then give the answer as a number behind ####."


def load(split: str, data_dir: Path | None) -> list[OpenQuestion]:
    """Train and test. The reference is the number behind #### in a row's answer."""
    return [
        OpenQuestion(
            id=f"{split}-{number}",  # rows have no id of their own
            prompt=PROMPT.format(question=row["question"]),
            references=(row["answer"].rsplit("####", 1)[-1].strip(),),
            metric="number",
            max_new_tokens=512,
        )
        for number, row in enumerate(read_rows("openai/gsm8k", "main", split, data_dir))
    ]
