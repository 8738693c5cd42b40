"""Several sharers trained together: one loss, one fuser each; and that a run of them is a run like any other."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

from cache2cache import C2C, C2CError
from cache2cache.fuser import C2CFuser
from cache2cache.kv import CACHE, KV
from cache2cache.models import LM
from cache2cache.training import objective
from cache2cache.training.fit import fit
from cache2cache.training.items import Item, Prepared, prepare
from cache2cache.training.loop import Trainer
from cache2cache.training.objective import FuserObjective, response_loss
from cache2cache.training.plan import plan
from cache2cache.training.store import Store
from training.runs import CHATS, config_of, items_of, pair_of, recipe_of, write_rows
from training.several import Cut

SHARERS = ["qwen3", "gemma3"]  # bytes and pieces; 4 and 6 layers of other sizes
TWO = [{"source": "first"}, {"source": "second"}]


def two_of(**settings: Any) -> C2C:
    return pair_of("llama", SHARERS, **settings)


def stores_of(pair: C2C, folder: Path, items: Sequence[Item]) -> list[Store]:
    """A filled store for each sharer."""
    stores = [Store(folder / str(j), sharer, "bfloat16") for j, sharer in enumerate(pair.sharers)]
    for j, (store, sharer) in enumerate(zip(stores, pair.sharers, strict=True)):
        store.fill(sharer, [list(item.prompt.sharers[j]) for item in items])
    return stores


def gradients(pair: C2C) -> torch.Tensor:
    found = [p.grad for p in pair.fusers.parameters()]
    return torch.cat([g.flatten() for g in found if g is not None])


# ---- the loss -------------------------------------------------------------------------------------------------------


def stock(lm: LM, ids: Sequence[int]) -> KV:
    """What the stock model keeps of a prompt."""
    cache = DynamicCache()  # made without a configuration: sliding layers keep every position
    lm.model(torch.tensor([list(ids)]), use_cache=True, **{CACHE: cache})
    return KV.from_cache(cache)


def by_hand(pair: C2C, item: Item) -> torch.Tensor:
    """The sum of a response's negative log-likelihoods: both changes computed from the clean cache, then added."""
    ids, prompt = list(item.prompt.receiver), item.prompt
    clean = stock(pair.receiver, ids[:-1])
    fused = KV(clean.keys.clone(), clean.values.clone())
    for sharer, fuser, row, index in zip(pair.sharers, pair.fusers, prompt.sharers, prompt.maps, strict=True):
        assert isinstance(fuser, C2CFuser)
        known = stock(sharer, row)
        t = [place for place, s in enumerate(index[:-1]) if s >= 0]
        s = [index[place] for place in t]
        mine, theirs = (
            torch.stack(
                [
                    getattr(kv, kind)[layer, 0, :, places].transpose(0, 1).flatten(1)
                    for kind in ("keys", "values")
                    for layer in layers.tolist()
                ]
            )
            for kv, layers, places in ((clean, fuser.receiver_layers, t), (known, fuser.sharer_layers, s))
        )
        changes = fuser.change(theirs, mine).unflatten(-1, (pair.receiver.num_kv_heads, -1)).transpose(1, 2)
        for g, layer in enumerate(fuser.receiver_layers.tolist() * 2):
            kind = ("keys", "values")[g >= len(fuser.receiver_layers)]
            whole = torch.zeros_like(clean.keys)
            whole[layer, 0, :, t] = changes[g]
            fused = KV(**{**vars(fused), kind: getattr(fused, kind) + whole})
    logits = pair.receiver.model(
        input_ids=torch.tensor([[ids[-1], *item.response[:-1]]]), use_cache=True, **{CACHE: fused.to_cache()}
    ).logits[0]
    return -logits.log_softmax(-1).gather(1, torch.tensor(item.response)[:, None]).sum()


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_are_those_of_both_changes_added_by_hand(normalize: bool, tmp_path: Path) -> None:
    pair = two_of(gate_noise="none", dropout=0.0, normalize=normalize)
    items = items_of(pair)
    objective = FuserObjective(pair, None, False)
    objective.start(config_of(tmp_path, sharer=TWO), Prepared(items, [], 0))
    objective.train()
    loss, _ = objective(items, "sum")
    loss.backward()
    found = gradients(pair)
    pair.fusers.zero_grad()
    expected = torch.stack([by_hand(pair, item) for item in items]).mean()
    expected.backward()
    wanted = gradients(pair)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    for fuser in pair.fusers:  # each of them learns
        for name, parameter in fuser.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_the_loss_is_what_the_pair_scores() -> None:
    """In the mode parallel, where the order of the sharers doesn't matter."""
    pair = two_of(gating=False, dropout=0.0)
    items = items_of(pair)
    expected = -sum(pair.score(i.prompt, [i.response])[0].logprob for i in items) / len(items)
    assert response_loss(pair, items, None, "sum")[0].item() == pytest.approx(expected, rel=1e-4)
    for j in (0, 1):  # both sharers matter
        one = C2C(pair.receiver, [pair.sharers[j]], [pair.fusers[j]])  # type: ignore[list-item]
        alone = response_loss(one, items_of(one), None, "sum")[0].item()
        assert abs(alone - expected) > 0.01
    turned = C2C(pair.receiver, pair.sharers[::-1], [pair.fusers[1], pair.fusers[0]])  # type: ignore[list-item]
    assert response_loss(turned, items_of(turned), None, "sum")[0].item() == pytest.approx(expected, rel=1e-4)


def test_a_sharer_with_nothing_to_say_has_a_gradient_of_zero() -> None:
    """Which other processes, and AdamW, take for a number: with either sharer's map empty, or both."""
    pair = two_of()
    objective = FuserObjective(pair, None, False).train()
    for silent in ({0}, {1}, {0, 1}):
        items = []
        for item in items_of(pair):
            maps = [[-1] * len(m) if j in silent else m for j, m in enumerate(item.prompt.maps)]
            items.append(Item(item.id, replace(item.prompt, maps=maps), item.response))
        pair.fusers.zero_grad()
        objective(items, "token")[0].backward()
        for j, fuser in enumerate(pair.fusers):
            sizes = [p.grad.abs().sum().item() for p in fuser.parameters() if p.grad is not None]
            assert len(sizes) == len(list(fuser.parameters())) and (sum(sizes) == 0) == (j in silent)


# ---- the store ------------------------------------------------------------------------------------------------------


def test_training_from_stores_is_training_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses step by step, and nobody waits for a disk: all is read ahead."""
    write_rows(tmp_path / "rows.jsonl")
    settings = {"normalize": True, "dropout": 0.1}
    pair = two_of(**settings)
    data = prepare(pair, config_of(tmp_path, sharer=TWO))
    stores = stores_of(pair, tmp_path, data.train + data.holdout)
    compute, read = objective.prefill, Store._read

    def losses(name: str, stores: list[Store] | None) -> list[float]:
        seen: list[float] = []
        config = config_of(tmp_path, output=tmp_path / name, epochs=2, sharer=TWO)
        Trainer(two_of(**settings), config, stores, data).run(lambda record: seen.append(record["loss"]))
        return seen

    def never(*_: Any) -> KV:
        raise AssertionError("the sharers have nothing to compute")

    here: list[str] = []

    def noted(self: Store, *arguments: Any) -> KV:
        here.append(threading.current_thread().name)
        return read(self, *arguments)

    monkeypatch.setattr(Store, "_read", noted)
    monkeypatch.setattr(objective, "prefill", never)
    stored = losses("stored", stores)
    # Two stores, eight steps; calibration and the two evaluations read as they go.
    assert sum(name.startswith("read-ahead") for name in here) == 16 and len(here) == 16 + 2 * (1 + 2 * 2)
    monkeypatch.setattr(objective, "prefill", lambda *a, **k: compute(*a, **k).to(torch.bfloat16).to(torch.float32))
    assert len(stored) == 8 and stored == pytest.approx(losses("live", None), rel=1e-4)


def test_each_sharer_has_its_own_store(tmp_path: Path) -> None:
    pair = two_of()
    items = items_of(pair)
    stores = stores_of(pair, tmp_path, items)
    asked = [objective.what_is_read(pair, [i.prompt for i in items], j=j) for j in (0, 1)]
    assert asked[0].rows != asked[1].rows and asked[0].layers == (1, 4) and asked[1].layers == (3, 6)
    for wrong in (stores[:1], stores[0], stores * 2):
        with pytest.raises(C2CError, match=r"\d stores for 2 sharers; give one for each, in the same order"):
            response_loss(pair, items, wrong)
    with pytest.raises(C2CError, match="is not in the store"):
        response_loss(pair, items, stores[::-1])


# ---- the run --------------------------------------------------------------------------------------------------------


class Run:
    """A run of two sharers in this process: the same data each time, other settings as asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_rows(folder / "rows.jsonl")
        pair = two_of()
        data = prepare(pair, config_of(folder, sharer=TWO))
        self.stores = stores_of(pair, folder, data.train + data.holdout)

    def trainer(self, **changes: Any) -> Trainer:
        pair = two_of(dropout=0.1, normalize=True)
        config = config_of(self.folder, sharer=TWO, **changes)
        return Trainer(pair, config, self.stores, prepare(pair, config))


@pytest.fixture
def runs(tmp_path: Path) -> Run:
    return Run(tmp_path)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / str(j) / "fuser.safetensors" for j in (0, 1)]
    return {f"{j}.{name}": tensor for j, file in enumerate(files) for name, tensor in load_file(file).items()}


def test_a_run_cut_anywhere_ends_the_same(runs: Run, tmp_path: Path) -> None:
    settings = {"keep": "best", "evaluate_every": 2, "save_every": 2}
    expected = weights_of(runs.trainer(output=tmp_path / "whole", **settings).run())
    log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    cuts = [3, 5, 10]

    def cut(record: dict[str, Any]) -> None:
        if cuts and record["step"] == cuts[0]:
            cuts.pop(0)
            raise Cut

    output = tmp_path / "cut"
    while not (output / "fuser").exists():
        try:
            runs.trainer(output=output, **settings).run(cut)
        except Cut:
            torch.rand(3)
    got = weights_of(output / "fuser")
    assert not cuts and got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in expected)
    rows = [[json.loads(line) | {"seconds": 0} for line in lines] for lines in (log, (output / "log.jsonl").open())]
    assert rows[0] == rows[1]


def test_what_is_left_answers_as_it_was_trained(runs: Run, tmp_path: Path) -> None:
    trainer = runs.trainer(weights_on_disk="float32")
    first = [p.detach().clone() for p in trainer.trained.parameters()]
    records: list[dict[str, Any]] = []
    folder = trainer.run(records.append)
    assert all(not torch.equal(p, before) for p, before in zip(trainer.trained.parameters(), first, strict=True))
    assert records[-1]["holdout_loss"] < records[4]["holdout_loss"]
    pair = trainer.objective.pair
    pair.fusers.eval()
    expected = response_loss(pair, trainer.data.holdout, None, "example")[0].item()
    models = {"receiver": pair.receiver, "sharers": pair.sharers}
    for again in (
        C2C.from_pretrained([folder / "0", folder / "1"], **models),
        C2C.from_pretrained(folder, subfolder=["0", "1"], **models),
    ):
        assert response_loss(again, trainer.data.holdout, None, "example")[0].item() == expected
        assert torch.equal(again.prefill(CHATS[1]).kv.keys, pair.prefill(CHATS[1]).kv.keys)
    ids = sorted(item.id for item in trainer.data.train)
    for j, fuser in enumerate(pair.fusers):
        saved = json.loads((folder / str(j) / "config.json").read_text())
        assert saved["training"]["recipe"]["sharer"][j]["source"] == TWO[j]["source"]
        assert saved["fuser"]["sharer"]["num_layers"] == pair.sharers[j].num_layers
        assert (folder / str(j) / "training_ids.txt").read_text().split() == ids
        assert isinstance(fuser, C2CFuser) and fuser.temperature < 1  # annealed with the others


def test_statistics_and_start_are_those_of_each_sharer(tmp_path: Path) -> None:
    """As if it were alone; from a ridge start each goes half of the way, so that together they go all of it."""
    write_rows(tmp_path / "rows.jsonl")
    settings = {"normalize": True, "projection_init": "ridge", "blend": 0.8}
    pair = two_of(**settings)
    config = config_of(tmp_path, sharer=TWO)
    FuserObjective(pair, None, False).start(config, prepare(pair, config))
    for j, name in enumerate(SHARERS):
        one = pair_of("llama", name, **settings)
        FuserObjective(one, None, False).start(config, prepare(one, config))
        mine, alone = pair.fusers[j].state_dict(), one.fusers[0].state_dict()
        assert not torch.equal(mine["sharer_mean"], torch.zeros_like(mine["sharer_mean"]))
        for key in ("sharer_mean", "sharer_std", "receiver_mean", "receiver_std"):
            torch.testing.assert_close(mine[key], alone[key])
        for key in ("proj_out.weight", "proj_out.bias"):
            torch.testing.assert_close(2 * mine[key], alone[key], rtol=1e-3, atol=1e-5)


def test_plan_counts_all_fusers_and_models(runs: Run) -> None:
    trainer = runs.trainer()
    found, pair = plan(trainer), trainer.objective.pair
    assert found.parameters == sum(p.numel() for fuser in pair.fusers for p in fuser.parameters())
    sizes = [sum(t.nbytes for t in (*s.model.parameters(), *s.model.buffers())) for s in pair.sharers]
    assert found.sharers == sum(sizes) and found.checkpoint > 12 * found.parameters


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_log_has_the_mean_of_the_weights(
    runs: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    """Of all positions, heads and modules of both fusers and of all parts of the step, each computed once."""
    compute, seen = C2CFuser._weight, []

    def noted(self: C2CFuser, z: torch.Tensor) -> torch.Tensor:
        weight = compute(self, z)
        if self.training:
            seen.append(weight.detach().flatten().clone())
        return weight

    monkeypatch.setattr(C2CFuser, "_weight", noted)
    means: list[float] = []

    def look(record: dict[str, Any]) -> None:
        means.append(torch.cat(seen).mean().item())
        assert len(seen) == 2 * accumulate and record["mean_weight"] == pytest.approx(means[-1], rel=1e-5)
        seen.clear()

    runs.trainer(accumulate=accumulate).run(look)
    assert len(set(means)) == len(means) == 12 and all(0 < mean < 1 for mean in means)


def test_no_weights_no_mean(tmp_path: Path) -> None:
    pair = two_of(weighting=False)
    objective = FuserObjective(pair, None, False).train()
    objective(items_of(pair), "token")
    assert objective.after_step() == {"gates_open": 2 * (3 + 3)}


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_what_several_sharers_cannot_have(tmp_path: Path) -> None:
    pair = two_of()
    with pytest.raises(C2CError, match="distill is towards one sharer, 2 were given"):
        FuserObjective(pair, None, False, distill=1.0)
    with pytest.raises(C2CError, match="trained in the mode parallel, the pair's is sequential"):
        FuserObjective(C2C(pair.receiver, pair.sharers, list(pair.fusers), mode="sequential"), None, False)  # type: ignore[arg-type]
    with pytest.raises(C2CError, match="the pair has 2 sharers, the recipe names 1"):
        Trainer(pair, config_of(tmp_path), None, Prepared([], [], 0))
    ridge = two_of(variant="ridge")
    with pytest.raises(C2CError, match="a fuser is fitted for one sharer, 2 were given"):
        fit(ridge, config_of(tmp_path, sharer=TWO), None, Prepared([], [], 0))
    for changes, words in (
        ({"distill": 0.5}, "distill is towards one sharer, 2 are given"),
        ({"fuser": {"residual": False, "gating": False}}, "residual: false replaces"),
        ({"store": "one"}, "store names 1 folders for 2 sharers"),
    ):
        with pytest.raises(ValueError, match=words):
            config_of(tmp_path, sharer=TWO, **changes)


def test_one_in_a_list_is_one(tmp_path: Path) -> None:
    """Its result lies where that of a single sharer lies."""
    write_rows(tmp_path / "rows.jsonl")
    weights = []
    sharer = recipe_of(tmp_path)["sharer"]
    for name, given in (("plain", sharer), ("list", [sharer])):
        config = config_of(tmp_path, sharer=given, output=tmp_path / name, epochs=1)
        pair = pair_of(dropout=0.1)
        folder = Trainer(pair, config, None, prepare(pair, config)).run()
        weights.append((folder / "fuser.safetensors").read_bytes())
    assert weights[0] == weights[1]
