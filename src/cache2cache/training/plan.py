"""What a training run will take, before it is started: memory, time and disk. Nothing is written or updated."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from sys import getsizeof

import torch
from torch import Tensor, nn

from .items import Item
from .loop import Trainer, batches, by_length, evaluate, parts_of
from .objective import FuserObjective
from .sharding import local

SAMPLE = 10_000  # examples that are enough to plan by


@dataclass(frozen=True)
class Plan:
    """Sizes in bytes, for one process; times in seconds.

    Attributes:
        parameters: of what is trained.
        examples, data: how many there are with the hold-out, and what their token ids take in memory.
        steps: of the whole run.
        receiver, sharers: the weights of the frozen models.
        fuser: what is trained: weights, gradients and AdamW's two moments.
        activations: what the largest part of a batch keeps for its backward pass, measured.
        seconds_per_step, seconds: of a step on average, and of all steps and evaluations with what is encoded and read
            before them.
        checkpoint, weights: what will be written, the checkpoint and the fuser.
        free: on the disk of the output folder.
    """

    parameters: int
    examples: int
    data: int
    steps: int
    receiver: int
    sharers: int
    fuser: int
    activations: int
    seconds_per_step: float
    seconds: float
    checkpoint: int
    weights: int
    free: int

    @property
    def memory(self) -> int:
        return self.receiver + self.sharers + self.fuser + self.activations


def plan(trainer: Trainer) -> Plan:
    """Measure one part of a batch, forward and backward, and scale it to the run by numbers of tokens.

    A sample of the examples will do (`Prepared.share`).
    """
    config, trained = trainer.config, trainer.trained
    accelerator, frozen = trainer.accelerator, trainer.objective.frozen
    epoch = [
        part
        for batch in batches(trainer.data.train, config.batch_size, config.seed, 0)
        for part in parts_of(batch, config.accumulate, accelerator.process_index, accelerator.num_processes)
        if part
    ] or [trainer.data.train[:1]]
    largest = max(epoch, key=padded)
    trainer.objective.train()
    _measure(trainer, min(epoch, key=padded))  # the first step is slower
    activations, learning = _measure(trainer, largest)
    trained.zero_grad(set_to_none=True)
    began = time.perf_counter()
    evaluate(trainer.objective, largest, len(largest))
    watching = time.perf_counter() - began
    calibrating = _calibrating(trainer)
    epoch_seconds = learning * sum(map(padded, epoch)) / padded(largest)
    share, items = trainer.data.share, [*trainer.data.train, *trainer.data.holdout]
    step = epoch_seconds / share / trainer.per_epoch
    mine = by_length(trainer.data.holdout[accelerator.process_index :: accelerator.num_processes])
    evaluations = -(-trainer.steps // config.evaluate_every) + trainer.objective.goes_on if mine else 0
    held = [mine[begin : begin + trainer.rows] for begin in range(0, len(mine), trainer.rows)]
    parameters = sum(p.numel() for p in trained.parameters())
    state = 4 * sum(tensor.numel() for tensor in trained.state_dict().values())
    output = next(p for p in (config.output, *config.output.absolute().parents) if p.exists())
    return Plan(
        parameters=parameters,
        examples=round(len(items) / share),
        data=round(sum(map(_memory, {id(item): item for item in items}.values())) / share),
        steps=trainer.steps,
        receiver=_bytes(frozen["receiver"]),
        sharers=_bytes(frozen["sharers"], frozen["receiver"]) if "sharers" in frozen else 0,
        fuser=16 * parameters,
        activations=activations,
        seconds_per_step=step,
        seconds=trainer.data.seconds / share
        + calibrating
        + step * trainer.steps
        + evaluations * watching * sum(map(padded, held)) / share / padded(largest),
        checkpoint=state + 8 * parameters + (state if config.keep == "best" else 0),
        weights=state // 4 * getattr(torch, config.weights_on_disk).itemsize,
        free=shutil.disk_usage(output).free,
    )


@torch.no_grad()
def _calibrating(trainer: Trainer) -> float:
    """Seconds that are read before the first step, of a piece of middling size measured."""
    objective = trainer.objective
    if not isinstance(objective, FuserObjective) or not (pieces := objective.calibration(trainer.config, trainer.data)):
        return 0.0
    sizes = [padded(piece) for _, piece in pieces]
    fuser, piece = sorted(pieces, key=lambda p: padded(p[1]))[len(pieces) // 2]
    began = time.perf_counter()
    for inputs in objective.inputs(fuser, [piece]):
        inputs[0].sum().item()  # waits for a GPU
    return (time.perf_counter() - began) * sum(sizes) / padded(piece)


def padded(items: Sequence[Item]) -> int:
    """How many positions a batch takes: all prompts are as long as the longest one, and so are the responses."""
    return len(items) * (max(len(i.prompt.receiver) for i in items) + max(len(i.response) for i in items))


def _memory(item: Item) -> int:
    """Bytes of an example."""
    prompt, response = item.prompt, item.response
    parts = [item, item.id, prompt, prompt.receiver, prompt.sharers, prompt.maps, response]
    return sum(map(getsizeof, [*parts, *prompt.sharers, *prompt.maps]))


def _measure(trainer: Trainer, items: Sequence[Item]) -> tuple[int, float]:
    """Bytes kept for the backward pass, less weights, and seconds of both passes."""
    models = (trainer.trained, *trainer.objective.frozen.values())
    weights = {local(p).untyped_storage().data_ptr() for model in models for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    began = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = trainer.objective(items, trainer.config.loss)
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize(loss.device)
    return sum(size for place, size in kept.items() if place not in weights), time.perf_counter() - began


def _bytes(model: nn.Module, but: nn.Module | None = None) -> int:
    """Of a model's tensors, without those that another one has too."""
    known = set() if but is None else {id(tensor) for tensor in (*but.parameters(), *but.buffers())}
    return sum(local(tensor).nbytes for tensor in (*model.parameters(), *model.buffers()) if id(tensor) not in known)
