"""Training a fuser: next-token loss on the response, gradients into the fuser alone (paper section 3.3).

What is learned is an `Objective`: here a fuser, in `training.single` an adapter of the receiver itself.

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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property, partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from .. import heap
from ..config import TrainConfig
from ..errors import C2CError
from ..files import remove_partials, replace_text, replacing, save_state
from ..fuser import C2CFuser, checkpoint
from ..fuser.ridge import Moments, start_from_ridge
from ..kv import KV, Prefilled, pad_left, prefill, prefill_prompts, prefilled
from ..models.load import LM
from ..pair import C2C, PromptIds, sharer_lengths, where_to_fuse
from .data import Example, examples, mix, row_name, shortened, split
from .loss import expected, loss_of, response_losses, token_losses
from .sharding import is_sharded
from .start import check_loaded, only_run, recipe_of, start_run, trained_on_before
from .store import Asked, Store

HELD = 3_500_000_000  # bytes that buffers may take between two steps, of those that are free then


@dataclass(frozen=True, slots=True)
class Item:
    """An example as token ids: the encoded prompt and the response that follows it."""

    id: str
    prompt: PromptIds
    response: Sequence[int]

    @property
    def length(self) -> int:
        return len(self.prompt.receiver) + len(self.response)


@dataclass(frozen=True)
class Prepared:
    """The items of a recipe: to train on, to watch, and what `max_tokens` did.

    Attributes:
        train, holdout: the items; with weights those of `train` may repeat.
        too_long: how many examples were left out, their prompts leaving no room for the response.
        shortened: how many of the others lost old turns.
        cut: how many of the others lost the end of their response.
        share: how much of the recipe's examples this is; below 1 for a sample.
        seconds: what encoding it took.
    """

    train: list[Item]
    holdout: list[Item]
    too_long: int
    shortened: int = 0
    cut: int = 0
    share: float = 1.0
    seconds: float = field(default=0.0, compare=False)

    @property
    def truncation(self) -> str:
        """What to say of it."""
        more = [f"{n} {what}" for n, what in ((self.shortened, "without old turns"), (self.cut, "cut")) if n]
        return ", ".join([f"{self.too_long} too long", *more])


class Encoder(Protocol):
    """What turns prompts into token ids: a pair, or a receiver without sharers (`single.Alone`)."""

    receiver: LM

    def encode(self, prompt: Any, *, prefix: str = "") -> PromptIds: ...


def prepare(
    pair: Encoder,
    config: TrainConfig,
    found: Sequence[Example] | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
    most: int | None = None,
) -> Prepared:
    """Encode a recipe's examples and set the hold-out aside, the same ones in every run and for all models.

    What is too long is left out behind that split, so the hold-out may be smaller than asked for. Each of several
    processes encodes a part of the examples, and all of them have all in the end.

    Args:
        found: the recipe's `examples`, where they are read already.
        progress: called with how many of how many examples were encoded here.
        most: encode every n-th example only, so that there are about as many; None: all.
    """
    began = time.perf_counter()
    learned, watched = split(examples(config) if found is None else found, config.holdout)
    every = 1 if most is None else max(1, math.ceil((len(learned) + len(watched)) / most))
    asked = [*watched[::every], *learned[::every]]
    share = len(asked) / (len(learned) + len(watched))
    held = len(watched[::every])
    del learned, watched
    made: list[tuple[Item | None, list[str]] | C2CError] = []
    process = this_process()
    parts = [len(asked) * i // process.num_processes for i in range(process.num_processes + 1)]
    mine = asked[parts[process.process_index] : parts[process.process_index + 1]]
    for number, example in enumerate(mine, 1):
        try:
            item, changes = fit_tokens(pair, example, config)
            made.append((item and compact(item), changes))
        except C2CError as error:  # such as a template that refuses the order of the turns
            made.append(error)
        progress(number, len(mine))
    # Errors travel too: a process that ends by itself would leave the others waiting.
    made = gather_object(made)

    train: list[Item] = []
    holdout: list[Item] = []
    sources: list[list[Item]] = [[] for _ in config.data]
    counts, bad = Counter(too_long=0, shortened=0, cut=0), []
    for number, (example, result) in enumerate(zip(asked, made, strict=True)):
        if isinstance(result, C2CError):
            if config.data[example.source].on_bad_rows == "error":
                raise result
            bad.append(str(result))
            continue
        item, changes = result
        counts.update(changes)
        if item is not None and number < held:
            holdout.append(item)
        elif item is not None:
            train.append(item)
            sources[example.source].append(item)
    if bad:
        warnings.warn(f"{len(bad)} examples cannot be encoded and are left out; the first: {bad[0]}", stacklevel=2)
    if not train or (config.holdout and not holdout):
        raise C2CError(
            f"{len(train) + len(holdout)} examples are left ({counts['too_long']} longer than max_tokens "
            f"{config.max_tokens}), {len(holdout)} of them for the hold-out of {config.holdout}; give more data or "
            "raise max_tokens"
        )
    weights = [source.weight for source in config.data if source.weight is not None]
    return Prepared(
        mix(sources, weights, config.drawn_by) if weights else train,
        holdout,
        **counts,
        share=share,
        seconds=time.perf_counter() - began,
    )


def compact(item: Item) -> Item:
    """An example without what training doesn't read, in four bytes a number, a fifth of what lists take.

    It is trained on the token map `span`, by which positions count up.
    """
    prompt = item.prompt
    receiver, response = array("i", prompt.receiver), array("i", item.response)
    sharers, maps = ([array("i", numbers) for numbers in each] for each in (prompt.sharers, prompt.maps))
    return Item(item.id, PromptIds(receiver, sharers, maps), response)


def fit_tokens(pair: Encoder, example: Example, config: TrainConfig) -> tuple[Item | None, list[str]]:
    """An example as token ids within `max_tokens`, and the counters of `Prepared` that what was done to it falls under.

    A response keeps its first `min_response_tokens` tokens, or all that it has (all, where `too_long` says drop); where
    the prompt leaves less room, the oldest turns go if `truncate` says so, else the example.
    """
    response = response_ids(pair.receiver.need_tokenizer(), example)
    needed = len(response) if config.too_long == "drop" else min(config.min_response_tokens, len(response))
    changes: list[str] = []
    for messages in shortened(example.messages) if config.truncate == "oldest" else [example.messages]:
        try:
            prompt = pair.encode(list(messages), prefix=example.prefix)
        except C2CError as error:
            raise C2CError(f"{example.id}: {error}") from error
        room = config.max_tokens - len(prompt.receiver)
        if room >= needed and all(len(s) <= config.max_tokens for s in prompt.sharers):
            cut = ["cut"] if room < len(response) else []
            return Item(example.id, prompt, response[:room]), changes + cut
        changes = ["shortened"]
    return None, ["too_long"]


def response_ids(tokenizer: Any, example: Example) -> list[int]:
    """The response's tokens, with the token that ends a turn where it ends."""
    ids = list(tokenizer(example.response, add_special_tokens=False)["input_ids"])
    if example.ends and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise C2CError(f"the response of {example.id} has no tokens; leave the row out")
    return ids


Stores = Store | Sequence[Store] | None  # of a pair's sharers: the only one's, one each, or none


def response_loss(
    pair: C2C,
    items: Sequence[Item],
    store: Stores,
    per: str = "token",
    half: bool = False,
    receiver_store: Store | None = None,
    distill: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of the responses on the fused cache, and which examples' tokens were all greedy.

    The prompts are prefilled without gradients, the sharer's from the store if there is one; then the receiver reads
    the last prompt token and the response on top of the fused cache. With several sharers every fuser reads the
    receiver's clean cache, and the changes are summed.

    Args:
        pair: gradients flow where its fusers have them enabled.
        items: the batch.
        store: sharer prefills, for several sharers one store each; None computes them.
        per: how tokens are averaged, see `TrainConfig.loss`.
        half: the fuser multiplies in bfloat16 (autocast); its weights and their gradients keep their type.
        receiver_store: the receiver's prefills; None computes them.
        distill: weight of the divergence from the (only) sharer's next-token distributions, added to each token's
            loss.

    Returns:
        The loss (), and (B,) bool.
    """
    receiver, whole = pair.receiver, distill > 0
    prompts = [item.prompt for item in items]
    clean = receiver_prefill(pair, prompts, receiver_store)
    fused: KV | None = None
    for j, (fuser, own) in enumerate(zip(pair.fusers, one_each(pair, store), strict=True)):
        known = sharer_prefill(pair, what_is_read(pair, prompts, whole, j), own, j)
        where, _ = where_to_fuse(prompts, j, clean.kv.length, known.length, read_lengths(prompts, whole, j))
        with torch.autocast(receiver.device.type, torch.bfloat16, enabled=half):
            fused = fuser(clean.kv, known.to(receiver.device), where.to(receiver.device), fused)
    assert fused is not None

    target = targets(items).to(receiver.device)
    start = replace(clean, kv=fused)
    if not distill:
        return loss_of(*response_losses(receiver, start, target), target, per)
    logits = expected(receiver, start, target)
    with torch.no_grad():
        sharer = pair.sharers[0]
        alone = prefilled(sharer, [p.sharers[0] for p in prompts], known)
        theirs = expected(sharer, alone, target.to(sharer.device)).to(logits.device)
    nll, likeliest = token_losses(logits, target)
    shared = min(theirs.shape[-1], logits.shape[-1])  # the rest are rows without a token
    ours, theirs = (x[..., :shared].float().log_softmax(-1) for x in (logits, theirs))
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).masked_fill(target < 0, 0.0)
    return loss_of(nll + distill * divergence, likeliest, target, per)


def targets(items: Sequence[Item]) -> Tensor:
    """The responses, (B, R), with -100 behind their ends."""
    target = torch.full((len(items), max(len(item.response) for item in items)), -100)
    for row, item in enumerate(items):
        target[row, : len(item.response)] = torch.tensor(item.response)
    return target


def one_each(pair: C2C, store: Stores) -> list[Store | None]:
    """A store, or None, for each of the pair's sharers."""
    stores: list[Store | None] = [None] * len(pair.sharers)
    if store is not None:
        stores = [store] if isinstance(store, Store) else list(store)
    if len(stores) != len(pair.sharers):
        raise C2CError(f"{len(stores)} stores for {len(pair.sharers)} sharers; give one for each, in the same order")
    return stores


def receiver_prefill(pair: C2C, prompts: Sequence[PromptIds], store: Store | None) -> Prefilled:
    """The receiver's clean caches of prompts but their last token, from a store of its own or computed."""
    rows = [p.receiver for p in prompts]
    if store is None:
        return prefill_prompts(pair.receiver, rows, **passes(pair.receiver))
    return prefilled(pair.receiver, rows, store.read(*what_receiver_read(pair, prompts)))


def what_receiver_read(pair: C2C, prompts: Sequence[PromptIds]) -> Asked:
    """What training reads of the receiver: all of a prompt but its last token, which the response begins behind."""
    rows = [p.receiver for p in prompts]
    return Asked(rows, [len(row) - 1 for row in rows], pair.receiver.dtype)


def check_one_vocabulary(pair: C2C) -> None:
    """Refuse to distil between models whose token ids mean different things."""
    ours, theirs = (lm.need_tokenizer().get_vocab() for lm in (pair.receiver, pair.sharers[0]))
    if ours != theirs:
        differ = sum(theirs.get(token) != number for token, number in ours.items())
        raise C2CError(
            f"distill compares next-token distributions, but {differ:,} of {len(ours):,} tokens of "
            f"{pair.receiver.name} are other ids, or none, for {pair.sharers[0].name}; leave distill out, or take a "
            "pair of one family"
        )


def what_is_read(pair: C2C, prompts: Sequence[PromptIds], whole: bool = False, j: int = 0) -> Asked:
    """What training reads of sharer j: the layers that its fuser reads, up to the last mapped token; or `whole`."""
    layers = pair.fusers[j].sharer_layers
    assert isinstance(layers, Tensor)
    reads = None if whole else (int(layers.min()), int(layers.max()) + 1)
    return Asked([p.sharers[j] for p in prompts], read_lengths(prompts, whole, j), layers=reads)


def read_lengths(prompts: Sequence[PromptIds], whole: bool = False, j: int = 0) -> list[int]:
    """How many tokens of each prompt are read of sharer j's cache."""
    return [len(p.sharers[j]) for p in prompts] if whole else list(sharer_lengths(prompts, j))


def sharer_prefill(pair: C2C, asked: Asked, store: Store | None, j: int = 0) -> KV:
    """Sharer j's caches, from a store or computed."""
    sharer = pair.sharers[j]
    if store is not None:
        return store.read(*asked).to(sharer.device)
    assert asked.lengths is not None
    rows = [row[:n] for row, n in zip(asked.rows, asked.lengths, strict=True)]
    return prefill(sharer, *pad_left(rows, sharer.pad_token_id, sharer.device), **passes(sharer))


def passes(lm: LM) -> dict[str, Any]:
    """Keyword arguments of `prefill`: a sharded model reads all at once, as every process has to run it equally
    often."""
    return {"chunk_tokens": sys.maxsize, "past": ()} if is_sharded(lm) else {}


@torch.no_grad()
def in_pieces(items: Iterable[Item], rows: int = 16, positions: int = 8192) -> list[list[Item]]:
    """Examples by the length of their prompts, so many at once, and as few as it takes to stay below so many positions
    of the receiver's, padding included."""
    made: list[list[Item]] = []
    for item in sorted(items, key=lambda item: len(item.prompt.receiver)):
        size = len(item.prompt.receiver)
        if made and len(made[-1]) < rows and (len(made[-1]) + 1) * size <= positions:
            made[-1].append(item)
        else:
            made.append([item])
    return made


def fused_inputs(
    pair: C2C,
    pieces: Iterable[Sequence[Item]],
    store: Store | None,
    receiver_store: Store | None = None,
    j: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """What fuser j reads at the positions that are fused, piece by piece: the sharer's (G, N, S), the receiver's
    (G, N, T). `store` is that sharer's."""
    fuser = pair.fusers[j]
    assert isinstance(fuser, C2CFuser)
    for items in pieces:
        prompts = [item.prompt for item in items]
        clean = receiver_prefill(pair, prompts, receiver_store)
        known = sharer_prefill(pair, what_is_read(pair, prompts, j=j), store, j).to(pair.receiver.device)
        where, _ = where_to_fuse(prompts, j, clean.kv.length, known.length, read_lengths(prompts, j=j))
        yield fuser.inputs(clean.kv, known, where.to(pair.receiver.device))


class Channels:
    """Mean and deviation of each channel over what `fused_inputs` gives, for a normalising fuser."""

    def __init__(self) -> None:
        self.moments: dict[str, tuple[int, Tensor, Tensor]] = {}  # positions, their mean, sum of squared deviations

    def of(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The pieces as they come, each of which counts."""
        for inputs in pieces:
            for name, x in zip(("sharer", "receiver"), inputs, strict=True):
                var, mean = (y.double() for y in torch.var_mean(x.float(), 1, correction=0, keepdim=True))
                count, squares = x.shape[1], var * x.shape[1]
                if name in self.moments:  # two parts' moments into those of both
                    before, old, sum_before = self.moments[name]
                    shift, whole = mean - old, before + count
                    squares = sum_before + squares + shift.square() * before * count / whole
                    count, mean = whole, old + shift * count / whole
                self.moments[name] = count, mean, squares
            yield inputs

    def put_into(self, fuser: C2CFuser) -> None:
        """Set the fuser's statistics to what has counted so far."""
        for name, (count, mean, squares) in self.moments.items():
            std = (squares / (count - 1)).sqrt()
            # A channel that hardly moves would be blown up beyond all others.
            std = std.clamp(min=0.01 * std.mean(-1, keepdim=True).clamp(min=1e-6))
            getattr(fuser, f"{name}_mean").copy_(mean)
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


class Objective(nn.Module):
    """What a `Trainer` trains: a loss as a module, which is what DDP wraps.

    Attributes:
        folder: where in the run's output it is put at the end.
        trained: the module whose parameters are trained and whose state is kept.
        frozen: the models that it takes besides, by what they are.
    """

    folder: ClassVar[str]
    trained: nn.Module
    frozen: dict[str, nn.Module]

    def forward(self, items: Sequence[Item], per: str) -> tuple[Tensor, Tensor]:
        """The loss () of a batch, and which examples' tokens were all greedy, (B,) bool, as `response_loss` gives."""
        raise NotImplementedError

    def models(self) -> list[LM]:
        """Whose weights a run goes on with."""
        raise NotImplementedError

    def reads(self) -> list[str]:
        """For each frozen model that prefills how that is had: computed, or from a store of some precision."""
        return []

    def check(self, data: Prepared) -> None:
        """Raise a C2CError for what can't be trained on."""

    def calibration(self, config: TrainConfig, data: Prepared) -> list[tuple[int, list[Item]]]:
        """What `start` reads: pieces of the data, each with the number of the fuser that it is for."""
        return []

    def start(self, config: TrainConfig, data: Prepared, progress: Callable[[int], None] = lambda n: None) -> None:
        """What comes before the first step of a new run; `progress` is called with the size of each piece read."""

    @property
    def goes_on(self) -> bool:
        """Whether what is trained had been trained before."""
        return False

    def set_progress(self, step: int) -> None:
        """Called before each step with the number of those done."""

    def after_step(self) -> dict[str, Any]:
        """What the log says of a step besides its loss."""
        return {}

    def read_ahead(self, parts: Iterator[list[Item]]) -> Iterator[list[Item]]:
        """The parts of batches that this process computes, while what the next ones need is fetched."""
        return parts

    def write(self, config: TrainConfig, data: Prepared, measured: dict[str, Any]) -> Path:
        """Put what was trained into `folder` of the run, with what it was made from."""
        raise NotImplementedError


class FuserObjective(Objective):
    """`response_loss` of a pair: what is trained is its fuser, or all of its fusers together.

    Args:
        pair, store, half, receiver_store, distill: as for `response_loss`; the last one counts in training only.

    Raises:
        C2CError: distillation between models of unlike vocabularies, or from several sharers; several sharers that are
            fused in sequence, or more or fewer stores.
    """

    folder = "fuser"

    def __init__(
        self,
        pair: C2C,
        store: Stores,
        half: bool,
        receiver_store: Store | None = None,
        distill: float = 0.0,
    ) -> None:
        several = len(pair.sharers) > 1
        if several and distill:
            raise C2CError(f"distill is towards one sharer, {len(pair.sharers)} were given; leave it out")
        if several and pair.mode != "parallel":
            raise C2CError(f"several fusers are trained in the mode parallel, the pair's is {pair.mode}")
        if distill:
            check_one_vocabulary(pair)
        super().__init__()
        self.trained = pair.fusers if several else pair.fusers[0]
        # A module list, so that models which are the same one count once.
        self.frozen = {
            "receiver": pair.receiver.model,
            "sharers": nn.ModuleList(sharer.model for sharer in pair.sharers),
        }
        self.pair, self.store, self.in_half = pair, store, half
        self.stores = one_each(pair, store)
        self.receiver_store, self.distill = receiver_store, distill

    @property
    def fusers(self) -> list[C2CFuser]:
        return [fuser for fuser in self.pair.fusers if isinstance(fuser, C2CFuser)]

    def forward(self, items: Sequence[Item], per: str) -> tuple[Tensor, Tensor]:
        distill = self.distill if self.training else 0.0
        loss, greedy = response_loss(self.pair, items, self.store, per, self.in_half, self.receiver_store, distill)
        if torch.is_grad_enabled():
            for j, fuser in enumerate(self.fusers):
                if not any(sharer_lengths([item.prompt for item in items], j)):  # nothing to fuse: the gradient is zero
                    loss = loss + 0.0 * sum(p.sum() for p in fuser.parameters())
        return loss, greedy

    def models(self) -> list[LM]:
        return [self.pair.receiver, *self.pair.sharers]

    def reads(self) -> list[str]:
        stores = [self.receiver_store, *self.stores]
        return ["computed" if s is None else "{computed_in} kept as {precision}".format(**s.config) for s in stores]

    def check(self, data: Prepared) -> None:
        items = [*data.train, *data.holdout]
        places = [(self.receiver_store, [item.prompt.receiver for item in items])]
        places += [(store, [item.prompt.sharers[j] for item in items]) for j, store in enumerate(self.stores)]
        for store, prompts in places:
            if store is not None and (missing := store.missing(prompts)):
                raise C2CError(
                    f"the store {store.folder} lacks {len(missing)} of the recipe's {len(prompts)} prompts; run c2c "
                    "precompute with the same recipe, which computes what is missing"
                )
        sharers = [j for j, sharer in enumerate(self.pair.sharers) if is_sharded(sharer) and self.stores[j] is None]
        receiver = is_sharded(self.pair.receiver) and self.receiver_store is None
        for item in items:
            short = receiver and len(item.prompt.receiver) < 2
            if short or any(not sharer_lengths([item.prompt], j)[0] for j in sharers):
                raise C2CError(
                    f"{item.id} leaves a sharded model nothing to read, which the other processes would wait for; "
                    "leave it out of the data, or shard out of the recipe"
                )

    def _groups(self, config: TrainConfig, data: Prepared, j: int) -> list[list[list[Item]]]:
        """The pieces that fuser j is started from; ridge regression chooses its penalty on a second group of them."""
        fuser, prompts = self.fusers[j].config, data.train[: config.calibration_prompts]
        if self.fusers[j].loaded:  # it has statistics and weights
            return []
        if fuser.projection_init == "ridge":
            return [in_pieces(p for i, p in enumerate(prompts) if i % 5), in_pieces(prompts[::5])]
        return [in_pieces(prompts)] if fuser.normalize else []

    def calibration(self, config: TrainConfig, data: Prepared) -> list[tuple[int, list[Item]]]:
        return [
            (j, piece) for j in range(len(self.fusers)) for group in self._groups(config, data, j) for piece in group
        ]

    def inputs(self, j: int, pieces: Iterable[Sequence[Item]]) -> Iterator[tuple[Tensor, Tensor]]:
        """`fused_inputs` with the stores of this objective."""
        return fused_inputs(self.pair, pieces, self.stores[j], self.receiver_store, j)

    def start(self, config: TrainConfig, data: Prepared, progress: Callable[[int], None] = lambda n: None) -> None:
        def read(j: int, pieces: Sequence[list[Item]]) -> Iterator[tuple[Tensor, Tensor]]:
            for piece, inputs in zip(pieces, self.inputs(j, pieces), strict=True):
                yield inputs
                progress(len(piece))

        before = set(map(row_name, trained_on_before(config)))
        if seen := sum(row_name(item.id) in before for item in data.holdout):
            warnings.warn(
                f"{seen} of the hold-out's {len(data.holdout)} examples are among those that what start_from "
                "names was trained on, so the loss there will look too good",
                stacklevel=2,
            )
        for j, fuser in enumerate(self.fusers):
            channels = Channels()
            groups = [channels.of(read(j, pieces)) for pieces in self._groups(config, data, j)]
            # Read once, piece by piece: all that is kept are sums.
            moments = []
            if fuser.config.projection_init == "ridge":
                moments = [Moments.of(group) for group in groups]
            else:
                deque(chain(*groups), maxlen=0)
            if fuser.config.normalize:
                channels.put_into(fuser)
            if moments:
                # Each predicts the receiver's cache, so each goes its part of the way there.
                start_from_ridge(fuser, moments[0], moments[1], share=1 / len(self.fusers))

    @property
    def goes_on(self) -> bool:
        return any(fuser.loaded for fuser in self.fusers)

    def set_progress(self, step: int) -> None:
        for fuser in self.fusers:
            fuser.set_progress(step)

    def after_step(self) -> dict[str, Any]:
        """Over all fusers: how many gates are open, and the mean of the dynamic weights that this process computed."""
        totals, counts = zip(*(fuser.take_weights() for fuser in self.fusers), strict=True)
        weight = {"mean_weight": sum(totals) / sum(counts)} if sum(counts) else {}
        return {"gates_open": sum(int(fuser.open_gates.sum()) for fuser in self.fusers), **weight}

    def read_ahead(self, parts: Iterator[list[Item]]) -> Iterator[list[Item]]:
        reads: list[tuple[Store, Callable[[list[Item]], Asked]]]
        reads = [(store, partial(self._asked, j)) for j, store in enumerate(self.stores) if store is not None]
        if self.receiver_store is not None:
            reads.append((self.receiver_store, self._asked_of_receiver))
        if not reads:
            return parts
        # All read ahead of the same part: each has its turn when the last of them yields.
        copies = zip(reads, tee(parts, len(reads)), strict=True)
        turns = [store.ahead(copy, asked) for (store, asked), copy in copies]
        return (part for part, *_ in zip(*turns, strict=True))

    def _asked_of_receiver(self, part: Sequence[Item]) -> Asked:
        return what_receiver_read(self.pair, [item.prompt for item in part])

    def _asked(self, j: int, batch: Sequence[Item]) -> Asked:
        return what_is_read(self.pair, [item.prompt for item in batch], self.distill > 0, j)

    def write(self, config: TrainConfig, data: Prepared, measured: dict[str, Any]) -> Path:
        return write_fuser(self.pair, config, data, measured)


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
        with only_run(self.output) if self.is_main else contextlib.nullcontext():
            return self._run(on_step, on_calibration)

    def _run(self, on_step: Callable[[dict[str, Any]], None], on_calibration: Callable[[int, int], None]) -> Path:
        self._start(on_calibration)
        interrupted = _Interruptions()
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
            batched = batches(self.data.train, self.config.batch_size, self.config.seed, epoch)
            yield from batched[max(0, begin - first) : max(0, self.steps - first)]

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
            with (self.output / "log.jsonl").open("a") as log:
                log.write(json.dumps(record) + "\n")
        self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=self.step)

    # ---- what stays on disk -------------------------------------------------------------------------------------

    def _start(self, on_calibration: Callable[[int, int], None] = lambda done, of: None) -> None:
        with self.accelerator.main_process_first():  # the others find the first one's file
            known = start_run(self.config)
        if self.is_main:
            result = self.output / self.objective.folder
            for folder in (self.output, result, *result.glob("*")):
                remove_partials(folder)
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
        except Exception as error:
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
            lines = [line for line in path.read_text().splitlines() if self.step and _is_up_to(line, self.step)]
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
            self.objective.write(self.config, self.data, measured)
        self.accelerator.wait_for_everyone()
        return self.output / self.objective.folder


def this_process() -> PartialState:
    """Which of a launcher's processes this is, alone unless one started several; it has a GPU of its own from now on.

    They wait for each other for hours before that is an error: one may still fetch models and data that others have.
    """
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(hours=6))


def _accelerator(config: TrainConfig) -> Accelerator:
    """This process's part of a run; alone unless a launcher started several."""
    if config.trackers and not all(importlib.util.find_spec(name) for name in config.trackers):
        raise C2CError(
            f"trackers: {', '.join(config.trackers)} is not installed; pip install 'cache2cache[tensorboard]'"
        )
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


def write_fuser(pair: C2C, config: TrainConfig, data: Prepared, measured: dict[str, Any]) -> Path:
    """Write the pair's fuser into `fuser/` of the run, several into `fuser/0`, `fuser/1`, … as `save_pretrained` does,
    with what they were made from and the ids of the examples."""
    folder = config.output / "fuser"
    training = {"recipe": recipe_of(config), "examples": len(data.train), **measured}
    ids = {item.id for item in data.train} | trained_on_before(config)
    for j, fuser in enumerate(pair.fusers):
        assert isinstance(fuser, C2CFuser)
        place = folder / str(j) if len(pair.fusers) > 1 else folder
        before = {"started_from": fuser.record} if fuser.loaded else {}
        checkpoint.save(fuser, place, dtype=getattr(torch, config.weights_on_disk), training=training | before)
        write_ids(place, ids)
    return folder


def write_ids(folder: Path, ids: Iterable[str]) -> None:
    """Put the ids of the examples trained on beside what was trained."""
    replace_text(folder / checkpoint.IDS, "".join(f"{name}\n" for name in sorted(ids)))


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
