"""The pair that a run trains: new fusers, or those of earlier runs, which it goes on from (`start_from`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ..alignment.layers import layer_map
from ..config import FuserConfig, TrainConfig
from ..errors import C2CError
from ..fuser import C2CFuser, checkpoint
from ..models.load import LM
from ..pair import C2C, check_fit
from .fit import Fitted

# Of `fuser:`, what says how a fuser is trained, and so holds for one that is gone on from too.
TRAINED = {"dropout", "gate_noise", "initial_temperature", "final_temperature", "anneal_steps"}
# What training knows one way of, and published fusers come from another.
ONE_WAY = {"token_map": "span", "fuse_response": False}
# And what says where new weights begin, and so doesn't.
BEGUN = {"gate_init", "zero_init", "projection_init", "blend"}


def pair_to_train(receiver: LM, sharers: Sequence[LM], config: TrainConfig) -> C2C:
    """A recipe's models with its fusers: new ones, their weights drawn from torch's generator, or those of
    `start_from`.

    Raises:
        C2CError: a fuser to go on from isn't there or is damaged, takes caches of other shapes, is none that is trained
            here, or is another than the recipe's `fuser` asks for.
    """
    starts = [source and checkpoint.load(source) for source in config.starts]
    configs = []
    for source, start, sharer in zip(config.starts, starts, sharers, strict=True):
        if not start:
            configs.append(config.fuser)
            continue
        check_fit(start, receiver, sharer)
        _check_trainable(f"start_from {source}", start, several=len(sharers) > 1)
        if all(starts):  # else `fuser` is what the new ones are
            _check_same(f"start_from {source}", start, config.fuser, (receiver.num_layers, sharer.num_layers))
        for name, value in ONE_WAY.items():
            if (other := getattr(start.config, name)) != value:
                warnings.warn(f"start_from {source} has {name} {other!r}; what is trained has {value!r}", stacklevel=2)
        given = {name: getattr(config.fuser, name) for name in config.fuser.model_fields_set & TRAINED}
        configs.append(start.config.model_copy(update=given | ONE_WAY))
    pair = C2C.from_models(receiver, sharers, configs)
    for fuser, start in zip(pair.fusers, starts, strict=True):
        if start:
            assert isinstance(fuser, C2CFuser)
            fuser.load_state_dict(start.state_dict())
            fuser.record = start.record
        elif any(starts) and isinstance(fuser, Fitted):
            raise C2CError(f"fuser.variant {config.fuser.variant} is fitted and not trained; leave start_from out")
    return pair


def _check_trainable(what: str, fuser: C2CFuser, *, several: bool) -> None:
    config = fuser.config
    if isinstance(fuser, Fitted):
        raise C2CError(f"{what} is of the variant {config.variant}, which is fitted and not trained; leave it out")
    if several and not config.residual:
        raise C2CError(f"{what} replaces the receiver's cache (residual: false); several sharers' changes are summed")


def _check_same(what: str, start: C2CFuser, asked: FuserConfig, depths: tuple[int, int]) -> None:
    """Refuse a recipe that asks for another fuser than the one that it goes on from."""
    for name in sorted(asked.model_fields_set - TRAINED - BEGUN - {*ONE_WAY}):
        there, given = getattr(start.config, name), getattr(asked, name)
        if there != (layer_map(given, *depths) if name == "layer_map" else given):
            raise C2CError(
                f"{what} has fuser.{name} {there!r:.80}, the recipe asks for {given!r:.80}; leave fuser.{name} out "
                "(--set 'fuser={}' leaves all of it out), or train a new fuser"
            )
