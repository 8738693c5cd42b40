"""Fitting a ridge fuser on a recipe: same data and store as training, and nothing half after an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C, C2CError, FuserConfig
from cache2cache.cli import main
from cache2cache.kv import KV
from cache2cache.training import objective
from cache2cache.training.fit import Fitted, fit
from cache2cache.training.items import Prepared, prepare
from cache2cache.training.loop import Trainer
from cache2cache.training.store import Store
from training.runs import CHATS, config_of, pair_of, write_models, write_recipe, write_rows

RIDGE: dict[str, Any] = {"variant": "ridge"}


def ridge_pair(**settings: Any) -> C2C:
    return pair_of(variant="ridge", **settings)


@pytest.mark.parametrize("key_space", ["rotated", "unrotated"])
def test_fit_from_the_store_is_fit_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key_space: str) -> None:
    write_rows(tmp_path / "rows.jsonl")
    pair = ridge_pair(key_space=key_space)
    assert isinstance(pair.fusers[0], Fitted)
    config = config_of(tmp_path, fuser=RIDGE | {"key_space": key_space})
    data = prepare(pair, config)
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    store.fill(pair.sharers[0], [list(i.prompt.sharers[0]) for i in data.train + data.holdout])
    read: list[int] = []
    stored, rows = fit(pair, config, store, data, read.append)
    assert sum(read) == len(data.train) + len(data.holdout)
    compute = objective.prefill
    monkeypatch.setattr(objective, "prefill", lambda *a, **k: compute(*a, **k).to(torch.bfloat16).to(torch.float32))
    again = ridge_pair(key_space=key_space)
    live, live_rows = fit(again, config.model_copy(update={"output": tmp_path / "live"}), None, data)
    assert (live / "fuser.safetensors").is_file()
    one, other = (p.prefill(CHATS[1]).kv for p in (pair, again))
    torch.testing.assert_close(one.keys, other.keys, atol=5e-3, rtol=1e-2)
    torch.testing.assert_close(one.values, other.values, atol=5e-3, rtol=1e-2)
    assert [r["r2"] for r in rows] == pytest.approx([r["r2"] for r in live_rows], abs=1e-4)
    assert [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()] == rows
    loaded = C2C.from_pretrained(stored, receiver=pair.receiver, sharers=pair.sharers)
    fused = loaded.prefill(CHATS[0])
    torch.testing.assert_close(fused.kv.keys, pair.prefill(CHATS[0]).kv.keys, atol=0.1, rtol=0.1)
    closed = ridge_pair(key_space=key_space).prefill(CHATS[0])
    assert not torch.equal(fused.kv.keys, closed.kv.keys)


def test_the_prediction_is_close_to_the_receiver(tmp_path: Path) -> None:
    """A model that shares with itself predicts its own cache, and answers as it would alone."""
    write_rows(tmp_path / "rows.jsonl")
    alone = ridge_pair().receiver
    pair = C2C.from_models(alone, alone, FuserConfig(variant="ridge"))
    _, rows = fit(pair, config_of(tmp_path, fuser=RIDGE), None, prepare(pair, config_of(tmp_path, fuser=RIDGE)))
    assert min(r["r2"] for r in rows) > 0.999
    closed = C2C.from_models(alone, alone, FuserConfig(variant="ridge")).prefill(CHATS[0]).kv
    fused = pair.prefill(CHATS[0]).kv
    assert not torch.equal(fused.keys, closed.keys)
    torch.testing.assert_close(fused.keys, closed.keys, atol=0.05, rtol=0.05)


def test_interrupted_or_empty(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    pair, config = ridge_pair(), config_of(tmp_path, fuser=RIDGE)
    data = prepare(pair, config)

    def stop(examples: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(pair, config, None, data, stop)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".lock", "recipe.json"]
    assert not pair.fusers[0].open_gates.any()  # as it was
    folder, _ = fit(pair, config, None, data)
    assert (folder / "training_ids.txt").exists()
    with pytest.raises(C2CError, match="set holdout in the recipe"):
        fit(pair, config, None, Prepared(data.train, [], 0))
    store = Store(tmp_path / "store", pair.sharers[0], "bfloat16")
    store.fill(pair.sharers[0], [list(i.prompt.sharers[0]) for i in data.train])
    with pytest.raises(C2CError, match=r"lacks \d+ of the recipe's [0-9]+ prompts"):
        fit(pair, config, store, data, stop)  # before anything is read
    with pytest.raises(C2CError, match="a run of another recipe"):
        fit(pair, config_of(tmp_path, fuser=RIDGE | {"blend": 0.5}), None, data)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_models(tmp_path)
    recipe = write_recipe(tmp_path, fuser=RIDGE)
    with pytest.raises(SystemExit) as leaving:
        main(["train", str(recipe)])
    printed = capsys.readouterr()
    assert leaving.value.code in (0, None), printed.err
    folder = Path(printed.out.strip())
    assert "values of layer 2: R²" in printed.err and folder == tmp_path / "run" / "fuser"
    saved = json.loads((folder / "config.json").read_text())
    assert saved["fuser"]["variant"] == "ridge" and "r2" in saved["training"]


def test_bottleneck_trains_from_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for the published fuser, with unrotated keys: the store keeps them rotated."""
    write_rows(tmp_path / "rows.jsonl")
    settings: dict[str, Any] = {"variant": "bottleneck", "key_space": "unrotated", "normalize": True, "dropout": 0.1}
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
    stored = losses("stored", store)
    monkeypatch.setattr(objective, "prefill", lambda *a, **k: compute(*a, **k).to(torch.bfloat16).to(torch.float32))
    live = losses("live", None)
    monkeypatch.setattr(
        objective, "prefill", lambda *a, **k: KV(*map(torch.zeros_like, vars(compute(*a, **k)).values()))
    )
    silent = losses("silent", None)
    assert len(stored) == 8 and stored == pytest.approx(live, rel=1e-4)
    assert stored != pytest.approx(silent, rel=1e-3)


def test_what_cannot_be_fitted_is_said_before_anything_is_encoded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_models(tmp_path)
    for changes, options, words in (
        ({"holdout": 0}, [], "fuser.variant ridge chooses its penalty on the hold-out; set holdout"),
        ({}, ["--dry-run"], "--dry-run is for training; fitting ridge reads each example once"),
    ):
        with pytest.raises(SystemExit) as leaving:
            main(["train", str(write_recipe(tmp_path, fuser=RIDGE, **changes)), *options])
        said = " ".join(capsys.readouterr().err.split())
        assert leaving.value.code == 1 and words in said and "encoding" not in said
