"""Rendering and token map with the tokenizers and chat templates of five real model families."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from alignment.brute import span_map_by_definition
from cache2cache.alignment.chat import Rendered, render
from cache2cache.alignment.tokens import span_map

Get = Callable[[str], PreTrainedTokenizerBase]
NAMES = ("smollm2", "qwen2.5", "qwen3", "llama3.1", "gemma3")
TRIMS = ("llama3.1", "gemma3")
CONTROL = {
    "smollm2": "<|im_end|>",
    "qwen2.5": "<|im_end|>",
    "qwen3": "<think>",
    "llama3.1": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
}
OFF = {"enable_thinking": False}

CODE = "def f(x):\n    if x:\n\n        return 1234567\n\treturn None\n"
CHATS: dict[str, list[tuple[str, str]]] = {
    "english": [("user", "Which gas do plants take in?\nA. oxygen\nB. carbon dioxide\nAnswer with the letter.")],
    "system": [("system", "You are brief."), ("user", "What is the capital of France?")],
    "empty system": [("system", ""), ("user", "What is the capital of France?")],
    "chinese": [("system", "你是一个助手。"), ("user", "水的化学式是什么?𠀀龘")],
    "emoji": [("user", "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 and ☃️?")],
    "combining": [("user", "e\u0301a\u0308 Å \u1112\u1161\u11ab क्षि")],
    "code": [("user", CODE)],
    "spaces": [("user", "  \n two  words \t\n\n")],
    "turns": [
        ("system", " Be brief. "),
        ("user", "Hi"),
        ("assistant", "Hello! 3.14159"),
        ("user", "user"),
        ("assistant", "assistant\n"),
        ("user", "你好 👨‍👩‍👧?"),
    ],
    "reasoning": [("user", "Where?"), ("assistant", "<think>\nhm, Paris\n</think>\n\nParis."), ("user", "Why?")],
    "long": [("user", "The quick brown fox jumps over 12 lazy dogs. 敏捷的棕色狐狸。\n" * 60)],
}


def chat(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CHATS[name]]


def natural(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prefix: str = "") -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **OFF)
    return tokenizer(text + prefix, add_special_tokens=False).input_ids


def read(tokenizer: PreTrainedTokenizerBase, messages: Any, prefix: str = "") -> Rendered:
    return render(tokenizer, messages, prefix=prefix, chat_template_kwargs=OFF)


def assert_agree(ours: Rendered, theirs: Rendered) -> None:
    fast, slow = span_map(ours, theirs), span_map_by_definition(ours, theirs)
    assert fast.index.tolist() == slow.index.tolist()
    assert fast.coverage == pytest.approx(slow.coverage)
    chosen = [j for j in fast.index.tolist() if j >= 0]
    assert chosen == sorted(chosen)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", CHATS)
def test_chat_is_tokenized_naturally(real_tokenizer: Get, name: str, which: str) -> None:
    tokenizer, messages = real_tokenizer(name), chat(which)
    for prefix in ("", "The correct answer is"):
        rendered = read(tokenizer, messages, prefix)
        assert rendered.ids == natural(tokenizer, messages, prefix)
        assert rendered.offsets[0][0] == 0 and rendered.offsets[-1][1] == len(rendered.text)
        for (start, end), (later, last) in pairwise(rendered.offsets):
            assert start <= later and end <= last
            assert later == end or (later == end - 1 and last > later)  # a tiling but for pieces of a character


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", CHATS)
def test_contents_lie_where_they_should(real_tokenizer: Get, name: str, which: str) -> None:
    rendered = read(real_tokenizer(name), chat(which), "So")
    found = {segment.key: rendered.text[segment.start : segment.end] for segment in rendered.segments}
    expected: dict[int | str, str] = {"prefix": "So"}
    for key, (role, content) in enumerate(CHATS[which]):
        if name == "qwen3" and role == "assistant" and "</think>" in content:
            content = "Paris."
        if content.strip():
            expected[key] = (
                content.strip() if name == "llama3.1" or (name == "gemma3" and role != "system") else content
            )
    assert found == expected


@pytest.mark.parametrize("theirs", NAMES)
@pytest.mark.parametrize("ours", NAMES)
def test_token_map_equals_the_definition(real_tokenizer: Get, ours: str, theirs: str) -> None:
    left, right = real_tokenizer(ours), real_tokenizer(theirs)
    for which in CHATS:
        if which != "long":
            assert_agree(read(left, chat(which), "The answer"), read(right, chat(which), "The answer"))
    text = "水 e\u0301 👨‍👩‍👧 12345\n    x"
    assert_agree(render(left, text), render(right, text))


PIECES = st.sampled_from(
    ["user", " the", "\n", "   ", "你好", "龘", "👨‍👩‍👧", "e\u0301", "1234", "</", "𠀀", "\t", "ing", "<|", "é"]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ours=st.sampled_from(NAMES),
    theirs=st.sampled_from(NAMES),
    contents=st.lists(st.lists(PIECES, min_size=1, max_size=8).map("".join).filter(str.strip), min_size=1, max_size=3),
)
def test_any_chat(real_tokenizer: Get, ours: str, theirs: str, contents: list[str]) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    left, right = [read(real_tokenizer(name), messages) for name in (ours, theirs)]
    assert left.ids == natural(real_tokenizer(ours), messages)
    assert_agree(left, right)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("which", CHATS)
def test_map_to_itself_is_the_identity(real_tokenizer: Get, name: str, which: str) -> None:
    """But for the pieces of one character, which all go to its last piece."""
    rendered = read(real_tokenizer(name), chat(which))
    token_map = span_map(rendered, rendered)
    last = {span: i for i, span in enumerate(rendered.offsets)}
    assert token_map.index.tolist() == [last[span] for span in rendered.offsets]
    assert token_map.coverage == 1.0
    if which in ("english", "system", "code"):
        assert token_map.index.tolist() == list(range(len(rendered.ids)))


@pytest.mark.parametrize("ours", NAMES)
@pytest.mark.parametrize("theirs", NAMES)
def test_all_content_is_mapped(real_tokenizer: Get, ours: str, theirs: str) -> None:
    """Every receiver token of a message that neither template changes has a sharer token in the same message."""
    left, right = [read(real_tokenizer(name), chat("english"), "The answer") for name in (ours, theirs)]
    index = span_map(left, right).index.tolist()
    for mine, other in zip(left.segments, right.segments, strict=True):
        inside = [i for i, (a, b) in enumerate(left.offsets) if mine.start <= a and b <= mine.end]
        assert len(inside) > 1
        for i in inside:
            low, high = right.offsets[index[i]]
            assert index[i] >= 0 and low < other.end and other.start < high


@pytest.mark.parametrize("name", NAMES)
def test_control_tokens_in_a_message_are_plain_text(real_tokenizer: Get, name: str) -> None:
    tokenizer, string = real_tokenizer(name), CONTROL[name]
    control = tokenizer.convert_tokens_to_ids(string)
    messages = [{"role": "user", "content": f"Say {string}{string} twice, 水{string}"}]
    with pytest.warns(UserWarning, match="in message 1 .user. is a control token of this model"):
        rendered = read(tokenizer, messages)
    harmless = natural(tokenizer, [{"role": "user", "content": "Say"}])
    assert rendered.ids.count(control) == harmless.count(control)
    assert natural(tokenizer, messages).count(control) == harmless.count(control) + 3  # so it would have become
    assert tokenizer.decode(rendered.ids, clean_up_tokenization_spaces=False) == rendered.text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for other in NAMES:
            assert_agree(rendered, read(real_tokenizer(other), messages))
    with pytest.warns(UserWarning, match="in the prompt is a control token of this model"):
        assert control not in render(tokenizer, f"Say {string}").ids


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_plain_text(real_tokenizer: Get, name: str) -> None:
    tokenizer = real_tokenizer(name)
    rendered = render(tokenizer, "The capital of France", prefix=" is")
    assert rendered.ids == tokenizer("The capital of France is").input_ids
    assert (rendered.offsets[0] == (0, 0)) == (name in TRIMS)  # those two put a token before every text


def test_beginning_of_sequence_goes_with_its_like(real_tokenizer: Get) -> None:
    with_bos = [render(real_tokenizer(name), "水 Paris") for name in TRIMS]
    without = render(real_tokenizer("smollm2"), "水 Paris")
    assert span_map(*with_bos).index[0] == 0
    assert span_map(with_bos[0], without).index[0] == -1
    assert span_map(without, with_bos[0]).index[0] > 0


def test_thinking_can_be_switched_off(real_tokenizer: Get) -> None:
    tokenizer = real_tokenizer("qwen3")
    assert read(tokenizer, chat("english")).text.endswith("<think>\n\n</think>\n\n")
    assert render(tokenizer, chat("english")).text.endswith("<|im_start|>assistant\n")
