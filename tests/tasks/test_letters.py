"""Letters are read out of what models write as a person reads them.

`letters.jsonl` has outputs with the number of options and the letter that a person reads in them, null for none or
several. Those with a model as source were written by it, greedily, in answer to 16 questions made for this purpose
(2 to 10 options, two of them in Chinese), under the prompt that is named: SmolLM2-135M-Instruct and
Qwen2.5-Coder-0.5B-Instruct with their chat templates, Gemma-3-270M, which has none, on the bare prompt. Equal ones are
in it once. The rest were written by hand to be nasty.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache2cache.tasks.prompts import extract_letter

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ROWS = [json.loads(line) for line in (Path(__file__).parent / "letters.jsonl").read_text("utf-8").splitlines()]


def test_the_table_is_large_enough() -> None:
    assert len(ROWS) >= 150
    assert sum(row["source"] != "written" for row in ROWS) >= 50


@pytest.mark.parametrize("row", ROWS, ids=lambda row: repr(row["text"][:40]))
def test_letter_as_a_person_reads_it(row: dict) -> None:
    assert extract_letter(row["text"], row["options"]) == row["letter"]


@given(st.text() | st.text(alphabet="ABC abc.,()/\n*'选答案不is the answer"), st.integers(2, 26))
def test_extracted_letter_is_an_option(text: str, options: int) -> None:
    letter = extract_letter(text, options)
    assert letter is None or letter in LETTERS[:options]


@pytest.mark.parametrize(
    "form",
    [
        "The correct answer is {}", "{}", "({})", "**{}.** so", "Answer: {}", "It is cold.\n\n{}", "\\boxed{{{}}}",
        "I choose {}.", "{} is correct.", "正确答案是{}", "The answer is not it. Therefore, the correct answer is {}.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [2, 4, 10, 26])
def test_every_letter_is_read_back(form: str, options: int) -> None:
    for letter in LETTERS[:options]:
        assert extract_letter(form.format(letter), options) == letter
    for letter in LETTERS[options:]:
        assert extract_letter(form.format(letter), options) is None


@pytest.mark.parametrize(
    "piece",
    [
        "A, ", "A , , ", " ", "\n", "the answer ", "A is ", "not ", "((", "B. ", "answer a a a ", "，", "is the ", "!",
        "\n- ", "_", "a", "Q: ", "Q: A: ", "\\boxed{", "~~", "<", "wait ", "no, A ", "if it ", "A. red\n", "选",
        "answer is ",
    ],
)  # fmt: skip
def test_long_texts_take_no_time(piece: str) -> None:
    """Rules that look at each place once are through at once; one that does so from each place takes minutes."""
    letter = extract_letter(piece * (100_000 // len(piece)), 4)
    assert letter in (None, *"ABCD")
