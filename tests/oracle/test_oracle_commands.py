"""c2c oracle on tiny models: what the commands leave, several runs in one figure, and wrong input."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cache2cache.cli import main
from cache2cache.oracle import report


def c2c(*arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


def questions(path: Path, count: int, what: str) -> Path:
    rows = [
        {"id": f"{what}-{i}", "question": f"What is {i} {what}?", "options": [f"{i}", "no", f"{i + 1}", what],
         "answer": i % 4, "subject": ("sums", "words")[i % 2]}
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(folder: Path, *names: str) -> None:
    assert {p.stem for p in folder.glob("*.svg")} == {p.stem for p in folder.glob("*.png")} == set(names)
    assert not list(folder.glob(".*")), "something half-written"
    assert all("<svg" in path.read_text() for path in folder.glob("*.svg"))


ENRICHED = ("enrichment", "enrichment-layers", "enrichment-counts")
TRANSFORMED = tuple(f"transformation-{x}" for x in ("fit", "attention", "rank", "region", "answers", "tsne"))


def test_enrich(tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, dev = questions(tmp_path / "asked.jsonl", 12, "apples"), questions(tmp_path / "dev.jsonl", 6, "pears")
    common = ("oracle", "enrich", "--task", task, "--exemplars", dev, "--shots", 2, "--limit", 8)
    for family in ("qwen3", "gemma3"):
        assert c2c(*common, "--receiver", tiny_folder(family), "--output", tmp_path / family) == 0
        printed = capsys.readouterr().out
        assert "Oracle" in printed and "best 1" in printed
        drawn(tmp_path / family, *ENRICHED)
    result = json.loads((tmp_path / "qwen3" / "result.json").read_text())
    about = result["about"]
    assert about["task"] == str(task) and about["seed"] == 0 and about["receiver"]["fingerprint"]
    assert shlex.split(about["command"])[:3] == ["c2c", "oracle", "enrich"] and str(task) in about["command"]
    assert "qwen3-0; asked.jsonl validation; 2 shots" in (tmp_path / "qwen3" / "enrichment.svg").read_text()
    assert about["versions"]["torch"] and about["rows"] == 8 and result["all"]["direct"]["questions"] == 8
    both = tmp_path / "both"
    assert c2c("oracle", "plot", tmp_path / "qwen3", tmp_path / "gemma3", "--output", both) == 0
    assert str(both / "enrichment.svg") in capsys.readouterr().out
    drawn(both, *ENRICHED)
    assert "gemma3" in (both / "enrichment-layers.svg").read_text()
    # The same folder again: nothing is asked, the figures show the other run beside it.
    assert c2c(*common, "--receiver", tiny_folder("qwen3"), "--against", tmp_path / "gemma3", "--output",
               tmp_path / "qwen3") == 0  # fmt: skip
    assert "gemma3" in (tmp_path / "qwen3" / "enrichment.svg").read_text()
    assert c2c("oracle", "enrich", *common[2:], "--receiver", tiny_folder("qwen3"), "--no-layers", "--shots", 0,
               "--output", tmp_path / "alone") == 0  # fmt: skip
    drawn(tmp_path / "alone", "enrichment")
    found = json.loads((tmp_path / "alone" / "result.json").read_text())["all"]
    assert found["direct"]["accuracy"] == found["oracle"]["accuracy"] == found["few-shot"]["accuracy"]


def test_transform(tiny_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, test = questions(tmp_path / "train.jsonl", 16, "apples"), questions(tmp_path / "test.jsonl", 4, "pears")
    model, output = tiny_folder("qwen3"), tmp_path / "run"
    assert c2c("oracle", "transform", "--receiver", model, "--sharer", model, "--task", train, "--test-task", test,
               "--layer", 2, "--layer", 3, "--hidden-dim", 64, "--epochs", 2, "--tsne-samples", 20, "--perplexity", 5,
               "--output", output) == 0  # fmt: skip
    printed = capsys.readouterr().out
    assert "R² keys" in printed and "100% of it transformed" in printed
    drawn(output, *TRANSFORMED)
    result = json.loads((output / "result.json").read_text())
    assert result["about"]["layer_map"] == [[2, 2], [3, 3]] and result["average"]["mlp"]["values_r2"] > 0.99
    assert result["tsne"]["perplexity"] == 5 and len(result["tsne"]["points"]["sharer"]) == 20
    copy = tmp_path / "other"
    copy.mkdir()
    (copy / "result.json").write_text((output / "result.json").read_text())
    assert c2c("oracle", "plot", output, copy, "--output", tmp_path / "both") == 0
    drawn(tmp_path / "both", *TRANSFORMED)


def test_structure(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("oracle", "structure", tiny_pair_folder, "--count", 6, "--max-message-tokens", 3)
    assert c2c(*common, "--output", tmp_path / "run") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the paper's setting" in printed and "private context, not the paper's" in printed
    drawn(tmp_path / "run", "structure-both", "structure-private")
    assert c2c(*common, "--setting", "private", "--text", "published", "--output", tmp_path / "private") == 0
    drawn(tmp_path / "private", "structure-private")
    result = json.loads((tmp_path / "private" / "result.json").read_text())
    assert "both" not in result and "text:published" in result["private"]["all"] and result["about"]["fuser_hash"]
    assert c2c("oracle", "plot", tmp_path / "run", tmp_path / "private", "--output", tmp_path / "both") == 0
    drawn(tmp_path / "both", "structure-both", "structure-private")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("enrich", "--task", "mmlu-easy"), "unknown task 'mmlu-easy'"),
        (("enrich", "--task", "a.jsonl", "--exemplars", "a.jsonl", "--positions", "moved"), "kept or rotated"),
        (("enrich", "--task", "a.jsonl", "--exemplars", "a.jsonl", "--shots", 9), "give fewer shots"),
        (("enrich", "--against", "nothing"), "nothing holds no finished run of c2c oracle"),
        (("transform", "--task", "a.jsonl", "--train-limit", 16), "are both trained and tested on"),
        (("transform", "--task", "a.jsonl", "--test-task", "b.jsonl", "--start", "warm"), "ridge or random"),
        (("transform", "--task", "a.jsonl", "--test-task", "b.jsonl", "--perplexity", 2000), "give a lower one"),
        (("transform", "--task", "a.jsonl", "--test-task", "b.jsonl", "--layer", 9), "expected different ones"),
        (("structure", "nothing-here"), "no fuser at"),
        (("plot", "nothing"), "holds no finished run"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: tuple, words: str, tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    questions(tmp_path / "a.jsonl", 16, "apples")
    questions(tmp_path / "b.jsonl", 4, "pears")
    models = () if arguments[0] in ("structure", "plot") else ("--receiver", tiny_folder("qwen3"))
    models += ("--sharer", tiny_folder("llama")) if arguments[0] == "transform" else ()
    capsys.readouterr()  # what saving the models printed
    assert c2c("oracle", *arguments, *models, "--output", "out") == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


def test_runs_of_two_studies_are_not_drawn_together(tmp_path: Path) -> None:
    for name, kind in (("a", "oracle enrich"), ("b", "oracle transform"), ("c", "gates")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"about": {"kind": kind}}))
    with pytest.raises(report.C2CError, match="holds a run of c2c oracle transform; give one of c2c oracle enrich"):
        report.draw_together([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(report.C2CError, match="c2c analyze gates"):
        report.draw_together([tmp_path / "c"], tmp_path / "out")
