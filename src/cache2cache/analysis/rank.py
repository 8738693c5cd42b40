"""Effective rank of the sharer's, the receiver's and the fused cache, layer by layer.

The vectors are those of the positions that are fused, and of the sharer's tokens that go with them: as many of each,
all heads of a layer side by side. They are streamed: what is kept is a Gram matrix per model, layer and kind, whatever
the number of tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..fuser import C2CFuser
from ..fuser.c2c import KINDS
from ..kv import KV
from ..pair import C2C
from . import plots, runs
from .effective_rank import effective_rank, gram
from .runs import Data, Setup

WHO = ("sharer", "receiver", "fused")
PIECE = 1024  # positions whose vectors are in float64 at once


def run(setup: Setup, data: Data, against: Sequence[Path] = ()) -> dict[str, Any]:
    """Measure, and write `result.json` and `rank.png|svg`; goes on where it was stopped.

    Args:
        setup, data: what is run on what.
        against: output folders of other runs, drawn beside this one.
    """
    plots.check()
    others = runs.earlier(against, "rank")
    examples = runs.examples_of(data, setup.seed)
    pair, store, settings = runs.open_pair(setup)
    items = runs.items_of(pair, examples)
    about = runs.begin(setup, {**settings, "data": data.record()}, "rank", examples)
    runs.check_store(store, [i.prompt for i in items], setup.max_bytes)
    state = empty(pair)
    for _, batch in runs.batches(items, setup, state, "tokens of prompts"):
        made = runs.fuse(pair, [i.prompt for i in batch], store)
        add(state, made.where, sharer=made.sharer, receiver=made.clean.kv, fused=made.fused.kv)
    result = {"about": about, **summarize(pair, state)}
    runs.finish(setup.output, result)
    draw([*others, (setup.output.name, result)], setup.output)
    return result


def empty(pair: C2C) -> dict[str, Tensor]:
    """Sums to begin with: per model and kind Gram matrices (L, W, W) and totals (L, 1, W), and the tokens seen."""
    state = {"tokens": torch.zeros((), dtype=torch.long)}
    for who in WHO:
        lm = pair.sharers[0] if who == "sharer" else pair.receiver
        width = lm.num_kv_heads * lm.head_dim
        for kind in KINDS:
            state[f"{who}.{kind}.gram"] = torch.zeros(lm.num_layers, width, width, dtype=torch.float64)
            state[f"{who}.{kind}.sum"] = torch.zeros(lm.num_layers, 1, width, dtype=torch.float64)
    return state


def add(state: dict[str, Tensor], where: Tensor, **caches: KV) -> None:
    """Add the vectors at the fused positions of a batch, see `where_to_fuse`, to the sums."""
    state["tokens"] += where.shape[1]
    for piece in where.split(PIECE, dim=1):
        for who, kv in caches.items():
            row, position = piece[2:4] if who == "sharer" else piece[:2]
            for kind in KINDS:
                vectors = getattr(kv, kind)[:, row, :, position]  # (N, L, H, D): what is indexed comes first
                rows = vectors.flatten(2).transpose(0, 1).double()
                state[f"{who}.{kind}.gram"] += gram(rows).cpu()
                state[f"{who}.{kind}.sum"] += rows.sum(1, keepdim=True).cpu()


def summarize(pair: C2C, state: dict[str, Tensor]) -> dict[str, Any]:
    """Per model and kind the effective rank of each layer, of the vectors as they are and of their deviations from
    their mean; and means over layers, for receiver and fused cache also over those alone that are fused."""
    fuser = pair.fusers[0]
    tokens = int(state["tokens"])
    result: dict[str, Any] = {"tokens": tokens, "open": open_layers(fuser)}
    for who in WHO:
        lm = pair.sharers[0] if who == "sharer" else pair.receiver
        width = lm.num_kv_heads * lm.head_dim
        if tokens < 4 * width:
            warnings.warn(
                f"{tokens} tokens are few for vectors of {width} numbers: no rank can be above the tokens' number, and "
                "ranks still grow with it; raise --limit",
                stacklevel=2,
            )
        result[who] = {"name": lm.name, "layers": lm.num_layers, "width": width}
        for kind in KINDS:
            whole, total = state[f"{who}.{kind}.gram"], state[f"{who}.{kind}.sum"]
            ranks = {"rank": effective_rank(whole)}
            ranks["centred"] = effective_rank(whole - total.mT @ total / max(1, tokens))
            fused = result["open"][kind]
            found = {name: {"layers": r.tolist(), "mean": r.mean().item()} for name, r in ranks.items()}
            if who != "sharer" and fused:
                for name, r in ranks.items():
                    found[name]["mean_open"] = r[fused].mean().item()
            result[who][kind] = found
    return runs.rounded(result)


def open_layers(fuser: C2CFuser) -> dict[str, list[int]]:
    """Per kind the receiver's layers whose gate is open."""
    is_open = fuser.open_gates.view(2, -1).cpu()
    return {kind: fuser.receiver_layers.cpu()[one].tolist() for kind, one in zip(KINDS, is_open, strict=True)}


def draw(results: Sequence[tuple[str, dict[str, Any]]], output: Path) -> None:
    """Effective rank against depth: keys and values, as they are and centred; one dash style a run."""
    made, axes = plots.figure(2, 2, (8, 5.6), sharex=True)
    for row, (name, says) in enumerate((("rank", "as they are"), ("centred", "less their mean"))):
        for column, kind in enumerate(KINDS):
            axis = axes[row, column]
            for index, (_, result) in enumerate(results):
                for who in WHO:
                    values = result[who][kind][name]["layers"]
                    depth = [i / max(1, len(values) - 1) for i in range(len(values))]
                    label = plots.titled(results, index, f"{who}, mean {result[who][kind][name]['mean']:.0f}")
                    style = plots.DASHES[index % len(plots.DASHES)]
                    axis.plot(depth, values, style, color=plots.COLOURS[who], label=label, linewidth=1.4)
            axis.set_title(f"{kind}, {says}", fontsize=9)
            axis.set_ylim(bottom=0)
            axis.legend(fontsize=7)
            axis.set_ylabel("effective rank" if column == 0 else "")
            axis.set_xlabel("depth of the layer, lowest to top" if row else "")
    tokens = ", ".join(f"{result['tokens']:,}" for _, result in results)
    made.suptitle(f"Effective rank per layer ({tokens} tokens)", fontsize=10)
    plots.name_runs(made, [(label, result["about"]) for label, result in results])
    plots.save(made, output, "rank")
