"""Which sharers and positions are fused, and what a later turn takes over: exactness on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError
from cache2cache.kv import KV, Read, pad_left, prefill
from cache2cache.pair import PromptIds
from test_pair import CHATS, OPTIONS, PAIRS, lm_of, pair_of

THREE = ("llama", "qwen3", "gemma3", "qwen2")  # a receiver and three sharers of other families


def close(a: KV, b: KV) -> None:
    torch.testing.assert_close(a.keys, b.keys, atol=3e-5, rtol=1e-4)
    torch.testing.assert_close(a.values, b.values, atol=3e-5, rtol=1e-4)


def some(pair: C2C, *chosen: int) -> C2C:
    """The pair with these of its sharers only."""
    return C2C(
        pair.receiver,
        [pair.sharers[i] for i in chosen],
        [pair.fusers[i] for i in chosen],  # type: ignore[misc]
        mode=pair.mode,  # type: ignore[arg-type]
    )


def tokens_read(lm: Any) -> list[int]:
    """Tokens (rows times positions) of every pass through the model's lowest layer from now on."""
    seen: list[int] = []
    lm.decoder.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0] * a[0].shape[1]))
    return seen


# ---- several sharers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_a_mask_per_row_equals_separate_calls(mode: str) -> None:
    pair = pair_of(*THREE, mode=mode)
    masks = [0b101, 0b010, 0b111]
    fused = pair.prefill(CHATS, sharer_mask=masks)
    answers = pair.chat(CHATS, sharer_mask=masks, **OPTIONS)
    for row, (chat, mask) in enumerate(zip(CHATS, masks, strict=True)):
        single = some(pair, *(i for i in range(3) if mask >> i & 1)).prefill(chat)
        close(fused.kv.tail(row, single.kv.length), single.kv)
        assert fused.fused_positions[row] == single.fused_positions[0]
        assert pair.chat(chat, sharer_mask=mask, **OPTIONS) == answers[row]
    assert fused.bytes_passed == sum(
        pair.prefill(c, sharer_mask=m).bytes_passed for c, m in zip(CHATS, masks, strict=True)
    )


def test_no_sharer_is_the_receiver() -> None:
    pair = pair_of(*THREE)
    closed = pair_of("llama", "qwen3", gate_init=0.0)
    fused = pair.prefill(CHATS, sharer_mask=0)
    assert torch.equal(fused.kv.keys, closed.prefill(CHATS).kv.keys) and fused.fused_positions == [0, 0, 0]
    assert fused.bytes_passed == 0


def test_what_is_not_selected_computes_nothing() -> None:
    pair = pair_of(*THREE)
    seen = [tokens_read(lm) for lm in pair.sharers]
    fused = pair.prefill(CHATS, sharer_mask=[0b010, 0b000, 0b110])
    lengths = [[max(p.maps[j][:-1]) + 1 for j in range(3)] for p in map(pair.encode, CHATS)]
    assert seen == [[], [2 * max(lengths[0][1], lengths[2][1])], [lengths[2][2]]]
    assert fused.fused_positions[1] == 0


def test_fusers_trained_apart_are_combined() -> None:
    pair = pair_of(*THREE)
    one, other = some(pair, 0), some(pair, 2)
    both = C2C(pair.receiver, [*one.sharers, *other.sharers], [*one.fusers, *other.fusers])  # type: ignore[list-item]
    close(both.prefill(CHATS[1]).kv, pair.prefill(CHATS[1], sharer_mask=0b101).kv)


def test_the_mode_of_a_call() -> None:
    parallel, sequential = (pair_of(*THREE, mode=mode) for mode in ("parallel", "sequential"))
    close(parallel.prefill(CHATS, mode="sequential").kv, sequential.prefill(CHATS).kv)
    close(sequential.prefill(CHATS, mode="parallel").kv, parallel.prefill(CHATS).kv)
    assert not torch.allclose(parallel.prefill(CHATS).kv.values, sequential.prefill(CHATS).kv.values, atol=1e-3)


@pytest.mark.parametrize("mask", [8, -1, [1, 2], [1, 2, 9]])
def test_wrong_masks(mask: Any) -> None:
    with pytest.raises(C2CError, match=r"doesn't fit 3 prompts and 3 sharers; expected one number from 0 to 7"):
        pair_of(*THREE).prefill(CHATS, sharer_mask=mask)


# ---- positions ------------------------------------------------------------------------------------------------------


def changed(pair: C2C, chats: Any, **options: Any) -> list[set[int]]:
    """Per row, the positions of the unpadded prompt where fusing changed anything."""
    fused, clean = pair.prefill(chats, **options), pair.prefill(chats, sharer_mask=0)
    differs = (fused.kv.values != clean.kv.values).any(-1).any(2).any(0)
    starts = (fused.attention_mask == 0).sum(1).tolist()
    return [{t - start for t in row.nonzero().flatten().tolist()} for row, start in zip(differs, starts, strict=True)]


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_only_the_chosen_positions_change(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer)
    encoded = [pair.encode(chat) for chat in CHATS]
    every = changed(pair, CHATS)
    assert every == [{t for t, s in enumerate(p.maps[0][:-1]) if s >= 0} for p in encoded]
    for share in (0.0, 0.3, 1.0):
        cut = [round(share * (len(p.receiver) - 1)) for p in encoded]
        front = changed(pair, CHATS, positions=f"front:{share}")
        assert front == [{t for t in row if t < n} for row, n in zip(every, cut, strict=True)]
        back = changed(pair, CHATS, positions=f"back:{share}")
        ends = [len(p.receiver) - 1 - n for p, n in zip(encoded, cut, strict=True)]
        assert back == [{t for t in row if t >= n} for row, n in zip(every, ends, strict=True)]
    content = changed(pair, CHATS, positions="content")
    assert content == [{t for t in row if p.content[t]} for row, p in zip(every, encoded, strict=True)]
    assert all(0 < len(a) < len(b) for a, b in zip(content, every, strict=True))


def test_content_is_what_the_messages_hold() -> None:
    pair = pair_of("qwen3", "llama")  # one token a byte
    encoded = pair.encode(CHATS[1])
    tokenizer = pair.receiver.need_tokenizer()
    kept = tokenizer.decode([i for i, inside in zip(encoded.receiver, encoded.content, strict=True) if inside])
    assert kept == "".join(message["content"] for message in CHATS[1])


def test_positions_per_row_and_masks() -> None:
    pair = pair_of("llama", "qwen3")
    lengths = [len(pair.encode(chat).receiver) for chat in CHATS]
    wanted = [t % 3 == 0 for t in range(lengths[2])]
    rows = changed(pair, CHATS, positions=["back:0.5", "all", wanted])
    assert rows[0] == changed(pair, CHATS[0], positions="back:0.5")[0]
    assert rows[1] == changed(pair, CHATS[1])[0]
    assert (
        rows[2]
        == changed(pair, CHATS[2], positions=torch.tensor(wanted))[0]
        == {t for t in changed(pair, CHATS[2])[0] if t % 3 == 0}
    )


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ("middle", "unknown choice of positions 'middle'"),
        ("front:2", "unknown choice"),
        ("back:much", "unknown choice"),
        ("front:nan", "unknown choice"),
        ([True, False], "a choice of 2 positions was given for a prompt of"),
        (["all", "all"], "2 choices of positions were given for 3 prompts"),
    ],
)
def test_wrong_positions(positions: Any, words: str) -> None:
    with pytest.raises(C2CError, match=words):
        pair_of("llama", "qwen3").prefill(CHATS, positions=positions)


def test_token_ids_do_not_tell_what_is_content() -> None:
    with pytest.raises(C2CError, match="token ids don't tell"):
        pair_of("qwen3", "qwen2").prefill([5, 6, 7], positions="content")


# ---- later turns ----------------------------------------------------------------------------------------------------


def talk(pair: C2C, chats: list[Any], turns: int, **options: Any) -> tuple[list[Any], Any]:
    """Answer and ask on, turn by turn, each from what the one before kept: the chats and the last fused cache."""
    chats, fused = [list(chat) for chat in chats], None
    for turn in range(turns):
        if fused is not None:
            answers = pair.receiver.need_tokenizer().batch_decode(
                pair.generate(fused, **OPTIONS)[:, fused.input_ids.shape[1] :], skip_special_tokens=True
            )
            for chat, answer in zip(chats, answers, strict=True):
                chat += [
                    {"role": "assistant", "content": answer or "So."},
                    {"role": "user", "content": f"And number {turn}?"},
                ]
        fused = pair.prefill(chats, past=fused, keep=True, **options)
    return chats, fused


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_turn_by_turn_equals_in_one_go(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer)
    chats, fused = talk(pair, CHATS, 3)
    at_once = pair.prefill(chats)
    close(fused.kv, at_once.kv)
    assert torch.equal(fused.input_ids, at_once.input_ids) and fused.fused_positions == at_once.fused_positions
    assert torch.equal(pair.generate(fused, **OPTIONS), pair.generate(chats, **OPTIONS))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_turns_with_several_sharers(mode: str) -> None:
    pair = pair_of(*THREE, mode=mode)
    chats, fused = talk(pair, CHATS, 3, sharer_mask=[0b101, 0b010, 0b111])
    close(fused.kv, pair.prefill(chats, sharer_mask=[0b101, 0b010, 0b111]).kv)
    # Another choice of sharers and positions later on: nothing that was fused otherwise is taken over.
    options: dict[str, Any] = {"sharer_mask": [0b011, 0b110, 0b000], "positions": "front:0.7"}
    close(pair.prefill(chats, past=fused, **options).kv, pair.prefill(chats, **options).kv)
    # The other mode, likewise.
    options = {"sharer_mask": [0b101, 0b010, 0b111], "mode": "sequential" if mode == "parallel" else "parallel"}
    close(pair.prefill(chats, past=fused, **options).kv, pair.prefill(chats, **options).kv)


def test_a_later_turn_reads_and_fuses_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("qwen3", "qwen2")  # one token a byte on both sides
    first = pair.prefill(CHATS[1], keep=True)
    chat = [*CHATS[1], {"role": "assistant", "content": "Because."}, {"role": "user", "content": "I see."}]
    seen = tokens_read(pair.receiver), tokens_read(pair.sharers[0])
    fused: list[int] = []
    forward: Callable[..., KV] = pair.fusers[0].forward
    monkeypatch.setattr(
        pair.fusers[0], "forward", lambda a, b, w, *rest: fused.append(w.shape[1]) or forward(a, b, w, *rest)
    )
    second = pair.prefill(chat, past=first)
    old, new = len(pair.encode(CHATS[1]).receiver), len(pair.encode(chat).receiver)
    assert seen[0] == [new - old] and seen[1] == [new - old] and fused == [new - old]
    assert pair.prefill(chat, past=second.turns or first).kv.length == new - 1


def test_an_edited_chat_is_read_again_from_the_edit_on() -> None:
    pair = pair_of("llama", "qwen3")
    first = pair.prefill(CHATS, keep=True)
    edited = [[{**message, "content": message["content"].replace("is", "was")} for message in chat] for chat in CHATS]
    edited[2] = [{"role": "user", "content": "Something else entirely, and longer than before"}]
    close(pair.prefill(edited, past=first).kv, pair.prefill(edited).kv)
    close(pair.prefill(CHATS, past=first).kv, first.kv)


def test_rows_of_different_pasts_in_one_batch() -> None:
    pair = pair_of("gemma3", "llama")
    kept = [pair.prefill(chat, keep=True).turns[0] for chat in (CHATS[0], CHATS[1])]
    chats = [[*chat, {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "Go on"}] for chat in CHATS]
    close(pair.prefill(chats, past=[kept[0], kept[1], None]).kv, pair.prefill(chats).kv)


def test_keeping_leaves_the_clean_caches_clean() -> None:
    pair = pair_of("llama", "qwen3")
    turn = pair.prefill(CHATS[1], keep=True).turns[0]
    assert torch.equal(turn.receiver.kv.keys, pair.prefill(CHATS[1], sharer_mask=0).kv.keys)
    assert not torch.equal(turn.receiver.kv.keys, turn.fused.keys)


def test_a_past_that_does_not_fit() -> None:
    pair = pair_of("llama", "qwen3")
    with pytest.raises(C2CError, match="made without keep=True"):
        pair.prefill(CHATS, past=pair.prefill(CHATS))
    with pytest.raises(C2CError, match="holds 1 chats, 3 prompts were given"):
        pair.prefill(CHATS, past=pair.prefill(CHATS[0], keep=True))
    with pytest.raises(C2CError, match="past was given with a fused cache"):
        pair.generate(pair.prefill(CHATS[0], keep=True), past=pair.prefill(CHATS[0], keep=True))
    with pytest.raises(C2CError, match="unknown option 'position'"):
        pair.score(CHATS[0], ["a"], position="all")


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("chunk", [1, 7, 40])
def test_prefill_in_pieces_equals_in_one_go(family: str, chunk: int) -> None:
    lm = lm_of(family)
    torch.manual_seed(3)
    rows = [torch.randint(5, 250, (n,)).tolist() for n in (30, 13, 21)]  # Gemma's window is 8
    ids, mask = pad_left(rows, 0, "cpu")
    whole = prefill(lm, ids, mask)
    for row, n in enumerate((30, 13, 21)):
        close(prefill(lm, ids, mask, chunk_tokens=chunk).tail(row, n), whole.tail(row, n))
        past = [
            Read(rows[r][:k], whole.tail(r, len(rows[r]))) if k else None for r, k in enumerate((chunk % 25, 5, 21))
        ]
        past[row] = Read(rows[row], whole.tail(row, n))
        close(prefill(lm, ids, mask, past=past).tail(row, n), whole.tail(row, n))


def test_the_prompt_ids_of_a_mixed_past() -> None:
    """A past whose tokens are the same but whose map is another: only what goes with the same sharer token is kept."""
    pair = pair_of("qwen3", "qwen2")
    ids = [9, 10, 11, 12, 13, 14]
    first = pair.prefill(PromptIds(ids, [ids], [[0, 1, 2, 3, 4, 5]]), keep=True)
    other = PromptIds(ids, [[*ids[:4], 20, 21]], [[0, 1, 1, 3, 4, 5]])
    close(pair.prefill(other, past=first).kv, pair.prefill(other).kv)
