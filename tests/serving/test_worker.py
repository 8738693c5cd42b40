"""The worker without its process: batches answer as the library does one by one, and rows keep to themselves."""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2CError, decode
from cache2cache.errors import Unreachable
from cache2cache.kv import KV, Read
from cache2cache.methods import text_to_text
from cache2cache.models import LM
from cache2cache.pair import C2C
from cache2cache.remote import RemoteSharer
from cache2cache.serving import worker as service
from cache2cache.serving.engine import WAYS, Failed, Finished, Job, Limits, PairSpec, Piece, Started, Token
from cache2cache.serving.kept import Kept
from cache2cache.serving.worker import Worker, _refusal, draw
from serving.wire import served
from test_pair import CHATS, pair_of
from tiny import spaced_tokenizer

LONG = [{"role": "user", "content": "Plants make food from sunlight, water and air. " * 3 + "What do they need?"}]
ASKED = [*CHATS, LONG]


class Desk:
    """A worker, and what it said about each job."""

    def __init__(self, pair: C2C, **limits: Any) -> None:
        self.events: dict[int, list[Any]] = {}
        self.ended: queue.Queue[int] = queue.Queue()
        self.on_event: Callable[[int, Any], None] = lambda number, event: None
        self.worker = Worker(pair, Limits(**limits), self.take)
        self.running = False

    def take(self, events: list[tuple[int, Any]]) -> None:
        for number, event in events:
            self.events.setdefault(number, []).append(event)
            self.on_event(number, event)
            if isinstance(event, (Finished, Failed)):
                self.ended.put(number)

    def run(self, *jobs: Job) -> list[list[Any]]:
        """All jobs at once; returns what was said about each."""
        start = max(self.events, default=-1) + 1
        for number, job in enumerate(jobs, start):
            self.events[number] = []
            self.worker.submit(number, job)
        if not self.running:
            self.running = True
            threading.Thread(target=self.worker.run, daemon=True).start()
        for _ in jobs:
            self.ended.get(timeout=60)
        return [self.events[number] for number in range(start, start + len(jobs))]


def text(events: list[Any], choice: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, Piece) and e.choice == choice and not e.message)


@pytest.fixture(scope="module")
def pair() -> C2C:
    return pair_of("llama", "qwen3")


@pytest.fixture(autouse=True)
def short_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never ends its message by itself."""
    monkeypatch.setattr(service, "MAX_MESSAGE_TOKENS", 12)
    monkeypatch.setattr(text_to_text, "MAX_MESSAGE_TOKENS", 12)


@pytest.fixture
def desk(pair: C2C) -> Desk:
    return Desk(pair)


def alone(pair: C2C, way: str, chat: list[dict[str, str]], new: int) -> str:
    """What the library answers to one chat."""
    from cache2cache.methods import METHODS, Ask

    if way == "c2c":
        return str(pair.chat(chat, max_new_tokens=new, do_sample=False))
    *_, answer = METHODS[way](pair, Ask.of(chat[-1]["content"]), new)
    return answer.text


def test_a_completion_keeps_the_space_in_front_of_it() -> None:
    """SentencePiece's decoders drop it, as from a chat's answer."""
    pair = pair_of("gemma3", "gemma3")
    lm = pair.receiver
    spaced = spaced_tokenizer("first", lm.need_tokenizer().chat_template)
    receiver, sharer = (LM(each.model, spaced, "spaced") for each in (lm, pair.sharers[0]))
    (space,) = lm.continuation_ids(" A")
    head = lm.model.lm_head
    handle = head.register_forward_hook(lambda module, given, logits: logits.index_fill(-1, torch.tensor(space), 1e4))
    try:
        ids = spaced("Plants need")["input_ids"]
        jobs = [Job(prompt, max_tokens=2) for prompt in (CHATS[0], "Plants need", ids)]
        told = Desk(C2C(receiver, [sharer], pair.fusers)).run(*jobs)
    finally:
        handle.remove()
    assert [text(events) for events in told] == ["A A", " A A", " A A"]


@pytest.mark.parametrize("families", [("llama", "qwen3"), ("qwen2", "gemma3"), ("qwen3", "llama")])
def test_a_batch_answers_as_one_by_one(families: tuple[str, str]) -> None:
    pair = pair_of(*families)
    asked = [(chat, new) for chat in ASKED for new in (3, 9)]
    told = Desk(pair).run(*(Job(chat, max_tokens=new) for chat, new in asked))
    for (chat, new), events in zip(asked, told, strict=True):
        ids = pair.generate(chat, max_new_tokens=new, do_sample=False)
        prompt, last = len(pair.encode(chat).receiver), events[-1]
        assert last.new_tokens == ids.shape[1] - prompt
        assert text(events) == "".join(c.text for c in pair.stream(chat, max_new_tokens=new, do_sample=False))
        pieces = [event for event in events if isinstance(event, Piece)]
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].finish
        assert len(pieces) == last.new_tokens
    sizes = [event.batch for events in told for event in events if isinstance(event, Started)]
    assert max(sizes) > 1  # or this would have tested nothing


@pytest.mark.parametrize("way", WAYS)
def test_every_way(pair: C2C, desk: Desk, way: Any) -> None:
    chats = [CHATS[0], CHATS[2]]
    told = desk.run(*(Job(chat, way, max_tokens=5) for chat in chats))
    for chat, events in zip(chats, told, strict=True):
        assert text(events) == alone(pair, way, chat, 5)
        last = events[-1]
        assert (last.bytes_passed > 0) == (way in ("c2c", "text")) and (last.message_tokens > 0) == (way == "text")
        if way == "c2c":
            assert last.bytes_passed == pair.prefill(chat).bytes_passed


def test_draws_do_not_depend_on_the_batch(pair: C2C, desk: Desk) -> None:
    jobs = [Job(chat, max_tokens=6, temperature=1.5, seed=seed, n=2) for seed, chat in enumerate(ASKED)]
    together = desk.run(*jobs)
    for job, events in zip(jobs, together, strict=True):
        (single,) = Desk(pair, keep_bytes=0).run(job)
        assert [text(events, i) for i in (0, 1)] == [text(single, i) for i in (0, 1)]
        assert text(events, 0) != text(events, 1)
    other, same = desk.run(*(Job(ASKED[0], max_tokens=8, temperature=1.5, seed=s) for s in (77, 0)))
    assert text(other) != text(same) and text(same)[:3] == text(together[0])[:3]


def test_draw() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[draw(scores, 1.0, 1.0, generator)] += 1
    assert torch.allclose(counts / 4000, scores.softmax(-1), atol=0.03) and counts[3] == 0
    assert {draw(scores, 1.0, 0.5, generator) for _ in range(50)} == {2}  # its probability alone is above 0.5
    assert {draw(scores, 1.0, 0.7, generator) for _ in range(200)} == {1, 2}
    assert {draw(scores, 1e-9, 1.0, generator) for _ in range(50)} == {2}
    assert draw(scores, 1.0, 0.0, generator) == 2


def test_stop_texts(pair: C2C, desk: Desk) -> None:
    (free,) = desk.run(Job(CHATS[0], max_tokens=12))
    whole = text(free)
    for begin in (2, 5, 8):
        for size in (1, 2, 4):
            stop = whole[begin : begin + size]
            (cut,) = desk.run(Job(CHATS[0], max_tokens=12, stop=("\x00 never", stop)))
            assert text(cut) == whole[: whole.index(stop)] and cut[-2].finish == "stop"
    beginning = whole[-1] + "and more"  # may be the start of a stop text up to the end
    (kept,) = desk.run(Job(CHATS[0], max_tokens=12, stop=(beginning,)))
    assert text(kept) == whole and kept[-2].finish == "length"


def test_logprobs(pair: C2C, desk: Desk) -> None:
    (events,) = desk.run(Job(CHATS[0], max_tokens=6, logprobs=3))
    tokens = [token for event in events if isinstance(event, Piece) for token in event.tokens]
    answer = pair.generate(CHATS[0], max_new_tokens=6, do_sample=False)[0, len(pair.encode(CHATS[0]).receiver) :]
    (score,) = decode.score(pair.receiver, pair.prefill(CHATS[0]), [[answer.tolist()]])[0]
    assert len(tokens) == 6 and sum(token.logprob for token in tokens) == pytest.approx(score.logprob, abs=1e-3)
    for token in tokens:
        best = token.likeliest[0]
        assert (best.text, best.logprob) == (token.text, token.logprob) and len(token.likeliest) == 3


@pytest.mark.parametrize("stop", [None, "c"])
def test_logprobs_of_parts_of_characters(monkeypatch: pytest.MonkeyPatch, stop: str | None) -> None:
    pair = pair_of("qwen3", "llama")
    said = "aé€b 😀cd"
    ids = pair.receiver.need_tokenizer()(said).input_ids
    assert len(ids) > len(said)  # or no character is in parts
    script = iter(ids)
    monkeypatch.setattr(service, "draw", lambda *_: next(script))
    job = Job(CHATS[0], max_tokens=len(ids), temperature=1.0, logprobs=2, stop=(stop,) if stop else ())
    (events,) = Desk(pair).run(job)
    shown = text(events)
    tokens = [token for event in events if isinstance(event, Piece) for token in event.tokens]
    assert shown == (said[: said.index(stop)] if stop else said)
    assert b"".join(token.data for token in tokens) == shown.encode()
    for i, token in enumerate(tokens):
        before = b"".join(t.data for t in tokens[:i])
        assert token.offset == len(before.decode(errors="ignore"))
        assert token.text == token.data.decode(errors="replace")
    so_far = ""
    for event in events:
        if isinstance(event, Piece):
            so_far += event.text
            assert all(token.offset < len(so_far) for token in event.tokens)  # they come with their text


@pytest.mark.parametrize("family", ["qwen3", "llama", "gemma3"])
def test_the_text_and_bytes_of_tokens(family: str) -> None:
    tokenizer = pair_of(family, "qwen2").receiver.need_tokenizer()
    said = "Plants make food. é€😀 Why?"
    ids = [i for i in tokenizer(said, add_special_tokens=False).input_ids if i != tokenizer.unk_token_id]
    found = b"".join(service.token_text(tokenizer, i)[1] for i in ids)
    assert found.decode().strip() == tokenizer.decode(ids).strip()


def test_a_prompt_that_is_far_too_long_is_only_counted(pair: C2C, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(C2C, "rendered", lambda *_, **__: pytest.fail("it was read"))
    words = "Plants make food. " * 40_000
    chat = [{"role": "user", "content": words[: 1 << 18]}] * 2
    for way in WAYS:
        prompts: list[Any] = [chat] if way == "text" else [chat, words, [5] * 100_000]
        for events in Desk(pair).run(*(Job(prompt, way) for prompt in prompts)):
            assert events[-1].reason == "invalid" and "doesn't fit the context" in events[-1].message


def test_looking_at_jobs(pair: C2C, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest first, and not those that were cancelled meanwhile."""
    seen: list[int] = []
    busy, go_on = threading.Event(), threading.Event()
    original = Worker._checked

    def checked(self: Worker, number: int, job: Job) -> Any:
        seen.append(number)
        if number == 0:
            busy.set()
            assert go_on.wait(30)
        return original(self, number, job)

    monkeypatch.setattr(Worker, "_checked", checked)
    desk = Desk(pair)
    desk.worker.submit(0, Job("Hi", max_tokens=1))
    assert busy.wait(30)
    for number, words in ((1, 50), (2, 40), (3, 2)):
        desk.worker.submit(number, Job("Hi " * words, max_tokens=1))
    desk.worker.cancel(2)
    threading.Thread(target=desk.worker.run, daemon=True).start()
    go_on.set()
    assert sorted(desk.ended.get(timeout=30) for _ in range(3)) == [0, 1, 3]
    assert seen == [0, 3, 1] and not desk.worker._all and not desk.worker._gone


def test_later_turns_start_from_earlier_ones(pair: C2C) -> None:
    """The same tokens with and without, also when batched with others; and what was known is counted."""
    remembering, forgetful = Desk(pair), Desk(pair, keep_bytes=0)
    for way in ("c2c", "receiver", "sharer", "text"):
        chat: list[dict[str, str]] = [{"role": "user", "content": "What is water? " * 6}]
        known = []
        for question in ("Why?", "And what is air?", "Plants?"):
            jobs = [Job(list(chat), way, max_tokens=6), Job(CHATS[0], way, max_tokens=6)]  # type: ignore[arg-type]
            first, _ = remembering.run(*jobs)
            (again,) = forgetful.run(jobs[0])
            assert text(first) == text(again)
            known.append(next(e.reused for e in first if isinstance(e, Started)))
            assert next(e.reused for e in again if isinstance(e, Started)) == 0
            chat += [{"role": "assistant", "content": text(first)}, {"role": "user", "content": question}]
        if way != "text":  # its prompts hold the sharer's message near their start
            assert known[1] > 30 and known[2] > known[1]
    assert 0 < remembering.worker.kept.nbytes <= 512 << 20 and forgetful.worker.kept.nbytes == 0


def test_a_job_without_reuse(pair: C2C, desk: Desk) -> None:
    told = [desk.run(Job(LONG, max_tokens=2, reuse=reuse))[0] for reuse in (False, True, False, True)]
    known = [next(e.reused for e in events if isinstance(e, Started)) for events in told]
    assert known[:3] == [0, 0, 0] and known[3] > 0


def test_other_settings_take_nothing_over(pair: C2C, desk: Desk) -> None:
    desk.run(Job(LONG, max_tokens=4))
    (events,) = desk.run(Job(LONG, max_tokens=6, positions="front:0.5"))
    assert text(events) == pair.chat(LONG, max_new_tokens=6, do_sample=False, positions="front:0.5")
    (events,) = desk.run(Job(LONG, max_tokens=6, sharers=0))
    assert text(events) == alone(pair, "receiver", LONG, 6) and events[-1].bytes_passed == 0


def test_several_sharers_and_modes() -> None:
    pair = pair_of("llama", "qwen3", "qwen2")
    desk = Desk(pair)
    for settings in ({"sharer_mask": 2}, {"mode": "sequential"}, {"mode": "parallel"}, {"sharer_mask": 3}):
        job = Job(CHATS[1], max_tokens=6, sharers=settings.get("sharer_mask"), mode=settings.get("mode"))  # type: ignore[arg-type]
        for _ in range(2):
            (events,) = desk.run(job)
            assert text(events) == pair.chat(CHATS[1], max_new_tokens=6, do_sample=False, **settings)  # type: ignore[arg-type]


def test_answers_that_are_fused_too() -> None:
    pair = pair_of("llama", "qwen3", fuse_response=True)
    told = Desk(pair).run(*(Job(chat, max_tokens=5, n=n) for n, chat in enumerate(CHATS, 1)))
    for n, (chat, events) in enumerate(zip(CHATS, told, strict=True), 1):
        for choice in range(n):
            assert text(events, choice) == pair.chat(chat, max_new_tokens=5, do_sample=False)


def test_cancelling(pair: C2C, desk: Desk) -> None:
    """A running job ends at its next token and the others of its batch don't notice; a waiting one never starts."""
    fourth = threading.Event()

    def watch(number: int, event: Any) -> None:
        if number == 0 and len(desk.events[0]) == 1:  # while 0 and 1 are answered, whatever this test's thread does
            desk.worker.submit(2, Job(CHATS[0], "receiver", max_tokens=200))
        if number == 0 and len(desk.events[0]) == 4:
            desk.worker.cancel(0)
            desk.worker.cancel(2)
            fourth.set()

    desk.on_event = watch
    desk.events = {0: [], 1: [], 2: []}
    desk.worker.submit(0, Job(CHATS[0], max_tokens=200))
    desk.worker.submit(1, Job(CHATS[2], max_tokens=30))
    threading.Thread(target=desk.worker.run, daemon=True).start()
    desk.running = True
    assert fourth.wait(30) and desk.ended.get(timeout=30) == 1
    assert text(desk.events[1]) == alone(pair, "c2c", CHATS[2], 30)
    (events,) = desk.run(Job(CHATS[0], max_tokens=2))
    assert isinstance(events[-1], Finished) and len(desk.events[0]) <= 5 and desk.events[2] == []
    assert not desk.worker._all and not desk.worker._waiting


@pytest.mark.parametrize(
    ("job", "says"),
    [
        (Job([{"role": "user", "content": " "}]), "empty"),
        (Job("Hi", max_tokens=4000), "don't fit the context"),
        (Job([4, 5, 399]), "token ids are read alike by all models"),
        (Job([399], "sharer"), "outside the vocabulary"),
        (Job([-1], "receiver"), "outside the vocabulary"),
        (Job(CHATS[0], sharers=9), "sharer mask"),
        (Job(CHATS[0], positions="middle"), "unknown choice of positions"),
        (Job("Hi", "text"), "chat messages"),
        (Job("Hi", n=16, max_tokens=1500), "positions of a batch"),
    ],
)
def test_what_can_not_be_answered_is_refused(pair: C2C, job: Job, says: str) -> None:
    desk = Desk(pair, max_batch_tokens=16384)
    bad, good = desk.run(job, Job(CHATS[0], max_tokens=2))
    assert isinstance(bad[-1], Failed) and bad[-1].reason == "invalid" and says in bad[-1].message
    assert isinstance(good[-1], Finished) and not desk.worker._all


def test_token_ids_are_for_models_that_read_them_alike() -> None:
    pair = pair_of("qwen3", "qwen2")
    ids = list(pair.encode(CHATS[0]).receiver)
    (ended,) = Desk(pair).run(Job(ids, max_tokens=3))
    assert isinstance(ended[-1], Finished)


def test_text_to_text_starts_from_what_its_sharer_has_read(pair: C2C, monkeypatch: pytest.MonkeyPatch) -> None:
    desk, seen = Desk(pair, keep_bytes=10**8), []
    known = desk.worker._known

    def watched(work: Any, kind: str, ids: Any) -> Any:
        found = known(work, kind, ids)
        seen.append((kind, found[1]))
        return found

    desk.run(Job(CHATS[0], "sharer", max_tokens=3, owner="me"))
    monkeypatch.setattr(desk.worker, "_known", watched)
    desk.run(Job(CHATS[0], "text", max_tokens=3, owner="me"))
    assert {kind for kind, _ in seen} == {"mesharer", "mereceiver"}
    assert all(count > 0 for kind, count in seen if kind == "mesharer")  # the template's start at least


def test_settings_of_the_model_change_no_answer_of_the_api(pair: C2C, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(CHATS[0], max_tokens=6, logprobs=0)
    (plain,) = Desk(pair).run(job)
    monkeypatch.setattr(pair.receiver.model.generation_config, "repetition_penalty", 5.0)
    (again,) = Desk(pair).run(job)
    assert [e for e in again if isinstance(e, (Piece, Token))] == [e for e in plain if isinstance(e, (Piece, Token))]


def test_a_sharer_that_is_down_is_not_asked_again_at_once(
    pair: C2C, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    asked = []

    def encode(prompt: Any) -> Any:
        asked.append(prompt)
        raise Unreachable("the sharer at http://10.0.0.1:8600 doesn't answer")

    monkeypatch.setattr(pair, "encode", encode)
    desk = Desk(pair)
    for _ in range(3):
        ended, other = desk.run(Job(CHATS[0], max_tokens=2), Job(CHATS[0], "receiver", max_tokens=2))
        assert isinstance(ended[-1], Failed) and ended[-1].reason == "unavailable"
        assert isinstance(other[-1], Finished)
    assert len(asked) == 1
    desk.worker._down_until = 0.0
    desk.run(Job(CHATS[0], max_tokens=2))
    assert len(asked) == 2 and "10.0.0.1" in capfd.readouterr().err


def test_a_batch_that_fails_is_answered_one_by_one(pair: C2C, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    original = C2C.fuse

    def fails(self: C2C, batch: Any, **options: Any) -> Any:
        if any("poison" in str(prompt.text) for prompt in batch):
            raise RuntimeError("no")
        return original(self, batch, **options)

    monkeypatch.setattr(C2C, "fuse", fails)
    poison = Job([{"role": "user", "content": "poison, and some words"}], max_tokens=4)
    good, bad, other = Desk(pair).run(Job(CHATS[0], max_tokens=4), poison, Job(CHATS[2], max_tokens=4))
    assert isinstance(bad[-1], Failed) and bad[-1].reason == "internal"
    assert text(good) == alone(pair, "c2c", CHATS[0], 4) and text(other) == alone(pair, "c2c", CHATS[2], 4)
    assert "poison" not in "".join(capfd.readouterr())


def test_weights_of_the_prompt(pair: C2C, desk: Desk) -> None:
    (events,) = desk.run(Job(CHATS[0], max_tokens=2, weights=True))
    (weights,) = events[-1].weights
    prompt = pair.encode(CHATS[0])
    assert len(weights.tokens) == len(prompt.receiver) - 1
    for rows in (weights.keys, weights.values):
        assert len(rows) == len(pair.fusers[0].receiver_layers)
        for row in rows:
            assert [value is None for value in row] == [s < 0 for s in prompt.maps[0][:-1]]
            assert all(0 < value < 1 for value in row if value is not None)


def test_weights_in_a_batch(pair: C2C) -> None:
    """Whose job asks for them has those that it has alone, and the others their answer."""
    asked = [Job(chat, max_tokens=2, weights=number != 1, reuse=False) for number, chat in enumerate(ASKED[:3])]
    told = Desk(pair).run(*asked)
    assert max(event.batch for events in told for event in events if isinstance(event, Started)) > 1
    for job, events in zip(asked, told, strict=True):
        (alone,) = Desk(pair).run(job)
        assert text(events) == text(alone) and len(events[-1].weights) == job.weights
        for one, other in zip(events[-1].weights, alone[-1].weights, strict=True):
            assert one.tokens == other.tokens
            for kind in ("keys", "values"):
                for row, expected in zip(getattr(one, kind), getattr(other, kind), strict=True):
                    assert row == pytest.approx(expected, abs=1e-5)


def test_a_fuser_without_weights_weighs_everything_alike() -> None:
    pair = pair_of("llama", "qwen3", variant="ridge")
    pair.fusers[0].blend.fill_(1.0)  # as if fitted  # type: ignore[union-attr, operator]
    (events,) = Desk(pair).run(Job(CHATS[0], max_tokens=2, weights=True))
    (weights,) = events[-1].weights
    assert {value for rows in (weights.keys, weights.values) for row in rows for value in row} == {None, 1.0}


@pytest.mark.parametrize("variant", ["c2c", "c2c-c", "bottleneck"])
def test_weights_are_what_the_fuser_applies(variant: str) -> None:
    """With one head and a projection that is all ones the change is the weight."""
    pair = pair_of("qwen2", "qwen3", variant=variant)  # qwen2 has one KV head
    fuser: Any = pair.fusers[0]
    fuser.proj_out.weight.data.zero_()
    fuser.proj_out.bias.data.fill_(1.0)
    fused = pair.prefill(CHATS[0], keep=True)
    (weights,) = service._weights(pair, fused.turns[0])
    assert weights is not None
    change = fused.turns[0].fused.keys - fused.turns[0].receiver.kv.keys
    for entry, layer in enumerate(fuser.receiver_layers.tolist()):
        expected = [0.0 if value is None else value for value in weights.keys[entry]]
        assert torch.allclose(change[layer, 0, 0, :, 0], torch.tensor(expected), atol=1e-5)


def read(*ids: int, floats: int = 8) -> Read:
    shape = (1, 1, 1, len(ids), floats)
    return Read(list(ids), KV(torch.randn(shape), torch.randn(shape)))


def test_kept_stays_in_its_budget() -> None:
    kept = Kept(3 * 4 * 8 * 2 * 4)  # three of four positions each
    for first in range(1, 6):
        kept.add("a", read(first, 2, 3, 4))
        assert kept.nbytes <= kept.budget
    assert kept.best("a", [1, 2, 3, 4])[1] == 0 and kept.best("a", [5, 2, 9])[1] == 2
    assert kept.best("a", [3, 2, 3, 4, 5])[1] == 4  # used, so 4 goes next
    kept.add("a", read(6, 2, 3, 4))
    assert kept.best("a", [4, 2])[1] == 0 and kept.best("a", [3, 2])[1] == 2
    assert kept.best("b", [3, 2])[1] == 0
    kept.add("a", read(*range(40)))
    assert kept.best("a", [0, 1])[1] == 0  # larger than the budget


def test_kept_drops_what_a_newer_one_begins_with_and_copies() -> None:
    kept = Kept(1 << 20)
    kept.add("a", read(1, 2))
    longer = read(1, 2, 3)
    kept.add("a", longer)
    assert kept.nbytes == longer.kv.nbytes
    entry, known = kept.best("a", [1, 2, 3, 4])
    assert known == 3 and isinstance(entry, Read)
    assert entry.kv.keys.data_ptr() != longer.kv.keys.data_ptr()


def test_too_little_memory(tiny_pair_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = PairSpec(
        str(tiny_pair_folder),
        receiver=str(tiny_pair_folder.parent / "llama"),
        sharers=[str(tiny_pair_folder.parent / "qwen3")],
    )
    service.check_memory(spec)
    monkeypatch.setattr(service, "free_memory", lambda device: 1000)
    with pytest.raises(C2CError, match=r"need about 0\.0 GB of memory and 0\.0 GB are free"):
        service.check_memory(spec)
    assert service.free_memory("cpu")


def test_what_is_sized_is_what_will_be_loaded(
    tiny_pair_folder: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The revision that a fuser was trained for, and of several fusers each once, from its own subfolder."""
    for name in ("a", "b"):
        shutil.copytree(tiny_pair_folder, tmp_path / name / "x", ignore=shutil.ignore_patterns("runs"))
        path = tmp_path / name / "x" / "config.json"
        saved = json.loads(path.read_text())
        saved["fuser"]["sharer"] |= {"name": f"owner/{name}", "revision": "abc"}
        saved["fuser"]["receiver"] |= {"name": "owner/receiver", "revision": "def"}
        path.write_text(json.dumps(saved))
    sized = []
    monkeypatch.setattr(service, "weight_bytes", lambda spec, **_: sized.append((spec.source, spec.revision)) or 1)
    service.check_memory(PairSpec([str(tmp_path / "a"), str(tmp_path / "b")], subfolder=["x", "x"]))
    assert sorted(sized) == [("owner/a", "abc"), ("owner/b", "abc"), ("owner/receiver", "def")]
    sized.clear()
    service.check_memory(PairSpec([str(tmp_path), str(tmp_path)], subfolder=["a/x", "b/x"], receiver="here"))
    assert sorted(sized) == [("here", None), ("owner/a", "abc"), ("owner/b", "abc")]
    with pytest.raises(C2CError, match="3 fusers and 2 subfolders; give one subfolder for each fuser"):
        service.check_memory(PairSpec([str(tmp_path)] * 3, subfolder=["a/x", "b/x"]))


def test_the_weights_size_is_what_a_model_takes(tiny_pair_folder: Any) -> None:
    from cache2cache.models.load import load_lm, weight_bytes

    folder = tiny_pair_folder.parent / "llama"
    size = sum(p.nbytes for p in load_lm(folder).model.parameters())
    assert weight_bytes(folder) == size and weight_bytes(folder, dtype="bfloat16") == size // 2


# ---- what goes wrong beside others -----------------------------------------------------------------------------------


def test_the_token_that_ends_an_answer_has_no_logprob(pair: C2C, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its bytes are none of the text."""
    prompt = len(pair.encode(CHATS[0]).receiver)
    ids = pair.generate(CHATS[0], max_new_tokens=4, do_sample=False)[0, prompt:].tolist()
    assert ids[3] not in ids[:3]
    monkeypatch.setattr(pair.receiver.model.generation_config, "eos_token_id", ids[3])
    (events,) = desk.run(Job(CHATS[0], max_tokens=9, logprobs=0))
    pieces = [e for e in events if isinstance(e, Piece)]
    assert pieces[-1].finish == "stop" and events[-1].new_tokens == 4
    tokens = [token for piece in pieces for token in piece.tokens]
    assert len(tokens) == 3


def test_jobs_that_fit_alone_are_not_refused_together() -> None:
    """The sharer answers, and has less room than the receiver."""
    pair = pair_of("llama", "qwen3")
    short, long = [{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Plants make food. " * 2}]
    tokens = [len(pair.rendered(pair.sharers[0], chat).ids) for chat in (short, long)]
    assert tokens[1] <= 2 * tokens[0] + 32
    pair.sharers[0].model.config.max_position_embeddings = tokens[1] + 6
    told = Desk(pair).run(
        Job(short, "sharer", max_tokens=tokens[1] + 6 - tokens[0]),
        Job(long, "sharer", max_tokens=6),
        Job(short, "sharer"),
    )
    assert [isinstance(events[-1], Finished) for events in told] == [True, True, True]


def test_text_to_text_is_as_long_in_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """How much room is left behind the prompt is that of the receiver's own, which holds the message."""
    for module in (service, text_to_text):
        monkeypatch.setattr(module, "MAX_MESSAGE_TOKENS", 1)
    pair = pair_of("llama", "qwen3")
    chats = [[{"role": "user", "content": "Hi"}], LONG]
    read = [len(pair.rendered(pair.receiver, Worker._relayed(Job(chat), "")).ids) + 1 for chat in chats]
    # A message of random bytes may be more tokens for the receiver than it was for the sharer.
    pair.receiver.model.config.max_position_embeddings = max(read) + 60
    most = max(read) - read[0] + 20
    assert most > 60
    told = Desk(pair).run(Job(chats[0], "text", max_tokens=most), Job(chats[1], "text", max_tokens=4))
    assert all(isinstance(events[-1], Finished) for events in told)
    tokens = [sum(isinstance(e, Piece) and not e.message for e in events) for events in told]
    assert tokens[0] > 60 and tokens[1] == 4  # 60 is what the other one's prompt leaves


def test_only_its_owner_starts_from_an_earlier_turn(pair: C2C, desk: Desk) -> None:
    known = []
    for owner in ("a", "b", "a"):
        (events,) = desk.run(Job(LONG, max_tokens=2, owner=owner))
        known.append(next(e.reused for e in events if isinstance(e, Started)))
    assert known[0] == known[1] == 0 < known[2]


def test_a_sharer_elsewhere(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It answers through a pair; where it can't be reached, that is nobody's fault, and nobody learns where it is."""
    here = pair_of("llama", "qwen3")
    remote = RemoteSharer(served(here.sharers[0]), attempts=1)
    pair = C2C(here.receiver, [remote], list(here.fusers))  # type: ignore[arg-type]
    desk = Desk(pair)
    (events,) = desk.run(Job(CHATS[0], max_tokens=5))
    assert text(events) == alone(here, "c2c", CHATS[0], 5)

    def down(*_: Any, **__: Any) -> Any:
        raise Unreachable(f"no answer from the sharer at {remote.url}")

    monkeypatch.setattr(RemoteSharer, "render", down)
    (events,) = desk.run(Job(CHATS[1], max_tokens=5))
    assert events == [Failed("unavailable", "the sharer can't be reached; try again later")]
    monkeypatch.undo()
    desk.worker._down_until = 0.0  # it is asked again, and fails later
    monkeypatch.setattr(RemoteSharer, "prefill", down)
    told = desk.run(*(Job(chat, max_tokens=5) for chat in (CHATS[1], CHATS[2])))
    assert {events[-1].reason for events in told} == {"unavailable"}
    assert remote.url in capfd.readouterr().err  # whoever runs the server is told
    refused = _refusal(C2CError(f"8 rows are more than the sharer at {remote.url} takes; start it with more"), pair)
    assert refused.reason == "invalid" and "http" not in refused.message and remote.url in capfd.readouterr().err
    quoted = "the prompt 'http://example.org' gives no tokens"  # what was asked is no secret, and nobody else's matter
    assert _refusal(C2CError(quoted), pair) == Failed("invalid", quoted) and not capfd.readouterr().err
