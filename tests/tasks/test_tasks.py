"""Questions from a mirror, from the hub and from one's own file; every failure is one line that says what to do."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import types
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache2cache import tasks
from cache2cache.errors import C2CError
from cache2cache.tasks import longbench
from cache2cache.tasks.base import read_rows
from cache2cache.tasks.metrics import METRICS


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


def test_arc_as_in_the_paper(tmp_path: Path) -> None:
    rows = [
        {**arc_row(labels, key), "id": f"{labels}{key}"}
        for labels, key in (("ABCD", "C"), ("1234", "4"), ("ABCDE", "E"), ("ABCDE", "D"), ("ABC", "B"))
    ]
    for config in ("ARC-Easy", "ARC-Challenge"):
        write_rows(tmp_path, f"allenai/ai2_arc/{config}/test", rows)
    for name in ("arc-easy", "arc-challenge"):
        assert len(tasks.load(name, "test", tmp_path)) == 5
        kept = tasks.load(f"{name}-paper", "test", tmp_path)
        assert [question.id for question in kept] == ["ABCDC", "ABCDED", "ABCB"]


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


CEVAL = "ceval/ceval-exam"


def ceval_row(id: int, answer: str) -> dict:
    return {"id": id, "question": "哪个？", "A": "甲", "B": "乙", "C": "丙", "D": "丁", "answer": answer}


def test_ceval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path, f"{CEVAL}/law/val", [ceval_row(0, "D"), ceval_row(1, "A")])
    write_rows(tmp_path, f"{CEVAL}/law/dev", [ceval_row(0, "C")])
    write_rows(tmp_path, f"{CEVAL}/logic/dev", [ceval_row(0, "B")])  # no val
    found = tasks.load("c-eval", "val", tmp_path)
    assert found == tasks.load("c-eval", "validation", tmp_path)
    assert found[0] == tasks.Question("law-0", "哪个？", ("甲", "乙", "丙", "丁"), 3, "law")
    assert [(q.id, q.letter) for q in tasks.load("c-eval", "dev", tmp_path)] == [
        ("law-dev-0", "C"),
        ("logic-dev-0", "B"),
    ]
    assert [q.subject for q in tasks.load("c-eval/logic", "dev", tmp_path)] == ["logic"]
    write_rows(tmp_path, f"{CEVAL}/law/test", [ceval_row(0, "")])
    with pytest.raises(C2CError, match=r"has no answer.*take val or dev"):
        tasks.load("c-eval", "test", tmp_path)
    with pytest.raises(C2CError, match=r"no split 'train'.*it has dev, test, val"):
        tasks.load("c-eval", "train", tmp_path)
    asked: list[str] = []

    def load_dataset(repo: str, config: str, split: str) -> list[dict]:
        assert (repo, split) == (CEVAL, "val")
        asked.append(config)
        return [ceval_row(0, "A")]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert len({q.id for q in tasks.load("c-eval")}) == len(set(asked)) == len(asked) == 52


def test_mmlu_pro(tmp_path: Path) -> None:
    options = [f"option {n}" for n in range(10)]
    padded = ["w", "N/A", "x", "y", *["N/A"] * 6]
    write_rows(
        tmp_path,
        "TIGER-Lab/MMLU-Pro/default/test",
        [
            {"question_id": 70, "question": "Which?", "options": options, "answer_index": 9, "category": "law"},
            {"question_id": 71, "question": "Which?", "options": padded, "answer_index": 3, "category": "law"},
        ],
    )
    ten, three = tasks.load("mmlu-pro", "test", tmp_path)
    assert (ten.id, ten.letters, ten.letter, ten.subject) == ("70", "ABCDEFGHIJ", "J", "law")
    assert (three.options, three.letter) == (("w", "x", "y"), "C")


def gpqa_row(id: str) -> dict:
    wrong = {f"Incorrect Answer {n}": f" wrong {n}\n" for n in (1, 2, 3)}
    return {
        "Record ID": id,
        "Question": "Which?\n",
        "Correct Answer": " right",
        "High-level domain": "Physics",
        **wrong,
    }


def test_gpqa_options_are_shuffled_by_the_row_alone(tmp_path: Path) -> None:
    rows = [gpqa_row(f"rec{n}") for n in range(100)]
    write_rows(tmp_path, "Idavidrein/gpqa/gpqa_diamond/train", rows)
    questions = tasks.load("gpqa-diamond", "train", tmp_path)
    assert all(q.options[q.answer] == "right" and len(set(q.options)) == 4 for q in questions)
    assert min(sum(q.answer == place for q in questions) for place in range(4)) > 10
    assert (questions[0].question, questions[0].subject) == ("Which?", "Physics")
    assert [q.letter for q in questions[:8]] == list("CCDCCCBC")  # the recorded seed
    write_rows(tmp_path, "Idavidrein/gpqa/gpqa_diamond/train", rows[50:])
    assert tasks.load("gpqa-diamond", "train", tmp_path) == questions[50:]


def test_gsm8k(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "She has 600 + <<634=634>>634 left.\n#### 1,234"}
    write_rows(tmp_path, "openai/gsm8k/main/test", [row, row])
    first, second = tasks.load_open("gsm8k", "test", tmp_path)
    assert (first.references, first.id, second.id) == (("1,234",), "test-0", "test-1")
    assert first.prompt.startswith("How many?\n\n") and "####" in first.prompt
    assert tasks.score(first, "634 + 600 = 1234\n#### 1234") == 1.0
    assert tasks.score(first, "#### 634") == 0.0


def test_math_500(tmp_path: Path) -> None:
    row = {
        "problem": "What is {x} if $2x = 1$?",
        "answer": "\\frac{1}{2}",
        "subject": "Algebra",
        "unique_id": "a/1.json",
    }
    write_rows(tmp_path, "HuggingFaceH4/MATH-500/default/test", [row])
    (question,) = tasks.load_open("math-500", "test", tmp_path)
    assert (question.id, question.subject, question.references) == ("a/1.json", "Algebra", ("\\frac{1}{2}",))
    assert question.prompt.startswith("What is {x} if $2x = 1$?\n") and question.prompt.endswith("\\boxed{}.")
    assert tasks.score(question, "Half: $\\boxed{0.5}$") == 1.0


def longbench_row(id: str, length: int = 100, **more: object) -> dict:
    row = {"input": "Who?", "context": "It was {her}.", "answers": ["Ada", "her"], "length": length, "_id": id}
    return {**row, "dataset": "hotpotqa", "language": "en", "all_classes": None, **more}


def test_longbench(tmp_path: Path) -> None:
    write_rows(tmp_path, "THUDM/LongBench/hotpotqa/test", [longbench_row("x"), longbench_row("y")])
    classes = longbench_row("z", answers=["Food"], all_classes=["Food", "Date"])
    write_rows(tmp_path, "THUDM/LongBench/trec/test", [classes])
    write_rows(tmp_path, "THUDM/LongBench/hotpotqa_e/test", [longbench_row("x", n) for n in (3999, 4000, 8000)])
    first, _, trec = tasks.load_open("longbench", "test", tmp_path)
    assert (first.id, first.subject, first.references, first.length) == ("hotpotqa/x", "hotpotqa", ("Ada", "her"), 100)
    assert first.prompt.endswith("\n\nQuestion: Who?\nAnswer:") and "passages.\nIt was {her}.\n\nAnswer" in first.prompt
    assert (first.metric, first.max_new_tokens, first.first_line) == ("f1", 32, False)
    assert (trec.metric, trec.classes, trec.first_line) == ("classification", ("Food", "Date"), True)
    assert tasks.score(trec, "Food\nQuestion: Date") == 1.0
    even = tasks.load_open("longbench-e", "test", tmp_path)
    assert [longbench.bucket(q.length) for q in even] == ["0-4k", "4-8k", "8k+"]
    assert [q.subject for q in even] == ["hotpotqa"] * 3
    assert tasks.load_open("longbench/trec", "test", tmp_path) == [trec]


def test_longbench_held_out_is_what_is_not_trained_on(tmp_path: Path) -> None:
    rows = [longbench_row(f"id{n}") for n in range(100)]
    write_rows(tmp_path, "THUDM/LongBench/hotpotqa/test", rows)
    held_out = {q.id for q in tasks.load_open("longbench", "held-out", tmp_path)}
    assert held_out == {f"hotpotqa/{row['_id']}" for row in rows if longbench.measured_on(row)}
    assert 10 < len(held_out) < 40


def test_longbench_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in longbench.KINDS:
            archive.writestr(f"data/{name}.jsonl", json.dumps(longbench_row("x", all_classes=["Ada"])) + "\n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file, repo_type: path)
    assert [q.subject for q in tasks.load_open("longbench")] == list(longbench.KINDS)
    with pytest.raises(C2CError, match=r"qasper_e.*could not be had"):
        tasks.load_open("longbench-e")
    with pytest.raises(C2CError, match=r"no split 'validation'.*test or held-out"):
        tasks.load_open("longbench", "validation")


def test_longbench_has_the_published_sets() -> None:
    assert len(longbench.KINDS) == 21 and len(longbench.EVEN) == 13
    assert set(longbench.EVEN) | set(longbench.FIRST_LINE) <= set(longbench.KINDS)
    for kind in longbench.KINDS.values():
        assert kind.metric in METRICS and kind.prompt.count("{context}") == 1
    prompts = "\0".join(f"{name}\0{kind.prompt}" for name, kind in sorted(longbench.KINDS.items()))
    assert (
        hashlib.sha256(prompts.encode()).hexdigest()
        == "9291c0e759dcd31d64a939105ae120e9a52564b5cee69136cabe536aa0fcdf62"
    )  # of dataset2prompt.json


@given(st.lists(st.integers()), st.integers(0, 20))
def test_cut_middle(tokens: list[int], limit: int) -> None:
    kept = longbench.cut_middle(tokens, limit)
    assert kept == tokens if len(tokens) <= limit else len(kept) == limit // 2 * 2
    half = len(kept) // 2
    assert kept[:half] == tokens[:half] and kept[len(kept) - half :] == tokens[len(tokens) - half :]


def test_minilongbench(tmp_path: Path) -> None:
    row = {"task": "samsum", "index": 3, "prompt": "Sum up.", "answers": ["He left."], "all_classes": None}
    write_rows(tmp_path, "minilongbench/all/test", [row])
    (question,) = tasks.load_open("minilongbench", "test", tmp_path)
    assert (question.id, question.prompt, question.metric) == ("samsum/3", "Sum up.", "rouge-l")
    assert tasks.score(question, "He left.\nDialogue: more") == pytest.approx(1.0)
    with pytest.raises(C2CError, match="local mirror only"):
        tasks.load_open("minilongbench")


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("gsm8k", "train", 7473),
        ("longbench", "test", 400),  # the mirror has two of the 21 sets
        ("longbench/multifieldqa_zh", "held-out", 52),
        ("minilongbench", "test", 127),
    ],
)
def test_real_mirror_with_references(data_dir: Path, name: str, split: str, rows: int) -> None:
    questions = tasks.load_open(name, split, data_dir)
    assert len(questions) == len({question.id for question in questions}) == rows
    assert all(question.prompt and all(question.references) for question in questions)
    if "zh" not in name:
        of_english = [q for q in questions if not q.metric.endswith("-zh")]
        boxes = [(q, "#### " + q.references[0] if q.metric == "number" else q.references[0]) for q in of_english[:300]]
        assert all(tasks.score(q, text) > 0.9 for q, text in boxes if not q.first_line and q.metric != "code")


@pytest.mark.parametrize(
    ("name", "split", "rows"),
    [
        ("arc-easy", "validation", 570),
        ("arc-easy-paper", "validation", 549),
        ("arc-challenge-paper", "validation", 294),
        ("c-eval", "val", 695),
        ("c-eval", "dev", 260),
        ("mmlu-redux/anatomy", "test", 100),
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


def test_own_file_with_references(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(
        '{"question": "Who?", "references": ["Ada", "her"]}\n'
        '{"id": 7, "question": "Sum?", "references": ["4"], "metric": "number", "max_new_tokens": 9, "subject": "s"}\n'
    )
    assert tasks.is_open(str(path))
    first, second = tasks.load_open(str(path))
    assert first == tasks.OpenQuestion("1", "Who?", ("Ada", "her"), "exact", 64)
    assert second == tasks.OpenQuestion("7", "Sum?", ("4",), "number", 9, "s")
    assert [tasks.score(first, " her\n"), tasks.score(second, "It is 4.0.")] == [1.0, 1.0]


@pytest.mark.parametrize(
    "row",
    [
        '{"question": "?", "references": []}',
        '{"question": "?", "references": "Ada"}',
        '{"question": "?", "references": [4]}',
        '{"question": "?", "references": ["4"], "metric": "f2"}',
        '{"question": "?", "references": ["4"], "max_new_tokens": 0}',
        '{"question": "?", "options": ["a", "b"], "answer": 0}',
    ],
)
def test_own_file_with_a_bad_reference(tmp_path: Path, row: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "?", "references": ["4"]}\n' + row + "\n")
    with pytest.raises(C2CError, match="line 2"):
        tasks.load_open(str(path))


def test_own_ids_letters_and_files(tmp_path: Path) -> None:
    """An id of 0 is an id; a letter may be a small one; a mark at the front of the file is none of its text."""
    path = tmp_path / "mine.jsonl"
    path.write_text('\ufeff{"id": 0, "question": "?", "options": ["a", "b"], "answer": " b"}\n', encoding="utf-8")
    (question,) = tasks.load(str(path))
    assert (question.id, question.letter) == ("0", "B")
    path.write_text('{"id": 0, "question": "?", "references": ["x"]}\n\n{"question": "?", "references": ["x"]}\n')
    assert [q.id for q in tasks.load_open(str(path))] == ["0", "3"]
    path.write_text('{"question": "?", "references": [" "]}\n')
    with pytest.raises(C2CError, match="line 1: there is no reference answer"):
        tasks.load_open(str(path))
    path.write_text('{"question": "?", "options": ["a", "b"], "answer": "both"}\n')
    with pytest.raises(C2CError, match="line 1: the answer is 'both'; expected a letter"):
        tasks.load(str(path))
    path.write_bytes(b'{"question": "\xff"}\n')
    with pytest.raises(C2CError, match="no text in UTF-8"):
        tasks.load(str(path))


@pytest.mark.parametrize("rows", ["", "{not json", "[]", '{"question": "?", "options": ["a", "b"], "answer": 0}'])
def test_what_has_no_references_is_read_as_options(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(rows)
    assert not tasks.is_open(str(path))


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(C2CError, match=r"arc-challenge, .*commonsenseqa, .*mmlu-redux, openbookqa"):
        tasks.load("arc")
    with pytest.raises(C2CError, match="gsm8k, longbench, longbench-e, math-500, minilongbench"):
        tasks.load_open("mmlu")
    assert [tasks.is_open(name) for name in ("mmlu", "gsm8k", "longbench/trec", "c-eval/law")] == [
        False,
        True,
        True,
        False,
    ]
    write_rows(tmp_path, "cais/mmlu/all/dev", [mmlu_row(2, subject="virology")])
    with pytest.raises(C2CError, match="no subject 'law'; expected one of virology"):
        tasks.load("mmlu/law", "dev", tmp_path)
    with pytest.raises(C2CError, match="no file"):
        tasks.load(str(tmp_path / "none.jsonl"))
