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


def result(name: str) -> Any:
    return json.loads((ROOT / "results" / "oracle" / name / "result.json").read_text(encoding="utf-8"))


def with_interval(found: Any) -> str:
    return "{:.1f} [{:.1f}, {:.1f}]".format(found["accuracy"], *found["interval"])


def rows_of_tables() -> Iterator[str]:
    """The rows that the studies' tables should have: a figure somewhere among thousands is no proof."""
    labels = {
        "direct": "Direct",
        "few-shot": "Few-shot",
        "oracle": "Oracle",
        "oracle-rotated": "Oracle, keys rotated back",
    }
    for run in ("enrich-1.5b", "enrich-0.5b"):
        for name, found in result(run)["all"].items():
            against = ""
            if d := found.get("against_direct"):
                against = "{:+.1f} [{:+.1f}, {:+.1f}], p = {:.2g} ".format(d["difference"], *d["interval"], d["p"])
            yield f"| {labels[name]} | {with_interval(found)} | {against}|"
    labels = {"receiver": "receiver", "sharer": "sharer", "text:tell": "text-to-text", "c2c": "C2C"}
    labels["other"] = "C2C, *another* document's cache"
    for setting in ("both", "private"):
        kinds = result("structure")[setting]
        for name, label in labels.items():
            if (setting, name) == ("private", "sharer"):  # it read the same, see the first table
                continue
            label += ", without the document" * ((setting, name) == ("private", "receiver"))
            each = " | ".join(f"{kinds[kind][name]['accuracy']:.1f}" for kind in ("markup", "json", "code"))
            yield f"| {label} | {with_interval(kinds['all'][name])} | {each} |"
    found = result("transform")
    for name, label in {"mlp": "MLP", "ridge": "ridge regression", "mean": "the receiver's mean"}.items():
        average = found["average"][name]
        keys = ("keys_r2", "values_r2", "keys_cosine", "values_cosine", "attention_error")
        figures = " | ".join(f"{average[key]:.3f}" for key in keys)
        yield f"| {label} | {figures} | {with_interval(found['answers'][name])} |"


def test_tables_are_those_of_the_studies() -> None:
    expected = list(rows_of_tables())
    assert len(expected) == 20 and [row for row in expected if row not in PAGE.splitlines()] == []
