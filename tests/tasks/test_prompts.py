"""The prompts are the paper's to the letter, and letters are read out of what small models really write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache2cache.tasks import Question
from cache2cache.tasks.prompts import extract_letter, paper_prompt, short_prompt

QUESTION = Question("1", "Why?", ("this", "that", "so", "or"), 0)


def test_paper_prompt() -> None:
    assert paper_prompt(QUESTION) == (
        "Accurately answer the following question:\n\nWhy?\n\nChoices:\nA. this\nB. that\nC. so\nD. or\n\n"
        "Instructions:\n- Carefully read the question and all options.\n- Select the single most correct answer.\n"
        '- Respond ONLY in the following format: "The correct answer is A/B/C/D".\n'
        "- Do not include any explanations, additional text, or punctuation besides the answer.\n\n"
        "The correct answer is"
    )
    assert paper_prompt(QUESTION, cot=True) == (
        "Accurately answer the following question:\n\nWhy?\n\nChoices:\nA. this\nB. that\nC. so\nD. or\n\n"
        "Instructions:\n- Carefully read the question and all options.\n"
        "- Let's think step by step and explain your reasoning briefly.\n"
        "- Then give the final answer starting with The correct answer is"
    )


def test_letters_follow_the_options() -> None:
    five = Question("1", "Why?", ("a", "b", "c", "d", "e"), 0)
    assert '"The correct answer is A/B/C/D/E"' in paper_prompt(five)
    assert short_prompt(QUESTION) == "Why?\nA. this\nB. that\nC. so\nD. or\nAnswer with the letter."


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("The correct answer is B", "B"),
        ("The correct answer is B. that", "B"),
        ("the correct answer is: **C**.", "C"),
        ("Answer: (D) or", "D"),
        ("**Answer:** D", "D"),
        ("The answer is option A", "A"),
        ("The answer is A because it is.", "A"),
        ("The answer is B? No. The correct answer is C", "C"),
        ("答案是B。", "B"),
        ("答案：C", "C"),
        ("B", "B"),
        (" D.", "D"),
        ("(C) so", "C"),
        ("A. this", "A"),
        ("A plant needs light, so B", "B"),
        ("It must be B, since B says that", "B"),
        ("Option C", "C"),
        ("A plant needs light", None),
        ("Because it is so", None),
        ("The correct answer is A/B/C/D", None),
        ("Both A, and B", None),
        ("E", None),
        ("the answer is b", None),
        ("CAB", None),
        ("", None),
    ],
)
def test_extract_letter(text: str, letter: str | None) -> None:
    assert extract_letter(text, 4) == letter


@given(st.text(), st.integers(2, 26))
def test_extracted_letter_is_an_option(text: str, options: int) -> None:
    letter = extract_letter(text, options)
    assert letter is None or letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:options]


@given(st.integers(2, 26), st.data())
def test_requested_format_is_read_back(options: int, data: st.DataObject) -> None:
    letter = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:options]))
    assert extract_letter(f"The correct answer is {letter}", options) == letter
