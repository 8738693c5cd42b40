"""An evaluation run: its numbers by hand, its files, and folders that hold something else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cache2cache import C2CError
from cache2cache.evaluation.likelihood import METHODS, Answer, read_answers
from cache2cache.evaluation.report import file_hash, run, summarize, table
from training.runs import write_questions


def answers_of(**right: str) -> list[Answer]:
    """answers_of(c2c="110"): C2C was right on the first two of three questions."""
    return [
        Answer("own", "paper", f"q{n}", method, 0, mark == "1", [0.0])
        for method, marks in right.items()
        for n, mark in enumerate(marks)
    ]


def test_summary_by_hand() -> None:
    answers = answers_of(receiver="1100000000", sharer="1111111110", c2c="0111111000", other="1110000000")
    summary = summarize(answers, METHODS)
    assert {m: summary[m]["accuracy"] for m in METHODS} == {"receiver": 20, "sharer": 90, "c2c": 60, "other": 30}
    assert summary["gain"] == 40 and summary["presence"] == 10
    assert (summary["rescued"], summary["harmed"]) == (5, 1)
    assert summary["sharer"] == {"questions": 10, "accuracy": 90.0, "interval": [59.58, 98.21]}


def test_summary_without_all_methods() -> None:
    answers = answers_of(receiver="10", c2c="01")
    assert set(summarize(answers, ["receiver", "c2c"])) == {"receiver", "c2c", "gain", "rescued", "harmed"}
    assert set(summarize(answers, ["c2c"])) == {"c2c"}
    with pytest.raises(C2CError, match="nothing was measured"):
        summarize(answers, ["sharer"])


def test_table() -> None:
    tasks = {"arc-easy": summarize(answers_of(receiver="1000", c2c="1110", other="1100"), ["receiver", "c2c", "other"])}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table({"settings": {"split": "validation", "prompt": "short"}, "tasks": tasks}))
    lines = console.export_text().splitlines()
    assert "validation, short prompt" in " ".join(" ".join(lines).split()) and any(
        "arc-easy (4)" in line for line in lines
    )
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if line.count("│") == 3}
    assert rows["receiver alone"] == "25.0  [4.6, 69.9]" and rows["C2C"].startswith("75.0 ")
    assert rows["gain of C2C over the receiver"] == "+50.0"
    assert rows["… of it with another question's cache"] == "+25.0"
    assert "sharer alone" not in rows


def options(fuser: Path, output: Path, task: Path, **changes: Any) -> dict[str, Any]:
    return {
        "fuser": str(fuser),
        "tasks": [str(task)],
        "split": "validation",
        "data_dir": None,
        "prompt": "paper",
        "methods": list(METHODS),
        "limit": None,
        "batch_size": 4,
        "receiver": (None, "auto"),
        "sharer": (None, "auto"),
        "output": output,
        **changes,
    }


def test_a_run_and_its_files(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_questions(tmp_path / "own.jsonl")
    output = tmp_path / "new" / "evaluation"
    summary = run(**options(tiny_pair_folder, output, task))
    assert "C2C, another question's cache" in capsys.readouterr().out
    assert json.loads((output / "summary.json").read_text()) == summary
    assert sorted(p.name for p in output.iterdir()) == ["samples.jsonl", "settings.json", "summary.json"]
    answers = read_answers(output / "samples.jsonl")
    assert summary["tasks"][str(task)] == summarize(answers, METHODS) and len(answers) == 36
    settings = summary["settings"]
    weights = (tiny_pair_folder / "fuser.safetensors").read_bytes()
    assert settings["fuser_hash"] == hashlib.sha256(weights).hexdigest()
    for role in ("receiver", "sharer"):
        assert len(settings[role]["fingerprint"]) == 64 and settings[role]["dtype"] == "torch.float32"
    before = {p.name: p.read_bytes() for p in output.iterdir()}
    assert run(**options(tiny_pair_folder, output, task)) == summary
    assert {p.name: p.read_bytes() for p in output.iterdir()} == before


def test_other_settings_in_the_same_folder(tiny_pair_folder: Path, tmp_path: Path) -> None:
    task = write_questions(tmp_path / "own.jsonl")
    run(**options(tiny_pair_folder, tmp_path / "out", task, methods=["receiver"]))
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    for changes, words in (
        ({"prompt": "short"}, "another prompt; choose another --output"),
        ({"limit": 4, "split": "test"}, "another limit, split; choose"),
        ({"receiver": (None, "bfloat16")}, "another receiver; choose"),
    ):
        with pytest.raises(C2CError, match=words):
            run(**options(tiny_pair_folder, tmp_path / "out", task, **changes))
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "long"}, "unknown prompt 'long'"),
        ({"methods": ["words"]}, "unknown method 'words'"),
        ({"tasks": ["arc-hard"]}, "unknown task 'arc-hard'"),
        ({"tasks": ["none.jsonl"]}, "no file none.jsonl"),
        ({"tasks": ["empty.jsonl"]}, "empty.jsonl holds no questions"),
    ],
)
def test_wrong_input_leaves_no_folder(
    tiny_pair_folder: Path, tmp_path: Path, changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the corrected command can use the same folder."""
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("\n")
    task = write_questions(tmp_path / "own.jsonl")
    with pytest.raises(C2CError, match=words):
        run(**options(tiny_pair_folder, tmp_path / "out", task, **changes))
    assert not (tmp_path / "out").exists()


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
