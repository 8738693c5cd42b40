"""How a run begins: its folder, the recipe that it is of, and the fusers that it goes on from (`start_from`)."""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..alignment.chat import FROZEN
from ..alignment.layers import layer_map
from ..config import FuserConfig, TrainConfig
from ..errors import C2CError
from ..files import replace_text
from ..fuser import VARIANTS, C2CFuser, checkpoint
from ..fuser.c2c import with_defaults
from ..fuser.ridge import Fitted
from ..models.load import LM
from ..pair import C2C, check_fit, other_ids

# What a run leaves in its folder beside its recipe.
RESULTS = ("fuser", "adapter", "checkpoint.pt", "log.jsonl")
# With others a run goes on: the steps are the same but for what noise is drawn.
HOW = ("accumulate", "save_every", "weights_on_disk")
# Of `fuser:`, what says how a fuser is trained, and so holds for one that is gone on from too.
TRAINED = {"dropout", "gate_noise", "initial_temperature", "final_temperature", "anneal_steps"}
# What training has no way of, and what it takes instead.
UNKNOWN: dict[str, dict[Any, Any]] = {"token_map": {"first": "span", "longest": "span"}, "fuse_response": {True: False}}
# And what says where new weights begin, and so doesn't hold.
BEGUN = {"gate_init", "zero_init", "projection_init", "blend"}


# ---- the folder ------------------------------------------------------------------------------------------------------


def recipe_of(config: TrainConfig) -> dict[str, Any]:
    """What makes a run: the recipe without the places of its files and who watches; of `fuser:` what was set."""
    made = config.model_dump(mode="json", exclude={"output", "store", "receiver_store", "data_dir", "trackers"})
    return made | {"fuser": config.fuser.model_dump(mode="json", exclude_unset=True)}


def is_begun(config: TrainConfig) -> bool:
    """Whether a run of this recipe has begun in its output folder.

    Raises:
        C2CError: one of another recipe has.
    """
    if (keys := _differing(config)) is None:
        return False
    if keys:
        raise C2CError(
            f"{config.output} holds a run of another recipe (other {', '.join(keys)}); choose another output, or "
            "remove it"
        )
    return True


def start_run(config: TrainConfig) -> bool:
    """`is_begun`; if not, put what it goes on from and `recipe.json` into the output folder."""
    config.output.mkdir(parents=True, exist_ok=True)
    if is_begun(config):
        return True
    for folder, kept in zip(starts_of(config), _kept(config), strict=True):
        if folder is not None:
            shutil.rmtree(kept, ignore_errors=True)  # of a run that was killed here
            checkpoint.convert(folder, kept, "ours")
    replace_text(config.output / "recipe.json", json.dumps(recipe_of(config), indent=2) + "\n")
    return False


def _differing(config: TrainConfig) -> list[str] | None:
    """The keys in which the run in the output folder has another recipe; None: there is none."""
    path = config.output / "recipe.json"
    if not path.is_file():
        if there := [name for name in RESULTS if _holds_something(config.output / name)]:
            raise C2CError(
                f"{config.output} holds {' and '.join(there)}, but no recipe.json that says what of; choose another "
                "output, or remove it"
            )
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    with contextlib.suppress(ValidationError):  # of a version with other keys: as it stands
        found = _identity(TrainConfig.model_validate(found))
    ours = _identity(config)
    return sorted(key for key in {*found, *ours} - {*HOW} if found.get(key) != ours.get(key))


def _holds_something(place: Path) -> bool:
    """Whether a file is there, or a folder with more in it than what a writer that was killed has left."""
    return place.is_file() or (place.is_dir() and any(not path.name.startswith(".") for path in place.iterdir()))


def _identity(config: TrainConfig) -> dict[str, Any]:
    """A recipe with all defaults, so that one that leaves a key out is the same as one that sets it to what it is."""
    variant = VARIANTS.get(config.fuser.variant, C2CFuser)
    fuser = with_defaults(config.fuser, variant.defaults).model_dump(mode="json")
    if any(config.starts):  # what is set is taken over from the fuser that is gone on from, what isn't is not
        fuser |= {"set": sorted(config.fuser.model_fields_set & TRAINED)}
    return recipe_of(config) | {"fuser": fuser}


# ---- the fusers ------------------------------------------------------------------------------------------------------


def starts_of(config: TrainConfig) -> list[Path | None]:
    """The folders of the fusers that a run goes on from, for each sharer one or none: those that a run which has begun
    has kept, so that it goes on whatever becomes of the others.

    Raises:
        C2CError: there is no fuser.
    """
    if not any(config.starts):
        return [None] * len(config.starts)
    if _differing(config) == []:
        return [kept if start else None for start, kept in zip(config.starts, _kept(config), strict=True)]
    return [
        None if start is None else checkpoint.resolve(start.source, start.revision, start.subfolder)
        for start in config.starts
    ]


def _kept(config: TrainConfig) -> list[Path]:
    return [config.output / "start" / str(j) for j in range(len(config.starts))]


def pair_to_train(receiver: LM, sharers: Sequence[LM], config: TrainConfig) -> C2C:
    """A recipe's models with its fusers: new ones, their weights drawn from torch's generator, or those of
    `start_from`.

    Raises:
        C2CError: a fuser to go on from isn't there or is damaged, takes caches of other shapes, is none that is trained
            here, or is another than the recipe's `fuser` asks for.
    """
    starts = [None if folder is None else checkpoint.load(folder) for folder in starts_of(config)]
    configs = []
    for source, start, sharer in zip(config.starts, starts, sharers, strict=True):
        if source is None or start is None:
            configs.append(config.fuser)
            continue
        check_fit(start, receiver, sharer)
        named = f"start_from {source.named}"
        if all(starts):  # else `fuser` is what the new ones are
            _check_same(named, start, config.fuser, (receiver.num_layers, sharer.num_layers))
        configs.append(_gone_on_from(named, start, config, several=len(sharers) > 1))
    pair = C2C.from_models(receiver, sharers, configs, chat_template_kwargs=FROZEN)
    if config.distill:
        check_one_vocabulary(pair)
    for fuser, start in zip(pair.fusers, starts, strict=True):
        if start is not None:
            fuser.load_state_dict(start.state_dict())
            fuser.record, fuser.loaded = start.record, True
        elif any(starts) and isinstance(fuser, Fitted):
            raise C2CError(f"fuser.variant {fuser.config.variant} is fitted and not trained; leave start_from out")
        elif isinstance(fuser, Fitted) and not config.holdout:
            raise C2CError(f"fuser.variant {fuser.config.variant} chooses its penalty on the hold-out; set holdout")
        elif any(starts) and fuser.config.projection_init == "ridge":
            raise C2CError(
                "fuser.projection_init ridge begins a new fuser with the whole change, which the one gone on from "
                "makes already; set projection_init to random, and zero_init to true to begin with that one's answers"
            )
    return pair


def _check_same(named: str, start: C2CFuser, asked: FuserConfig, depths: tuple[int, int]) -> None:
    """Refuse a recipe that asks for another fuser than the one that it goes on from."""
    for name in sorted(asked.model_fields_set - TRAINED - BEGUN - {*UNKNOWN}):
        there, given = getattr(start.config, name), getattr(asked, name)
        if there != (layer_map(given, *depths) if name == "layer_map" else given):
            raise C2CError(
                f"{named} has fuser.{name} {there!r:.80}, the recipe asks for {given!r:.80}; leave fuser.{name} out "
                "(--set 'fuser={}' leaves all of it out), or train a new fuser"
            )


def _gone_on_from(named: str, start: C2CFuser, config: TrainConfig, *, several: bool) -> FuserConfig:
    """The configuration of a fuser that goes on from another: its own, trained as the recipe says."""
    own = start.config
    if isinstance(start, Fitted):
        raise C2CError(f"{named} is of the variant {own.variant}, which is fitted and not trained; leave it out")
    if several and not own.residual:
        raise C2CError(f"{named} replaces the receiver's cache (residual: false); several sharers' changes are summed")
    changed = {}
    for name, instead in UNKNOWN.items():
        if (other := getattr(own, name)) in instead:
            changed[name] = instead[other]
            warnings.warn(f"{named} has {name} {other!r}; what is trained has {changed[name]!r}", stacklevel=3)
    given = {name: getattr(config.fuser, name) for name in config.fuser.model_fields_set & TRAINED}
    try:
        return FuserConfig.model_validate(own.model_dump() | changed | given)
    except ValidationError as error:
        raise C2CError(f"{named} and the recipe's fuser don't go together: {error.errors()[0]['msg']}") from error


def check_loaded(pair: C2C, config: TrainConfig) -> None:
    """Refuse a pair with a new fuser where the recipe goes on from another."""
    for source, fuser in zip(config.starts, pair.fusers, strict=True):
        if source is not None and not fuser.loaded:
            raise C2CError(
                f"the recipe goes on from {source.named}, the pair's fuser is a new one; make the pair with "
                "cache2cache.training.start.pair_to_train"
            )


def trained_on_before(config: TrainConfig) -> set[str]:
    """The ids of the examples that the fusers gone on from were trained on, as far as their folders say."""
    return set().union(*(checkpoint.training_ids(folder) for folder in starts_of(config) if folder))


def check_one_vocabulary(pair: C2C) -> None:
    """Refuse to distil between models whose token ids mean different things."""
    ours, theirs = (lm.need_tokenizer().get_vocab() for lm in (pair.receiver, pair.sharers[0]))
    if ours != theirs:
        differ = other_ids(pair.receiver, pair.sharers[0])
        raise C2CError(
            f"distill compares next-token distributions, but {differ:,} of {len(ours):,} tokens of "
            f"{pair.receiver.name} are other ids, or none, for {pair.sharers[0].name}; leave distill out, or take a "
            "pair of one family"
        )
