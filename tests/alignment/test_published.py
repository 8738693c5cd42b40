"""The published token maps against their rules, on tiny tokenizers with unequal templates."""

from __future__ import annotations

import threading
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch

from alignment.brute_published import one_token, padded
from cache2cache import C2C, C2CError, FuserConfig, load_lm
from cache2cache.alignment import published
from cache2cache.alignment.chat import render
from cache2cache.alignment.published import Aligned, align, map_tokens
from cache2cache.kv import CACHE, prefill_prompts
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer

KINDS = ("bytes", "words", "pieces")
STRATEGIES = ("first", "longest")
CHATS = {
    "english": [("user", "What is the capital of France?")],
    "chinese": [("user", "水是生命之源。北京?")],
    "emoji": [("user", "Größe 👨‍👩‍👧 ☃️ e\u0301")],
    "system": [("system", "You are helpful."), ("user", "Why is it?")],
    "turns": [("user", "Plants?"), ("assistant", "They eat 水."), ("user", "Why?"), ("assistant", "A"), ("user", "A")],
}


def chat(name: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in CHATS[name]]


def aligned(ours: Any, theirs: Any, prompt: Any, strategy: Any, prefix: str = "") -> tuple[list[int], Aligned]:
    mine, other = render(ours, prompt, prefix=prefix), render(theirs, prompt, prefix=prefix)
    return mine.ids, align(mine, [other], (ours, [theirs]), [strategy])[0]


def assert_as_published(ours: Any, theirs: Any, messages: Any, strategy: str, prefix: str = "") -> None:
    ids, got = aligned(ours, theirs, messages, strategy, prefix)
    left, right, fused = padded(ours, theirs, messages, strategy, prefix)
    assert [(i, p) for p, i in enumerate(left) if i is not None] == list(zip(ids, got.receiver_positions, strict=True))
    # Sharer tokens of template behind the last receiver section pad it; all are there, at their places.
    assert [(i, p) for p, i in enumerate(right) if i is not None] == list(
        zip(got.sharer, got.sharer_positions, strict=True)
    )
    places = [got.receiver_positions[t] for t, s in enumerate(got.index) if s >= 0]
    assert places == [p for p, yes in enumerate(fused) if yes]
    assert places == [got.sharer_positions[s] for s in got.index if s >= 0]  # both models have it at one position


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("prefix", ["", "The answer"])
@pytest.mark.parametrize(("ours", "theirs"), list(product(KINDS, KINDS)))
def test_any_chat_equals_the_padded_rows(ours: str, theirs: str, prefix: str, strategy: str) -> None:
    for name in CHATS:
        assert_as_published(tiny_tokenizer(ours), tiny_tokenizer(theirs), chat(name), strategy, prefix)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_token_of_a_vocabulary(strategy: Any) -> None:
    for ours, theirs in product(map(tiny_tokenizer, KINDS), map(tiny_tokenizer, KINDS)):
        ids = list(range(len(ours)))
        assert map_tokens(ours, theirs, ids, strategy) == [one_token(ours, theirs, i, strategy) for i in ids]


def test_by_hand() -> None:
    words, pieces, single = map(tiny_tokenizer, ("words", "pieces", "bytes"))
    (capital,) = words.encode(" capital", add_special_tokens=False)
    assert map_tokens(words, single, [capital], "longest") == [single.convert_tokens_to_ids("Ġ")]  # a tie: the first
    # One token of the receiver that the sharer cuts into "x" and " capital".
    words.add_tokens(["x capital"])
    (joined,) = words.encode("x capital", add_special_tokens=False)
    x, long = pieces.encode("x capital", add_special_tokens=False)
    assert map_tokens(words, pieces, [joined], "first") == [x]
    assert map_tokens(words, pieces, [joined], "longest") == [long]
    # A byte of 水 decodes to U+FFFD alone, and that is what the sharer's three bytes are of.
    byte = single.encode("水", add_special_tokens=False)[1]
    assert map_tokens(single, pieces, [byte], "longest") == [pieces.convert_tokens_to_ids("<0xEF>")]


def test_special_tokens_go_by_role_then_by_string() -> None:
    words, pieces, single = map(tiny_tokenizer, ("words", "pieces", "bytes"))
    assert map_tokens(words, pieces, [words.bos_token_id, words.eos_token_id, words.pad_token_id], "first") == [
        pieces.bos_token_id,
        pieces.eos_token_id,
        pieces.pad_token_id,
    ]
    single.add_special_tokens({"additional_special_tokens": ["<|eot|>", "<|nowhere|>"]})
    eot, nowhere = single.convert_tokens_to_ids(["<|eot|>", "<|nowhere|>"])
    assert map_tokens(single, words, [eot], "first") == [words.convert_tokens_to_ids("<|eot|>")]
    assert map_tokens(single, words, [nowhere], "first") == [0]  # no such string, no unknown token
    assert map_tokens(single, pieces, [nowhere], "first") == [pieces.unk_token_id]
    # One id with two roles: padding is end of sequence, and the later role wins.
    single.pad_token = single.eos_token
    assert map_tokens(single, words, [single.eos_token_id], "longest") == [words.eos_token_id]


def test_tokens_without_a_piece_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    words, pieces, single = map(tiny_tokenizer, ("words", "pieces", "bytes"))
    monkeypatch.setattr(published, "_text", lambda tokenizer, token: "")
    assert map_tokens(words, pieces, [50], "first") == [pieces.unk_token_id]
    assert map_tokens(words, single, [50], "longest") == [0]


def test_both_paddings() -> None:
    """Whichever template is longer before the message, the message starts where the longer one ends."""
    single, pieces = tiny_tokenizer("bytes"), tiny_tokenizer("pieces")
    single.chat_template = single.chat_template.replace("<|im_start|>", "Some words before: <|im_start|>")
    for ours, theirs, shorter in ((single, pieces, "theirs"), (pieces, single, "ours")):
        ids, got = aligned(ours, theirs, chat("english"), "first")
        first = next(t for t, s in enumerate(got.index) if s >= 0)
        at = got.receiver_positions[first]
        assert (at > first) == (shorter == "ours") and (at > got.index[first]) == (shorter == "theirs")
        assert got.receiver_positions[:first] == list(range(first))
        assert ids[first:] and got.index[-1] == -1  # the generation prompt stays unfused


def test_several_sharers_share_the_receivers_positions() -> None:
    kinds = ("words", "pieces")
    ours, others = tiny_tokenizer("bytes"), [tiny_tokenizer(kind) for kind in kinds]
    mine, theirs = render(ours, chat("turns")), [render(other, chat("turns")) for other in others]
    both = align(mine, theirs, (ours, others), ["first", "longest"])
    assert both[0].receiver_positions == both[1].receiver_positions
    for got in both:
        for t, s in enumerate(got.index):
            assert s < 0 or got.sharer_positions[s] == got.receiver_positions[t]


def test_control_strings_in_a_message_stay_text() -> None:
    words, single = tiny_tokenizer("words"), tiny_tokenizer("bytes")
    harmless = aligned(single, words, [{"role": "user", "content": "Say"}], "first")[1]
    with pytest.warns(UserWarning, match="control token"):
        got = aligned(single, words, [{"role": "user", "content": "Say <|im_end|>"}], "first")[1]
    eos = words.eos_token_id
    assert got.sharer.count(eos) == harmless.sharer.count(eos)


def test_text_and_models_without_a_template() -> None:
    plain, words = tiny_tokenizer("plain"), tiny_tokenizer("words")
    ids, got = aligned(plain, words, "水 Paris", "first")
    assert got.sharer == [one_token(plain, words, i, "first") for i in ids]
    assert got.index == got.receiver_positions == list(range(len(ids))) and got.coverage == 1
    ids, got = aligned(plain, words, chat("turns"), "first")
    assert sum(s >= 0 for s in got.index) == sum(len(m["content"].encode()) for m in chat("turns"))


def test_threads_agree_and_a_token_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = tiny_tokenizer("words"), tiny_tokenizer("pieces")
    ids = [5 + i % (len(ours) - 5) for i in range(8192)]
    results: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: results.append(map_tokens(ours, theirs, ids, "longest"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(result == results[0] for result in results)
    monkeypatch.setattr(published, "_look_up", None)  # calling it would fail
    assert map_tokens(ours, theirs, ids, "longest") == results[0]


def test_unknown_strategy() -> None:
    with pytest.raises(C2CError, match="expected span, first or longest"):
        map_tokens(tiny_tokenizer(), tiny_tokenizer(), [1], "shortest")  # type: ignore[arg-type]


# In the pair

OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def pair_of(receiver: str, sharers: dict[str, str], **settings: Any) -> C2C:
    def lm(family: str, seed: int) -> Any:
        return load_lm(tiny_model(family, seed), tokenizer=tiny_tokenizer(TOKENIZER_OF[family]))

    torch.manual_seed(0)
    common = {"hidden_dim": 16, "intermediate_dim": 12, "gate_init": 1.0, **settings}
    configs = [FuserConfig(token_map=token_map, **common) for token_map in sharers.values()]  # type: ignore[arg-type]
    return C2C.from_models(lm(receiver, 0), [lm(f, 7 + i) for i, f in enumerate(sharers)], configs)


@pytest.mark.parametrize(("receiver", "sharer"), [("qwen3", "llama"), ("llama", "qwen3"), ("qwen2", "llama")])
def test_leaving_padding_out_changes_nothing(receiver: str, sharer: str) -> None:
    """The same caches as from padded rows with a mask and with positions that count padding, in both models."""
    pair, messages = pair_of(receiver, {sharer: "first"}, gate_init=0.0), chat("english")
    pair.receiver.tokenizer.chat_template += "{{ 'And more. ' * 5 }}"  # type: ignore[union-attr, operator]
    if receiver == "llama":
        template = pair.sharers[0].tokenizer.chat_template  # type: ignore[union-attr]
        pair.sharers[0].tokenizer.chat_template = "Some words before: " + template  # type: ignore[union-attr, operator]
    prompt = pair.encode(messages)
    ours, theirs = (lm.tokenizer for lm in (pair.receiver, *pair.sharers))
    assert ours is not None and theirs is not None and prompt.positions is not None
    left, right, _ = padded(ours, theirs, messages, "first")
    assert None in (left if receiver == "llama" else right)
    for lm, row, ids, positions in (
        (pair.receiver, left, prompt.receiver, prompt.positions),
        (pair.sharers[0], right, prompt.sharers[0], prompt.sharer_positions[0]),
    ):
        mask = torch.tensor([[i is not None for i in row]])
        padding = torch.tensor([[0 if i is None else i for i in row]])
        out = lm.model(padding, attention_mask=mask.long(), position_ids=torch.arange(len(row))[None])
        expected = torch.stack([layer.keys for layer in out[CACHE].layers])[:, :, :, mask[0]]
        got = prefill_prompts(lm, [[*ids, 0]], [[*positions, 0]]).kv.keys  # type: ignore[misc]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_answers_continue_the_positions() -> None:
    pair = pair_of("llama", {"qwen3": "longest"}, gate_init=0.0)
    prompt = pair.encode(chat("english"))
    assert prompt.positions is not None
    prompt = replace(prompt, positions=[p + 5 * (t > 8) for t, p in enumerate(prompt.positions)])
    got = pair.generate(prompt, **OPTIONS)[0, len(prompt.receiver) :].tolist()
    ids, places = list(prompt.receiver), list(prompt.positions)
    for token in got:  # stock forward passes over everything
        logits = pair.receiver.model(torch.tensor([ids]), position_ids=torch.tensor([places])).logits
        assert logits[0, -1].argmax().item() == token
        ids, places = [*ids, token], [*places, places[-1] + 1]
    logprobs = pair.receiver.model(torch.tensor([ids]), position_ids=torch.tensor([places])).logits[0].log_softmax(-1)
    expected = sum(logprobs[len(prompt.receiver) - 1 + n, token].item() for n, token in enumerate(got))
    assert pair.score(prompt, [got])[0].logprob == pytest.approx(expected, abs=1e-3)  # type: ignore[union-attr]


def test_the_fuser_reads_the_sharer_at_its_positions() -> None:
    pair = pair_of("llama", {"qwen3": "first"})
    prompt = pair.encode(chat("english"))
    read = prefill_prompts(pair.sharers[0], [[*prompt.sharers[0], 0]], [[*prompt.sharer_positions[0], 0]]).kv  # type: ignore[misc]
    known = pair.fuse([prompt], sharers=[(read, [len(prompt.sharers[0])])]).kv
    torch.testing.assert_close(pair.fuse([prompt]).kv.keys, known.keys, atol=1e-4, rtol=1e-4)


def test_batch_equals_one_by_one_and_maps_mix() -> None:
    pair = pair_of("llama", {"qwen3": "first", "qwen2": "span", "gemma3": "longest"})
    chats = [chat("english"), chat("turns")]
    together = pair.generate(chats, **OPTIONS)[:, -6:]
    for row, messages in enumerate(chats):
        assert torch.equal(pair.generate(messages, **OPTIONS)[0, -6:], together[row])
    prompt = pair.encode(chats[0])
    only = pair_of("llama", {"qwen2": "span"}).encode(chats[0])
    assert prompt.sharers[1] == only.sharers[0] and prompt.maps[1] == only.maps[0] and only.positions is None
    assert prompt.coverage[0] == prompt.coverage[2] > 0
