"""MiniLongBench: a small selection of LongBench's questions, chosen to rank models as the whole does (2025).

Its figures are not LongBench's: there are fewer sets and questions. The rows have final prompts.
"""

from __future__ import annotations

from pathlib import Path

from cache2cache.errors import C2CError
from cache2cache.tasks.base import OpenQuestion, read_rows
from cache2cache.tasks.longbench import open_question


def load(split: str, data_dir: Path | None) -> list[OpenQuestion]:
    """The split test, of a local mirror: rows with task, index, prompt, answers and all_classes."""
    if data_dir is None:
        raise C2CError("minilongbench is read from a local mirror only; give one as data folder")
    return [
        open_question(f"{row['task']}/{row['index']}", row["task"], row["prompt"], row)
        for row in read_rows("minilongbench", "all", split, data_dir)
    ]
