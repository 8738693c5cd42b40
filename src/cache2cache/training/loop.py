"""Training a fuser: next-token loss on the response, gradients into the fuser alone (paper section 3.3)."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..config import TrainConfig
from ..errors import C2CError
from ..fuser import C2CFuser, checkpoint
from ..kv import CACHE, KV, pad_left, positions_of, prefill, prefill_prompts
from ..pair import C2C, PromptIds, sharer_lengths, where_to_fuse
from .data import Example, examples
from .store import Asked, Store


@dataclass(frozen=True)
class Item:
    """An example as token ids: the encoded prompt and the response that follows it."""

    id: str
    prompt: PromptIds
    response: list[int]

    @property
    def length(self) -> int:
        return len(self.prompt.receiver) + len(self.response)


@dataclass(frozen=True)
class Prepared:
    """The items of a recipe: to train on, to watch, and how many were left out as too long."""

    train: list[Item]
    holdout: list[Item]
    too_long: int


def prepare(pair: C2C, config: TrainConfig) -> Prepared:
    """Encode a recipe's examples and set the hold-out aside, the same ones in every run."""
    items, too_long = [], 0
    tokenizer = pair.receiver.need_tokenizer()
    for example in examples(config):
        prompt = pair.encode(list(example.messages), prefix=example.prefix)
        if len(prompt.receiver) >= config.max_tokens or any(len(s) > config.max_tokens for s in prompt.sharers):
            too_long += 1
            continue
        items.append(
            Item(example.id, prompt, response_ids(tokenizer, example)[: config.max_tokens - len(prompt.receiver)])
        )
    if len(items) <= config.holdout:
        raise C2CError(
            f"{len(items)} examples are left ({too_long} longer than max_tokens {config.max_tokens}), "
            f"{config.holdout} of them for the hold-out; give more data or raise max_tokens"
        )
    return Prepared(items[config.holdout :], items[: config.holdout], too_long)


def response_ids(tokenizer: Any, example: Example) -> list[int]:
    """The response's tokens, with the token that ends a turn where it ends."""
    ids = list(tokenizer(example.response, add_special_tokens=False)["input_ids"])
    if example.ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise C2CError(f"the response of {example.id} has no tokens; leave the row out")
    return ids


def response_loss(pair: C2C, items: Sequence[Item], store: Store | None, per: str = "token") -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of the responses on the fused cache, and which examples' tokens were all greedy.

    The prompts are prefilled without gradients, the sharer's from the store if there is one; then the receiver reads
    the last prompt token and the response on top of the fused cache.

    Args:
        pair: with one sharer; gradients flow where its fuser has them enabled.
        items: the batch.
        store: sharer prefills; None computes them.
        per: how tokens are averaged, see `TrainConfig.loss`.

    Returns:
        The loss (), and (B,) bool.
    """
    receiver, fuser = pair.receiver, pair.fusers[0]
    assert isinstance(fuser, C2CFuser)
    prompts = [item.prompt for item in items]
    clean = prefill_prompts(receiver, [p.receiver for p in prompts])
    lengths = sharer_lengths(prompts, 0)
    known = sharer_prefill(pair, prompts, store)
    where, _ = where_to_fuse(prompts, 0, clean.kv.length, known.length, lengths)
    fused = fuser(clean.kv, known, where.to(receiver.device))

    longest = max(len(item.response) for item in items)
    target = torch.full((len(items), longest), -100)
    for row, item in enumerate(items):
        target[row, : len(item.response)] = torch.tensor(item.response)
    target = target.to(receiver.device)
    # The last prompt token, then the response but its last token; positions behind a response's end see nothing.
    ids = torch.cat([clean.input_ids[:, -1:], target[:, :-1].clamp(min=0)], dim=1)
    mask = torch.cat([clean.attention_mask, (target[:, :-1] >= 0).long()], dim=1)
    logits = receiver.model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions_of(mask)[:, -longest:],
        use_cache=True,
        **{CACHE: fused.to_cache()},
    ).logits.float()
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="none").view_as(target)
    real = target >= 0
    greedy = ((logits.argmax(-1) == target) | ~real).all(1)
    if per == "token":
        return nll.sum() / real.sum(), greedy
    if per == "sum":
        return nll.sum(1).mean(), greedy
    return (nll.sum(1) / real.sum(1)).mean(), greedy


def sharer_prefill(pair: C2C, prompts: Sequence[PromptIds], store: Store | None) -> KV:
    """The sharer's caches of prompts up to their last mapped token, from a store or computed."""
    sharer = pair.sharers[0]
    if store is not None:
        return store.read(*from_store(pair, prompts)).to(sharer.device)
    rows = [p.sharers[0][:n] for p, n in zip(prompts, sharer_lengths(prompts, 0), strict=True)]
    ids, mask = pad_left(rows, sharer.pad_token_id, sharer.device)
    return prefill(sharer, ids, mask)


def from_store(pair: C2C, prompts: Sequence[PromptIds]) -> Asked:
    """What training reads from the store: the layers that the fuser reads, up to the last mapped token."""
    layers = pair.fusers[0].sharer_layers
    assert isinstance(layers, Tensor)
    reads = int(layers.min()), int(layers.max()) + 1
    return Asked([p.sharers[0] for p in prompts], sharer_lengths(prompts, 0), layers=reads)


def read_ahead(pair: C2C, store: Store | None, batches: Iterator[list[Item]]) -> Iterator[list[Item]]:
    """The batches, with the next ones' caches being read from the store meanwhile."""
    if store is None:
        return batches
    return store.ahead(batches, lambda items: from_store(pair, [item.prompt for item in items]))


@torch.no_grad()
def fused_inputs(
    pair: C2C, items: Sequence[Item], store: Store | None, batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the fuser reads at the positions that are fused, batch by batch: the sharer's (G, N, S), the receiver's
    (G, N, T)."""
    fuser = pair.fusers[0]
    assert isinstance(fuser, C2CFuser)
    for begin in range(0, len(items), batch_size):
        prompts = [item.prompt for item in items[begin : begin + batch_size]]
        clean = prefill_prompts(pair.receiver, [p.receiver for p in prompts])
        known = sharer_prefill(pair, prompts, store).to(pair.receiver.device)
        where, _ = where_to_fuse(prompts, 0, clean.kv.length, known.length, sharer_lengths(prompts, 0))
        yield fuser.inputs(clean.kv, known, where.to(pair.receiver.device))


@torch.no_grad()
def calibrate(pair: C2C, items: Sequence[Item], store: Store | None, batch_size: int = 16) -> None:
    """Set a normalising fuser's statistics: mean and deviation of each channel over the positions that are fused."""
    fuser = pair.fusers[0]
    sums: dict[str, list[Tensor]] = {"sharer": [], "receiver": []}
    for inputs in fused_inputs(pair, items, store, batch_size):
        for name, x in zip(("sharer", "receiver"), inputs, strict=True):
            sums[name].append(x.float())
    for name, parts in sums.items():
        x = torch.cat(parts, dim=1)
        std = x.std(1, keepdim=True)
        # A channel that hardly moves would be blown up beyond all others.
        std = std.clamp(min=0.01 * std.mean(-1, keepdim=True).clamp(min=1e-6))
        getattr(fuser, f"{name}_mean").copy_(x.mean(1, keepdim=True))
        getattr(fuser, f"{name}_std").copy_(std)


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


def optimizer_for(fuser: C2CFuser, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; gates may have a rate of their own."""
    groups: dict[str, list[Tensor]] = {"matrices": [], "vectors": [], "gates": []}
    for name, parameter in fuser.named_parameters():
        kind = "gates" if name == "gate_logit" else "matrices" if name.endswith("weight") else "vectors"
        groups[kind].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups["matrices"], "weight_decay": config.weight_decay, "lr": config.learning_rate},
            {"params": groups["vectors"], "weight_decay": 0.0, "lr": config.learning_rate},
            {"params": groups["gates"], "weight_decay": 0.0, "lr": config.gate_learning_rate or config.learning_rate},
        ]
    )


def rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then linear decay to zero, as a factor of the learning rate."""
    rise = max(1, round(warmup * steps))
    return (step + 1) / rise if step < rise else max(0.0, (steps - step) / max(1, steps - rise))


@torch.no_grad()
def evaluate(pair: C2C, items: Sequence[Item], store: Store | None, batch_size: int) -> dict[str, float]:
    """Loss per example and share of responses that greedy decoding would write exactly, on the hold-out."""
    fuser = pair.fusers[0]
    fuser.eval()
    loss = exact = 0.0
    for begin in range(0, len(items), batch_size):
        batch = items[begin : begin + batch_size]
        value, greedy = response_loss(pair, batch, store, per="example")
        loss += value.item() * len(batch)
        exact += greedy.sum().item()
    fuser.train()
    return {"holdout_loss": loss / len(items), "holdout_exact": exact / len(items)}


class Trainer:
    """One training run in a folder: resumes from `checkpoint/` there, leaves the fuser in `fuser/`.

    `log.jsonl` has a line per step and per evaluation; `recipe.json` the configuration that a resumed run must share.
    """

    def __init__(self, pair: C2C, config: TrainConfig, store: Store | None, data: Prepared) -> None:
        if len(pair.sharers) != 1:
            raise C2CError(
                f"training takes one sharer at a time, {len(pair.sharers)} were given; train a fuser for each"
            )
        fuser = pair.fusers[0]
        assert isinstance(fuser, C2CFuser)
        self.pair, self.config, self.store, self.data, self.fuser = pair, config, store, data, fuser
        self.output = config.output
        per_epoch = math.ceil(len(data.train) / config.batch_size)
        self.steps = per_epoch * config.epochs
        self.step = 0
        self.seconds = 0.0
        self.last_evaluation: dict[str, float] = {}
        self.optimizer = optimizer_for(fuser, config)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda s: rate(s, self.steps, config.warmup))

    def run(self, on_step: Callable[[dict[str, Any]], None] = lambda record: None) -> Path:
        """Train to the end, or go on from the last checkpoint. Returns the folder of the fuser.

        Raises:
            C2CError: the output folder holds a run of another recipe; the loss is no number.
            KeyboardInterrupt: after a checkpoint was written.
        """
        self._start()
        interrupted = _Interruptions()
        began = time.perf_counter() - self.seconds
        with interrupted, (self.output / "log.jsonl").open("a") as log:
            for batch in read_ahead(self.pair, self.store, self._remaining()):
                record = self._train_step(batch)
                self.seconds = time.perf_counter() - began
                if self.data.holdout and (self.step % self.config.evaluate_every == 0 or self.step == self.steps):
                    self.last_evaluation = evaluate(self.pair, self.data.holdout, self.store, self.config.batch_size)
                    record |= self.last_evaluation
                record |= {"seconds": round(self.seconds, 2)}
                log.write(json.dumps(record) + "\n")
                log.flush()
                on_step(record)
                if self.step % self.config.save_every == 0 or self.step == self.steps or interrupted.seen:
                    self.save_checkpoint()
                if interrupted.seen:
                    raise KeyboardInterrupt
        return self.save_fuser()

    def _train_step(self, batch: list[Item]) -> dict[str, Any]:
        self.fuser.train()
        self.fuser.set_progress(self.step)
        loss, _ = response_loss(self.pair, batch, self.store, self.config.loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.fuser.parameters(), self.config.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            raise C2CError(
                f"the loss is {loss.item()} and its gradient {norm.item()} at step {self.step + 1}; lower the learning "
                f"rate; the last checkpoint is kept in {self.output}"
            )
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1
        gates = int(self.fuser.open_gates.sum())
        return {
            "step": self.step,
            "loss": loss.item(),
            "gradient": norm.item(),
            "rate": self.scheduler.get_last_lr()[0],
            "gates_open": gates,
        }

    def _remaining(self) -> Iterator[list[Item]]:
        per_epoch = self.steps // self.config.epochs
        begin = self.step  # which goes on while batches are taken ahead of their turn
        for epoch in range(begin // per_epoch, self.config.epochs):
            done = max(0, begin - epoch * per_epoch)
            yield from batches(self.data.train, self.config.batch_size, self.config.seed, epoch)[done:]

    # ---- what stays on disk -------------------------------------------------------------------------------------

    def _start(self) -> None:
        if start_run(self.config):
            self._resume()
        if self.step == 0:
            torch.manual_seed(self.config.seed)
            if self.fuser.config.normalize:
                calibrate(self.pair, self.data.train[: self.config.calibration_prompts], self.store)

    def save_checkpoint(self) -> None:
        """Everything that goes on with the run, put in place whole: a kill leaves the old or the new one."""
        state = {
            "fuser": self.fuser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "items": [item.id for item in self.data.train],
            "evaluation": self.last_evaluation,
        }
        partial = self.output / ".checkpoint.pt"  # one that a kill left is overwritten
        torch.save(state, partial)
        os.replace(partial, self.output / "checkpoint.pt")

    def _resume(self) -> None:
        path = self.output / "checkpoint.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            items = state["items"]
        except Exception as error:
            raise C2CError(f"{path} is damaged ({type(error).__name__}); remove it to start again") from error
        if items != [item.id for item in self.data.train]:
            raise C2CError(f"the data of the run in {self.output} has changed; choose another output, or remove it")
        self.fuser.load_state_dict(state["fuser"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        self.step, self.seconds, self.last_evaluation = state["step"], state["seconds"], state["evaluation"]
        self._cut_log()

    def _cut_log(self) -> None:
        """Drop the lines of steps that were done after the checkpoint and will be done again."""
        path = self.output / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _is_up_to(line, self.step)]
            partial = path.with_suffix(f".{os.getpid()}")
            partial.write_text("".join(line + "\n" for line in lines))
            os.replace(partial, path)

    def save_fuser(self) -> Path:
        """Write the fuser as it is now, with what it was trained on."""
        measured = {"steps": self.step, "seconds": round(self.seconds, 1), **self.last_evaluation}
        return write_fuser(self.pair, self.config, self.data, measured)


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """What makes a run: the recipe without the places of its files."""
    return config.model_dump(mode="json", exclude={"output", "store", "data_dir"})


def start_run(config: TrainConfig) -> bool:
    """Put `recipe.json` into the output folder. True: it is there, of a run with the same recipe."""
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output / "recipe.json"
    if path.exists():
        if json.loads(path.read_text()) != recipe_of(config):
            raise C2CError(f"{config.output} holds a run of another recipe; choose another output, or remove it")
        return True
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(recipe_of(config), indent=2) + "\n")
    os.replace(partial, path)
    return False


def write_fuser(pair: C2C, config: TrainConfig, data: Prepared, measured: dict[str, Any]) -> Path:
    """Write the pair's fuser into `fuser/` of the run, with what it was made from and the ids of the examples."""
    fuser, folder = pair.fusers[0], config.output / "fuser"
    assert isinstance(fuser, C2CFuser)
    training = {"recipe": recipe_of(config), "examples": len(data.train), **measured}
    checkpoint.save(fuser, folder, dtype=getattr(torch, config.weights_on_disk), training=training)
    partial = folder / f".training_ids.{os.getpid()}"
    partial.write_text("".join(f"{item.id}\n" for item in sorted(data.train, key=lambda i: i.id)))
    os.replace(partial, folder / "training_ids.txt")
    return folder


def _is_up_to(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except (ValueError, KeyError):
        return False  # the line that a kill cut short


class _Interruptions:
    """While active, Ctrl-C and SIGTERM are only noted, so that the step in progress can end and be saved."""

    def __init__(self) -> None:
        self.seen = False
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

    def __exit__(self, *args: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
