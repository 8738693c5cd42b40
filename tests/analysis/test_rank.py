"""Effective rank, streamed: the same as from all vectors at once, whatever the batches, and after a stop."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError
from cache2cache.analysis import rank, runs
from cache2cache.analysis.runs import Data, Setup
from cache2cache.pair import where_to_fuse
from training.runs import CHATS, items_of, pair_of

KINDS = ("keys", "values")


def vectors_of(pair: C2C) -> dict[str, torch.Tensor]:
    """All vectors by model and kind, (L, N, W), collected prompt by prompt from caches of their own."""
    found: dict[str, list[torch.Tensor]] = {}
    for item in items_of(pair):
        clean, cache = runs.read(pair, [item.prompt], None)
        fused = pair.fuse([item.prompt])
        for t, s in enumerate(item.prompt.maps[0][:-1]):
            if s >= 0:
                for who, kv, at in (("sharer", cache, s), ("receiver", clean.kv, t), ("fused", fused.kv, t)):
                    for kind in KINDS:
                        found.setdefault(f"{who}.{kind}", []).append(getattr(kv, kind)[:, 0, :, at].flatten(1))
    return {name: torch.stack(rows, dim=1).double() for name, rows in found.items()}


def by_svd(rows: torch.Tensor) -> list[float]:
    ranks = []
    for layer in rows:
        size = torch.linalg.svdvals(layer)
        p = size / size.sum()
        ranks.append(math.exp(-sum(x * math.log(x) for x in p.tolist() if x > 0)))
    return ranks


def streamed(pair: C2C, batch_size: int) -> dict[str, Any]:
    state = rank.empty(pair)
    items = items_of(pair)
    for begin in range(0, len(items), batch_size):
        prompts = [i.prompt for i in items[begin : begin + batch_size]]
        clean, cache = runs.read(pair, prompts, None)
        lengths = runs.lengths_of(prompts)
        fused = pair.fuse(prompts, clean=clean, sharers=[(cache, lengths)])
        where, _ = where_to_fuse(prompts, 0, clean.kv.length, cache.length, lengths)
        rank.add(state, where, sharer=cache, receiver=clean.kv, fused=fused.kv)
    return rank.summarize(pair, state)


@pytest.mark.filterwarnings("ignore:.*tokens are few")
@pytest.mark.parametrize(("receiver", "sharer"), [("llama", "qwen3"), ("gemma3", "llama")])
def test_streamed_as_from_all_vectors_at_once(receiver: str, sharer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = pair_of(receiver, sharer)
    monkeypatch.setattr(rank, "PIECE", 7)
    results = [streamed(pair, size) for size in (1, 3, 4)]
    for name, rows in vectors_of(pair).items():
        who, kind = name.split(".")
        expected, centred = by_svd(rows), by_svd(rows - rows.mean(1, keepdim=True))
        for result in results:
            assert result[who][kind]["rank"]["layers"] == pytest.approx(expected, rel=1e-4)
            assert result[who][kind]["centred"]["layers"] == pytest.approx(centred, rel=1e-3)
            assert result["tokens"] == rows.shape[1]
            assert len(expected) == result[who]["layers"] and max(expected) <= result[who]["width"]
    assert results[0]["receiver"]["keys"]["rank"]["layers"] != results[0]["fused"]["keys"]["rank"]["layers"]


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_closed_gates_have_the_receivers_rank() -> None:
    pair = pair_of(gate_init=0.0)
    result = streamed(pair, 2)
    for kind in KINDS:
        assert result["fused"][kind] == result["receiver"][kind]
        assert "mean_open" not in result["fused"][kind]
    with torch.no_grad():
        pair.fusers[0].gate_logit[1] = 1.0  # the keys of layer 1 alone
    result = streamed(pair, 2)
    mine, theirs = (result[who]["keys"]["rank"] for who in ("fused", "receiver"))
    assert [a == b for a, b in zip(mine["layers"], theirs["layers"], strict=True)] == [True, False, True]
    assert mine["mean_open"] == pytest.approx(mine["layers"][1]) and result["open"] == {"keys": [1], "values": []}
    assert result["fused"]["values"] == result["receiver"]["values"]


def test_what_is_kept_does_not_grow_with_the_tokens() -> None:
    pair = pair_of()
    state = rank.empty(pair)
    shapes = {k: (v.shape, v.dtype) for k, v in state.items()}
    assert max(v.numel() for v in state.values()) == 4 * 32 * 32  # qwen3: 4 layers, 2 heads of 16
    clean, cache = runs.read(pair, [items_of(pair)[0].prompt], None)
    where = torch.zeros(4, 5000, dtype=torch.long)
    rank.add(state, where, sharer=cache, receiver=clean.kv, fused=clean.kv)
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == shapes and state["tokens"] == 5000


@pytest.mark.filterwarnings("ignore:.*tokens are few")
def test_a_stopped_run_goes_on(tiny_pair_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join([*CHATS, "", "What is water?", "And iron?"]), encoding="utf-8")
    data = Data(text=tmp_path / "prompts.txt")
    monkeypatch.setattr(runs, "SAVE_EVERY", 0.0)
    whole = rank.run(Setup(str(tiny_pair_folder), tmp_path / "whole", batch_size=2, command="c2c …"), data)
    real, calls = runs.read, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    setup = Setup(str(tiny_pair_folder), tmp_path / "cut", batch_size=2, command="c2c …")
    monkeypatch.setattr(runs, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rank.run(setup, data)
    assert sorted(p.name for p in setup.output.iterdir()) == ["settings.json", "state.safetensors"]
    again = rank.run(setup, data)
    assert len(calls) == 4  # the batch it was stopped in, and no earlier one
    assert again == whole
    # With other batches too, as one is told to go on where memory was too small.
    setup = Setup(str(tiny_pair_folder), tmp_path / "other", batch_size=2)
    calls[:] = [1]
    with pytest.raises(KeyboardInterrupt):
        rank.run(setup, data)
    larger = rank.run(replace(setup, batch_size=3), data)
    assert larger["tokens"] == whole["tokens"]
    for name, found in whole["fused"]["keys"].items():
        assert larger["fused"]["keys"][name]["layers"] == pytest.approx(found["layers"], rel=1e-3), name
    setup = Setup(str(tiny_pair_folder), tmp_path / "cut", batch_size=2, command="c2c …")
    assert json.loads((setup.output / "result.json").read_text()) == again
    about = again["about"]
    assert about["rows"] == 6 and about["seed"] == 0 and about["receiver"]["fingerprint"] and about["fuser_hash"]
    for name in ("rank.png", "rank.svg"):
        assert (setup.output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes().replace(b"whole", b"cut")
    with pytest.raises(C2CError, match="another seed"):
        rank.run(Setup(str(tiny_pair_folder), tmp_path / "cut", batch_size=2, seed=1), data)
    (tmp_path / "prompts.txt").write_text("Other prompts.\nTwo of them.\n")
    with pytest.raises(C2CError, match="another rows, rows_hash"):
        rank.run(setup, data)


def test_few_tokens_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"tokens are few for vectors of (24|32) numbers") as told:
        streamed(pair_of(), 4)
    assert len(told) == 3
