"""What a training step costs: from the stores, live, and in a plain implementation, against its matrix floor.

    python benchmarks/train_step.py                  # the default pair, 16 prompts of about 120 tokens
    python benchmarks/train_step.py --live-rounds 0  # without the live steps, which the sharer makes long

Everything is a ratio of quantities that took turns in the same run, medians over the rounds:

- A step is all that `c2c train` does for a batch: reading the stores, loss, gradients, clipping, AdamW.
- The floor is the multiply-adds of the receiver's prefill, the fuser forward and backward, and the response forward and
  backward, at the rate of one large product or of batched products of the fuser's shapes, whichever is higher. Weights
  that are frozen count once backward, for the gradient that goes through; padding doesn't count.
- The bare prefills of both models are plain transformers through the backbones, at their own pace.
- The plain implementation prefills both models with `model(...)`, logits of all positions included, each step again and
  every prompt from its start. Fuser, loss and optimizer are ours.
- On a machine that others use too, `--processor-time` with OMP_NUM_THREADS=1 counts what this process got.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import torch
from first_token import RECEIVER, SHARER, fuser_weights, plain_prefill, void
from measure import medians, pass_operations, peak_rise, prefill_operations, product, take_turns
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import DynamicCache

from cache2cache import C2C, C2CError, heap
from cache2cache.config import TrainConfig
from cache2cache.fuser import C2CFuser
from cache2cache.kv import CACHE, KV, pad_left, positions_of, prefilled
from cache2cache.models.load import LM, load_lm
from cache2cache.pair import sharer_lengths, where_to_fuse
from cache2cache.training.items import Item, Prepared
from cache2cache.training.loop import Trainer
from cache2cache.training.loss import expected, loss_of, token_losses
from cache2cache.training.objective import Objective, targets
from cache2cache.training.recipe import read_recipe
from cache2cache.training.store import Store

RECIPE = Path(__file__).parents[1] / "recipes" / "default.yaml"
MEMORY = 4e9  # beside the weights


class Plain(Objective):
    """The loss as a plain implementation computes it."""

    def __init__(self, pair: C2C) -> None:
        super().__init__()
        self.trained = pair.fusers[0]
        self.frozen = {"receiver": pair.receiver.model, "sharer": pair.sharers[0].model}
        self.pair = pair

    def forward(self, items: Sequence[Item], per: str) -> tuple[Tensor, Tensor]:
        receiver, prompts = self.pair.receiver, [item.prompt for item in items]
        clean = with_logits(receiver, [p.receiver[:-1] for p in prompts])
        theirs = with_logits(self.pair.sharers[0], [p.sharers[0] for p in prompts])
        where, _ = where_to_fuse(prompts, 0, clean.length, theirs.length, [len(p.sharers[0]) for p in prompts])
        start = prefilled(receiver, [p.receiver for p in prompts], clean)
        fused = self.trained(clean, theirs, where.to(receiver.device))
        target = targets(items).to(receiver.device)
        logits = expected(receiver, replace(start, kv=fused), target)
        return loss_of(*token_losses(logits, target), target, per)


@torch.no_grad()
def with_logits(lm: LM, rows: Sequence[Sequence[int]]) -> KV:
    """A prefill that computes the logits of all positions too."""
    ids, mask = pad_left(rows, lm.pad_token_id, lm.device)
    cache = DynamicCache()
    lm.model(input_ids=ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=True, **{CACHE: cache})
    return KV.from_cache(cache)


def batch_of(pair: C2C, count: int, tokens: int, response: int) -> list[Item]:
    """Prompts and responses of up to that many receiver tokens, not all of one length.

    As in most sets no prompt has a system message of its own, so all begin with the template's.
    """
    tokenizer = pair.receiver.need_tokenizer()
    kinds = [len(measure.KINDS) * i for i in range(count)]  # the first kind, the plain one
    chats = [measure.chat(tokenizer, kind, tokens - i % 8, pair.chat_template_kwargs) for i, kind in enumerate(kinds)]
    words = [tokenizer(chat[-1]["content"], add_special_tokens=False)["input_ids"] for chat in chats]
    return [Item(str(i), pair.encode(chat), words[i - 1][: max(1, response - i % 8)]) for i, chat in enumerate(chats)]


def operations(pair: C2C, items: Sequence[Item]) -> dict[str, float]:
    """Additions and multiplications that a step can't do without."""
    receiver, fuser = pair.receiver, pair.fusers[0]
    assert isinstance(fuser, C2CFuser)
    prompts = [item.prompt for item in items]
    before = [len(p.receiver) - 1 for p in prompts]
    behind = [n + len(item.response) for n, item in zip(before, items, strict=True)]
    fused, tokens = sum(s >= 0 for p in prompts for s in p.maps[0][:-1]), sum(len(item.response) for item in items)
    # What the fuser reads needs no gradient, and layers below the lowest fused one have none.
    inputs = sum(p[0].numel() for name, p in fuser.named_parameters() if name in ENTRIES) * fuser.groups
    depths = receiver.num_layers, receiver.num_layers - int(fuser.receiver_layers.min())
    layers = [pass_operations(receiver, behind, d) - pass_operations(receiver, before, d) for d in depths]
    head = receiver.model.get_output_embeddings().weight.numel()  # type: ignore[union-attr]
    return {
        "receiver prefill": prefill_operations(receiver, before, receiver.num_layers),
        "fuser": 2.0 * fused * (3 * fuser_weights(fuser) - inputs),
        "response": sum(layers) + 2 * 2.0 * head * tokens,
    }


ENTRIES = ("in_sharer.weight", "in_receiver.weight")


def bench(pair: C2C, config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    receiver, sharer, fuser = pair.receiver, pair.sharers[0], pair.fusers[0]
    assert isinstance(fuser, C2CFuser)
    items = batch_of(pair, options.batch, options.tokens, options.response_tokens)
    prompts = [item.prompt for item in items]
    rows = [list(p.receiver[:-1]) for p in prompts]
    read = [list(p.sharers[0][:n]) for p, n in zip(prompts, sharer_lengths(prompts, 0), strict=True)]
    # A short pass first, so that memory that comes with a model's first use counts as the model's.
    for lm in (receiver, sharer):
        plain_prefill(lm, [rows[0][:2]], lm.num_layers)

    stores = []
    for name, lm, ids in (
        ("sharer", sharer, [p.sharers[0] for p in prompts]),
        ("receiver", receiver, [p.receiver for p in prompts]),
    ):
        stores.append(Store(config.output / name, lm, "bfloat16"))
        stores[-1].fill(lm, ids, batch_tokens=4096)
    data = Prepared(items, [], 0)
    trainers = {
        "store": Trainer(pair, config, stores[0], data),
        "both stores": Trainer(pair, config, stores[0], data, stores[1]),
        "live": Trainer(pair, config, None, data),
        "plain": Trainer(Plain(pair), config, None, data),
    }
    trainers["both stores"].objective.start(config, data)
    peaks: dict[str, int | None] = {}

    def steps(name: str, count: int = 1) -> Callable[[], None]:
        trainer = trainers[name]
        trainer.objective.train()

        def run() -> None:
            for part in trainer.objective.read_ahead(iter([items] * count)):
                trainer._train_step(items, [part])

        def first() -> None:
            if name in peaks:
                run()
            else:
                peaks[name] = peak_rise(run)

        return first

    like = next(receiver.model.parameters())
    fused = sum(s >= 0 for p in prompts for s in p.maps[0][:-1])
    large, large_operations = product(1, 1024, 1024, 4096, like)
    hidden, intermediate = fuser.config.hidden_dim, fuser.config.intermediate_dim
    batched, batched_operations = product(fuser.groups, min(fused, 1024), hidden, intermediate, like)
    common: dict[str, Callable[[], None]] = {
        "large product": large,
        "batched product": batched,
        "receiver prefill": lambda: void(plain_prefill(receiver, rows, receiver.num_layers)),
        "store": steps("store", STEPS),
    }
    long = {name: steps(name) for name in ("live", "plain")}
    long["sharer prefill"] = lambda: void(plain_prefill(sharer, read, sharer.num_layers))
    times = take_turns({**common, "both stores": steps("both stores", STEPS)}, options.rounds, options.seconds)
    times_live = take_turns({**common, **long}, options.live_rounds, options.seconds) if options.live_rounds else {}

    count = operations(pair, items)
    result: dict[str, Any] = {"operations": count, "fused": fused, "peaks": peaks, "all_seconds": [times, times_live]}

    def settled(times: dict[str, list[float]]) -> tuple[dict[str, float], float]:
        t = medians(times)
        t |= {name: t[name] / STEPS for name in ("store", "both stores") if name in t}
        return t, max(large_operations / t["large product"], batched_operations / t["batched product"])

    t, rate = settled(times)
    floor = sum(count.values()) / rate
    result |= {"gflops": rate / 1e9, "floor": floor, "rounds": len(times["store"])}
    ratios = {
        "store": t["store"] / floor,
        "both stores": t["both stores"] * rate / (sum(count.values()) - count["receiver prefill"]),
        "receiver prefill": t["receiver prefill"] * rate / count["receiver prefill"],
    }
    if times_live:
        t, rate = settled(times_live)
        bare = t["receiver prefill"] + t["sharer prefill"] + (count["fuser"] + count["response"]) / rate
        ratios |= {
            "live": t["live"] / bare,
            "plain": t["plain"] / bare,
            "plain over store": t["plain"] / t["store"],
            "plain over live": t["plain"] / t["live"],
        }
        result["live rounds"] = len(times_live["live"])
    return result | {"ratios": ratios}


STEPS = 3  # in a row, so that the stores are read ahead


def show(result: dict[str, Any], console: Console) -> None:
    """The ratios, their targets, and whether they are met."""
    count, ratios = result["operations"], result["ratios"]
    shares = ", ".join(f"{name} {value / sum(count.values()):.0%}" for name, value in count.items())
    console.print(
        f"floor of a step: {sum(count.values()) / 1e9:.3g} G additions and multiplications ({shares}) at "
        f"{result['gflops']:.0f} a second\n"
    )
    table = Table()
    for name in ("a step", "over", "rounds", "ratio", "target", "met"):
        table.add_column(name, justify="left" if name in ("a step", "over") else "right")
    bare = "bare prefills + floor of the rest"
    for key, name, over, target in (
        ("store", "from the sharer's store", "floor", 1.5),
        ("both stores", "from both stores", "floor without prefill", 1.5),
        ("receiver prefill", "the receiver's bare prefill", "its floor", None),
        ("live", "live", bare, 1.1),
        ("plain", "plain", bare, None),
        ("plain over live", "plain", "a live step", None),
        ("plain over store", "plain", "a step from the store", None),
    ):
        if key in ratios:
            rounds = result["live rounds" if "live" in key or "plain" in key else "rounds"]
            table.add_row(name, over, str(rounds), f"{ratios[key]:.2f}", *judged(ratios[key], target))
    for name, peak in result["peaks"].items():
        ratio = None if peak is None else peak / MEMORY
        cell = "not measured" if ratio is None else f"{ratio:.2f}"
        table.add_row(f"peak memory beside the weights: {name}", "4 GB", "1", cell, *judged(ratio, 1.0))
    console.print(table)


def judged(ratio: float | None, target: float | None) -> tuple[str, str]:
    if ratio is None or target is None:
        return "–", "–"
    return f"at most {target}", "yes" if ratio <= target else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--receiver", default=RECEIVER, help="catalogue name, hub id, folder or GGUF file (default: %(default)s)")
    add("--sharer", default=SHARER, help="likewise (default: %(default)s)")
    add("--device", help="of both models (default: a GPU where there is one)")
    add("--batch", type=int, default=16, help="prompts at once")
    add("--tokens", type=int, default=120, help="of the longest prompt")
    add("--response-tokens", type=int, default=24, help="of the longest response")
    add("--rounds", type=int, default=5, help="of steps from the stores")
    add("--live-rounds", type=int, default=2, help="of live and plain steps; 0 leaves them out")
    add("--seconds", type=float, default=400, help="begin no further round of either after that long")
    add("--processor-time", action="store_true", help="count this process's processor seconds, not those on the wall")
    add("--json", type=Path, metavar="FILE", help="write everything measured to this file")
    options = parser.parse_args()
    heap.keep()  # as c2c train does
    if options.processor_time:
        measure.clock = time.process_time
    console = Console(width=110)
    console.print(", ".join(f"{key} {value}" for key, value in measure.machine().items()))
    try:
        with tempfile.TemporaryDirectory() as folder:
            changes = {"output": Path(folder), "holdout": 0, "epochs": 1000}
            config = read_recipe(RECIPE, []).model_copy(update=changes)
            where = {} if options.device is None else {"device": options.device}
            pair = C2C.from_models(load_lm(options.receiver, **where), load_lm(options.sharer, **where), config.fuser)
            console.print(f"receiver {pair.receiver.name}, sharer {pair.sharers[0].name}, {pair.receiver.dtype}")
            result = bench(pair, config, options)
    except C2CError as error:
        sys.exit(f"error: {error}")
    show(result, console)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
