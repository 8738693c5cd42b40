"""The published token maps with real tokenizers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerBase

from alignment.brute_published import one_token, padded
from cache2cache.alignment.chat import render
from cache2cache.alignment.published import align, map_tokens

NAMES = ("smollm2", "qwen2.5", "qwen3", "llama3.1", "gemma3")
OFF = {"enable_thinking": False}
CHAT = [
    {"role": "user", "content": "Which gas do plants take in? 水的化学式是什么?𠀀龘 👨‍👩‍👧 12345\n    x"},
    {"role": "assistant", "content": "Carbon dioxide."},
    {"role": "user", "content": "Why so?"},
]


@pytest.mark.parametrize("ours", NAMES)
@pytest.mark.parametrize("theirs", NAMES)
def test_a_chat_equals_the_padded_rows(
    real_tokenizer: Callable[[str], PreTrainedTokenizerBase], ours: str, theirs: str
) -> None:
    left, right = real_tokenizer(ours), real_tokenizer(theirs)
    for prefix in ("", "The correct answer is"):
        mine, other = (render(t, CHAT, prefix=prefix, chat_template_kwargs=OFF) for t in (left, right))
        for strategy in ("first", "longest"):
            got = align(mine, [other], (left, [right]), [strategy])[0]  # type: ignore[list-item]
            rows = padded(left, right, CHAT, strategy, prefix, **OFF)
            for row, ids, positions in (
                (rows[0], mine.ids, got.receiver_positions),
                (rows[1], got.sharer, got.sharer_positions),
            ):
                kept = [(i, p) for p, i in enumerate(row) if i is not None]
                assert kept == list(zip(ids, positions, strict=True))
            places = [got.receiver_positions[t] for t, s in enumerate(got.index) if s >= 0]
            assert places == [p for p, yes in enumerate(rows[2]) if yes]


@pytest.mark.parametrize(("ours", "theirs"), [("smollm2", "qwen2.5"), ("qwen2.5", "smollm2")])
def test_8192_tokens(real_tokenizer: Callable[[str], PreTrainedTokenizerBase], ours: str, theirs: str) -> None:
    left, right = real_tokenizer(ours), real_tokenizer(theirs)
    ids = list(range(20, 20 + 8192))
    found = map_tokens(left, right, ids, "longest")
    assert found[:300] == [one_token(left, right, i, "longest") for i in ids[:300]]
