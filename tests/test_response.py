"""Response fusion on tiny models: against a slow reference, and exactness of everything that decoding promises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessorList

from cache2cache import C2C, C2CError, FuserConfig
from cache2cache.alignment.chat import render
from cache2cache.config import TrainConfig
from cache2cache.kv import CACHE, KV
from cache2cache.models import LM
from test_fusion import THREE, close, some, tokens_read
from test_pair import CHATS, OPTIONS, PAIRS, alike, alone, lm_of, pair_of
from tiny import spaced_tokenizer, tiny_model

TEXT = "best 水, öß A"
PLAIN = [
    CHATS[0],
    CHATS[2],
    [{"role": "user", "content": "水是生命之源。 What is water?"}],
]  # every template takes these
GROUPS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    *((pair, {}) for pair in PAIRS),
    (("gemma3", "llama"), {"key_space": "unrotated"}),
    (THREE, {"mode": "parallel"}),
    (THREE, {"mode": "sequential"}),
]


def ids_of(lm: LM, text: str) -> list[int]:
    return list(lm.need_tokenizer()(text, add_special_tokens=False)["input_ids"])


def stacked(cache: Any) -> KV:
    return KV(torch.stack([layer.keys for layer in cache.layers]), torch.stack([x.values for x in cache.layers]))


def forced(pair: C2C, prompts: Any, scripts: list[list[int]], **options: Any) -> tuple[list[Tensor], KV]:
    """The raw logits (n, V) of each row while the answers are made to be these, and the cache then."""
    steps, start = max(map(len, scripts)), 0

    def force(ids: Tensor, scores: Tensor) -> Tensor:
        nonlocal start
        start = start or ids.shape[1]
        scores = torch.full_like(scores, -float("inf"))
        for row, script in enumerate(scripts):
            scores[row, script[min(ids.shape[1] - start, len(script) - 1)]] = 0
        return scores

    out = pair.generate(
        prompts,
        logits_processor=LogitsProcessorList([force]),
        output_logits=True,
        return_dict_in_generate=True,
        **{"fuse_response": True, **OPTIONS, "max_new_tokens": steps, **options},
    )
    logits = torch.stack(out.logits, 1)
    return [row[: len(script)] for row, script in zip(logits, scripts, strict=True)], stacked(out[CACHE])


def read_all(lm: LM, ids: list[int]) -> KV:
    cache = DynamicCache()
    lm.model(torch.tensor([ids]), **{CACHE: cache})
    return KV.from_cache(cache)


def partner(lm: LM, chat: Any, before: str, text: str) -> tuple[list[int], int]:
    """A sharer's tokens of a chat with an answer, and which covers most of what the answer has behind `before`."""
    rendered = render(lm.need_tokenizer(), chat, prefix=text)
    start, end = len(rendered.text) - len(text) + len(before), len(rendered.text)
    covers = [min(end, b) - max(start, a) for a, b in rendered.offsets]
    return rendered.ids, max(i for i, n in enumerate(covers) if n == max(covers))


def next_logits(lm: LM, token: int, fused: KV) -> Tensor:
    """Logits behind a token that reads a cache in which its own position stands already, and not itself."""
    length = fused.length
    hidden = torch.zeros(1, 1, 1, length + 1)
    hidden[..., length] = -float("inf")
    mask: Any = hidden
    if window := getattr(lm.text_config, "sliding_window", None):
        sliding = hidden.clone()
        sliding[..., : max(0, length - window)] = -float("inf")
        mask = {"full_attention": hidden, "sliding_attention": sliding}
    place = torch.tensor([[length - 1]])
    cache = fused.to_cache()
    return lm.model(torch.tensor([[token]]), attention_mask=mask, position_ids=place, **{CACHE: cache}).logits[0, 0]


def reference(pair: C2C, chat: Any, script: list[int]) -> tuple[Tensor, KV]:
    """What `forced` gives, read from scratch at every step."""
    prompt, kv = pair.encode(chat), pair.prefill(chat).kv
    tokenizer, text, logits = pair.receiver.need_tokenizer(), "", []
    for n in range(len(script)):
        ids = [*prompt.receiver, *script[:n]]
        at = len(ids) - 1
        clean = fused = read_all(pair.receiver, ids)
        before, after = text, str(tokenizer.decode(script[:n])).rstrip("\ufffd")
        text = max(before, after, key=len)
        for j, (sharer, fuser) in enumerate(zip(pair.sharers, pair.fusers, strict=True)):
            theirs, s = prompt.sharers[j], prompt.maps[j][-1] if n == 0 else -1
            if text != before:
                theirs, s = partner(sharer, chat, before, text)
            if s < 0:
                continue
            where = torch.tensor([[0], [at], [0], [s], [at], [s]])
            source = clean if pair.mode == "parallel" else fused
            changed = fuser(source, read_all(sharer, list(theirs)), where)
            fused = KV(fused.keys + changed.keys - source.keys, fused.values + changed.values - source.values)
        last = (torch.cat([a, b[..., -1:, :]], 3) for a, b in ((kv.keys, fused.keys), (kv.values, fused.values)))
        kv = KV(*last)
        logits.append(next_logits(pair.receiver, ids[-1], kv))
    return torch.stack(logits), kv


@pytest.mark.parametrize(("families", "settings"), GROUPS)
def test_the_slow_reference(families: tuple[str, ...], settings: dict[str, Any]) -> None:
    pair = pair_of(*families, **settings)
    script = ids_of(pair.receiver, TEXT)
    (logits,), kv = forced(pair, CHATS[0], [script])
    expected, cache = reference(pair, CHATS[0], script)
    close(kv, cache)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    (plain,), _ = forced(pair, CHATS[0], [script], fuse_response=False)
    assert not torch.allclose(logits[1:], plain[1:], atol=1e-2)  # and it matters


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_closed_gates_are_the_receiver(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer, gate_init=0.0)
    for chat in PLAIN[1:]:
        assert torch.equal(pair.generate(chat, fuse_response=True, **OPTIONS), alone(pair.receiver, chat))


@pytest.mark.parametrize(("families", "settings"), [GROUPS[0], GROUPS[3], GROUPS[5], GROUPS[6]])
def test_batch_equals_one_by_one(families: tuple[str, ...], settings: dict[str, Any]) -> None:
    pair = pair_of(*families, **settings)
    scripts = [ids_of(pair.receiver, text)[:12] for text in (TEXT, "It boils", "水 水")]
    masks = [(1 << len(pair.sharers)) - 1, 0b1, 0b10 if len(pair.sharers) > 1 else 0b1]
    together, cache = forced(pair, PLAIN, scripts, sharer_mask=masks)
    for row, (chat, script, mask) in enumerate(zip(PLAIN, scripts, masks, strict=True)):
        single = some(pair, *(i for i in range(len(pair.sharers)) if mask >> i & 1))
        (logits,), kv = forced(single, chat, [script])
        torch.testing.assert_close(together[row], logits, atol=1e-3, rtol=1e-3)
        ahead = max(map(len, scripts)) - len(script)  # what the row goes on with when its script has ended
        whole = cache.tail(row, kv.length + ahead)
        close(KV(whole.keys[..., : kv.length, :], whole.values[..., : kv.length, :]), kv)


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_stream_equals_generate(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer)
    for chat in PLAIN[2:]:
        fused = pair.prefill(chat, keep=True)
        tokens = [c.token for c in pair.stream(fused, fuse_response=True, **OPTIONS)]
        expected = pair.generate(chat, fuse_response=True, **OPTIONS)[0, fused.input_ids.shape[1] :].tolist()
        assert [t for t in tokens if t is not None] == expected
        again = pair.generate(fused, fuse_response=True, **OPTIONS)  # the fused cache is as it was
        assert again[0, fused.input_ids.shape[1] :].tolist() == expected


def test_a_later_token_changes_no_earlier_position() -> None:
    pair = pair_of("qwen3", "llama")
    # "best" is a token of the sharer, "bes" several: what the sharer reads for the later bytes is cut anew.
    one, other = (ids_of(pair.receiver, text) for text in ("The best", "The besx"))
    assert (
        partner(pair.sharers[0], CHATS[0], "", "The best")[0][:-1]
        != partner(pair.sharers[0], CHATS[0], "", "The bes")[0]
    )
    (_, a), (_, b) = (forced(pair, CHATS[0], [script]) for script in (one, other))
    _, short = forced(pair, CHATS[0], [one[:5]])
    for kv in (a, b):
        close(KV(kv.keys[..., : short.length, :], kv.values[..., : short.length, :]), short)


def test_pieces_of_a_character_stay_clean_until_it_is_complete() -> None:
    pair = pair_of("qwen3", "llama")
    script = ids_of(pair.receiver, "a水 b")
    assert len(script) == 6  # one token a byte
    _, kv = forced(pair, CHATS[0], [[*script, script[0]]])
    prompt = pair.encode(CHATS[0]).receiver
    clean = read_all(pair.receiver, [*prompt, *script])
    same = [torch.allclose(kv.keys[..., t, :], clean.keys[..., t, :], atol=1e-5) for t in range(len(prompt), kv.length)]
    assert same == [False, True, True, False, False, False]


def test_ended_rows_cost_their_sharers_nothing() -> None:
    pair = pair_of("llama", "qwen3")
    eos = pair.receiver.need_tokenizer().eos_token_id
    one, other = ([*ids_of(pair.receiver, text), eos] for text in ("A", TEXT))
    seen = tokens_read(pair.sharers[0])
    logits, _ = forced(pair, [CHATS[0], CHATS[0]], [one, other], eos_token_id=eos)
    both = list(seen)
    seen.clear()
    (single,), _ = forced(pair, CHATS[0], [other], eos_token_id=eos)
    torch.testing.assert_close(logits[1], single, atol=1e-3, rtol=1e-3)
    # The prompt, its last token and the first of the answer are read for both rows.
    assert both[0] == 2 * seen[0] and both[1] == 2 * seen[1] and both[3:] == seen[3:]


def test_only_what_is_new_is_read() -> None:
    pair = pair_of("qwen3", "qwen2")  # one token a byte in both
    seen = [tokens_read(lm) for lm in (pair.receiver, pair.sharers[0])]
    forced(pair, CHATS[0], [ids_of(pair.receiver, "best A")])
    # The prompt; then per token, the last of the prompt included, one clean pass and one fused, but for the end.
    assert seen[0][1:] == [1] * 13 and seen[1][1:] == [1] * 7


def test_token_ids_that_all_models_read() -> None:
    """The cache is then that of the longer prompt, fused."""
    sharer = lm_of("qwen2", 7, vocab_size=264)
    config = FuserConfig(hidden_dim=16, intermediate_dim=12, gate_init=1.0)
    torch.manual_seed(0)
    pair = C2C.from_models(tiny_model("qwen3"), sharer.model, config)  # without tokenizers
    prompt, script = list(range(40, 60)), [70, 71, 3, 72]
    _, kv = forced(pair, prompt, [script])
    close(kv, pair.prefill([*prompt, *script]).kv)
    other = C2C.from_models(tiny_model("qwen3"), tiny_model("qwen2"), config)
    with pytest.raises(C2CError, match=r"272 tokens.*264 tokens.*give text or messages"):
        other.generate(prompt, fuse_response=True, **OPTIONS)


def test_by_the_map_same_the_sharer_reads_the_receivers_answer() -> None:
    """A byte of a character too, as it comes."""
    pair = alike(token_map="same")
    script = ids_of(pair.receiver, "水 A")
    _, kv = forced(pair, CHATS[0], [script])
    close(kv, pair.prefill([*pair.encode(CHATS[0]).receiver, *script]).kv)
    wide = lm_of("qwen2", 7)  # 272 tokens, where the receiver has 264
    pair = C2C.from_models(pair.receiver, wide, pair.fusers[0].config)  # type: ignore[arg-type]
    assert pair.chat(CHATS[0], **OPTIONS)
    with pytest.raises(C2CError, match=r"272 tokens.*264 tokens.*a fuser with the token map span"):
        pair.chat(CHATS[0], fuse_response=True, **OPTIONS)


def test_the_start_of_an_answer_goes_before_it() -> None:
    """With one token a byte in both models nothing is cut anew: prefix and answer are as one answer."""
    pair = pair_of("qwen3", "qwen2")
    script = ids_of(pair.receiver, "naive A.")
    _, whole = forced(pair, CHATS[1], [script])
    _, split = forced(pair, CHATS[1], [script[5:]], prefix="naive")
    close(split, whole)
    fused = pair.prefill(CHATS[1], prefix="naive A")  # all positions but the last
    close(KV(whole.keys[..., : fused.kv.length, :], whole.values[..., : fused.kv.length, :]), fused.kv)


def test_a_later_turn_is_decoded_from() -> None:
    pair = pair_of("qwen3", "llama")
    chat = list(CHATS[1][:2])
    first = pair.prefill(chat, keep=True)
    chat += CHATS[1][2:]  # the caller goes on with the same list
    later = pair.prefill(CHATS[1], past=first, keep=True)
    script = ids_of(pair.receiver, TEXT)
    (a,), kv = forced(pair, later, [script])
    (b,), whole = forced(pair, CHATS[1], [script])
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    close(kv, whole)
    (_, a), (_, b) = (forced(pair, prompt, [script[:5]]) for prompt in (first, CHATS[1][:2]))
    close(a, b)


def test_what_takes_part() -> None:
    pair = pair_of(*THREE)
    assert torch.equal(
        pair.generate(CHATS[0], fuse_response=True, sharer_mask=0, **OPTIONS), alone(pair.receiver, CHATS[0])
    )
    plain = pair.generate(CHATS[0], **OPTIONS)
    assert torch.equal(plain, pair.generate(CHATS[0], fuse_response=False, **OPTIONS))
    # By default those sharers whose fusers were trained for it.
    script = ids_of(pair.receiver, TEXT)
    for j in (0, 2):
        pair.fusers[j].config = pair.fusers[j].config.model_copy(update={"fuse_response": True})  # type: ignore[union-attr, operator]
    assert not torch.allclose(
        forced(pair, CHATS[0], [script])[1].values,
        forced(pair, CHATS[0], [script], fuse_response=None)[1].values,
        atol=1e-3,
    )
    seen = [tokens_read(lm) for lm in pair.sharers]
    pair.generate(CHATS[0], **OPTIONS)
    assert len(seen[1]) == 1 and len(seen[0]) > 1 and len(seen[2]) > 1
    pair.score(CHATS[0], [" A"])  # which doesn't fuse the continuation
    pair.fusers[0].config = pair.fusers[0].config.model_copy(update={"token_map": "first"})  # type: ignore[union-attr, operator]
    for lm in seen:
        lm.clear()
    pair.generate(CHATS[0], **OPTIONS)
    assert len(seen[0]) == 1 and len(seen[2]) > 1


def test_sampling_and_several_answers() -> None:
    pair = pair_of("llama", "qwen2")
    options = {**OPTIONS, "do_sample": True, "num_return_sequences": 3, "fuse_response": True}
    torch.manual_seed(0)
    sampled = pair.generate(CHATS[:2:2], **options)
    length = pair.prefill(CHATS[0]).input_ids.shape[1]
    assert len(sampled) == 3 and len({tuple(row) for row in sampled.tolist()}) > 1
    for row in sampled[:, length:].tolist():  # each answer has its own fused cache
        _, kv = forced(pair, CHATS[0], [row])
        torch.manual_seed(0)
        out = pair.generate(CHATS[0], return_dict_in_generate=True, **options)
        index = out.sequences[:, length:].tolist().index(row)
        close(stacked(out[CACHE]).tail(index, kv.length), kv)


def test_refusals() -> None:
    pair = pair_of("qwen3", "llama")
    with pytest.raises(C2CError, match="beam search swaps answers"):
        pair.generate(CHATS[0], fuse_response=True, num_beams=2, **OPTIONS)
    with pytest.raises(C2CError, match="needs a cache that grows"):
        pair.generate(CHATS[0], fuse_response=True, cache_implementation="static", **OPTIONS)
    with pytest.raises(C2CError, match=r"prefill with keep=True, or give fuse_response=False"):
        pair.generate(pair.prefill(CHATS[0]), fuse_response=True, **OPTIONS)
    with pytest.raises(C2CError, match="fuse_response"):
        pair.score(CHATS[0], [" A"], fuse_response=True)
    with pytest.raises(C2CError, match="the token map longest"):
        pair_of("qwen3", "llama", token_map="longest").chat(CHATS[0], fuse_response=True, **OPTIONS)
    models = {"receiver": {"source": "a"}, "sharer": {"source": "b"}, "data": [{"task": "arc-easy"}]}
    with pytest.raises(ValueError, match="training fuses the prompt, not yet the answer"):
        TrainConfig.model_validate({**models, "fuser": {"fuse_response": True}})


@pytest.mark.parametrize("kind", ["prepend", "first", "always"])
def test_an_answer_s_first_space_is_not_lost(kind: str) -> None:
    """Decoders of SentencePiece's drop the space that a text begins with; behind a prompt it belongs there."""
    lm = lm_of("gemma3")
    other = LM(lm.model, spaced_tokenizer(kind), "spaced")
    ids = other.continuation_ids(" naive A")
    assert other.need_tokenizer().decode(ids) == "naive A"
    assert other.text(ids, behind=True) == " naive A" and other.text([], behind=True) == ""
    assert lm.text(lm.continuation_ids(" naive A"), behind=True) == " naive A"
