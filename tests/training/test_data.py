"""Training examples: layouts of rows, draws that only the seed decides, and no question that is measured on."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cache2cache import C2CError
from cache2cache.config import DataSource, TrainConfig
from cache2cache.fuser import checkpoint
from cache2cache.tasks import Question, load, load_open
from cache2cache.tasks.prompts import ANSWER_PREFIX, paper_prompt, short_prompt
from cache2cache.training import data
from cache2cache.training.data import (
    HELD_OUT,
    Example,
    cut,
    examples,
    mix,
    question_example,
    read_chat,
    same_row,
    shortened,
    split,
    without_held_out,
)
from cache2cache.training.items import prepare
from cache2cache.training.recipe import read_recipe
from training.runs import config_of, pair_of, write_questions, write_rows

ROOT = Path(__file__).parents[2]
TASKS = ("arc-easy", "arc-challenge", "openbookqa")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "Q", "response": "A"}, ([user("Q")], "A")),
        ({"instruction": " Q ", "context": " C ", "response": " A\n", "category": "x"}, ([user("Q\n\nC")], "A")),
        ({"instruction": "Q", "input": "I", "output": "A"}, ([user("Q\n\nI")], "A")),
        ({"instruction": "Q", "input": "", "output": "A"}, ([user("Q")], "A")),
        ({"prompt": "Q", "completion": "A"}, ([user("Q")], "A")),
        ({"prompt": "Q", "response": "A"}, ([user("Q")], "A")),
        ({"question": "Q", "answer": " A"}, ([user("Q")], "A")),
        ({"instruction": "Q", "output": "A", "question": "other", "answer": "other"}, ([user("Q")], "A")),
        (  # LongBench: some sets ask in a field, others by being what they are
            {"context": "C", "input": "Q?", "answers": ["A", "B"], "dataset": "hotpotqa", "_id": "x"},
            ([user("C\n\nQ?")], "A"),
        ),
        (
            {"context": "C", "input": "", "answers": ["A"], "dataset": "multi_news"},
            ([user("C\n\nSummarise these news articles on one page.")], "A"),
        ),
        (
            {"context": "C", "input": "I", "answers": ["A"], "dataset": "repobench-p_e"},
            ([user("C\n\nWrite the next line of this code.\n\nI")], "A"),
        ),
        ({"messages": [user("Q"), {"role": "assistant", "content": " A "}]}, ([user("Q")], "A")),
        (
            {
                "conversations": [
                    {"from": "system", "value": "S"},
                    {"from": "human", "value": "Q"},
                    {"from": "gpt", "value": "A"},
                    {"from": "human", "value": "Q2"},
                    {"from": "gpt", "value": "A2"},
                    {"from": "human", "value": "never answered"},
                ]
            },
            (
                [
                    {"role": "system", "content": "S"},
                    user("Q"),
                    {"role": "assistant", "content": "A"},
                    user("Q2"),
                ],
                "A2",
            ),
        ),
        (  # OpenHermes as it comes: fields that say nothing, and the system message beside the turns
            {
                "custom_instruction": None,
                "id": None,
                "system_prompt": "S",
                "conversations": [{"from": "human", "value": "Q", "weight": 0}, {"from": "gpt", "value": "A"}],
            },
            ([system("S"), user("Q")], "A"),
        ),
        (
            {"system_prompt": "other", "conversations": [system("S"), user("Q"), assistant("A")]},
            ([system("S"), user("Q")], "A"),
        ),
        ({"system_prompt": " ", "messages": [user("Q"), assistant("A")]}, ([user("Q")], "A")),
        ({"system": "S", "instruction": "Q", "input": "", "output": "A"}, ([system("S"), user("Q")], "A")),
        (
            {"prompt": [system("S"), user("Q")], "completion": [assistant("A")]},
            ([system("S"), user("Q")], "A"),
        ),
        ({"prompt": [user("Q")], "completion": "A"}, ([user("Q")], "A")),
        ({"prompt": "Q", "completion": [assistant("A")]}, ([user("Q")], "A")),
        ({"messages": [assistant("Hello."), user("Q"), assistant("A")]}, ([assistant("Hello."), user("Q")], "A")),
    ],
)
def test_layouts(row: dict[str, Any], expected: tuple[list[dict[str, str]], str]) -> None:
    messages, response = read_chat(row, "row")[-1]
    assert (list(messages), response) == expected


@pytest.mark.parametrize(
    ("row", "responses"),
    [
        ({"messages": [user("1"), assistant("a"), user("2"), assistant("b")]}, ["a", "b"]),
        ({"messages": [system("S"), user("1"), assistant("a"), assistant("b")]}, ["a", "b"]),
        # Nothing stands before a greeting that could be fused; an empty turn has nothing to learn.
        ({"messages": [assistant("Hello."), user("1"), assistant(" "), user("2"), assistant("b")]}, ["b"]),
        # A prompt's own turns are prompt.
        (
            {
                "system": "S",
                "prompt": [user("1"), assistant("a"), user("2")],
                "completion": [assistant("b"), user("3"), assistant("c")],
            },
            ["b", "c"],
        ),
    ],
)
def test_every_response_of_a_row(row: dict[str, Any], responses: list[str]) -> None:
    found = read_chat(row, "row")
    assert [response for _, response in found] == responses
    for (messages, response), (longer, _) in pairwise(found):
        assert (*messages, assistant(response)) == longer[: len(messages) + 1]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"query": "Q", "reply": "A"}, "file, row 7 has fields query, reply; expected messages, conversations"),
        (
            {"question": "Q", "options": ["x", "y"], "answer": "A"},
            "row 7 is a question with options; give such a file as task",
        ),
        (
            {"question": "Q", "choices": ["x", "y"], "answer": 1},
            "row 7 is a question with options; give such a file as task",
        ),
        ({"prompt": "Q", "choices": ["x", "y"], "answer": 1}, "has fields prompt, choices, answer; expected"),
        ({"context": "C", "input": " ", "answers": ["A"]}, "row 7 asks nothing about its context"),
        ({"context": "C", "input": "Q", "answers": [""]}, "row 7 asks nothing about its context, or its first answer"),
        (
            {"context": "C", "input": "Q", "answers": []},
            "has fields context, input, answers \\(empty: answers\\); expected",
        ),
        ({"instruction": "Q", "response": "  "}, "file, row 7 has fields instruction, response; expected"),
        ({"instruction": 5, "response": "A"}, "expected messages"),
        ({"messages": [user("Q")]}, "file, row 7 has no assistant turn with text behind a user turn"),
        ({"messages": [{"role": "assistant", "content": "A"}]}, "no assistant turn with text behind"),
        ({"messages": [user("Q"), {"role": "assistant", "content": " "}]}, "no assistant turn with text behind"),
        ({"messages": [user("Q"), {"role": "tool", "content": "A"}]}, "a turn with fields role, content has no known"),
        ({"messages": [{"role": "user", "content": ["parts"]}]}, "a turn with fields role, content has no known role"),
        ({"messages": "Q"}, "row 7: its turns are str; expected a list"),
        ({"messages": {"role": "user"}}, "row 7: its turns are dict; expected a list"),
        ({"messages": ["Q"]}, "row 7: a turn is str; expected an object"),
        ({"messages": [system("S"), assistant("A")]}, "no assistant turn with text behind a user turn"),
        ({"messages": [user("Q"), assistant("A"), user("Q"), assistant(" ")]}, "no assistant turn with text behind"),
        ({"prompt": [user("Q")]}, "its turns are NoneType"),
        ({"prompt": [user("Q"), assistant("A")], "completion": [user("Q")]}, "no assistant turn with text behind"),
        ([1, 2], "file, row 7 is list; expected an object"),
    ],
)
def test_rows_that_are_none(row: Any, words: str) -> None:
    with pytest.raises(C2CError, match=words):
        read_chat(row, "file, row 7")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"prompt": "Q", "completion": "A"}\n{half\n', "rows.jsonl, row 1 cannot be read as JSON"),
        (b"\xff\xfe\xfd\n", "rows.jsonl, row 0 is not UTF-8"),
        (b'{"prompt": "half \\ud83d a pair", "completion": "A"}\n', "rows.jsonl, row 0 cannot be read as JSON"),
        (b"[" * 200_000 + b"\n", "rows.jsonl, row 0 cannot be read as JSON"),
        (b'{"prompt": "Q", "completion": "A"}\n\n{"prompt": "Q"}\n', "rows.jsonl, row 1 has fields prompt;"),
        (b'"text"\n', "rows.jsonl, row 0 is str"),
        (b"", "no rows are left of .*rows.jsonl"),
        (b"\n\n", "no rows are left of .*rows.jsonl"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(C2CError, match=words):
        examples(config_of(tmp_path))


def test_gzipped_rows_and_damaged_ones(tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "rows.jsonl", 5)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))

    def texts(path: Path) -> list[tuple[Any, ...]]:
        return sorted((str(e.messages), e.response) for e in examples(config_of(tmp_path, data=[{"jsonl": str(path)}])))

    assert texts(packed) == texts(plain)
    whole = packed.read_bytes()
    for damaged in (whole[:-9], b"no gzip at all", whole[:20] + b"\xff" * 20 + whole[40:]):
        packed.write_bytes(damaged)
        with pytest.raises(C2CError, match=r"rows.jsonl.gz cannot be read"):
            # Skipping is for rows; a file that ends too early is never taken for a shorter one.
            examples(config_of(tmp_path, data=[{"jsonl": str(packed), "on_bad_rows": "skip"}]))


def test_bad_rows_are_skipped_where_asked_and_never_silently(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps({"prompt": "Q", "completion": "A"})
    path.write_bytes(f'{good}\n{{half\n{good}\n{{"prompt": "Q"}}\n\n7\n{good}\n'.encode() + b"\xff\n")
    config = config_of(tmp_path, data=[{"jsonl": str(path), "on_bad_rows": "skip"}])
    with pytest.warns(UserWarning, match=r"4 of 7 rows of .*rows.jsonl are left out; the first: .*, row 1 cannot"):
        made = examples(config)
    assert sorted(e.id for e in made) == [f"{path}:{n}" for n in (0, 2, 5)]  # ids count every row, good or bad
    path.write_text('{"prompt": "Q"}\n')
    with pytest.raises(
        C2CError, match=r"none of the 1 rows of .*rows.jsonl can be read; the first: .* has fields prompt"
    ):
        examples(config)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(C2CError, match=r"rows.jsonl cannot be read .*No such file"):
        examples(config_of(tmp_path))
    with pytest.raises(C2CError, match="unknown task 'arc-hard'; expected one of"):
        examples(config_of(tmp_path, data=[{"task": "arc-hard"}]))
    with pytest.raises(C2CError, match="unknown task 'arc-chalenge/x'; did you mean arc-challenge"):
        examples(config_of(tmp_path, data=[{"task": "arc-chalenge/x"}]))
    with pytest.raises(C2CError, match="the questions of gsm8k have reference answers, and options are needed here"):
        examples(config_of(tmp_path, data=[{"task": "gsm8k"}]))
    with pytest.raises(C2CError, match="has no split 'train' under"):
        examples(config_of(tmp_path, data=[{"task": "arc-easy"}], data_dir=tmp_path))


# ---- questions ------------------------------------------------------------------------------------------------------


def test_a_question_has_one_of_four_forms() -> None:
    seen = set()
    for n in range(60):
        question = Question(f"q{n}", "Which?", ("x", "y", "z"), 1)
        example = question_example("arc-easy", question)
        assert example == question_example("arc-easy", question) and example.id == f"arc-easy:q{n}"
        prompts = {paper_prompt(question): "paper", short_prompt(question): "short"}
        (message,) = example.messages
        if example.prefix:
            assert (example.prefix, example.response, example.ends) == (ANSWER_PREFIX, " B", False)
        else:
            assert (example.response, example.ends) == (f"{ANSWER_PREFIX} B", True)
        seen.add((prompts[message["content"]], bool(example.prefix)))
    assert len(seen) == 4


# ---- draws ----------------------------------------------------------------------------------------------------------


def mirror(folder: Path, train: list[str]) -> Path:
    """A data folder with an OpenBookQA train split of these row ids."""
    path = folder / "allenai" / "openbookqa" / "main" / "train.jsonl.gz"
    path.parent.mkdir(parents=True)
    choices = {"text": ["x", "y"], "label": ["A", "B"]}
    with gzip.open(path, "wt") as file:
        for row in train:
            file.write(
                json.dumps({"id": row, "question_stem": f"q {row}", "choices": choices, "answerKey": "B"}) + "\n"
            )
    return folder


def test_limits_are_drawn_with_the_seed_and_nothing_else(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 40)
    folder = mirror(tmp_path / "mirror", [str(5000 + n) for n in range(30)])
    sources = [{"jsonl": str(tmp_path / "rows.jsonl"), "limit": 12}, {"task": "openbookqa", "limit": 9}]

    def drawn(**changes: Any) -> list[Example]:
        return examples(config_of(tmp_path, **{"data": sources, "data_dir": folder, **changes}))

    first = drawn()
    assert [e.id.split(":")[0] for e in first].count("openbookqa") == 9 and len(first) == 21
    # Not the order of the sources, and the same whatever else the run does, its models included.
    assert drawn(batch_size=1, receiver={"source": "another"}, sharer={"source": "one more"}) == first
    sources_in_order = [e.id.split(":")[0] for e in first]
    assert sources_in_order not in (sorted(sources_in_order), sorted(sources_in_order, reverse=True))
    other = drawn(seed=1)
    assert {e.id for e in other} != {e.id for e in first}
    # A source draws the same rows whatever stands beside it.
    alone = drawn(data=sources[1:])
    assert {e.id for e in alone} == {e.id for e in first if e.id.startswith("openbookqa")}
    assert len(drawn(data=[{**sources[0], "limit": 400}])) == 40


def test_the_first_rows_where_asked(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * (1 + n % 3), "completion": f"{n}"} for n in range(30)]
    source = {"jsonl": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "take": "first"}

    def numbers(seed: int = 42, **more: Any) -> list[int]:
        made = examples(config_of(tmp_path, data=[{**source, **more}], seed=seed))
        return [int(e.id.rpartition(":")[2]) for e in made]

    assert sorted(numbers(limit=12)) == sorted(numbers(limit=12, seed=1)) == list(range(12))
    assert numbers(limit=12) != sorted(numbers(limit=12))  # in an order that the seed gives
    assert sorted(numbers(limit=12, max_prompt_chars=2)) == [n for n in range(18) if n % 3 < 2]  # of those that fit
    assert sorted(numbers(limit=99)) == sorted(numbers()) == list(range(30))
    assert sorted(numbers(limit=12, take="random")) != list(range(12))
    # What stands behind them is not even read.
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write("{no json\n")
    assert sorted(numbers(limit=30)) == list(range(30))
    with pytest.raises(C2CError, match="row 30 cannot be read as JSON"):
        numbers(limit=31)


def test_a_seed_of_its_own_for_the_data(tmp_path: Path) -> None:
    """Runs of several seeds read one store: the same rows in the same order of a mixture."""
    sources = []
    for name, weight in (("a", 1.0), ("b", 3.0)):
        rows = [{"prompt": f"{name} {n}", "completion": "x"} for n in range(40)]
        sources.append({"jsonl": str(write_jsonl(tmp_path / f"{name}.jsonl", rows)), "limit": 20, "weight": weight})

    def drawn(**seeds: int) -> list[str]:
        return [i.id for i in prepare(pair_of(), config_of(tmp_path, data=sources, holdout=5, **seeds)).train]

    assert drawn(seed=1, data_seed=42) == drawn(seed=42) == drawn(seed=2, data_seed=42)
    assert set(drawn(seed=1)) != set(drawn(seed=42)) and drawn(seed=42, data_seed=1) == drawn(seed=1)


def test_long_responses_are_cut_behind_a_word() -> None:
    assert cut("one two three", 10) == "one two"
    # Not far back: in a script without blanks that would leave next to nothing.
    long = "好的：\n" + "水" * 300
    assert cut(long, 200) == long[:200]
    assert cut("water " * 50, 200).endswith(" water")


def test_the_part_of_longbench_that_is_measured_on(tmp_path: Path) -> None:
    path = tmp_path / "THUDM/LongBench/qasper_e/test.jsonl.gz"
    path.parent.mkdir(parents=True)
    rows = [{"_id": f"{n:08x}", "context": "C", "input": f"{n}?", "answers": ["A"]} for n in range(80)]
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    source = {"rows": "THUDM/LongBench/qasper_e", "split": "test"}
    made = examples(config_of(tmp_path, data=[source], data_dir=tmp_path))
    kept = {int(e.id.rpartition(":")[2]) for e in made}
    ids = {n: hashlib.sha256(row["_id"].encode()).hexdigest() for n, row in enumerate(rows)}
    assert kept == {n for n, digest in ids.items() if digest[-1] not in "159d"} and 50 < len(kept) < 70
    # A copy elsewhere is known by its fields.
    (tmp_path / "copy.jsonl").write_bytes(gzip.decompress(path.read_bytes()))
    copied = examples(config_of(tmp_path, data=[{"jsonl": str(tmp_path / "copy.jsonl")}]))
    assert {int(e.id.rpartition(":")[2]) for e in copied} == kept
    # Rows keep their number, whatever is left out before them.
    assert all(e.messages[0]["content"] == f"C\n\n{e.id.rpartition(':')[2]}?" for e in made)


def test_lengths(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * n, "completion": "one two, three four" if n % 2 else "short one"} for n in range(1, 11)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"jsonl": str(tmp_path / "rows.jsonl"), "max_prompt_chars": 6, "max_response_chars": 12}
    made = {int(e.id.rpartition(":")[2]): e for e in examples(config_of(tmp_path, data=[source]))}
    assert sorted(made) == [0, 1, 2, 3, 4, 5]
    assert (made[0].response, made[0].ends) == ("one two,", False)  # at a word; what was cut off doesn't end
    assert (made[1].response, made[1].ends) == ("short one", True)
    with pytest.raises(C2CError, match=r"no rows are left of .*; check split and limits"):
        examples(config_of(tmp_path, data=[{**source, "jsonl": write_rows(tmp_path / "long.jsonl")}]))


def test_a_source_named_twice(tmp_path: Path) -> None:
    source = {"jsonl": str(write_rows(tmp_path / "rows.jsonl"))}
    with pytest.raises(C2CError, match="two sources of the recipe give the same rows"):
        examples(config_of(tmp_path, data=[source, {**source, "limit": 2}]))
    (tmp_path / "own.jsonl").write_text(
        "".join(json.dumps({"id": "q", "question": f"{n}?", "options": ["a", "b"], "answer": "A"}) + "\n" for n in "12")
    )
    with pytest.raises(C2CError, match=r"own.jsonl gives the id .*:q twice; give each row an id"):
        examples(config_of(tmp_path, data=[{"task": str(tmp_path / "own.jsonl")}]))


def test_two_splits_of_a_set(tmp_path: Path) -> None:
    for part in ("train", "train_gen"):
        path = tmp_path / f"owner/chats/default/{part}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(path, "wt") as file:
            file.writelines(json.dumps({"prompt": f"{part} {n}?", "completion": "yes"}) + "\n" for n in range(3))
    sources = [{"rows": "owner/chats", "split": part} for part in ("train", "train_gen")]
    made = examples(config_of(tmp_path, data=sources, data_dir=tmp_path))
    names = sorted(e.id for e in made)
    assert names == [f"owner/chats{more}:{n}" for more in ("", "@train_gen") for n in range(3)]
    assert all(("train_gen" in e.messages[0]["content"]) == ("@" in e.id) for e in made)


def test_a_limit_draws_the_same_rows_wherever_the_file_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setenv("HOME", str(tmp_path / "b"))
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        write_rows(tmp_path / place / "rows.jsonl", 20)
        monkeypatch.chdir(tmp_path / place)
        for name in (tmp_path / place / "rows.jsonl", "rows.jsonl", "~/rows.jsonl"):
            if place == "b" or name != "~/rows.jsonl":
                found = examples(config_of(tmp_path, data=[{"jsonl": str(name), "limit": 6}]))
                drawn.append([e.messages for e in found])
    assert len(drawn) == 5 and all(rows == drawn[0] for rows in drawn)
    write_questions(tmp_path / "b" / "questions.jsonl", 3)
    assert len(examples(config_of(tmp_path, data=[{"task": "~/questions.jsonl"}]))) == 3


def test_what_is_wrong_with_a_row_names_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": "Why?", "input": "", "output": text} for text in ("So.", "")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"jsonl": str(path)}
    with pytest.raises(C2CError, match=r"row 1 has .* \(empty: input, output\); .*; or set on_bad_rows: skip at this"):
        examples(config_of(tmp_path, data=[source]))
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        assert len(examples(config_of(tmp_path, data=[{**source, "on_bad_rows": "skip"}]))) == 1


def test_questions_and_answers_in_other_words() -> None:
    orca = {"id": "niv.1", "system_prompt": "Be brief.", "question": "Why?", "response": "So."}
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"})
    assert read_chat(orca, "row") == [(messages, "So.")]
    assert read_chat({"instruction": "Why?", "context": "C", "response": "So.", "answers": ["x"]}, "row") == [
        (({"role": "user", "content": "Why?\n\nC"},), "So.")
    ]
    for row, words in (
        ({"question": "Why?", "options": ["a"], "answer": "A"}, "row is a question with options"),
        ({"prompt": "Why?", "choices": 1, "answer": "A"}, "expected messages"),
    ):
        with pytest.raises(C2CError, match=words):
            read_chat(row, "row")


def test_held_out_rows_are_dropped_and_move_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = HELD_OUT["openbookqa"][:4]
    folder = mirror(tmp_path / "mirror", [*twins, *(str(5000 + n) for n in range(30))])
    config = config_of(tmp_path, data=[{"task": "openbookqa", "limit": 25}], data_dir=folder)
    kept = examples(config)
    monkeypatch.setattr(data, "HELD_OUT", {})
    every = examples(config)
    twin_ids = {f"openbookqa:{row}" for row in twins}
    assert kept == [e for e in every if e.id not in twin_ids] and 0 < len(every) - len(kept) <= 4


@pytest.mark.parametrize(
    "name", ["arc-easy:NYSEDREGENTS_2016_4_12", "openbookqa:923", "databricks/databricks-dolly-15k:11440"]
)
def test_another_name_of_a_source_hides_no_held_out_row(name: str) -> None:
    source, number = name.split(":")
    names = [source, f"{source}/default" if "/" in source else f"{source}-paper"]
    found = [example(f"{n}:{row}") for n in names for row in (number, "0")]
    assert without_held_out(found) == [found[1], found[3]]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("arc-challenge-paper:3", "arc-challenge:3"), ("mmlu/virology:dev-1", "mmlu:dev-1"), ("o/n/default:2", "o/n:2"),
        ("o/n/other:2", "o/n/other:2"), ("mmlu/a.jsonl:1", "mmlu/a.jsonl:1"),
        ("/a/mmlu/b.jsonl:1", "/a/mmlu/b.jsonl:1"),
    ],
)  # fmt: skip
def test_the_plainest_name_of_a_row(name: str, plain: str) -> None:
    assert same_row(name) == plain


def test_a_split_that_is_measured_on(tmp_path: Path, data_dir: Path) -> None:
    config = config_of(tmp_path, data=[{"task": "openbookqa", "split": "validation", "limit": 4}], data_dir=data_dir)
    with pytest.warns(UserWarning, match="openbookqa is trained on its split validation, which fusers are measured on"):
        assert len(examples(config)) == 4


# ---- split and mixture ----------------------------------------------------------------------------------------------


def example(row: str, turn: int = 0) -> Example:
    return Example(f"{row}#{turn}" if turn else row, (user("Q"),), "", "A", turn=turn)


def test_the_split_is_decided_by_ids_alone() -> None:
    rows = [example(f"x#1:{n}") for n in range(200)]
    train, held = split(rows, 20)
    assert len(held) == 20 and sorted(e.id for e in train + held) == sorted(e.id for e in rows)
    again = split(rows[::-1], 20)
    assert ({e.id for e in again[0]}, {e.id for e in again[1]}) == ({e.id for e in train}, {e.id for e in held})
    assert [e for e in rows if e in train] == train  # in the order that was given
    # What is trained on is never held out because there are more rows, or fewer to hold out.
    more = split([*rows, *(example(f"y:{n}") for n in range(100))], 20)[1]
    assert {e.id for e in more if e.id.startswith("x")} <= {e.id for e in held} and 5 < len(more) == 20
    assert {e.id for e in split(rows, 7)[1]} < {e.id for e in held}
    assert split(rows, 0) == (rows, [])
    # Nor does it matter where the file is.
    moved = split([example(f"/elsewhere/and/{e.id}") for e in rows], 20)[1]
    assert [e.id.removeprefix("/elsewhere/and/") for e in moved] == [e.id for e in held]
    # Not the first rows of a file, nor the last.
    assert 40 < sum(int(e.id.rpartition(":")[2]) for e in held) / 20 < 160


def test_a_chat_is_never_on_both_sides() -> None:
    rows = [example(f"x:{n}", turn) for n in range(40) for turn in (1, 2, 3)]
    train, held = split(rows, 10)
    assert len(held) == 12 and not {e.row for e in train} & {e.row for e in held}
    assert {e.row for e in rows} == {f"x:{n}" for n in range(40)}


def test_mix() -> None:
    sources = [[f"a{n}" for n in range(30)], [f"b{n}" for n in range(9)], [f"c{n}" for n in range(3)]]
    mixed = mix(sources, [1, 2, 3], seed=5)
    assert mixed == mix(sources, [1, 2, 3], seed=5) != mix(sources, [1, 2, 3], seed=6)
    counts = {name: [mixed.count(f"{name}{n}") for n in range(size)] for name, size in (("a", 30), ("b", 9), ("c", 3))}
    assert {name: sum(c) for name, c in counts.items()} == {"a": 7, "b": 14, "c": 21}  # 42 in all, one, two, three 6ths
    assert set(counts["a"]) == {0, 1} and set(counts["b"]) == {1, 2} and set(counts["c"]) == {7}
    assert mixed != sorted(mixed)
    # Whatever the weights, the counts add up to what there is and are within one of the share.
    weights = [0.21, 0.33, 1e-3]
    for w in (weights, weights[::-1], [1e-9, 1, 1]):
        parts = [sum(x.startswith(name) for x in mix(sources, w, 0)) for name in "abc"]
        assert sum(parts) == 42 and all(abs(p - 42 * x / sum(w)) < 1 for p, x in zip(parts, w, strict=True))
    with pytest.raises(C2CError, match="source 2 has a weight of 2, but no examples"):
        mix([[1], []], [1, 2], 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": [{"task": "arc-easy", "weight": 1}, {"task": "openbookqa"}]}, "a weight to every source"),
        ({"data": [{"task": "arc-easy", "weight": 0}]}, "greater than 0"),
        ({"data": [{"task": "arc-easy", "weight": float("inf")}]}, "finite"),
        ({"data": [{"rows": "no-owner"}]}, "owner/name"),
        ({"min_response_tokens": 64, "max_tokens": 64}, "leaves no room"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config_of(tmp_path, **changes)


# ---- chats ----------------------------------------------------------------------------------------------------------


def test_every_turn_is_learned_where_asked(tmp_path: Path) -> None:
    chat = [system("S"), user("1"), assistant(" a "), user("2"), assistant("b" * 9), user("3"), assistant("c")]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat}, {"prompt": "Q", "completion": "A", "ends": False}])
    source = {"jsonl": str(path), "supervise": "all", "max_response_chars": 5}
    made = {e.id.rpartition(":")[2]: e for e in examples(config_of(tmp_path, data=[source]))}
    assert {name: list(e.messages) for name, e in made.items()} == {
        "0#1": chat[:2],
        "0#2": chat[:4],
        "0#3": chat[:6],
        "1": [user("Q")],
    }
    assert {n: (e.response, e.ends, e.row) for n, e in made.items()} == {
        "0#1": ("a", True, f"{path}:0"),
        "0#2": ("bbbbb", False, f"{path}:0"),
        "0#3": ("c", True, f"{path}:0"),
        "1": ("A", False, f"{path}:1"),
    }
    # A limit counts rows, a longest prompt the prompts.
    few = examples(config_of(tmp_path, data=[{**source, "max_prompt_chars": 6}]))
    assert sorted(e.id.rpartition(":")[2] for e in few) == ["0#1", "0#2", "1"]  # "0#2" has 1 + 1 + 3 + 1 characters
    for seed in range(4):
        assert len({e.row for e in examples(config_of(tmp_path, data=[{**source, "limit": 1}], seed=seed))}) == 1
    (last, _) = sorted(examples(config_of(tmp_path, data=[{**source, "supervise": "last"}])), key=lambda e: e.id)
    assert (last.id, list(last.messages), last.response) == (f"{path}:0", chat[:6], "c")


def test_shortened() -> None:
    chat = (system("S"), assistant("hi"), user("1"), assistant("a"), user("2"), user("3"), assistant("b"), user("4"))
    assert list(shortened(chat)) == [chat, *((chat[0], *chat[i:]) for i in (2, 4, 5, 7))]
    assert list(shortened(chat[2:4])) == [chat[2:4]] and list(shortened(chat[:1])) == [chat[:1]]


# ---- nothing that is measured on is trained on ----------------------------------------------------------------------


def normal(text: str) -> str:
    """Lower case, and words only: other punctuation or spaces make no other question."""
    return re.sub(r"\W+", " ", text.lower()).strip()


TRAINED_ON = ("arc-easy", "arc-challenge", "openbookqa", "commonsenseqa")
MEASURED_ON = [*((task, "validation") for task in (*TASKS, "mmlu")), ("mmlu", "dev")]
INSTRUCTIONS = ("local/t0-mix", "databricks/databricks-dolly-15k", "openai/gsm8k/main")
TELLING = 30  # characters from which on a question inside another text is taken for the same question


@pytest.fixture(scope="session")
def held_out(data_dir: Path) -> set[str]:
    """The questions that are measured on. Of MMLU-Redux all, also those that are left out for their errors."""
    texts = {question.question for task, split in MEASURED_ON for question in load(task, split, data_dir)}
    for path in (data_dir / "edinburgh-dawg" / "mmlu-redux-2.0").glob("*/test.jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            texts |= {json.loads(line)["question"] for line in lines}
    assert len(texts) > 5900
    return texts


@pytest.fixture(scope="session")
def held_out_words(held_out: set[str]) -> set[str]:
    return {normal(text) for text in held_out}


@pytest.fixture(scope="session")
def default_recipe(data_dir: Path) -> TrainConfig:
    return read_recipe(ROOT / "recipes" / "default.yaml", [f"data_dir={data_dir}"])


def test_the_held_out_list_is_what_the_data_says(data_dir: Path, held_out: set[str], held_out_words: set[str]) -> None:
    found = {
        task: [q.id for q in load(task, "train", data_dir) if normal(q.question) in held_out_words]
        for task in TRAINED_ON
    }
    asks = containing(held_out)
    for name in INSTRUCTIONS:
        rows = data.draw(DataSource(rows=name), 0, data_dir)
        found[name] = [e.id.rpartition(":")[2] for e in rows if any(asks(m["content"]) for m in e.messages)]
        assert len(rows) > 7000
    assert {name: sorted(rows) for name, rows in found.items() if rows} == {n: sorted(r) for n, r in HELD_OUT.items()}


def containing(questions: set[str]) -> Callable[[str], bool]:
    """Whether a text contains one of the questions of `TELLING` characters or more, by words."""
    by_start: dict[tuple[str, ...], list[list[str]]] = {}
    for words in (normal(text).split() for text in questions if len(text) >= TELLING):
        by_start.setdefault(tuple(words[:3]), []).append(words)

    def contains(text: str) -> bool:
        words = normal(text).split()
        return any(
            words[i : i + len(asked)] == asked
            for i in range(len(words))
            for asked in by_start.get(tuple(words[i : i + 3]), ())
        )

    return contains


def test_containing() -> None:
    contains = containing({"Which of these is the largest planet?", "Clouds are made of"})
    assert contains("Tell me: which of these is the LARGEST planet, and why?")
    assert not contains("Which of these is the largest planetoid?") and not contains("Clouds are made of water.")


def test_no_held_out_question_is_trained_on(
    data_dir: Path, held_out: set[str], held_out_words: set[str], default_recipe: TrainConfig
) -> None:
    """Neither the question of an example nor its whole text is that of a held-out row, and no instruction has one."""
    asked = {f"{task}:{q.id}": q.question for task in TASKS for q in load(task, "train", data_dir)}
    made = examples(default_recipe)
    assert len(made) > 3600 and sum(e.id in asked for e in made) > 3000
    contains = containing(held_out)
    for example in made:
        for text in (asked.get(example.id, ""), *(m["content"] for m in example.messages)):
            assert normal(text) not in held_out_words, example.id
        assert example.id in asked or not any(contains(m["content"]) for m in example.messages), example.id
    prompts = {normal(e.messages[0]["content"]) for e in made}
    for task in TASKS:
        for question in load(task, "validation", data_dir):
            assert not {normal(paper_prompt(question)), normal(short_prompt(question))} & prompts


# The ids of every fuser that comes along, and the recipe that it was trained with.
RECIPES = {
    "qwen2.5-coder-0.5b": "one-family.yaml",
    "smollm2-135m-cpu": "default.yaml",
    "smollm2-135m-long": "long.yaml",
    "smollm2-135m-two-sharers": "two-sharers.yaml",
}
SHIPPED = [
    (path.with_name("training_ids.txt"), RECIPES.get(path.relative_to(folder).parts[0], "mixture.yaml"))
    for folder in (checkpoint.PACKAGED, ROOT / "fusers")
    for path in sorted(folder.glob("**/config.json"))
]
shipped = pytest.mark.parametrize("path, recipe", SHIPPED, ids=["/".join(p.parts[-3:-1]) for p, _ in SHIPPED])


def ids_in(path: Path) -> set[str]:
    ids = path.read_text().splitlines()
    assert len(ids) == len(set(ids)) > 100
    return set(ids)


@shipped
def test_a_shipped_fuser_saw_no_twin_of_a_held_out_row(path: Path, recipe: str) -> None:
    twins = {f"{task}:{row}" for task, rows in HELD_OUT.items() for row in rows}
    assert not twins & ids_in(path)


@shipped
def test_a_shipped_fuser_saw_no_held_out_row(path: Path, recipe: str, data_dir: Path, held_out_words: set[str]) -> None:
    ids = ids_in(path)
    validation = {f"{task}:{q.id}" for task in TASKS for q in load(task, "validation", data_dir)}
    assert not ids & validation
    trained = json.loads((path.parent / "config.json").read_text())["training"]["recipe"]
    config = read_recipe(ROOT / "recipes" / recipe, [f"data_dir={data_dir}", f"seed={trained['seed']}"])
    # One that has gone on from another lists that one's rows too.
    before = ids_in(checkpoint.PACKAGED / "default" / "training_ids.txt") if config.start_from else set()
    assert ids <= {example.id for example in examples(config)} | before
    asked = {f"{task}:{q.id}": q.question for task in TASKS for q in load(task, "train", data_dir)}
    assert not {i for i in ids if normal(asked.get(i, "")) in held_out_words}


def test_what_the_long_fuser_is_asked_it_was_not_trained_on(data_dir: Path) -> None:
    """Not even the middle of a text that the evaluation of long prompts asks about."""
    config = read_recipe(ROOT / "recipes" / "long.yaml", [f"data_dir={data_dir}"])
    ids = ids_in(ROOT / "fusers" / "smollm2-135m-long" / "training_ids.txt")
    read = [e.messages[0]["content"] for e in examples(config) if e.id in ids]
    assert len(read) == len(ids)
    sets = ("longbench/multi_news", "held-out"), ("minilongbench", "test")
    asked = [q.prompt for name, part in sets for q in load_open(name, part, data_dir)]
    assert len(asked) > 150
    middles = [text[len(text) // 2 :][:200] for text in asked]
    assert not any(middle in text for middle in middles for text in read)
    known = load_open("longbench/multi_news", "test", data_dir)  # that the question can be answered with yes
    assert any(q.prompt[len(q.prompt) // 2 :][:200] in text for q in known for text in read)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (gzip.compress(b"{}", mtime=0), "rows.jsonl is gzipped; name it .jsonl.gz"),
        ('{"prompt": "café", "completion": "no"}'.encode("latin-1"), "row 0 is not UTF-8 .* save the file as UTF-8"),
        (
            b'{"question": "?", "options": ["a", "b"], "answer": 0}',
            "question with options; give such a file as task",
        ),
    ],
)
def test_files_of_another_kind(tmp_path: Path, body: bytes, words: str) -> None:
    (tmp_path / "rows.jsonl").write_bytes(body)
    with pytest.raises(C2CError, match=words):
        examples(config_of(tmp_path))


def test_a_file_without_a_single_good_row(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("a,b\n1,2\n")
    with pytest.raises(C2CError, match=r"none of the 2 rows of .*rows.jsonl can be read; the first: .*row 0"):
        examples(config_of(tmp_path, data=[{"jsonl": str(tmp_path / "rows.jsonl"), "on_bad_rows": "skip"}]))
