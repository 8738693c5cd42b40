"""What a run is said to take before it starts: against what it does take."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache import C2C
from cache2cache.config import FuserConfig, ModelIdentity
from cache2cache.fuser import make_fuser
from cache2cache.training.items import prepare
from cache2cache.training.loop import Trainer
from cache2cache.training.objective import FuserObjective
from cache2cache.training.plan import Plan, _memory, plan
from training.runs import config_of, pair_of, write_rows


def trainer_of(folder: Path, **changes: Any) -> Trainer:
    write_rows(folder / "rows.jsonl")
    config = config_of(folder, **changes)
    # Wide enough that weights outweigh what a checkpoint holds besides.
    pair = pair_of(hidden_dim=64, intermediate_dim=64, normalize=True)
    return Trainer(pair, config, None, prepare(pair, config))


@pytest.fixture
def planned(tmp_path: Path) -> Plan:
    return plan(trainer_of(tmp_path))


def test_sizes_and_steps(planned: Plan, tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    assert planned.steps == 12
    assert planned.parameters == sum(p.numel() for p in trainer.trained.parameters())
    assert planned.receiver == 4 * sum(p.numel() for p in trainer.objective.pair.receiver.model.parameters()) + sum(
        b.nbytes for b in trainer.objective.pair.receiver.model.buffers()
    )
    folder = trainer.run()
    assert (tmp_path / "run" / "checkpoint.pt").stat().st_size == pytest.approx(planned.checkpoint, rel=0.05)
    assert (folder / "fuser.safetensors").stat().st_size == pytest.approx(planned.weights, rel=0.05)
    best = trainer_of(tmp_path, keep="best", output=tmp_path / "best")
    expected = plan(best).checkpoint
    best.run()
    assert (tmp_path / "best" / "checkpoint.pt").stat().st_size == pytest.approx(expected, rel=0.05)


def test_activations_are_those_of_a_part(planned: Plan, tmp_path: Path) -> None:
    """Half the batch at a time keeps about half; and at least the logits, which are read in float32."""
    halved = plan(trainer_of(tmp_path, accumulate=2)).activations
    assert 0.4 * planned.activations < halved < 0.7 * planned.activations
    assert planned.activations > 4 * 4 * 5 * 400  # four responses of five tokens, 400 words


def test_nothing_changes(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    before = {name: tensor.clone() for name, tensor in trainer.trained.state_dict().items()}
    found = plan(trainer)
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.trained.state_dict().items())
    assert all(p.grad is None for p in trainer.trained.parameters())
    assert trainer.step == 0 and not trainer.optimizer.state
    assert 0 < found.seconds_per_step < found.seconds


def test_what_is_read_before_the_first_step_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tmp_path, calibration_prompts=12)
    pieces = trainer.objective.calibration(trainer.config, trainer.data)
    assert sum(len(piece) for _, piece in pieces) == 12
    inputs = FuserObjective.inputs

    def slow(*args: Any) -> Any:
        time.sleep(1)
        return inputs(*args)

    monkeypatch.setattr(FuserObjective, "inputs", slow)
    assert plan(trainer).seconds > 1


def test_a_sample_will_do(tmp_path: Path) -> None:
    """Of many examples every n-th is encoded; what depends on how many there are is that of all."""
    write_rows(tmp_path / "rows.jsonl", 220)
    config, pair, counts = config_of(tmp_path, holdout=20, evaluate_every=1000), pair_of(normalize=True), []
    sample = prepare(pair, config, progress=lambda done, of: counts.append((done, of)), most=50)
    assert counts[-1] == (44, 44) and sample.share == 0.2
    assert len(sample.holdout) == 4 and len(sample.train) == 40
    whole = prepare(pair, config)
    assert whole.share == 1.0
    ids = [[item.id for item in data.train] for data in (sample, whole)]
    assert set(ids[0]) <= set(ids[1])
    found, exact = (plan(Trainer(pair, config, None, data)) for data in (sample, whole))
    assert (found.steps, found.examples) == (exact.steps, exact.examples) == (150, 220)
    assert found.data == pytest.approx(exact.data, rel=0.1)
    assert found.checkpoint == exact.checkpoint
    slow = plan(Trainer(pair, config, None, replace(sample, seconds=1e6)))
    assert slow.seconds == pytest.approx(5e6, rel=1e-3)  # encoding all of them; the steps take next to nothing


def test_a_sample_has_something_of_every_source(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 200)
    write_rows(tmp_path / "few.jsonl", 3)
    sources = [{"jsonl": str(tmp_path / name), "weight": 1} for name in ("rows.jsonl", "few.jsonl")]
    config = config_of(tmp_path, data=sources, holdout=0)
    for most in (2, 20, 100):
        ids = {item.id for item in prepare(pair_of(), config, most=most).train}
        assert {"few.jsonl", "rows.jsonl"} == {Path(name).name.split(":")[0] for name in ids}


def test_a_model_that_is_both_counts_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl")
    receiver = pair_of().receiver
    pair = C2C.from_models(receiver, receiver, FuserConfig())
    config = config_of(tmp_path)
    found = plan(Trainer(pair, config, None, prepare(pair, config)))
    assert found.receiver > 0 and found.sharers == 0


def test_memory_of_examples(tmp_path: Path) -> None:
    """Numbers take four bytes each and what goes with an example at most a kilobyte, however long it is."""
    write_rows(tmp_path / "rows.jsonl")
    (tmp_path / "long.jsonl").write_text(json.dumps({"instruction": "water " * 300, "response": "iron " * 300}))
    pair = pair_of()
    for name in ("rows", "long"):
        config = config_of(tmp_path, data=[{"jsonl": str(tmp_path / f"{name}.jsonl")}], holdout=0, max_tokens=10**6)
        trainer = Trainer(pair, config, None, prepare(pair, config))
        items = trainer.data.train
        numbers = sum(len(i.response) + 2 * len(i.prompt.receiver) + len(i.prompt.sharers[0]) for i in items)
        taken = sum(map(_memory, items))
        assert 4 * numbers < taken < 4 * numbers + 1000 * len(items)
        assert all(i.prompt.text is None and not i.prompt.content for i in items)


# Layers, KV heads, head size and billions of parameters, as their model cards say.
MODELS = {
    "Qwen3-0.6B": (28, 8, 128, 0.6),
    "Qwen2.5-0.5B": (24, 2, 64, 0.49),
    "Qwen3-1.7B": (28, 8, 128, 1.7),
    "Qwen3-4B": (36, 8, 128, 4.0),
    "Qwen3-8B": (36, 8, 128, 8.2),
    "Qwen3-32B": (64, 8, 128, 32.8),
}


def test_memory_in_the_docs() -> None:
    """docs/training.md's table is what its formula gives."""
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    row = r"^\| (\S+) ← (\S+) \| `(\S+)` \| (\d+) M \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \|$"
    rows = re.findall(row, page, re.M)
    assert len(rows) == 6
    for receiver, sharer, variant, *numbers in rows:
        pair = [
            ModelIdentity(name=name, num_layers=layers, num_kv_heads=heads, head_dim=dim)
            for name in (receiver, sharer)
            for layers, heads, dim, _ in [MODELS[name]]
        ]
        with torch.device("meta"):
            fuser = make_fuser(FuserConfig(variant=variant, receiver=pair[0], sharer=pair[1]))
        millions = sum(p.numel() for p in fuser.parameters()) / 1e6
        models, training = 2 * (MODELS[receiver][3] + MODELS[sharer][3]), 16 * millions / 1000
        expected = [f"{millions:.0f}", f"{models:.1f}", f"{training:.1f}", f"{models + training:.1f}"]
        assert numbers == expected, (receiver, sharer, variant)
