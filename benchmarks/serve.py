"""A load on the server: many clients at once against the same requests one at a time; and one that misbehaves.

python benchmarks/serve.py                                  # the default pair, 32 clients × 4 requests
python benchmarks/serve.py --clients 4 --requests 2         # fewer
python benchmarks/serve.py --chaos 1000 --fuser FOLDER …    # random cancellations, disconnects and malformed bodies

The load: prompts of mixed lengths up to 64 tokens, 128 new tokens, greedy, half of the requests streaming. Every answer
is compared with the library's own to the same chat: a sample asked and clocked one at a time, the others in batches,
and one at a time where the batch's answer is another. Reported: requests lost, answers that differ, throughput over
that of one at a time, time to first token under load. Then a second turn behind a history of 1,000 tokens: its time to
first token over what plain transformers take to read its new tokens, of both models, behind their caches of the rest;
and whether its tokens are those without reuse.

The chaos: nothing may be lost, stuck or answered with the wrong code, and memory is back within 5 %.

Each criterion is printed with its target and what was measured; the exit status is 1 where one is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import measure
import torch
from first_token import again, plain_prefill

from cache2cache import heap
from cache2cache.cli.options import load_pair
from cache2cache.kv import CACHE, common_start, lowest_layers
from cache2cache.models.load import LM
from cache2cache.pair import C2C
from cache2cache.serving.engine import EngineError, Finished, Job, Limits, PairEngine, PairSpec, Piece, Started

WORDS = [
    "iron",
    "water",
    "light",
    "stone",
    "river",
    "metal",
    "plant",
    "heat",
    "salt",
    "glass",
    "wood",
    "sand",
    "wind",
    "ice",
    "fire",
]


def prompts(pair: C2C, count: int, seed: int) -> list[list[dict[str, str]]]:
    """Chats of mixed lengths, up to 64 tokens of the receiver."""
    drawn, chats = random.Random(seed), []
    while len(chats) < count:
        words = " ".join(drawn.choices(WORDS, k=drawn.randint(3, 40)))
        chat = [{"role": "user", "content": f"Number {len(chats)}: tell me about {words}."}]
        if len(pair.encode(chat).receiver) <= 64:
            chats.append(chat)
    return chats


def say(text: str) -> None:
    """Where a run of minutes is."""
    print(text, file=sys.stderr, flush=True)


# ---- HTTP, with what misbehaving takes -------------------------------------------------------------------------------


async def request(address: str, raw: bytes, *, leave_after: float | None = None) -> tuple[int, bytes, float | None]:
    """Status, body and seconds to the first text of a stream (None: it isn't one); status 0 if this client left."""
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    began, first = time.perf_counter(), None
    try:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += "Content-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode() + raw)
        await writer.drain()
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            return 0, b"", None
        answer = b""
        while piece := await asyncio.wait_for(reader.read(65536), 600):
            answer += piece
            top, _, body = answer.partition(b"\r\n\r\n")
            streams = b"text/event-stream" in top.lower()
            if first is None and streams and b'"content":"' in body.replace(b'"content":""', b""):
                first = time.perf_counter() - began
        top, _, body = answer.partition(b"\r\n\r\n")
        if b"chunked" in top.lower():
            body = unchunked(body)
        return int(top.split(maxsplit=2)[1]), body, first
    finally:
        writer.close()


def unchunked(body: bytes) -> bytes:
    out = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        out, body = out + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return out


def text_of(body: bytes, stream: bool) -> str:
    if not stream:
        return str(json.loads(body)["choices"][0]["message"]["content"])
    events = body.decode().split("\n\n")
    if events[-2:] != ["data: [DONE]", ""]:
        raise ValueError("the stream has no end")
    chunks = [json.loads(event[6:]) for event in events[:-2]]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


def start(engine: PairEngine, **settings: Any) -> tuple[str, Callable[[], None]]:
    """The server in a thread: its address, and what stops it."""
    from cache2cache.serving import openai

    up, found = threading.Event(), {}

    def ready(address: str) -> None:
        found["address"] = address
        up.set()

    def run() -> None:
        openai.serve(
            [engine],
            "127.0.0.1",
            0,
            ready=ready,
            make=lambda: openai.make_app([engine], **settings),
            on_server=lambda server: found.update(server=server),
        )

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while not up.wait(1):
        if not thread.is_alive():
            raise SystemExit("the server didn't start")

    def stop() -> None:
        found["server"].should_exit = True
        thread.join()

    return found["address"], stop


# ---- the load --------------------------------------------------------------------------------------------------------


async def load(address: str, chats: list[Any], clients: int, new: int) -> tuple[list[Any], float]:
    """Every client asks its share, one request after the other; half of the requests stream."""
    results: list[Any] = [None] * len(chats)

    async def client(number: int) -> None:
        for i in range(number, len(chats), clients):
            stream = (i // clients + i) % 2 == 0
            asked = {"model": "pair", "messages": chats[i], "max_tokens": new, "temperature": 0, "stream": stream}
            status, body, first = await request(address, json.dumps(asked).encode())
            results[i] = (status, text_of(body, stream) if status == 200 else body, first)

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return results, time.perf_counter() - began


def run_load(pair: C2C, address: str, args: argparse.Namespace) -> dict[str, Any]:
    chats = prompts(pair, args.clients * args.requests, args.seed)
    results, together = asyncio.run(load(address, chats, args.clients, args.new))
    say(f"{len(chats)} requests of {args.clients} clients answered in {together:.1f} s; now the library")
    sample = range(0, len(chats), max(1, len(chats) // args.alone))

    def library(index: int) -> str:
        return str(pair.chat(chats[index], max_new_tokens=args.new, do_sample=False))

    began = time.perf_counter()
    expected = {i: library(i) for i in sample}
    one_by_one = (time.perf_counter() - began) / len(expected) * len(chats)
    say(f"{len(expected)} of them one at a time: {one_by_one:.1f} s for all; now the others in batches")
    others = [i for i in range(len(chats)) if i not in expected]
    for begin in range(0, len(others), 16):
        some = others[begin : begin + 16]
        batch = pair.chat([chats[i] for i in some], max_new_tokens=args.new, do_sample=False)
        expected.update(zip(some, map(str, batch), strict=True))
    different = sum(results[i][1] != text and results[i][1] != library(i) for i, text in expected.items())
    lost = sum(result is None or result[0] != 200 for result in results)
    firsts = sorted(first for _, _, first in results if first is not None)
    return {
        "requests": len(chats),
        "clients": args.clients,
        "new_tokens": args.new,
        "lost": lost,
        "compared": len(expected),
        "different": different,
        "seconds": together,
        "one_at_a_time_seconds": one_by_one,
        "throughput_ratio": one_by_one / together,
        "first_token_s": {"median": median(firsts), "worst": firsts[-1], "of": len(firsts)} if firsts else {},
    }


def plain_pass(lm: LM, num_layers: int, ids: Sequence[int], known: int) -> Callable[[], None]:
    """What reads the tokens behind the first `known` ones, whose cache is there, as transformers does it."""
    past = plain_prefill(lm, [list(ids[:known])], num_layers)
    decoder = lm.decoder if num_layers == lm.num_layers else lowest_layers(lm.decoder, num_layers)
    new = torch.tensor([list(ids[known:])], device=lm.device)

    @torch.no_grad()
    def read() -> None:
        decoder(input_ids=new, use_cache=True, **{CACHE: again(past)})

    return read


def run_turns(pair: C2C, engine: PairEngine, history: int) -> dict[str, Any]:
    """A second turn: time to first token against reading what is new, and its tokens with and without reuse."""

    async def ask(chat: list[Any], new: int) -> tuple[str, float, int, int]:
        began, first, text, started = time.perf_counter(), 0.0, "", None
        async for event in engine.submit([Job(chat, max_tokens=new)])[0]:
            if isinstance(event, Started):
                started = event
            elif isinstance(event, Piece):
                first, text = first or time.perf_counter() - began, text + event.text
        assert started is not None
        return text, first, started.prompt_tokens, started.reused

    words = random.Random(0).choices(WORDS, k=history)
    while len(pair.encode([{"role": "user", "content": " ".join(words)}]).receiver) > history:
        words.pop()
    chat: list[Any] = [{"role": "user", "content": " ".join(words)}]
    told, _, _, _ = asyncio.run(ask(chat, 16))
    chat += [{"role": "assistant", "content": told}, {"role": "user", "content": "Which of these is the hardest?"}]
    text, first, tokens, reused = asyncio.run(ask(chat, 16))
    begin, prompt = pair.encode(chat[:1]), pair.encode(chat)
    passes = [plain_pass(pair.receiver, pair.receiver.num_layers, prompt.receiver, reused)]
    for sharer, fuser, old, ids in zip(pair.sharers, pair.fusers, begin.sharers, prompt.sharers, strict=True):
        passes.append(plain_pass(sharer, fuser.sharer_depth, ids, len(common_start([old, ids]))))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        for read in passes:
            read()
        seconds.append(time.perf_counter() - began)
    return {
        "history_tokens": history,
        "prompt_tokens": tokens,
        "reused_tokens": reused,
        "first_token_s": first,
        "reading_new_s": median(seconds),
        "ratio": first / median(seconds),
        "same_tokens": text == pair.chat(chat, max_new_tokens=16, do_sample=False),
    }


# ---- the chaos -------------------------------------------------------------------------------------------------------

BAD = [b"", b"{", b"[]", b'{"model": 1}', b'{"model": "pair", "messages": []}', b"\xff\xfe", b"[" * 5000]
REFUSED = {400, 429}
WARM_UP = 150  # requests, after which memory hardly grows


async def chaos(address: str, count: int, seed: int, at_once: int = 24) -> dict[int, int]:
    """So many requests, of which a third leaves early and a quarter is malformed; returns how often which status came.

    Raises an AssertionError for an answer that isn't the right one.
    """
    statuses: dict[int, int] = {}
    gate = asyncio.Semaphore(at_once)

    async def one(i: int) -> None:
        drawn = random.Random(seed * 1_000_003 + i)
        async with gate:
            kind = drawn.random()
            stream, n = drawn.random() < 0.5, drawn.choice([1, 1, 1, 2])
            chat = [{"role": "user", "content": " ".join(drawn.choices(WORDS, k=drawn.randint(1, 30)))}]
            asked: dict[str, Any] = {"model": drawn.choice(["pair", "pair", "pair:receiver"]), "messages": chat, "n": n}
            asked.update(stream=stream, max_tokens=drawn.randint(1, 24), temperature=drawn.choice([0, 1]))
            if kind < 0.25:
                long = {"messages": chat * 3000}
                wrong = drawn.choice([{"n": -1}, {"max_tokens": "x"}, {"temperature": 9}, long, {}])
                raw = json.dumps({**asked, **wrong}).encode() if wrong else drawn.choice(BAD)
                status, body, _ = await request(address, raw)
                assert status in REFUSED, (status, body[:200])
                assert json.loads(body)["error"]["message"]
            elif kind < 0.58:
                status, _, _ = await request(address, json.dumps(asked).encode(), leave_after=drawn.random() * 0.1)
            else:
                status, body, _ = await request(address, json.dumps(asked).encode())
                assert status in (200, 429), (status, body[:200])
                if status == 200:
                    text_of(body, stream)
            statuses[status] = statuses.get(status, 0) + 1

    await asyncio.gather(*(one(i) for i in range(count)))
    return statuses


def memory(engine: PairEngine) -> tuple[int, int]:
    """Bytes of the worker and of this process, the server, that are in memory; 0 where Linux doesn't say."""
    return heap.status("VmRSS", engine.pid or "self") or 0, heap.status("VmRSS") or 0


def run_chaos(engine: PairEngine, address: str, count: int, seed: int) -> dict[str, Any]:
    """Warm up with a part, then all of them: statuses, and memory of the worker and of the server before and after."""
    asyncio.run(chaos(address, max(WARM_UP, count // 3), seed))
    idle(engine)
    before = memory(engine)
    statuses = asyncio.run(chaos(address, count, seed + 1))
    idle(engine)
    after = memory(engine)

    async def alive() -> bool:
        new = 0
        async for event in engine.submit([Job("still there", max_tokens=2)])[0]:
            if isinstance(event, Finished):
                new = event.new_tokens
        return new > 0

    return {
        "requests": count,
        "statuses": {str(status): number for status, number in sorted(statuses.items())},
        "worker_memory_ratio": after[0] / before[0],
        "server_memory_ratio": after[1] / before[1],
        "restarts": engine.restarts,
        "answers_afterwards": asyncio.run(alive()),
    }


def idle(engine: PairEngine, seconds: float = 60) -> None:
    """Wait until nobody is waited for."""
    deadline = time.monotonic() + seconds
    while engine.waiting or engine.running:
        if time.monotonic() > deadline:
            raise SystemExit(f"stuck: {engine.waiting} waiting, {engine.running} running")
        time.sleep(0.05)


# ---- what is asked of it ---------------------------------------------------------------------------------------------


def criteria(results: dict[str, Any]) -> list[tuple[str, str, Any, bool]]:
    """What is asked of a load or of a chaos: name, target, what was measured, and whether that is met."""
    if "statuses" in results:
        memory = [("worker", results["worker_memory_ratio"]), ("server", results["server_memory_ratio"])]
        return [
            *((f"memory of the {name}, after over before", "≤ 1.05", ratio, ratio <= 1.05) for name, ratio in memory),
            ("restarts of the worker", "0", results["restarts"], results["restarts"] == 0),
            ("answers afterwards", "True", results["answers_afterwards"], results["answers_afterwards"]),
        ]
    found = [
        ("requests lost", "0", results["lost"], results["lost"] == 0),
        ("answers unlike the library's", "0", results["different"], results["different"] == 0),
        ("throughput over one at a time", "≥ 2", results["throughput_ratio"], results["throughput_ratio"] >= 2),
    ]
    if turn := results.get("second_turn"):
        ratio = turn["ratio"]
        found += [
            ("second turn's first token over reading its new tokens", "≤ 1.3", ratio, ratio <= 1.3),
            ("second turn's tokens as without reuse", "True", turn["same_tokens"], turn["same_tokens"]),
        ]
    return found


def report(results: dict[str, Any]) -> bool:
    """Print the criteria; whether all are met."""
    found = criteria(results)
    for name, target, measured, met in found:
        shown = f"{measured:.3f}" if isinstance(measured, float) else measured
        print(f"{'met   ' if met else 'MISSED'}  {name}: {shown} (target {target})")
    return all(met for *_, met in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fuser", help="a folder or hub id; the one that comes along without it")
    parser.add_argument("--receiver")
    parser.add_argument("--sharer")
    parser.add_argument("--dtype")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=4, help="of each client")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--alone", type=int, default=16, help="how many of the requests are clocked one at a time")
    parser.add_argument("--history", type=int, default=1000, help="tokens before the second turn; 0: leave it out")
    parser.add_argument("--chaos", type=int, default=0, help="instead: so many requests, many of them bad")
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", help="also write the figures to this file")
    args = parser.parse_args()
    sharers = [args.sharer] if args.sharer else None
    spec = PairSpec(args.fuser, None, args.receiver, sharers, args.dtype)
    waiting = max(64, args.clients * args.requests) if not args.chaos else 64
    limits = Limits(max_waiting=waiting, max_batch=args.max_batch)
    if args.chaos:  # what is kept for later turns is no leak, so it shall be full before it is looked at
        limits = replace(limits, keep_bytes=4 << 20)
    engine = PairEngine("pair", spec, limits, warmup=True)
    address, stop = start(engine)
    try:
        if args.chaos:
            results = run_chaos(engine, address, args.chaos, args.seed)
        else:
            pair = load_pair([args.fuser] if args.fuser else None, None, args.receiver, sharers, args.dtype, None)
            results = run_load(pair, address, args)
            if args.history:
                say("now the second turn")
                results["second_turn"] = run_turns(pair, engine, args.history)
    except (EngineError, AssertionError) as error:
        sys.exit(f"error: {error}")
    finally:
        stop()
    results = {"machine": measure.machine(), **results}
    print(json.dumps(results, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2))
    if not report(results):
        sys.exit(1)


if __name__ == "__main__":
    main()
