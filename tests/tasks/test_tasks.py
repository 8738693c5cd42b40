"""Questions from a mirror, from the hub and from one's own file; every failure is one line that says what to do."""

from __future__ import annotations

import gzip
import json
import sys
import types
from pathlib import Path

import pytest

from cache2cache import tasks
from cache2cache.errors import C2CError
from cache2cache.tasks.base import read_rows


def write_rows(folder: Path, name: str, rows: list[dict]) -> None:
    path = folder / f"{name}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def arc_row(labels: str, key: str) -> dict:
    return {
        "id": "q1",
        "question": "Which?",
        "choices": {"text": [f"option {label}" for label in labels], "label": list(labels)},
        "answerKey": key,
    }


@pytest.mark.parametrize(
    ("labels", "key", "index", "letters"),
    [
        ("ABCD", "C", 2, "ABCD"),
        ("1234", "4", 3, "ABCD"),
        ("ABC", "B", 1, "ABC"),
        ("123", "1", 0, "ABC"),
        ("ABCDE", "E", 4, "ABCDE"),
    ],
)
def test_arc_labels(tmp_path: Path, labels: str, key: str, index: int, letters: str) -> None:
    write_rows(tmp_path, "allenai/ai2_arc/ARC-Easy/validation", [arc_row(labels, key)])
    (question,) = tasks.load("arc-easy", "validation", tmp_path)
    assert (question.answer, question.letters, question.letter) == (index, letters, letters[index])
    assert question.options[index] == f"option {key}"


def test_openbookqa(tmp_path: Path) -> None:
    row = arc_row("ABCD", "D")
    row["question_stem"] = row.pop("question")
    write_rows(tmp_path, "allenai/openbookqa/main/test", [row])
    (question,) = tasks.load("openbookqa", "test", str(tmp_path))
    assert (question.question, question.letter) == ("Which?", "D")


def test_commonsenseqa(tmp_path: Path) -> None:
    write_rows(tmp_path, "tau/commonsense_qa/default/train", [arc_row("ABCDE", "E")])
    (question,) = tasks.load("commonsenseqa", "train", tmp_path)
    assert (question.question, question.letters, question.letter) == ("Which?", "ABCDE", "E")


def mmlu_row(answer: int, **more: object) -> dict:
    return {"question": "Which?", "choices": ["w", "x", "y", "z"], "answer": answer, **more}


def test_mmlu(tmp_path: Path) -> None:
    write_rows(tmp_path, "cais/mmlu/all/dev", [mmlu_row(2, subject="virology"), mmlu_row(0, subject="sociology")])
    write_rows(tmp_path, "cais/mmlu/all/auxiliary_train", [mmlu_row(3, subject=""), mmlu_row(1)])
    first, second = tasks.load("mmlu", "dev", tmp_path)
    assert first == tasks.Question("dev-0", "Which?", ("w", "x", "y", "z"), 2, "virology")
    assert (second.id, second.letter, second.subject) == ("dev-1", "A", "sociology")
    extra = tasks.load("mmlu", "auxiliary_train", tmp_path)
    assert [(q.letter, q.subject) for q in extra] == [("D", ""), ("B", "")]
    assert not {q.id for q in extra} & {first.id, second.id}


REDUX = "edinburgh-dawg/mmlu-redux-2.0"


@pytest.mark.parametrize(
    ("error", "correct", "letter"),
    [
        ("ok", "", "C"),
        ("ok", "1", "C"),  # what a reviewer noted at a right label changes nothing
        ("ok", None, "C"),
        ("wrong_groundtruth", "B", "B"),
        ("wrong_groundtruth", "1", "B"),
        ("wrong_groundtruth", " d ", "D"),
        ("wrong_groundtruth", "0", "A"),
        ("wrong_groundtruth", "3", "D"),
        ("wrong_groundtruth", "", None),
        ("wrong_groundtruth", None, None),
        ("wrong_groundtruth", "4", None),
        ("wrong_groundtruth", "E", None),
        ("wrong_groundtruth", "A,D", None),
        ("wrong_groundtruth", "12", None),
        ("wrong_groundtruth", "BC", None),
        ("no_correct_answer", "1", None),
        ("expert", "1", None),
        ("bad_question_clarity", "1", "C"),
        ("bad_options_clarity", "0", "C"),
        ("multiple_correct_answers", "A,D", "C"),
    ],
)
def test_mmlu_redux_errors(tmp_path: Path, error: str, correct: str | None, letter: str | None) -> None:
    row = mmlu_row(2, error_type=error, correct_answer=correct)
    write_rows(tmp_path, f"{REDUX}/virology/test", [mmlu_row(0, error_type="ok", correct_answer=""), row])
    asked, *more = tasks.load("mmlu-redux", "test", tmp_path)
    assert (asked.id, asked.letter) == ("virology-0", "A")
    assert [(q.id, q.letter) for q in more] == ([] if letter is None else [("virology-1", letter)])


def test_mmlu_redux_subjects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = mmlu_row(1, error_type="ok", correct_answer="")
    for subject in ("virology", "anatomy"):
        write_rows(tmp_path, f"{REDUX}/{subject}/test", [row, row])
    found = tasks.load("mmlu-redux", "test", tmp_path)
    ids = [(q.id, q.subject) for q in found]
    assert ids == [(f"{subject}-{n}", subject) for subject in ("anatomy", "virology") for n in (0, 1)]
    with pytest.raises(C2CError, match=r"no split 'validation'.*it has test"):
        tasks.load("mmlu-redux", "validation", tmp_path)
    with pytest.raises(C2CError, match=r"there is no .*abstract_algebra"):
        tasks.load("mmlu-redux", "test", tmp_path / "empty")
    # From the hub, each of the 57 subjects once.
    asked: list[str] = []

    def load_dataset(repo: str, config: str, split: str) -> list[dict]:
        assert (repo, split) == (REDUX, "test")
        asked.append(config)
        return [row]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    from_hub = tasks.load("mmlu-redux", "test")
    assert len(set(asked)) == len(asked) == len({q.id for q in from_hub}) == 57


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("arc-easy", "validation", 570),
        ("arc-challenge", "validation", 299),
        ("openbookqa", "validation", 500),
        ("commonsenseqa", "train", 9741),
        ("mmlu", "dev", 285),
        ("mmlu", "validation", 1531),
        ("mmlu-redux", "test", 2760),  # of 2800: 19 without a right answer, 19 undecided, 2 without a right label
    ],
)
def test_real_mirror(data_dir: Path, name: str, split: str, rows: int) -> None:
    questions = tasks.load(name, split, data_dir)
    assert len(questions) == len({question.id for question in questions}) == rows
    assert all(question.question and all(question.options) for question in questions)


def test_missing_split_names_what_exists(tmp_path: Path) -> None:
    write_rows(tmp_path, "allenai/ai2_arc/ARC-Easy/train", [arc_row("ABCD", "A")])
    with pytest.raises(C2CError, match=r"no split 'dev'.*it has train"):
        tasks.load("arc-easy", "dev", tmp_path)
    with pytest.raises(C2CError, match="there is no"):
        tasks.load("arc-challenge", "train", tmp_path)


def test_damaged_mirror(tmp_path: Path) -> None:
    write_rows(tmp_path, "a/b/c/train", [{"x": "y" * 5000}])
    path = tmp_path / "a/b/c/train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(C2CError, match="cannot be read"):
        read_rows("a/b", "c", "train", tmp_path)
    path.write_text("plain text")
    with pytest.raises(C2CError, match="cannot be read"):
        read_rows("a/b", "c", "train", tmp_path)


def test_hub_without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(C2CError, match=r"cache2cache\[data\]"):
        tasks.load("openbookqa", "test")


def test_hub_rows_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(repo: str, config: str, split: str) -> list[dict]:
        if split == "dev":
            raise ValueError("Unknown split \"dev\".\nShould be one of ['train', 'test'].")
        assert (repo, config) == ("allenai/ai2_arc", "ARC-Challenge")
        return [arc_row("ABCD", "B")]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert tasks.load("arc-challenge", "test")[0].letter == "B"
    with pytest.raises(C2CError, match=r"one of \['train', 'test'\]") as caught:
        tasks.load("arc-challenge", "dev")
    assert "\n" not in str(caught.value)


def test_own_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"id": "x", "question": "Is it?", "options": ["yes", "no"], "answer": "B"}\n\n'
        '{"question": "Wo?", "options": ["hier", "dort", "天"], "answer": 2, "subject": "s"}\n',
        encoding="utf-8",
    )
    first, second = tasks.load(str(path))
    assert first == tasks.Question("x", "Is it?", ("yes", "no"), 1)
    assert second == tasks.Question("3", "Wo?", ("hier", "dort", "天"), 2, "s")


@pytest.mark.parametrize(
    "row",
    [
        "{not json",
        "[]",
        '{"question": "?", "options": ["a", "b"]}',
        '{"question": "?", "options": ["a", "b"], "answer": "C"}',
        '{"question": "?", "options": ["a", "b"], "answer": 2}',
        '{"question": "?", "options": ["a", "b"], "answer": -1}',
        '{"question": "?", "options": ["a"], "answer": 0}',
        '{"question": "?", "options": ["a", "b"], "answer": "AB"}',
        '{"question": "?", "options": ["a", "b"], "answer": ""}',
        '{"question": 5, "options": ["a", "b"], "answer": 0}',
        '{"question": "?", "options": "ab", "answer": 0}',
        '{"question": "?", "options": ["a", "b"], "answer": true}',
    ],
)
def test_own_file_with_a_bad_row(tmp_path: Path, row: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "?", "options": ["a", "b"], "answer": 0}\n' + row + "\n")
    with pytest.raises(C2CError, match="line 2"):
        tasks.load(str(path))


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(C2CError, match="arc-challenge, arc-easy, commonsenseqa, mmlu, mmlu-redux, openbookqa"):
        tasks.load("arc")
    with pytest.raises(C2CError, match="no file"):
        tasks.load(str(tmp_path / "none.jsonl"))
