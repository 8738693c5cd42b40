"""How each method answers a batch of questions: by the likeliest option, or in words.

Every method is a cache to answer on top of, so both ways to answer are the same for all of them. What methods share is
computed once for a batch: the sharers' prefills for sharer, C2C and all controls, the receiver's own, and the messages
of text-to-text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import cast

from .. import response
from ..decode import confidence, threshold
from ..errors import C2CError
from ..kv import Prefilled, prefill_prompts, prefilled
from ..methods.base import Ask
from ..methods.text_to_text import FORMS, MAX_MESSAGE_TOKENS, relayed
from ..models.load import LM
from ..pair import C2C, PromptIds
from ..tasks import OpenQuestion, Question
from ..tasks import score as worth
from ..tasks.longbench import cut_middle
from ..tasks.prompts import (
    ANSWER_PREFIX,
    CHINESE_ANSWER_PREFIX,
    chinese_prompt,
    extract_letter,
    paper_prompt,
    short_prompt,
)
from ..training.store import Store
from .answers import GENERATION, LIKELIHOOD, Answer
from .controls import Known, fuse_others, gaussian, rows_of, sharer_cache, starts_of, zeroed
from .letters import letter_logprobs, likeliest
from .routing import LEARNED
from .writing import write, write_on

METHODS = ("receiver", "sharer", "c2c", "other")  # unless others are asked for
CONTROLS = ("other", "zeroed", "gaussian", "self", "off")
SKIP = "skip"  # asked for with a threshold
SINGLE = "single"  # asked for with an adapter
FEW_SHOT = "few-shot"
ROUTED = (LEARNED, "route-confidence")  # follow from the answers of receiver and sharer
IN_WORDS = "receiver-generate"  # the receiver in words, where all else is by likelihood
EVERY = (*dict.fromkeys([*METHODS, *CONTROLS, *FORMS, FEW_SHOT, SKIP, SINGLE, *ROUTED, IN_WORDS]),)
READ_SHARER = {"sharer", "c2c", SKIP, "other", "zeroed", "gaussian"}
SHOT_PREFIX = "Answer:"

Messages = Mapping[tuple[str, str, str], tuple[str, int]]  # task, form of text-to-text, id: text, number of tokens

PROMPTS: dict[str, Callable[[Question], str]] = {
    "paper": paper_prompt,
    "short": short_prompt,
    "chinese": chinese_prompt,
    "cot": partial(paper_prompt, cot=True),
}


@dataclass(frozen=True)
class Setup:
    """Who answers, and how.

    Attributes:
        pair: the models and what fuses them.
        prompt: a name of PROMPTS.
        skip: the threshold of the method skip.
        single: the fine-tuned receiver of the method single.
        identical: the pair of the method self, the receiver being its own sharer.
        stores: per sharer, where its prefills are read from, and put first where they are missing; None computes them.
        max_new_tokens: of answers in words to questions with options.
        seed: of the noise of gaussian.
    """

    pair: C2C
    prompt: str = "paper"
    skip: float | None = None
    single: LM | None = None
    identical: C2C | None = None
    stores: Sequence[Store | None] = ()
    max_new_tokens: int = 64
    seed: int = 0

    @property
    def prefix(self) -> str:
        """The start of the answer, behind which options are compared."""
        return CHINESE_ANSWER_PREFIX if self.prompt == "chinese" else ANSWER_PREFIX

    def store(self, j: int) -> Store | None:
        return self.stores[j] if self.stores else None


@dataclass(frozen=True)
class Case:
    """A question as the models read it.

    Attributes:
        whole: with the start of the answer, behind which the options are compared; of an open question as it is.
        bare: as it is answered in words; None where it never is.
        few_shot: the user turn of few-shot.
        asked: a hash of all that an answer and its worth depend on.
    """

    task: str
    question: Question | OpenQuestion
    ask: Ask
    whole: PromptIds
    bare: PromptIds | None = None
    bucket: str | None = None
    few_shot: str | None = None

    @cached_property
    def asked(self) -> str:
        q = self.question
        about = (q.question, q.options, q.answer) if isinstance(q, Question) else (
            q.references, q.metric, q.max_new_tokens, q.classes, q.first_line
        )  # fmt: skip
        return _hash(json.dumps([about, self.ask.prompt, self.few_shot]))

    def asked_with(self, partner: Case | None) -> str:
        """The same where another question's caches are fused: the answer depends on that one too."""
        return self.asked if partner is None else _hash(f"{self.asked} {partner.asked}")

    @property
    def id(self) -> str:
        return self.question.id

    def prompt(self, way: str) -> PromptIds:
        if way == LIKELIHOOD:
            return self.whole
        assert self.bare is not None
        return self.bare


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class State:
    """What is answered on top of, and what is known about it, row by row."""

    lm: LM
    prompts: Prefilled
    confidence: Sequence[float] = ()
    skipped: Sequence[bool] = ()
    messages: Sequence[tuple[str, int]] = ()


class Batch:
    """A batch of questions, and what its methods have in common, computed at first use.

    Args:
        setup: who answers.
        cases: what is asked, of like length.
        partners: per case the one whose caches the control other is given.
        methods: all that will be asked for.
        messages: the sharer's messages that are known.
        both: whether they are, or were, asked for by likelihood and in words.
    """

    def __init__(
        self,
        setup: Setup,
        cases: Sequence[Case],
        partners: Sequence[Case],
        methods: Sequence[str],
        messages: Messages,
        both: bool = False,
    ) -> None:
        self.setup, self.cases, self.messages = setup, cases, messages
        everyone = {c.id: c for c in [*cases, *(partners if "other" in methods else ())]}
        self.members = list(everyone.values())
        place = {name: row for row, name in enumerate(everyone)}
        self.partners = [place[p.id] for p in partners] if "other" in methods else []
        self.alone = any(m.startswith("sharer") for m in methods)
        self.both = both
        self._known: dict[str, list[Known]] = {}
        self._clean: dict[str, Prefilled] = {}
        self._own: dict[str, Prefilled] = {}
        self._told: dict[str, list[tuple[str, int]]] = {}
        self._read: dict[str, Prefilled] = {}

    def known(self, way: str) -> list[Known]:
        """The sharers' caches of all members."""
        if way not in self._known:
            pair, prompts = self.setup.pair, [c.prompt(way) for c in self.members]
            lengths = [[len(p.sharers[j]) for p in prompts] for j in range(len(pair.sharers))]
            if way == GENERATION and self._nested():
                # What is answered in words is the start of what options are compared behind: one prefill for both.
                longer = zip(self.known(LIKELIHOOD), lengths, strict=True)
                self._known[way] = [(starts_of(cache, n, wanted), wanted) for (cache, n), wanted in longer]
            else:
                store = self.setup.store
                caches = [sharer_cache(pair, j, prompts, store(j), alone=self.alone) for j in range(len(lengths))]
                self._known[way] = list(zip(caches, lengths, strict=True))
        return self._known[way]

    def mine(self, way: str) -> list[Known]:
        """The sharers' caches of the cases, which are the first of the members."""
        known = self.known(way)
        return known if len(self.members) == len(self.cases) else rows_of(known, range(len(self.cases)))

    def _nested(self) -> bool:
        if not plain(self.setup.pair):
            return False
        pairs = ((c.prompt(GENERATION).sharers, c.whole.sharers) for c in self.members)
        return all(
            list(ids) == list(more[: len(ids)]) for short, long in pairs for ids, more in zip(short, long, strict=True)
        )

    def clean(self, way: str) -> Prefilled:
        """The receiver's prefill that is fused."""
        if way not in self._clean:
            if plain(self.setup.pair):
                self._clean[way] = self._prefill("receiver", way, self.setup.pair.receiver, self._receivers_rows)
            else:
                positions = [c.prompt(way).positions for c in self.cases]
                self._clean[way] = prefill_prompts(self.setup.pair.receiver, self._receivers_rows(way), positions)
        return self._clean[way]

    def _receivers_rows(self, way: str) -> list[Sequence[int]]:
        return [c.prompt(way).receiver for c in self.cases]

    def own(self, way: str) -> Prefilled:
        """The receiver's prefill for itself: the same, unless a published token map moves its positions."""
        if plain(self.setup.pair):
            return self.clean(way)
        if way not in self._own:
            self._own[way] = prefill_prompts(self.setup.pair.receiver, self._receivers_rows(way))
        return self._own[way]

    def told(self, form: str) -> list[tuple[str, int]]:
        """The first sharer's messages, with their numbers of tokens."""
        if form not in self._told:
            known = [self.messages.get((c.task, form, c.id)) for c in self.cases]
            if all(m is not None for m in known):
                self._told[form] = [m for m in known if m is not None]
            else:
                self._told[form] = messages_of(self.setup, form, self.cases)
        return self._told[form]

    def _reads(self, method: str, way: str, lm: LM, chats: Sequence[list[dict[str, str]]], prefix: str) -> Prefilled:
        def rows(way: str) -> list[list[int]]:
            start = prefix if way == LIKELIHOOD else ""
            return [self.setup.pair.rendered(lm, chat, start).ids for chat in chats]

        return self._prefill(method, way, lm, rows)

    def _prefill(self, method: str, way: str, lm: LM, rows: Callable[[str], Sequence[Sequence[int]]]) -> Prefilled:
        """What a model reads by itself, its token ids being `rows(way)`.

        What is answered in words is the start of what options are compared behind: one prefill for both, whichever of
        them stands in the file already, so that an interrupted run computes the same.
        """
        asked = rows(way)
        if not self.both:
            return prefill_prompts(lm, asked)
        if method not in self._read:
            self._read[method] = prefill_prompts(lm, rows(LIKELIHOOD))
        if way == LIKELIHOOD:
            return self._read[method]
        longer, known = rows(LIKELIHOOD), self._read.pop(method)
        if any(list(row) != list(more[: len(row)]) for row, more in zip(asked, longer, strict=True)):
            return prefill_prompts(lm, asked)
        # The last token of a prompt is in no cache.
        lengths, wanted = [len(more) - 1 for more in longer], [len(row) - 1 for row in asked]
        return prefilled(lm, asked, starts_of(known.kv, lengths, wanted))

    def state(self, method: str, way: str) -> State:
        """What the method answers on top of."""
        setup, pair, cases = self.setup, self.setup.pair, self.cases
        receiver, prompts = pair.receiver, [c.prompt(way) for c in cases]
        options = isinstance(cases[0].question, Question)
        prefix = setup.prefix if options else ""
        if method == "receiver":
            own = self.own(way)
            return State(receiver, own, confidence=[round(p, 6) for p in confidence(receiver, own)])
        if method.startswith("sharer"):
            j = int(method.removeprefix("sharer-")) - 1 if method != "sharer" else 0
            sharer = pair.sharers[j]
            if not plain(pair):  # then the pair's sharer doesn't read its own tokens
                return State(sharer, self._reads(method, way, sharer, [c.ask.chat() for c in cases], prefix))
            cache, _ = self.mine(way)[j]
            return State(sharer, prefilled(sharer, [p.sharers[j] for p in prompts], cache))
        if method in FORMS:
            told = self.told(method)
            chats = [fitting(pair, c, method, text) for c, (text, _) in zip(cases, told, strict=True)]
            return State(receiver, self._reads(method, way, receiver, chats, prefix), messages=told)
        if method == FEW_SHOT:
            turns = [
                [{"role": "user", "content": c.few_shot or ""}] for c in cases
            ]  # plan asks only where there is one
            return State(receiver, self._reads(method, way, receiver, turns, SHOT_PREFIX))
        if method == SINGLE:
            assert setup.single is not None
            return State(setup.single, self._reads(method, way, setup.single, [c.ask.chat() for c in cases], prefix))
        if method == "self":
            assert setup.identical is not None
            chats = [c.ask.chat() for c in cases]
            return self._fused(setup.identical, [setup.identical.encode(chat, prefix=prefix) for chat in chats], way)
        if method in ("c2c", SKIP) and way == GENERATION and response.fused_sharers(pair):
            return self._fused(pair, prompts, way, skip=setup.skip if method == SKIP else None)
        clean = self.clean(way)
        if method == "off":
            return State(receiver, pair.fuse(prompts, sharer_mask=0, clean=clean))
        if method == SKIP:
            # What is at hand, or in a store; otherwise the sharers read only what isn't skipped, as in earnest.
            at_hand = way in self._known or any(self.setup.stores)
            known = self.mine(way) if at_hand else None
            fused = pair.fuse(prompts, clean=clean, skip=setup.skip, sharers=known)
            return State(receiver, fused, skipped=fused.skipped)
        if method == "c2c":
            return State(receiver, pair.fuse(prompts, clean=clean, sharers=self.mine(way)))
        if method == "other":
            others = [self.members[row] for row in self.partners]
            theirs = rows_of(self.known(way), self.partners)
            fused = fuse_others(pair, prompts, [o.prompt(way) for o in others], clean, theirs)
            return State(receiver, fused)
        if method == "gaussian":
            known = gaussian(self.mine(way), [f"{setup.seed}:{c.id}" for c in cases])
        else:
            assert method == "zeroed", method
            known = zeroed(self.mine(way))
        return State(receiver, pair.fuse(prompts, clean=clean, sharers=known))

    def _fused(self, pair: C2C, prompts: Sequence[PromptIds], way: str, skip: float | None = None) -> State:
        """The prompts fused; in words the answer's tokens too, where the fuser was trained for that."""
        words = way == GENERATION
        fused = pair.fuse(prompts, keep=words and bool(response.fused_sharers(pair)), skip=skip)
        state = response.answered_from(pair, fused) if words else fused
        return State(pair.receiver, state, skipped=() if skip is None else fused.skipped)

    def answers(self, method: str, way: str) -> list[Answer]:
        """The method's answer to every case."""
        state = self.state(method, way)
        made = self._likeliest(state, method) if way == LIKELIHOOD else self._in_words(state)
        rows = []
        for row, (case, found) in enumerate(zip(self.cases, made, strict=True)):
            message, count = state.messages[row] if state.messages else (None, None)
            partner = self.members[self.partners[row]] if method == "other" else None
            rows.append(
                Answer(
                    case.task, self.setup.prompt, case.id, method, found.choice, found.correct, found.logprobs,
                    confidence=state.confidence[row] if state.confidence else None,
                    skipped=state.skipped[row] if state.skipped else None,
                    text=found.text, answers=way, subject=case.question.subject or None, bucket=case.bucket,
                    score=found.score, message=message, tokens=found.tokens, message_tokens=count,
                    message_bytes=None if message is None else len(message.encode()),
                    partner=None if partner is None else partner.id, asked=case.asked_with(partner),
                    metric=case.question.metric if isinstance(case.question, OpenQuestion) else None,
                )
            )  # fmt: skip
        return rows

    def _likeliest(self, state: State, method: str) -> list[_Found]:
        questions = [cast(Question, c.question) for c in self.cases]
        # Behind a Chinese colon there is none; few-shot has the English examples' ending whatever the prompt.
        space = "" if self.setup.prompt == "chinese" and method != FEW_SHOT else " "
        made = letter_logprobs(state.lm, state.prompts, questions, space)
        chosen = map(likeliest, made)
        return [_Found(i, i == q.answer, logprobs) for q, i, logprobs in zip(questions, chosen, made, strict=True)]

    def _in_words(self, state: State) -> list[_Found]:
        limits = [
            q.max_new_tokens if isinstance(q := c.question, OpenQuestion) else self.setup.max_new_tokens
            for c in self.cases
        ]
        made = []
        for case, answer in zip(self.cases, write_on(state.lm, state.prompts, limits), strict=True):
            question, tokens = case.question, len(answer.ids)
            if isinstance(question, OpenQuestion):
                value = round(worth(question, answer.text), 5)
                made.append(_Found(-1, value == 1, text=answer.text, tokens=tokens, score=value))
            else:
                letter = extract_letter(answer.text, len(question.options))
                choice = -1 if letter is None else question.letters.index(letter)
                made.append(_Found(choice, choice == question.answer, text=answer.text, tokens=tokens))
        return made


@dataclass(frozen=True)
class _Found:
    choice: int
    correct: bool
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None
    tokens: int | None = None
    score: float | None = None


def messages_of(setup: Setup, form: str, cases: Sequence[Case]) -> list[tuple[str, int]]:
    """What the first sharer writes to the receiver about each question, with its number of tokens."""
    sharer = setup.pair.sharers[0]
    chats = [c.ask.chat(("user", FORMS[form](c.ask))) for c in cases]
    rows = [setup.pair.rendered(sharer, chat).ids for chat in chats]
    return [(w.text, len(w.ids)) for w in write(sharer, rows, MAX_MESSAGE_TOKENS)]


def fitting(pair: C2C, case: Case, form: str, message: str) -> list[dict[str, str]]:
    """`relayed`, which holds the prompt twice; a question without options loses its middle where both don't fit."""
    lm, question, chat = pair.receiver, case.question, relayed(case.ask, form, message)
    if not isinstance(question, OpenQuestion):
        return chat
    limit = len(lm.need_tokenizer()(case.ask.prompt, add_special_tokens=False)["input_ids"])
    room = lm.context_length - question.max_new_tokens
    while (over := len(pair.rendered(lm, chat).ids) - room) > 0 and limit > 2:
        limit = max(2, limit - over // 2 - 1)
        chat = relayed(Ask.of(cut([lm], case.ask.prompt, limit)), form, message)
    return chat


def cut(lms: Sequence[LM], text: str, limit: int) -> str:
    """The text without its middle where it has more tokens for any model."""
    for lm in lms:
        tokenizer = lm.need_tokenizer()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > limit:
            kept, half = cut_middle(list(ids), limit), limit // 2
            text = "".join(str(tokenizer.decode(part)) for part in (kept[:half], kept[half:]))
    return text


def plain(pair: C2C) -> bool:
    """Whether every model reads its own tokens, counted up: not so with the published token maps."""
    return all(fuser.config.token_map == "span" for fuser in pair.fusers)


def expanded(methods: Sequence[str], pair: C2C) -> list[str]:
    """The methods as rows name them, each once, with a method sharer for every sharer: sharer, sharer-2, …"""
    more = [f"sharer-{j}" for j in range(2, len(pair.sharers) + 1)]
    stands_for = {"sharer": ["sharer", *more], IN_WORDS: ["receiver"]}
    return list(dict.fromkeys(x for m in methods for x in stands_for.get(m, [m])))


def limit_of(limits: Mapping[str, int], way: str, method: str, methods: Sequence[str]) -> int | None:
    """How many questions `limits` allows: that of sharer is for each of several, that of receiver-generate for the
    receiver in words where nothing else asks for that."""
    if (way, method) == (GENERATION, "receiver") and "receiver" not in methods:
        method = IN_WORDS
    return limits.get(method, limits.get("sharer") if method.startswith("sharer-") else None)


def asked_of(methods: Sequence[str], ways: Sequence[str], pair: C2C) -> list[tuple[str, str]]:
    """What is to be answered, as (way, method). A router asks nobody: its answers follow from others'."""
    pairs = [(way, m) for way in ways for m in expanded([m for m in methods if m not in (*ROUTED, IN_WORDS)], pair)]
    return list(dict.fromkeys([*pairs, *[(GENERATION, "receiver")] * (IN_WORDS in methods)]))


def check_setup(setup: Setup, methods: Sequence[str]) -> None:
    """Raise a C2CError for a method that lacks what it needs."""
    needs = {SKIP: setup.skip, SINGLE: setup.single, "self": setup.identical}
    said = {
        SKIP: "a threshold; give one, from 0 to 1, as skip",
        SINGLE: "a fine-tuned receiver; give its adapter as single",
        "self": "a fuser that was trained with the receiver as its own sharer; give it as identical",
    }
    for method, thing in needs.items():
        if method in methods and thing is None:
            raise C2CError(f"the method {method} needs {said[method]}")
    threshold(setup.skip)
    if "off" in methods and any(f.config.moves_tokens for f in setup.pair.fusers):
        raise C2CError(
            "the fuser's token map moves the receiver's positions too, so that with fusion off it isn't the receiver "
            "alone, which the control off is to show; leave it out"
        )
    if response.fused_sharers(setup.pair) and (odd := set(methods) & {"other", "zeroed", "gaussian"}):
        raise C2CError(
            f"this fuser fuses the answer's tokens too, and the control {min(odd)} stands in only for the prompt's "
            "caches; leave it out"
        )


def check_names(prompt: str, methods: Sequence[str], way: str) -> None:
    """Raise a C2CError for a prompt or a method that doesn't exist, and for reasoning without words."""
    for name, given, known in (("prompt", [prompt], tuple(PROMPTS)), ("method", methods, EVERY)):
        if wrong := [g for g in given if g not in known]:
            raise C2CError(f"unknown {name} {wrong[0]!r}; expected one of {', '.join(known)}")
    if prompt == "cot" and way != GENERATION:
        raise C2CError("the prompt cot asks for words before the answer; give answers as generation")
