"""The server as its clients see it: OpenAI's own client, raw requests, good and bad, and a worker that is killed."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cache2cache.pair import C2C
from cache2cache.serving import document as documents
from cache2cache.serving import engine as service
from cache2cache.serving import openai as openai_server
from cache2cache.serving.engine import EngineError, Job, Limits, PairEngine, PairSpec, Piece
from serving.conftest import Here, Served, spec_of
from serving.wire import HEAD, ask

CHAT: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
OTHER: list[Any] = [{"role": "user", "content": "Plants"}]


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pair(tiny_pair_folder: Path) -> C2C:
    root = tiny_pair_folder.parent
    return C2C.from_pretrained(tiny_pair_folder, receiver=root / "llama", sharers=root / "qwen3")


def post(served: Served, body: Any, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, answer = ask(served.address, "POST", path, raw, **headers)
    return status, json.loads(answer)


def good(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": CHAT, "max_tokens": 4, "temperature": 0, **changes}


def number(served: Served, name: str) -> float:
    """A metric, summed over its labels."""
    lines = ask(served.address, "GET", "/metrics")[1].decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith((name + "{", name + " ")))


def settle(served: Served) -> None:
    """Wait until nothing is asked any more."""
    deadline = time.monotonic() + 30
    while any(engine.waiting or engine.running for engine in served.engines):
        assert time.monotonic() < deadline, "stuck"
        time.sleep(0.05)


# ---- the official client ---------------------------------------------------------------------------------------------


def test_chat(client: openai.OpenAI, pair: C2C) -> None:
    for model, sharer in (("tiny", True), ("tiny:receiver", False)):
        answer = client.chat.completions.create(model=model, messages=CHAT, max_tokens=9, temperature=0)
        options = {} if sharer else {"sharer_mask": 0}
        assert answer.choices[0].message.content == pair.chat(CHAT, max_new_tokens=9, do_sample=False, **options)
        assert answer.choices[0].finish_reason == "length" and answer.object == "chat.completion"
        prompt = len(pair.encode(CHAT).receiver)
        assert answer.usage and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 9)
        assert answer.usage.total_tokens == prompt + 9
        assert (answer.c2c["bytes_passed"] > 0) == sharer  # type: ignore[attr-defined]


def test_streaming_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=9, temperature=0)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=CHAT,
            max_tokens=9,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage and whole.usage and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 6


def test_async_client(served: Served, pair: C2C) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0) as client:

            async def one(chat: list[Any], stream: bool) -> str:
                settings: dict[str, Any] = {"model": "tiny", "messages": chat, "max_tokens": 7, "temperature": 0}
                if not stream:
                    return str((await client.chat.completions.create(**settings)).choices[0].message.content)
                text = ""
                async for chunk in await client.chat.completions.create(stream=True, **settings):
                    text += chunk.choices[0].delta.content or ""
                return text

            return await asyncio.gather(*(one(chat, stream) for chat in (CHAT, OTHER) for stream in (False, True)))

    expected = [pair.chat(chat, max_new_tokens=7, do_sample=False) for chat in (CHAT, OTHER)]
    assert asyncio.run(run()) == [expected[0], expected[0], expected[1], expected[1]]


def test_completions(client: openai.OpenAI, pair: C2C) -> None:
    answer = client.completions.create(model="tiny", prompt=["Plants make", "Iron"], max_tokens=5, temperature=0, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    for prompt, two in zip(["Plants make", "Iron"], (answer.choices[:2], answer.choices[2:]), strict=True):
        expected = "".join(c.text for c in pair.stream(prompt, max_new_tokens=5, do_sample=False))
        assert [choice.text for choice in two] == [expected] * 2
    chunks = list(client.completions.create(model="tiny", prompt="Iron", max_tokens=5, temperature=0, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    ids = pair.receiver.need_tokenizer()("Iron").input_ids
    by_ids = client.completions.create(model="tiny:receiver", prompt=ids, max_tokens=5, temperature=0)
    assert by_ids.choices[0].text == client.completions.create(
        model="tiny:receiver", prompt="Iron", max_tokens=5, temperature=0
    ).choices[0].text  # fmt: skip


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=CHAT, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    )
    tokens = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert tokens and len(tokens) == 5
    for token in tokens:
        assert token.logprob <= 0 and token.top_logprobs[0].logprob == token.logprob and len(token.top_logprobs) == 2
    old = client.completions.create(model="tiny", prompt="Iron", max_tokens=5, temperature=0, logprobs=2)
    probs = old.choices[0].logprobs
    assert probs and probs.token_logprobs and probs.top_logprobs and len(probs.token_logprobs) == 5
    assert len(probs.top_logprobs[0]) == 2 and probs.text_offset and probs.text_offset[0] == 0
    zero = client.completions.create(model="tiny", prompt="Iron", max_tokens=5, temperature=0, logprobs=0)
    assert zero.choices[0].logprobs and zero.choices[0].logprobs.token_logprobs == probs.token_logprobs


def test_seed_n_and_stop(client: openai.OpenAI) -> None:
    def texts(**changes: Any) -> list[str | None]:
        asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "n": 3, "seed": 5, **changes}
        return [choice.message.content for choice in client.chat.completions.create(**asked).choices]

    first = texts()
    assert first == texts() and len(set(first)) == 3 and first != texts(seed=6)
    whole = texts(temperature=0, n=1)[0]
    assert whole
    cut = client.chat.completions.create(
        model="tiny", messages=CHAT, max_completion_tokens=8, temperature=0, stop=[whole[3:5]]
    )
    assert cut.choices[0].message.content == whole[: whole.index(whole[3:5])]
    assert cut.choices[0].finish_reason == "stop"


def test_the_field_c2c(client: openai.OpenAI, pair: C2C) -> None:
    def answer(**options: Any) -> str | None:
        asked: dict[str, Any] = {"model": "tiny", "messages": CHAT, "max_tokens": 8, "temperature": 0}
        return client.chat.completions.create(**asked, extra_body={"c2c": options}).choices[0].message.content

    def expected(**options: Any) -> str:
        return str(pair.chat(CHAT, max_new_tokens=8, do_sample=False, **options))

    assert answer(sharers=[]) == expected(sharer_mask=0) != expected()
    assert answer(sharers=[0], mode="sequential") == expected(mode="sequential")
    assert answer(positions="front:0.5") == expected(positions="front:0.5") != expected()
    assert answer(sharers=[pair.sharers[0].name]) == expected()


def test_models(client: openai.OpenAI) -> None:
    ids = [model.id for model in client.models.list()]
    assert ids == ["tiny", "tiny:receiver", "tiny:sharer", "tiny:text"]
    assert client.models.retrieve("tiny:sharer").id == "tiny:sharer"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")
    for name in ids:
        assert client.chat.completions.create(model=name, messages=CHAT, max_tokens=1).choices


def test_content_in_parts_and_what_changes_nothing(client: openai.OpenAI, pair: C2C) -> None:
    parts = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    answer = client.chat.completions.create(
        model="tiny",
        messages=parts,
        max_tokens=5,
        temperature=0,
        user="me",
        presence_penalty=0,
        metadata={"a": "b"},  # type: ignore[arg-type]
    )
    plain = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert answer.choices[0].message.content == pair.chat(plain, max_new_tokens=5, do_sample=False)


def test_later_turns_are_counted(served: Served, client: openai.OpenAI) -> None:
    before = number(served, "c2c_reused_tokens_total")
    chat: list[Any] = [{"role": "user", "content": "Tell me a long story about iron and magnets."}]
    first = client.chat.completions.create(model="tiny", messages=chat, max_tokens=5, temperature=0)
    chat += [{"role": "assistant", "content": first.choices[0].message.content}, {"role": "user", "content": "Go on."}]
    second = client.chat.completions.create(model="tiny", messages=chat, max_tokens=5, temperature=0)
    assert first.usage and second.usage and second.usage.prompt_tokens_details
    known = second.usage.prompt_tokens_details.cached_tokens
    assert known and first.usage.prompt_tokens - 4 <= known < second.usage.prompt_tokens
    assert number(served, "c2c_reused_tokens_total") - before >= known
    assert number(served, "c2c_kept_bytes") > 0 and number(served, "c2c_batch_size_count") > 0
    assert number(served, "c2c_time_to_first_token_seconds_count") > 0


# ---- the wire --------------------------------------------------------------------------------------------------------


def test_a_stream_ends_in_done(served: Served) -> None:
    status, raw = ask(served.address, "POST", "/v1/chat/completions", json.dumps(good(stream=True)).encode())
    events = raw.decode().split("\n\n")
    assert status == 200 and events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])


def test_health(served: Served) -> None:
    assert ask(served.address, "GET", "/health") == (200, b'{"status":"ok"}')
    status, body = ask(served.address, "GET", "/ready")
    assert status == 200 and json.loads(body) == {"ready": True, "models": {"tiny": True}}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b"", 400, None),
        (b"[" * 100_000, 400, None),
        (b'{"model": "\xff"}', 400, None),
        (b'{"model": "\\ud800", "messages": []}', 400, None),
        ({}, 400, "model"),
        (good(model="nothing"), 404, "model"),
        (good(model=3), 400, "model"),
        (good(messages=[]), 400, "messages"),
        (good(messages="Hi"), 400, "messages"),
        (good(messages=[{"role": "tool", "content": "x"}]), 400, "messages.0.role"),
        (good(messages=[{"role": "user", "content": ""}]), 400, None),
        (good(n=0), 400, "n"),
        (good(n=-1), 400, "n"),
        (good(n=10**30), 400, "n"),
        (good(n=100), 400, None),
        (good(n="2"), 400, "n"),
        (good(max_tokens=-5), 400, "max_tokens"),
        (good(max_tokens=10**9), 400, None),
        (good(temperature=-1), 400, "temperature"),
        (good(temperature=3), 400, "temperature"),
        (good(temperature=True), 400, "temperature"),
        (good(top_p=1.5), 400, "top_p"),
        (good(seed=1 << 70), 400, "seed"),
        (good(stop=["a"] * 5), 400, "stop"),
        (good(stop=""), 400, "stop"),
        (good(top_logprobs=3), 400, None),
        (good(logprobs=True, top_logprobs=21), 400, "top_logprobs"),
        (good(tools=[{"type": "function"}]), 400, None),
        (good(response_format={"type": "json_object"}), 400, None),
        (good(nonsense=1), 400, "nonsense"),
        (good(c2c={"sharers": [1]}), 400, "c2c.sharers"),
        (good(c2c={"sharers": ["nobody"]}), 400, "c2c.sharers"),
        (good(c2c={"mode": "both"}), 400, "c2c.mode"),
        (good(c2c={"positions": "front:2"}), 400, "c2c.positions"),
        (good(c2c={"positions": "all"}, model="tiny:receiver"), 400, "c2c"),
        (good(messages=[{"role": "user", "content": "word " * 3000}]), 400, None),
    ],
)
def test_bad_requests(served: Served, body: Any, status: int, param: str | None) -> None:
    got, answer = post(served, body)
    assert got == status
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"] and len(error["message"]) < 1000
    if param is not None:
        assert error["param"].startswith(param)
    assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")


def test_what_other_servers_clients_send_unasked(served: Served) -> None:
    """vllm bench serve, lm-eval's local-chat-completions of 2025; in other values it is refused, as it would count."""
    unasked = {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0, "ignore_eos": False, "skip_special_tokens": True}
    typed = [{**message, "type": "text"} for message in CHAT]
    plain = post(served, good(temperature=0))
    assert plain[0] == 200
    got = post(served, good(temperature=0, messages=typed, **unasked))
    assert got[0] == 200 and got[1]["choices"] == plain[1]["choices"]
    for name, value in (("repetition_penalty", 1.2), ("top_k", 5), ("min_p", 0.1), ("ignore_eos", True)):
        status, answer = post(served, good(**{name: value}))
        assert status == 400 and f"{name} is not supported here" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "where", "words"),
    [
        (good(stop=5), "stop", "valid string or .* valid array"),
        (good(stop=["a"] * 5), "stop", "at most 4 items"),
        (good(stop=["a", 5]), "stop.1", "valid string$"),
        (good(messages=[*CHAT, {"role": "user", "content": 5}]), "messages.1.content", "string or .* valid array"),
        (
            good(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
            "messages.0.content.0.type",
            "should be 'text'$",
        ),
        (good(c2c={"sharers": [0, 1.5]}), "c2c.sharers.1", "valid integer or .* valid string"),
        (good(str=1), "str", "not permitted"),
    ],
)
def test_of_several_kinds_that_is_named_which_was_meant(served: Served, body: Any, where: str, words: str) -> None:
    """And the place as the client knows it, without the kinds of a union in it."""
    _, answer = post(served, body)
    assert answer["error"]["param"] == where and re.match(rf"{where}: .*{words}", answer["error"]["message"])


def test_what_is_null_says_nothing(served: Served, client: openai.OpenAI) -> None:
    """A message from here is sent back as the client's library dumps it."""
    made = client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=3)  # type: ignore[arg-type]
    said = {**made.choices[0].message.model_dump(), "annotations": [], "tool_calls": []}
    assert {"audio", "function_call"} <= said.keys()
    more = [*CHAT, said, {"role": "user", "content": "And?"}]
    assert post(served, good(messages=more, reasoning_effort=None, verbosity=None))[0] == 200
    status, answer = post(served, good(messages=[*CHAT, {**said, "tool_calls": [{}]}]))
    assert status == 400 and answer["error"]["param"] == "messages.1.tool_calls"


def test_without_keys_only_this_machine_is_named(served: Served) -> None:
    """A page elsewhere may let a name of its own lead here, and then reads what it is answered."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "[::2]", ""):
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/chat/completions")):
            status, answer = ask(served.address, method, path, json.dumps(good()).encode(), Host=host)
            assert status == 403 and "without keys only localhost is answered" in answer.decode()
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"):
        assert ask(served.address, "GET", "/v1/models", Host=host)[0] == 200


def test_nobody_is_told_what_others_have_asked(served: Served) -> None:
    cached = []
    for key in ("one", "other", "one"):
        client = openai.OpenAI(base_url=f"{served.address}/v1", api_key=key, max_retries=0)
        chat = [{"role": "user", "content": "The code is 7319. What is the code? " * 2}]
        made = client.chat.completions.create(model="tiny", messages=chat, max_tokens=2, temperature=0)  # type: ignore[arg-type]
        assert made.usage is not None and made.usage.prompt_tokens_details is not None
        cached.append(made.usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == cached[1] == 0 and (cached[2] or 0) > 0


def test_a_worker_is_not_stuck_where_a_client_reads_slowly(served: Served) -> None:
    (engine,) = served.engines
    settle(served)
    engine._heard, engine._ready = 0.0, True
    done, waits = SimpleNamespace(over=True), SimpleNamespace(over=False)
    try:
        for pending, stuck in (([], False), ([done], False), ([done, waits], True)):
            engine._pending = dict(enumerate(pending, -9))  # type: ignore[arg-type]
            assert PairEngine._stuck(engine) is stuck
    finally:
        engine._pending = {}


def test_idle_time_is_no_silence(served: Served) -> None:
    """A worker that had nothing to say for hours isn't stuck with the first request that comes then."""
    (engine,) = served.engines
    settle(served)
    engine._heard = 0.0

    async def asked() -> float:
        (answering,) = engine.submit([Job("Hi", max_tokens=1)])
        heard = engine._heard
        assert not engine._stuck()
        async for _ in answering:
            pass
        return heard

    assert asyncio.run(asked()) > 0


def test_bad_surroundings(served: Served) -> None:
    body = json.dumps(good()).encode()
    assert ask(served.address, "POST", "/v1/chat/completions", body, Content_Type="text/plain")[0] == 415
    assert ask(served.address, "GET", "/v1/chat/completions")[0] == 405
    for path in ("/v1/nothing", "/", "/v1/models/none"):
        status, raw = ask(served.address, "GET", path)
        assert status == 404 and json.loads(raw)["error"]["message"]
    status, answer = post(served, b"x" * ((8 << 20) + 1))
    assert status == 413 and answer["error"]["code"] == "body_too_large"
    assert post(served, good(prompt="x"), "/v1/completions")[0] == 400
    assert post(served, {"model": "tiny:text", "prompt": "x"}, "/v1/completions")[0] == 400
    assert post(served, {"model": "tiny", "prompt": [[1, 5000]]}, "/v1/completions")[0] == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_hostile_bodies(served: Served, data: st.DataObject) -> None:
    """Any JSON, and good requests with one field that is anything: an answer each time, never a 5xx."""
    path = data.draw(st.sampled_from(["/v1/chat/completions", "/v1/completions"]))
    fields = good(stream=data.draw(st.booleans()))
    if path == "/v1/completions":
        fields["prompt"] = fields.pop("messages")[0]["content"]
    names = [*fields, "n", "stop", "seed", "top_p", "logprobs", "top_logprobs", "c2c", "stream_options", "logit_bias"]
    body: Any = data.draw(JSON)
    if data.draw(st.booleans()):
        body = {**fields, data.draw(st.sampled_from(names)): body}
    status, raw = ask(served.address, "POST", path, json.dumps(body).encode())
    assert status in (200, 400, 404)
    if status != 200:
        assert 0 < len(json.loads(raw)["error"]["message"]) < 1000


def test_schemathesis_finds_nothing(served: Served) -> None:
    """No 5xx, and every answer is what the document says."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    conform = [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    document = json.loads(ask(served.address, "GET", "/openapi.json")[1])
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["c2c"]
    for asks in ("chat/completions", "completions"):
        answers = document["paths"][f"/v1/{asks}"]["post"]["responses"]
        assert set(answers) == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
    schema = schemathesis.openapi.from_dict(document)
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()
        tried.add(operation.label)

        @settings(max_examples=25, deadline=None, derandomize=True, database=None)
        @given(case=operation.as_strategy(), negative=st.none())
        def probe(case: Any, negative: None) -> None:
            if isinstance(case.body, dict) and "max_tokens" in case.body:
                case.body["max_tokens"] = min(case.body["max_tokens"] or 4, 4)
            case.call_and_validate(base_url=served.address, timeout=60, checks=conform)

        probe()
    assert {"POST /v1/chat/completions", "POST /v1/completions", "GET /v1/models", "GET /metrics"} <= tried


def test_answers_are_what_the_document_says(served: Served) -> None:
    chat, completion = documents.ChatCompletion, documents.Completion
    chat.model_validate(post(served, good(n=2, logprobs=True, top_logprobs=2))[1])
    chat.model_validate(post(served, good(model="tiny:text"))[1])
    body = {"model": "tiny", "prompt": ["Iron", "Plants"], "max_tokens": 3}
    completion.model_validate(post(served, body, "/v1/completions")[1])
    completion.model_validate(post(served, {**body, "logprobs": 2}, "/v1/completions")[1])
    documents.Error.model_validate(post(served, b"")[1])
    for path, kind in (("models", documents.ModelList), ("models/tiny:text", documents.ModelCard)):
        kind.model_validate_json(ask(served.address, "GET", f"/v1/{path}")[1])


def test_bodies_that_are_wrong_in_many_places(served: Served) -> None:
    """The first place is said, and the others are not even looked for."""
    for body, path in (
        ({"model": "tiny", "prompt": [-1] * 300_000}, "/v1/completions"),
        ({"model": "tiny", "prompt": [[]] * 300_000}, "/v1/completions"),
        (good(**{f"field{i}": 1 for i in range(50_000)}), "/v1/chat/completions"),
        (good(messages=[{f"field{i}": 1 for i in range(50_000)}]), "/v1/chat/completions"),
        (good(messages=[{}] * 2048), "/v1/chat/completions"),
    ):
        kind = openai_server.ChatRequest if "messages" in body else openai_server.CompletionRequest
        with pytest.raises(ValidationError) as caught:
            kind.model_validate_json(json.dumps(body))
        assert caught.value.error_count() < 200
        assert post(served, body, path)[0] == 400


def test_the_log_holds_no_prompts(served: Served) -> None:
    served.records.clear()
    post(served, good(messages=[{"role": "user", "content": "a secret"}]))
    post(served, good(model="nothing"))
    fine, bad = served.records
    assert fine["status"] == 200 and fine["model"] == "tiny" and fine["new_tokens"] == 4 and fine["seconds"] > 0
    assert fine["first_token_s"] > 0 and bad["status"] == 404
    assert "secret" not in json.dumps(served.records)


# ---- load, leaving, dying --------------------------------------------------------------------------------------------


def test_many_at_once_are_not_mixed_up(served: Served, pair: C2C) -> None:
    chats = [[{"role": "user", "content": f"Plants {'and light ' * (i % 5)}{i}?"}] for i in range(12)]
    expected = [pair.chat(chat, max_new_tokens=6, do_sample=False) for chat in chats]

    def one(i: int) -> str:
        body = good(messages=chats[i], max_tokens=6, stream=bool(i % 2))
        status, raw = ask(served.address, "POST", "/v1/chat/completions", json.dumps(body).encode())
        assert status == 200, raw
        if not i % 2:
            return str(json.loads(raw)["choices"][0]["message"]["content"])
        events = [json.loads(e[6:]) for e in raw.decode().split("\n\n") if e and e != "data: [DONE]"]
        return "".join(c["delta"].get("content", "") for e in events for c in e["choices"])

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(12))) == expected


def leave(served: Served, body: dict[str, Any], after: int) -> None:
    """Ask, read so many bytes, hang up."""
    raw = json.dumps(body).encode()
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{HEAD}"
        client.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        if after:
            client.recv(after)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_job(served: Served, stream: bool) -> None:
    settle(served)
    time.sleep(0.5)  # a stream's record comes when its client has read it
    served.records.clear()
    before = number(served, "c2c_new_tokens_total")
    leave(served, good(max_tokens=64, stream=stream, n=4), after=100 if stream else 0)
    settle(served)
    assert number(served, "c2c_new_tokens_total") - before < 4 * 64
    deadline = time.monotonic() + 30
    while not served.records:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [record["status"] for record in served.records] == [499]
    assert post(served, good())[0] == 200


def test_giving_up_at_the_moment_of_an_event(served: Served) -> None:
    """A reader that is cancelled as an event arrives ends; it doesn't wait for who reads no more."""

    async def ends(ticks: int) -> bool:
        (answering,) = served.engines[0].submit([Job(CHAT, max_tokens=64)])
        reading = asyncio.create_task(anext(answering))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        answering.push(Piece(0, "here"))
        for _ in range(ticks):
            await asyncio.sleep(0)
        cancelled = reading.cancel()
        await asyncio.wait([reading])
        answering.close()
        return not cancelled or reading.cancelled()

    assert all(asyncio.run(ends(ticks)) for ticks in range(6))
    settle(served)


def test_a_client_that_leaves_while_it_sends(served: Served) -> None:
    settle(served)
    served.records.clear()
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST /v1/completions HTTP/1.1\r\n{HEAD}Content-Length: 100\r\n\r\n"
        client.sendall(head.encode() + b"{")
    deadline = time.monotonic() + 30
    while not served.records:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [record["status"] for record in served.records] == [499]
    assert 'status="500"' not in ask(served.address, "GET", "/metrics")[1].decode()


def test_bodies_of_many_are_bounded_together(tiny_pair_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sends while others hold the server's memory is told to come back; who hangs up gives it back."""
    monkeypatch.setattr(openai_server, "MAX_BODIES", 1_000_500)
    server = Served([Here("tiny", spec_of(tiny_pair_folder), Limits())]).start()
    host, port = server.address.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\n{HEAD}"
    head += "Content-Length: 8000000\r\n\r\n"
    try:
        assert post(server, good())[0] == 200
        clients: list[socket.socket] = []
        deadline = time.monotonic() + 30

        def asks() -> tuple[int, Any]:
            assert time.monotonic() < deadline
            return post(server, json.dumps(good()).encode() + b" " * 1000)

        # More than two, since one whose bytes arrive beside those of a whole request is itself refused.
        while (answered := asks())[0] == 200:
            clients.append(socket.create_connection((host, int(port))))
            clients[-1].sendall(head.encode() + b" " * 500_000)
            time.sleep(0.1)
        assert answered[0] == 429 and answered[1]["error"]["type"] == "rate_limit_error"
        assert len(clients) >= 2 and ask(server.address, "GET", "/health")[0] == 200
        for client in clients:
            client.close()
        while (answered := asks())[0] == 429:
            time.sleep(0.01)
        assert answered[0] == 200
    finally:
        server.stop()


def test_a_list_of_prompts_is_taken_as_a_whole(tiny_pair_folder: Path) -> None:
    """All of them or none, also where they are more than may wait."""
    engine = Here("tiny", spec_of(tiny_pair_folder), Limits(max_waiting=2, max_batch=4))
    server = Served([engine]).start()
    try:
        asked = {"model": "tiny", "prompt": [f"Iron {i}" for i in range(9)], "max_tokens": 2, "temperature": 0}
        status, answer = post(server, asked, "/v1/completions")
        assert status == 200 and [choice["index"] for choice in answer["choices"]] == list(range(9))
        settle(server)

        async def full() -> tuple[str, int]:
            job = Job(CHAT, max_tokens=64)
            taken = engine.submit([job] * 2)
            try:
                engine.submit([job] * 3)
            except EngineError as error:
                return error.reason, engine.waiting + engine.running
            finally:
                for answering in taken:
                    answering.close()
            return "taken", 0

        assert asyncio.run(full()) == ("busy", 2)
        settle(server)
    finally:
        server.stop()


def test_a_worker_that_dies_and_one_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are logged and started again, the latter after ever longer pauses; meanwhile the engine isn't ready."""
    up, down = threading.Event(), threading.Event()

    class Scripted(PairEngine):
        turns = iter(["dies", "fails", "fails", "stays"])

        def _run_worker(self) -> str | None:
            turn = next(self.turns)
            if turn == "fails":
                assert not self.ready
                return "no memory"
            self._hear("ready", "about")
            if turn == "stays":
                up.set()
                self._wake.wait()
            else:
                down.wait(30)
            return None

    monkeypatch.setattr(service, "_PAUSES", (0.0, 0.01, 0.02, 0.03))
    records: list[dict[str, Any]] = []
    engine = Scripted("tiny", PairSpec(), log=records.append)
    engine.start()
    assert engine.ready and not records
    down.set()
    assert up.wait(30)
    assert [(r["event"], r.get("again_in_s"), r["restarts"]) for r in records] == [
        ("worker_died", 0.0, 1),
        ("worker_failed", 0.01, 2),
        ("worker_failed", 0.02, 3),
        ("worker_ready", None, 3),
    ]
    assert records[1]["error"] == "no memory" and "exit_code" in records[0] and engine.ready
    engine.close()


def test_too_many_are_told_to_come_back(tiny_pair_folder: Path) -> None:
    engine = PairEngine("tiny", spec_of(tiny_pair_folder), Limits(max_waiting=2, max_batch=1, max_new_tokens=200))
    server = Served([engine]).start(keys=["one", "two"], timeout=120)
    try:
        assert post(server, good())[0] == 401 and post(server, good(), Authorization="Bearer three")[0] == 401
        assert ask(server.address, "GET", "/health")[0] == 200
        body = json.dumps(good(max_tokens=100)).encode()

        def one(i: int) -> tuple[int, str | None, Any]:
            connection = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=150)
            headers = {"Content-Type": "application/json", "Authorization": "Bearer two"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            response = connection.getresponse()
            return response.status, response.headers.get("Retry-After"), json.loads(response.read())

        with ThreadPoolExecutor(12) as pool:
            answers = list(pool.map(one, range(12)))
        refused = [answer for answer in answers if answer[0] != 200]
        assert 12 - len(refused) >= 2 and refused
        for status, retry, answer in refused:
            assert status == 429 and retry and int(retry) >= 1 and answer["error"]["type"] == "rate_limit_error"
        killed_under_load(server)
        stuck(server)
        stops_gracefully(server)
    finally:
        server.stop()


def killed_under_load(server: Served) -> None:
    """Ready turns false, who waits gets 503, and the worker comes back."""
    (engine,) = server.engines
    key = {"Authorization": "Bearer one"}
    with ThreadPoolExecutor(3) as pool:
        deadline = time.monotonic() + 20
        asked = [pool.submit(post, server, good(max_tokens=200), **key)]
        while not engine.running:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        asked += [pool.submit(post, server, good(max_tokens=200), **key) for _ in range(2)]
        while not engine.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        statuses = [one.result(30)[0] for one in asked]
    assert 503 in statuses and set(statuses) <= {200, 503}
    status, body = ask(server.address, "GET", "/ready")
    assert status == 503 and json.loads(body)["models"] == {"tiny": False}
    status, answer = post(server, good(), **key)
    assert status == 503 and answer["error"]["code"] == "unavailable"
    comes_back(server)
    assert post(server, good(), **key)[0] == 200 and engine.restarts == 1


def comes_back(server: Served) -> None:
    deadline = time.monotonic() + 120
    while ask(server.address, "GET", "/ready")[0] != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def stuck(server: Served) -> None:
    """A worker that says nothing for longer than a request may take is started again; one with nothing to do isn't."""
    (engine,) = server.engines
    key = {"Authorization": "Bearer one"}
    limits, engine.limits = engine.limits, replace(engine.limits, silence=2.0)
    assert engine.pid
    os.kill(engine.pid, signal.SIGSTOP)
    time.sleep(4)
    assert engine.ready
    status, answer = post(server, good(), **key)
    assert status == 503 and answer["error"]["code"] == "unavailable"
    comes_back(server)
    assert post(server, good(), **key)[0] == 200 and engine.restarts == 2
    engine.limits = limits


def stops_gracefully(server: Served) -> None:
    """What runs ends well; what waits is refused."""
    (engine,) = server.engines
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(post, server, good(max_tokens=150), Authorization="Bearer one")
        while not engine.running:
            time.sleep(0.005)
        waiting = pool.submit(post, server, good(max_tokens=150), Authorization="Bearer one")
        while not engine.waiting:
            time.sleep(0.005)
        server.stop()
        status, answer = running.result(30)
        assert status == 200 and answer["usage"]["completion_tokens"] > 0
        assert waiting.result(30)[0] == 503
    assert not engine.ready


def test_a_request_that_takes_too_long(served: Served) -> None:
    async def run() -> str:
        try:
            async for _ in served.engines[0].submit([Job(CHAT, max_tokens=64, timeout=0.02)])[0]:
                pass
        except EngineError as error:
            return error.reason
        return "answered"

    assert asyncio.run(run()) == "timeout"
    settle(served)


def test_models_that_are_missing(tiny_pair_folder: Path) -> None:
    engine, before = PairEngine("none", spec_of(tiny_pair_folder / "nothing")), threading.active_count()
    with pytest.raises(Exception, match="no fuser at"):
        engine.start()
    assert not engine.ready and threading.active_count() <= before + 3
