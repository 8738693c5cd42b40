"""What a question is, and where the rows of a data set come from."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache2cache.errors import C2CError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A question with 2 to 26 options, one of them right, lettered A, B, … whatever the data set calls them."""

    id: str
    question: str
    options: tuple[str, ...]
    answer: int
    subject: str = ""

    def __post_init__(self) -> None:
        if not 2 <= len(self.options) <= 26:
            raise C2CError(f"question {self.id!r} has {len(self.options)} options; expected 2 to 26")
        if not 0 <= self.answer < len(self.options):
            raise C2CError(
                f"question {self.id!r} has answer {self.answer}; expected an index from 0 to {len(self.options) - 1}"
            )

    @property
    def letters(self) -> str:
        """The letters of the options, "ABCD" for four."""
        return LETTERS[: len(self.options)]

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return self.letters[self.answer]


@dataclass(frozen=True)
class OpenQuestion:
    """A question that is answered in words and scored against references: `metrics.score`.

    Attributes:
        id: unique in its task and split.
        prompt: the whole user turn.
        references: right answers; the one that fits best counts.
        metric: a name of `metrics.METRICS`.
        max_new_tokens: how long an answer may be.
        subject: what results are broken down by; of LongBench the name of the data set.
        classes: what the metric `classification` chooses from.
        length: in words, of Chinese characters, as LongBench states it for its buckets; 0 where unknown.
        first_line: score only the first line of the answer.
        document: names the text that it is about, where others may be about the same.
    """

    id: str
    prompt: str
    references: tuple[str, ...]
    metric: str
    max_new_tokens: int
    subject: str = ""
    classes: tuple[str, ...] = ()
    length: int = 0
    first_line: bool = False
    document: str = ""

    def __post_init__(self) -> None:
        if not self.references:
            raise C2CError(f"question {self.id!r} has no reference answer; expected at least one")


def read_rows(repo: str, config: str, split: str, data_dir: Path | None = None) -> list[dict[str, Any]]:
    """The rows of one split of a hub data set, see `iterate_rows`."""
    return list(iterate_rows(repo, config, split, data_dir))


def iterate_rows(repo: str, config: str, split: str, data_dir: Path | None = None) -> Iterator[dict[str, Any]]:
    """The rows of one split of a hub data set, with the fields it has there, one by one.

    With `data_dir` they are read from `<data_dir>/<owner>/<name>/<config>/<split>.jsonl.gz`, and nothing else is
    touched; without it from the hub, through `datasets`. Raises C2CError where they cannot be had.
    """
    if data_dir is None:
        yield from _from_hub(repo, config, split)
        return
    path = data_dir / repo / config / f"{split}.jsonl.gz"
    if not path.is_file():
        there = sorted(file.name.removesuffix(".jsonl.gz") for file in path.parent.glob("*.jsonl.gz"))
        found = f"it has {', '.join(there)}" if there else f"there is no {path.parent}"
        raise C2CError(
            f"{repo} ({config}) has no split {split!r} under {data_dir}; {found}; choose another split or folder"
        )
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line) for line in lines if line.strip())
    except (OSError, EOFError, ValueError) as error:
        raise C2CError(f"{path} cannot be read ({error}); expected gzipped JSON lines; fetch it again") from error


def configs_there(repo: str, configs: Sequence[str], split: str, data_dir: Path | None) -> Sequence[str]:
    """Those of a data set's configurations that a mirror has with this split; all without a mirror.

    Where it has none, one that `read_rows` then explains.
    """
    if data_dir is None:
        return configs
    there = [config for config in configs if (data_dir / repo / config).is_dir()]
    with_split = [config for config in there if (data_dir / repo / config / f"{split}.jsonl.gz").is_file()]
    return with_split or there[:1] or configs[:1]


def _from_hub(repo: str, config: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise C2CError(
            f"{repo} comes from the hub, which needs the package datasets; "
            "install it with: pip install 'cache2cache[data]', or give a local mirror as data folder"
        ) from error
    try:
        for row in load_dataset(repo, config, split=split):
            yield dict(row)
    except Exception as error:  # datasets raises its own kinds and plain ones; for an unknown split it says what exists
        reason = " ".join(str(error).split())[:300]
        raise C2CError(
            f"{repo} ({config}, split {split!r}) could not be had from the hub ({type(error).__name__}: {reason}); "
            "check the split and the network, or give a local mirror as data folder"
        ) from error
