"""Partial fusion: both ends are the receiver and C2C, and what lies between is fused where it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cache2cache import C2CError
from cache2cache.analysis import positions, runs
from cache2cache.analysis.positions import Placed, choices, chosen, curve, encoded, summarize
from cache2cache.analysis.runs import Data, Setup
from cache2cache.evaluation.runner import evaluate
from cache2cache.tasks import Question, load
from training.runs import pair_of, write_questions


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    return load(str(write_questions(tmp_path / "questions.jsonl", 7)))


def test_the_ends_are_receiver_and_c2c(questions: list[Question], tmp_path: Path) -> None:
    pair = pair_of()
    asked = encoded(pair, {"own": questions}, "paper")
    found = positions.answer(pair, asked, ["none", "all", "front:0.5"], tmp_path / "a.jsonl", batch_size=3)
    methods = ["receiver", "c2c"]
    expected = {(a.id, a.method): a for a in evaluate(pair, "own", questions, tmp_path / "b.jsonl", methods=methods)}
    answers = {(a.id, a.positions): a for a in found}
    assert len(answers) == 21
    differ = 0
    for question in questions:
        for name, method in (("none", "receiver"), ("all", "c2c")):
            other = expected[question.id, method]
            probability = torch.tensor(other.logprobs).softmax(0)[question.answer].item()
            assert answers[question.id, name].probability == pytest.approx(probability, abs=1e-3)
            assert answers[question.id, name].correct == other.correct
        assert answers[question.id, "none"].fused == 0 < answers[question.id, "front:0.5"].fused
        differ += abs(answers[question.id, "front:0.5"].probability - answers[question.id, "all"].probability) > 1e-3
    assert differ > 0


def test_what_is_fused_is_what_it_says(questions: list[Question]) -> None:
    """At the positions of a choice the cache is the wholly fused one, elsewhere the receiver's own."""
    pair = pair_of()
    _, _, prompt = encoded(pair, {"own": questions}, "short")[0]
    clean, cache = runs.read(pair, [prompt], None)
    known = [(cache, runs.lengths_of([prompt]))]
    whole = pair.fuse([prompt], clean=clean, sharers=known)
    length = len(prompt.receiver) - 1
    counts = {}
    for name in choices((0.25, 0.5)):
        fused = pair.fuse([prompt], positions=[chosen(prompt, name)], clean=clean, sharers=known)
        inside = {
            "none": [False] * length,
            "all": [True] * length,
            "content": list(prompt.content[:-1]),
            "template": [not x for x in prompt.content[:-1]],
            "front:0.25": [t < round(0.25 * length) for t in range(length)],
            "front:0.5": [t < round(0.5 * length) for t in range(length)],
            "back:0.25": [t >= length - round(0.25 * length) for t in range(length)],
            "back:0.5": [t >= length - round(0.5 * length) for t in range(length)],
        }[name]
        mask = torch.tensor(inside)[None, None, None, :, None]
        for kind in ("keys", "values"):
            mine, all_of, none_of = (getattr(kv, kind) for kv in (fused.kv, whole.kv, clean.kv))
            torch.testing.assert_close(mine, torch.where(mask, all_of, none_of), atol=1e-5, rtol=1e-4)
            assert mine.where(~mask, 0).equal(none_of.where(~mask, 0))
        counts[name] = fused.fused_positions[0]
    assert counts["content"] + counts["template"] == counts["all"] and min(counts["content"], counts["template"]) > 0
    assert counts["front:0.25"] < counts["front:0.5"] < counts["all"]


def test_a_cut_file_is_completed(questions: list[Question], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, path = pair_of(), tmp_path / "answers.jsonl"
    asked, names = encoded(pair, {"own": questions}, "short"), choices((0.5,))
    once = positions.answer(pair, asked, names, path, batch_size=3)
    whole = path.read_bytes()
    assert len(once) == 7 * 6
    for cut in (len(whole) // 2, len(whole) - 1, 0):
        path.write_bytes(whole[:cut])
        assert sorted(positions.answer(pair, asked, names, path, batch_size=3), key=str) == sorted(once, key=str)
        assert path.read_bytes() == whole
    monkeypatch.setattr(positions, "_answer", lambda *_: pytest.fail("everything has been answered"))
    assert len(positions.answer(pair, asked, names, path, batch_size=3)) == 42


def test_summary_of_known_answers() -> None:
    names = choices((0.5,))
    right = {"none": 1, "all": 3, "content": 3, "template": 0, "front:0.5": 2, "back:0.5": 4}
    answers = [
        Placed("t", f"q{i}", name, i < count, 0.5 + 0.1 * (i < count), 5, 11)
        for name, count in right.items()
        for i in range(4)
    ]
    found = summarize(answers, names)["pooled"]
    assert {name: one["accuracy"] for name, one in found.items()} == {n: 25.0 * c for n, c in right.items()}
    assert found["back:0.5"]["against_all"].items() >= {"only_first": 1, "only_second": 0, "p": 1.0}.items()
    assert found["all"]["against_none"].items() >= {"only_first": 2, "only_second": 0, "p": 0.5}.items()
    assert found["none"]["fused"] == 0.5 and found["none"]["probability"] == 0.525
    assert [share for share, _ in curve(found, "back")] == [0.0, 0.5, 1.0]
    assert [one["accuracy"] for _, one in curve(found, "front")] == [25.0, 50.0, 75.0]


def test_a_run(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = str(write_questions(tmp_path / "questions.jsonl", 9))
    data = Data(tasks=[task], prompt="short", limit=5)
    store = (tmp_path / "store", None)
    setup = Setup(str(tiny_pair_folder), tmp_path / "out", batch_size=3, seed=3, store=store, command="c2c …")
    result = positions.run(setup, data, shares=(0.5,))
    assert json.loads((setup.output / "result.json").read_text()) == result
    assert "front:0.5" in capsys.readouterr().out
    assert {p.name for p in setup.output.iterdir()} == {
        "settings.json", "answers.jsonl", "result.json", "positions.png", "positions.svg",
    }  # fmt: skip
    about = result["about"]
    assert about["data"] == {"tasks": [task], "split": "validation", "prompt": "short", "limit": 5}
    assert about["store"] == "bfloat16" and about["shares"] == [0.5] and result["pooled"]["all"]["questions"] == 5
    first = {json.loads(line)["id"] for line in (setup.output / "answers.jsonl").read_text().splitlines()}
    assert len(first) == 5 and first != {f"q{i}" for i in range(5)}  # drawn with the seed
    other = Setup(str(tiny_pair_folder), tmp_path / "other", batch_size=3, seed=3, store=store)
    positions.run(other, data, [tmp_path / "out"], shares=(0.5,))
    assert "out: from the front" in (tmp_path / "other" / "positions.svg").read_text()
    text = (tmp_path / "questions.jsonl").read_text()
    (tmp_path / "questions.jsonl").write_text(text.replace('"answer": "A"', '"answer": "B"'))
    with pytest.raises(C2CError, match="another rows_hash"):  # the same ids with other answers
        positions.run(setup, data, shares=(0.5,))
    (tmp_path / "questions.jsonl").write_text(text + text.splitlines()[0] + "\n")
    with pytest.raises(C2CError, match="has 1 ids twice, such as q0"):
        positions.run(Setup(str(tiny_pair_folder), tmp_path / "twice"), data, shares=(0.5,))
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(C2CError, match="a share of 1 was given"):
        positions.run(Setup(None, tmp_path / "none"), data, shares=(0.5, 1.0))
    with pytest.raises(C2CError, match=r"another data"):
        positions.run(setup, Data(tasks=[task], prompt="short", limit=6), shares=(0.5,))
    assert not (tmp_path / "none").exists()
