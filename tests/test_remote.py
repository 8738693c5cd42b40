"""A sharer on another machine gives what it would give here, or an error; it never hangs and is never believed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError, load_lm
from cache2cache.kv import KV
from cache2cache.packing import quantize
from cache2cache.pair import PromptIds
from cache2cache.remote import ALIVE, ERROR, LAYER, RemoteSharer, frame
from serving.wire import breaking, listening, serve_process, served, stop, until_it_serves
from test_fusion import THREE, close
from test_pair import CHATS, OPTIONS, PAIRS, lm_of, pair_of
from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer


def elsewhere(pair: C2C, *which: int, query: str = "", **options: Any) -> C2C:
    """The pair with these of its sharers (all by default) behind servers."""
    sharers = [
        RemoteSharer(served(lm) + query, **options) if j in (which or range(len(pair.sharers))) else lm
        for j, lm in enumerate(pair.sharers)
    ]
    return C2C(pair.receiver, sharers, list(pair.fusers), mode=pair.mode)  # type: ignore[arg-type]


def same(a: KV, b: KV) -> None:
    """The sharer's caches agree to the last bit; fused in pieces, products may sum in another order."""
    torch.testing.assert_close(a.keys, b.keys, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(a.values, b.values, atol=2e-6, rtol=2e-6)


# ---- the same as here -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("receiver", "sharer"), PAIRS)
def test_remote_equals_local(receiver: str, sharer: str) -> None:
    pair = pair_of(receiver, sharer)
    away = elsewhere(pair)
    here, there = pair.prefill(CHATS), away.prefill(CHATS)
    same(here.kv, there.kv)
    assert there.fused_positions == here.fused_positions and there.bytes_passed == here.bytes_passed
    assert there.coverage == here.coverage and here.transfers == []
    (transfer,) = there.transfers
    assert transfer.nbytes > there.bytes_passed and transfer.attempts == 1 and transfer.error == 0
    assert 0 < transfer.first_layer_s <= transfer.seconds
    assert away.chat(CHATS, **OPTIONS) == pair.chat(CHATS, **OPTIONS)
    assert away.chat(CHATS[1], prefix="The answer", **OPTIONS) == pair.chat(CHATS[1], prefix="The answer", **OPTIONS)
    same(away.prefill("plain text").kv, pair.prefill("plain text").kv)
    ids = PromptIds([5, 6, 7, 8], [[5, 6, 7, 8]], [range(4)])
    same(away.prefill(ids).kv, pair.prefill(ids).kv)
    arriving = away.sharers[0].prefill([[19, 8, 7, 6]], [None], 2, [None])  # type: ignore[attr-defined]
    arriving.wait(2)
    exact = pair_prefill(pair, [19, 8, 7, 6], 2)
    assert torch.equal(arriving.kv.keys, exact.keys) and torch.equal(arriving.kv.values, exact.values)


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_several_sharers_some_elsewhere(mode: str) -> None:
    pair = pair_of(*THREE, mode=mode)
    away = elsewhere(pair, 0, 2)
    for options in ({}, {"sharer_mask": [0b101, 0b010, 0b100]}, {"positions": "front:0.6"}):
        same(away.prefill(CHATS, **options).kv, pair.prefill(CHATS, **options).kv)
    assert len(away.prefill(CHATS, sharer_mask=0b110).transfers) == 1
    assert away.prefill(CHATS, sharer_mask=0b010).transfers == []


def test_a_later_turn_computes_and_sends_only_what_is_new() -> None:
    pair = pair_of("llama", "qwen3")
    away = elsewhere(pair)
    read: list[int] = []
    pair.sharers[0].decoder.layers[0].register_forward_pre_hook(lambda m, a: read.append(a[0].shape[1]))
    first = away.prefill(CHATS[1], keep=True)
    chat = [*CHATS[1], {"role": "assistant", "content": "Because."}, {"role": "user", "content": "I see."}]
    second = away.prefill(chat, past=first, keep=True)
    again = away.prefill(chat, past=second)
    same(second.kv, again.kv)
    lengths = [max(pair.encode(c).maps[0][:-1]) + 1 for c in (CHATS[1], chat)]
    assert read == [lengths[0], lengths[1] - lengths[0]]
    per_token = pair.sharers[0].num_kv_heads * pair.sharers[0].head_dim * 2 * 4 * pair.fusers[0].sharer_depth  # type: ignore[union-attr,operator]
    sent = [fused.transfers[0].nbytes for fused in (first, second, again)]
    overhead = sent[2]
    assert [n - overhead for n in sent[:2]] == [lengths[0] * per_token, (lengths[1] - lengths[0]) * per_token]
    close(second.kv, pair.prefill(chat).kv)


@pytest.mark.parametrize("numbers", ["bfloat16", "float16", "int8"])
def test_fewer_bytes(numbers: str) -> None:
    pair = pair_of("llama", "qwen3")
    away = elsewhere(pair, query=f"?numbers={numbers}")
    prompt = pair.encode(CHATS[1])
    ids = prompt.sharers[0]
    arriving = away.sharers[0].prefill([ids], [None], 3, [None])  # type: ignore[attr-defined]
    transfer = arriving.transfer()
    exact = pair_prefill(pair, ids, 3)
    scale = max(float(quantize(x[:, 0], dim=2)[2].max()) for x in (exact.keys, exact.values))
    off = max((arriving.kv.keys - exact.keys).abs().max(), (arriving.kv.values - exact.values).abs().max())
    assert 0 < off <= (scale / 2 * 1.001 if numbers == "int8" else 0.02 * exact.keys.abs().max())
    assert 0 < transfer.error < 0.02
    whole = elsewhere(pair).prefill(CHATS[1]).transfers[0].nbytes
    assert away.prefill(CHATS[1]).transfers[0].nbytes < whole * (0.62 if numbers != "int8" else 0.5)


def pair_prefill(pair: C2C, ids: Any, layers: int) -> KV:
    from cache2cache.kv import pad_left, prefill

    return prefill(pair.sharers[0], *pad_left([ids], 0, "cpu"), num_layers=layers)


def test_fusing_begins_before_the_transfer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server holds its last layers back until the first ones have been fused."""
    pair = pair_of("llama", "qwen3")
    fused, depth = threading.Event(), pair.fusers[0].sharer_depth
    lowest = int(pair.fusers[0].sharer_layers.min()) + 1  # type: ignore[union-attr,arg-type]
    assert lowest < depth  # type: ignore[operator]
    away = elsewhere(pair, timeout=20)
    import cache2cache.serving.sharer as service

    original = service.layer_content

    def held(index: int, coded: Any) -> bytes:
        if index >= lowest:
            assert fused.wait(10)
        return original(index, coded)

    forward, pieces = pair.fusers[0].forward, []

    def watched(a: KV, b: KV, where: Any, out: Any, layers: Any = None) -> KV:
        pieces.append(layers)
        result: KV = forward(a, b, where, out, layers)
        if layers[1] >= lowest:
            fused.set()
        return result

    monkeypatch.setattr(service, "layer_content", held)
    monkeypatch.setattr(pair.fusers[0], "forward", watched)
    there = away.prefill(CHATS)
    assert pieces[0][0] == 0 and pieces[-1][1] == depth
    assert all(a[1] == b[0] for a, b in pairwise(pieces)) and len([end for _, end in pieces if end >= lowest]) > 1
    monkeypatch.setattr(pair.fusers[0], "forward", forward)
    same(there.kv, pair.prefill(CHATS).kv)


# ---- broken connections ---------------------------------------------------------------------------------------------


def test_a_broken_connection_is_taken_up_again() -> None:
    pair = pair_of("llama", "qwen3")
    expected, address = pair.prefill(CHATS).kv, served(pair.sharers[0])
    rng = random.Random(0)
    with breaking(address, []) as relay:
        whole = C2C(pair.receiver, [RemoteSharer(relay)], list(pair.fusers)).prefill(CHATS).transfers[0]  # type: ignore[arg-type]
    for flip in (False, True):
        for _ in range(6):
            limits = [rng.randrange(200, whole.nbytes) for _ in range(2)]
            with breaking(address, list(limits), flip) as relay:
                away = C2C(pair.receiver, [RemoteSharer(relay)], list(pair.fusers))  # type: ignore[arg-type]
                there = away.prefill(CHATS)
            same(there.kv, expected)
            assert there.transfers[0].attempts > 1
            # What had arrived isn't sent again, up to the layer that was under way.
            assert there.transfers[0].nbytes < whole.nbytes * (1 + 2.2 / away.fusers[0].sharer_depth)  # type: ignore[union-attr,operator]


def test_an_answer_that_ends_too_early_is_asked_for_again() -> None:
    pair = pair_of("llama", "qwen3")
    address = served(pair.sharers[0])
    expected = RemoteSharer(address).served
    with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
        connection.sendall(b"GET /v1/model HTTP/1.1\r\nHost: here\r\n\r\n")
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += connection.recv(4096)
    head = answer.index(b"\r\n\r\n") + 4
    for limits in ([head], [head + 1], [head + 100, head]):
        with breaking(address, limits, path=b"/v1/model") as relay:
            assert RemoteSharer(relay).served == expected
        assert not limits
    with (
        breaking(address, [head] * 2, path=b"/v1/model") as relay,
        pytest.raises(C2CError, match=r"attempt 2 of 2: the connection ended \d+ bytes before the answer did"),
    ):
        RemoteSharer(relay, attempts=2)


def test_killed_and_restarted_without_a_wrong_answer(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("qwen3")
    pair = pair_of("llama", "qwen3")
    pair = C2C(pair.receiver, [load_lm(folder)], list(pair.fusers))  # type: ignore[arg-type]
    expected = [pair.prefill(chat).kv for chat in CHATS]
    processes = [serve_process(folder, 0)]
    try:
        address = until_it_serves(processes[0])
        away = C2C(pair.receiver, [RemoteSharer(address, attempts=10)], list(pair.fusers))  # type: ignore[arg-type]
        attempts: list[int] = []
        failures: list[BaseException] = []
        over = threading.Event()

        def run() -> None:
            try:
                while not over.is_set():
                    for chat, kv in zip(CHATS, expected, strict=True):
                        there = away.prefill(chat)
                        same(there.kv, kv)
                        attempts.append(there.transfers[0].attempts)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        time.sleep(0.3)
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].wait()
        before = len(attempts)
        processes.append(serve_process(folder, int(address.rpartition(":")[2])))
        until_it_serves(processes[1])
        deadline = time.monotonic() + 60
        while len(attempts) < before + 4 and not failures and time.monotonic() < deadline:
            time.sleep(0.1)
        over.set()
        thread.join(60)
        assert not failures and len(attempts) >= before + 4, failures
        processes[1].send_signal(signal.SIGINT)
        assert processes[1].wait(20) in (0, 130)
    finally:
        for process in processes:
            stop(process)


def test_another_model_at_the_same_address(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of("llama", "qwen3")
    away = elsewhere(pair)
    other = served(load_lm(tiny_model("qwen3", seed=5), tiny_tokenizer(TOKENIZER_OF["qwen3"])))
    monkeypatch.setattr(away.sharers[0], "_port", int(other.rpartition(":")[2]))
    with pytest.raises(C2CError, match=r"409.* differs from .* in weights \("):
        away.prefill(CHATS)
    with pytest.raises(C2CError, match=r"409.* differs from .* in weights \("):
        away.prefill(PromptIds([4, 5, 6], [[4, 5, 6]], [range(3)]))


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began = time.monotonic()
    with pytest.raises(C2CError, match=r"no answer from the sharer at .* attempt 3 of 3: ConnectionRefusedError"):
        RemoteSharer(f"http://127.0.0.1:{port}", attempts=3)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://", "no address of a sharer"),
        ("ftp://host:1", "no address of a sharer"),
        ("http://host:port", "no address of a sharer"),
        ("http://me:secret@host:1", "holds no user or password"),
        ("http://host:1?number=int8", "unknown option 'number'"),
        ("http://host:1#top", "no address of a sharer"),
    ],
)
def test_wrong_addresses(url: str, words: str) -> None:
    with pytest.raises(C2CError, match=words) as caught:
        RemoteSharer(url)
    assert "secret" not in str(caught.value)


def test_what_a_served_sharer_is_not_for() -> None:
    pair = pair_of("llama", "qwen3")
    away = elsewhere(pair)
    remote = away.sharers[0]
    with pytest.raises(C2CError, match="the receiver can't be at http"):
        C2C(remote, [pair.receiver], list(pair.fusers))  # type: ignore[arg-type]
    with pytest.raises(C2CError, match="which only reads prompts for a pair"):
        remote.model  # noqa: B018
    with pytest.raises(C2CError, match="which only reads prompts for a pair"):
        remote.need_tokenizer()
    assert repr(remote).startswith("RemoteSharer('http://127.0.0.1:") and remote == remote and remote != pair.receiver
    turned = pair_of("llama", "qwen3", key_space="unrotated")
    with pytest.raises(C2CError, match="unrotated keys"):
        C2C(turned.receiver, [remote], list(turned.fusers))  # type: ignore[arg-type]
    with pytest.raises(C2CError, match="unknown number format 'int4'"):
        RemoteSharer(f"{remote.url}?numbers=int4")  # type: ignore[attr-defined]


# ---- hostile servers ------------------------------------------------------------------------------------------------


def about(**changes: Any) -> bytes:
    """What an honest server of the tiny Qwen3 would say of itself, but for the changes."""
    from cache2cache.serving.sharer import Sharer

    honest = json.loads(Sharer(lm_of("qwen3")).about().model_dump_json())
    return json.dumps({**honest, **changes}).encode()


def reply(connection: socket.socket, body: bytes, head: bytes = b"") -> None:
    connection.recv(1 << 16)
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n" + head + b"\r\n" + body)


@contextmanager
def imposter(stream: bytes | Callable[[socket.socket], None], rendered: bytes = b"{}") -> Iterator[str]:
    """A server that says the right things about itself, and then sends `stream`."""

    def answer(connection: socket.socket) -> None:
        request = connection.recv(1 << 16, socket.MSG_PEEK)
        if b"/v1/model" in request:
            reply(connection, about())
        elif b"/v1/render" in request:
            reply(connection, rendered)
        elif callable(stream):
            reply(connection, b"")
            stream(connection)
        else:
            reply(connection, stream)

    with listening(answer) as address:
        yield address


def whole_layer(index: int, tokens: int, value: float = 0.5) -> bytes:
    lm = lm_of("qwen3")
    numbers = struct.pack("<f", value) * (2 * tokens * lm.num_kv_heads * lm.head_dim)
    return struct.pack(">If", index, 0.0) + numbers


IDS = [4, 5, 6, 7]
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ended after 0 of 4 layers"),
    "garbage": (b"\x00" * 64, "a frame .* of 0 bytes"),
    "endless frame": (struct.pack(">cII", LAYER, 0xFFFFFFFF, 0) + b"x" * 64, "of 4294967295 bytes"),
    "long error": (struct.pack(">cII", ERROR, 1 << 30, 0), "of 1073741824 bytes"),
    "wrong size": (frame(LAYER, whole_layer(0, 9)), r"a frame b'L' of \d+ bytes"),
    "wrong layer": (frame(LAYER, whole_layer(2, 3)), "layer 2 where 0 was due"),
    "layer twice": (frame(LAYER, whole_layer(0, 3)) * 2, "layer 0 where 1 was due"),
    "not finite": (frame(LAYER, whole_layer(0, 3, float("nan"))), "not finite"),
    "early end": (frame(LAYER, whole_layer(0, 3)), "layer 0 where 1 was due"),  # the next attempt asks for layer 1
    "bad checksum": (
        struct.pack(">cII", LAYER, len(whole_layer(0, 3)), zlib.crc32(b"")) + whole_layer(0, 3),
        "a frame was damaged",
    ),
    "an error": (
        frame(ERROR, b"no\x1b[31m such\nthing" + b"!" * 1000),
        r"could not read the prompt: no .31m such thing!",
    ),
    "signs of life": (frame(ALIVE) * 1000, "ended after 0 of 4 layers"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_streams(name: str) -> None:
    pair = pair_of("llama", "qwen3")
    stream, words = HOSTILE[name]
    with imposter(stream) as address:
        away = C2C(pair.receiver, [RemoteSharer(address, attempts=2, deadline=5)], list(pair.fusers))  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(C2CError, match=words) as caught:
            away.prefill(PromptIds(IDS, [IDS], [range(len(IDS))]))
        assert time.monotonic() - began < 8
    assert len(str(caught.value)) < 700 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("where", ["head", "frames"])
def test_a_server_that_trickles_is_given_up(where: str) -> None:
    """Each byte comes in time, the whole never would."""
    pair = pair_of("llama", "qwen3")

    def trickle(connection: socket.socket) -> None:
        while True:
            connection.sendall(frame(ALIVE))
            time.sleep(0.05)

    def head(connection: socket.socket) -> None:
        if b"/v1/model" in connection.recv(1 << 16, socket.MSG_PEEK):
            return reply(connection, about())
        connection.sendall(b"HTTP/1.1 200 OK\r\n")
        while True:
            connection.sendall(b"X")
            time.sleep(0.05)

    with imposter(trickle) if where == "frames" else listening(head) as address:
        away = C2C(pair.receiver, [RemoteSharer(address, timeout=1, deadline=1.5)], list(pair.fusers))  # type: ignore[arg-type]
        began = time.monotonic()
        with pytest.raises(C2CError, match="no answer from the sharer"):
            away.prefill(PromptIds(IDS, [IDS], [range(len(IDS))]))
        assert time.monotonic() - began < 6


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": 99},
        {"vocab_size": -1},
        {"model": None},
        {"numbers": "int4"},
        {"model": {"name": "x", "num_layers": 1 << 60, "num_kv_heads": 1, "head_dim": 1}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_hostile_descriptions(changes: dict[str, Any]) -> None:
    (key,) = changes
    words = "speaks protocol 99, this version 1" if key == "protocol" else rf"no sharer that this version knows \({key}"
    server = listening(lambda connection: reply(connection, about(**changes)))
    with server as address, pytest.raises(C2CError, match=words):
        RemoteSharer(address)


@pytest.mark.parametrize(
    "answer",
    [
        b"{}",
        b"[" * 100_000,
        b'{"text": "ab", "ids": [], "offsets": [], "segments": []}',
        b'{"text": "ab", "ids": [999999], "offsets": [[0, 2]], "segments": []}',
        b'{"text": "ab", "ids": [-1], "offsets": [[0, 2]], "segments": []}',
        b'{"text": "ab", "ids": [1], "offsets": [[0, 9]], "segments": []}',
        b'{"text": "ab", "ids": [1, 2], "offsets": [[0, 2]], "segments": []}',
        b'{"text": "ab", "ids": [1], "offsets": [[0, 2]], "segments": [{"start": 1, "end": 0, "key": 0}]}',
    ],
)
def test_hostile_renderings(answer: bytes) -> None:
    with imposter(b"", answer) as address:
        remote = RemoteSharer(address)
        with pytest.raises(C2CError, match="is no sharer that this version knows") as caught:
            remote.render("ab", prefix="", chat_template_kwargs={})
        assert len(str(caught.value)) < 700


def test_redirects_are_not_followed() -> None:
    def redirect(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n")

    with listening(redirect) as address, pytest.raises(C2CError, match=r"refused the request \(302\)"):
        RemoteSharer(address)


def test_the_answer_can_be_fused_too() -> None:
    pair = pair_of("llama", "qwen3")
    away = elsewhere(pair)
    for prompt in (CHATS[:2], [CHATS[2]]):
        expected = pair.chat(prompt, fuse_response=True, **OPTIONS)
        assert away.chat(prompt, fuse_response=True, **OPTIONS) == expected


def test_a_sharer_elsewhere_can_be_skipped() -> None:
    pair = pair_of("llama", "qwen3")
    away = elsewhere(pair)
    assert away.prefill(CHATS, skip=0.0).transfers == []
    sure = pair.prefill(CHATS, skip=1.0).confidence
    skip = (max(sure) + min(sure)) / 2
    there = away.prefill(CHATS, skip=skip)
    assert 0 < sum(there.skipped) < len(CHATS) and len(there.transfers) == 1
    same(there.kv, pair.prefill(CHATS, skip=skip).kv)
