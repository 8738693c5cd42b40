"""Every method says what stock transformers would say, with a true account of messages, tokens and bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cache2cache.methods import METHODS, Answer, Ask
from cache2cache.models import LM
from cache2cache.pair import C2C
from cache2cache.tasks import Question

QUESTION = Question("q", "Which one?", ("this", "that", "both", "none"), 1)
NEW = 12


@pytest.fixture(scope="module")
def pair(tiny_pair_folder: Path) -> C2C:
    return C2C.from_pretrained(tiny_pair_folder)


def run(method: str, pair: C2C, ask: Ask) -> Answer:
    return list(METHODS[method](pair, ask, NEW))[-1]


def stock(lm: LM, chat: list[dict[str, str]], new: int = NEW) -> tuple[str, int]:
    """What the model says to a chat by itself, in plain transformers: text and number of tokens."""
    tokenizer: Any = lm.tokenizer
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = lm.model.generate(**inputs, do_sample=False, max_new_tokens=new)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True), len(ids)


def same_text(streamed: str, whole: str) -> bool:
    """Equal up to an unfinished character at the very end, which a stream holds back."""
    return streamed.rstrip("\ufffd") == whole.rstrip("\ufffd")


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("method", ["receiver", "sharer"])
def test_single_models_answer_as_in_transformers(pair: C2C, method: str, system: str | None) -> None:
    lm = pair.receiver if method == "receiver" else pair.sharers[0]
    answer = run(method, pair, Ask.of(QUESTION, system=system))
    prompt = "Which one?\nA. this\nB. that\nC. both\nD. none\nAnswer with the letter."
    chat = [{"role": "system", "content": system}] if system else []
    text, tokens = stock(lm, [*chat, {"role": "user", "content": prompt}])
    assert same_text(answer.text, text)
    assert (answer.method, answer.new_tokens, answer.bytes_passed, answer.message) == (method, tokens, 0, "")


def test_c2c_answers_as_the_pair_does(pair: C2C) -> None:
    ask = Ask.of("What is it?")
    answer = run("c2c", pair, ask)
    fused = pair.prefill([{"role": "user", "content": "What is it?"}])
    assert same_text(answer.text, str(pair.chat(ask.chat(), do_sample=False, max_new_tokens=NEW)))
    assert answer.bytes_passed == fused.bytes_passed > 0
    assert answer.text != run("receiver", pair, ask).text, "an open fuser must change the answer, or nothing is shown"


BACKGROUND = "In one clear sentence, describe the most essential background knowledge needed to answer the question: "
DO_NOT = " Do NOT directly solve or give answer to the question."
OPTIONS = "Which one?\nA. this\nB. that\nC. both\nD. none"


@pytest.mark.parametrize(
    ("method", "instruction"),
    [
        ("text", f"{BACKGROUND}Which one?{DO_NOT}"),
        ("text-options", f"{BACKGROUND}{OPTIONS}{DO_NOT}"),
        (
            "text-answer",
            "In one clear sentence, describe the most essential background knowledge needed to answer the question, "
            f"and say which answer is right: {OPTIONS}",
        ),
    ],
)
def test_text_to_text_is_two_turns(pair: C2C, method: str, instruction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache2cache.methods.text_to_text.MAX_MESSAGE_TOKENS", 20)
    ask = Ask.of(QUESTION)
    answer = run(method, pair, ask)
    told = {"role": "user", "content": instruction}
    message, message_tokens = stock(pair.sharers[0], [told], 20)
    assert same_text(answer.message, message)
    assert answer.message_tokens == message_tokens
    assert answer.bytes_passed == len(answer.message.encode())
    said = {"role": "assistant", "content": answer.message}
    text, tokens = stock(pair.receiver, [told, said, {"role": "user", "content": ask.prompt}])
    assert same_text(answer.text, text)
    assert answer.new_tokens == tokens


@pytest.mark.parametrize("method", METHODS)
def test_answers_grow_and_the_clock_runs(pair: C2C, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cache2cache.methods.text_to_text.MAX_MESSAGE_TOKENS", 5)
    answers = list(METHODS[method](pair, Ask.of("Is it?"), 4))
    for before, after in pairwise(answers):
        assert after.text.startswith(before.text) and after.message.startswith(before.message)
        assert after.total_s >= before.total_s > 0
        grown = after.new_tokens + after.message_tokens - before.new_tokens - before.message_tokens
        # Each piece is one token, but for the rest of a character that an answer never completed.
        assert grown == 1 or (grown == 0 and (after.text + after.message).rstrip().endswith("\ufffd"))
    last = answers[-1]
    assert 0 < last.first_token_s <= last.total_s
    assert 1 <= last.new_tokens <= 4
    first = next(answer for answer in answers if answer.new_tokens == 1)
    assert first.first_token_s == first.total_s == last.first_token_s, (
        "the clock of the first token includes the message"
    )


@pytest.mark.parametrize("method", METHODS)
def test_nothing_runs_before_its_turn(method: str) -> None:
    METHODS[method](None, Ask.of("Is it?"), 4)  # type: ignore[arg-type]  # would fail if it touched the pair


@pytest.mark.parametrize("method", METHODS)
def test_closing_stops_the_model(pair: C2C, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    run_: Any = METHODS[method](pair, Ask.of("Is it?"), 400)
    next(run_)
    run_.close()
    assert threading.active_count() == threads


def test_prompt_of_ones_own(pair: C2C) -> None:
    put: Callable[[Question], str] = lambda question: f"{question.question}!"  # noqa: E731
    assert Ask.of(QUESTION, prompt=put).prompt == "Which one?!"
    assert Ask.of("Text").chat(("user", "a"), ("assistant", "b")) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
