"""How an answer in words is scored: `score(question, text)`, from 0 to 1.

The metrics of LongBench (Bai et al., 2024) give the figures of its published code, oddities included, so that figures
can be compared: they are named where they occur. Its ROUGE-L is that of the package rouge 1.0.1, its code similarity
that of fuzzywuzzy on difflib, which it falls back to without python-Levenshtein.
"""

from __future__ import annotations

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from fractions import Fraction

from cache2cache.errors import C2CError
from cache2cache.tasks.base import OpenQuestion, Question
from cache2cache.tasks.prompts import extract_letter


def score(question: Question | OpenQuestion, text: str) -> float:
    """What the answer `text` is worth, from 0 to 1.

    For a question with options 1 where the letter read out of the text is the right one; otherwise the question's
    metric, with the reference that fits best.
    """
    if isinstance(question, Question):
        return float(extract_letter(text, len(question.options)) == question.letter)
    metric = METRICS.get(question.metric)
    if metric is None:
        raise C2CError(f"unknown metric {question.metric!r}; expected one of {', '.join(METRICS)}")
    answer = text.lstrip("\n").split("\n")[0] if question.first_line else text
    return max(metric(answer, reference, question.classes) for reference in question.references)


def exact(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 where both are the same but for case and the white space around them."""
    return float(text.strip().casefold() == reference.strip().casefold())


# Numbers and formulas.

MOST_DIGITS = 1000
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?<![\w.])[-−]?[$€£¥]?(?:{_DIGITS})|(?:{_DIGITS})")  # the sign is none behind a word: "12-5"


def number(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 where the number that `text` ends on, see `last_number`, equals the reference."""
    expected = last_number(reference)
    return float(expected is not None and last_number(text) == expected)


def last_number(text: str) -> Fraction | None:
    r"""The number that `text` gives as its answer: "$1,234.50" is 1234.5.

    In this order: the first one behind the last ####, in the last \boxed{}, behind the last "answer is" or "answer:";
    the last one of all. Behind ####, \boxed and "answer" that of the right-hand side where there is an equation.
    """
    stated = [
        re.split("####", text)[1:],
        [last_boxed(text) or ""],
        re.split(r"(?i:\banswer(?:\s+is\b|\s*:))", text)[1:],
    ]
    for parts in stated:
        line = parts[-1].strip().split("\n")[0] if parts else ""
        if found := _NUMBER.findall(line.rpartition("=")[2]):
            return _fraction(found[0])
    found = _NUMBER.findall(text)
    return _fraction(found[-1]) if found else None


def _fraction(digits: str) -> Fraction | None:
    """None for one of more digits than any answer has: a model that repeats itself, and Python refuses to read it."""
    return Fraction(re.sub(r"[,$€£¥]", "", digits).replace("−", "-")) if len(digits) <= MOST_DIGITS else None


def boxed(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    r"""1 where what stands in the last \boxed{} of `text` and the reference are the same formula, as written.

    Both are brought to one form first (`normal_formula`); plain numbers and fractions are compared by value.
    """
    found = last_boxed(text)
    if found is None:
        return 0.0
    ours, theirs = normal_formula(found), normal_formula(reference)
    return float(ours == theirs or (_value(ours) is not None and _value(ours) == _value(theirs)))


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} or \fbox{…}, whose braces may be nested; None without one that is closed."""
    starts = {m.end() for m in re.finditer(r"\\(?:boxed|fbox)\s{0,9}\{", text)}
    opened: list[int] = []
    closed: dict[int, int] = {}
    for brace in re.finditer(r"[{}]", text):  # once through, however many are never closed
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts:
            closed[start] = brace.start()
    return text[max(closed) : closed[max(closed)]] if closed else None


_WORDS = r"\\(?:text|mathrm|textbf|mbox)\s*"
_UNITS = "cm|mm|km|ft|in|kg|mg|mL|ml|mi|oz|lb|hr"  # other short ones may be variables
_FORMULA_RULES = [
    (r"\\[!,;: ]|\\q?quad\b|~", ""),  # space
    (r"\\left\b|\\right\b|\\displaystyle\b|\\big[lr]?\b", ""),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\\$|\\%|%|\$", ""),
    (r"\^\s*\{?\\circ\}?|°", ""),
    (rf"(?<=[\d}}])\s*{_WORDS}\{{\s*(?:square\s+|cubic\s+)?[a-zA-Z]+\.?\s*\}}(?:\^\{{?\d\}}?)?\s*$", ""),  # a unit
    (rf"{_WORDS}\{{\s*([^{{}}]*?)\s*\}}", r" \1 "),
    (rf"(?<=[\d}}])\s+(?:square\s+|cubic\s+)?(?:[a-zA-Z]{{3,}}|{_UNITS})\.?(?:\^\{{?\d\}}?)?\s*$", ""),  # the same
    (r"^\s*[a-zA-Z]\s*(?:=|\\in\b)\s*(?=[^=]*$)", ""),  # the name of what was asked for
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\cdot|\\times", "*"),
    (r"\s+", ""),
    (r"\.$", ""),
    (r"(?<![\d.])\.(?=\d)", "0."),
    (r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
]


def normal_formula(formula: str) -> str:
    """A formula in LaTeX without what is only spacing, markup or a unit, and with fractions written one way."""
    formula = re.sub(r"\s+", " ", formula)  # long runs of space would take long
    for pattern, replacement in _FORMULA_RULES:
        formula = re.sub(pattern, replacement, formula)
    return re.sub(r"(?<=\d),(?=\d{3})", "", formula) if re.fullmatch(rf"-?(?:{_DIGITS})", formula) else formula


def _value(formula: str) -> Fraction | None:
    if len(formula) > MOST_DIGITS:
        return None
    if parts := re.fullmatch(r"(-?)\\frac\{(-?\d+)\}\{(-?\d*[1-9]\d*)\}", formula):
        return Fraction(int(parts[2]), int(parts[3])) * (-1 if parts[1] else 1)
    return Fraction(formula) if re.fullmatch(r"-?\d+(?:\.\d+)?", formula) else None


# LongBench.


def f1(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of words, without case, punctuation and English articles."""
    return _overlap(_words(text), _words(reference))


def f1_zh(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of the bags of Chinese words (jieba's), without punctuation."""
    return _overlap(_words_zh(text), _words_zh(reference))


def _words(text: str) -> list[str]:
    plain = "".join(char for char in text.lower() if char not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", plain).split()


# What the published code takes out beside ASCII punctuation.
_PUNCTUATION_ZH = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》"
    "「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def _words_zh(text: str) -> list[str]:
    dropped = {*string.punctuation, *_PUNCTUATION_ZH}
    plain = ("".join("".join(c for c in word.lower() if c not in dropped).split()) for word in _cut(text))
    return [word for word in plain if word]


def _cut(text: str) -> list[str]:
    try:
        import jieba
    except ImportError as error:
        raise C2CError(
            "Chinese answers are scored word by word, which needs the package jieba; "
            "install it with: pip install 'cache2cache[chinese]'"
        ) from error
    jieba.setLogLevel(logging.WARNING)  # it reports on its dictionary otherwise
    return list(jieba.cut(text))


def _overlap(ours: list[str], theirs: list[str]) -> float:
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else 0.0


def rouge_l(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """F1 of ROUGE-L on the level of a summary, over the sets of words.

    Sentences end at each full stop. A word counts once, if it is in the longest common subsequence of some pair of
    sentences of both texts.
    """
    ours, theirs = _sentences(text), _sentences(reference)
    if not ours or not theirs:
        return 0.0
    common = {word for their in theirs for our in ours for word in _common_words(their, our)}
    recall = len(common) / len({word for sentence in theirs for word in sentence})
    precision = len(common) / len({word for sentence in ours for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_l_zh(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """`rouge_l` over Chinese words (jieba's)."""
    return rouge_l(" ".join(_cut(text)), " ".join(_cut(reference)))


def _sentences(text: str) -> list[list[str]]:
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _common_words(a: list[str], b: list[str]) -> set[str]:
    """The words of a longest common subsequence, of several the one that a walk from the end finds dropping `b`."""
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, word in enumerate(a):
        row, above = longest[i + 1], longest[i]
        for j, other in enumerate(b):
            row[j + 1] = above[j] + 1 if word == other else max(above[j + 1], row[j])
    i, j, words = len(a), len(b), set()
    while i and j:
        if a[i - 1] == b[j - 1]:
            i, j = i - 1, j - 1
            words.add(a[i])
        elif longest[i - 1][j] > longest[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def classification(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """1 over the number of classes named in `text`, where the right one is among them.

    A class whose name is a part of the right one's is left out. Of several in a row every second is: the published
    code drops them from the list that it walks through, and so steps over the next.
    """
    named = [name for name in classes if name in text]
    place = 0
    while place < len(named):
        if named[place] in reference and named[place] != reference:
            named.remove(named[place])
        place += 1
    return 1 / len(named) if reference in named else 0.0


def count(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """The share of the numbers in `text` that are the reference."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(reference) / len(numbers) if numbers else 0.0


def retrieval(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """`count` for the number of a paragraph: of "Paragraph 7" or "段落7" the 7."""
    return count(text, re.sub(r"\D", "", reference))


def code_similarity(text: str, reference: str, classes: Sequence[str] = ()) -> float:
    """How alike the reference and the first line of `text` that is neither comment nor fence are, to whole percents."""
    lines = text.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    if line == reference:
        return 1.0
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100


# What an answer, one reference and the question's classes are worth together.
METRICS: dict[str, Callable[[str, str, Sequence[str]], float]] = {
    "exact": exact,
    "number": number,
    "boxed": boxed,
    "f1": f1,
    "f1-zh": f1_zh,
    "rouge-l": rouge_l,
    "rouge-l-zh": rouge_l_zh,
    "classification": classification,
    "retrieval": retrieval,
    "count": count,
    "code": code_similarity,
}
RIGHT_OR_WRONG = frozenset({"exact", "number", "boxed"})  # the others give shares
