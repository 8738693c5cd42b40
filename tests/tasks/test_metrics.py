"""Scores of answers in words: LongBench's as published, numbers and formulas however they are written.

The expected figures of LongBench's metrics were computed with its published code (THUDM/LongBench, metrics.py, with
rouge 1.0.1, jieba 0.42.1 and fuzzywuzzy 0.18.0 without python-Levenshtein).
"""

from __future__ import annotations

import sys
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache2cache.errors import C2CError
from cache2cache.tasks import OpenQuestion, Question, score
from cache2cache.tasks.metrics import METRICS, last_boxed, last_number, normal_formula

TREC = ("Food", "Date", "Order, rank", "Speed", "Individual", "Other location", "location", "Other entity", "Other")
QUESTION = OpenQuestion("1", "Who?", ("Ada Lovelace", "Ada"), "f1", 32)


PUBLISHED = [
    ("f1", "The cat sat on a mat.", "a cat on the mat", 0.857142857143),
    ("f1", "Ada Lovelace", "Lovelace, Ada", 1.0),
    ("f1", "no", "No.", 1.0),
    ("f1", "the the the", "the", 0),
    ("f1", "yes yes yes", "yes", 0.5),
    ("f1", "He was born in 1815 in London", "London", 0.25),
    ("f1", "", "London", 0),
    ("f1", "state-of-the-art", "state of the art", 0),
    ("f1-zh", "厦门大学。", "厦门大学", 1.0),
    ("f1-zh", "第十八届年会在厦门大学举办", "厦门大学。", 0.333333333333),
    ("f1-zh", "北京大学 BEIJING", "北京大学beijing", 1.0),
    ("f1-zh", "不知道", "厦门大学", 0),
    ("f1-zh", "。", "。", 0),
    ("rouge-l", "The cat sat on the mat.", "The cat lay on the mat.", 0.833333328333),
    ("rouge-l", "The cat sat. The dog lay.", "The dog lay. The cat sat.", 0.999999995),
    ("rouge-l", "a b c d", "d c b a", 0.249999995),
    ("rouge-l", "w1 w2 w6 w7 w8. w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", 0.615384610651),
    ("rouge-l", "the the the the", "the cat", 0.666666662222),
    ("rouge-l", "x b a y", "a b x y", 0.499999995),
    ("rouge-l", "one. two. three", "one two three", 0.999999995),
    ("rouge-l", "", "one", 0.0),
    ("rouge-l", "...", "one", 0.0),
    ("rouge-l", " ", "one. . two", 0.49999999625),
    ("rouge-l", "Emilia is still angry at William!", "Emilia is still angry.", 0.7999999952),
    ("rouge-l-zh", "会议总结了教育改革的问题。", "会议讨论了教育供给侧改革的问题。", 0.77777777284),
    ("rouge-l-zh", "今天天气很好", "会议讨论了教育", 0.0),
    ("classification", "Date", "Date", 1.0),
    ("classification", "Type: Date or Food", "Date", 0.5),
    ("classification", "date", "Date", 0.0),
    ("classification", "Other location", "Other location", 0.5),
    ("classification", "Other entity", "Other entity", 1.0),
    ("classification", "location", "Other location", 0.0),
    ("classification", "Individual. Question: Speed", "Individual", 0.5),
    ("classification", "Other location location", "location", 0.333333333333),
    ("count", "7", "7", 1.0),
    ("count", "There are 7 unique of 30", "7", 0.5),
    ("count", "seven", "7", 0.0),
    ("count", "17", "7", 0.0),
    ("retrieval", "Paragraph 19", "Paragraph 19", 1.0),
    ("retrieval", "19", "Paragraph 19", 1.0),
    ("retrieval", "Paragraph 1 or Paragraph 19", "Paragraph 19", 0.5),
    ("retrieval", "段落19", "段落19", 1.0),
    ("retrieval", "Paragraph nine", "Paragraph 9", 0.0),
    ("code", "            if e.text == language:", "            if e.text == language:", 1.0),
    ("code", "\n\n```python\n# a comment\nreturn x + 1\nmore", "return x + 2", 0.92),
    ("code", "// nothing\nint x = 0;", "int y = 0;", 0.9),
    ("code", "# only this", "x", 0.0),
    ("code", "", "x = 1", 0.0),
    ("code", "if e.text == lang:\n    return", "            if e.text == language:", 0.69),
    ("code", "abcdefgh", "hgfedcba", 0.12),
]


@pytest.mark.parametrize(("metric", "text", "reference", "expected"), PUBLISHED)
def test_longbench_as_published(metric: str, text: str, reference: str, expected: float) -> None:
    if metric.endswith("-zh"):
        pytest.importorskip("jieba")
    assert METRICS[metric](text, reference, TREC) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("metric", [name for name in METRICS if not name.endswith("-zh")])
def test_an_answer_like_the_reference_is_right(metric: str) -> None:
    reference = {"number": "72", "boxed": "\\frac{1}{2}", "classification": "Date", "count": "7", "retrieval": "7"}
    right = reference.get(metric, "return x + 1")
    given_as = f"\\boxed{{{right}}}" if metric == "boxed" else right
    assert METRICS[metric](given_as, right, TREC) == pytest.approx(1.0, abs=1e-7)
    assert METRICS[metric]("", right, TREC) == 0.0


@given(st.text(), st.text(min_size=1), st.sampled_from([name for name in METRICS if not name.endswith("-zh")]))
def test_scores_are_shares(text: str, reference: str, metric: str) -> None:
    assert 0.0 <= METRICS[metric](text, reference, TREC) <= 1.0


def test_chinese_without_jieba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(C2CError, match=r"cache2cache\[chinese\]"):
        METRICS["f1-zh"]("北京", "北京", ())


def test_the_best_reference_counts() -> None:
    assert score(QUESTION, "It was Ada") == pytest.approx(0.5)  # against "Ada": one of three words, all of one
    assert score(QUESTION, "ada lovelace.") == 1.0
    assert score(QUESTION, "Grace") == 0.0


def test_only_the_first_line_of_few_shot_answers() -> None:
    text = "\nAda\n\nPassage: another"
    assert score(QUESTION, text) < 1.0 == score(replace(QUESTION, first_line=True), text)


def test_options_are_scored_by_letter() -> None:
    question = Question("1", "Why?", ("this", "that", "so"), 1)
    assert [score(question, text) for text in ("B", "The answer is A", "A or B", "")] == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("48 + 24 = 72\n#### 72", 72),
        ("#### 72 clips in 2 months", 72),
        ("#### $1,234.50", "1234.5"),
        ("#### 48 + 24 = 72", 72),
        ("#### 5\nThen more: #### 7", 7),
        ("####\nI forgot. It is 4.", 4),
        ("The answer is 72.", 72),
        ("The answer is $72.00", 72),
        ("The final answer: 1,000,000 people, not 5", 1000000),
        ("The answer is 12. Check: 3 * 4 = 12, and 5 is odd.", 12),
        ("The answer is 7. No: the answer is 8.", 8),
        ("So she has \\boxed{18} left after 3 days", 18),
        ("\\boxed{\\$18.50}", "18.5"),
        ("He sold 48 in April and 24 in May, 72 in all", 72),
        ("It fell to -5 degrees", -5),
        ("It fell to −5 degrees", -5),
        ("A debt of -$20", -20),
        ("17-5", 5),  # no sign
        ("It takes .5 hours", "0.5"),
        ("The sum is 3,4 and 5", 5),
        ("Answer: 2 + 2 = 4", 4),
        ("50%", 50),
        ("2.", 2),
        ("Nothing.", None),
        ("", None),
        ("####", None),
    ],
)
def test_last_number(text: str, number: int | str | None) -> None:
    assert last_number(text) == (None if number is None else Fraction(number))


@pytest.mark.parametrize("right", ["72", "72.0", "$72", "072", "72.00"])
def test_numbers_compare_by_value(right: str) -> None:
    question = OpenQuestion("1", "?", ("72",), "number", 9)
    assert score(question, f"The answer is {right}.") == 1.0
    assert score(question, f"The answer is {right}1.") == 0.0


@given(st.integers(-(10**9), 10**9), st.text(alphabet="abc .,\n$="))
def test_a_number_behind_the_mark_is_read_back(number: int, before: str) -> None:
    assert last_number(f"{before}\n#### {number:,}") == number


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{4}", "4"),
        ("so $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("\\boxed{1}, or rather \\boxed{2}", "2"),
        ("\\fbox {x^{2^{3}}}", "x^{2^{3}}"),
        ("\\boxed{4} and \\boxed{5", "4"),  # the last was cut off
        ("\\boxed{}", ""),
        ("4", None),
        ("\\boxed{4", None),
        ("\\boxed{ \\boxed{1} + {2", "1"),
        ("} \\boxed{1} }", "1"),
    ],
)
def test_last_boxed(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


@pytest.mark.parametrize("metric", ["number", "boxed", "f1", "exact", "classification", "count", "retrieval"])
@pytest.mark.parametrize("piece", ["7", "1,", "\\boxed{", "{", "}", "answer: ", "#### ", " ", "the ", "\n"])
def test_long_answers(metric: str, piece: str) -> None:
    """A model that repeats itself is wrong, and no error; nor does it take more than one look at each place."""
    text = piece * (100_000 // len(piece))
    for said in (text, f"\\boxed{{{text}}}", f"\\boxed{{\\text{{{text}{{}}}}}}"):
        assert METRICS[metric](said, "72", TREC) == 0.0


@pytest.mark.parametrize(
    ("given_as", "reference"),
    [
        ("\\dfrac{1}{2}", "\\frac{1}{2}"),
        ("1/2", "\\frac12"),
        ("0.5", "\\frac{1}{2}"),
        (".5", "0.5"),
        ("-\\frac{3}{4}", "\\frac{-3}{4}"),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})"),
        ("90^\\circ", "90"),
        ("90^{\\circ}", "90"),
        ("5\\text{ cm}", "5"),
        ("5 \\text{ square units}", "5"),
        ("5.4 \\text{ cents}", "5.4"),
        ("5 cm", "5"),
        ("5\\text{ m}^2", "5"),
        ("\\frac{1}{2} \\text{m}", "0.5"),
        ("12 inches", "12"),
        ("3 x", "3x"),
        ("6 - 5 i", "6-5i"),
        ("x^2 + 2 x", "x^2+2x"),
        ("\\text{even}", "even"),
        ("\\textbf{(C)}", "(C)"),
        ("\\$32,\\!348", "32348"),
        ("32,348", "32348"),
        ("10\\%", "10"),
        ("x = 4", "4"),
        ("x \\in [-2,7]", "[-2,7]"),
        ("11\\sqrt2", "11\\sqrt{2}"),
        ("2\\cdot 3^5", "2 \\times 3^5"),
        ("4.", "4"),
        ("4.0", "4"),
        ("(-\\infty, 2)\\cup(3, \\infty)", "(-\\infty,2) \\cup (3,\\infty)"),
    ],
)
def test_formulas_that_are_the_same(given_as: str, reference: str) -> None:
    question = OpenQuestion("1", "?", (reference,), "boxed", 9)
    assert score(question, f"Hence $\\boxed{{{given_as}}}$.") == 1.0
    assert score(question, f"Hence {given_as}.") == 0.0  # not boxed


@pytest.mark.parametrize(
    ("given_as", "reference"),
    [("2", "3"), ("\\frac{1}{2}", "\\frac{2}{1}"), ("(1,2)", "(2,1)"), ("x+1", "x-1"), ("1,2", "12"), ("", "0"),
     ("\\sqrt{2}", "2"), ("y=2x+3", "y=2x-3"), ("[1,2)", "(1,2)"), ("-3", "3"), ("2x", "2"), ("3 x", "3"),
     ("5 y", "5")],
)  # fmt: skip
def test_formulas_that_differ(given_as: str, reference: str) -> None:
    assert score(OpenQuestion("1", "?", (reference,), "boxed", 9), f"\\boxed{{{given_as}}}") == 0.0


@given(st.text(alphabet="x12 .,/-+^{}()\\$%frac"))
def test_normal_form_is_stable(formula: str) -> None:
    assert METRICS["boxed"](f"\\boxed{{{formula}}}", formula, ()) in (0.0, 1.0)
    assert isinstance(normal_formula(formula), str)


def test_a_question_needs_a_reference_and_a_metric() -> None:
    with pytest.raises(C2CError, match="no reference answer"):
        replace(QUESTION, references=())
    with pytest.raises(C2CError, match=r"unknown metric 'f2'.*rouge-l"):
        score(replace(QUESTION, metric="f2"), "Ada")
