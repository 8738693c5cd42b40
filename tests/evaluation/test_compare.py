"""Runs side by side: numbers by hand, and runs that don't go together."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cache2cache import C2CError
from cache2cache.evaluation.answers import GENERATION, Answer
from cache2cache.evaluation.compare import compare, tables
from cache2cache.evaluation.writing import add_rows


def run_of(folder: Path, tasks: dict[str, dict[str, str]], **settings: Any) -> Path:
    """run_of(folder, {"arc": {"c2c": "110"}}): a run in which C2C is right on the first two of three questions."""
    folder.mkdir(parents=True)
    made = {"split": "validation", "prompt": "paper", "fuser": folder.name, "fuser_hash": "0", **settings}
    (folder / "settings.json").write_text(json.dumps(made))
    add_rows(
        folder / "samples.jsonl",
        [
            Answer(task, "paper", f"q{n}", method, 0, mark == "1", [0.0])
            for task, right in tasks.items()
            for method, marks in right.items()
            for n, mark in enumerate(marks)
        ],
    )
    return folder


ALONE = {"receiver": "10000000", "sharer": "11111000"}
FEW = {"receiver": "10", "sharer": "11"}


def test_by_hand(tmp_path: Path) -> None:
    seeds = [
        run_of(tmp_path / "seeds" / str(seed), {"one": {**ALONE, "c2c": one}, "two": {**FEW, "c2c": two}})
        for seed, one, two in ((1, "11100000", "11"), (2, "11111000", "10"), (3, "11110000", "00"))
    ]
    base = run_of(tmp_path / "identical", {"one": {"c2c": "10000000"}, "two": {"c2c": "11"}})
    result = compare(seeds, [base])
    assert [row["columns"]["one"] for row in result["runs"]] == [
        {"accuracy": 37.5, "recovered": 50.0},
        {"accuracy": 62.5, "recovered": 100.0},
        {"accuracy": 50.0, "recovered": 75.0},
        {"accuracy": 12.5, "recovered": None},
    ]
    assert [row["baseline"] for row in result["runs"]] == [False, False, False, True]
    assert result["mean"]["one"] == {
        **{"accuracy": 50.0, "accuracy_spread": 12.5},
        **{"recovered": 75.0, "recovered_spread": 25.0},
    }
    assert result["mean"]["two"] == {
        **{"accuracy": 50.0, "accuracy_spread": 50.0},
        **{"recovered": 0.0, "recovered_spread": 100.0},
    }
    assert result["mean"]["average"]["recovered"] == 37.5  # (75 + 50 - 12.5) / 3
    assert [row["columns"]["average"]["accuracy"] for row in result["runs"]] == [68.75, 56.25, 25.0, 56.25]
    assert [row["columns"]["all"]["accuracy"] for row in result["runs"]] == [50.0, 60.0, 40.0, 30.0]
    pairs = {tuple(Path(run).name for run in p["runs"]): p["columns"] for p in result["paired"]}
    assert len(pairs) == 6
    counts = {key: {c: (p["only_first"], p["only_second"], p["p"]) for c, p in x.items()} for key, x in pairs.items()}
    assert counts["2", "identical"] == {"one": (4, 0, 0.125), "two": (0, 1, 1.0), "all": (4, 1, 0.375)}
    assert counts["1", "2"]["all"] == (1, 2, 1.0) and pairs["1", "2"]["all"]["difference"] == -10
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables(result):
        console.print(table)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) > 1}
    assert rows["3"] == ["50.0 (75.0)", "0.0 (-100.0)", "25.0 (-12.5)", "40.0 (40.0)"]
    assert rows["mean ± spread"][0] == "50.0 ± 12.5 (75.0 ± 25.0)"
    assert rows["identical"][0] == "12.5 (–)" and rows["2 / identical"] == ["4:0  0.12", "0:1  1", "4:1  0.38"]


def test_published_results_are_runs_too(tmp_path: Path) -> None:
    """A folder of --results, which has the settings in its summary."""
    first, second = (run_of(tmp_path / name, {"one": {"c2c": "110", **ALL_WRONG}}) for name in ("first", "second"))
    expected = compare([first, second])
    for folder in (first, second):
        settings = json.loads((folder / "settings.json").read_text())
        (folder / "settings.json").unlink()
        (folder / "summary.json").write_text(json.dumps({"settings": settings}))
    assert compare([first, second]) == expected


ALL_WRONG = {"receiver": "000", "sharer": "111"}


def test_runs_that_do_not_go_together(tmp_path: Path) -> None:
    first = run_of(tmp_path / "first", {"one": {"c2c": "110"}})
    fewer = run_of(tmp_path / "fewer", {"one": {"c2c": "11"}})
    none = run_of(tmp_path / "none", {"one": {"receiver": "110"}})
    other = run_of(tmp_path / "other", {"two": {"c2c": "110"}})
    short = run_of(tmp_path / "short", {"one": {"c2c": "110"}}, prompt="short")
    for runs, words in (
        ([first], "1 runs were given; expected two or more"),
        ([first, tmp_path / "." / "first"], "a run was given twice"),
        ([first, tmp_path], "holds no evaluation"),
        ([first, fewer], "2 answers of C2C and .*first 3, 1 of them to other questions"),
        ([none, first], "no set was answered by C2C in all runs .*none: none; .*first: one"),
        ([first, other], "no set was answered by C2C in all runs .*first: one; .*other: two"),
        ([first, short], "short was made with another prompt than .*first"),
    ):
        with pytest.raises(C2CError, match=words):
            compare(runs)
    with pytest.raises(C2CError, match="at least one of them not a baseline"):
        compare([], [first, fewer])


def test_runs_on_scores_have_no_test_of_right_and_wrong(tmp_path: Path) -> None:
    """Counts of better and worse ones instead, also in the table."""
    for name, scores in (("a", (0.5, 0.2, 1.0)), ("b", (0.25, 0.4, 1.0))):
        rows = [
            Answer("own", "paper", f"q{n}", method, -1, False, [], answers="generation", score=score, metric="f1")
            for method in ("receiver", "c2c")
            for n, score in enumerate(scores)
        ]
        (tmp_path / name).mkdir()
        add_rows(tmp_path / name / "samples.jsonl", rows)
        settings = {"fuser": "f", "fuser_hash": name, "split": "test", "prompt": "paper"}
        (tmp_path / name / "settings.json").write_text(json.dumps(settings))
    made = compare([tmp_path / "a", tmp_path / "b"])
    (pair,) = made["paired"]
    for column in ("own", "all"):
        found = pair["columns"][column]
        assert (found["better"], found["worse"]) == (1, 1) and "p" not in found
        assert found["difference"] == pytest.approx(1.67)
    console = Console(width=120, record=True, file=StringIO())
    console.print(tables(made)[1])
    assert "1:1" in console.export_text()


def test_each_set_by_the_way_that_all_have(tmp_path: Path) -> None:
    """One by likelihood, one in words; and one without C2C, which is no part of it."""
    folders = [run_of(tmp_path / name, {"one": {"c2c": "110", **ALL_WRONG}}) for name in ("first", "second")]
    for folder in folders:
        rows = [Answer("open", "paper", f"o{n}", "c2c", -1, n == 0, [], text="x", answers=GENERATION) for n in range(4)]
        alone = [Answer("more", "paper", "m", "receiver", 0, True, [0.0])]
        add_rows(folder / "samples.jsonl", [*alone, *rows])
    result = compare(folders)
    assert list(result["mean"]) == ["one", "open", "average", "all"]
    columns = {name: column["accuracy"] for name, column in result["runs"][0]["columns"].items()}
    assert columns == {"one": 66.67, "open": 25.0, "average": 45.83, "all": pytest.approx(100 * 3 / 7, abs=0.01)}


def test_questions_of_one_id_that_differ_are_refused(tmp_path: Path) -> None:
    folders = []
    for name in ("first", "second"):
        folder = run_of(tmp_path / name, {})
        rows = [Answer("one", "paper", f"q{n}", "c2c", 0, True, [0.0], asked=f"{name * n}") for n in range(3)]
        add_rows(folder / "samples.jsonl", rows)
        folders.append(folder)
    with pytest.raises(C2CError, match=r"2 questions have one id in .*first and .*second and differ, the first q1"):
        compare(folders)


def test_the_split_is_that_of_each_set(tmp_path: Path) -> None:
    """A set's own, however it was named."""
    own = {"task gpqa": {"split": "train"}}
    first, second, third = (
        run_of(tmp_path / name, {"gpqa": {"c2c": "11"}}, **settings)
        for name, settings in (("1", own), ("2", {"split": "train"}), ("3", {}))
    )
    assert compare([first, second])["mean"]["gpqa"]["accuracy"] == 100
    with pytest.raises(C2CError, match=r"3 was made with another split than .*1"):
        compare([first, third])
