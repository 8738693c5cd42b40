"""The training loop: what the loss is, where gradients go, and that a run doesn't notice being interrupted."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate.tracking
import pytest
import torch
from safetensors.torch import load_file

from cache2cache import C2C, C2CError, FuserConfig, kv
from cache2cache.fuser import c2c
from cache2cache.kv import CACHE, KV, Prefilled
from cache2cache.models import LM
from cache2cache.pair import PromptIds
from cache2cache.training import loop, objective
from cache2cache.training.data import Example
from cache2cache.training.items import Item, Prepared, prepare, response_ids
from cache2cache.training.loop import Trainer, batches, optimizer_for, parts_of, rate
from cache2cache.training.objective import response_loss
from cache2cache.training.sharding import shard
from cache2cache.training.store import Asked, Store
from tiny import FAMILIES, TOKENIZER_OF, tiny_tokenizer
from training.runs import (
    CHATS,
    FUSER,
    config_of,
    items_of,
    lm_of,
    pair_of,
    recipe_of,
    write_models,
    write_recipe,
    write_rows,
)
from training.several import Cut, cut, measure

SHARER_OF = dict(zip(FAMILIES, [*FAMILIES[1:], FAMILIES[0]], strict=True))


def nll_of_stock(lm: LM, item: Item) -> torch.Tensor:
    """Negative log-likelihood of each response token, from one ordinary forward pass over prompt and response."""
    ids = [*item.prompt.receiver, *item.response]
    logprobs = lm.model(torch.tensor([ids])).logits[0, -len(item.response) - 1 : -1].log_softmax(-1)
    return -logprobs.gather(1, torch.tensor(item.response)[:, None])[:, 0]


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("receiver", FAMILIES)
def test_loss_with_closed_gates_is_that_of_stock_transformers(receiver: str) -> None:
    """Prompts and responses of unequal lengths in one batch; the second prompt is far beyond Gemma's window of 8."""
    pair = pair_of(receiver, SHARER_OF[receiver], gate_init=0.0)
    pair.fusers.eval()  # hard gates
    items = items_of(pair)
    assert len({len(i.prompt.receiver) for i in items}) == 4 and len({len(i.response) for i in items}) >= 3
    expected = [nll_of_stock(pair.receiver, item) for item in items]
    loss, _ = response_loss(pair, items, None)
    assert loss.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)
    loss, _ = response_loss(pair, items, None, per="example")
    assert loss.item() == pytest.approx(sum(e.mean().item() for e in expected) / 4, rel=1e-5)
    loss, _ = response_loss(pair, items, None, per="sum")
    assert loss.item() == pytest.approx(sum(e.sum().item() for e in expected) / 4, rel=1e-5)


@pytest.mark.parametrize("receiver", FAMILIES)
def test_loss_with_open_gates_is_what_the_pair_scores(receiver: str) -> None:
    """Training sees the very distribution that answers are drawn from, and knows which responses are greedy."""
    pair = pair_of(receiver, SHARER_OF[receiver], gating=False, dropout=0.0)
    items = items_of(pair)
    greedy = pair.generate(items[1].prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)[0, -5:].tolist()
    items[1] = Item("greedy", items[1].prompt, greedy)
    scores = [pair.score(i.prompt, [i.response])[0] for i in items]
    closed = [nll_of_stock(pair.receiver, item).sum().item() for item in items]
    assert all(abs(s.logprob + c) > 0.01 for s, c in zip(scores, closed, strict=True))  # open gates do matter
    pair.fusers.train()
    loss, is_greedy = response_loss(pair, items, None)
    total = sum(len(i.response) for i in items)
    assert loss.item() == pytest.approx(-sum(s.logprob for s in scores) / total, rel=1e-4)
    loss, _ = response_loss(pair, items, None, per="example")
    assert loss.item() == pytest.approx(-sum(s.logprob / s.num_tokens for s in scores) / 4, rel=1e-4)
    assert is_greedy.tolist() == [s.is_greedy for s in scores] == [False, True, False, False]


# ---- the gradients --------------------------------------------------------------------------------------------------


def test_gradients_reach_the_fuser_only() -> None:
    pair = pair_of("gemma3", "qwen2", variant="c2c-c")
    pair.fusers.train()
    loss, _ = response_loss(pair, items_of(pair), None)
    loss.backward()
    for lm in (pair.receiver, *pair.sharers):
        for parameter in lm.model.parameters():
            assert not parameter.requires_grad and parameter.grad is None
    for name, parameter in pair.fusers.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("receiver", FAMILIES)
def test_gradients_agree_with_finite_differences(receiver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In double precision, with dropout and gate noise drawn alike each time: along each weight's own gradient."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the logits stay double
    pair = pair_of(receiver, SHARER_OF[receiver], torch.float64, dropout=0.2, normalize=True)
    fuser = pair.fusers[0].double().train()
    items = items_of(pair)

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return response_loss(pair, items, None, "example")[0]

    value = loss()
    assert value.dtype == torch.float64
    value.backward()
    for name, parameter in fuser.named_parameters():
        gradient = parameter.grad.clone()
        size = gradient.norm().item()
        step = 4e-3 * gradient / size
        with torch.no_grad():
            parameter.add_(step)
            above = loss().item()
            parameter.sub_(2 * step)
            below = loss().item()
            parameter.add_(step)
        assert (above - below) / 8e-3 == pytest.approx(size, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("variant", ["c2c", "c2c-c", "bottleneck"])
@pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
def test_gradients_do_not_depend_on_how_many_positions_are_fused_at_once(
    variant: str, key_space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = pair_of(dtype=torch.float64, dropout=0.0, gate_noise="none", variant=variant, key_space=key_space)
    fuser = pair.fusers[0].double().train()
    items = items_of(pair)
    found, counts = [], []
    change = fuser.change

    def counted(*inputs: torch.Tensor) -> torch.Tensor:
        counts[-1] += 1
        return change(*inputs)

    monkeypatch.setattr(fuser, "change", counted)
    for chunk in (10_000, 7):
        monkeypatch.setattr(c2c, "CHUNK", chunk)
        counts.append(0)
        fuser.zero_grad()
        response_loss(pair, items, None, "example")[0].backward()
        found.append({name: p.grad.clone() for name, p in fuser.named_parameters() if p.grad is not None})
    assert counts[0] == 1 and counts[1] > 5
    whole, pieces = found
    assert whole.keys() == pieces.keys() and any(g.abs().max() > 0 for g in whole.values())
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("frozen", [torch.bfloat16, torch.float32])
def test_bfloat16_computes_near_float32_and_keeps_float32_weights(tmp_path: Path, frozen: torch.dtype) -> None:
    write_rows(tmp_path / "rows.jsonl")
    settings = {"gate_noise": "none", "dropout": 0.0, "normalize": True}
    gradients, losses = [], []
    for precision, dtype in (("auto", torch.float32), ("bfloat16", frozen)):
        config = config_of(tmp_path, precision=precision, output=tmp_path / precision, epochs=1)
        pair = pair_of(dtype=dtype, **settings)
        trainer = Trainer(pair, config, None, prepare(pair, config))
        losses.append(trainer.backward(trainer.data.train[:4]).item())
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainer.trained.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.trained.parameters()]))
        trainer.run()
        assert all(p.dtype == torch.float32 for p in trainer.trained.parameters())
        moments = [x for state in trainer.optimizer.state.values() for x in state.values()]
        assert moments and all(x.dtype == torch.float32 for x in moments)
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


# ---- the store ------------------------------------------------------------------------------------------------------


def test_only_what_the_fuser_reads_comes_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other layers are not read, and what is in their place doesn't matter."""
    write_rows(tmp_path / "rows.jsonl")
    pair = pair_of(layer_map=[(0, 1), (2, 2)])
    data = prepare(pair, config_of(tmp_path))
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    store.fill(pair.sharers[0], [list(i.prompt.sharers[0]) for i in data.train + data.holdout])
    read, asked = Store._read, []

    def poisoned(self: Store, what: Asked, out: torch.Tensor) -> KV:
        asked.append(what.layers)
        kv = read(self, what, out)
        for x in (kv.keys, kv.values):
            x[0] = x[3] = math.nan
        return kv

    whole = objective.response_loss(pair, data.train[:4], store)[0]
    monkeypatch.setattr(Store, "_read", poisoned)
    assert torch.equal(objective.response_loss(pair, data.train[:4], store)[0], whole)
    assert asked == [(1, 3)]


def test_training_from_the_store_is_training_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses step by step, the live sharer's caches being rounded to bfloat16 as the store keeps them."""
    write_rows(tmp_path / "rows.jsonl")
    settings = {"normalize": True, "dropout": 0.1}
    pair = pair_of(**settings)
    data = prepare(pair, config_of(tmp_path))
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    store.fill(pair.sharers[0], [list(i.prompt.sharers[0]) for i in data.train + data.holdout])

    def losses(name: str, store: Store | None) -> list[float]:
        seen: list[float] = []
        config = config_of(tmp_path, output=tmp_path / name, epochs=2)
        Trainer(pair_of(**settings), config, store, data).run(lambda record: seen.append(record["loss"]))
        return seen

    compute = objective.prefill

    def never(*_: Any, **__: Any) -> KV:
        raise AssertionError("the sharer has nothing to compute")

    monkeypatch.setattr(objective, "prefill", never)
    stored = losses("stored", store)
    monkeypatch.setattr(objective, "prefill", lambda *a, **k: compute(*a, **k).to(torch.bfloat16).to(torch.float32))
    live = losses("live", None)
    monkeypatch.setattr(
        objective, "prefill", lambda *a, **k: KV(*map(torch.zeros_like, vars(compute(*a, **k)).values()))
    )
    silent = losses("silent", None)
    assert len(stored) == 8 and stored == pytest.approx(live, rel=1e-4)
    assert stored != pytest.approx(silent, rel=1e-3)  # the losses do depend on what the sharer says


def test_what_a_batch_begins_with_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By both models, and the caches are those of whole prompts; not where too little is saved."""
    pair = pair_of()
    messages = [{"role": "system", "content": 12 * "Plants need light to grow. "}]
    items = [
        replace(item, prompt=pair.encode([*messages, {"role": "user", "content": f"{n * 'iron '}?"}]))
        for n, item in enumerate(items_of(pair))
    ]
    prompts = [item.prompt for item in items]
    read: dict[int, int] = {}
    for lm in (pair.receiver, pair.sharers[0]):

        def forward(*arguments: Any, original: Any = lm.decoder.forward, lm: LM = lm, **named: Any) -> Any:
            read[id(lm)] = read.get(id(lm), 0) + named["input_ids"].numel()
            return original(*arguments, **named)

        monkeypatch.setattr(lm.decoder, "forward", forward)

    def both() -> list[KV]:
        asked = objective.what_is_read(pair, prompts)
        return [objective.receiver_prefill(pair, prompts, None).kv, objective.sharer_prefill(pair, asked, None)]

    monkeypatch.setattr(kv, "_WORTH", 10**9)
    whole, all_read = both(), dict(read)
    monkeypatch.setattr(kv, "_WORTH", 1)
    read.clear()
    shared = both()
    lengths = [[len(p.receiver) - 1 for p in prompts], objective.read_lengths(prompts)]
    for lm, one, other, rows in zip((pair.receiver, pair.sharers[0]), whole, shared, lengths, strict=True):
        assert read[id(lm)] < all_read[id(lm)] / 2
        for row, length in enumerate(rows):
            for name, tensor in vars(one.tail(row, length)).items():
                torch.testing.assert_close(getattr(other.tail(row, length), name), tensor)


def test_training_from_the_receivers_store_is_training_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.jsonl")
    settings = {"normalize": True, "dropout": 0.1}
    pair = pair_of(**settings)
    data = prepare(pair, config_of(tmp_path))
    own = Store(tmp_path / "own", pair.receiver, "bfloat16")
    own.fill(pair.receiver, [list(i.prompt.receiver) for i in data.train + data.holdout])
    compute = objective.prefill_prompts

    def losses(name: str, receiver_store: Store | None) -> list[float]:
        seen: list[float] = []
        config = config_of(tmp_path, output=tmp_path / name, epochs=2)
        trainer = Trainer(pair_of(**settings), config, None, data, receiver_store)
        trainer.run(lambda record: seen.append(record["loss"]))
        return seen

    def rounded(*arguments: Any, **named: Any) -> Prefilled:
        clean = compute(*arguments, **named)
        return replace(clean, kv=clean.kv.to(torch.bfloat16).to(torch.float32))

    def never(*_: Any, **__: Any) -> Prefilled:
        raise AssertionError("the receiver has nothing to compute")

    monkeypatch.setattr(objective, "prefill_prompts", never)
    stored = losses("stored", own)
    monkeypatch.setattr(objective, "prefill_prompts", rounded)
    assert stored == pytest.approx(losses("live", None), rel=1e-4)


# ---- the start and the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["c2c", "bottleneck"])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_start_from_ridge_is_the_ridge_fuser(tmp_path: Path, variant: str, normalize: bool) -> None:
    """With room for every direction, and the weights' factor taken out, the first projection is what ridge predicts."""
    write_rows(tmp_path / "rows.jsonl")
    settings = {"gating": False, "weighting": False, "hidden_dim": 64, "dropout": 0.0, "normalize": normalize}
    pair = pair_of(variant=variant, projection_init="ridge", blend=0.5, **settings)
    config = config_of(tmp_path, calibration_prompts=12)
    trainer = Trainer(pair, config, None, prepare(pair, config))
    trainer._start()
    prompts = trainer.data.train[:12]
    pieces = [
        list(objective.fused_inputs(pair, objective.in_pieces(some, 4), None))
        for some in ([p for i, p in enumerate(prompts) if i % 5], prompts[::5])
    ]
    fuser = pair.fusers[0]
    for x, y in pieces[1]:
        change = fuser.change(x, y)
        again = fuser.change(x, y + change / 0.5)  # what ridge predicts; predicting takes no look at y
        torch.testing.assert_close(again, torch.zeros_like(again), atol=2e-3, rtol=0)
        assert change.abs().max() > 0.05


@pytest.mark.parametrize("settings", [{"variant": "c2c-c"}, {"variant": "ridge"}, {"residual": False, "gating": False}])
def test_a_start_from_ridge_needs_a_projection_that_is_added(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="projection_init: ridge is for projections that read both caches"):
        FuserConfig(projection_init="ridge", **settings)


def test_a_start_from_ridge_lowers_the_first_loss_of_a_model_with_itself(tmp_path: Path) -> None:
    """A sharer that is the receiver predicts its cache, so that the fused cache is the receiver's own."""
    write_rows(tmp_path / "rows.jsonl")
    alone = lm_of("llama")
    fuser = {"projection_init": "ridge", "hidden_dim": 64, "intermediate_dim": 6, "gating": False, "dropout": 0.0}
    pair = C2C.from_models(alone, alone, FuserConfig(**fuser))
    config = config_of(tmp_path, calibration_prompts=16)
    trainer = Trainer(pair, config, None, prepare(pair, config))
    batch = trainer.data.train[:4]
    before = trainer.objective(batch, "token")[0].item()
    trainer._start()
    closed = C2C.from_models(alone, alone, FuserConfig(gating=True, gate_init=-1.0))
    closed.fusers.eval()
    own = response_loss(closed, batch, None)[0].item()
    assert trainer.objective(batch, "token")[0].item() == pytest.approx(own, abs=1e-3)
    assert before != pytest.approx(own, abs=1e-2)


def test_distillation_adds_the_divergence_from_the_sharer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver, sharer = lm_of("qwen2"), lm_of("qwen3", 7)
    torch.manual_seed(0)
    pair = C2C.from_models(receiver, sharer, FuserConfig(**FUSER))
    items = items_of(pair)
    pair.fusers.eval()
    plain, both = (response_loss(pair, items, None, "sum", distill=d)[0].item() for d in (0.0, 2.0))
    expected = 0.0
    for item in items:
        fused = pair.fuse([item.prompt])
        alone = objective.prefill_prompts(sharer, [item.prompt.sharers[0]])
        both_logits = (_logits_behind(pair.receiver, fused, item), _logits_behind(sharer, alone, item))
        shared = min(logits.shape[-1] for logits in both_logits)  # the larger embedding has rows without a token
        ours, theirs = (logits[:, :shared].log_softmax(-1) for logits in both_logits)
        expected += (theirs.exp() * (theirs - ours)).sum().item() / len(items)
    assert both - plain == pytest.approx(2 * expected, rel=1e-4)
    store = Store(tmp_path / "store", sharer, "bfloat16")
    store.fill(sharer, [list(item.prompt.sharers[0]) for item in items])
    stored = response_loss(pair, items, store, "sum", distill=2.0)[0].item()
    assert stored == pytest.approx(both, rel=2e-2)
    # What the fuser reads and what the sharer goes on from is one prefill, or one read ahead from the store.
    calls: list[int] = []
    compute = objective.prefill
    monkeypatch.setattr(objective, "prefill", lambda *a, **k: calls.append(1) or compute(*a, **k))
    response_loss(pair, items, None, "sum", distill=2.0)
    assert len(calls) == 1
    distilled = objective.FuserObjective(pair, store, False, distill=2.0)
    read = store._read
    monkeypatch.setattr(store, "_read", lambda *a: calls.append(1) or read(*a))
    for batch in distilled.read_ahead(iter([items])):
        distilled(batch, "sum")
    assert len(calls) == 2
    alone = response_loss(pair, items, store, "sum")[0].item()
    assert distilled.eval()(items, "sum")[0].item() == pytest.approx(alone, rel=1e-6)  # not when watching the hold-out


def _logits_behind(lm: LM, state: Any, item: Item) -> torch.Tensor:
    """(tokens, vocabulary): what is expected at each response token, from one pass of the stock model."""
    ids = torch.tensor([[int(state.input_ids[0, -1]), *item.response[:-1]]])
    with torch.no_grad():
        return lm.model(input_ids=ids, use_cache=True, **{CACHE: state.kv.to_cache()}).logits[0].float()


def test_distillation_needs_one_vocabulary(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    pair = pair_of()
    config = config_of(tmp_path, distill=1.0)
    with pytest.raises(C2CError, match=r"distill compares next-token distributions, but [\d,]+ of [\d,]+ tokens"):
        Trainer(pair, config, None, prepare(pair, config))


# ---- order and rates ------------------------------------------------------------------------------------------------


def test_batches() -> None:
    pair = pair_of()
    base = items_of(pair)[0]
    items = [Item(str(n), base.prompt, [1] * (1 + n * 7 % 50)) for n in range(150)]
    epochs = [batches(items, 4, seed=3, epoch=epoch) for epoch in range(2)]
    assert epochs[0] == batches(list(items), 4, seed=3, epoch=0)  # the same in every run
    order = [[item.id for batch in epoch for item in batch] for epoch in epochs]
    for ids, made in zip(order, epochs, strict=True):
        assert sorted(ids) == sorted(item.id for item in items)  # each once an epoch
        assert sorted(len(batch) for batch in made) == [2] + [4] * 37
        spread = [max(i.length for i in batch) - min(i.length for i in batch) for batch in made]
        assert sum(spread) / len(spread) < 6  # like lengths together; at random it would be about 30
    assert order[0] != order[1]
    other = batches(items, 4, seed=4, epoch=0)
    assert [item.id for batch in other for item in batch] != order[0]


def test_rate() -> None:
    """Up in a tenth of the steps, then straight down to zero, or along half a cosine."""
    assert [round(rate(step, 20, 0.1, "cosine"), 6) for step in (0, 1, 2, 11, 20)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert rate(5, 18, 0.0, "cosine") == pytest.approx((1 + math.cos(math.pi * 4 / 17)) / 2)
    assert [rate(step, 20, 0.1) for step in (0, 1, 2, 11, 20)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert [rate(step, 10, 0.0) for step in (0, 1, 10)] == [1.0, 1.0, 0.0]
    assert [rate(step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(0, 1, 0.1) == 1.0


@pytest.mark.parametrize("variant", ["c2c", "c2c-c"])
def test_decay_is_on_matrices_only(tmp_path: Path, variant: str) -> None:
    fuser = pair_of(variant=variant).fusers[0]
    config = config_of(tmp_path, weight_decay=0.5, learning_rate=0.1, gate_learning_rate=0.7)
    optimizer = optimizer_for(fuser, config)  # type: ignore[arg-type]
    before = {name: parameter.detach().clone() for name, parameter in fuser.named_parameters()}
    for parameter in fuser.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    matrices = 0
    for name, parameter in fuser.named_parameters():
        is_matrix = parameter.dim() == 3 and parameter.shape[1] > 1  # (G, fan in, fan out); vectors are (G, 1, n)
        matrices += is_matrix
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if is_matrix else 1.0))
    assert matrices >= 10
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in fuser.named_parameters() if rates[id(p)] == 0.7} == {"gate_logit"}
    assert len(rates) == len(before)
    published = optimizer_for(fuser, config_of(tmp_path, weight_decay=0.5, decay="all"))  # type: ignore[arg-type]
    assert {group["weight_decay"] for group in published.param_groups} == {0.5}


# ---- items ----------------------------------------------------------------------------------------------------------


def test_prepare_cuts_leaves_out_and_sets_aside(tmp_path: Path) -> None:
    rows = [
        {"prompt": "short", "completion": "one two three four five six seven eight nine ten " * 3},
        {"prompt": "The capital of France is Paris. " * 2, "completion": "x"},  # too long for the receiver alone
        *({"prompt": f"row {n}", "completion": "yes"} for n in range(8)),
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = pair_of("qwen3", "llama")  # one token a byte
    data = prepare(pair, config_of(tmp_path, max_tokens=60, holdout=3))
    assert len(data.train) + len(data.holdout) == 9 and len(data.holdout) in (2, 3)  # one was too long for its side
    assert (data.too_long, data.shortened, data.cut) == (1, 0, 1) and data.truncation == "1 too long, 1 cut"
    assert not {i.id for i in data.train} & {i.id for i in data.holdout}
    by_id = {i.id.rpartition(":")[2]: i for i in data.train + data.holdout}
    assert by_id["0"].length == 60 and "1" not in by_id
    tokenizer = pair.receiver.need_tokenizer()
    assert tokenizer.decode(by_id["5"].response) == "yes<|im_end|>"  # the end of the turn is learned too
    again = prepare(pair, config_of(tmp_path, max_tokens=60, holdout=3))
    assert again == data
    with pytest.raises(
        C2CError, match="9 examples are left \\(1 longer than max_tokens 60 or a model's context\\), 9 of"
    ):
        prepare(pair, config_of(tmp_path, max_tokens=60, holdout=10))
    with pytest.raises(C2CError, match="0 examples are left \\(10 longer than max_tokens 10 or"):
        prepare(pair, config_of(tmp_path, max_tokens=10, holdout=3))


def test_the_split_is_the_same_for_all_models_and_seeds(tmp_path: Path) -> None:
    """Though the models' tokenizers find different prompts too long."""
    rows = [{"prompt": f"{n}: " + "The answer. " * (n % 7), "completion": "yes"} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = [
        prepare(pair, config_of(tmp_path, max_tokens=90, holdout=12, seed=seed))
        for seed, pair in enumerate([pair_of("qwen3", "llama"), pair_of("llama", "gemma3"), pair_of("gemma3", "llama")])
    ]
    assert len({data.too_long for data in made}) > 1
    held, trained = set(), set()
    for data in made:
        held |= {item.id for item in data.holdout}
        trained |= {item.id for item in data.train}
    assert not held & trained and len(held) <= 12 < len(trained)


def test_weights_are_kept_whatever_is_left_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 30)
    other = [{"prompt": f"other {n}" + "!" * 90 * (n % 3 == 0), "completion": "yes"} for n in range(18)]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in other))
    sources = [
        {"jsonl": str(tmp_path / "rows.jsonl"), "weight": 1},
        {"jsonl": str(tmp_path / "other.jsonl"), "weight": 3},
    ]
    config = config_of(tmp_path, data=sources, max_tokens=110, holdout=8)
    data = prepare(pair_of("qwen3", "qwen2"), config)
    assert data.too_long == 6
    shares = [sum(str(tmp_path / name) in item.id for item in data.train) for name in ("rows.jsonl", "other.jsonl")]
    assert sum(shares) == 42 - len(data.holdout) and shares[0] == round(sum(shares) / 4)
    assert not {i.id for i in data.train} & {i.id for i in data.holdout}
    assert len({i.id for i in data.holdout}) == len(data.holdout)  # only what is learned repeats


# ---- chats of several turns -----------------------------------------------------------------------------------------


def chats() -> list[list[dict[str, str]]]:
    """Chats of one to five assistant turns, some with a system message, in several scripts."""
    made = []
    for n in range(12):
        chat = [{"role": "system", "content": "You are helpful."}] * (n % 2)
        for turn in range(1 + n % 5):
            chat += [
                {"role": "user", "content": f"What is {n} plus {turn}? " + "水 " * turn},
                {"role": "assistant", "content": f" The answer is {n + turn}, 北京 " + "and so on" * (turn % 3)},
            ]
        made.append(chat)
    return made


@pytest.mark.parametrize("receiver", FAMILIES)
def test_every_token_of_every_turn_is_learned_once(receiver: str, tmp_path: Path) -> None:
    """The examples' tokens together are those of all assistant turns, whatever the template and the alignment: none
    is lost to a cut, none stands in two responses, and each is read behind all that came before it."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats()))
    source = {"jsonl": str(tmp_path / "rows.jsonl"), "supervise": "all"}
    pair = pair_of(receiver, SHARER_OF[receiver])
    data = prepare(pair, config_of(tmp_path, data=[source], holdout=5))
    tokenizer = pair.receiver.need_tokenizer()
    expected = []
    for number, chat in enumerate(chats()):
        turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        for turn, i in enumerate(turns, 1):
            name = f"{tmp_path / 'rows.jsonl'}:{number}" + (f"#{turn}" if len(turns) > 1 else "")
            response = Example(name, (), "", chat[i]["content"].strip())
            expected.append((name, pair.encode(chat[:i]), response_ids(tokenizer, response)))
    items = data.train + data.holdout

    def numbers(prompt: PromptIds, response: Sequence[int]) -> list[list[int]]:
        return [list(row) for row in (prompt.receiver, *prompt.sharers, *prompt.maps, response)]

    assert len(items) == len(expected)
    assert {i.id: numbers(i.prompt, i.response) for i in items} == {name: numbers(*rest) for name, *rest in expected}
    total = sum(len(ids) for _, _, ids in expected)
    assert sum(len(i.response) for i in items) == total and data.cut == data.too_long == 0

    # What the loss counts is just as many: a mean over tokens times their number is the sum over all turns.
    pair.fusers.eval()
    per_token = sum(
        response_loss(pair, items[n : n + 4], None)[0].item() * sum(len(i.response) for i in items[n : n + 4])
        for n in range(0, len(items), 4)
    )
    alone = sum(response_loss(pair, [item], None, per="sum")[0].item() for item in items)
    assert per_token == pytest.approx(alone, rel=1e-4)


def test_old_turns_go_first(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "S" * 5}]
    for n in range(4):
        chat += [{"role": "user", "content": f"{n}" * 20}, {"role": "assistant", "content": "abcdefghij" * (n + 1)}]
    rows = [{"messages": chat}, *({"prompt": f"row {n}", "completion": "yes"} for n in range(4))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = pair_of("qwen3", "qwen2")  # one token a byte
    tokenizer = pair.receiver.need_tokenizer()

    def prepared(**changes: Any) -> tuple[Prepared, Item | None]:
        data = prepare(pair, config_of(tmp_path, holdout=0, **changes))
        return data, next((i for i in data.train if i.id.endswith(":0")), None)

    whole = prepared()[1]
    assert whole is not None
    prompt, response = len(whole.prompt.receiver), whole.response
    data, item = prepared(max_tokens=prompt)
    assert item is None and (data.too_long, data.shortened) == (1, 0)  # the default: left out
    data, item = prepared(max_tokens=prompt + 1)
    assert item is not None and item.response == response[:1] and data.cut == 1
    data, item = prepared(max_tokens=prompt + 1, min_response_tokens=2)
    assert item is None and data.too_long == 1
    data, item = prepared(max_tokens=whole.length - 1, too_long="drop")
    assert item is None and (data.too_long, data.cut) == (1, 0)
    assert prepared(max_tokens=whole.length, too_long="drop")[1] == whole
    data, item = prepared(max_tokens=prompt + 1, min_response_tokens=2, truncate="oldest")
    assert item is not None and (data.too_long, data.shortened, data.cut) == (0, 1, 0)
    assert (
        list(item.prompt.receiver) == list(pair.encode([chat[0], *chat[3:-1]]).receiver) and item.response == response
    )
    # No more goes than has to, until the system message and the last question are left.
    for kept, turns in ((5, chat[5:-1]), (7, chat[7:-1])):
        least = len(pair.encode([chat[0], *turns]).receiver) + 10
        data, item = prepared(max_tokens=least, min_response_tokens=10, truncate="oldest")
        assert item is not None and item.length == least and item.response == response[:10], kept
        assert tokenizer.decode(item.prompt.receiver).count("user") == len(turns) // 2 + 1
    data, item = prepared(max_tokens=least - 1, min_response_tokens=10, truncate="oldest")
    assert item is None and data.too_long == 1
    # A response shorter than the least needs no more room than it has: three letters and the end.
    (short, *_) = [i for i in data.train if i.id.endswith(":1")]
    assert len(short.response) == 4
    assert prepared(max_tokens=short.length, min_response_tokens=10)[0].too_long == 1


def test_a_prompt_too_long_for_the_sharer_alone(tmp_path: Path) -> None:
    rows = [{"prompt": "The capital of France is Paris." * n, "completion": "yes"} for n in (1, 1, 4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = pair_of("llama", "qwen3")  # words receive, bytes share
    long = prepare(pair, config_of(tmp_path, holdout=0)).train
    receiver, sharer = (
        max(len(x) for x in xs) for xs in ([i.prompt.receiver for i in long], [i.prompt.sharers[0] for i in long])
    )
    assert receiver + 4 < sharer
    assert prepare(pair, config_of(tmp_path, holdout=0, max_tokens=sharer)).too_long == 0
    assert prepare(pair, config_of(tmp_path, holdout=0, max_tokens=sharer - 1)).too_long == 1


def test_a_context_shorter_than_max_tokens(tmp_path: Path) -> None:
    """Of a prompt beyond it the example is too long, a response is cut where it ends."""
    rows = [{"prompt": "What is iron? " * n, "completion": "It is a metal. " * n} for n in (1, 2, 12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of(tmp_path, holdout=0)
    lengths = [i.length for i in sorted(prepare(pair_of("qwen3", "llama"), config).train, key=lambda i: i.id)]
    most = lengths[1] - 1
    short = C2C.from_models(lm_of("qwen3", max_position_embeddings=most), lm_of("llama"), FuserConfig(**FUSER))
    data = prepare(short, config)
    assert sorted(i.length for i in data.train) == [lengths[0], most] and (data.too_long, data.cut) == (1, 1)
    sharer = lm_of("qwen3", max_position_embeddings=len(data.train[0].prompt.receiver))  # the shortest, perhaps
    shorter = C2C.from_models(lm_of("llama"), sharer, FuserConfig(**FUSER))
    fitting = [
        len(i.prompt.sharers[0]) <= sharer.context_length for i in prepare(pair_of("llama", "qwen3"), config).train
    ]
    assert prepare(shorter, config).too_long == fitting.count(False) > 0


def test_the_end_of_a_turn_is_what_the_template_writes() -> None:
    for family, end in (("qwen3", "<|im_end|>"), ("llama", "<|eot|>"), ("gemma3", "<end_of_turn>")):
        tokenizer = tiny_tokenizer(TOKENIZER_OF[family])
        said = response_ids(tokenizer, Example("x:1", (), "", "Paris."))
        assert tokenizer.decode(said) == f"Paris.{end}", family
        assert response_ids(tokenizer, Example("x:1", (), "", "Paris.", ends=False)) == said[:-1]
        tokenizer.chat_template = None
        assert response_ids(tokenizer, Example("x:1", (), "", "Paris."))[-1] == tokenizer.eos_token_id


def test_control_tokens_in_a_response_are_text() -> None:
    tokenizer = tiny_tokenizer(TOKENIZER_OF["qwen3"])
    text = "Write <|im_end|> there."
    with pytest.warns(UserWarning, match="is a control token of this model; it is read as plain text"):
        said = response_ids(tokenizer, Example("x:1", (), "", text))
    assert said.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1 and tokenizer.decode(said[:-1]) == text


def test_rows_that_a_template_refuses(tmp_path: Path) -> None:
    rows = [{"prompt": f"row {n}", "completion": "yes"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = pair_of()
    tokenizer = pair.receiver.need_tokenizer()
    tokenizer.chat_template = (
        "{% if 'row 2' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    with pytest.raises(C2CError, match=r"rows.jsonl:2: "):
        prepare(pair, config_of(tmp_path, holdout=1))
    source = {"jsonl": str(tmp_path / "rows.jsonl"), "on_bad_rows": "skip"}
    with pytest.warns(UserWarning, match=r"1 examples cannot be encoded and are left out; the first: .*rows.jsonl:2"):
        data = prepare(pair, config_of(tmp_path, holdout=1, data=[source]))
    assert len(data.train) + len(data.holdout) == 3


def test_a_response_that_does_not_end_has_no_end_token() -> None:
    tokenizer = lm_of("qwen3").need_tokenizer()
    example = Example("x:1", ({"role": "user", "content": "?"},), "The answer is", " B", ends=False)
    assert tokenizer.decode(response_ids(tokenizer, example)) == " B"
    with pytest.raises(C2CError, match="x:1 has no tokens"):
        response_ids(tokenizer, Example("x:1", (), "", "", ends=False))


# ---- runs that stop and go on ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def train(recipe: Path, output: Path, *more: str, dies: str = "") -> subprocess.CompletedProcess[str]:
    """`c2c train` in a process of its own; `dies` is the name of a signal that it sends itself in its seventh step."""
    code = (
        "import os, signal, sys\n"
        "from cache2cache.cli import main\n"
        "from cache2cache.training.loop import Trainer\n"
        "def step(self, *batch, original=Trainer._train_step):\n"
        "    if self.step == 6 and sys.argv[1]:\n"
        "        os.kill(os.getpid(), getattr(signal, sys.argv[1]))\n"
        "    return original(self, *batch)\n"
        "Trainer._train_step = step\n"
        "main(sys.argv[2:])\n"
    )
    command = [sys.executable, "-c", code, dies, "train", str(recipe), "--output", str(output), *more]
    return subprocess.run(command, capture_output=True, text=True)


def log_of(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_an_interrupted_run_ends_as_if_it_had_not_been(models: Path, tmp_path: Path) -> None:
    """After Ctrl-C and after kill -9, bit for bit: weights, statistics, log and what was measured."""
    recipe = write_recipe(tmp_path, **{k: v for k, v in recipe_of(models).items() if k in ("receiver", "sharer")})
    whole = train(recipe, tmp_path / "whole")
    assert whole.returncode == 0 and whole.stdout == f"{tmp_path / 'whole' / 'fuser'}\n", whole.stderr
    expected = (tmp_path / "whole" / "fuser" / "fuser.safetensors").read_bytes()
    log = log_of(tmp_path / "whole")
    assert [row["step"] for row in log] == list(range(1, 13))
    assert [row["step"] for row in log if "holdout_loss" in row] == [5, 10, 12]
    assert len({row["loss"] for row in log}) == 12
    for name, code, saved in (("SIGINT", 130, 7), ("SIGKILL", -9, 6)):
        output = tmp_path / name
        stopped = train(recipe, output, dies=name)
        assert stopped.returncode == code, stopped.stderr
        if name == "SIGINT":
            assert stopped.stderr.rstrip().endswith("interrupted") and "Traceback" not in stopped.stderr
            assert "ending behind this step, with a checkpoint; again: at once" in stopped.stderr
        assert not (output / "fuser").exists()
        assert torch.load(output / "checkpoint.pt", weights_only=True)["step"] == saved
        (output / "log.jsonl").open("a").write('{"step": 8, "loss": 1.0}\n{"step": 9, "lo')  # done, but not saved
        (output / ".checkpoint.pt.17").write_bytes(b"half")
        again = train(recipe, output)
        assert again.returncode == 0, again.stderr
        assert (output / "fuser" / "fuser.safetensors").read_bytes() == expected
        assert log_of(output) == log
        assert not list(output.glob(".checkpoint*"))
        one, other = (json.loads((o / "fuser" / "config.json").read_text()) for o in (tmp_path / "whole", output))
        assert one["training"].pop("seconds") > 0 < other["training"].pop("seconds")
        assert one == other and one["training"]["holdout_loss"] == log[-1]["holdout_loss"]


class Run:
    """A run in this process: the same tiny data each time, other settings as asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_rows(folder / "rows.jsonl")

    def trainer(self, rows: int = 22, **changes: Any) -> Trainer:
        write_rows(self.folder / "rows.jsonl", rows)
        pair = pair_of(dropout=0.1, normalize=True)
        config = config_of(self.folder, **changes)
        return Trainer(pair, config, None, prepare(pair, config))


@pytest.fixture
def runs(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_training_changes_the_fuser_and_no_model(runs: Run) -> None:
    trainer = runs.trainer()
    pair = trainer.objective.pair
    frozen = [lm.model.state_dict() for lm in (pair.receiver, *pair.sharers)]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in frozen]
    first = {name: tensor.clone() for name, tensor in trainer.trained.state_dict().items()}
    records: list[dict[str, Any]] = []
    folder = trainer.run(records.append)
    assert all(same_weights(a, b) for a, b in zip(frozen, before, strict=True))
    assert not any(p.requires_grad or p.grad is not None for lm in (pair.receiver, pair.sharers[0]) for p in lm.model.parameters())  # fmt: skip # noqa: E501
    for name, tensor in trainer.trained.state_dict().items():
        assert not torch.equal(tensor, first[name]), name
    assert records[-1]["holdout_loss"] < records[4]["holdout_loss"]
    assert [record["rate"] for record in records] == [1e-2 * rate(step, 12, 0.1) for step in range(12)]
    assert (folder / "training_ids.txt").read_text().split("\n")[:-1] == sorted(i.id for i in trainer.data.train)
    saved = json.loads((folder / "config.json").read_text())["training"]
    assert (saved["examples"], saved["steps"], saved["recipe"]["epochs"]) == (16, 12, 3)
    again = C2C.from_pretrained(folder, receiver=pair.receiver, sharers=pair.sharers)
    pair.fusers.eval()
    torch.testing.assert_close(again.prefill(CHATS[0]).kv.keys, pair.prefill(CHATS[0]).kv.keys, atol=0.05, rtol=0.05)


def test_pieces_of_like_length(runs: Run) -> None:
    items = runs.trainer().data.train
    sizes = [len(item.prompt.receiver) for item in items]
    most = 3 * min(sizes)
    assert max(sizes) * 3 > most  # else only the rows would bound them
    pieces = objective.in_pieces(items, 4, most)
    assert sorted(item.id for piece in pieces for item in piece) == sorted(item.id for item in items)
    assert [len(i.prompt.receiver) for piece in pieces for i in piece] == sorted(sizes)
    assert all(len(piece) * len(piece[-1].prompt.receiver) <= most and len(piece) <= 4 for piece in pieces)
    assert max(map(len, pieces)) > 2 and [len(piece) for piece in objective.in_pieces(items, 4, 1)] == [1] * len(items)
    seen: list[tuple[int, int]] = []
    trainer = runs.trainer(max_steps=1)
    trainer.run(on_calibration=lambda done, of: seen.append((done, of)))
    of = min(trainer.config.calibration_prompts, len(items))
    assert seen and seen[-1] == (of, of) and [done for done, _ in seen] == sorted({done for done, _ in seen})
    trainer.run(on_calibration=lambda done, of: seen.append((-1, of)))  # goes on from its checkpoint
    assert seen[-1] == (of, of)


def test_a_channel_that_hardly_moves_is_not_blown_up(runs: Run) -> None:
    """Its deviation is a hundredth of the mean one at least."""
    fuser, channels = runs.trainer().trained, objective.Channels()
    torch.manual_seed(0)
    pieces = [tuple(torch.randn(len(x), 50, x.shape[-1]) for x in (fuser.sharer_mean, fuser.receiver_mean))]
    pieces[0][0][:, :, 0] = 7.0
    list(channels.of(pieces))
    channels.put_into(fuser)
    moving = pieces[0][0][..., 1:].std(1)
    floor = 0.01 * moving.sum(-1) / (moving.shape[-1] + 1)  # the constant channel counts in the mean, as nothing
    torch.testing.assert_close(fuser.sharer_std[:, 0, 0], floor)
    torch.testing.assert_close(fuser.sharer_std[:, 0, 1:], moving)


def test_gradients_are_clipped(runs: Run) -> None:
    trainer = runs.trainer(clip=1e-3, epochs=1)
    step, norms = trainer.optimizer.step, []

    def noted(*arguments: Any, **named: Any) -> Any:
        norms.append(torch.stack([p.grad.norm() for p in trainer.trained.parameters() if p.grad is not None]).norm())
        return step(*arguments, **named)

    trainer.optimizer.step = noted
    records: list[dict[str, Any]] = []
    trainer.run(records.append)
    before = [record["gradient"] for record in records if "gradient" in record]
    assert len(norms) == len(before) > 1 and min(before) > 1e-3  # what the log has is the norm before
    assert all(norm == pytest.approx(1e-3, rel=1e-3) for norm in norms)


def test_calibration_measures_what_is_fused(runs: Run) -> None:
    """Mean and deviation of each channel over the positions that the first prompts fuse, computed one by one."""
    trainer = runs.trainer()
    pair, fuser, items = trainer.objective.pair, trainer.trained, trainer.data.train[:5]
    channels = objective.Channels()
    assert len(list(channels.of(objective.fused_inputs(pair, objective.in_pieces(items, 2), None)))) == 3
    channels.put_into(fuser)
    keys: list[torch.Tensor] = []
    for item in items:
        mine, other, index = item.prompt.receiver[:-1], item.prompt.sharers[0], item.prompt.maps[0][:-1]
        cache = pair.receiver.model(torch.tensor([mine]))[CACHE].layers[2].keys
        theirs = pair.sharers[0].model(torch.tensor([other]))[CACHE].layers[3].keys
        for t, s in enumerate(index):
            if s >= 0:
                keys.append(torch.cat([cache[0, :, t].flatten(), theirs[0, :, s].flatten()]))
    x = torch.stack(keys)
    last = list(fuser.receiver_layers.tolist()).index(2)
    width = fuser.receiver_mean.shape[-1]
    assert fuser.config.layer_map[last] == (2, 3)
    got = torch.cat([fuser.receiver_mean[last, 0], fuser.sharer_mean[last, 0]])
    torch.testing.assert_close(got, x.mean(0), atol=1e-4, rtol=1e-4)
    got = torch.cat([fuser.receiver_std[last, 0], fuser.sharer_std[last, 0]])
    torch.testing.assert_close(got, x.std(0), atol=1e-4, rtol=1e-4)
    assert width == 24


def test_a_finished_run_is_left_alone(runs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs.trainer().run()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def never(*_: Any) -> None:
        raise AssertionError("nothing is left to train")

    monkeypatch.setattr(Trainer, "_train_step", never)
    assert runs.trainer().run() == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_seed_decides(runs: Run, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trainer = runs.trainer(output=tmp_path / name, seed=seed, epochs=1)
        torch.manual_seed(ord(name))  # whatever was drawn before, dropout and noise are the run's own
        folder = trainer.run()
        weights.append(load_file(folder / "fuser.safetensors"))
    assert same_weights(weights[0], weights[1]) and not same_weights(weights[0], weights[2])


def test_the_end_may_lie_within_an_epoch(runs: Run, tmp_path: Path) -> None:
    """4 steps an epoch: the first 6 of a run, in the same order, with rates that fall to zero in them."""
    seen: dict[str, list[list[str]]] = {}

    def run(name: str, **changes: Any) -> list[dict[str, Any]]:
        trainer = runs.trainer(output=tmp_path / name, **changes)
        backward, batches = trainer.backward, seen.setdefault(name, [])
        trainer.backward = lambda batch, parts: batches.append([i.id for i in batch]) or backward(batch, parts)  # type: ignore[method-assign,func-returns-value]
        records: list[dict[str, Any]] = []
        trainer.run(records.append)
        return records

    run("whole", epochs=2)
    records = run("cut", max_steps=6)
    assert seen["cut"] == seen["whole"][:6] and len(seen["whole"]) == 8
    assert records[-1]["rate"] == 1e-2 * rate(5, 6, 0.1) > 0 and "holdout_loss" in records[-1]
    assert runs.trainer(max_steps=100).steps == 12


def test_a_run_goes_on_in_smaller_parts(runs: Run) -> None:
    """As is advised where memory has run out; checkpoints may come more often too."""
    with pytest.raises(Cut):
        runs.trainer(save_every=2).run(cut)
    trainer = runs.trainer(accumulate=2, save_every=1)
    records: list[dict[str, Any]] = []
    trainer.run(records.append)
    assert [r["step"] for r in records] == list(range(3, 13))


def test_the_hold_out_is_looked_at_in_parts_of_like_length(runs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows at once as training takes, whatever the batch: what fits in one fits in the other."""
    seen: list[list[int]] = []
    trainer = runs.trainer(accumulate=2)
    forward = trainer.objective.forward

    def look(items: Sequence[Item], per: str) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append([item.length for item in items])
        return forward(items, per)

    monkeypatch.setattr(trainer.objective, "forward", look)
    holdout = trainer.data.holdout
    found = loop.evaluate(trainer.objective, holdout, trainer.rows)
    assert trainer.rows == 2 and [len(rows) for rows in seen] == [2, 2, 2]
    assert [n for rows in seen for n in rows] == sorted(item.length for item in holdout)
    torch.testing.assert_close(found, loop.evaluate(trainer.objective, holdout, len(holdout)), rtol=1e-5, atol=1e-5)


def test_another_recipe_or_other_data_in_the_same_folder(runs: Run, tmp_path: Path) -> None:
    runs.trainer().run()
    before = (tmp_path / "run" / "fuser" / "fuser.safetensors").read_bytes()
    with pytest.raises(C2CError, match=r"holds a run of another recipe .*; choose another output"):
        runs.trainer(epochs=4).run()
    with pytest.raises(C2CError, match=r"the data of the run in .* has changed"):
        runs.trainer(rows=23).run()
    trainer = runs.trainer()
    first = trainer.data.train[0]
    trainer.data.train[0] = replace(first, response=first.response[::-1])  # a row edited in place
    with pytest.raises(C2CError, match=r"the data of the run in .* has changed"):
        trainer.run()
    trainer = runs.trainer()
    trainer.objective.pair.sharers[0].__dict__["fingerprint"] = "of other weights"
    with pytest.raises(C2CError, match=r"the models of the run in .* have changed"):
        trainer.run()
    assert (tmp_path / "run" / "fuser" / "fuser.safetensors").read_bytes() == before


def test_a_loss_that_is_no_number(runs: Run, tmp_path: Path) -> None:
    trainer = runs.trainer(save_every=2)

    def spoil(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            with torch.no_grad():
                trainer.trained.proj_out.weight[0, 0, 0] = float("nan")

    with pytest.raises(C2CError, match=r"the loss is nan .* at step 4; train again in another output with a lower"):
        trainer.run(spoil)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2 and all(tensor.isfinite().all() for tensor in state["weights"].values())
    assert not (tmp_path / "run" / "fuser").exists()


def test_a_hold_out_loss_that_is_no_number(runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is neither the best nor merely no better."""
    scripted(monkeypatch, [1.0, float("nan"), 0.5])
    with pytest.raises(C2CError, match=r"the loss on the hold-out is nan at step 2; train again in another output"):
        runs.trainer(evaluate_every=1, save_every=1, keep="best").run()
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1


@pytest.mark.parametrize("room", [0, 20_000])
def test_a_disk_that_fills_up(runs: Run, tmp_path: Path, room: int) -> None:
    """The system's own error, the last checkpoint as it was, and nothing half-written that would keep the disk full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint = tmp_path / "run" / "checkpoint.pt"

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            assert checkpoint.stat().st_size > 20_000
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))

    trainer = runs.trainer(save_every=2)
    trainer._log = lambda record: None  # type: ignore[method-assign]
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match="File too large") as found:
            trainer.run(fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert "checkpoint.pt" in str(found.value.filename)
    assert torch.load(checkpoint, weights_only=True)["step"] == 2
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    assert runs.trainer(save_every=2).run().exists()  # goes on


def test_epochs_that_are_not_needed_are_not_drawn(runs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def counted(items: Any, size: int, seed: int, epoch: int) -> Any:
        drawn.append(epoch)
        return batches(items, size, seed, epoch)

    monkeypatch.setattr(loop, "batches", counted)
    trainer = runs.trainer(epochs=1_000_000, max_steps=5)
    assert sum(1 for _ in trainer._remaining()) == 5 and len(drawn) <= 2


def test_the_ids_are_those_of_what_was_trained_on(runs: Run) -> None:
    trainer = runs.trainer(max_steps=1, batch_size=4)
    first = batches(trainer.data.train, 4, trainer.config.seed, 0)[0]
    ids = (trainer.run() / "training_ids.txt").read_text().splitlines()
    assert ids == sorted(item.id for item in first) and len(ids) == 4
    whole = runs.trainer(epochs=2, output=runs.folder / "two")
    ids = (whole.run() / "training_ids.txt").read_text().splitlines()
    assert ids == sorted(item.id for item in whole.data.train)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped here")
def test_a_resumed_run_lets_go_of_its_checkpoint(runs: Run) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.trainer(save_every=1).run(stop)
    mapped: list[bool] = []
    runs.trainer(save_every=1).run(lambda record: mapped.append("checkpoint.pt" in Path("/proc/self/maps").read_text()))
    assert mapped and not any(mapped[1:])


def test_two_processes_in_one_folder(runs: Run, tmp_path: Path) -> None:
    def second(record: dict[str, Any]) -> None:
        if record["step"] == 1:
            with pytest.raises(C2CError, match=r"another process writes to .*run; wait for it, or choose another"):
                runs.trainer().run()

    runs.trainer(epochs=1).run(second)
    runs.trainer(epochs=1).run()


def test_a_store_with_a_gap_is_refused_before_the_first_step(runs: Run, tmp_path: Path) -> None:
    pair = pair_of()
    config = config_of(tmp_path)
    data = prepare(pair, config)
    for j, lm in enumerate((pair.receiver, pair.sharers[0])):
        prompts = [i.prompt.sharers[0] if j else i.prompt.receiver for i in (*data.train, *data.holdout)]
        store = Store(tmp_path / str(j), lm, "bfloat16")
        store.fill(lm, prompts[:-2])  # of the hold-out
        gap = {"store": store, "receiver_store": None} if j else {"store": None, "receiver_store": store}
        with pytest.raises(C2CError, match=r"the store .* lacks 2 of the recipe's \d+ prompts; run c2c precompute"):
            Trainer(pair, config, data=data, **gap)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_that_a_step_reads_is_read_ahead(
    runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Of both stores and for every part of a batch, some of which are empty: 22 rows in batches of 5."""
    pair = pair_of()
    config = config_of(tmp_path, accumulate=accumulate, batch_size=5, epochs=1, evaluate_every=100)
    data = prepare(pair, config)
    stores = []
    for name, lm in (("sharer", pair.sharers[0]), ("receiver", pair.receiver)):
        stores.append(Store(tmp_path / name, lm, "bfloat16"))
        items = (*data.train, *data.holdout)
        stores[-1].fill(lm, [i.prompt.sharers[0] if name == "sharer" else i.prompt.receiver for i in items])
    read, here = Store._read, []

    def noted(self: Store, *arguments: Any) -> KV:
        here.append(threading.current_thread().name.startswith("read-ahead"))
        return read(self, *arguments)

    def losses(name: str) -> list[float]:
        seen: list[float] = []
        changed = config.model_copy(update={"output": tmp_path / name})
        Trainer(pair_of(), changed, stores[0], data, stores[1]).run(lambda record: seen.append(record["loss"]))
        return seen

    monkeypatch.setattr(Store, "_read", noted)
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: {})
    ahead = losses("ahead")
    assert len(here) == 2 * accumulate * len(ahead) == 8 * accumulate and all(here)
    monkeypatch.setattr(objective.FuserObjective, "read_ahead", lambda self, parts: parts)
    here.clear()
    assert losses("as they come") == ahead and not any(here)


def test_a_gradient_that_is_no_number(runs: Run) -> None:
    trainer = runs.trainer()
    trainer.trained.proj_out.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = trainer.trained.gate_logit.detach().clone()
    with pytest.raises(C2CError, match=r"its gradient (nan|inf) at step 1;"):
        trainer.run()
    assert torch.equal(trainer.trained.gate_logit, before)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (os.environ["EVIL_FILE"], "w"))


def test_a_damaged_checkpoint(runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.trainer(epochs=1).run()
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    touched = tmp_path / "touched"
    monkeypatch.setenv("EVIL_FILE", str(touched))
    torch.save({"items": Evil()}, tmp_path / "evil.pt")
    code = pickle.dumps(Evil(), protocol=2)
    torch.save({"step": 3}, tmp_path / "odd.pt")
    for content in (
        whole[:5000],
        whole[:-30],
        b"",
        b"nonsense",
        bytes(range(256)) * 40,
        code,
        *((tmp_path / n).read_bytes() for n in ("evil.pt", "odd.pt")),
    ):
        path.write_bytes(content)
        with pytest.raises(C2CError, match=r"checkpoint.pt is damaged \(\w+\); remove it"):
            runs.trainer(epochs=1).run()
    assert not touched.exists()
    pickle.loads(code).close()
    assert touched.exists()  # it does run when it is unpickled
    path.unlink()
    runs.trainer(epochs=1).run()  # as the message says


def test_a_run_cut_anywhere_ends_the_same(runs: Run, tmp_path: Path) -> None:
    """At random steps, several times in a row, with random distances of the checkpoints: weights, log and record."""
    settings = {"accumulate": 2, "schedule": "cosine", "keep": "best", "patience": 3, "evaluate_every": 2}
    whole = runs.trainer(output=tmp_path / "whole", **settings).run()
    expected, log = load_file(whole / "fuser.safetensors"), log_of(tmp_path / "whole")
    generator = random.Random(0)
    for number in range(6):
        output = tmp_path / f"cut{number}"
        every, cuts = generator.randint(1, 5), sorted(generator.sample(range(1, 13), 3))
        settings["save_every"] = every

        def cut(record: dict[str, Any], cuts: list[int] = cuts) -> None:
            if cuts and record["step"] == cuts[0]:
                cuts.pop(0)
                raise Cut

        while not (output / "fuser").exists():
            torch.manual_seed(number)
            try:
                runs.trainer(output=output, **settings).run(cut)
            except Cut:
                torch.rand(number)
        assert same_weights(load_file(output / "fuser" / "fuser.safetensors"), expected), (every, number)
        assert log_of(output) == log


def test_seconds_go_on_behind_a_stop(runs: Run) -> None:
    def stop(record: dict[str, Any]) -> None:
        if record["step"] == 3:  # as often as a checkpoint is saved, which is behind this
            trainer.seconds = 1000.0
        if record["step"] == 4:
            raise Cut

    trainer = runs.trainer()
    with pytest.raises(Cut):
        trainer.run(stop)
    fuser = runs.trainer().run()
    rows = [json.loads(line) for line in (runs.folder / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["seconds"] < 1000] == [1, 2, 3]
    assert json.loads((fuser / "config.json").read_text())["training"]["seconds"] >= 1000


def test_the_first_step_has_the_first_temperature(runs: Run) -> None:
    """It falls geometrically from then on, and is what the step computes with; see `C2CFuser.set_progress`."""
    settings = {"initial_temperature": 1.0, "final_temperature": 2.0**-8, "anneal_steps": 8}
    pair, config, seen = pair_of(**settings), config_of(runs.folder), []

    def look(fuser: Any, _: Any) -> None:
        if fuser.training:
            seen.append(fuser.temperature.item())

    pair.fusers[0].register_forward_pre_hook(look)
    Trainer(pair, config, None, prepare(pair, config)).run()
    assert seen == pytest.approx([2.0 ** -min(step, 8) for step in range(12)])


def scripted(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> list[float]:
    """Let the hold-out have these losses, one evaluation after the other."""
    left = list(losses)
    monkeypatch.setattr(loop, "evaluate", lambda *_: torch.tensor([6 * left.pop(0), 0.0], dtype=torch.float64))
    return left


@pytest.mark.parametrize("keep", ["last", "best"])
def test_patience(runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    """Two evaluations no better than the third's end the run; an interruption between them doesn't make it longer."""
    settings = {"evaluate_every": 1, "save_every": 1, "patience": 2, "keep": keep, "weights_on_disk": "float32"}
    left = scripted(monkeypatch, [3.0, 2.0, 2.5, 1.0, 1.0, 1.5, 0.5])
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def note(record: dict[str, Any]) -> None:
        weights[record["step"]] = {k: v.clone() for k, v in trainer.trained.state_dict().items()}
        if record["step"] == 5 and trainer is first:
            left.insert(0, 1.0)  # the fifth step's evaluation will be done again
            raise Cut

    trainer = first = runs.trainer(**settings)
    with pytest.raises(Cut):
        trainer.run(note)
    trainer = runs.trainer(**settings)
    folder = trainer.run(note)
    assert trainer.step == 6 and left == [0.5]
    saved = json.loads((folder / "config.json").read_text())["training"]
    kept = 4 if keep == "best" else 6
    assert (saved["steps"], saved["best_step"], saved["holdout_loss"]) == (6, 4, {4: 1.0, 6: 1.5}[kept])
    for name, tensor in load_file(folder / "fuser.safetensors").items():
        assert torch.equal(tensor, weights[kept][name]), name
    assert [row["best_step"] for row in log_of(tmp_path / "run")] == [1, 2, 2, 4, 4, 4]
    assert runs.trainer(**settings).run() == folder and left == [0.5]  # and it stays ended


def test_patience_needs_a_hold_out(tmp_path: Path) -> None:
    for settings in ({"patience": 2}, {"keep": "best"}):
        with pytest.raises(ValueError, match="look at the hold-out, which is empty"):
            config_of(tmp_path, holdout=0, **settings)


# ---- who watches ----------------------------------------------------------------------------------------------------


def test_tensorboard_gets_the_log(runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a run that goes on: it takes back what was written behind the checkpoint."""
    written: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, global_step: int) -> None:
            written.append((name, value, global_step))

        def flush(self) -> None: ...

        def close(self) -> None:
            written.append("closed")

    with monkeypatch.context() as without, pytest.raises(C2CError, match=r"pip install 'cache2cache\[tensorboard\]'"):
        without.setattr(loop.importlib.util, "find_spec", lambda name: None)
        runs.trainer(trackers=["tensorboard"])
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(
        accelerate.tracking, "get_available_trackers", lambda: [accelerate.utils.LoggerType.TENSORBOARD]
    )

    def cut(record: dict[str, Any]) -> None:
        if record["step"] == 8:
            raise Cut

    with pytest.raises(Cut):
        runs.trainer(trackers=["tensorboard"]).run(cut)
    assert written[0] == (str(tmp_path / "run" / "tensorboard"), 1)
    written.clear()
    runs.trainer(trackers=["tensorboard"]).run()
    assert written[0] == (str(tmp_path / "run" / "tensorboard"), 7) and written[-1] == "closed"
    for row in log_of(tmp_path / "run")[6:]:
        for name in ("loss", "rate", "holdout_loss"):
            assert name not in row or (name, row[name], row["step"]) in written
    runs.trainer().run()  # who watches doesn't make another run


# ---- several processes, several parts -------------------------------------------------------------------------------


def launch(*arguments: str | Path, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script or module in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)


def assert_near(found: torch.Tensor, expected: torch.Tensor, case: str) -> None:
    assert (found - expected).norm() <= 1e-5 * expected.norm(), case


def test_parts_of_a_batch() -> None:
    """Every example once, in parts as equal as can be; neighbours stay together."""
    prompt = items_of(pair_of())[0].prompt
    for size in (1, 3, 8, 13):
        batch = [Item(str(n), prompt, [1]) for n in range(size)]
        for processes, accumulate in ((1, 1), (1, 3), (2, 1), (2, 2), (3, 4)):
            parts = [parts_of(batch, accumulate, p, processes) for p in range(processes)]
            flat = [item for own in parts for part in own for item in part]
            assert sorted(i.id for i in flat) == sorted(i.id for i in batch)
            lengths = {len(part) for own in parts for part in own}
            assert max(lengths) - min(lengths) <= 1 and {len(own) for own in parts} == {accumulate}
            for part in (part for own in parts for part in own):
                numbers = [int(item.id) for item in part]
                assert numbers == list(range(numbers[0], numbers[0] + len(part))) if part else size < 12
    assert parts_of(batch, 1) == [batch]


@pytest.mark.parametrize("loss", ["token", "example", "sum"])
def test_parts_give_the_gradient_of_the_batch(tmp_path: Path, loss: str) -> None:
    """Responses of unequal lengths; the whole batch's gradient is autograd's of `response_loss`."""
    write_rows(tmp_path / "rows.jsonl")
    pair = pair_of(gate_noise="none", dropout=0.0)
    data = prepare(pair, config_of(tmp_path))
    batch = data.train[:8]
    assert len({len(item.response) for item in batch}) > 2
    pair.fusers.train()
    expected, _ = response_loss(pair, batch, None, loss)
    whole = torch.cat([g.flatten() for g in torch.autograd.grad(expected, list(pair.fusers.parameters()))])
    for accumulate in (1, 2, 3, 8):
        trainer = Trainer(pair, config_of(tmp_path, loss=loss, accumulate=accumulate, batch_size=8), None, data)
        trainer.optimizer.zero_grad()
        value = trainer.backward(batch)
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        got = torch.cat([p.grad.flatten() for p in trainer.trained.parameters() if p.grad is not None])
        assert_near(got, whole, f"{accumulate} parts")


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Gradients, losses step by step and on the hold-out; batches smaller than the number of parts. With noise: each
    process draws its own, and all have the same weights, the same every time and after an interruption."""
    write_rows(tmp_path / "rows.jsonl")
    script = Path(__file__).with_name("several.py")
    done = launch(script, tmp_path, "two")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"two-{n}.pt", weights_only=True) for n in (0, 1))
    assert first["process"].tolist() == [0, 2] and second["process"].tolist() == [1, 2]
    assert torch.equal(first["weights"], second["weights"])
    assert not torch.equal(first["first drawn"], second["first drawn"])
    for one in (first, second):
        for again in ("again", "cut"):
            assert torch.equal(one["noise"], one[f"noise {again}"]), again
            assert torch.equal(one["weights"], one[f"weights {again}"]), again
    alone = measure(tmp_path, "one")
    assert torch.equal(alone["first drawn"], first["first drawn"])
    for key in alone:
        if "gradient" in key or "loss of" in key:
            assert_near(first[key], alone[key], key)
            assert torch.equal(first[key], second[key]), key
        elif "losses" in key or "hold-out" in key:
            torch.testing.assert_close(first[key], alone[key], rtol=1e-3, atol=0)  # AdamW blows small gradients up
        elif "bytes" in key:  # each process holds half of the weights; a tied LM head counts as one of its own
            assert 0.5 <= first[key] / alone[key] < 0.65
    # Each encodes a part, and both have all, in the order of one process. An error of one is said by both.
    assert [one["encoded here"].tolist() for one in (first, second, alone)] == [[11, 11], [11, 11], [22, 22]]
    for key in ("data", "refused"):
        assert len(alone[key]) and all(torch.equal(one[key], alone[key]) for one in (first, second)), key
    assert alone["token1 losses"].shape == (4,)
    pair = pair_of(dropout=0.1)
    config = config_of(tmp_path, output=tmp_path / "two" / "noise", epochs=1, save_every=2)
    with pytest.raises(C2CError, match="has 2 processes, 1 were started; start 2 again"):
        Trainer(pair, config, None, prepare(pair, config)).run()


def test_two_processes_from_the_command_line(models: Path, tmp_path: Path) -> None:
    """A kill of one ends both and leaves a checkpoint from which both go on; only the first one prints. Two processes
    that have half of both models each train the same."""
    sources = {k: v for k, v in recipe_of(models).items() if k in ("receiver", "sharer")}
    recipe = write_recipe(tmp_path, **sources)
    killer = tmp_path / "killer.py"
    killer.write_text(
        "import os, signal, sys\n"
        "from cache2cache.cli import main\n"
        "from cache2cache.training.loop import Trainer\n"
        "def step(self, *batch, original=Trainer._train_step):\n"
        "    if self.step == 7 and not self.is_main:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, *batch)\n"
        "Trainer._train_step = step\n"
        "main()\n"
    )
    broken = launch(killer, "train", recipe, "--output", tmp_path / "cut")
    assert broken.returncode != 0 and not (tmp_path / "cut" / "fuser").exists()
    assert torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] == 6
    again = launch("-m", "cache2cache", "train", recipe, "--output", tmp_path / "cut")
    assert again.returncode == 0 and again.stdout == f"{tmp_path / 'cut' / 'fuser'}\n", again.stderr
    done = launch("-m", "cache2cache", "train", recipe, "--output", tmp_path / "sharded", "--set", "shard=true")
    assert done.returncode == 0, done.stderr
    further = ["--set", f"start_from={tmp_path / 'cut' / 'fuser'}", "--output", tmp_path / "further"]
    more = launch("-m", "cache2cache", "train", recipe, *further)
    assert more.returncode == 0, more.stderr
    assert not any("warning:" in run.stderr for run in (again, done, more))
    before, after = log_of(tmp_path / "cut")[-1], log_of(tmp_path / "further")[0]
    assert after["step"] == 0 and after["holdout_loss"] == pytest.approx(before["holdout_loss"], rel=0.01)  # rounded
    whole, sharded = (log_of(tmp_path / name) for name in ("cut", "sharded"))
    assert [row["step"] for row in whole] == list(range(1, 13))
    assert [row["loss"] for row in sharded] == pytest.approx([row["loss"] for row in whole], rel=1e-3)
    about = [json.loads((tmp_path / name / "fuser" / "config.json").read_text()) for name in ("cut", "sharded")]
    assert about[0]["fuser"] == about[1]["fuser"]  # the fingerprints are those of whole weights


def test_sharding_takes_several_processes_and_whole_frozen_models(models: Path, tmp_path: Path) -> None:
    with pytest.raises(C2CError, match="several processes and one was started; start it with torchrun"):
        shard([pair_of().receiver], torch.device("cpu"))
    with pytest.raises(ValueError, match="method: single trains its receiver"):
        config_of(tmp_path, shard=True, method="single")
    with pytest.raises(ValueError, match="llama is quantized; leave one of the two out"):
        config_of(tmp_path, shard=True, receiver={"source": "llama", "quantization": "4bit"})


def test_items_that_a_sharded_model_has_nothing_to_read_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other processes would wait for this one's pass for ever."""
    monkeypatch.setattr(objective, "is_sharded", lambda lm: True)
    write_rows(tmp_path / "rows.jsonl")
    pair, config = pair_of(), config_of(tmp_path)
    data = prepare(pair, config)
    Trainer(pair, config, None, data)
    first = data.train[0]
    data.train[0] = replace(first, prompt=replace(first.prompt, maps=[[-1] * len(first.prompt.receiver)]))
    with pytest.raises(C2CError, match=f"{first.id} leaves a sharded model nothing to read"):
        Trainer(pair, config, None, data)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_launchers_that_shard_are_refused(runs: Run, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Before anything is written: they would take the fuser apart behind the optimizer's back."""
    launched = SimpleNamespace(distributed_type=accelerate.DistributedType[kind], num_processes=2, is_main_process=True)
    monkeypatch.setattr(loop, "_accelerator", lambda config: launched)
    with pytest.raises(C2CError, match=f"the launcher asks for {kind}, which would shard what is trained"):
        runs.trainer()
    assert not (runs.folder / "run").exists()


def test_more_parts_than_examples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 4 can't be computed in 5 parts"):
        config_of(tmp_path, accumulate=5)
