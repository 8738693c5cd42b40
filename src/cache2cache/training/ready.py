"""What a recipe trains, with all that it reads: models, fusers and stores, loaded as the recipe says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..config import ModelSpec, TrainConfig
from ..files import check_writable
from ..fuser.ridge import Fitted
from ..models.load import LM, load_lm
from ..pair import C2C
from .items import Encoder
from .loop import check_trackers, in_half
from .sharding import shard
from .single import Alone, SingleObjective
from .start import is_begun, pair_to_train, starts_of
from .store import Store, read_settings


@dataclass(frozen=True)
class Ready:
    """What is trained, and what it reads.

    Attributes:
        what: the pair whose fusers are trained, or the receiver that is (method `single`).
        encoder: tokenizes the examples for it.
        stores: of the sharers' prefills; empty: they are computed.
        receiver_store: of the receiver's; None: they are computed.
    """

    what: C2C | SingleObjective
    encoder: Encoder
    stores: list[Store]
    receiver_store: Store | None = None

    @property
    def trained(self) -> nn.Module:
        """The module whose parameters are trained."""
        return self.what.fusers if isinstance(self.what, C2C) else self.what.trained

    @property
    def fitted(self) -> C2C | None:
        """The pair, if its fuser is fitted in closed form and not trained."""
        return self.what if isinstance(self.what, C2C) and isinstance(self.what.fusers[0], Fitted) else None


def check(config: TrainConfig, *, writes: bool = True) -> None:
    """Look at what a recipe names before models are loaded: trackers, fusers to go on from, stores, and, if the run
    `writes`, its output folder.

    Raises:
        C2CError: one of them is missing, or is another's.
    """
    check_trackers(config)
    if writes:
        check_writable(config.output)
        is_begun(config)
    starts_of(config)
    if config.method != "single":
        for folder in (*config.stores, *filter(None, [config.receiver_store])):
            read_settings(folder)


def load_model(spec: ModelSpec, precision: str, **where: Any) -> LM:
    """A model in a recipe's `precision`, unless its own entry names a dtype."""
    dtype = {} if precision == "auto" or spec.dtype != "auto" else {"dtype": precision}
    return load_lm(spec, None, **where, **dtype)


def load(config: TrainConfig, processes: PartialState) -> Ready:
    """Load a recipe's models, draw the fusers' first weights by its seed (or take those of `start_from`), open its
    stores, and with `shard` spread frozen models over the processes."""
    on_cpu: dict[str, Any] = {"device": "cpu", "device_map": None}
    precision, where = config.precision, {}
    if config.shard:  # whole models needn't fit where their parts go
        precision, where = "bfloat16" if in_half(config, processes.device) else "float32", on_cpu
    receiver = load_model(config.receiver, precision, **where)
    torch.manual_seed(config.seed)  # the first weights
    if config.method == "single":
        return Ready(SingleObjective(receiver, config.lora), Alone(receiver), [])
    # With a store a sharer's weights are only compared with those that it was made with; the smallest load will do.
    compared = bool(config.store and not config.distill)

    def as_sharer(spec: ModelSpec) -> LM:
        if spec == config.receiver:
            return receiver
        if compared and not spec.quantization:  # quantised weights are told apart as they are
            return load_lm(spec, None, dtype="bfloat16", **on_cpu)
        return load_model(spec, precision, **where)

    sharers = [as_sharer(spec) for spec in config.sharers]
    if config.shard:
        shard([receiver, *([] if compared else sharers)], processes.device)
    pair = pair_to_train(receiver, sharers, config)
    stores = [Store(folder, sharer) for folder, sharer in zip(config.stores, sharers, strict=False)]
    return Ready(pair, pair, stores, Store(config.receiver_store, receiver) if config.receiver_store else None)
