"""What one process of several does in the tests: gradients and losses of a tiny run, written to a file.

torchrun --nproc_per_node 2 tests/training/several.py FOLDER
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cache2cache.errors import C2CError
from cache2cache.training.items import fit_tokens, prepare
from cache2cache.training.loop import Trainer, batches
from cache2cache.training.objective import response_loss
from cache2cache.training.plan import plan
from cache2cache.training.sharding import is_sharded, shard

sys.path.insert(0, str(Path(__file__).parents[1]))
from training.runs import config_of, items_of, pair_of

CASES = [(loss, accumulate) for loss in ("token", "example", "sum") for accumulate in (1, 2)]
SMALL = 1, 3  # an epoch's last batch can have fewer examples than there are parts


class Cut(Exception):
    """Stands for a kill: nothing is saved behind it."""


def cut(record: dict[str, Any]) -> None:
    if record["step"] == 3:
        raise Cut


def encoded(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """What all processes have of the data of which each encodes a part, how many that were, and what is said of an
    example that only the last process meets."""
    config, pair, counts = config_of(folder, output=folder / name / "data", **changes), pair_of(), []
    data = prepare(pair, config, progress=lambda done, of: counts.append((done, of)))
    items = [*data.holdout, *data.train]
    numbers = [[*i.prompt.receiver, *i.prompt.sharers[0], *i.prompt.maps[0], *i.response] for i in items]

    def refuse(pair: Any, example: Any, config: Any) -> Any:
        if example.id == items[-1].id:
            raise C2CError(f"refused {example.id}")
        return fit_tokens(pair, example, config)

    with patch("cache2cache.training.items.fit_tokens", refuse):
        try:
            prepare(pair, config)
            said = ""
        except C2CError as error:
            said = str(error)
    return {
        "data": torch.tensor([number for row in numbers for number in row]),
        "encoded here": torch.tensor(counts[-1]),
        "refused": torch.tensor([ord(letter) for letter in said]),
    }


def measure(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Gradients of three batches and the losses of a run without noise; of runs with noise, the weights and
    what is drawn next."""
    found: dict[str, Any] = {}
    for loss, accumulate in CASES:
        case = f"{loss}{accumulate}"
        config = config_of(folder, output=folder / name / case, loss=loss, accumulate=accumulate, epochs=1, **changes)
        pair = pair_of(gate_noise="none", dropout=0.0, normalize=True)
        trainer = Trainer(pair, config, None, prepare(pair, config))
        trainer._start()
        found["first drawn"] = torch.rand(4)
        batch = batches(trainer.data.train, 8, 0, 0)[0]
        for size in (*SMALL, 8):
            trainer.optimizer.zero_grad()
            found[f"{case} loss of {size}"] = trainer.backward(batch[:size])
            gradients = [p.grad.clone() for p in trainer.trained.parameters() if p.grad is not None]
            found[f"{case} gradient of {size}"] = torch.cat([g.flatten() for g in gradients])
        records: list[dict[str, Any]] = []
        trainer.run(records.append)
        found[f"{case} losses"] = torch.tensor([row["loss"] for row in records])
        found[f"{case} hold-out"] = torch.tensor([row["holdout_loss"] for row in records if "holdout_loss" in row])
    # Two sharers; in the batch of one a process has no part of its own.
    config = config_of(folder, output=folder / name / "two", sharer=[{"source": "a"}, {"source": "b"}], **changes)
    pair = pair_of(sharer=["qwen3", "qwen2"], gate_noise="none", dropout=0.0, normalize=True)
    trainer = Trainer(pair, config, None, prepare(pair, config))
    trainer._start()
    for size in (1, 4):
        trainer.optimizer.zero_grad()
        found[f"two sharers loss of {size}"] = trainer.backward(trainer.data.train[:size])
        gradients = [p.grad.clone() for p in trainer.trained.parameters() if p.grad is not None]
        found[f"two sharers gradient of {size}"] = torch.cat([g.flatten() for g in gradients])
    for whose in (("llama", "qwen3"), ("gemma3", "llama")):
        pair = pair_of(*whose, gate_noise="none", dropout=0.0)
        if torch.distributed.is_initialized():
            shard([pair.receiver, *pair.sharers], torch.device("cpu"))
            assert is_sharded(pair.receiver) and is_sharded(pair.sharers[0])
        pair.fusers.train()
        value = response_loss(pair, items_of(pair), None)[0]
        sharded = torch.autograd.grad(value, list(pair.fusers.parameters()))
        found[f"sharded {whose[0]} gradient"] = torch.cat([g.flatten() for g in sharded])
        found[f"sharded {whose[0]} loss of 4"] = value.detach()
        # A whole run, with a hold-out of which one process has a batch more than the other.
        config = config_of(folder, output=folder / name / f"sharded {whose[0]}", epochs=1, holdout=5, batch_size=2)
        trainer = Trainer(pair, config, None, prepare(pair, config))
        found[f"sharded {whose[0]} bytes"] = torch.tensor(plan(trainer).receiver)
        records = []
        trainer.run(records.append)
        found[f"sharded {whose[0]} losses"] = torch.tensor([row["loss"] for row in records])
        found[f"sharded {whose[0]} hold-out"] = torch.tensor(
            [r["holdout_loss"] for r in records if "holdout_loss" in r]
        )
    for again in ("", " again", " cut"):
        config = config_of(folder, output=folder / name / f"noise{again}", epochs=1, save_every=2, **changes)
        pair = pair_of(dropout=0.1)
        data = prepare(pair, config)
        if again == " cut":
            with suppress(Cut):
                Trainer(pair_of(dropout=0.1), config, None, data).run(cut)
        trainer = Trainer(pair, config, None, data)
        trainer.run()
        found[f"noise{again}"] = torch.rand(4)
        found[f"weights{again}"] = torch.cat([p.detach().flatten() for p in trainer.trained.parameters()])
    found |= encoded(folder, name, **changes)
    found["process"] = torch.tensor([trainer.accelerator.process_index, trainer.accelerator.num_processes])
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = measure(folder, sys.argv[2])
    torch.save(found, folder / f"{sys.argv[2]}-{int(found['process'][0])}.pt")
