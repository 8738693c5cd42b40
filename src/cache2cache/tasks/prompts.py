"""How a question is put to a model, and how the letter is read out of its answer."""

from __future__ import annotations

import re

from cache2cache.tasks.base import LETTERS, Question

# Appended behind the generation prompt when options are compared by the likelihood of their letters.
ANSWER_PREFIX = "The correct answer is"


def option_lines(question: Question) -> str:
    """The options, one a line: "A. …"."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(question.letters, question.options, strict=True))


def paper_prompt(question: Question, cot: bool = False) -> str:
    """The paper's user turn (arXiv 2510.03215); `cot` asks for reasoning first.

    The paper always names A/B/C/D; here the letters are those the question has, the same thing for four options.
    """
    head = f"Accurately answer the following question:\n\n{question.question}\n\nChoices:\n{option_lines(question)}\n\n"
    if cot:
        return (
            f"{head}Instructions:\n"
            "- Carefully read the question and all options.\n"
            "- Let's think step by step and explain your reasoning briefly.\n"
            f"- Then give the final answer starting with {ANSWER_PREFIX}"
        )
    return (
        f"{head}Instructions:\n"
        "- Carefully read the question and all options.\n"
        "- Select the single most correct answer.\n"
        f'- Respond ONLY in the following format: "{ANSWER_PREFIX} {"/".join(question.letters)}".\n'
        "- Do not include any explanations, additional text, or punctuation besides the answer.\n\n"
        f"{ANSWER_PREFIX}"
    )


def short_prompt(question: Question) -> str:
    """The question, its options and one instruction: for small models, and quick to read."""
    return f"{question.question}\n{option_lines(question)}\nAnswer with the letter."


def extract_letter(text: str, n_options: int) -> str | None:
    """The letter that `text` gives as its answer, or None where it gives none, or several.

    In this order: the last "answer is X" (or "答案是X"); a letter that opens the text; the only letter standing alone.
    Letters are capitals, and the article in "A plant" is none.
    """
    letters = LETTERS[:n_options]
    letter = rf"([{letters}])(?![A-Za-z0-9_'])(?!/[A-Z])"  # "A/B/C/D" only repeats the instruction
    stated = re.findall(
        rf"(?i:answer|答案)[^A-Za-z0-9]*(?:(?i:is)|是|为)?[^A-Za-z0-9]*(?:(?i:option)\s+)?{letter}", text
    )
    if stated:
        return stated[-1]
    not_article = r"(?![ \t]+[a-z])"
    opening = re.match(rf"[^A-Za-z0-9]*{letter}{not_article}", text)
    if opening:
        return opening.group(1)
    alone = set(re.findall(rf"(?<![A-Za-z0-9_'/]){letter}{not_article}", text))
    return alone.pop() if len(alone) == 1 else None
