"""Skipping the sharers where the receiver is confident: exactness on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError
from cache2cache.decode import confidence
from cache2cache.kv import ToRead, prefill_prompts
from cache2cache.methods import METHODS, Ask
from cache2cache.pair import FusedCache, PromptIds
from test_fusion import THREE, close, talk, tokens_read
from test_pair import CHATS, OPTIONS, PAIRS, pair_of
from tiny import FAMILIES


def confidences(pair: C2C, chats: Any = CHATS) -> list[float]:
    return pair.prefill(chats, skip=1.0).confidence


def middle(pair: C2C) -> float:
    """A threshold that the most confident of the three chats reaches, and no other."""
    low, high = sorted(confidences(pair))[1:]
    assert high - low > 1e-3
    return (low + high) / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_confidence_is_the_likeliest_tokens_probability(family: str) -> None:
    pair = pair_of(family, "qwen3")
    encoded = [pair.encode(chat) for chat in CHATS]
    stock = [
        pair.receiver.model(torch.tensor([p.receiver])).logits[0, -1].float().softmax(-1).max().item() for p in encoded
    ]
    batch = prefill_prompts(pair.receiver, [p.receiver for p in encoded])
    before = batch.kv.keys.clone()
    assert confidence(pair.receiver, batch) == pytest.approx(stock, abs=1e-5) == confidences(pair)
    assert torch.equal(batch.kv.keys, before) and len({round(c, 3) for c in stock}) == 3


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_a_row_is_the_receivers_or_c2cs(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer)
    skip = middle(pair)
    fused, always, never = (pair.prefill(CHATS, **o) for o in ({"skip": skip}, {"sharer_mask": 0}, {}))
    assert sum(fused.skipped) == 1 and fused.skipped == [c >= skip for c in fused.confidence]
    for row, skipped in enumerate(fused.skipped):
        expected: FusedCache = always if skipped else never
        length = len(pair.encode(CHATS[row]).receiver) - 1
        close(fused.kv.tail(row, length), expected.kv.tail(row, length))
        assert fused.fused_positions[row] == expected.fused_positions[row]
        single = pair.prefill(CHATS[row], skip=skip)
        assert single.skipped == [skipped]
        close(single.kv, fused.kv.tail(row, length))
    answers = [
        pair.chat(chat, sharer_mask=0 if s else 1, **OPTIONS) for chat, s in zip(CHATS, fused.skipped, strict=True)
    ]
    assert pair.chat(CHATS, skip=skip, **OPTIONS) == answers
    for chat, mask in zip(CHATS, (0 if s else 1 for s in fused.skipped), strict=True):
        assert pair.score(chat, [" A"], skip=skip) == pair.score(chat, [" A"], sharer_mask=mask)
        pieces = "".join(chunk.text for chunk in pair.stream(chat, skip=skip, **OPTIONS))
        assert pieces == "".join(chunk.text for chunk in pair.stream(chat, sharer_mask=mask, **OPTIONS))


def test_from_0_all_are_skipped_and_none_without() -> None:
    pair = pair_of("llama", "qwen3")
    every, clean = pair.prefill(CHATS, skip=0.0), pair.prefill(CHATS, sharer_mask=0)
    assert torch.equal(every.kv.keys, clean.kv.keys) and every.skipped == [True] * 3 and every.bytes_passed == 0
    assert torch.equal(pair.generate(CHATS, skip=0.0, **OPTIONS), pair.generate(CHATS, sharer_mask=0, **OPTIONS))
    never = pair.prefill(CHATS)
    assert never.skipped == [False] * 3 and never.confidence == []
    assert pair.prefill(CHATS, skip=max(confidences(pair))).skipped.count(True) == 1  # reaching it is enough


@pytest.mark.usefixtures("in_one_pass")
@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_for_a_skipped_row_no_sharer_reads(mode: str) -> None:
    pair = pair_of(*THREE, mode=mode)
    skip = middle(pair)
    seen = [tokens_read(lm) for lm in pair.sharers]
    fused = pair.prefill(CHATS, skip=skip, sharer_mask=[0b011, 0b011, 0b011])
    rows = [pair.encode(chat) for chat, skipped in zip(CHATS, fused.skipped, strict=True) if not skipped]
    expected = [[2 * max(max(p.maps[j][:-1]) + 1 for p in rows)] for j in range(2)]
    assert seen == [*expected, []]
    close(fused.kv, pair.prefill(CHATS, sharer_mask=[0 if s else 0b011 for s in fused.skipped]).kv)


def test_other_choices_hold_for_the_rows_that_are_left() -> None:
    pair = pair_of("gemma3", "llama")
    skip = middle(pair)
    fused = pair.prefill(CHATS, skip=skip, positions="back:0.5")
    masks = [0 if s else 1 for s in fused.skipped]
    close(fused.kv, pair.prefill(CHATS, sharer_mask=masks, positions="back:0.5").kv)


def test_known_caches_are_skipped_too() -> None:
    """A clean cache and a sharer's that are given stay as they are, and a skipped row of the latter isn't looked at."""
    pair = pair_of("llama", "qwen3")
    skip, encoded = middle(pair), [pair.encode(chat) for chat in CHATS]
    clean = prefill_prompts(pair.receiver, [p.receiver for p in encoded])
    before = clean.kv.keys.clone()
    lengths = [max(p.maps[0][:-1]) + 1 for p in encoded]
    ids = [p.sharers[0][:n] for p, n in zip(encoded, lengths, strict=True)]
    cache = pair._read(0, ToRead(range(3), lengths, ids, [None] * 3, 4, [None] * 3))
    row = pair.prefill(CHATS, skip=skip).skipped.index(True)
    cache.keys[:, row] = cache.values[:, row] = float("nan")
    fused = pair.fuse(encoded, clean=clean, sharers=[(cache, lengths)], skip=skip)
    close(fused.kv, pair.prefill(CHATS, skip=skip).kv)
    assert torch.equal(clean.kv.keys, before)


@pytest.mark.parametrize("skip", [0.0, "middle", 1.0])
def test_later_turns(skip: Any) -> None:
    """Turn by turn equals at once, whichever turns are skipped."""
    pair = pair_of("llama", "qwen3")
    skip = middle(pair) if skip == "middle" else skip
    chats, fused = talk(pair, CHATS, 3, skip=skip)
    at_once = pair.prefill(chats, skip=skip)
    close(fused.kv, at_once.kv)
    assert fused.skipped == at_once.skipped and fused.fused_positions == at_once.fused_positions
    for options in ({"skip": 0.0}, {"skip": None}):
        close(pair.prefill(chats, past=fused, **options).kv, pair.prefill(chats, **options).kv)


def test_a_skipped_turn_loses_nothing_that_was_read() -> None:
    pair = pair_of("qwen3", "qwen2")  # one token a byte on both sides
    chat: list[dict[str, str]] = list(CHATS[1])
    first = pair.prefill(chat, keep=True)
    chat += [{"role": "assistant", "content": "Because."}, {"role": "user", "content": "I see."}]
    second = pair.prefill(chat, past=first, keep=True, skip=0.0)
    chat += [{"role": "assistant", "content": "Good."}, {"role": "user", "content": "Go on."}]
    seen = tokens_read(pair.sharers[0])
    third = pair.prefill(chat, past=second)
    assert seen == [len(pair.encode(chat).sharers[0]) - len(pair.encode(CHATS[1]).sharers[0])]
    close(third.kv, pair.prefill(chat).kv)


def test_token_ids_can_be_skipped() -> None:
    pair = pair_of("qwen3", "qwen2")
    prompt = PromptIds([9, 10, 11], [[9, 10]], [[0, 1, -1]])
    assert pair.prefill(prompt, skip=0.0).skipped == [True]
    assert pair.prefill([7], skip=0.0).skipped == [True]  # a single token, which is never in the cache


@pytest.mark.parametrize("skip", [-0.1, 1.1, float("nan")])
def test_no_probability(skip: float) -> None:
    pair = pair_of("llama", "qwen3")
    seen = tokens_read(pair.receiver)
    with pytest.raises(C2CError, match=r"skip is .*; expected a confidence from 0 \(always skip\) to 1, or None"):
        pair.prefill(CHATS, skip=skip)
    assert seen == []
    with pytest.raises(C2CError, match="skip was given with a fused cache; give it to prefill instead"):
        pair.generate(pair.prefill(CHATS[0]), skip=0.5)


def test_the_method_says_that_it_skipped() -> None:
    pair = pair_of("llama", "qwen3")
    alone, fused, skipped = (
        list(METHODS[m](pair, Ask.of("Why?", skip=s), 5))[-1]
        for m, s in (("receiver", None), ("c2c", None), ("c2c", 0.0))
    )
    assert (skipped.text, skipped.skipped, skipped.bytes_passed) == (alone.text, True, 0)
    assert not fused.skipped and fused.bytes_passed > 0
