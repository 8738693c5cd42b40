"""Agreement of made-up answers, whose every number is known."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cache2cache import C2CError
from cache2cache.analysis import agreement
from cache2cache.analysis.agreement import confidence, judged, regions, run, summarize
from cache2cache.evaluation.answers import Answer, read_answers
from cache2cache.evaluation.writing import add_rows

METHODS = ("receiver", "sharer", "text", "c2c")


def write_run(folder: Path, marks: list[str], sure: list[float] | None = None, task: str = "arc-easy") -> Path:
    """A run of questions; of each the methods that are right, by their first letters, and the sharer's confidence."""
    folder.mkdir()
    rows = []
    for i, right in enumerate(marks):
        for method in METHODS:
            p = (sure or [0.5] * len(marks))[i] if method == "sharer" else 0.5
            logprobs = [math.log(p), math.log(1 - p)]
            correct = method[0] in right
            rows.append(Answer(task, "paper", f"q{i}", method, 0, correct, logprobs))
    add_rows(folder / "samples.jsonl", rows)
    (folder / "settings.json").write_text(json.dumps({"split": "test", "fuser": "f", "receiver": {"name": "r"}}))
    return folder


def test_regions_and_given(tmp_path: Path) -> None:
    marks = ["rstc", "rsc", "sc", "s", "c", "", "r", "rc", "t", "sc"]
    rows = judged(read_answers(write_run(tmp_path / "a", marks) / "samples.jsonl"), tmp_path)
    found = summarize(rows)
    counts = {"".join(m[0] for m in r["right"]): r["questions"] for r in found["regions"]}
    assert len(counts) == 16 and sum(counts.values()) == 10
    assert {k: v for k, v in counts.items() if v} == {
        "rstc": 1, "rsc": 1, "sc": 2, "s": 1, "c": 1, "": 1, "r": 1, "rc": 1, "t": 1,
    }  # fmt: skip
    assert found["accuracy"]["c2c"]["right"] == 6 and found["accuracy"]["sharer"]["accuracy"] == 50.0
    shares = {k: (v["c2c"]["right"], v["c2c"]["questions"]) for k, v in found["given"].items()}
    assert shares == {"both": (2, 2), "receiver_only": (1, 2), "sharer_only": (2, 3), "neither": (1, 3)}
    assert found["given"]["neither"]["text"]["right"] == 1
    three = {tuple(r["right"]): r["questions"] for r in agreement._merged(found, ("receiver", "sharer", "c2c"))}
    assert three["receiver", "sharer", "c2c"] == 2 and three[()] == 2 and sum(three.values()) == 10


def test_progression_with_the_sharers_confidence(tmp_path: Path) -> None:
    sure = [0.95, 0.5, 0.6, 0.7, 0.8, 0.9]
    marks = ["sc", "r", "r", "s", "s", "sc"]
    rows = judged(read_answers(write_run(tmp_path / "a", marks, sure) / "samples.jsonl"), tmp_path)
    assert [r.confidence for r in rows] == pytest.approx(sure)
    parts = summarize(rows, bins=3)["by_confidence"]
    assert [(p["from"], p["to"], p["mean"]) for p in parts] == [(0.5, 0.6, 0.55), (0.7, 0.8, 0.75), (0.9, 0.95, 0.925)]
    assert [p["sharer"]["accuracy"] for p in parts] == [0.0, 100.0, 100.0]
    assert [p["c2c"]["accuracy"] for p in parts] == [0.0, 0.0, 100.0]
    assert parts[2]["paired"]["only_first"] == 2
    assert confidence([-1.0, -1.0, -1.0, -1.0]) == 0.25 and confidence([0.0, -1e9]) == 1.0
    assert len(summarize(rows[:2], bins=5)["by_confidence"]) == 2  # no part is empty


def test_shift_per_subject(tmp_path: Path) -> None:
    answers = read_answers(write_run(tmp_path / "a", ["c", "sc", "r", "rs"]) / "samples.jsonl")
    assert {r.subject for r in judged(answers, tmp_path)} == {"arc-easy"}  # a set without subjects
    subjects = {f"q{i}": "one" if i < 2 else "two" for i in range(4)}
    rows = judged([replace(a, subject=subjects[a.id]) for a in answers], tmp_path)
    found = summarize(rows)["by_subject"]
    assert list(found) == ["one", "two"]
    assert found["one"]["shift"] == {"sharer": 50.0, "text": 0.0, "c2c": 100.0}
    assert found["two"]["shift"]["c2c"] == -100.0
    assert found["two"]["paired"]["only_second"] == 2


def test_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_run(tmp_path / "a", ["rsc", "sc", "", "r", "c"] * 3, [0.5 + 0.03 * i for i in range(15)])
    b = write_run(tmp_path / "b", ["r", "sc", "c", "rst", "c"] * 2)
    result = run([a, b], tmp_path / "out", command="c2c analyze agreement a b")
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == result
    assert [one["questions"] for one in result["runs"]] == [15, 10]
    assert result["runs"][0]["settings"] == {"receiver": {"name": "r"}, "fuser": "f", "split": "test"}
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"result.json", "questions-0.jsonl", "questions-1.jsonl"} | {
        f"{figure}.{kind}" for figure in ("venn", "confidence", "subjects") for kind in ("png", "svg")
    }
    rows = [json.loads(line) for line in (tmp_path / "out" / "questions-1.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "task": "arc-easy", "id": "q0", "subject": "arc-easy", "receiver": True, "sharer": False, "text": False,
        "c2c": False, "sharer_confidence": 0.5,
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "sharer alone right" in printed and "100.0  [43.9, 100.0] (3)" in printed
    svg = (tmp_path / "out" / "venn.svg").read_text()
    assert "receiver 40.0%" in svg and "text-to-text" in svg


def test_without_text_and_on_one_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", ["rsc", "s", "c"])
    answers = [a for a in read_answers(folder / "samples.jsonl") if a.method != "text"]
    (folder / "samples.jsonl").unlink()
    add_rows(folder / "samples.jsonl", answers)
    result = run([folder], tmp_path / "out")
    assert result["runs"][0]["methods"] == ["receiver", "sharer", "c2c"]
    assert set(result["runs"][0]["given"]["both"]) == {"c2c"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [a for a in rows if a.method != "sharer"], "holds no answers of sharer"),
        (lambda rows: [a for a in rows if (a.method == "c2c") == (a.id == "q0")], "no question that receiver, sharer"),
        (lambda rows: [*rows, Answer("arc-easy", "short", "q0", "c2c", 0, True, [])], "several prompts"),
    ],
)
def test_unfit_runs(change: Any, words: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", ["rsc", "s", "c"])
    rows = change(read_answers(folder / "samples.jsonl"))
    (folder / "samples.jsonl").unlink()
    add_rows(folder / "samples.jsonl", rows)
    with pytest.raises(C2CError, match=words):
        run([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(C2CError, match="holds no evaluation"):
        run([tmp_path], tmp_path / "out")
    with pytest.raises(C2CError, match="1 bins"):
        run([tmp_path], tmp_path / "out", bins=1)
    assert regions([], ["receiver"]) == [{"right": ["receiver"], "questions": 0}, {"right": [], "questions": 0}]


def test_failed_questions_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", ["rsc", "s", "c"])
    rows = read_answers(folder / "samples.jsonl")
    rows[1] = replace(rows[1], logprobs=[], error="C2CError")
    with pytest.warns(match="1 questions of .* are left out, of which an answer failed"):
        assert [q.id for q in judged(rows, folder)] == ["q1", "q2"]
