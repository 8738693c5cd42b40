"""Packed weights give what the dense ones give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from cache2cache.kv import prefill_prompts
from cache2cache.models import load_lm, packed
from cache2cache.models.packed import PackedLinear, pack

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


def test_only_where_it_pays(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny("llama")
    assert pack(load_lm(model.to(torch.bfloat16), tokenizer)) == 0
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 2**20)
    assert pack(load_lm(*tiny("llama"))) == 0
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(packed.platform, "machine", lambda: "aarch64")
    assert pack(load_lm(*tiny("llama"))) == 0
