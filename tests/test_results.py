"""The pages' tables and their figure say what stands in the committed results."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "README.md": {("reproduce-small", " main")},
    "docs/results.md": {("reproduce-small", None), ("reproduce-small-long", None)},
}


@pytest.fixture(scope="module")
def make_results() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_results", ROOT / "docs" / "make_results.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", TABLES)
def test_the_tables_are_those_of_the_results(page: str, make_results: ModuleType) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    there = {(match["name"], match["main"]): match["made"] for match in make_results.BLOCK.finditer(text)}
    assert set(there) == TABLES[page] and all(there.values())
    assert make_results.filled(text) == text, f"out of date: run {make_results.COMMAND}"
    assert make_results.filled(text.replace(there[min(there)], "another\n")) == text


def test_the_figure_is_that_of_the_results(make_results: ModuleType) -> None:
    """A bar for each method and set and one for each answer's seconds, titled with what the summary says."""
    summary = make_results.summary_of("reproduce-small")
    drawn = (ROOT / "docs" / "results.svg").read_text(encoding="utf-8")
    assert drawn == make_results.figure(summary), f"out of date: run {make_results.COMMAND}"
    titles = re.findall("<title>(.*?)</title>", drawn)
    assert len(titles) == len(make_results.MAIN) * 4 + 4
    found = summary["likelihood"]["tasks"]["c-eval"]["c2c"]["accuracy"]
    assert f"C2C, c-eval: {found:.1f}" in titles
    assert f"C2C: {summary['timing']['c2c']['seconds']['256']['median']:.1f}" in titles


def test_figures_of_the_tables(make_results: ModuleType) -> None:
    """By hand, on one set: methods in the report's order, fewer questions said, no gap no figure."""

    def of(accuracy: float, questions: int = 10) -> dict[str, Any]:
        return {"questions": questions, "accuracy": accuracy, "interval": [accuracy - 5, accuracy + 5]}

    column = {
        "c2c": of(60.0), "receiver": of(50.0), "text": of(40.0, 5), "other": of(52.0), "gain": 10.0, "presence": 2.0,
        "content": 8.0, "recovered": None,
    }  # fmt: skip
    summary = {
        "asked": {"own": 10}, "likelihood": {"tasks": {"own": column}},
        "generation": {"tasks": {"own": {**column, "recovered": 50.0, "recovered_interval": [20.0, 80.0]}}},
    }  # fmt: skip
    likely, words = (
        [line.strip("| ").split(" | ") for line in block.splitlines()]
        for block in make_results.tables(summary).split("\n\n")
    )
    assert likely[0] == ["by option likelihood", "own (10)"] and words[0] == ["by generation", "own (10)"]
    assert [row[0] for row in likely[2:6]] == [
        "receiver alone", "text-to-text", "**C2C**", "C2C, another question's cache",
    ]  # fmt: skip
    assert likely[3][1] == "40.0 [35.0, 45.0] (of 5)" and likely[4][1] == "60.0 [55.0, 65.0]"
    short = make_results.tables(summary, ("receiver", "c2c")).splitlines()
    assert [row.split(" | ")[0] for row in short[2:4]] == ["| receiver alone", "| **C2C**"] and len(short) == 2 * 6 + 1
    assert likely[6][1] == "+10.0 = +2.0 +8.0" and (likely[7][1], words[7][1]) == ("–", "50 [20, 80]")


# The rows of the table from the GPU, page by page: the run and the method that each is of.
LABELS = {
    "receiver alone": "receiver", "sharer alone": "sharer", "**C2C**": "c2c", "C2C, another question's cache": "other",
}  # fmt: skip
ITSELF = {"the receiver as its own sharer": ("mixture-42", "self")}
DEFAULT = {label: ("mixture-42", method) for label, method in LABELS.items()} | ITSELF
FROM_GPU = {
    "docs/results.md": DEFAULT | {"C2C, another training seed": ("mixture-43", "c2c")},
    "src/cache2cache/fusers/default/README.md": DEFAULT,
    "fusers/smollm2-135m-cpu/README.md": {label: ("smollm2-135m-cpu", method) for label, method in LABELS.items()},
}


@pytest.mark.parametrize("page", FROM_GPU)
def test_tables_from_the_gpu(page: str) -> None:
    """Every row is that of the results, as a line: set by set, with intervals."""
    sets = ("arc-easy", "arc-challenge", "openbookqa", "mmlu-redux", "c-eval")
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    for label, (folder, method) in FROM_GPU[page].items():
        summary = json.loads((ROOT / "results" / "gpu" / folder / "summary.json").read_text(encoding="utf-8"))
        found = [summary["likelihood"]["tasks"][task][method] for task in sets]
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(x["accuracy"], *x["interval"]) for x in found]
        assert f"| {label} | {' | '.join(cells)} |" in lines, label
