"""c2c analyze and c2c inspect on a tiny pair, and what they say to wrong input."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from cache2cache.cli import main
from training.runs import write_questions


def c2c(*arguments: object) -> int:
    """Run a command in this process and return its exit code."""
    with pytest.raises(SystemExit) as leaving:
        main([str(argument) for argument in arguments])
    return int(leaving.value.code or 0)


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_commands(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_questions(tmp_path / "my questions.jsonl", 8)
    common = (tiny_pair_folder, "--task", task, "--limit", 4, "--batch-size", 2, "--store", tmp_path / "store")
    for name, words, more in (
        ("rank", "of 24", ()),
        ("gates", "all closed", ("--prompt", "short")),
        ("gates", "positions;", ("--no-closing",)),
        ("positions", "content only", ("--share", 0.5)),
    ):
        output = tmp_path / f"{name}{len(more)}"
        assert c2c("analyze", name, *common, *more, "--output", output) == 0
        assert words in capsys.readouterr().out
        about = json.loads((output / "result.json").read_text())["about"]
        typed = shlex.split(about["command"])
        assert typed[:3] == ["c2c", "analyze", name] and str(task) in typed and about["rows"] == 4
        assert [word for word in typed if word in map(str, more)] == list(map(str, more))
        assert "llama ← qwen3; fuser fuser; my questions.jsonl" in (output / f"{name}.svg").read_text()
        assert about["store"] == "bfloat16" and about["versions"]["torch"] and about["sharer"]["name"]
    assert c2c("evaluate", *common[:7], "--output", tmp_path / "run") == 0
    assert c2c("analyze", "agreement", tmp_path / "run", "--output", tmp_path / "agreement") == 0
    assert "sharer alone right" in capsys.readouterr().out
    page = tmp_path / "new" / "page.html"
    assert c2c("inspect", tiny_pair_folder, "What is water?", "--prefix", "It is", "--output", page) == 0
    assert "tokens fused" in capsys.readouterr().out
    assert json.loads(page.with_suffix(".json").read_text())["prefix"] == "It is"
    assert "c2c inspect" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("analyze", "rank", "--text", "none.txt"), "no file none.txt"),
        (("analyze", "rank", "--text", "a.txt", "--task", "arc-easy"), "exactly one kind of data"),
        (("analyze", "rank", "--task", "arc-hard"), "unknown task 'arc-hard'"),
        (("analyze", "gates", "--prompt", "long"), "unknown prompt 'long'"),
        (("analyze", "gates", "nothing-here", "--limit", "0"), "no fuser at"),
        (("analyze", "gates", "--against", "nothing"), "nothing holds no finished run of c2c analyze gates"),
        (("analyze", "positions", "--share", "1.5"), "a share of 1.5 was given"),
        (("analyze", "agreement", "nothing"), "nothing holds no evaluation"),
        (("inspect", "default", " "), "the prompt is empty"),
        (("inspect", "default", "Hi", "--output", "page.txt"), "another ending than .html"),
    ],
)
def test_wrong_input(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert c2c(*arguments) == 1
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert c2c("analyze", "gates", "--limit", 0, "--output", tmp_path / "out") == 1
    assert "pip install 'cache2cache[plots]'" in capsys.readouterr().err and not (tmp_path / "out").exists()
