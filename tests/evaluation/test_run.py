"""Runs as a whole: kills, several processes, failures, growing limits, routers, the clock, recipes and the report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cache2cache import C2C, C2CError
from cache2cache.cli import main
from cache2cache.config import EvalConfig
from cache2cache.evaluation import asking, loading, runner, timing
from cache2cache.evaluation import run as running
from cache2cache.evaluation.answers import Answer, drawn, read_answers, read_asked
from cache2cache.evaluation.asking import Batch
from cache2cache.evaluation.page import page, regressions, venn
from cache2cache.evaluation.report import Run, markdown, publish, read_run, told_apart, verdict
from cache2cache.evaluation.routing import Router, at_random, embed, fit, routed
from cache2cache.evaluation.run import run
from cache2cache.evaluation.runner import evaluate
from cache2cache.evaluation.summary import summarize, summarize_run
from cache2cache.files import only_writer
from cache2cache.models import packed
from cache2cache.response import Answering
from cache2cache.tasks import OPEN_TASKS, TASKS, Question
from cache2cache.training.recipe import checked, read_yaml
from evaluation.scripted import marked, scripted_pair
from training.runs import lm_of, pair_of, write_questions

ROOT = Path(__file__).parents[2]
ALL = ["receiver", "sharer", "c2c", "other", "zeroed", "gaussian", "off", "text", "route-confidence"]


def config_of(fuser: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Two sets of questions, one of them with references; every method that needs nothing more."""
    folder.mkdir(exist_ok=True)
    task = write_questions(folder / "own.jsonl", 9)
    rows = [{"id": f"o{n}", "question": f"What is {'so ' * n}it?", "references": ["A", "it"]} for n in range(5)]
    (folder / "open.jsonl").write_text("".join(json.dumps({**r, "max_new_tokens": 3}) + "\n" for r in rows))
    return {
        "fuser": str(fuser),
        "tasks": [{"task": str(task), "name": "own"}, {"task": str(folder / "open.jsonl"), "name": "open"}],
        "methods": ALL, "answers": "both", "max_new_tokens": 4, "batch_size": 4, "limits": {"text": 5},
        "output": str(folder / "out"), **changes,
    }  # fmt: skip


def start(config: dict[str, Any], *arguments: object) -> subprocess.CompletedProcess[str]:
    """The run in two processes."""
    path = Path(config["output"]).parent / "config.json"
    path.write_text(json.dumps(config))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(Path(__file__).with_name("several.py")), str(path), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models hardly ever come to an end."""
    monkeypatch.setattr(asking, "MAX_MESSAGE_TOKENS", 6)
    monkeypatch.setattr(timing, "MAX_MESSAGE_TOKENS", 6)
    monkeypatch.setattr(timing, "LENGTHS", (2, 5))


def test_killed_ten_times_is_one_run(tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, where a kill is an exception that leaves half a line; once it is a kill -9."""
    once = run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path / "once")))
    config = config_of(tiny_pair_folder, tmp_path / "cut")
    add_rows, left = runner.add_rows, [0]

    class Killed(BaseException):
        pass

    def cut(path: Path, rows: Any) -> None:
        left[0] -= len(rows)
        if left[0] <= 0:
            with path.open("a") as file:
                file.write("".join(map(runner.line_of, rows))[:-20])
            raise Killed
        add_rows(path, rows)

    monkeypatch.setattr(runner, "add_rows", cut)
    for number in range(10):
        left[0] = 3 + 2 * number
        with pytest.raises(Killed):
            run(EvalConfig.model_validate(config))
    left[0] = 10**9
    again = run(EvalConfig.model_validate(config))
    whole = (tmp_path / "once" / "out" / "samples.jsonl").read_bytes()
    assert (tmp_path / "cut" / "out" / "samples.jsonl").read_bytes() == whole
    assert whole.count(b"\n") == 2 * 9 * 7 + 2 * 5 + 5 * 8
    for key in ("likelihood", "generation", "failed"):
        assert again[key] == once[key]


@pytest.mark.skipif(not packed.possible(), reason="no packed weights on this processor")
def test_packed_weights(tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches are read with weights laid out for them, the clock's single questions with those that there were."""
    run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path / "dense")))
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)
    order: list[str] = []
    layers, timed = packed.PackedLinear.forward, timing.measure

    def layer(self: Any, x: Any) -> Any:
        order.append("packed")
        return layers(self, x)

    def measure(*args: Any) -> Any:
        order.append("clock")
        rows = timed(*args)
        order.append("clocked")
        return rows

    monkeypatch.setattr(packed.PackedLinear, "forward", layer)
    monkeypatch.setattr(timing, "measure", measure)
    run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path / "packed") | {"timing": 2}))
    assert order[:2] == ["clock", "clocked"] and set(order[2:]) == {"packed"}
    dense, made = (read_answers(tmp_path / name / "out" / "samples.jsonl") for name in ("dense", "packed"))
    assert len(made) > 100
    assert_alike(made, dense)


def assert_alike(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """The same answers in the same order; probabilities but for the rounding of sums that threads share otherwise."""
    assert [replace(a, logprobs=[], confidence=None) for a in found] == [
        replace(a, logprobs=[], confidence=None) for a in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
        assert one.confidence == pytest.approx(other.confidence, abs=1e-4)


def test_a_kill_and_two_processes(tiny_pair_folder: Path, tmp_path: Path) -> None:
    """kill -9 of one of two processes; two processes then write what one does."""
    few = {"methods": ["receiver", "c2c", "other"], "answers": "likelihood"}
    once = run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path / "once", **few)))
    config = config_of(tiny_pair_folder, tmp_path / "two", **few)
    assert start(config, 5).returncode != 0
    done = start(config)
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / name / "out" for name in ("once", "two")]
    assert [p.name for p in folders[1].glob("samples*")] == ["samples.jsonl"]
    assert_alike(*(read_answers(folder / "samples.jsonl") for folder in reversed(folders)))
    assert json.loads((folders[1] / "summary.json").read_text())["likelihood"] == once["likelihood"]


def test_failures_are_wrong_and_listed(
    tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A method that fails on one question of a batch: that one is wrong, the others are what they were; the next run
    asks it again."""
    fine = [a for a in run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path / "fine"))) if a]
    assert fine
    state = Batch.state

    def broken(self: Batch, method: str, way: str) -> Any:
        if method == "c2c" and any(c.id == "q4" for c in self.cases):
            raise RuntimeError("out of <memory>")
        return state(self, method, way)

    config = config_of(tiny_pair_folder, tmp_path / "bad", answers="likelihood")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(Batch, "state", broken)
    with pytest.raises(SystemExit) as leaving:
        main(["evaluate", str(recipe)])
    assert leaving.value.code == 1
    printed = capsys.readouterr()
    assert "failed: own q4, c2c by likelihood: RuntimeError: out of <memory>" in " ".join(printed.err.split())
    assert "1 answers failed and count as wrong" in printed.err
    summary = json.loads((tmp_path / "bad" / "out" / "summary.json").read_text())
    assert summary["failed"] == [
        {"task": "own", "id": "q4", "method": "c2c", "answers": "likelihood", "error": "RuntimeError: out of <memory>"}
    ]
    rows = {a.key: a for a in read_answers(tmp_path / "bad" / "out" / "samples.jsonl")}
    good = {a.key: a for a in read_answers(tmp_path / "fine" / "out" / "samples.jsonl")}
    for key, row in rows.items():
        if row.error is not None:
            assert (row.id, row.method, row.correct, row.choice, row.logprobs) == ("q4", "c2c", False, -1, [])
        elif row.method == "c2c" and row.task == "own":
            assert row.logprobs == pytest.approx(good[key].logprobs, abs=1e-4)
        else:
            assert_alike([row], [good[key]])
    assert summary["likelihood"]["tasks"]["own"]["c2c"]["failed"] == 1
    for name in ("report.md", "report.html"):
        assert "1 failed, counted as wrong" in (tmp_path / "bad" / "out" / name).read_text()
    assert "<memory>" not in (tmp_path / "bad" / "out" / "report.html").read_text()
    monkeypatch.setattr(Batch, "state", state)
    assert run(EvalConfig.model_validate(config))["failed"] == []
    mended = read_answers(tmp_path / "bad" / "out" / "samples.jsonl")
    assert_alike(mended, [good[a.key] for a in mended])


def test_a_question_that_cannot_be_put(tmp_path: Path) -> None:
    """Too long for the receiver: wrong, for every method; the others go on."""
    pair = pair_of()
    long = Question("long", "water " * 2500, ("a", "b"), 0)
    short = [Question(f"s{n}", f"What {n}?", ("a", "b"), 0) for n in range(3)]
    answers = evaluate(pair, "own", [*short, long], tmp_path / "s.jsonl", methods=["receiver", "c2c"], batch_size=4)
    failed = [a for a in answers if a.error]
    assert {(a.id, a.method) for a in failed} == {("long", "receiver"), ("long", "c2c")} and len(answers) == 8
    assert all("context" in str(a.error) for a in failed)


def test_few_shot_that_cannot_be_put_fails_alone(tmp_path: Path) -> None:
    """No examples of a subject: the other methods, and the other subjects, don't notice; a limit counts as ever."""
    examples = [Question(f"e{n}", f"Which {n}?", ("a", "b"), 0, "law") for n in range(3)]
    asked = [Question(f"q{n}", f"What {n}?", ("a", "b"), 0, "law" if n < 3 else "logic") for n in range(6)]
    options: dict[str, Any] = {"examples": examples, "shots": 3, "methods": ["receiver", "few-shot"]}
    answers = evaluate(pair_of(), "own", asked, tmp_path / "s.jsonl", **options)
    failed = [a for a in answers if a.error]
    assert [(a.id, a.method) for a in failed] == [(f"q{n}", "few-shot") for n in (3, 4, 5)] and len(answers) == 12
    assert all("3 examples about logic were asked for, 0 are there" in str(a.error) for a in failed)
    found = summarize(answers, ["receiver", "few-shot"])
    assert (found["few-shot"]["questions"], found["few-shot"]["failed"]) == (6, 3)
    few = evaluate(pair_of(), "own", asked, tmp_path / "t.jsonl", **options, limits={"few-shot": 4})
    assert {a.id for a in few if a.method == "few-shot"} == {q.id for q in drawn(asked, 4, 0)}
    long = [Question("e", "water " * 2500, ("a", "b"), 0, "law")] * 3
    row = evaluate(pair_of(), "own", asked[:2], tmp_path / "u.jsonl", **{**options, "examples": long})
    assert [(a.id, a.method) for a in row if a.error] == [("q0", "few-shot"), ("q1", "few-shot")]


def test_questions_that_the_fuser_was_trained_on_are_counted(
    tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fuser = tmp_path / "fuser"
    shutil.copytree(tiny_pair_folder, fuser)
    config = config_of(fuser, tmp_path / "run", methods=["receiver", "c2c"], answers="likelihood")
    config["tasks"] = config["tasks"][:1]
    task = config["tasks"][0]["task"]
    ids = [json.loads(line)["id"] for line in Path(task).read_text().splitlines()]
    (fuser / "training_ids.txt").write_text(f"{task}:{ids[0]}\n{task}:{ids[3]}\nanother:{ids[1]}\n")
    assert run(EvalConfig.model_validate(config))["trained_on"] == {"own": 2}
    assert f"trained on 2 of the {len(ids)} questions of own" in " ".join(capsys.readouterr().err.split())
    (fuser / "training_ids.txt").write_text(f"elsewhere/{Path(task).name}:{ids[0]}\n")
    assert run(EvalConfig.model_validate(config))["trained_on"] == {"own": 1}
    (fuser / "training_ids.txt").unlink()
    assert "trained_on" not in run(EvalConfig.model_validate(config))


def test_limits_end_no_run(tiny_pair_folder: Path, tmp_path: Path) -> None:
    """Methods that are asked few questions: none of some subjects. Every part of the report is there."""
    rows = [
        {"id": n, "question": f"What is {'so ' * n}it?", "options": ["a", "b"], "answer": 0, "subject": f"s{n % 4}"}
        for n in range(12)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    methods = ["receiver", "sharer", "c2c", "other", "off", "text", "few-shot", "route-confidence", "receiver-generate"]
    limits = {"text": 2, "c2c": 5, "other": 3, "sharer": 4, "receiver-generate": 3, "few-shot": 1}
    config = {
        "fuser": str(tiny_pair_folder), "tasks": [{"task": str(tmp_path / "own.jsonl"), "name": "own"}],
        "methods": methods, "limits": limits, "shots": 2, "max_new_tokens": 3, "output": str(tmp_path / "out"),
        "timing": 1,
    }  # fmt: skip
    made = run(EvalConfig.model_validate(config))
    found = made["likelihood"]["tasks"]["own"]
    counts = {m: found[m]["questions"] for m in ("receiver", "sharer", "c2c", "other", "text", "route-confidence")}
    assert counts == {"receiver": 12, "sharer": 4, "c2c": 5, "other": 3, "text": 2, "route-confidence": 4}
    assert {m: p["questions"] for m, p in found["paired"].items() if m in counts} == {
        "receiver": 5, "sharer": 4, "other": 3, "text": 2, "route-confidence": 4,
    }  # fmt: skip
    words = read_answers(tmp_path / "out" / "samples.jsonl")
    assert sum(a.answers == "generation" for a in words) == 12  # the receiver is asked for both, so for all of them
    assert "0" in {a.id for a in words}
    text = (tmp_path / "out" / "report.md").read_text()
    assert " of 2" in text and " of 5" in text and (tmp_path / "out" / "report.html").stat().st_size < 10**6
    with pytest.raises(C2CError, match="limits names the unknown method 'route-confidence'"):
        run(EvalConfig.model_validate({**config, "limits": {"route-confidence": 2}}))


def test_a_question_that_was_changed_is_asked_again(tiny_pair_folder: Path, tmp_path: Path) -> None:
    """Under the same id: its text, its options, or the right one; and those that were given its cache. The others
    stand."""
    methods = ["receiver", "text", "other"]
    config = config_of(tiny_pair_folder, tmp_path, methods=methods, answers="likelihood", limits={})
    path = Path(config["tasks"][0]["task"])
    run(EvalConfig.model_validate(config))
    before = {a.key: a for a in read_answers(tmp_path / "out" / "samples.jsonl")}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["question"] = "Something else?"
    rows[2]["options"][0] = "another option"
    rows[3]["answer"] = "B" if rows[3]["answer"] in ("A", 0) else "A"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    run(EvalConfig.model_validate(config))
    after = {a.key: a for a in read_answers(tmp_path / "out" / "samples.jsonl")}
    ids = [a.id for a in before.values() if a.task == "own" and a.method == "receiver"]
    changed = {rows[n].get("id", str(n + 1)) for n in (1, 2, 3)}
    again = {k for k in before if after[k].asked != before[k].asked}
    assert {k[2] for k in again if k[3] != "other"} == changed
    given = {a.id for a in before.values() if a.method == "other" and a.partner in changed}
    assert given - changed and {k[2] for k in again if k[3] == "other"} == given | changed
    assert before.keys() == after.keys() and len(ids) == 9
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == len(after)


def test_a_recipe_in_pieces(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Set by set and method by method into one folder: in the end the same rows as of one run."""
    config = config_of(tiny_pair_folder, tmp_path, methods=["receiver", "sharer", "c2c", "other"], limits={"other": 4})
    config["tasks"][1]["limit"] = 3
    once = run(EvalConfig.model_validate({**config, "output": str(tmp_path / "once")}))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    pieces = [
        ["--task", "open"],
        ["--method", "c2c"],
        ["--task", "own", "--method", "other", "--method", "receiver"],
        [],
    ]
    for more in pieces:
        with pytest.raises(SystemExit) as leaving:
            main(["evaluate", str(recipe), *more])
        assert not leaving.value.code, capsys.readouterr().err
    for name in ("samples.jsonl", "questions.jsonl"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "once" / name).read_text()
    made = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert made["generation"] == once["generation"] and made["asked"] == {"own": 9, "open": 3}


def test_nothing_measured_is_no_zero(tiny_pair_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(C2CError, match="nothing was measured"):
        summarize([], ["receiver"])
    config = config_of(tiny_pair_folder, tmp_path, methods=["receiver", "text"], answers="likelihood", limits={})
    config["tasks"] = [{**config["tasks"][0], "limits": {"text": 3}}]
    made = run(EvalConfig.model_validate(config))["likelihood"]["tasks"]["own"]
    assert (made["receiver"]["questions"], made["text"]["questions"]) == (9, 3)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| – |" in text and "0.00" not in text.replace("0.00 ", "")


# ---- questions drawn -------------------------------------------------------------------------------------------------


def test_fewer_questions_are_among_more() -> None:
    questions = marked([("A",)] * 50, "A" * 50)
    chosen = [drawn(questions, n, 3) for n in (5, 20, 50, None)]
    assert [len(c) for c in chosen] == [5, 20, 50, 50]
    ids = [[q.id for q in c] for c in chosen]
    assert set(ids[0]) < set(ids[1]) < set(ids[2]) and ids[2] == ids[3] == [q.id for q in questions]
    assert ids[1] != ids[3][:20] and ids[1] == sorted(ids[1], key=ids[3].index)
    assert {q.id for q in drawn(questions[::-1], 5, 3)} == set(ids[0])
    assert {q.id for q in drawn(questions, 5, 4)} != set(ids[0])


def test_a_folder_takes_more_questions(tiny_pair_folder: Path, tmp_path: Path) -> None:
    few = {"methods": ["receiver"], "answers": "likelihood"}
    small = run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, limit=3, **few)))
    assert small["asked"] == {"own": 3, "open": 3}
    before = read_answers(tmp_path / "out" / "samples.jsonl")
    run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, limit=7, **few)))
    after = read_answers(tmp_path / "out" / "samples.jsonl")
    assert len(before) == 6 and {a.key for a in before} < {a.key for a in after} and len(after) == 12
    assert run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, limit=3, **few)))["asked"]["own"] == 3
    with pytest.raises(C2CError, match="another seed"):
        run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, limit=3, seed=1, **few)))


def test_folders_of_earlier_versions(tiny_pair_folder: Path, tmp_path: Path) -> None:
    """Their rows are read as they were meant, and not asked again; where they took the first questions, refused."""
    config = config_of(
        tiny_pair_folder, tmp_path, methods=["receiver", "text", "receiver-generate"], answers="likelihood"
    )
    config["tasks"], config["limits"], config["max_new_tokens"] = config["tasks"][:1], {}, 64
    run(EvalConfig.model_validate(config))
    rows = read_answers(tmp_path / "out" / "samples.jsonl")
    old = []
    for a in rows:
        kept = ("task", "prompt", "id", "method", "choice", "correct", "logprobs", "confidence", "text")
        row = {k: v for k, v in vars(a).items() if k in kept and v is not None}
        if a.answers == "generation":
            row |= {"method": "receiver-generate"}
            row.pop("confidence")
        if a.method == "text":
            row["text"] = a.message
        old.append(row)
    (tmp_path / "out" / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in old))
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    names = ("receiver", "sharer", "fuser", "fuser_hash", "store", "split", "prompt", "limit")
    (tmp_path / "out" / "settings.json").write_text(json.dumps({k: settings[k] for k in names}))
    read = read_answers(tmp_path / "out" / "samples.jsonl")
    assert [a.key for a in read] == [a.key for a in rows]
    assert [a.message for a in read] == [a.message for a in rows] and [a.text for a in read] == [a.text for a in rows]
    before = (tmp_path / "out" / "samples.jsonl").read_text().count("\n")
    made = run(EvalConfig.model_validate(config))
    assert len(read_answers(tmp_path / "out" / "samples.jsonl")) == before
    assert made["likelihood"]["tasks"]["own"]["text"]["questions"] == 9
    (tmp_path / "out" / "settings.json").write_text(json.dumps({**{k: settings[k] for k in names}, "limit": 4}))
    with pytest.raises(C2CError, match="another seed"):
        run(EvalConfig.model_validate(config))


# ---- routing ---------------------------------------------------------------------------------------------------------


def answers_of(receiver: str, sharer: str, confidence: list[float]) -> list[Answer]:
    return [
        Answer("own", "paper", f"q{n}", method, 0, mark == "1", [0.0], sure if method == "receiver" else None)
        for method, marks in (("receiver", receiver), ("sharer", sharer))
        for n, (mark, sure) in enumerate(zip(marks, confidence, strict=True))
    ]


def test_routers_by_hand() -> None:
    answers = answers_of("1100", "0110", [0.9, 0.2, 0.1, 0.8])
    made = routed(answers, "route-confidence", 0.5)
    assert [a.sent for a in made] == [False, True, True, False] and [a.correct for a in made] == [
        True,
        True,
        True,
        False,
    ]
    learned = routed(answers, "route", 0.25, {"q0": 3.0, "q1": 1.0, "q2": 2.0, "q3": -1.0})
    assert [a.sent for a in learned] == [True, False, False, False] and [a.correct for a in learned] == [
        False,
        True,
        False,
        False,
    ]
    assert [a.sent for a in routed(answers, "route-confidence", 0.0)] == [False] * 4
    random = at_random([*answers, *learned], "route")
    assert random == {("own", "q0"): 0.75, ("own", "q1"): 1, ("own", "q2"): 0.25, ("own", "q3"): 0}
    row = summarize([*answers, *made, *learned], ["receiver", "sharer", "route", "route-confidence"])
    assert (row["route"]["sent"], row["route"]["random"], row["route"]["over_random"]) == (25, 50, -25)
    assert (row["route-confidence"]["accuracy"], row["route-confidence"]["random"]) == (75, 50)


def test_a_router_learns_what_tells_the_questions_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(200, 30, dtype=torch.float64) + 3
    sharer = (inputs[:, 4] > 3).tolist()
    receiver = [not s if n % 3 else s for n, s in enumerate(sharer)]  # a third of them tells nothing
    ids = [f"q{n}" for n in range(200)]
    router = fit(inputs, sharer, receiver, ids, 0.01)
    fresh = torch.randn(500, 30, dtype=torch.float64) + 3
    right = [(s > 0) == bool(x > 3) for s, x in zip(router.score(fresh), fresh[:, 4], strict=True)]
    assert sum(right) > 430
    assert set(router.examples[0]) == {i for n, i in enumerate(ids) if sharer[n] and not receiver[n]}
    router.save(tmp_path / "router.json")
    again = saved(tmp_path / "router.json")
    assert again.score(fresh) == router.score(fresh) and again.hash == router.hash
    with pytest.raises(C2CError, match="of 2 the sharer has 2 and the receiver 0"):
        fit(inputs[:2], [True, True], [False, False], ids[:2], 1.0)
    lm = lm_of("llama")
    ids_of = lm.need_tokenizer()("What?", add_special_tokens=False)["input_ids"]
    expected = lm.model.get_input_embeddings().weight[ids_of].double().mean(0)
    torch.testing.assert_close(embed(lm, ["What?", ""])[0], expected)


def saved(path: Path) -> Router:
    """A router as its file says."""
    row = json.loads(path.read_text())
    weight, mean = (torch.tensor(row[name], dtype=torch.float64) for name in ("weight", "mean"))
    return Router(weight, mean, row["bias"], (row["sharer_alone_right"], row["receiver_alone_right"]))


def test_a_learned_router_in_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripted models: where the receiver believes nothing the sharer is right, and the marks say so."""
    pair = scripted_pair()
    train = marked(
        [("A", ""), ("", "B"), ("C", ""), ("", "D"), ("B", ""), ("", "C"), ("D", ""), ("", "B")] * 4, "ABCDBCDB" * 4
    )
    test = marked([("A", ""), ("", "B"), ("", "C"), ("D", "")], "ABCD")
    monkeypatch.setattr(
        loading, "load_pair", lambda *_: (pair, {"receiver": {}, "sharer": {}, "fuser_hash": "", "fuser": ""})
    )
    monkeypatch.setattr(running.sets, "load", lambda name, split, data: train if split == "train" else test)
    monkeypatch.setattr(running.report, "write", lambda *_: None)
    config = EvalConfig.model_validate(
        {
            "tasks": ["arc-easy"],
            "methods": ["receiver", "sharer", "route", "route-confidence"],
            "output": tmp_path / "out",
        }
    )
    summary = run(config)
    made = summary["likelihood"]["tasks"]["arc-easy"]
    assert (made["receiver"]["accuracy"], made["sharer"]["accuracy"], made["route"]["accuracy"]) == (50, 75, 100)
    assert (
        made["route"]["sent"] == 50 and made["route"]["random"] == 62.5 and made["route-confidence"]["accuracy"] == 100
    )
    learned = json.loads((tmp_path / "out" / "router.json").read_text())
    texts = {q.question for q in test}
    asked_too = {f"arc-easy:{q.id}" for q in train if q.question in texts}
    assert asked_too and not asked_too & {*learned["sharer_alone_right"], *learned["receiver_alone_right"]}
    recorded = json.loads((tmp_path / "out" / "settings.json").read_text())["router"]
    assert recorded["hash"] == saved(tmp_path / "out" / "router.json").hash and recorded["examples"] > 20
    assert len((tmp_path / "out" / "routed.jsonl").read_text().splitlines()) == 8
    # Letters are what it learns from, whatever the prompt.
    config = config.model_copy(update={"output": tmp_path / "cot", "prompt": "cot", "answers": "generation"})
    again = run(config)["generation"]["tasks"]["arc-easy"]
    assert again["route"]["sent"] == 50 and saved(tmp_path / "cot" / "router.json").weight.shape[0] > 1
    # From questions that are asked themselves there is nothing to learn, which is said before they are.
    monkeypatch.setattr(running.sets, "load", lambda name, split, data: test)
    with pytest.raises(C2CError, match="no set of the run has a split train, of other questions than those asked"):
        run(config.model_copy(update={"output": tmp_path / "same"}))
    assert not (tmp_path / "same" / "samples.jsonl").exists()
    with pytest.raises(C2CError, match="chooses between receiver and sharer; ask for both"):
        run(config.model_copy(update={"methods": ["receiver", "route"]}))


# ---- the clock -------------------------------------------------------------------------------------------------------


def timed(first: float, step: float) -> dict[str, Any]:
    seconds = {str(n): {"median": first + (n - 1) * step, "p95": 9.0} for n in (8, 64, 256)}
    return {"first_token": {"median": first, "p95": 9.0}, "seconds": seconds}


def test_from_which_length_on() -> None:
    """1 + 0.1 (n - 1) is below 0.5 + 0.2 (n - 1) from the 7th token on, where it is equal at the 6th."""
    assert timing.cheaper_from(timed(1, 0.1), timed(0.5, 0.2)) == 7
    assert timing.cheaper_from(timed(0.5, 0.1), timed(0.5, 0.1)) == 1
    assert timing.cheaper_from(timed(1, 0.2), timed(0.5, 0.2)) is None
    assert timing.cheaper_from(timed(1, 0.3), timed(2, 0.2)) is None
    short = verdict({"timing": {"c2c": timed(1, 0.3), "sharer": timed(2, 0.2), "cheaper_from": None}})
    assert short[-1] == "C2C is cheaper than the sharer alone for short answers only."


def test_times_are_summarized_by_hand() -> None:
    def row(number: int, method: str, seconds: dict[str, float], **more: Any) -> timing.Timed:
        return timing.Timed("own", f"q{number}", method, number / 10, seconds, **more)

    rows = [
        row(1, "c2c", {"2": 1.0, "5": 3.0}, bytes_passed=10, memory=70),
        row(2, "c2c", {"2": 2.0}, bytes_passed=20, memory=90),
        row(6, "c2c", {"2": 6.0, "5": 9.0}, bytes_passed=90),
        row(5, "text", {"2": 7.5}, message_tokens=3),
    ]
    found = timing.summarize(rows)
    # Linear between the order statistics: 95% of the way through three values is 0.9 of that from the second on.
    assert found["c2c"] == {
        "prompts": 3,
        "first_token": {"median": 0.2, "p95": 0.56},
        "seconds": {"2": {"median": 2.0, "p95": 5.6}},  # one prompt had no room for 5 tokens
        "bytes_passed": 20,
        "message_tokens": 0,
        "memory": 90,
    }
    assert found["text"] == {
        "prompts": 1,
        "first_token": {"median": 0.5, "p95": 0.5},
        "seconds": {"2": {"median": 7.5, "p95": 7.5}},
        "bytes_passed": 0,
        "message_tokens": 3,
        "memory": None,
    }
    assert set(found) == {"c2c", "text"}  # nothing to compare without the sharer


def test_the_clock_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    """Prompts that leave no room for a message or an answer; and rows of another set with the same ids."""
    pair = pair_of()
    texts = ["What?", "water " * 900, "What now?"]
    asked = [Question(f"q{n}", text, ("a", "b"), 0) for n, text in enumerate(texts)]
    setup = asking.Setup(pair)
    (unit,), _ = runner.plan(setup, "own", asked, methods=["receiver"])
    least = min(pair.receiver.context_length, pair.sharers[0].context_length)
    assert max(len(c.whole.receiver) for c in unit.cases) < least
    path = tmp_path / "timing.jsonl"
    rows = timing.measure(pair, unit.cases, ["receiver", "text"], path)
    assert {r.id for r in rows if r.method == "text"} == {"q0", "q2"}
    others = [replace(c, task="two") for c in unit.cases]
    more = timing.measure(pair, others, ["text"], path)
    assert {r.task for r in more} == {"two"} and len(more) == 2


def test_answers_that_are_fused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a fuser trained for that, in words: where nothing is skipped `skip` is C2C; and that is what is clocked."""
    pair = pair_of(fuse_response=True, gate_init=1.0)
    asked = [Question(f"q{n}", f"What is {n}?", ("a", "b"), 0) for n in range(4)]
    rows = runner.evaluate(
        pair, "own", asked, tmp_path / "s.jsonl", methods=["c2c", "skip", "self"], answers="generation", skip=1.0,
        identical=pair_of("llama", "llama", fuse_response=True, gate_init=1.0), max_new_tokens=40,
    )  # fmt: skip
    said = {m: {a.id: a.text for a in rows if a.method == m} for m in ("c2c", "skip", "self")}
    assert said["skip"] == said["c2c"] and not any(a.skipped for a in rows if a.method == "skip")
    (unit,), _ = runner.plan(asking.Setup(pair), "own", asked, methods=["receiver"])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 40}
    assert said["c2c"] == {c.id: pair.chat(c.ask.chat(), **options) for c in unit.cases}
    assert said["c2c"] != {c.id: pair.chat(c.ask.chat(), fuse_response=False, **options) for c in unit.cases}
    made: list[Any] = []
    stream = timing.decode.stream

    def watched(lm: Any, state: Any, **more: Any) -> Any:
        made.append(state)
        return stream(lm, state, **more)

    monkeypatch.setattr(timing.decode, "stream", watched)
    timing.measure(pair, unit.cases, ["c2c"], tmp_path / "t.jsonl")
    assert made and all(isinstance(state, Answering) for state in made)


def test_the_clock(tiny_pair_folder: Path, tmp_path: Path) -> None:
    options = {"timing": 3, "methods": ["receiver", "sharer", "c2c", "text"], "answers": "likelihood", "limits": {}}
    made = run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, **options)))["timing"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "timing.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and {r["method"] for r in rows} == set(options["methods"])  # type: ignore[arg-type]
    for row in rows:
        assert 0 < row["first_token_s"] <= row["seconds"]["2"] < row["seconds"]["5"]
    assert made["c2c"]["bytes_passed"] > 0 == made["sharer"]["bytes_passed"] and made["text"]["message_tokens"] <= 6
    if made["c2c"]["memory"] is not None:
        pair = C2C.from_pretrained(tiny_pair_folder)
        weights = sum(p.nbytes for lm in (pair.receiver, *pair.sharers) for p in lm.model.parameters())
        assert made["c2c"]["memory"] >= weights > 0
    again = run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, **options)))["timing"]
    assert again == made  # nothing is timed twice
    assert "| text-to-text |" in (tmp_path / "out" / "report.md").read_text()
    assert made["task"] == "own"


def test_seconds_are_those_of_the_set_that_was_clocked(tiny_pair_folder: Path, tmp_path: Path) -> None:
    options = {"timing": 2, "methods": ["receiver", "sharer", "c2c"], "answers": "both", "limits": {}}
    run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, **options)))
    lines = (tmp_path / "out" / "report.md").read_text().splitlines()
    table = [line for line in lines[: lines.index("## Every method")] if "| generation |" in line]
    assert [" / " in line for line in table] == ["| own (9)" in line for line in table] and len(table) > 2
    # The figure is of that set, and has all who were clocked on it.
    html = (tmp_path / "out" / "report.html").read_text().partition("Time against accuracy")[2].partition("</svg>")[0]
    assert html.count("<circle") == 3 and "own" in html


# ---- the report ------------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Tags that are closed, and nothing from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert tag not in ("script", "link", "img", "iframe") and not any(k in ("src", "href") for k, _ in attributes)
        assert not any(k.startswith("on") for k, _ in attributes)
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>`|*"


def test_the_page_escapes_everything(tiny_pair_folder: Path, tmp_path: Path) -> None:
    rows = [
        {
            "id": f"{EVIL}{n}",
            "question": f"{EVIL} {n}?",
            "options": [EVIL, "b", "c"],
            "answer": n % 3,
            "subject": EVIL + "xy"[n % 2],
        }
        for n in range(8)
    ]
    (tmp_path / "evil.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = {
        "fuser": str(tiny_pair_folder), "tasks": [{"task": str(tmp_path / "evil.jsonl"), "name": EVIL}],
        "methods": ["receiver", "sharer", "c2c", "other", "text"], "answers": "both", "max_new_tokens": 4,
        "output": str(tmp_path / "out"), "timing": 1,
    }  # fmt: skip
    run(EvalConfig.model_validate(config))
    html = (tmp_path / "out" / "report.html").read_text()
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == [] and checker.tags.count("svg") >= 5 and "&lt;script&gt;" in html
    assert "<script" not in (tmp_path / "out" / "report.md").read_text()
    made = read_run(tmp_path / "out")
    for way in ("likelihood", "generation"):
        worse = regressions(made.answers, EVIL, way)
        by = {
            m: {a.id for a in made.answers if a.answers == way and a.method == m and a.correct}
            for m in ("receiver", "c2c")
        }
        assert {a.id for a, _ in worse} == by["receiver"] - by["c2c"]


def test_a_method_that_always_failed_has_no_accuracy() -> None:
    """And a report of a run where everything fails stays small."""
    rows = [
        Answer("own", "paper", f"q{n}", method, 0, False, [], error="E: x" if method == "text" else None)
        for method in ("receiver", "text")
        for n in range(80)
    ]
    found = summarize_run(rows, ["own"], ["receiver", "text"])
    models = {"receiver": {"name": "r"}, "sharer": {"name": "s"}, "fuser": "f", "fuser_hash": "0"}
    made = Run(Path("out"), {**found, "settings": {**models, "split": "test", "prompt": "paper"}}, rows, {})
    text = markdown([made])
    assert "| all failed | – |" in text and text.count("| E: x |") == 50
    assert "The first 50; all of them are in summary.json" in text and "E: x" in page([made])


def test_right_answers_in_regions() -> None:
    drawing = venn({"receiver": set("abcg"), "sharer": set("bcde"), "c2c": set("cdfgh")})
    counts = [part.split("<")[0] for part in drawing.split(">") if part.split("<")[0].isdigit()]
    # a; e; f h; b; g; d; c: alone, in pairs, all three.
    assert counts == ["1", "1", "2", "1", "1", "1", "1"]


def test_several_runs_in_one_report(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = {
        "methods": ["receiver", "sharer", "text", "c2c", "other"],
        "answers": "likelihood",
        "results": str(tmp_path / "results"),
    }
    for name in ("a", "b"):
        run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path / name, **few)))
    with pytest.raises(SystemExit) as leaving:
        main(["report", str(tmp_path / "a" / "out"), str(tmp_path / "b" / "out"), "--output", str(tmp_path / "both")])
    assert not leaving.value.code
    assert capsys.readouterr().out.split() == [str(tmp_path / "both" / n) for n in ("report.md", "report.html")]
    runs = [read_run(tmp_path / name / "out") for name in ("a", "b")]
    assert (tmp_path / "both" / "report.md").read_text() == markdown(told_apart(runs))
    assert (tmp_path / "both" / "report.html").read_text() == page(told_apart(runs))
    assert markdown(runs).count("| own (9) | likelihood |") == 2
    for name in ("a", "b"):  # both of the same sharer
        assert str(tmp_path / name / "out") in (tmp_path / "both" / "report.html").read_text()
    # What is published has the same numbers, and nobody's words.
    published = read_answers(tmp_path / "results" / "samples.jsonl")
    assert [(a.key, a.value) for a in published] == [(a.key, a.value) for a in runs[1].answers]
    assert not any(a.text or a.message for a in published)
    again = summarize_run(published, ["own"], few["methods"])["likelihood"]
    assert again == runs[1].summary["likelihood"] and again["tasks"]["own"]["text"]["message_bytes"] > 0
    broken = [replace(a, error="ValueError: What is the text of the question?") for a in runs[1].answers[:1]]
    listed = [{"task": "own", "id": "q", "method": "c2c", "answers": "likelihood", "error": "C2CError: said"}]
    publish(replace(runs[1], answers=broken, summary={**runs[1].summary, "failed": listed}), tmp_path / "bare")
    for path in (tmp_path / "bare").iterdir():
        assert "text of the question" not in path.read_text() and "said" not in path.read_text()
    assert "ValueError" in (tmp_path / "bare" / "samples.jsonl").read_text()
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["report.md", "samples.jsonl", "summary.json"]
    with pytest.raises(C2CError, match="holds no evaluation that went to its end"):
        read_run(tmp_path / "none")


def summary_of(sharer: tuple[float, float], cheaper: int | None) -> dict[str, Any]:
    def against(low: float, high: float) -> dict[str, Any]:
        return {"difference": (low + high) / 2, "interval": [low, high], "p": 0.5, "only_first": 1, "only_second": 1}

    task = {
        "paired": {"sharer": against(*sharer), "receiver": against(2, 6), "other": against(-1, 3)},
        "gain": 4.0,
        "content": 1.0,
    }
    clock = {"c2c": timed(1, 0.1), "sharer": timed(0.5, 0.2), "cheaper_from": cheaper}
    return {"likelihood": {"tasks": {"own": task}}, "timing": clock}


def test_plain_words() -> None:
    said = " ".join(verdict(summary_of((-8, -2), 7)))
    assert "C2C is better than the receiver alone by 4.0 points [+2.0, +6.0]" in said
    assert "no content is shown: another question's cache may do as well" in said
    assert "C2C is worse than the sharer alone by 5.0 points" in said
    assert "C2C is not worth it here for answers below 7 tokens: the sharer alone is better, and quicker" in said
    assert "An answer of 8 tokens takes C2C 1.70 s and the sharer alone 1.90 s" in said
    assert "cheaper than the sharer alone from 7 tokens of answer on" in said
    never = " ".join(verdict(summary_of((-1, 2), None)))
    assert (
        "C2C is not worth it here: the sharer alone is as good, as far as can be told, and takes less time at any len"
        in never
    )
    better = " ".join(verdict(summary_of((1, 2), 1)))
    assert "not worth" not in better and "C2C is better than the sharer alone by 1.5 points" in better


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_a_recipe_and_options_are_one_definition(
    tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tiny_pair_folder, tmp_path, methods=["receiver"], answers="likelihood")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))

    def c2c(*arguments: object) -> str:
        with pytest.raises(SystemExit) as leaving:
            main([str(a) for a in arguments])
        printed = capsys.readouterr()
        assert bool(leaving.value.code) == printed.err.startswith("error:") or not leaving.value.code
        return printed.err if leaving.value.code else printed.out

    c2c("evaluate", recipe, "--limit", 3, "--output", tmp_path / "r", "--set", "tasks.1.limit=2")
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["asked"] == {"own": 3, "open": 2}
    questions = config["tasks"][0]["task"]
    c2c(
        "evaluate",
        tiny_pair_folder,
        "--task",
        questions,
        "--limit",
        3,
        "--method",
        "receiver",
        "--output",
        tmp_path / "f",
    )
    flags = read_answers(tmp_path / "f" / "samples.jsonl")
    assert [(a.id, a.logprobs) for a in flags] == [
        (a.id, a.logprobs) for a in read_answers(tmp_path / "r" / "samples.jsonl") if a.task == "own"
    ]
    recipe.write_text(yaml.safe_dump({**config, "metods": ["receiver"]}))
    assert "unknown key metods; did you mean methods?" in c2c("evaluate", recipe)
    assert "unknown key router.shar; did you mean share?" in c2c("evaluate", "--set", "router.shar=1")
    assert "limits names the unknown method 'texts'" in c2c("evaluate", "--set", "limits.texts=1")
    assert "two tasks are called" in c2c("evaluate", "--task", questions, "--task", questions)
    keys = c2c("evaluate", "--keys")
    assert "tasks.N.max_prompt_tokens: int | None" in keys and "router.share: float = 0.5" in keys


def test_the_receiver_as_its_own_sharer_needs_its_fuser(tiny_pair_folder: Path, tmp_path: Path) -> None:
    config = config_of(
        tiny_pair_folder, tmp_path, methods=["receiver", "c2c"], answers="likelihood", identical=str(tiny_pair_folder)
    )
    with pytest.raises(C2CError, match=r"the method self needs a fuser trained with the receiver as its own sharer"):
        run(EvalConfig.model_validate(config))
    own = lm_of("llama")
    torch.manual_seed(0)
    from cache2cache import FuserConfig

    llama = tiny_pair_folder.parent / "llama"
    C2C.from_models(llama, llama, FuserConfig(hidden_dim=8, intermediate_dim=6, gate_init=1.0)).save_pretrained(
        tmp_path / "same"
    )
    made = run(EvalConfig.model_validate({**config, "identical": str(tmp_path / "same")}))
    assert made["likelihood"]["tasks"]["own"]["self"]["questions"] == 9 and own is not None
    with pytest.raises(C2CError, match="the method self needs a fuser that was trained"):
        run(EvalConfig.model_validate({**config, "identical": None, "methods": ["self"]}))


def test_a_published_token_map(tmp_path: Path) -> None:
    """The sharer then doesn't read its own tokens in the pair; alone it does, as without that map."""
    questions = [Question(f"q{n}", f"What is {'so ' * n}it?", ("a", "b", "c"), 0) for n in range(4)]
    options: dict[str, Any] = {
        "methods": ["receiver", "sharer", "c2c", "other", "zeroed"],
        "answers": "both",
        "max_new_tokens": 4,
    }
    plain = evaluate(pair_of("qwen3", "qwen2", gate_init=0.0), "own", questions, tmp_path / "a.jsonl", **options)
    moved = evaluate(
        pair_of("qwen3", "qwen2", token_map="first", gate_init=0.0), "own", questions, tmp_path / "b.jsonl", **options
    )
    for one, two in zip(plain, moved, strict=True):
        if one.method in ("receiver", "sharer"):
            assert one.logprobs == pytest.approx(two.logprobs, abs=1e-3) and one.text == two.text
    fused = evaluate(pair_of("qwen3", "qwen2", token_map="first"), "own", questions, tmp_path / "c.jsonl", **options)
    chosen = {m: [a.logprobs for a in fused if a.method == m and a.logprobs] for m in ("receiver", "c2c", "other")}
    assert chosen["c2c"] != chosen["receiver"] and chosen["c2c"] != chosen["other"]
    with pytest.raises(C2CError, match=r"moves the receiver's positions too, .* which the control off is to show"):
        evaluate(pair_of("qwen3", "qwen2", token_map="first"), "own", questions, tmp_path / "d.jsonl", methods=["off"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/r*.yaml")), ids=lambda path: path.name)
def test_the_recipes_that_come_along(path: Path) -> None:
    config = running.named(checked(EvalConfig, read_yaml(path), path.name))
    names = [t.task for t in [*config.tasks, *config.router.tasks]] + [t.shots_task or t.task for t in config.tasks]
    assert {name.split("/")[0] for name in names} <= {*TASKS, *OPEN_TASKS} and config.output.parts[0] == "runs"


def test_a_set_without_the_usual_split_is_asked_in_its_own() -> None:
    tasks = [
        {"task": "arc-easy"},
        {"task": "mmlu-redux/virology"},
        {"task": "gsm8k"},
        {"task": "mmlu", "split": "test"},
    ]
    found = running.named(EvalConfig.model_validate({"tasks": tasks}))
    assert [task.split for task in found.tasks] == [None, "test", "test", "test"]  # None: validation
    found = running.named(EvalConfig.model_validate({"tasks": tasks, "split": "validation"}))
    assert [task.split for task in found.tasks] == [None, None, None, "test"]  # as it was said


def test_a_served_sharer_is_not_evaluated(tiny_pair_folder: Path) -> None:
    with pytest.raises(C2CError, match=r"loaded here, and http://.* is a served sharer; give the model"):
        loading.load_pair([str(tiny_pair_folder)], [None], (None, "auto"), (["http://127.0.0.1:8600"], "auto"))


def test_parts_count_the_gap_from_the_receivers_better_way() -> None:
    """As their task does."""

    def rows(method: str, way: str, marks: str) -> list[Answer]:
        return [
            Answer("own", "paper", f"q{n}", method, 0, mark == "1", [0.0], answers=way, subject="xy"[n % 2])
            for n, mark in enumerate(marks)
        ]

    answers = [*rows("receiver", "likelihood", "0000"), *rows("receiver", "generation", "1100")]
    answers += [*rows("sharer", "likelihood", "1111"), *rows("c2c", "likelihood", "1100")]
    found = summarize_run(answers, ["own"], ["receiver", "sharer", "c2c"])["likelihood"]
    assert found["tasks"]["own"]["recovered"] == 0 and found["average"]["c2c"]["questions"] == 4
    assert [part["recovered"] for part in found["tasks"]["own"]["subjects"].values()] == [0, 0]


def test_circles_are_of_questions_that_all_were_asked(tiny_pair_folder: Path, tmp_path: Path) -> None:
    options = {"methods": ["receiver", "sharer", "c2c"], "answers": "likelihood", "limits": {"sharer": 4, "c2c": 3}}
    run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, **options)))
    assert "own: right, of 3 that all three were asked" in (tmp_path / "out" / "report.html").read_text()


def test_skipping_fills_no_store_beyond_its_size(tiny_pair_folder: Path, tmp_path: Path) -> None:
    options = {"methods": ["receiver", "skip"], "skip": 0.5, "answers": "likelihood", "max_gb": 0.0}
    config = config_of(tiny_pair_folder, tmp_path, **options, store=[str(tmp_path / "store")])
    with pytest.raises(C2CError, match=r"the limit is 0\.0 GB"):
        run(EvalConfig.model_validate(config))
    assert not list((tmp_path / "store").glob("shard-*"))


def test_two_runs_in_one_folder(tiny_pair_folder: Path, tmp_path: Path) -> None:
    config = EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, methods=["receiver"]))
    with (
        only_writer(tmp_path / "out"),
        pytest.raises(C2CError, match=r"another process writes to .*out; wait for it, or choose another output"),
    ):
        run(config)
    assert run(config)["asked"] == {"own": 9, "open": 5}


def test_rows_that_are_lost_are_said(tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that another machine writes to, where no lock holds."""
    config = EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, methods=["receiver", "c2c"]))
    add_rows = runner.add_rows
    monkeypatch.setattr(runner, "add_rows", lambda path, rows: add_rows(path, rows[1:]))
    with pytest.raises(C2CError, match=r"samples.jsonl lacks \d+ of the rows that were written to it"):
        run(config)
    monkeypatch.setattr(runner, "add_rows", add_rows)
    found = run(config)["likelihood"]["tasks"]["own"]
    assert found["receiver"]["questions"] == found["c2c"]["questions"] == 9


def test_fewer_questions_are_those_that_readers_see(tiny_pair_folder: Path, tmp_path: Path) -> None:
    """And a piece of a run publishes no more than it says."""
    few = {"methods": ["receiver", "c2c"], "answers": "likelihood"}
    run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, **few)))
    made = run(EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, limit=4, **few)))
    assert made["asked"]["own"] == 4
    out = tmp_path / "out"
    assert {len(read_answers(out / "samples.jsonl")), len(read_asked(out)[0])} == {28, 16}
    piece = config_of(tiny_pair_folder, tmp_path, limit=4, results=str(tmp_path / "shown"), **few)
    run(EvalConfig.model_validate({**piece, "methods": ["receiver"]}))
    assert {a.method for a in read_answers(tmp_path / "shown" / "samples.jsonl")} == {"receiver"}


@pytest.mark.parametrize(
    ("trained", "task"),
    [("arc-easy-paper:q0", "arc-easy"), ("mmlu/virology:q0", "mmlu"), ("mmlu:q0", "mmlu/virology")],
)
def test_a_set_goes_by_several_names(
    trained: str, task: str, tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuser = tmp_path / "fuser"
    shutil.copytree(tiny_pair_folder, fuser)
    (fuser / "training_ids.txt").write_text(f"{trained}\nopenbookqa:q1\n")
    asked = [Question(f"q{n}", "?", ("a", "b"), 0) for n in range(3)]
    config = EvalConfig.model_validate(config_of(fuser, tmp_path, tasks=[task]))
    assert running.trained_on(config, {task: asked}) == {task: 1}


def test_numbers_of_questions(tiny_pair_folder: Path, tmp_path: Path) -> None:
    for wrong in ({"c2c": 0}, {"c2c": -5}):
        with pytest.raises(ValueError, match="greater than 0"):
            EvalConfig.model_validate(config_of(tiny_pair_folder, tmp_path, limits=wrong))
    config = config_of(tiny_pair_folder, tmp_path, methods=["c2c", "other"], limits={"other": 1})
    with pytest.raises(C2CError, match="other is to be asked one question, and needs another one's cache"):
        run(EvalConfig.model_validate(config))


def test_names_are_no_markup(tiny_pair_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tiny_pair_folder, tmp_path, methods=["receiver"], answers="likelihood")
    config["tasks"] = [{"task": config["tasks"][0]["task"], "name": "own [/long] [b]"}]
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as leaving:
        main(["evaluate", str(tmp_path / "run.yaml")])
    assert leaving.value.code in (0, None)
    assert "own [/long] [b] (9)" in capsys.readouterr().out
