"""The server of a sharer: who is answered, what is refused, and that nothing it is sent hurts it."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache2cache import C2C, C2CError, load_lm
from cache2cache.kv import Read, prefill_prompts
from cache2cache.models.owner import Owner
from cache2cache.remote import KEY_VARIABLE, RemoteSharer
from cache2cache.serving import sharer as service
from cache2cache.serving.http import Patient
from serving.wire import HEAD, ask, message, served
from test_pair import CHATS, lm_of, pair_of
from tiny import tiny_model

LM = lm_of("qwen3")
OWNER = json.loads(Owner.of(LM).model_dump_json())


@pytest.fixture(scope="module")
def address() -> str:
    return served(LM, max_tokens=256)


def cache(**changes: Any) -> dict[str, Any]:
    """A good request for a cache, but for the changes."""
    good = {
        "model": OWNER,
        "rows": [[4, 5, 6]],
        "positions": [None],
        "skip": [0],
        "num_layers": 2,
        "first_layer": 0,
        "numbers": "float32",
    }
    return {**good, **changes}


def text(**changes: Any) -> dict[str, Any]:
    return {"model": OWNER, "prompt": CHATS[0], **changes}


def post(address: str, path: str, content: Any) -> tuple[int, bytes]:
    return ask(address, "POST", path, json.dumps(content).encode())


def test_the_good_requests_are_good(address: str) -> None:
    assert ask(address, "GET", "/v1/model")[0] == 200
    assert post(address, "/v1/prefill", cache())[0] == 200
    status, body = post(address, "/v1/render", text(prefix="So", chat_template_kwargs={"enable_thinking": False}))
    assert status == 200 and json.loads(body)["text"].endswith("So")


def test_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    address = served(LM, key="open sesame")
    for headers in ({}, {"Authorization": "Bearer open"}, {"Authorization": "open sesame"}):
        for method, path in (("GET", "/v1/model"), ("POST", "/v1/prefill"), ("GET", "/nowhere")):
            assert ask(address, method, path, None, **headers)[0] == 401
    with pytest.raises(C2CError, match=rf"\(401\): a key is needed; set {KEY_VARIABLE}"):
        RemoteSharer(address)
    assert RemoteSharer(address, key="open sesame").vocab_size == LM.vocab_size
    monkeypatch.setenv(KEY_VARIABLE, "open sesame")
    assert RemoteSharer(address).vocab_size == LM.vocab_size


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": []}, "rows"),
        ({"rows": [[]]}, "rows of 0 to 0 tokens"),
        ({"rows": [[4] * 300]}, "are more than 256 positions"),
        ({"rows": [[4] * 100, [4], [5]], "positions": [None] * 3, "skip": [0] * 3}, "are more than 256 positions"),
        ({"rows": [[10**6]]}, "outside the vocabulary"),
        ({"rows": [[-1]]}, "outside the vocabulary"),
        ({"rows": [["4"]]}, "rows.0.0"),
        ({"rows": [[4.5]]}, "rows.0.0"),
        ({"positions": []}, "positions don't fit"),
        ({"positions": [[0, 1]]}, "positions don't fit"),
        ({"positions": [[0, 1, 10**9]]}, "positions don't fit"),
        ({"skip": [4]}, "skip doesn't fit"),
        ({"skip": [-1]}, "skip doesn't fit"),
        ({"skip": [0, 0]}, "skip doesn't fit"),
        ({"num_layers": 99}, "layers 0 to 99 were asked for"),
        ({"num_layers": 0}, "num_layers"),
        ({"first_layer": 2}, "layers 2 to 2"),
        ({"first_layer": -1}, "first_layer"),
        ({"numbers": "int4"}, "numbers"),
        ({"more": 1}, "more"),
        ({"model": {}}, "model"),
    ],
)
def test_caches_that_are_refused(address: str, changes: dict[str, Any], words: str) -> None:
    status, body = post(address, "/v1/prefill", cache(**changes))
    assert status == 400 and words in message(body)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [{"role": "user"}]}, "prompt"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x" * 17000}, "too many"),
        (
            {"chat_template_kwargs": {"chat_template": "{% for i in range(10**9) %}{% endfor %}"}},
            "chat_template, which",
        ),
        ({"chat_template_kwargs": {"tools": "x"}}, "tools, which a server doesn't take"),
        ({"chat_template_kwargs": {"tokenize": True}}, "tokenize, which a server doesn't take"),
        ({"chat_template_kwargs": {"x": {"deep": 1}}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {f"x{i}": 1 for i in range(40)}}, "chat_template_kwargs"),
    ],
)
def test_prompts_that_are_refused(address: str, changes: dict[str, Any], words: str) -> None:
    status, body = post(address, "/v1/render", text(**changes))
    assert status == 400 and words in message(body)


def test_another_model_is_refused(address: str) -> None:
    other = json.loads(Owner.of(lm_of("llama")).model_dump_json())
    for path, content in (("/v1/prefill", cache(model=other)), ("/v1/render", text(model=other))):
        status, body = post(address, path, content)
        assert status == 409 and "weights (" in message(body) and "shapes (" in message(body)


def test_requests_that_are_refused(address: str) -> None:
    good = json.dumps(cache()).encode()
    assert ask(address, "POST", "/v1/prefill", good, Content_Type="text/plain")[0] == 415
    assert ask(address, "GET", "/v1/prefill")[0] == 405
    assert ask(address, "GET", "/etc/passwd")[0] == 404
    # Too long, whether it says so or not.
    assert ask(address, "POST", "/v1/prefill", b" " * (1 << 20))[0] == 413
    assert ask(address, "POST", "/v1/prefill", iter([b" " * (1 << 18)] * 4))[0] == 413
    assert ask(address, "POST", "/v1/prefill", b"[" * 50_000)[0] == 400
    assert ask(address, "POST", "/v1/prefill", b"\xff\xfe")[0] == 400
    assert post(address, "/v1/prefill", cache())[0] == 200


def test_a_slow_body_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "STALL_SECONDS", 0.3)

    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(1)
        yield b"}"

    status, body = ask(address, "POST", "/v1/prefill", slowly())
    assert status == 408 and "took longer" in message(body)


def test_a_client_that_does_not_take_its_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds up the others no longer than STALL_SECONDS, and its answer is not computed to the end."""
    monkeypatch.setattr(service, "STALL_SECONDS", 0.5)
    big = load_lm(tiny_model("qwen3", num_hidden_layers=40, max_position_embeddings=4096), tokenizer=LM.tokenizer)
    address = served(big, keep_bytes=0)
    owner = json.loads(Owner.of(big).model_dump_json())
    body = json.dumps(cache(model=owner, rows=[[4] * 4000], num_layers=40)).encode()  # 40 MB of answer
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as stuck:
        head = f"POST /v1/prefill HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}"
        stuck.sendall(head.encode() + b"\r\n\r\n" + body)
        stuck.recv(100)
        began = time.monotonic()
        assert post(address, "/v1/prefill", cache(model=owner))[0] == 200
        assert time.monotonic() - began < 20


def test_a_client_that_leaves_with_much_under_way_lets_go_of_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room for a further layer the computation waits; it ends when nobody is there, not STALL_SECONDS later."""
    layers: list[int] = []
    original = service.layer_content
    monkeypatch.setattr(service, "layer_content", lambda i, coded: layers.append(i) or original(i, coded))
    big = load_lm(tiny_model("qwen3", num_hidden_layers=40, max_position_embeddings=4096), tokenizer=LM.tokenizer)
    address = served(big, keep_bytes=0)
    owner = json.loads(Owner.of(big).model_dump_json())
    body = json.dumps(cache(model=owner, rows=[[4] * 4000], num_layers=40)).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/prefill HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}"
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        client.recv(100)
        known = -1
        while known < len(layers):  # until it waits
            known = len(layers)
            time.sleep(2)
        assert service.MAX_AHEAD < known < 40
    began = time.monotonic()
    assert post(address, "/v1/prefill", cache(model=owner))[0] == 200
    assert time.monotonic() - began < service.STALL_SECONDS


def test_what_was_read_lately_is_kept_within_its_bytes() -> None:
    rows = [Read(list(range(n, n + 9)), prefill_prompts(LM, [list(range(n, n + 10))]).kv) for n in range(4, 9)]
    sharer = service.Sharer(LM, keep_bytes=3 * rows[0].kv.nbytes)
    for count, row in enumerate(rows, 1):
        sharer._keep(row)
        assert [kept.ids for kept in sharer._recent] == [r.ids for r in rows[max(0, count - 3) : count]]
    sharer._keep(Read([4] * 40, prefill_prompts(LM, [[4] * 41]).kv))  # more than all of it
    assert len(sharer._recent) == 3


def test_a_client_that_leaves_stops_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    address, layers, go = served(LM, keep_bytes=0), [], threading.Event()
    original = service.layer_content

    def slow(index: int, coded: Any) -> bytes:
        layers.append(index)
        if index == 0:
            return original(index, coded)
        assert go.wait(10)
        return original(index, coded)

    monkeypatch.setattr(service, "layer_content", slow)
    body = json.dumps(cache(num_layers=4)).encode()
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/prefill HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}"
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        client.recv(100)
    time.sleep(0.5)
    go.set()
    assert post(address, "/v1/prefill", cache(num_layers=1))[0] == 200
    assert layers in ([0, 0], [0, 1, 0])  # the first of a request may be taken before it is known that nobody is there


def test_too_many_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_WAITING", 2)
    address, go = served(LM, keep_bytes=0), threading.Event()
    original = service.layer_content
    monkeypatch.setattr(service, "layer_content", lambda i, c: go.wait(10) and original(i, c))
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(post(address, "/v1/prefill", cache())[0])) for _ in "ab"]
    for thread in threads:
        thread.start()
    time.sleep(0.5)
    status, body = post(address, "/v1/prefill", cache())
    assert status == 503 and "are waiting already" in message(body)
    go.set()
    for thread in threads:
        thread.join(20)
    assert statuses == [200, 200] and post(address, "/v1/prefill", cache())[0] == 200


def test_many_threads_at_once() -> None:
    """Requests from several threads get the answers to their own prompts."""
    pair = pair_of("llama", "qwen3")
    remote = RemoteSharer(served(pair.sharers[0]))
    away = C2C(pair.receiver, [remote], list(pair.fusers))  # type: ignore[arg-type]
    expected = [pair.prefill(chat).kv.keys for chat in CHATS]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(3):
            if not torch.allclose(away.prefill(CHATS[i]).kv.keys, expected[i], atol=1e-5):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i % 3,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.sampled_from(["/v1/prefill", "/v1/render"]), st.data())
def test_hostile_bodies(address: str, path: str, data: st.DataObject) -> None:
    """Any bytes, any JSON, and good requests with one field that is anything: an answer each time, never a 500."""
    good = cache() if path == "/v1/prefill" else text()
    kind = data.draw(st.sampled_from(["bytes", "json", "field"]))
    if kind == "bytes":
        body = data.draw(st.binary(max_size=200))
    elif kind == "json":
        body = json.dumps(data.draw(JSON)).encode()
    else:
        body = json.dumps({**good, data.draw(st.sampled_from(sorted(good))): data.draw(JSON)}).encode()
    status, answer = ask(address, "POST", path, body)
    assert status in (200, 400, 409, 413) and len(answer) < 100_000
    if status != 200:
        assert 0 < len(message(answer)) < 1000


def test_connections_that_say_nothing_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And keep nobody out meanwhile; nor do those that begin to."""
    monkeypatch.setattr(Patient, "SECONDS", 0.5)
    address = served(LM, max_tokens=256)
    host, port = address.removeprefix("http://").split(":")
    silent = [socket.create_connection((host, int(port))) for _ in range(80)]
    silent[0].sendall(b"POST /v1/prefill HTTP/1.1\r\nHost: local")
    assert post(address, "/v1/prefill", cache())[0] == 200
    for client in silent:
        client.settimeout(30)
        assert client.recv(100) == b""
        client.close()
    monkeypatch.setattr(service, "STALL_SECONDS", 30.0)
    with socket.create_connection((host, int(port))) as client:  # a head in time, and a body after the moment
        body = json.dumps(cache()).encode()
        head = f"POST /v1/prefill HTTP/1.1\r\n{HEAD}Content-Length: {len(body)}"
        client.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode())
        time.sleep(1.0)
        client.sendall(body)
        client.settimeout(30)
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_a_layer_is_sent_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own time to be taken, and what arrives is the same."""
    prompt = pair_of("llama", "qwen3").encode(CHATS[1])
    whole = post(address := served(LM, max_tokens=256), "/v1/prefill", cache(rows=[list(prompt.sharers[0])]))
    monkeypatch.setattr(service, "PIECE", 100)
    assert post(address, "/v1/prefill", cache(rows=[list(prompt.sharers[0])])) == whole and whole[0] == 200


def test_another_name_is_not_answered_without_a_key(address: str) -> None:
    assert ask(address, "GET", "/v1/model", Host="evil.example")[0] == 403
    assert ask(address, "GET", "/v1/model", Host="localhost:1")[0] == 200


def test_a_key_that_no_header_holds(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break around it, as files have, goes; one that is refused is not repeated."""
    there = served(LM, key="open sesame")
    assert RemoteSharer(there, key=" open sesame\n").vocab_size == LM.vocab_size
    for key in ("open\nsesame", "ouvre-toi, sésame"):
        monkeypatch.setenv(KEY_VARIABLE, key)
        with pytest.raises(C2CError, match="aren't printable ASCII") as refused:
            RemoteSharer(there)
        assert "sesame" not in str(refused.value) and "ouvre" not in str(refused.value)


def test_it_can_not_listen_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(C2CError, match="can't listen on"):
        service.serve(service.Sharer(LM), "127.0.0.1", taken.getsockname()[1], None, print)
