"""Filling a recipe's prefill store, with size and time said beforehand."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..config import TrainConfig
from ..errors import C2CError
from ..kv import pad_left, prefill
from ..models.load import LM, load_lm
from ..packing import dequantize, quantize
from ..pair import C2C
from .loop import prepare
from .store import Store


def precompute(
    config: TrainConfig, *, precision: str, dtype: str, max_bytes: int, batch_tokens: int, dry_run: bool = False
) -> Store | None:
    """Compute every sharer prefill that the recipe's training will read. None after a dry run."""
    if precision not in ("bfloat16", "int8"):
        raise C2CError(f"unknown precision {precision!r}; expected bfloat16 or int8")
    if config.method == "single":
        raise C2CError("method single has no sharer, so there is nothing to precompute; train at once")
    assert config.store is not None
    console = Console(stderr=True)
    sharer = load_lm(config.sharer, None, **({} if dtype == "auto" else {"dtype": dtype}))
    store = Store(config.store, sharer, precision)  # type: ignore[arg-type]
    same = config.receiver == config.sharer  # which reads nothing here, so that the dtype doesn't matter
    pair = C2C.from_models(sharer if same else load_lm(config.receiver), sharer, config.fuser)
    data = prepare(pair, config)
    # An example that weights repeat counts once.
    prompts = [list(prompt) for prompt in {i.id: i.prompt.sharers[0] for i in data.train + data.holdout}.values()]
    todo = store.missing(prompts)
    tokens = sum(map(len, todo))
    console.print(
        f"{len(prompts)} prompts, {len(todo)} of them to be computed: {tokens:,} sharer tokens, "
        f"{store.estimate(prompts) / 1e9:.2f} GB as {precision} of {store.free() / 1e9:.0f} GB free; "
        f"{data.truncation}"
    )
    if todo:
        if not dry_run:
            store.check_room(prompts, max_bytes)  # before any work
        speed, error = _probe(sharer, todo, batch_tokens)
        console.print(
            f"about {tokens / speed / 60:.0f} min at {speed:.0f} tokens/s; relative error of int8 against "
            f"{sharer.dtype}: {error:.4f}"
        )
    if dry_run:
        return None
    columns = (TextColumn("prefilling"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=tokens)
        store.fill(
            sharer, prompts, batch_tokens=batch_tokens, max_bytes=max_bytes, progress=lambda n: bar.advance(task, n)
        )
    console.print(f"store {config.store}: {len(store.index)} prompts")
    return store


def _probe(sharer: LM, todo: list[list[int]], batch_tokens: int) -> tuple[float, float]:
    """Tokens per second on a few median prompts (of those, longest first), and the relative error of int8 on them."""
    middle = todo[len(todo) // 2 :]
    middle = middle[: max(1, batch_tokens // len(middle[0]))]
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
