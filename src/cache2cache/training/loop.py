"""A run of training: batches, steps, evaluation, checkpoints, and going on from them.

Several processes (`torchrun`, `accelerate launch`) share every batch, and each process works through its share in
`accumulate` parts. Gradients are those of the whole batch whatever the number of processes and parts.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import random
import signal
import sys
import time
import warnings
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import Tensor, nn

from .. import heap
from ..config import TrainConfig
from ..errors import C2CError
from ..files import only_writer, remove_partials, replace_text, replacing, save_state
from ..fuser import checkpoint
from ..pair import C2C
from .items import Item, Prepared
from .objective import FuserObjective, Objective, Stores
from .start import check_loaded, start_run
from .store import Store

WRITTEN = ("recipe.json", "checkpoint.pt", "log.jsonl", "fuser.safetensors", "config.json", checkpoint.IDS)
HELD = 3_500_000_000  # bytes that buffers may take between two steps, of those that are free then


def batches(items: Sequence[Item], batch_size: int, seed: int, epoch: int) -> list[list[Item]]:
    """One epoch's batches: shuffled by seed and epoch, examples of like response and prompt length together."""
    order = list(items)
    generator = random.Random(f"{seed}:{epoch}")
    generator.shuffle(order)
    made = []
    for begin in range(0, len(order), 16 * batch_size):
        group = sorted(
            order[begin : begin + 16 * batch_size], key=lambda item: (len(item.response).bit_length(), item.length)
        )
        made += [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
    generator.shuffle(made)
    return made


def parts_of(batch: Sequence[Item], accumulate: int, process: int = 0, processes: int = 1) -> list[list[Item]]:
    """The `accumulate` micro-batches that one process works through, of neighbours in the batch's order.

    Some are empty where a batch has fewer examples than there are parts.
    """
    count = accumulate * processes
    bounds = [len(batch) * i // count for i in range(count + 1)]
    return [list(batch[bounds[i] : bounds[i + 1]]) for i in range(process, count, processes)]


def weight_of(items: Sequence[Item], per: str) -> int:
    """What the mean that `response_loss` takes of some items counts in the mean over a batch that they are part of."""
    return sum(len(item.response) for item in items) if per == "token" else len(items)


def optimizer_for(trained: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW, its decay on matrices or on all parameters; a fuser's gates may have a rate of their own."""
    groups: dict[str, list[Tensor]] = {"matrices": [], "vectors": [], "gates": []}
    for name, parameter in trained.named_parameters():
        kind = "gates" if name.endswith("gate_logit") else "matrices" if name.endswith("weight") else "vectors"
        groups[kind].append(parameter)
    others = config.weight_decay if config.decay == "all" else 0.0
    gates = config.gate_learning_rate or config.learning_rate
    return torch.optim.AdamW(
        [
            {"params": groups["matrices"], "weight_decay": config.weight_decay, "lr": config.learning_rate},
            {"params": groups["vectors"], "weight_decay": others, "lr": config.learning_rate},
            {"params": groups["gates"], "weight_decay": others, "lr": gates},
        ]
    )


def rate(step: int, steps: int, warmup: float, schedule: str = "linear") -> float:
    """Linear warm-up, then a straight line or half a cosine down to zero, as a factor of the learning rate."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    left = max(0.0, (steps - step) / max(1, steps - rise))
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2


@torch.no_grad()
def evaluate(objective: nn.Module, items: Sequence[Item], rows: int, process: int = 0, processes: int = 1) -> Tensor:
    """Sums over one process's share of the items, (2,) float64: the loss per example, and how many responses greedy
    decoding would write. So many `rows` are computed at once, of like length."""
    sums = torch.zeros(2, dtype=torch.float64)
    mine, most = by_length(items[process::processes]), len(items[::processes])
    objective.eval()
    for begin in range(0, most, rows):
        batch = mine[begin : begin + rows]
        # Sharded models are run by all processes equally often, so one that has no more runs what isn't counted.
        loss, greedy = objective(batch or items[:1], "example")
        if batch:
            sums += torch.tensor([loss.item() * len(batch), greedy.sum().item()], dtype=torch.float64)
    objective.train()
    return sums


def by_length(items: Sequence[Item]) -> list[Item]:
    """The shortest first."""
    return sorted(items, key=lambda item: item.length)


@dataclass
class Best:
    """The best evaluation so far: its numbers and step, the weights then (where they are kept), evaluations since."""

    evaluation: dict[str, float]
    step: int
    weights: dict[str, Tensor] | None
    since: int = 0


class Trainer:
    """One training run in a folder: resumes from `checkpoint.pt` there, leaves the fuser in `fuser/` (several in
    folders 0, 1, … of it).

    `log.jsonl` has a line per step and per evaluation; `recipe.json` the configuration that a resumed run must share.
    Every process of a run has a trainer of its own; the first one writes.
    """

    def __init__(
        self,
        what: C2C | Objective,
        config: TrainConfig,
        store: Stores,
        data: Prepared,
        receiver_store: Store | None = None,
    ) -> None:
        """`what` is trained: the fusers of a pair, whose models' prefills may be read from stores (`store` is that of
        the sharer, or one for each of several), or an objective of its own."""
        if isinstance(what, C2C):
            if len(what.sharers) != len(config.sharers):
                raise C2CError(
                    f"the pair has {len(what.sharers)} sharers, the recipe names {len(config.sharers)}; give both the "
                    "same number"
                )
            check_loaded(what, config)
            what = FuserObjective(what, store, in_half(config, what.receiver.device), receiver_store, config.distill)
        self.objective, self.trained, self.config, self.data = what, what.trained, config, data
        self.output = config.output
        self.device = next(self.trained.parameters()).device
        self.accelerator = _accelerator(config)
        self.is_main = self.accelerator.is_main_process
        self._check_processes()
        self.per_epoch = math.ceil(len(data.train) / data.share / config.batch_size)
        self.steps = min(self.per_epoch * config.epochs, config.max_steps or sys.maxsize)
        self.step = 0
        self.seconds = 0.0
        self.last_evaluation: dict[str, float] = {}
        self.best: Best | None = None
        self.optimizer = optimizer_for(self.trained, config)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda s: rate(s, self.steps, config.warmup, config.schedule)
        )
        self.loss: nn.Module = what  # summing gradients over the processes, once the run has started

    def run(
        self,
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        on_calibration: Callable[[int, int], None] = lambda done, of: None,
    ) -> Path:
        """Train to the end, or go on from the last checkpoint. Returns the folder of what was trained.

        Args:
            on_step: called with the log's record of each step; before the first one of a run that goes on from a fuser
                with a record of the hold-out alone.
            on_calibration: called with how many of how many prompts were read, before the first step of a new run.

        Raises:
            C2CError: the output folder holds a run of another recipe, or one that another process is at; the loss is
                no number.
            KeyboardInterrupt: after a checkpoint was written.
        """
        with only_writer(self.output) if self.is_main else contextlib.nullcontext():
            return self._run(on_step, on_calibration)

    def _run(self, on_step: Callable[[dict[str, Any]], None], on_calibration: Callable[[int, int], None]) -> Path:
        self._start(on_calibration)
        interrupted = _Interruptions(self.is_main)
        began = time.perf_counter() - self.seconds
        remaining, coming = tee(self._remaining())
        parts = self.objective.read_ahead(part for batch in coming for part in self._computed(batch))
        heap.bound(HELD)
        if self.step == 0 and self.objective.goes_on and self.data.holdout:
            # What there is already is the first that may be the best.
            record = {"step": 0, **self._evaluate(), "seconds": round(self.seconds, 2)}
            self._log(record)
            on_step(record)
        with interrupted:
            for batch in remaining:
                record = self._train_step(batch, islice(parts, self.config.accumulate))
                self.seconds = time.perf_counter() - began
                if self.data.holdout and (self.step % self.config.evaluate_every == 0 or self.step == self.steps):
                    record |= self._evaluate()
                record |= {"seconds": round(self.seconds, 2)}
                self._log(record)
                on_step(record)
                stop = bool(self._sum(torch.tensor(float(interrupted.seen))))  # of any process
                done = self.step == self.steps or self.out_of_patience
                if self.step % self.config.save_every == 0 or done or stop:
                    self.save_checkpoint()
                if stop:
                    raise KeyboardInterrupt
                if done:
                    break
                heap.tidy()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return self.save_trained()

    def _train_step(self, batch: list[Item], computed: Iterable[list[Item]] | None = None) -> dict[str, Any]:
        self.objective.set_progress(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.backward(batch, computed)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise C2CError(
                f"the loss is {loss.item()} and its gradient {norm.item()} at step {self.step + 1}; train again in "
                f"another output with a lower learning rate; what was saved before stays in {self.output}"
            )
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        return {
            "step": self.step,
            "loss": loss.item(),
            "gradient": norm.item(),
            "rate": lr,
            **self.objective.after_step(),
            "tokens": sum(item.length for item in batch),
        }

    def _parts(self, batch: list[Item]) -> list[list[Item]]:
        """This process's share of a batch, in `accumulate` parts, some of which may be empty."""
        processes = self.accelerator.num_processes
        return parts_of(batch, self.config.accumulate, self.accelerator.process_index, processes)

    def _computed(self, batch: list[Item]) -> list[list[Item]]:
        """What is computed of these parts: where one is empty, to take part in the sum over the processes, something
        that then counts nothing."""
        return [part or batch[:1] for part in self._parts(batch)]

    def backward(self, batch: list[Item], computed: Iterable[list[Item]] | None = None) -> Tensor:
        """The loss of a batch, (), with its gradients put into what is trained: part by part, over all processes.
        `computed`: what is computed of the parts, where that is read ahead."""
        self.loss.train()
        processes, whole = self.accelerator.num_processes, weight_of(batch, self.config.loss)
        loss = torch.zeros((), device=self.device)
        pairs = zip(self._parts(batch), self._computed(batch) if computed is None else computed, strict=True)
        for number, (part, items) in enumerate(pairs, 1):
            share = weight_of(part, self.config.loss) / whole
            alone = number < self.config.accumulate  # DDP sums gradients over the processes behind the last part
            with self.accelerator.no_sync(self.loss) if alone else contextlib.nullcontext():
                value = self.loss(items, self.config.loss)[0] * share
                (value * processes).backward()  # DDP takes the mean of the processes' gradients
            loss += value.detach()
        return self._sum(loss)

    @property
    def rows(self) -> int:
        """How many rows a process computes at once, the most that a part of a batch has."""
        return math.ceil(self.config.batch_size / (self.config.accumulate * self.accelerator.num_processes))

    def _evaluate(self) -> dict[str, Any]:
        """Look at the hold-out, each process at its share, and note whether it was never better."""
        holdout, count = self.data.holdout, self.accelerator.num_processes
        sums = evaluate(self.objective, holdout, self.rows, self.accelerator.process_index, count)
        loss, exact = (self._sum(sums) / len(holdout)).tolist()
        if not math.isfinite(loss):
            raise C2CError(
                f"the loss on the hold-out is {loss} at step {self.step}; train again in another output with a lower "
                f"learning rate; what was saved before stays in {self.output}"
            )
        self.last_evaluation = {"holdout_loss": loss, "holdout_exact": exact}
        if self.best is None or loss < self.best.evaluation["holdout_loss"]:
            kept = None
            if self.config.keep == "best":
                kept = {name: tensor.detach().cpu().clone() for name, tensor in self.trained.state_dict().items()}
            self.best = Best(self.last_evaluation, self.step, kept)
        else:
            self.best.since += 1
        return {**self.last_evaluation, "best_step": self.best_step}

    @property
    def best_step(self) -> int | None:
        """After which step the loss on the hold-out was lowest."""
        return None if self.best is None else self.best.step

    @property
    def out_of_patience(self) -> bool:
        """Whether `patience` evaluations in a row were no better than the best one."""
        patience = self.config.patience
        return patience is not None and self.best is not None and self.best.since >= patience

    def _remaining(self) -> Iterator[list[Item]]:
        if self.out_of_patience:
            return
        begin = self.step  # which goes on while batches are taken ahead of their turn
        for epoch in range(begin // self.per_epoch, self.config.epochs):
            first = epoch * self.per_epoch
            if first >= self.steps:
                return
            batched = batches(self.data.train, self.config.batch_size, self.config.seed, epoch)
            yield from batched[max(0, begin - first) : max(0, self.steps - first)]

    def _taken(self) -> Iterator[Item]:
        """The examples of the steps so far, those of several epochs as often."""
        for epoch in range(-(-self.step // self.per_epoch)):
            batched = batches(self.data.train, self.config.batch_size, self.config.seed, epoch)
            yield from chain.from_iterable(batched[: self.step - epoch * self.per_epoch])

    def _sum(self, tensor: Tensor) -> Tensor:
        """Over the processes."""
        if self.accelerator.num_processes > 1:
            tensor = self.accelerator.reduce(tensor.to(self.device), reduction="sum")
        return tensor

    # ---- several processes --------------------------------------------------------------------------------------

    def _check_processes(self) -> None:
        processes, kind = self.accelerator.num_processes, self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise C2CError(
                f"the launcher asks for {kind.value}, which would shard what is trained, the small part, and leave the "
                "frozen models whole; start it with --multi_gpu alone, and set shard: true for what that was to do"
            )
        if processes > 1 and self.accelerator.device.type != self.device.type:
            raise C2CError(
                f"{processes} processes train on {self.accelerator.device.type}, the receiver is on "
                f"{self.device.type}; leave the recipe's device out, or set CUDA_VISIBLE_DEVICES= to train on CPUs"
            )
        if processes * self.config.accumulate > self.config.batch_size:
            raise C2CError(
                f"a batch of {self.config.batch_size} can't be shared by {processes} processes in "
                f"{self.config.accumulate} parts each; raise batch_size, or lower accumulate"
            )
        self.objective.check(self.data)

    def _log(self, record: dict[str, Any]) -> None:
        if self.is_main:
            with (self.output / "log.jsonl").open("a", encoding="utf-8") as log:
                log.write(json.dumps(record) + "\n")
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=self.step)

    # ---- what stays on disk -------------------------------------------------------------------------------------

    def _start(self, on_calibration: Callable[[int, int], None] = lambda done, of: None) -> None:
        with self.accelerator.main_process_first():  # the others find the first one's file
            known = start_run(self.config)
        if self.is_main:
            result = self.output / self.objective.folder
            for folder in (self.output, result, *result.glob("*")):
                remove_partials(folder, WRITTEN)
        if known:
            self._resume()
            if self.is_main:
                self._cut_log()
        if self.step == 0:
            # The first process draws as a run of one process does, the others something else.
            torch.manual_seed(self.config.seed + self.accelerator.process_index)
            done, of = 0, sum(len(piece) for _, piece in self.objective.calibration(self.config, self.data))

            def progress(prompts: int) -> None:
                nonlocal done
                done += prompts
                on_calibration(done, of)

            self.objective.start(self.config, self.data, progress)
        self.loss = self.accelerator.prepare_model(self.objective)
        if self.config.trackers and not self.accelerator.trackers:
            self.accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": self.step + 1}})

    @cached_property
    def _data(self) -> str:
        """A hash of all that is trained on and watched."""
        digest = hashlib.sha256()
        for item in (*self.data.train, *self.data.holdout):
            digest.update(item.id.encode())
            for numbers in (item.prompt.receiver, *item.prompt.sharers, item.response):
                digest.update(len(numbers).to_bytes(4, "little") + array("i", numbers).tobytes())
        return digest.hexdigest()

    def save_checkpoint(self) -> None:
        """Everything that goes on with the run, put in place whole: a kill leaves the old or the new one."""
        rng = gather_object([_rng(self.device)])
        if not self.is_main:
            return
        state = {
            "weights": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": rng,
            "step": self.step,
            "seconds": self.seconds,
            "data": self._data,
            "models": [lm.fingerprint for lm in self.objective.models()],
            "reads": self.objective.reads(),
            "evaluation": self.last_evaluation,
            "best": None if self.best is None else vars(self.best),
        }
        with replacing(self.output / "checkpoint.pt") as partial:
            save_state(state, partial)

    def _resume(self) -> None:
        path = self.output / "checkpoint.pt"
        if not path.exists():
            return
        try:
            # Mapped: in every process of a machine the whole file would be much.
            state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
            data, models, processes = state["data"], state["models"], len(state["rng"])
        except (MemoryError, PermissionError):
            raise
        except Exception as error:  # torch has many kinds for a damaged file, OSError among them
            raise C2CError(f"{path} is damaged ({type(error).__name__}); remove it to start again") from error
        if data != self._data:
            raise C2CError(f"the data of the run in {self.output} has changed; choose another output, or remove it")
        if models != [lm.fingerprint for lm in self.objective.models()]:
            raise C2CError(f"the models of the run in {self.output} have changed; choose another output, or remove it")
        if processes != self.accelerator.num_processes:
            raise C2CError(
                f"the run in {self.output} has {processes} processes, {self.accelerator.num_processes} were started; "
                f"start {processes} again, each of which goes on with its own noise, or choose another output"
            )
        now = self.objective.reads()
        if (before := state.get("reads", now)) != now:  # checkpoints of earlier versions don't say
            warnings.warn(
                f"the run in {self.output} had its prefills from {', '.join(before)} (receiver first) and goes on from "
                f"{', '.join(now)}, so it won't end as if it had not been stopped",
                stacklevel=2,
            )
        self.trained.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        for moments in self.optimizer.state.values():  # which would hold the mapped file on the disk
            moments.update({name: x.clone() for name, x in moments.items() if isinstance(x, Tensor)})
        self.scheduler.load_state_dict(state["scheduler"])
        _set_rng(state["rng"][self.accelerator.process_index], self.device)
        self.step, self.seconds, self.last_evaluation = state["step"], state["seconds"], state["evaluation"]
        self.best = None if state["best"] is None else Best(**state["best"])
        if self.best is not None and self.best.weights is not None:
            self.best.weights = {name: tensor.clone() for name, tensor in self.best.weights.items()}

    def _cut_log(self) -> None:
        """Drop the lines of steps that were done after the checkpoint and will be done again."""
        path = self.output / "log.jsonl"
        if path.exists():
            # Before the first step nothing is kept: what was looked at there is looked at again.
            written = path.read_text(encoding="utf-8").splitlines()
            lines = [line for line in written if self.step and _is_up_to(line, self.step)]
            replace_text(path, "".join(line + "\n" for line in lines))

    def save_trained(self) -> Path:
        """Write what was trained, as it is now or (`keep: best`) as it was at its best, and what it was trained on."""
        measured: dict[str, Any] = {"steps": self.step, "seconds": round(self.seconds, 1), **self.last_evaluation}
        if self.best is not None:
            measured["best_step"] = self.best_step
            if self.best.weights is not None:
                self.trained.load_state_dict(self.best.weights)
                measured |= self.best.evaluation
        if self.is_main:
            self.objective.write(self.config, self.data, measured, {item.id for item in self._taken()})
        self.accelerator.wait_for_everyone()
        return self.output / self.objective.folder


def check_trackers(config: TrainConfig) -> None:
    """Raise a C2CError for trackers that are not installed."""
    if config.trackers and not all(importlib.util.find_spec(name) for name in config.trackers):
        raise C2CError(
            f"trackers: {', '.join(config.trackers)} is not installed; pip install 'cache2cache[tensorboard]'"
        )


def _accelerator(config: TrainConfig) -> Accelerator:
    """This process's part of a run; alone unless a launcher started several."""
    check_trackers(config)
    return Accelerator(
        device_placement=False,  # models are where they were loaded
        mixed_precision="no",  # `precision` decides, not the launcher
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of gradients
        log_with=list(config.trackers) or None,
        project_dir=config.output,
    )


def in_half(config: TrainConfig, device: torch.device) -> bool:
    """Whether `precision` means bfloat16 on that device."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


def _rng(device: torch.device) -> list[Tensor]:
    """The state of the generators that noise and dropout on a device are drawn from."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_rng(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _is_up_to(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError):
        return False  # the line that a kill cut short


class _Interruptions:
    """While active, Ctrl-C and SIGTERM are only noted, so that the step in progress can end and be saved. `aloud`: and
    said so, as a look at the hold-out may take minutes."""

    def __init__(self, aloud: bool) -> None:
        self.seen, self.aloud = False, aloud
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interruptions:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: whoever runs it handles signals
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.seen:  # asked twice: leave at once
            raise KeyboardInterrupt
        self.seen = True
        if self.aloud:
            print("ending behind this step, with a checkpoint; again: at once, from the last one", file=sys.stderr)

    def __exit__(self, *args: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
