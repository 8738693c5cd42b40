"""Rendering: the tokenizer's natural ids, exact ranges of the contents, control tokens kept out of contents."""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cache2cache.alignment.chat import (
    FROZEN,
    PLAIN_TEMPLATE,
    Rendered,
    answer_ids,
    continuation_ids,
    end_of_turn,
    render,
)
from cache2cache.errors import C2CError
from tiny import spaced_tokenizer, tiny_tokenizer

TINY = {kind: tiny_tokenizer(kind) for kind in ("bytes", "words", "pieces", "plain")}
KINDS = tuple(TINY)
CONTENTS = [
    "What is the capital of France?",
    "水是生命之源。",
    "👨‍👩‍👧‍👦 and 🏳️‍🌈",
    "e\u0301a\u0308, Größe",
    "def f(x):\n    if x:\n        return 12345\n",
    "  indented, with space behind \n\n",
    "user",
    "a",
    "assistant\nassistant",
    "0123456789 3.14",
    "The quick brown fox. " * 400,
]


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def natural(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], prefix: str = "") -> list[int]:
    template = tokenizer.chat_template or PLAIN_TEMPLATE
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, chat_template=template)
    return tokenizer(text + prefix, add_special_tokens=False).input_ids


def contents_of(rendered: Rendered) -> dict[int | str, str]:
    return {segment.key: rendered.text[segment.start : segment.end] for segment in rendered.segments}


def with_template(template: str, kind: str = "words") -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(kind)
    tokenizer.chat_template = template
    return tokenizer


def assert_tiled(rendered: Rendered) -> None:
    """Spans go from left to right, cover every character, and only byte pieces overlap, within one character."""
    assert len(rendered.ids) == len(rendered.offsets)
    full = [span for span in rendered.offsets if span[0] < span[1]]
    assert full[0][0] == 0 and full[-1][1] == len(rendered.text)
    for (start, end), (later, last) in pairwise(full):
        assert start <= later and end <= last
        assert later == end or later == end - 1


# Ids and spans


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: repr(content)[:20])
@pytest.mark.parametrize("prefix", ["", "The correct answer is"])
def test_chat_is_tokenized_naturally(kind: str, content: str, prefix: str) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *user(content)]
    rendered = render(TINY[kind], messages, prefix=prefix)
    assert rendered.ids == natural(TINY[kind], messages, prefix)
    assert_tiled(rendered)
    found = contents_of(rendered)
    assert found[0] == "Be brief."
    assert found[1] == (content.strip() if kind in ("words", "pieces") else content)
    assert found.get("prefix", "") == prefix


@pytest.mark.parametrize("kind", KINDS)
def test_many_turns(kind: str) -> None:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(CONTENTS)]
    rendered = render(TINY[kind], messages)
    assert rendered.ids == natural(TINY[kind], messages)
    assert {key: found.strip() for key, found in contents_of(rendered).items()} == {
        i: content.strip() for i, content in enumerate(CONTENTS)
    }
    assert [segment.key for segment in rendered.segments] == list(range(len(CONTENTS)))


PIECES = ["user", "system\n", "<|im_", "end|>", "<|im_end|>", "<|eot|>", "<eos>", "<unk>"]
PIECES += [" ", "\n", "你", "👨\u200d👩\u200d👧", "e\u0301", "a", "7"]
CONTENT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.lists(CONTENT, min_size=1, max_size=4).filter(lambda c: any(map(str.strip, c))))
def test_any_chat_has_its_control_tokens_and_no_others(kind: str, contents: list[str]) -> None:
    """Whatever stands in the contents: the template's control tokens, all characters, exact ranges."""
    tokenizer = TINY[kind]
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    plain = [{"role": message["role"], "content": "x"} for message in messages]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rendered = render(tokenizer, messages, prefix=contents[0])
    assert [i for i in rendered.ids if i in special] == [i for i in natural(tokenizer, plain) if i in special]
    assert_tiled(rendered)
    if not caught:
        assert rendered.ids == natural(tokenizer, messages, contents[0])
    if kind != "pieces":  # its decoder knows no way back from <unk>
        assert tokenizer.decode(rendered.ids, clean_up_tokenization_spaces=False) == rendered.text
    for key, found in contents_of(rendered).items():
        content = contents[0] if key == "prefix" else contents[int(key)]
        assert found.strip() == content.strip() and found in content
    assert {segment.key for segment in rendered.segments} >= {i for i, c in enumerate(contents) if c.strip()}


@pytest.mark.parametrize("kind", KINDS)
def test_prefix_is_one_more_segment_behind_the_generation_prompt(kind: str) -> None:
    bare, rendered = render(TINY[kind], user("Hi")), render(TINY[kind], user("Hi"), prefix=" So")
    assert rendered.text == bare.text + " So"
    last = rendered.segments[-1]
    assert (last.key, last.start, last.end) == ("prefix", len(bare.text), len(rendered.text))


def test_plain_text_gets_the_tokenizers_own_special_tokens() -> None:
    tokenizer = tiny_tokenizer("words")
    bos, eot = tokenizer.convert_tokens_to_ids(["<|bos|>", "<|eot|>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A <|eot|>", special_tokens=[("<|bos|>", bos), ("<|eot|>", eot)]
    )
    rendered = render(tokenizer, "The answer", prefix=" is")
    assert rendered.ids == tokenizer("The answer is").input_ids
    assert (rendered.ids[0], rendered.ids[-1]) == (bos, eot)
    assert (rendered.offsets[0], rendered.offsets[-1]) == ((0, 0), (13, 13))
    assert contents_of(rendered) == {0: "The answer", "prefix": " is"}
    with pytest.warns(UserWarning, match=r"'<\|eot\|>' in the prompt is a control token"):
        guarded = render(tokenizer, "The<|eot|> answer")
    assert (guarded.ids[0], guarded.ids[-1]) == (bos, eot)
    assert not {bos, eot} & set(guarded.ids[1:-1])
    assert tokenizer.decode(guarded.ids[1:-1]) == "The<|eot|> answer"
    assert (guarded.offsets[0], guarded.offsets[-1]) == ((0, 0), (17, 17))
    assert_tiled(guarded)


def test_trimmed_spaces_belong_to_their_token() -> None:
    """Some byte-level tokenizers report spans without the spaces at their ends."""
    merges = [("Ġ", "x"), ("Ċ", "Ġ"), ("ĊĠ", "Ġ")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    rendered = render(tokenizer, "a\n   x  x ")
    pieces = tokenizer.convert_ids_to_tokens(rendered.ids)
    assert pieces == ["a", "ĊĠĠ", "Ġx", "Ġ", "Ġx", "Ġ"]
    assert rendered.offsets == [(0, 1), (1, 4), (4, 6), (6, 7), (7, 9), (9, 10)]
    assert tokenizer("a\n   x", return_offsets_mapping=True).offset_mapping != rendered.offsets[:3]  # trimmed indeed


def test_joined_and_dropped_characters_belong_to_a_token() -> None:
    """A normalizer that joins "e" and its accent, a pre-tokenizer that drops spaces."""
    core = Tokenizer(models.WordLevel({"é": 0, "a": 1, "?": 2}, unk_token="?"))
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rendered = render(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?"), " e\u0301  a \n")
    assert rendered.ids == [0, 1]
    assert rendered.offsets == [(0, 3), (3, 8)]


# Templates


def test_system_message_is_folded_into_the_first_user_message() -> None:
    tokenizer = with_template(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    system = {"role": "system", "content": "Be brief."}
    rendered = render(tokenizer, [system, *user("Hi")])
    assert rendered.text == "[user]Be brief.\n\nHi[assistant]"
    assert contents_of(rendered) == {0: "Be brief.", 1: "Hi"}
    answer = {"role": "assistant", "content": "Hi"}
    assert render(tokenizer, [system, answer]).text == "[user]Be brief.[assistant]Hi[assistant]"
    with pytest.raises(C2CError, match=r"roles user, system: no system role"):
        render(tokenizer, [*user("Hi"), system])


def test_default_system_message_is_no_content() -> None:
    tokenizer = with_template(
        "{% if messages[0].role != 'system' %}[system]You answer: Hi{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    rendered = render(tokenizer, user("Hi"))
    assert rendered.text == "[system]You answer: Hi[user]Hi[assistant]"
    assert (rendered.segments[0].start, len(rendered.segments)) == (28, 1)  # not the "Hi" of the default message
    empty = render(tokenizer, [{"role": "system", "content": ""}, *user("Hi")])
    assert empty.text == "[system][user]Hi[assistant]"
    assert contents_of(empty) == {1: "Hi"}


DROPS_THOUGHTS = (
    "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}{% endfor %}[assistant]"
)


def test_earlier_reasoning_that_the_template_drops() -> None:
    tokenizer = with_template(DROPS_THOUGHTS)
    answer = {"role": "assistant", "content": "<think>\nParis? Paris.\n</think>\n\nParis."}
    rendered = render(tokenizer, [*user("Where?"), answer, *user("Why?")])
    assert contents_of(rendered) == {0: "Where?", 1: "Paris.", 2: "Why?"}
    assert rendered.text[rendered.segments[1].start - 1] == "\n"  # the template's, not the content's
    only_thoughts = {"role": "assistant", "content": "<think>hm</think>"}
    rendered = render(tokenizer, [*user("Where?"), only_thoughts, *user("Why?")])
    assert contents_of(rendered) == {0: "Where?", 2: "Why?"}


@pytest.mark.filterwarnings("error")
def test_control_token_that_the_template_drops_is_none_to_warn_of() -> None:
    answer = {"role": "assistant", "content": "<think>a<|eot|></think>b"}
    rendered = render(with_template(DROPS_THOUGHTS), [*user("Where?"), answer, *user("Why?")])
    assert contents_of(rendered) == {0: "Where?", 1: "b", 2: "Why?"}


def test_line_breaks_are_not_taken_from_the_message_before() -> None:
    tokenizer = TINY["pieces"]
    rendered = render(tokenizer, [{"role": "system", "content": "a\n\n\n"}, *user("\n\n\n\nb")])
    assert rendered.text.startswith("<bos><start_of_turn>user\na\n\n\n\n\nb<end_of_turn>")
    assert contents_of(rendered)[0] == "a\n\n\n"
    first, second = rendered.segments
    assert first.end <= second.start


def test_moved_message_is_found() -> None:
    tokenizer = with_template(
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{% if loop.last and messages[0].role == 'system' %}"
        "{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]{% elif m.role == 'assistant' %}"
        "{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    rendered = render(
        tokenizer,
        [{"role": "system", "content": "INST"}, *user("a"), {"role": "assistant", "content": "s"}, *user("a")],
    )
    assert rendered.text == "[INST]a[/INST]s</s>[INST]INST\n\na[/INST]"
    assert [(s.start, s.end, s.key) for s in rendered.segments] == [(6, 7, 1), (14, 15, 2), (25, 29, 0), (31, 32, 3)]


def test_template_that_looks_at_contents() -> None:
    """A marker may hide what the template looks for; another place of the marker shows the content all the same."""
    tokenizer = with_template(
        "{% for m in messages %}{% if m.content.startswith('<tool>') %}[result]{% elif m.content.endswith('</tool>') %}"
        "[end]{% else %}[user]{% endif %}{{ m.content }}{% endfor %}[assistant]"
    )
    for content in ("<tool>a", "a</tool>", "<tool>a</tool>"):
        rendered = render(tokenizer, [*user(content), *user("Hi")])
        assert contents_of(rendered) == {0: content, 1: "Hi"}
    hidden = render(tokenizer, [*user("<tool>"), *user("Hi")])  # no place is free, but the other message is found
    assert hidden.text == "[result]<tool>[user]Hi[assistant]"
    assert contents_of(hidden) == {1: "Hi"}


def test_contents_that_can_not_be_located_have_no_segment() -> None:
    tokenizer = with_template("{% for m in messages %}[{{ m.content | length }}: {{ m.content | upper }}]{% endfor %}")
    rendered = render(tokenizer, user("length"))
    assert (rendered.text, rendered.segments) == ("[6: LENGTH]", [])
    twice = with_template("{{ messages[0].content }}|{{ messages[0].content }}")
    assert render(twice, user("which")).segments == []
    rewriting = with_template("{{ messages[0].content | upper }}")
    assert contents_of(render(rewriting, user("aBCd"))) == {0: "BC"}  # what agrees around the marker, never more


def test_markers_are_not_taken_from_the_text() -> None:
    content = "".join(map(chr, range(0xF0000, 0xF0010)))
    assert contents_of(render(TINY["bytes"], user(content))) == {0: content}


def test_without_a_template_the_built_in_one_is_used() -> None:
    messages = [*user("Hi"), {"role": "assistant", "content": "Hello"}, *user("Bye")]
    rendered = render(TINY["plain"], messages)
    assert rendered.text == "User:\nHi\n\nAssistant:\nHello\n\nUser:\nBye\n\nAssistant:\n"
    with_bos = tiny_tokenizer("words")
    with_bos.chat_template = None
    assert render(with_bos, user("Hi")).text == "<|bos|>User:\nHi\n\nAssistant:\n"
    assert render(with_bos, user("Hi")).ids[:1] == [with_bos.bos_token_id]


def test_chat_template_kwargs_reach_the_template() -> None:
    tokenizer = with_template("{{ messages[0].content }}{% if think %}<think>{% endif %}")
    assert render(tokenizer, user("Hi"), chat_template_kwargs={"think": True}).text == "Hi<think>"
    assert render(tokenizer, user("Hi"), chat_template_kwargs={"think": False}).text == "Hi"
    given_template = {"chat_template": "[{{ messages[0].content }}]"}
    assert render(tokenizer, user("Hi"), chat_template_kwargs=given_template).text == "[Hi]"
    with pytest.raises(C2CError, match="add_generation_prompt"):
        render(tokenizer, user("Hi"), chat_template_kwargs={"add_generation_prompt": False})


# The date


DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = 'none' %}{%- endif %}"
    '{%- endif %}Today: {{ date_string }}, {{ strftime_now("%Y") }}\n'
    "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
)


def test_what_is_measured_has_one_date() -> None:
    """As Llama 3.2's template writes the current one, a store made yesterday would hold other prompts."""
    for template in (DATED, "\n" + DATED):
        tokenizer = with_template(template)
        now = render(tokenizer, user("Hi"), chat_template_kwargs={"date_string": "30 Nov 2026"}).text
        frozen = render(tokenizer, user("Hi"), chat_template_kwargs=FROZEN).text
        assert "26 Jul 2024, 2024\n" in frozen and "30 Nov 2026, 20" in now
        assert frozen[: frozen.index("T")] == now[: now.index("T")]
        asked = render(tokenizer, user("Hi"), chat_template_kwargs={"today": "2031-05-01"})
        assert "01 May 2031, 2031\n" in asked.text and contents_of(asked) == {0: "Hi"}
    pieces = with_template("{% set form = '%d' + '/%m' %}{{ strftime_now(form) }}{{ messages[0]['content'] }}")
    assert render(pieces, user("Hi"), chat_template_kwargs=FROZEN).text == "2024-07-26Hi"
    assert render(TINY["words"], user("Hi"), chat_template_kwargs=FROZEN) == render(TINY["words"], user("Hi"))
    for wrong in ("today", 5, "2031-13-01"):
        with pytest.raises(C2CError, match="expected a date such as 2024-07-26"):
            render(tokenizer, user("Hi"), chat_template_kwargs={"today": wrong})


# Answers

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPACED = ("prepend", "first", "always")
ANSWERS = ["The capital is Paris.", "A", "水是生命之源。", "def f(x):\n    return x\n", "e\u0301, 12345", "Yes <b> no"]


@pytest.mark.parametrize("template", [LLAMA2, ZEPHYR, None], ids=["llama2", "zephyr", "none"])
@pytest.mark.parametrize("kind", SPACED)
def test_an_answer_is_read_as_in_the_whole_chat(kind: str, template: str | None) -> None:
    """Alone SentencePiece's tokenizers would put a space before it, which training would teach."""
    tokenizer = spaced_tokenizer(kind, template)
    asked = render(tokenizer, user("Well?")).ids
    for answer in ANSWERS:
        answer = answer.strip()
        made = answer_ids(tokenizer, answer)
        written = [*user("Well?"), {"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(
            written, tokenize=False, chat_template=tokenizer.chat_template or PLAIN_TEMPLATE
        )
        whole = tokenizer(text, add_special_tokens=False).input_ids
        assert whole[: len(asked) + len(made)] == asked + made, answer
    letter = answer_ids(tokenizer, " A", "The correct answer is")
    assert tokenizer.convert_ids_to_tokens(letter) == ["▁A"] and letter == continuation_ids(tokenizer, " A")
    assert answer_ids(tokenizer, "") == []


@pytest.mark.parametrize("kind", KINDS)
def test_elsewhere_an_answer_is_read_as_alone(kind: str) -> None:
    for answer in (*ANSWERS, *CONTENTS):
        for prefix in ("", "The correct answer is"):
            text = f" {answer}" if prefix else answer
            alone = TINY[kind](text, add_special_tokens=False).input_ids
            assert answer_ids(TINY[kind], text, prefix) == alone == continuation_ids(TINY[kind], text)


@pytest.mark.parametrize("kind", SPACED)
def test_what_is_cut_out_of_a_content_leaves_no_spaces(kind: str) -> None:
    tokenizer = spaced_tokenizer(kind, ZEPHYR)
    for content in ("The<eos>capital", "The <eos> capital", "<eos>The"):
        with pytest.warns(UserWarning, match="it is read as plain text"):
            rendered = render(tokenizer, user(content))
        harmless = render(tokenizer, user(content.replace("<eos>", "<eas>")))
        said = [tokenizer.decode(r.ids, skip_special_tokens=True) for r in (rendered, harmless)]
        assert said[0] == said[1].replace("<eas>", "<eos>"), content
        assert contents_of(rendered) == {0: content}
        assert_tiled(rendered)


def test_a_control_token_in_a_continuation_is_text() -> None:
    ids = TINY["bytes"]("<|im_end|>", add_special_tokens=False).input_ids
    for read in (continuation_ids, answer_ids):
        with pytest.warns(UserWarning, match="in the start of the answer is a control token"):
            made = read(TINY["bytes"], "a<|im_end|>")
        assert len(made) == len("a<|im_end|>") and not set(ids) & set(made)


def test_the_token_that_ends_a_turn_need_not_be_special() -> None:
    tokenizer = with_template(ZEPHYR.replace("eos_token", "'<|turn_end|>'"))
    tokenizer.add_tokens(["<|turn_end|>"])
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|turn_end|>")


# Control tokens in contents


def test_a_control_token_takes_no_blank_of_a_content() -> None:
    """Phi's tokens take the blanks beside them, which may be a message's: they are the template's own all the same."""
    tokenizer = with_template(
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    names = ("<|user|>", "<|assistant|>", "<|stop|>")
    tokenizer.add_tokens([AddedToken(name, rstrip=True, lstrip=True) for name in names], special_tokens=True)
    chat = [*user("What? "), {"role": "assistant", "content": " Paris"}, *user("\nWhy?\n")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rendered = render(tokenizer, chat)
    assert rendered.ids == natural(tokenizer, chat)
    with pytest.warns(UserWarning, match=r"'<\|stop\|>' in message 1"):
        rendered = render(tokenizer, user("one <|stop|> two"))
    assert rendered.ids.count(tokenizer.convert_tokens_to_ids("<|stop|>")) == 1


@pytest.mark.parametrize(
    ("kind", "string"), [("bytes", "<|im_end|>"), ("words", "<|eot|>"), ("pieces", "<end_of_turn>")]
)
def test_control_token_in_a_message_is_plain_text(kind: str, string: str) -> None:
    tokenizer = TINY[kind]
    control = tokenizer.convert_tokens_to_ids(string)
    messages = [*user("Hi"), {"role": "assistant", "content": "Hello"}, *user(f"The {string}{string} capital {string}")]
    with pytest.warns(UserWarning, match="in message 3 .user. is a control token of this model; it is read as plain"):
        rendered = render(tokenizer, messages)
    harmless = natural(tokenizer, [*messages[:2], *user("The")])
    assert rendered.ids.count(control) == harmless.count(control)
    # Around the string, everything is as it would be next to a control token.
    (start, end) = next((s.start, s.end) for s in rendered.segments if s.key == 2)
    inside = [i for i, (a, b) in zip(rendered.ids, rendered.offsets, strict=True) if start <= a and b <= end]
    word = tokenizer(" capital ", add_special_tokens=False).input_ids
    assert any(inside[i : i + len(word)] == word for i in range(len(inside)))
    assert_tiled(rendered)


def test_control_token_that_shows_only_once_another_is_taken_out() -> None:
    tokenizer = tiny_tokenizer("words")
    tokenizer.add_tokens([AddedToken("END"), AddedToken("foo", single_word=True)], special_tokens=True)
    end, foo = tokenizer.convert_tokens_to_ids(["END", "foo"])
    assert foo not in tokenizer("a ENDfoo").input_ids and end in tokenizer("a ENDfoo").input_ids
    with pytest.warns(UserWarning, match="'foo' in message 1"):
        rendered = render(tokenizer, user("a ENDfoo"))
    assert not {end, foo} & set(rendered.ids)
    assert "a ENDfoo" in tokenizer.decode(rendered.ids)
    assert_tiled(rendered)


def test_control_token_in_the_start_of_the_answer() -> None:
    with pytest.warns(UserWarning, match="in the start of the answer"):
        rendered = render(TINY["bytes"], user("Hi"), prefix="So<|im_end|>")
    assert rendered.ids[: len(natural(TINY["bytes"], user("Hi")))] == natural(TINY["bytes"], user("Hi"))
    assert rendered.ids.count(TINY["bytes"].convert_tokens_to_ids("<|im_end|>")) == 1


def thinking() -> PreTrainedTokenizerFast:
    """<think> is an added token that is not special, but the template writes it; <b> is another that it does not."""
    tokenizer = with_template("{% for m in messages %}<|start|>{{ m.content }}<|eot|>{% endfor %}<think>\n")
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<b>", normalized=False)])
    return tokenizer


def test_added_tokens_of_the_template_are_control_tokens_in_what_the_model_is_told() -> None:
    tokenizer = thinking()
    think = tokenizer.convert_tokens_to_ids("<think>")
    with pytest.warns(UserWarning, match="'<think>' in message 1"):
        assert render(tokenizer, user("a<think>b")).ids.count(think) == 1
    with pytest.warns(UserWarning, match="'<think>' in the prompt"):
        assert render(tokenizer, "a<think>b").ids.count(think) == 0


def test_what_becomes_a_control_token_later_is_one() -> None:
    tokenizer = thinking()
    assert tokenizer.convert_tokens_to_ids("<b>") in render(tokenizer, user("a<b>c")).ids
    tokenizer.add_special_tokens({"additional_special_tokens": ["<b>"]})
    with pytest.warns(UserWarning, match="'<b>' in message 1"):
        assert tokenizer.convert_tokens_to_ids("<b>") not in render(tokenizer, user("a<b>c")).ids
    tokenizer.add_tokens([AddedToken("<new>", normalized=False, special=True)])
    with pytest.warns(UserWarning, match="'<new>' in message 1"):
        assert tokenizer.convert_tokens_to_ids("<new>") not in render(tokenizer, user("a<new>c")).ids


@pytest.mark.filterwarnings("error")
def test_added_tokens_in_a_models_own_words_stay() -> None:
    tokenizer = thinking()
    think = tokenizer.convert_tokens_to_ids("<think>")
    messages = [*user("a<b>c"), {"role": "assistant", "content": "<think>b"}, *user("d")]
    rendered = render(tokenizer, messages, prefix="<think>")
    assert rendered.ids == natural(tokenizer, messages, "<think>")
    assert rendered.ids.count(think) == 3
    assert rendered.ids.count(tokenizer.convert_tokens_to_ids("<b>")) == 1


def test_unlocated_control_token_is_warned_of() -> None:
    tokenizer = with_template("{{ messages[0].content }}|{{ messages[0].content }}")
    with pytest.warns(UserWarning, match=r"'<\|eot\|>' in message 1 \(user\) is a control token.*may be read as one"):
        render(tokenizer, user("a<|eot|>"))


@pytest.mark.filterwarnings("error")
def test_unknown_words_are_no_control_tokens() -> None:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "[END]": 1, "hi": 2, "there": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="[END]")
    assert render(tokenizer, "hi stranger there").ids == [2, 0, 3]
    with pytest.warns(UserWarning, match=r"\[END\]"):  # a word of the vocabulary, so cut in two, both unknown
        assert render(tokenizer, "hi [END] there").ids == [2, 0, 0, 3]


def test_control_token_that_can_not_be_read_as_text_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "§": 1, "hi": 2}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", eos_token="§")
    with pytest.warns(UserWarning), pytest.raises(C2CError, match="'§' as anything but a control token"):
        render(tokenizer, "hi § hi")


def test_shared_tokenizer_is_left_alone_by_threads() -> None:
    tokenizer = tiny_tokenizer("words")
    before = tokenizer.backend_tokenizer.to_str()
    prompts = [user(f"The <|eot|> capital {i}" if i % 2 else f"The capital {i}") for i in range(64)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [render(tokenizer, prompt) for prompt in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda prompt: render(tokenizer, prompt), prompts))
    assert together == alone
    assert tokenizer.backend_tokenizer.to_str() == before


# Bad input


class _Slow:
    is_fast = False


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        (user(""), "the prompt is empty"),
        ([{"role": "system", "content": " \n"}, *user("")], "the prompt is empty"),
        (user("Hi")[0], "a list of messages, not dict"),
        (3, "not int"),
        (["Hi"], "message 1 is str"),
        ([*user("Hi"), {"role": "user"}], "message 2 has role; expected exactly role and content"),
        ([{}], "message 1 has nothing"),
        ([{"role": "user", "content": "Hi", "name": "Al"}], "has role, content, name"),
        ([{"role": "user", "content": None}], "the content of message 1 is NoneType"),
        ([{"role": 3, "content": "Hi"}], "the role of message 1 is int"),
    ],
)
def test_bad_prompts(prompt: Any, message: str) -> None:
    with pytest.raises(C2CError, match=message) as caught:
        render(TINY["bytes"], prompt)
    assert "\n" not in str(caught.value)


def test_text_without_tokens_is_refused() -> None:
    core = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(C2CError, match="gives no tokens"):
        render(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?"), "  ")


def test_slow_tokenizer_is_refused() -> None:
    with pytest.raises(C2CError, match=r"_Slow is a slow tokenizer.*fast tokenizer"):
        render(_Slow(), "Hi")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ raise_exception('one line\nand another') }}{% endfor %}",
        "{{ messages[7].content + 1 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_refusal_of_a_template_is_one_line(template: str) -> None:
    with pytest.raises(C2CError, match="the model's chat template refused messages of the roles user: ") as caught:
        render(with_template(template), user("Hi"))
    assert "\n" not in str(caught.value)
