"""What an evaluation runs on: models, stores and adapters, loaded, and the settings that its folder remembers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..alignment.chat import FROZEN
from ..config import EvalConfig, ModelIdentity, ModelSpec, is_address
from ..errors import C2CError
from ..files import file_hash, replace_text
from ..fuser import checkpoint
from ..models.load import LM
from ..models.packed import pack
from ..pair import C2C, identity
from ..training.single import load_single
from ..training.store import Store
from .answers import SETTINGS, TASK
from .asking import FEW_SHOT, SINGLE, SKIP, Setup


def load(config: EvalConfig) -> tuple[Setup, dict[str, Any]]:
    """The models of a run, and what its folder is to remember: one folder holds answers of one setup."""
    pair, settings = load_pair(
        config.fuser, config.subfolder, (config.receiver, config.receiver_dtype),
        (config.sharer, config.sharer_dtype), config.mode,
    )  # fmt: skip
    stores: Sequence[Store | None] = []
    if config.store:
        if len(config.store) != len(pair.sharers):
            raise C2CError(f"{len(config.store)} stores for {len(pair.sharers)} sharers; give one for each")
        stores = [open_store(f, config.store_precision, s) for f, s in zip(config.store, pair.sharers, strict=True)]
    elif config.store_precision is not None:
        open_store(None, config.store_precision, pair.sharers[0])
    settings |= {
        "store": stores[0].config["precision"] if stores and stores[0] else None,
        "split": config.split,
        "prompt": config.prompt,
        "limit": config.limit,
        "seed": config.seed,
        "max_new_tokens": config.max_new_tokens,
    }
    for task in config.tasks:
        about = task.model_dump(mode="json", exclude={"name", "limit", "limits"}, exclude_none=True)
        settings[TASK + task.label] = about
    if SKIP in config.methods:
        settings["skip"] = config.skip
    if FEW_SHOT in config.methods:
        settings["shots"] = config.shots
    single = identical = None
    if SINGLE in config.methods:
        if config.single is None:
            raise C2CError("the method single needs an adapter; give its folder with --single")
        single = load_single(pair.receiver, config.single)
        settings["single"] = file_hash(config.single / "adapter_model.safetensors")
    if "self" in config.methods and config.identical is not None:
        identical, settings["identical"] = load_identical(config.identical, pair.receiver)
    return Setup(
        pair, config.prompt, config.skip, single, identical, stores, config.max_new_tokens, config.seed
    ), settings  # fmt: skip


def pack_models(setup: Setup) -> None:
    """Lay out the weights of the run's models for batches; not of one that an adapter is attached to."""
    kept = {id(setup.pair.receiver)} if setup.single is not None else set()
    for lm in (setup.pair.receiver, *setup.pair.sharers):
        if isinstance(lm, LM) and id(lm) not in kept:
            pack(lm)


def load_identical(fuser: str, receiver: LM) -> tuple[C2C, str]:
    """The pair of the receiver with itself, and its fuser's hash."""
    folder = checkpoint.resolve(fuser)
    config = checkpoint.read_config(folder)[0]
    mine = identity(receiver)
    for role, given in (("receiver", config.receiver), ("sharer", config.sharer)):
        assert given is not None
        shape = (given.num_kv_heads, given.head_dim)
        same_weights = given.fingerprint in (None, mine.fingerprint)
        if shape != (mine.num_kv_heads, mine.head_dim) or not same_weights:
            raise C2CError(
                f"the fuser {fuser} has {given.name} as its {role}, the receiver is {mine.name}; the method self needs "
                "a fuser trained with the receiver as its own sharer (a recipe with method: identical)"
            )
    pair = C2C.from_pretrained(folder, receiver=receiver, sharers=receiver, chat_template_kwargs=FROZEN)
    return pair, checkpoint.fuser_hash(folder)


def load_pair(
    fusers: Sequence[str | None],
    subfolders: Sequence[str | None],
    receiver: tuple[str | None, str],
    sharers: tuple[Sequence[str | None], str],
    mode: Any = "parallel",
) -> tuple[C2C, dict[str, Any]]:
    """A trained pair, its models given as source (None: the fuser's own) and dtype, and what identifies it."""
    count = max(len(fusers), len(subfolders), len(sharers[0]))
    lists = [list(x) * count if len(x) == 1 else list(x) for x in (fusers, subfolders, sharers[0])]
    if any(len(x) != count for x in lists):
        raise C2CError(
            f"{len(fusers)} fusers, {len(subfolders)} subfolders and {len(sharers[0])} sharers; give one each for "
            "every sharer"
        )
    folders = checkpoint.resolve_all(lists[0], lists[1])
    configs = [checkpoint.read_config(folder)[0] for folder in folders]

    def spec(source: str | None, dtype: str, trained_for: ModelIdentity | None) -> ModelSpec:
        if is_address(source):
            raise C2CError(f"what is evaluated is loaded here, and {source} is a served sharer; give the model itself")
        if source is not None:
            return ModelSpec(source=source, dtype=dtype)
        assert trained_for is not None  # a saved fuser names its models
        return trained_for.spec.model_copy(update={"dtype": dtype})

    pair = C2C.from_pretrained(
        folders,
        receiver=spec(*receiver, configs[0].receiver),
        sharers=[spec(s, sharers[1], c.sharer) for s, c in zip(lists[2], configs, strict=True)],
        mode=mode,
        chat_template_kwargs=FROZEN,
    )
    names = ["/".join([f or checkpoint.DEFAULT, *([s] if s else [])]) for f, s in zip(lists[0], lists[1], strict=True)]
    models = [{**identity(lm).model_dump(), "dtype": str(lm.dtype)} for lm in (pair.receiver, *pair.sharers)]
    settings: dict[str, Any] = {
        "receiver": models[0],
        "sharer": models[1],
        "fuser": " + ".join(names),
        "fuser_hash": " + ".join(map(checkpoint.fuser_hash, folders)),
    }
    if count > 1:
        settings |= {"sharers": models[1:], "mode": mode}
    return pair, settings


def open_store(folder: Path | None, precision: str | None, sharer: LM) -> Store | None:
    """The store in a folder, a new one being of bfloat16 unless `precision` says otherwise; None without a folder."""
    if folder is None:
        if precision is not None:
            raise C2CError(f"a precision, {precision}, was given without a store; name its folder too")
        return None
    new = precision is None and not (folder / "store.json").exists()
    return Store(folder, sharer, "bfloat16" if new else precision)


def claim(output: Path, settings: dict[str, Any], free: Sequence[str] = ()) -> None:
    """Refuse to mix the answers of two settings in one folder; those named `free` may change from run to run."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / SETTINGS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    # A folder where nothing was skipped so far takes any threshold, and likewise any adapter or further task; earlier
    # versions knew of no store, drew no questions but took the first, and had no other length of an answer.
    later = {k: v for k, v in settings.items() if k in _LATER or k.startswith(TASK)}
    seed = settings.get("seed") if before.get("limit") is None else None
    known = {**later, "store": None, "seed": seed, "max_new_tokens": 64, **before}
    if changed := sorted(k for k in settings if k not in free and known.get(k) != settings[k]):
        raise C2CError(
            f"{output} holds an evaluation with another {', '.join(changed)}; choose another --output, or remove it"
        )
    if not path.exists() or {**before, **settings} != before:
        replace_text(path, json.dumps({**before, **settings}, indent=2) + "\n")


_LATER = ("skip", "single", "identical", "shots")
