"""Filling a recipe's prefill store, with size and time said beforehand."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate

from rich.console import Console

from ..config import ModelSpec, TrainConfig
from ..errors import C2CError
from ..files import check_writable
from ..kv import pad_left, prefill
from ..models.load import LM, load_lm
from ..models.packed import pack
from ..packing import dequantize, quantize
from ..progress import Bar, encoding
from .data import examples
from .items import prepare
from .ready import load_model
from .start import pair_to_train
from .store import Store, check_room


def precompute(
    config: TrainConfig, *, precision: str, dtype: str, max_bytes: int, batch_tokens: int, dry_run: bool = False
) -> None:
    """Compute every prefill that the recipe's training will read."""
    if config.method == "single":
        raise C2CError("method single has no sharer, so there is nothing to precompute; train at once")
    console = Console(stderr=True)
    if not dry_run:
        for folder in (*config.stores, *filter(None, [config.receiver_store])):
            check_writable(folder)
    found = examples(config)  # first: what is wrong with them shows before models are loaded

    def loaded(spec: ModelSpec) -> LM:
        """As training loads what it computes with, unless `dtype` says otherwise."""
        return load_model(spec, config.precision) if dtype == "auto" else load_lm(spec, None, dtype=dtype)

    sharers = [loaded(spec) for spec in config.sharers]
    stores = [Store(folder, sharer, precision) for folder, sharer in zip(config.stores, sharers, strict=True)]
    # A receiver that is a sharer too reads nothing here, so that its dtype doesn't matter.
    same = [lm for spec, lm in zip(config.sharers, sharers, strict=True) if spec == config.receiver]
    pair = pair_to_train(same[0] if same else loaded(config.receiver), sharers, config)
    with encoding(console) as progress:
        data = prepare(pair, config, found, progress)
    del found  # the texts of all rows
    # An example that weights repeat counts once.
    prompts = list({i.id: i.prompt for i in data.train + data.holdout}.values())
    console.print(f"{len(prompts)} prompts, {data.truncation}")
    work = [
        (store, sharer, [p.sharers[j] for p in prompts])
        for j, (store, sharer) in enumerate(zip(stores, sharers, strict=True))
    ]
    if config.receiver_store is not None:
        own = Store(config.receiver_store, pair.receiver, precision)
        work.append((own, pair.receiver, [p.receiver for p in prompts]))
    for place, lm, rows in work:
        todo = place.missing(rows)
        console.print(
            f"{lm.name}: {len(todo)} prompts to be computed, {sum(map(len, todo)):,} tokens, "
            f"{place.estimate(rows) / 1e9:.2f} GB as {place.config['precision']} of {place.free() / 1e9:.0f} GB free"
        )
    if not dry_run:
        check_room([(place, rows) for place, _, rows in work], max_bytes)  # of all of them before any work
    for place, lm, rows in work:
        _fill(console, place, lm, rows, max_bytes=max_bytes, batch_tokens=batch_tokens, dry_run=dry_run)


def _fill(
    console: Console,
    store: Store,
    lm: LM,
    prompts: list[Sequence[int]],
    *,
    max_bytes: int,
    batch_tokens: int,
    dry_run: bool,
) -> None:
    """Say how long what is missing of a model's store will take, and unless it is a dry run compute it."""
    todo = store.missing(prompts)
    tokens = sum(map(len, todo))
    if todo:
        pack(lm)
        speed, error = _probe(lm, todo, batch_tokens)
        console.print(
            f"{lm.name}: about {tokens / speed / 60:.0f} min at {speed:.0f} tokens/s; relative error of int8 against "
            f"{lm.dtype}: {error:.4f}"
        )
    if dry_run:
        return
    with Bar(console, "tokens") as bar:
        task = bar.add_task("prefilling", total=tokens)
        store.fill(lm, prompts, batch_tokens=batch_tokens, max_bytes=max_bytes, progress=lambda n: bar.advance(task, n))
    console.print(f"store {store.folder}: {len(store.index)} prompts")


def _probe(sharer: LM, todo: list[Sequence[int]], batch_tokens: int) -> tuple[float, float]:
    """Tokens per second on a few typical prompts, and the relative error of int8 on them."""
    middle = _typical(todo, batch_tokens)
    ids, mask = pad_left(middle, sharer.pad_token_id, sharer.device)
    prefill(sharer, ids[:1, -8:], mask[:1, -8:])  # the first call takes longer than those that follow
    began = time.perf_counter()
    kv = prefill(sharer, ids, mask)
    speed = sum(map(len, middle)) / (time.perf_counter() - began)
    errors = []
    for tensor in (kv.keys, kv.values):
        x = tensor[:, 0, :, -len(middle[0]) :].permute(2, 0, 1, 3).float()
        centred = x - x.mean(0)
        errors.append(((dequantize(*quantize(x)) - x).norm() / centred.norm()).item())
    return speed, max(errors)


def _typical(todo: list[Sequence[int]], batch_tokens: int) -> list[Sequence[int]]:
    """A batch of the length at which half of the tokens are in longer prompts; `todo` comes longest first. The median
    prompt would be a short one where few long prompts have most of the tokens, and those take longer a token."""
    passed = list(accumulate(map(len, todo)))
    middle = todo[bisect_left(passed, passed[-1] / 2) :]
    return middle[: max(1, batch_tokens // len(middle[0]))]
