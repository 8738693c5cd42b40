"""The prompts are the paper's to the letter."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cache2cache.errors import C2CError
from cache2cache.tasks import Question
from cache2cache.tasks.prompts import chinese_prompt, extract_letter, few_shot_prompt, paper_prompt, short_prompt

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


def test_chinese_prompt() -> None:
    question = Question("1", "为什么？", ("甲", "乙", "丙"), 0)
    assert chinese_prompt(question) == (
        "请准确回答下面的问题：\n\n为什么？\n\n选项：\nA. 甲\nB. 乙\nC. 丙\n\n要求：\n- 仔细阅读问题和所有选项。\n"
        "- 选出唯一最正确的答案。\n- 只按以下格式回答：“正确答案是A/B/C”。\n"
        "- 除答案外，不要包含任何解释、其他文字或标点。\n\n正确答案是"
    )
    assert chinese_prompt(question, cot=True).endswith(
        "- 请一步一步地思考，并简要说明理由。\n- 最后给出答案，以正确答案是开头"
    )


DEV = [
    Question(f"dev-{number}", f"Question {number}?", ("yes", "no"), number % 2, subject)
    for number, subject in enumerate(("high_school_law", "logic", "high_school_law", "high_school_law", ""))
]


def test_few_shot_prompt() -> None:
    asked = Question("1", "Why?", ("this", "that", "so"), 2, "high_school_law")
    assert few_shot_prompt(asked, DEV, 2) == (
        "The following are single choice questions (with answers) about high school law.\n\n"
        "Question 0?\nA. yes\nB. no\nAnswer: A\n\nQuestion 2?\nA. yes\nB. no\nAnswer: A\n\n"
        "Why?\nA. this\nB. that\nC. so\nAnswer:"
    )
    assert few_shot_prompt(asked, DEV, 0).count("Answer") == 1


def test_few_shot_examples_are_others() -> None:
    assert few_shot_prompt(DEV[2], DEV, 2).count("Question 2?") == 1  # not an example of itself
    assert few_shot_prompt(replace(DEV[2], id="twin"), DEV, 2).count("Question 2?") == 1  # nor under another id
    assert "answers).\n\nQuestion 4?" in few_shot_prompt(Question("1", "Why?", ("a", "b"), 0), DEV, 1)  # no subject
    with pytest.raises(C2CError, match="5 examples about logic were asked for, 1 are there"):
        few_shot_prompt(Question("1", "Why?", ("a", "b"), 0, "logic"), DEV)


@pytest.mark.parametrize("cot", [False, True])
def test_a_prompt_read_as_an_answer_is_none(cot: bool) -> None:
    assert extract_letter(paper_prompt(QUESTION, cot), 4) is None
    assert extract_letter(chinese_prompt(QUESTION, cot), 4) is None
