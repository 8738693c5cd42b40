"""Packed weights give what the dense ones give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cache2cache import C2C
from cache2cache.kv import pad_left, prefill, prefill_prompts
from cache2cache.models import load_lm, packed
from cache2cache.models.packed import PackedLinear, pack
from cache2cache.training.items import prepare
from cache2cache.training.precompute import precompute
from cache2cache.training.recipe import read_recipe
from cache2cache.training.store import Store
from training.runs import write_models, write_recipe

pytestmark = pytest.mark.skipif(not packed.possible(), reason="no packed weights on this processor")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_the_same_answers(family: str, tiny: Callable[..., Any]) -> None:
    dense, other = (load_lm(*tiny(family)) for _ in range(2))
    known = other.fingerprint
    linears = sum(type(m) is nn.Linear for m in other.model.modules())
    embedding = other.model.get_input_embeddings().weight.clone()
    assert pack(other) == linears > 0
    assert sum(isinstance(m, PackedLinear) for m in other.model.modules()) == linears
    assert other.fingerprint == known == dense.fingerprint and other.dtype == torch.float32
    assert torch.equal(other.model.get_input_embeddings().weight, embedding)  # whatever became of a head tied to it
    rows = [[5, 6, 7, 8, 9], [5, 9], [7, 8, 9]]
    mine, theirs = (prefill_prompts(lm, rows) for lm in (dense, other))
    for a, b in ((mine.kv.keys, theirs.kv.keys), (mine.kv.values, theirs.kv.values)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    torch.testing.assert_close(other.model(ids).logits, dense.model(ids).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other.model(ids[:1, :1]).logits, dense.model(ids[:1, :1]).logits, atol=1e-4, rtol=1e-4)
    assert pack(other) == 0  # nothing is left to be done


def test_a_store_is_filled_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `c2c precompute` reads packed, training finds, close to what the dense weights give."""
    write_models(tmp_path)
    recipe = read_recipe(write_recipe(tmp_path, store=str(tmp_path / "store")))
    read: list[int] = []
    forward = PackedLinear.forward
    monkeypatch.setattr(PackedLinear, "forward", lambda self, x: read.append(len(x)) or forward(self, x))  # type: ignore[func-returns-value]
    precompute(recipe, precision="bfloat16", dtype="auto", max_bytes=10**9, batch_tokens=64)
    assert read
    pair = C2C.from_models(str(tmp_path / "llama"), str(tmp_path / "qwen3"), recipe.fuser)
    sharer, store = pair.sharers[0], Store(tmp_path / "store", pair.sharers[0])
    rows = [list(item.prompt.sharers[0]) for item in prepare(pair, recipe).train]
    for row in rows:
        found, expected = store.read([row]), prefill(sharer, *pad_left([row], 0, "cpu"))
        torch.testing.assert_close(found.keys.float(), expected.keys, atol=0.05, rtol=0.02)


def test_only_where_it_pays(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny("llama")
    assert pack(load_lm(model.to(torch.bfloat16), tokenizer)) == 0
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 2**20)
    assert pack(load_lm(*tiny("llama"))) == 0
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(packed.platform, "machine", lambda: "aarch64")
    assert pack(load_lm(*tiny("llama"))) == 0
