"""Load and misbehaviour, small: what benchmarks/serve.py does to real models, done to tiny ones."""

from __future__ import annotations

import asyncio
import importlib
import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cache2cache import load_lm
from cache2cache.kv import KV
from cache2cache.methods import Answer
from cache2cache.pair import C2C
from cache2cache.serving.engine import Limits
from cache2cache.serving.page import read_examples
from serving.conftest import Here, Served, spec_of

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("serve")


@pytest.fixture(scope="module")
def served(tiny_pair_folder: Path) -> Iterator[Served]:
    server = Served([Here("pair", spec_of(tiny_pair_folder), Limits(keep_bytes=4 << 20))]).start()
    yield server
    server.stop()


def test_a_load(bench: ModuleType, served: Served, tiny_pair_folder: Path) -> None:
    root = tiny_pair_folder.parent
    pair = C2C.from_pretrained(tiny_pair_folder, receiver=root / "llama", sharers=root / "qwen3")
    bench.WORDS[:] = ["Plants", "iron"]  # of few tokens for a tiny tokenizer
    args = Namespace(clients=8, requests=2, new=16, alone=16, seed=0)
    (engine,) = served.engines
    figures = bench.run_load(pair, served.address, args)
    assert (figures["requests"], figures["lost"], figures["different"], figures["compared"]) == (16, 0, 0, 16)
    assert figures["first_token_s"]["of"] == 8  # of streams alone
    assert figures["throughput_ratio"] > 0 and figures["first_token_s"]["median"] > 0
    turns = bench.run_turns(pair, engine, 400)
    assert turns["same_tokens"] and turns["reused_tokens"] > 390 and turns["prompt_tokens"] < 500
    assert turns["ratio"] == turns["first_token_s"] / turns["reading_new_s"] > 0


def test_what_a_second_turn_is_compared_with_reads_what_is_new(bench: ModuleType, tiny_pair_folder: Path) -> None:
    """The same keys and values as reading all of it at once, of as many layers as are wanted."""
    lm = load_lm(tiny_pair_folder.parent / "llama")
    ids, made = list(range(20, 50)), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "again", lambda past: made.append(again(past)) or made[-1])
        again = importlib.import_module("first_token").again
        for layers in (lm.num_layers, 2):
            read = bench.plain_pass(lm, layers, ids, 23)
            for _ in range(2):
                read()
                whole, cache = KV.from_cache(bench.plain_prefill(lm, [ids], layers)), KV.from_cache(made.pop())
                assert whole.keys.shape[0] == layers and cache.length == 30
                torch.testing.assert_close(cache.keys, whole.keys)
                torch.testing.assert_close(cache.values, whole.values)


def test_chaos(bench: ModuleType, served: Served) -> None:
    (engine,) = served.engines
    figures = bench.run_chaos(engine, served.address, 150, seed=1)
    assert figures["answers_afterwards"] and figures["restarts"] == 0
    assert set(figures["statuses"]) <= {"0", "200", "400", "429"} and {"0", "200", "400"} <= set(figures["statuses"])
    assert sum(figures["statuses"].values()) == 150
    assert figures["server_memory_ratio"] <= 1.05
    worker = engine._outbox.worker  # type: ignore[attr-defined]
    assert not worker._all and not worker._gone and worker.kept.nbytes <= 4 << 20


def test_what_is_missed_is_said(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    turn = {"ratio": 1.3, "same_tokens": True}
    load = {"lost": 0, "different": 0, "throughput_ratio": 2.0, "second_turn": turn}
    assert bench.report(load) and "MISSED" not in capsys.readouterr().out
    for wrong in (
        {"lost": 1},
        {"different": 1},
        {"throughput_ratio": 1.9},
        {"second_turn": {**turn, "ratio": 1.31}},
        {"second_turn": {**turn, "same_tokens": False}},
    ):
        assert not bench.report({**load, **wrong}) and capsys.readouterr().out.count("MISSED") == 1
    chaos = {"worker_memory_ratio": 1.05, "server_memory_ratio": 0.9, "restarts": 0, "answers_afterwards": True}
    assert bench.report({"statuses": {}, **chaos})
    for name, value in (("worker_memory_ratio", 1.06), ("server_memory_ratio", 1.06), ("restarts", 1)):
        assert not bench.report({"statuses": {}, **chaos, name: value})
    capsys.readouterr()
    assert not bench.report({"statuses": {}, **chaos, "answers_afterwards": False})
    assert "answers afterwards: False (target True)" in capsys.readouterr().out


def test_a_wrong_status_is_noticed(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(address: str, raw: bytes, **options: object) -> tuple[int, bytes, None]:
        return 500, b"{}", None

    monkeypatch.setattr(bench, "request", broken)
    with pytest.raises(AssertionError, match="500"):
        asyncio.run(bench.chaos("http://nowhere:1", 40, 0))


def test_examples_that_change(bench: ModuleType, tiny_pair_folder: Path, tmp_path: Path) -> None:
    """Found by running them, and written as the page reads them."""
    script = importlib.import_module("examples")
    root = tiny_pair_folder.parent
    pair = C2C.from_pretrained(tiny_pair_folder, receiver=root / "llama", sharers=root / "qwen3")
    rows = [{"question": f"Iron {i}?", "options": ["yes", "no"], "answer": "A"} for i in range(3)]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = iter(["A", "B", "B", "A", "A", "A"])  # per question the receiver's and the pair's

    def answer(*_: object) -> Iterator[Answer]:
        yield Answer("", text=next(said))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "METHODS", {"receiver": answer, "c2c": answer})
        found = script.find(pair, path, 4)
    assert [row["change"] for row in found] == ["worse", "better"] and "Iron 0" in found[0]["question"]
    assert all(set(row) == set(read_examples()[0]) for row in found)
    other = {"question": "Salt?", "change": ""}
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"question": "gone", "change": "worse"}, other)))
    script.write(path, [*found, {**found[0], "question": "one too many"}], 1)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [found[1], found[0], other]
