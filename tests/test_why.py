"""docs/why.md says what stands in the committed results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "why.md").read_text(encoding="utf-8")
PAPER = r"58\.42|63\.39|62\.34|\b98%|\b53%|\b0\.4\b|0\.02\b|below 0\.05"  # figures of the paper, and bounds


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield float(value)


def test_every_figure_stands_in_the_results() -> None:
    """Part by part: each decimal number of the text is a number of the part's result.json, rounded, or in per cent."""
    checked = 0
    for part in PAGE.split("\n## ")[1:]:
        if (named := re.search(r"\.\./(results/oracle/[\w.-]+/result\.json)", part)) is None:
            continue
        known = list(numbers(json.loads((ROOT / named[1]).read_text(encoding="utf-8"))))
        text = re.sub(r"```.*?```|\(\.\./[^)]*\)|Qwen2\.5|[10]\.5B|arXiv [\d.]+", "", part, flags=re.S)
        for found in re.findall(r"\d+\.\d+", re.sub(PAPER, "", text)):
            step = 0.51 * 10 ** -len(found.partition(".")[2])
            near = [x for x in known if any(abs(abs(x) * k - float(found)) <= step for k in (1, 100))]
            assert near, f"{found} in {part.splitlines()[0]!r} is not in {named[1]}"
            checked += 1
    assert checked > 80
