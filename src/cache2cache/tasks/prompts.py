"""How a question is put to a model, and how the letter is read out of its answer."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from cache2cache.errors import C2CError
from cache2cache.tasks.base import LETTERS, Question

# Appended behind the generation prompt when options are compared by the likelihood of their letters.
ANSWER_PREFIX = "The correct answer is"
CHINESE_ANSWER_PREFIX = "正确答案是"


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


def chinese_prompt(question: Question, cot: bool = False) -> str:
    """The paper's user turn in Chinese, for C-Eval."""
    head = f"请准确回答下面的问题：\n\n{question.question}\n\n选项：\n{option_lines(question)}\n\n"
    if cot:
        return (
            f"{head}要求：\n- 仔细阅读问题和所有选项。\n- 请一步一步地思考，并简要说明理由。\n"
            f"- 最后给出答案，以{CHINESE_ANSWER_PREFIX}开头"
        )
    return (
        f"{head}要求：\n- 仔细阅读问题和所有选项。\n- 选出唯一最正确的答案。\n"
        f"- 只按以下格式回答：“{CHINESE_ANSWER_PREFIX}{'/'.join(question.letters)}”。\n"
        f"- 除答案外，不要包含任何解释、其他文字或标点。\n\n{CHINESE_ANSWER_PREFIX}"
    )


def few_shot_head(subject: str) -> str:
    """The line above the examples of a subject ("" for none)."""
    about = f" about {subject.replace('_', ' ')}" if subject else ""
    return f"The following are single choice questions (with answers){about}.\n\n"


def unanswered(question: Question) -> str:
    """A question among examples, up to where its letter follows behind a space."""
    return f"{question.question}\n{option_lines(question)}\nAnswer:"


def answered(question: Question) -> str:
    """A question as an example for those behind it."""
    return f"{unanswered(question)} {question.letter}\n\n"


def few_shot_prompt(question: Question, dev: Sequence[Question], n: int = 5) -> str:
    """The paper's few-shot prompt: the first `n` questions of the same subject in `dev` with answers, then this one."""
    asked = (question.question, question.options)  # some sets have a question twice, under two ids
    examples = [o for o in dev if o.subject == question.subject and (o.question, o.options) != asked][:n]
    if len(examples) < n:
        raise C2CError(
            f"{n} examples about {question.subject or 'no subject'} were asked for, {len(examples)} are there; "
            "give fewer, or questions of another split"
        )
    return "".join([few_shot_head(question.subject), *map(answered, examples), unanswered(question)])


def extract_letter(text: str, n_options: int) -> str | None:
    """The letter that `text` gives as its answer, or None where it gives none, or several.

    What is thought (<think>) and struck out is not looked at. Of questions that the text repeats or goes on to ask,
    each is read by itself, and the first answer counts. In it what the text takes its answer back for ("no wait, it's
    C") comes before anything else, and then in this order: what is stated ("the answer is X", "I choose X", "答案是X",
    \\boxed{X}); a line of nothing but a letter; "X is correct"; a letter that opens the text; the only letter that
    stands by itself. A list of all options is only what the question said, a list of some ("A or B") is several, and a
    letter that is denied ("not A", "B is wrong") or supposed ("if it is A") is none. Of several that are stated one
    after the other the last counts where the text corrects itself or concludes.
    """
    plain = _plain(text)
    for part in dict.fromkeys((*_QUESTION.split(plain), plain)):
        if found := _read(part, LETTERS[:n_options]):
            return found if found in LETTERS[:n_options] else None
    return None


def _read(text: str, letters: str) -> str:
    """The letter of a part, "" for none, and the sign for several."""

    def together(found: re.Match[str]) -> str:
        named = "".join(re.findall(r"[A-Z]", found[0]))
        return found[0] if len(set(named)) == 1 else " " if named == letters else _SEVERAL

    told = _DENIED.sub(" ", _LIST.sub(together, text))
    for piece in reversed(_TAKEN_BACK.split(told)[1:]):
        for find in (_stated, _own_line, _called_right, _instead):
            if found := find(piece):
                return found
    beside = _without_options(told, letters)
    for part in dict.fromkeys((beside, told)):
        for find in (_stated, _own_line, _called_right, _opening, _standing_alone):
            if found := find(part):
                return "" if part != beside and found == _SEVERAL else found
    return ""


def _without_options(text: str, letters: str) -> str:
    """Without the lists of all options, one a line: what is said beside them counts first."""
    kept: list[str] = []
    for line in text.split("\n"):
        kept.append(line)
        heads = [head[1] for row in kept[-len(letters) :] if (head := _HEAD.match(row))]
        if "".join(heads) == letters:
            del kept[-len(letters) :]
    return "\n".join(kept)


# A list of letters is put together into one sign first.
_SEVERAL = "§"
# A letter that may be an option's: no part of a word, a formula ("A + B", "C = 2"), an abbreviation ("B.C.") or a name
# ("C++"), and neither pronoun nor, as a rule, article ("A plant").
_FREE = r"(?<![\w'/+*^°])(?<!\w[.-])(?<![+*=^] )"
_ENDED = r"(?![\w'/+*#^°%]|-\w|\.[A-Z](?![a-z])|[ ]*[=+*^<>])"
_WORD = r"(?:[AI] (?!(?:is|because|since|as|and|or|but|for|with)\b)[A-Za-z]|I, [a-z])"
_OPTION = rf"{_FREE}(?!{_WORD})[A-Z]{_ENDED}"
_MENTION = rf"({_OPTION}|{_SEVERAL})"

_JOIN = r"(?:[ ]|\s*(?:(?:[,/|&、]|\b(?:and|or|maybe|possibly|perhaps|even|also)\b|和|或|与)\s*)+\(?)"
_LIST = re.compile(rf"{_FREE}[A-Z]\)?(?:{_JOIN}(?!{_WORD})[A-Z](?![\w'])\)?)+", re.A)
_KIND = r"(?:the\s+)?(?:(?i:options?|choices?|answers?|letters?)|选项)?\s*\(?"
_DENIED = re.compile(
    rf"(?:(?i:\b(?:not|isn't|neither|nor|never|eliminated?|exclude|reject|rule\s+out|rather\s+than|instead\s+of))\b"
    rf"|不是|不选|排除)\s*{_KIND}{_MENTION}\)?(?:,?\s+but\b)?"
    rf"|(?i:\b(?:if|suppose|supposing|whether))\s+(?:[\w']+\s+){{0,4}}?{_KIND}{_MENTION}"
    rf"|{_KIND}{_MENTION}\)?(?:选项|项)?\s*(?:(?:is|are|was|were|does|do|can|could|would)(?:\s+not\b|n't\b)|cannot\b"
    r"|(?:is|are|was|were)\s+(?:\w+\s+)?(?:wrong|incorrect|false|eliminated|excluded|ruled\s+out|impossible)\b"
    r"|不|错)",
    re.A,
)
_HEAD = re.compile(r"\W{0,4}(?:(?i:option)\s)?([A-Z])\s?[.):、]\s?\S", re.A)  # of a line with an option
# With the question itself, whose words are no answer.
_QUESTION = re.compile(
    r"(?:^|\n)\s*(?:(?:Accurately answer|请准确回答)[^\n]*(?:\n[^\n]*)?"
    r"|(?:Question\s?\d*|Human|User|Q\d*|问题)\s?:[^\n]*|(?:Instructions?|Choices|Options|要求|选项)\s?:|题目|<\|)"
)
_TAKEN_BACK = re.compile(
    r"(?i:\b(?:wait|actually|correction|corrected|scratch\s+that|on\s+second\s+thoughts?|sorry|oops|edit|or\s+rather"
    r"|I\s+meant?|I\s+take\s+(?:that|it)\s+back|let\s+me\s+(?:reconsider|rethink|correct)|but\s+(?=it(?:'s|\s+is)\s))\b"
    r"|\bno\b(?=\s*[,;:–—-])(?!\W{1,3}[A-Z][.):]\s+\w))"
    r"|不对|更正|等等|(?<=[,，。])不(?=[,，])"
)


def _plain(text: str) -> str:
    """Without what is thought, struck out and markup, full-width letters as plain ones, and a boxed letter as a stated
    one."""
    text = unicodedata.normalize("NFKC", text).rpartition("</think>")[2].partition("<think>")[0].replace("’", "'")
    text = re.sub(r"~~[^~\n]{1,300}~~", " ", text)
    text = re.sub(r"\\(?:boxed|fbox)\b|<answer>", " answer: ", text)
    text = re.sub(
        r"\\(?:text|textbf|mathrm|mathbf)\b|</?\w{1,20}>|\\[()\[\]]|[*`$\"“”{}\[\]§]|(?<!\w)_+|_+(?!\w)|(?<!\w)'|'(?!\w)",
        " ",
        text,
    )
    asked = False

    def of_dialogue(found: re.Match[str]) -> str:  # "Q: … A: …"
        nonlocal asked
        asked, answers = found[1] == "Q", asked and found[1] == "A"
        return "" if answers else found[0]

    text = re.sub(r"\b([QA])\d{0,3}\s?:", of_dialogue, text)
    return re.sub(r" ?\n[ \n]*", "\n", re.sub(r"[^\S\n]+", " ", text)).strip()


_STATES = (
    r"(?:(?i:\b(?:answer|ans\b\.?|solution|(?:correct|right|best|final|true)\s+(?:choice|option|one|statement|letter))"
    r"(?:(?:\s+(?!is\b)[\w'-]+){0,6}?\s+(?:is|was|(?:would|should|must|will)\s+be))?"
    r"|\b(?:choose|chose|pick|select|selected|say|go(?:ing)?\s+with|opt\s+for))\b|答案|选(?![项出])择?|正确的)"
)
_BETWEEN = (
    r"(?:[^\w.!?;。§]|\b(?i:is|are|be|the|option|choice|letter|answer|most|likely|probably|clearly|definitely|indeed"
    r"|therefore|thus|simply|only|correct|best|that)\b){0,30}"
)
_LOWER = r"\(([a-z])\)|\b([a-z])(?=[.):]?\s*(?:\n|$)|[.):]\s)"  # only where it can be no word
_NO_WORD = rf"(?!(?:(?<=[:\n])|(?<=[:\n] )|(?=I)){_WORD})"  # "is A plant" means the letter, "Answer: A plant" doesn't
_STATED = re.compile(
    rf"{_STATES}{_BETWEEN}(?<![\w'/])(?:({_NO_WORD}[A-Z]|{_SEVERAL}){_ENDED}|{_LOWER})",
    re.A,
)
_TURNS = re.compile(
    r"\?|(?i:\b(?:no|not|wait|actually|however|but|instead|rather|sorry|correction|mistake|wrong|incorrect|therefore|thus"
    r"|hence|so|final|finally|conclusion|conclude|overall)\b)|因此|所以|但|不|综上|最终|最后",
    re.A,
)


def _stated(text: str) -> str:
    found = [("".join(g or "" for g in m.groups()).upper(), m.end()) for m in _STATED.finditer(text)]
    single = [(letter, end) for letter, end in found if letter != _SEVERAL] or found
    if not single or len({letter for letter, _ in single}) == 1:
        return single[0][0] if single else ""
    last = single[-1][0]
    before = max(end for letter, end in single if letter != last)
    after = min(end for letter, end in single if letter == last and end > before)
    return last if _TURNS.search(text, before, after) else _SEVERAL


def _own_line(text: str) -> str:
    whole = re.fullmatch(r"\W*([a-z])\W*", text, re.A)
    return whole[1].upper() if whole else _one(re.findall(rf"^[^\w\n]*{_MENTION}\W*$", text, re.A | re.M))


def _called_right(text: str) -> str:
    ticked = "[✓✔✅☑]"
    right = (
        rf"{_MENTION}\)?(?:(?:[,.:]\s[^.!?\n]{{1,40}}?)?\s+(?:is|are|was|must\s+be|would\s+be)\s+(?:\w+\s+){{0,2}}?"
        r"(?i:correct|right|best|true|answer)\b|\s*[:-]\s*(?i:correct|right|true)\b|(?:选项|项)?(?:是|为)?(?:正确|对))"
    )
    marked = (
        rf"^[^\w\n]{{0,9}}{_MENTION}[.):][^\n]{{1,80}}?(?:\((?i:correct|right|true)\)|{ticked})"
        rf"|{ticked}\W{{0,3}}{_MENTION}[.):]"
    )
    found = re.findall(right, text, re.A) or [a or b for a, b in re.findall(marked, text, re.A | re.M)]
    return _one(found)


def _instead(text: str) -> str:
    """The letter that stands by itself where an answer was taken back: right behind that, or behind a word that points
    at it, and not with words of its own ("Wait, A is hot")."""
    pointing = (
        r"(?:^\W*|(?<![A-Za-z])(?i:it's|is|be|so|thus|hence|then|therefore|mean|meant|with|option|choice|letter|answer"
        r"|yes|indeed|say|either|maybe|perhaps|probably)[\s:,]+\(?|[是为选])"
    )
    return _one(re.findall(rf"{pointing}{_MENTION}(?=\)?\s*(?:$|\n|[.,;:!?。]|because\b|since\b|as\b))", text, re.A))


def _opening(text: str) -> str:
    first = re.match(rf"\W*?{_MENTION}|\W*([a-z])\)\s", text, re.A)
    letter = (first[1] or first[2].upper()) if first else ""
    heads = set(re.findall(rf"{_MENTION}\s?[.):]\s", text, re.A))
    return "" if not letter else letter if heads <= {letter} else _SEVERAL


def _standing_alone(text: str) -> str:
    """The letter mentioned behind nothing, a sign, or a word that points at it: not the one of "Vitamin C"."""
    pointing = (
        r"(?:^|[^\w\s]|\n|(?<![A-Za-z])(?i:option|choice|letter|is|be|so|thus|hence|then|because|since|as|to|with|it's|of"
        r"|for|that|maybe|perhaps|yes|think|believe|guess|therefore|[a-z]+ly))\s*"
    )
    return _one(re.findall(rf"{pointing}{_MENTION}", text, re.A))


def _one(letters: Sequence[str]) -> str:
    """The letter that all are, "" for none, and the sign for several."""
    different = set(letters)
    return different.pop() if len(different) == 1 else _SEVERAL if different else ""
