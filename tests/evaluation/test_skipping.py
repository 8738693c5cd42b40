"""The threshold for skipping the sharer: by hand, against brute force, and from runs on disk."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache2cache import C2CError
from cache2cache.evaluation.answers import Answer, read_answers
from cache2cache.evaluation.skipping import Case, Outcome, apply, calibrate, calibration, cases_of, summarize, table
from evaluation.test_report import run
from training.runs import write_questions

# confidence, receiver right, C2C right; the most confident first
CASES = [
    Case(0.9, True, True),
    Case(0.8, True, False),
    Case(0.7, False, True),
    Case(0.6, False, True),
    Case(0.5, True, False),
    Case(0.4, False, True),
]


def test_outcome_by_hand() -> None:
    assert apply(CASES, None) == Outcome(6, 0, 3, 4, 4, 0, 0)
    assert apply(CASES, 0.8) == Outcome(6, 2, 3, 4, 5, 1, 0)  # reaching it is enough
    assert apply(CASES, 0.6) == Outcome(6, 4, 3, 4, 3, 1, 2)
    assert apply(CASES, 0.0) == Outcome(6, 6, 3, 4, 3, 2, 3)


def test_threshold_by_hand() -> None:
    assert calibrate(CASES) == 0.45  # gained 2, lost 2
    assert calibrate(CASES[:4]) == 0.65  # gained 1, lost 1; 0.6 would still be skipped from 0.6 on
    assert calibrate(CASES[2:]) is None and calibrate(CASES[2:], tolerance=24.9) is None
    assert calibrate(CASES[2:], tolerance=25) == 0.45  # lost 1 more than gained, of 4
    assert calibrate(CASES[2:], tolerance=50) == 0.2  # all
    assert calibrate([Case(0.512345, True, True), Case(0.51, False, True)]) == 0.511


def test_equal_confidences_go_together() -> None:
    assert calibrate([Case(0.5, True, False), Case(0.5, False, True), Case(0.5, False, True)]) is None
    assert calibrate([Case(0.5, True, False), Case(0.5, False, True)]) is not None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.builds(Case, st.sampled_from([0.1, 0.25, 0.25001, 0.5, 0.999999, 1.0]), st.booleans(), st.booleans()),
        min_size=1,
    ),
    st.sampled_from([0.0, 1.0, 10.0, 100.0]),
)
def test_threshold_against_every_other(cases: list[Case], tolerance: float) -> None:
    """No threshold that keeps the accuracy skips more; the one that is found keeps it, and lies off the confidences."""
    allowed = [
        outcome.skipped
        for c in cases
        if 100 * ((outcome := apply(cases, c.confidence)).c2c - outcome.rule) <= tolerance * len(cases)
    ]
    threshold = calibrate(cases, tolerance)
    assert (threshold is None) == (not allowed)
    if threshold is not None:
        assert 0 < threshold <= 1 and apply(cases, threshold).skipped == max(allowed)
        assert apply(cases, threshold - 1e-7).skipped == apply(cases, threshold + 1e-7).skipped or threshold == 1.0
        assert tolerance < 100 or len(cases) == max(allowed)


def test_summary_by_hand(tmp_path: Path) -> None:
    made = summarize(tmp_path, apply(CASES, 0.8))
    assert (made["questions"], made["gained"], made["lost"], made["chance"]) == (6, 1, 0, 61.11)
    assert made["skipped"] == {"share": 33.33, "interval": [9.68, 70.0]}
    assert [made[m]["accuracy"] for m in ("receiver", "c2c", "skip")] == [50.0, 66.67, 83.33]


def answer(i: int, method: str, correct: bool, confidence: float | None = None) -> Answer:
    return Answer("own", "paper", f"q{i}", method, 0, correct, [0.0], confidence)


def test_answers_are_paired() -> None:
    both = [answer(0, "receiver", True, 0.5), answer(1, "receiver", False, 0.25)]
    both += [answer(1, "c2c", True), answer(0, "c2c", False), answer(0, "other", True)]
    assert cases_of(both) == [Case(0.5, True, False), Case(0.25, False, True)]
    for rows, words in (
        (both[:3], "2 answers of the receiver and 1 of C2C, 1 without the other; expected both to every question"),
        (both[2:], "0 answers of the receiver and 2 of C2C"),
        ([], "0 answers of the receiver and 0 of C2C"),
        ([answer(0, "receiver", True), answer(0, "c2c", True)], "come without its confidence"),
    ):
        with pytest.raises(C2CError, match=words):
            cases_of(rows)


def test_wrong_numbers() -> None:
    with pytest.raises(C2CError, match="no questions to calibrate on"):
        calibrate([])
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(C2CError, match="expected 0 or more"):
            calibrate(CASES, tolerance)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tiny_pair_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two evaluations of one pair, on 9 and on 5 questions of unlike sets."""
    for name, count in (("first", 9), ("second", 5)):
        task = write_questions(tmp_path / f"{name}.jsonl", count)
        task.write_text(task.read_text().replace("number", f"the {name} number"))
        run(tiny_pair_folder, tmp_path / name, task, methods=["receiver", "c2c"])
    return tmp_path / "first", tmp_path / "second"


def test_what_is_calibrated_is_what_is_run(runs: tuple[Path, Path], tiny_pair_folder: Path, tmp_path: Path) -> None:
    """The method skip, in the same folder, skips and answers as the calibration says, at its threshold and others."""
    first, second = runs
    result = calibration(first, second, tolerance=30)
    threshold = result["threshold"]
    assert threshold is not None and set(result) == {"threshold", "tolerance", "calibrated", "checked"}
    cases = cases_of(read_answers(first / "samples.jsonl"))
    ranked = sorted(c.confidence for c in cases)
    for number, skip in enumerate([threshold, (ranked[3] + ranked[4]) / 2, 0.0, 1.0]):
        folder = first if number == 0 else tmp_path / f"skip-{number}"
        made = run(tiny_pair_folder, folder, tmp_path / "first.jsonl", methods=["receiver", "c2c", "skip"], skip=skip)
        row = next(iter(made["likelihood"]["tasks"].values()))["skip"]
        expected = apply(cases, skip)
        assert row["skipped"] == round(100 * expected.skipped / 9, 2) and row["accuracy"] == round(
            100 * expected.rule / 9, 2
        )
        assert made["settings"]["skip"] == skip
    assert 0 < apply(cases, (ranked[3] + ranked[4]) / 2).skipped < 9
    assert calibration(first, second, tolerance=30) == result  # rows of skip change nothing
    table(result)


def test_runs_that_do_not_go_together(runs: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = runs
    with pytest.raises(C2CError, match=r"9 questions of .*first are in .*first too; check on other questions"):
        calibration(first, first)
    with pytest.raises(
        C2CError, match="holds no evaluation; expected the output folder of c2c evaluate, or its --results"
    ):
        calibration(tmp_path)
    made = json.loads((second / "settings.json").read_text())
    made["receiver"]["dtype"] = "torch.bfloat16"
    for changed, words in (({}, None), ({"fuser_hash": "x"}, "fuser"), ({"sharer": {"fingerprint": "x"}}, "sharer")):
        (second / "settings.json").write_text(json.dumps({**made, **changed}))
        if words is None:
            calibration(first, second)  # the same weights in another number format
            continue
        with pytest.raises(C2CError, match=f"was made with another {words} than .*; give runs of one pair"):
            calibration(first, second)


def test_a_receiver_that_is_never_right_is_never_left_alone() -> None:
    result = {"calibrated": summarize(Path("run"), apply([Case(1.0, False, True)] * 4, None))}
    assert calibrate([Case(1.0, False, True)] * 4) is None
    assert result["calibrated"]["skipped"]["share"] == 0 and result["calibrated"]["skip"] == result["calibrated"]["c2c"]


def test_failed_questions_are_left_out_and_counted() -> None:
    rows = [
        Answer("own", "paper", f"q{n}", method, 0, True, [0.0], confidence=0.5 if method == "receiver" else None)
        for method in ("receiver", "c2c")
        for n in range(4)
    ]
    rows[1] = replace(rows[1], confidence=None, logprobs=[], error="C2CError")
    with pytest.warns(match="1 questions are left out, of which an answer failed"):
        assert len(cases_of(rows)) == 3


def test_questions_of_one_split_however_it_was_named(runs: tuple[Path, Path]) -> None:
    first, second = runs
    for name in ("samples.jsonl", "questions.jsonl"):
        shutil.copyfile(first / name, second / name)
    about = json.loads((second / "settings.json").read_text())
    task = read_answers(first / "samples.jsonl")[0].task
    about["split"] = "train"
    (second / "settings.json").write_text(json.dumps({**about, f"task {task}": {"split": "validation"}}))
    with pytest.raises(C2CError, match=r"9 questions of .* are in .* too; check on other questions"):
        calibration(first, second)


def test_questions_under_another_name_and_by_another_prompt(
    runs: tuple[Path, Path], tiny_pair_folder: Path, tmp_path: Path
) -> None:
    first, second = runs
    again = tmp_path / "again.jsonl"
    shutil.copyfile(tmp_path / "second.jsonl", again)
    run(tiny_pair_folder, tmp_path / "again", again, methods=["receiver", "c2c"])
    with pytest.raises(C2CError, match=r"5 questions of .*again are in .*second too; check on other questions"):
        calibration(second, tmp_path / "again")
    about = json.loads((second / "settings.json").read_text())
    (second / "settings.json").write_text(json.dumps({**about, "prompt": "short"}))
    with pytest.raises(
        C2CError, match=r"second has the prompt short, .*first has paper; a threshold holds for questions"
    ):
        calibration(first, second)
