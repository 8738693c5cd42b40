"""c2c evaluate with a store and the methods that write, c2c compare and c2c chat-quality, on a tiny pair."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cache2cache.cli import main
from cache2cache.evaluation import asking
from cache2cache.evaluation.report import methods_of
from training.runs import config_of, write_questions, write_recipe, write_rows


def c2c(*arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def test_evaluations_on_one_store_are_compared(
    tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "MAX_MESSAGE_TOKENS", 4)
    tasks = [write_questions(tmp_path / f"{name}.jsonl", count) for name, count in (("one", 6), ("two", 4))]
    common = ["evaluate", tiny_pair_folder, "--store", tmp_path / "store"]
    for task in tasks:
        common += ["--task", task]
    assert c2c(*common, "--output", tmp_path / "a", "--store-precision", "int8") == 0
    more = [
        "--set",
        "max_new_tokens=4",
        "--method",
        "receiver-generate",
        "--method",
        "text",
        "--method",
        "c2c",
        "--method",
        "receiver",
    ]
    assert c2c(*common, "--output", tmp_path / "b", *more) == 0
    printed = capsys.readouterr().out
    assert "text-to-text" in printed and "accuracy by generation" in printed and "average" in printed
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["settings"]["store"] == "int8" and summary["likelihood"]["pooled"]["text"]["questions"] == 10
    assert set(summary["likelihood"]["pooled"]["paired"]) == {"text", "receiver"}
    assert methods_of(summary["generation"]["tasks"]) == ["receiver"]

    output = tmp_path / "new" / "compared.json"
    assert c2c("compare", tmp_path / "a", "--against", tmp_path / "b", "--output", output) == 0
    assert "a / b" in capsys.readouterr().out
    compared = json.loads(output.read_text())
    assert [row["baseline"] for row in compared["runs"]] == [False, True]
    assert compared["paired"][0]["columns"]["all"]["p"] == 1.0
    assert c2c("compare", tmp_path / "a") == 1
    assert "1 runs were given" in capsys.readouterr().err
    elsewhere = [tmp_path / "other" if a == tmp_path / "store" else a for a in common]
    assert c2c(*elsewhere, "--output", tmp_path / "c", "--max-gb", 0) == 1
    assert "the limit is 0.0 GB" in capsys.readouterr().err and not (tmp_path / "other").exists()


def test_chat_quality(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 22)
    common = ("chat-quality", tiny_pair_folder)
    options = ("--limit", 4, "--generate", 2, "--max-new-tokens", 4)
    assert c2c(*common, "--jsonl", rows, *options, "--output", tmp_path / "own") == 0
    assert "bits per byte of 4 responses" in capsys.readouterr().out
    assert len((tmp_path / "own" / "answers.jsonl").read_text().splitlines()) == 4
    recipe = write_recipe(tmp_path)
    held = ("--recipe", recipe, "--set", "holdout=3", "--output", tmp_path / "held")
    assert c2c(*common, *held) == 0
    assert "bits per byte of 3 responses" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "held").glob("[!.]*")) == [
        "scores.jsonl",
        "settings.json",
        "summary.json",
    ]
    assert config_of(tmp_path).holdout == 6
    for arguments, words in (
        ((), "give exactly one source of rows"),
        (("--jsonl", rows, "--recipe", recipe), "--jsonl and --recipe: give exactly one"),
        (("--jsonl", rows, "--set", "holdout=3"), "--set changes a recipe"),
        (("--rows", "dolly"), "expected owner/name"),
        (("--jsonl", rows, "--max-tokens", 9), "0 of 22 rows are short enough"),
        (("--jsonl", rows, "--limit", 4, "--output", tmp_path / "held"), "another limit, rows_hash, source"),
    ):
        assert c2c(*common, *arguments) == 1
        assert words in " ".join(capsys.readouterr().err.split()), words
