"""An evaluation run: its numbers by hand, its files, its report, and folders that hold something else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cache2cache import C2CError
from cache2cache.config import EvalConfig
from cache2cache.evaluation.answers import Answer, read_answers
from cache2cache.evaluation.asking import METHODS
from cache2cache.evaluation.report import table
from cache2cache.evaluation.run import run as run_config
from cache2cache.evaluation.summary import summarize, summarize_all, summarize_run
from cache2cache.files import file_hash
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
    assert summary["gain"] == 40 and summary["presence"] == 10 and summary["content"] == 30
    assert (summary["rescued"], summary["harmed"]) == (5, 1)
    assert summary["presence_share"] == 25 and summary["recovered"] == pytest.approx(57.14)
    assert summary["harmed_share"] == 50
    counts = {m: (p["only_first"], p["only_second"], p["p"], p["difference"]) for m, p in summary["paired"].items()}
    assert counts == {"receiver": (5, 1, 0.219, 40), "sharer": (0, 3, 0.25, -30), "other": (4, 1, 0.375, 30)}
    # One question of ten is right with another's cache alone: of ten draws none to three are.
    assert summary["presence_interval"] == [0, 30]
    # Differences of one question in ten: the interval of a mean of ten draws from five 1, one -1 and four 0.
    assert summary["paired"]["receiver"]["interval"] == [0, 80] == summary["gain_interval"]
    # Of all draws of ten questions, 2.0% recover less than nothing and 2.8% more than nine tenths; the next values are
    # nothing and all.
    assert summary["recovered_interval"] == [0, 100]
    near = summarize(answers_of(receiver="1100000000", sharer="1110000000", c2c="1110000000"), METHODS[:3])
    assert near["recovered"] == 100 and near["recovered_interval"] is None  # many draws of ten have no gap
    assert summary["sharer"] == {"questions": 10, "accuracy": 90.0, "interval": [59.58, 98.21]}


def test_recovered_gap_with_an_interval() -> None:
    """40 questions: the sharer knows 20 more than the receiver, and C2C 10 of these."""
    summary = summarize(answers_of(receiver="0" * 40, sharer="1" * 20 + "0" * 20, c2c="1" * 10 + "0" * 30), METHODS[:3])
    low, high = summary["recovered_interval"]
    # A share of about 20 draws: its deviation is near 100 * sqrt(0.25 / 20) = 11.
    assert summary["recovered"] == 50 and 20 < low < 35 and 65 < high < 80


def test_the_interval_too_starts_at_the_better_of_the_receivers_answers() -> None:
    """By its letters the receiver knows none of 40 questions, in words 10, which C2C has all of and 10 more of 30."""
    letters = answers_of(receiver="0" * 40, sharer="1" * 40, c2c="1" * 20 + "0" * 20)
    words = [replace(a, answers="generation") for a in answers_of(receiver="1" * 10 + "0" * 30)]
    found = summarize_run([*letters, *words], ["own"], METHODS[:3])["likelihood"]["tasks"]["own"]
    low, high = found["recovered_interval"]
    # A share of about 30 draws, of which a third is closed: its deviation is near 100 * sqrt(2 / 9 / 30) = 8.6.
    assert found["recovered"] == pytest.approx(33.33) and 12 < low < 22 and 45 < high < 55
    alone = summarize(letters, METHODS[:3])
    assert alone["recovered"] == 50 and alone["recovered_interval"][0] > 30


def test_summary_without_all_methods() -> None:
    answers = answers_of(receiver="10", c2c="01")
    made = summarize(answers, ["receiver", "c2c"])
    assert set(made) == {*("receiver", "c2c", "gain", "paired", "rescued", "harmed", "harmed_share", "gain_interval")}
    assert set(summarize(answers, ["c2c"])) == {"c2c", "paired"}
    with pytest.raises(C2CError, match="nothing was measured"):
        summarize(answers, ["sharer"])


def test_the_gap_starts_at_the_better_of_the_receivers_answers() -> None:
    answers = answers_of(receiver="1000", sharer="1111", c2c="1110")
    words = [replace(a, answers="generation") for a in answers_of(receiver="1100")]
    assert summarize(answers, ["receiver", "sharer", "c2c"])["recovered"] == pytest.approx(66.67)
    both = summarize_run([*answers, *words], ["own"], ["receiver", "sharer", "c2c"])
    assert both["generation"]["pooled"]["receiver"]["accuracy"] == 50
    for column in (both["likelihood"]["tasks"]["own"], both["likelihood"]["average"], both["likelihood"]["pooled"]):
        assert column["recovered"] == 50 and column["gain"] == 50
    worse = summarize(answers_of(receiver="1100", sharer="1000", c2c="0100", other="1100"), METHODS)
    assert worse["recovered"] is None and worse["presence_share"] is None and worse["gain"] == -25


def test_fusion_off_is_compared_answer_by_answer() -> None:
    """Not only in what is right: another wrong option, other likelihoods beyond rounding, other words."""
    own = [replace(a, logprobs=[-1.0, -2.0]) for a in answers_of(receiver="000")]
    off = [replace(a, method="off") for a in own]
    methods = ["receiver", "off"]
    assert summarize([*own, *off], methods)["off_differs"] == 0
    assert summarize([*own, *(replace(a, logprobs=[-1.0001, -2.0]) for a in off)], methods)["off_differs"] == 0
    off[0], off[1] = replace(off[0], logprobs=[-1.0, -2.5]), replace(off[1], text="B")
    assert summarize([*own, *off], methods)["off_differs"] == 2


def scored(scores: dict[str, tuple[float, ...]], subjects: str | list[str] = "aaab", **more: Any) -> list[Answer]:
    """Answers in words to questions with references."""
    return [
        Answer(
            more.get("task", "own"), "paper", f"q{n}", method, -1, score == 1, [], answers="generation",
            subject=subjects[n], score=score, metric=more.get("metric", "f1"),
        )
        for method, given in scores.items()
        for n, score in enumerate(given)
    ]  # fmt: skip


SCORES: dict[str, tuple[float, ...]] = {"receiver": (0, 0.5, 0.1, 0.4), "c2c": (1, 0.5, 0.3, 0.2)}


def test_scores_and_subjects() -> None:
    """Scores have means, bootstrap intervals and counts of better and worse ones; tests of right and wrong have no
    place there, even where all scores of a part happen to be 0 or 1."""
    summary = summarize_run(scored(SCORES), ["own"], ["receiver", "c2c"])["generation"]["tasks"]["own"]
    assert summary["receiver"]["accuracy"] == 25 and summary["gain"] == 25
    low, high = summary["c2c"]["interval"]
    assert 20 <= low < 50 < high <= 100
    against = summary["paired"]["receiver"]
    assert (against["better"], against["worse"], against["difference"]) == (2, 1, 25)
    assert summary["subjects"]["b"]["c2c"] == {"questions": 1, "accuracy": 20, "interval": [20, 20]}
    whole = summarize(scored({"receiver": (0, 1, 0, 1), "c2c": (1, 1, 1, 0)}), ["receiver", "c2c"])
    for part in (summary, whole, whole["subjects"]["a"]):
        assert not {"rescued", "harmed", "harmed_share"} & part.keys()
        assert not {"p", "only_first", "only_second"} & part["paired"]["receiver"].keys()
    right = summarize(scored({"receiver": (0, 1, 0, 1), "c2c": (1, 1, 1, 0)}, metric="number"), ["receiver", "c2c"])
    assert (right["rescued"], right["harmed"], right["paired"]["receiver"]["p"]) == (2, 1, 1)
    assert right["c2c"]["interval"] == summarize(answers_of(c2c="1110"), ["c2c"])["c2c"]["interval"]  # Wilson's


def test_the_mean_of_longbench_is_over_data_sets() -> None:
    """Whatever the set of questions is called: accuracies, differences, their intervals and effects alike. The pool of
    several tasks has every question alike."""
    sets = ["qasper"] * 3 + ["trec"]
    rows = scored(SCORES, sets, task="mine")
    found = summarize(rows, ["receiver", "c2c"])
    assert (found["receiver"]["accuracy"], found["c2c"]["accuracy"], found["gain"]) == (30, 40, 10)
    assert found["paired"]["receiver"]["difference"] == 10
    # Draws are from within each data set: the one question of trec is in every one.
    low, high = found["paired"]["receiver"]["interval"]
    assert low == -10 and high == 40 and found["gain_interval"] == [low, high]
    assert found["subjects"]["qasper"]["receiver"]["accuracy"] == 20
    for order in (["mine", "own"], ["own", "mine"]):
        both = summarize_run([*rows, *scored(SCORES, task="own")], order, ["receiver", "c2c"])["generation"]
        assert both["pooled"]["receiver"]["accuracy"] == 25 and both["pooled"]["gain"] == 25
        assert both["average"]["receiver"]["accuracy"] == 27.5 and both["average"]["gain"] == 17.5


def test_methods_that_were_asked_fewer_questions() -> None:
    """They are compared on the questions that both have, and parts that a method has none of go without it."""
    right = {"receiver": "1100000011", "sharer": "1111", "c2c": "0111111100", "other": "10", "text": "111"}
    answers = [replace(a, subject="ab"[a.id > "q4"]) for a in answers_of(**right)]
    methods = ["receiver", "sharer", "c2c", "other", "text"]
    found = summarize(answers, methods)
    assert {m: found[m]["questions"] for m in methods} == {m: len(marks) for m, marks in right.items()}
    assert {m: p["questions"] for m, p in found["paired"].items()} == {
        "receiver": 10,
        "sharer": 4,
        "other": 2,
        "text": 3,
    }
    assert found["gain"] == 30 and found["paired"]["text"]["difference"] == pytest.approx(-33.33)
    # Of the first two questions the receiver has both right, C2C one, and another question's cache one.
    assert (found["presence"], found["content"], found["content_interval"][1]) == (-50, 0, 100)
    assert found["parts_of"] == 2 and "parts_of" not in summarize(
        answers_of(receiver="11", c2c="11", other="11"), methods
    )
    console = Console(width=200)
    with console.capture() as printed:
        console.print(table({"tasks": {"own": found}}, ""))
    assert "-50.0 of 2" in printed.get() and "+30.0 of" not in printed.get()
    assert found["recovered"] == 50  # of the first four: 2, 3 and 4
    assert set(found["subjects"]["b"]) & set(methods) == {"receiver", "c2c"}
    two = [replace(a, task="two") for a in answers_of(receiver="11", c2c="11")]
    both = summarize_run([*answers, *two], ["own", "two"], methods)["likelihood"]
    assert set(both["average"]) & set(methods) == set(both["pooled"]) & set(methods) == {"receiver", "c2c"}
    assert both["tasks"]["own"] == found and both["average"]["gain"] == 15
    apart = [*answers_of(receiver="11"), *[replace(a, id="q9") for a in answers_of(c2c="1")]]
    assert "gain" not in summarize(apart, ["receiver", "c2c"])


def test_several_tasks_averaged_and_pooled() -> None:
    """Every task counts alike in the average, every question in the pool, whose ids may be the same in two tasks."""
    one = answers_of(receiver="10", sharer="11", c2c="11")
    two = [replace(a, task="two") for a in answers_of(receiver="11110000", sharer="11111111", c2c="11110001")]
    summary = summarize_all({"own": one, "two": two}, ["receiver", "sharer", "c2c"])
    assert summary["tasks"] == {t: summarize(a, ["receiver", "sharer", "c2c"]) for t, a in (("own", one), ("two", two))}
    average, pooled = summary["average"], summary["pooled"]
    assert average["receiver"] == {"questions": 10, "accuracy": 50}
    assert average["c2c"] == {"questions": 10, "accuracy": 81.25}
    assert average["gain"] == 31.25 and average["recovered"] == 62.5
    assert pooled["c2c"]["questions"] == 10 and pooled["c2c"]["accuracy"] == 70 and pooled["recovered"] == 40
    assert pooled["paired"]["receiver"]["p"] == 0.5 and pooled["paired"]["receiver"]["difference"] == 20
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(summary, "validation, short prompt"))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines()]
    rows = {line[0]: line[1:] for line in lines if len(line) == 5}
    assert rows["C2C"][2] == "81.2" and rows["C2C"][3].startswith("70.0  [")
    assert rows["% of the gap to the sharer"] == ["+100.0", "+25.0", "+62.5", "+40.0"]
    assert rows["p, C2C against receiver alone"] == ["1.000", "1.000", "", "0.500"]


def test_table() -> None:
    found = {"arc-easy": answers_of(receiver="1000", c2c="1110", other="1100")}
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    summary = summarize_all(found, ["receiver", "c2c", "other"])
    console.print(table(summary, "validation, short prompt"))
    lines = console.export_text().splitlines()
    assert "validation, short prompt" in " ".join(" ".join(lines).split()) and any(
        "arc-easy (4)" in line for line in lines
    )
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in lines if line.count("│") == 3}
    assert rows["receiver alone"] == "25.0  [4.6, 69.9]" and rows["C2C"].startswith("75.0 ")
    assert rows["gain of C2C over the receiver"] == "+50.0"
    assert rows["… presence: with another question's cache"] == rows["… content: of C2C over that"] == "+25.0"
    assert "sharer alone" not in rows


def run(fuser: Path, output: Path, task: Path, **changes: Any) -> dict[str, Any]:
    options = {"fuser": str(fuser), "tasks": [str(task)], "batch_size": 4, "output": output, **changes}
    return run_config(EvalConfig.model_validate(options))


def test_a_run_and_its_files(tiny_pair_folder: Path, tmp_path: Path) -> None:
    task = write_questions(tmp_path / "own.jsonl")
    output = tmp_path / "new" / "evaluation"
    summary = run(tiny_pair_folder, output, task)
    assert json.loads((output / "summary.json").read_text()) == summary
    assert sorted(p.name for p in output.glob("[!.]*")) == sorted(
        ["questions.jsonl", "report.html", "report.md", "samples.jsonl", "settings.json", "summary.json"]
    )
    answers = read_answers(output / "samples.jsonl")
    assert summary["likelihood"]["tasks"][str(task)] == summarize(answers, METHODS) and len(answers) == 36
    settings = summary["settings"]
    weights = (tiny_pair_folder / "fuser.safetensors").read_bytes()
    assert settings["fuser_hash"] == hashlib.sha256(weights).hexdigest()
    for role in ("receiver", "sharer"):
        assert len(settings[role]["fingerprint"]) == 64 and settings[role]["dtype"] == "torch.float32"
    before = {p.name: p.read_bytes() for p in output.glob("[!.]*")}
    assert run(tiny_pair_folder, output, task) == summary
    assert {p.name: p.read_bytes() for p in output.glob("[!.]*")} == before


def test_other_settings_in_the_same_folder(tiny_pair_folder: Path, tmp_path: Path) -> None:
    task = write_questions(tmp_path / "own.jsonl")
    run(tiny_pair_folder, tmp_path / "out", task, methods=["receiver"])
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    for changes, words in (
        ({"prompt": "short"}, "another prompt; choose another --output"),
        ({"seed": 4, "split": "test"}, "another seed, split; choose"),
        ({"receiver_dtype": "bfloat16"}, "another receiver; choose"),
    ):
        with pytest.raises(C2CError, match=words):
            run(tiny_pair_folder, tmp_path / "out", task, **changes)
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
        run(tiny_pair_folder, tmp_path / "out", task, **changes)
    assert not (tmp_path / "out").exists()


def test_a_store_is_part_of_the_settings(tiny_pair_folder: Path, tmp_path: Path) -> None:
    task = write_questions(tmp_path / "own.jsonl")
    kept = {"store": tmp_path / "store", "store_precision": "int8"}
    live = run(tiny_pair_folder, tmp_path / "live", task)
    first = run(tiny_pair_folder, tmp_path / "out", task, **kept)
    assert live["settings"]["store"] is None and first["settings"]["store"] == "int8"
    shards = {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()}
    again = run(tiny_pair_folder, tmp_path / "again", task, store=tmp_path / "store")
    assert again["likelihood"] == first["likelihood"]  # the store says what it is made of, and has everything
    assert {p.name: p.read_bytes() for p in (tmp_path / "store").iterdir()} == shards
    for changes, words in (
        ({}, "another store; choose another --output"),
        ({"store": tmp_path / "store", "store_precision": "bfloat16"}, "holds int8, bfloat16 was asked for"),
        ({"store": tmp_path / "store", "store_precision": "int4"}, "unknown precision 'int4'"),
        ({"store_precision": "int8"}, "was given without a store"),
    ):
        with pytest.raises(C2CError, match=words):
            run(tiny_pair_folder, tmp_path / "out", task, **changes)
    run(tiny_pair_folder, tmp_path / "new", task, store=tmp_path / "other", methods=["c2c"])
    assert json.loads((tmp_path / "other" / "store.json").read_text())["precision"] == "bfloat16"


def test_file_hash(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert file_hash(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()
