"""What is trained: the loss of a response on the fused cache (paper section 3.3), and what a run of it starts from.

What is learned is an `Objective`: here a fuser, in `training.single` an adapter of the receiver itself.
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import replace
from functools import partial
from itertools import chain, tee
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import TrainConfig
from ..errors import C2CError
from ..fuser import C2CFuser, checkpoint
from ..fuser.ridge import Moments, start_from_ridge
from ..kv import KV, Prefilled, pad_left, prefill, prefill_prompts, prefilled
from ..models.load import LM
from ..pair import C2C, PromptIds, sharer_lengths, where_to_fuse
from .data import row_name
from .items import Item, Prepared
from .loss import expected, loss_of, response_losses, token_losses
from .sharding import is_sharded
from .start import check_one_vocabulary, recipe_of, trained_on_before
from .store import Asked, Store

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
                if not x.shape[1]:  # prompts of which nothing is fused
                    continue
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

    def write(self, config: TrainConfig, data: Prepared, measured: dict[str, Any], ids: Set[str]) -> Path:
        """Put what was trained into `folder` of the run, with what it was made from and the ids of the examples that
        it was trained on."""
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

    def forward(self, items: Sequence[Item], per: str) -> tuple[Tensor, Tensor]:
        distill = self.distill if self.training else 0.0
        loss, greedy = response_loss(self.pair, items, self.store, per, self.in_half, self.receiver_store, distill)
        if torch.is_grad_enabled():
            for j, fuser in enumerate(self.pair.fusers):
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
        fuser, prompts = self.pair.fusers[j].config, data.train[: config.calibration_prompts]
        if self.pair.fusers[j].loaded:  # it has statistics and weights
            return []
        if fuser.projection_init == "ridge":
            return [in_pieces(p for i, p in enumerate(prompts) if i % 5), in_pieces(prompts[::5])]
        return [in_pieces(prompts)] if fuser.normalize else []

    def calibration(self, config: TrainConfig, data: Prepared) -> list[tuple[int, list[Item]]]:
        return [
            (j, piece)
            for j in range(len(self.pair.fusers))
            for group in self._groups(config, data, j)
            for piece in group
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
        for j, fuser in enumerate(self.pair.fusers):
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
                start_from_ridge(fuser, moments[0], moments[1], share=1 / len(self.pair.fusers))

    @property
    def goes_on(self) -> bool:
        return any(fuser.loaded for fuser in self.pair.fusers)

    def set_progress(self, step: int) -> None:
        for fuser in self.pair.fusers:
            fuser.set_progress(step)

    def after_step(self) -> dict[str, Any]:
        """Over all fusers: how many gates are open, and the mean of the dynamic weights that this process computed."""
        totals, counts = zip(*(fuser.take_weights() for fuser in self.pair.fusers), strict=True)
        weight = {"mean_weight": sum(totals) / sum(counts)} if sum(counts) else {}
        return {"gates_open": sum(int(fuser.open_gates.sum()) for fuser in self.pair.fusers), **weight}

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

    def write(self, config: TrainConfig, data: Prepared, measured: dict[str, Any], ids: Set[str]) -> Path:
        return write_fuser(self.pair, config, data, measured, ids)


def write_fuser(pair: C2C, config: TrainConfig, data: Prepared, measured: dict[str, Any], ids: Set[str]) -> Path:
    """Write the pair's fuser into `fuser/` of the run, several into `fuser/0`, `fuser/1`, … as `save_pretrained` does,
    with what they were made from and the ids of the examples."""
    folder = config.output / "fuser"
    training = {"recipe": recipe_of(config), "examples": len(data.train), **measured}
    ids = ids | trained_on_before(config)
    for j, fuser in enumerate(pair.fusers):
        place = folder / str(j) if len(pair.fusers) > 1 else folder
        before = {"started_from": fuser.record} if fuser.loaded else {}
        fuser.trained_on = frozenset(ids)
        checkpoint.save(fuser, place, dtype=getattr(torch, config.weights_on_disk), training=training | before)
    return folder
