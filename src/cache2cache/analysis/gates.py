"""Gates and dynamic weights: what a fuser lets through, over data, and what each layer's fusion is worth.

A layer's fusion reads the clean caches alone, so a layer is closed by putting its clean keys and values back: exactly
what a closed gate gives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..decode import score
from ..errors import C2CError
from ..evaluation.statistics import bootstrap
from ..fuser import C2CFuser, checkpoint
from ..fuser.c2c import CHUNK, KINDS
from ..kv import KV
from ..pair import C2C, FusedCache
from ..training.items import Item
from . import plots, runs
from .runs import Data, Setup

BINS = 200  # of the histograms of weights, from 0 to 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LARGE = 0.4  # the paper counts weights above it
CLOSED = ("both", *KINDS)  # what of a layer is closed


def run(setup: Setup, data: Data, against: Sequence[Path] = (), *, closing: bool = True) -> dict[str, Any]:
    """Measure, and write `result.json`, `gates.png|svg` and, over data, `heads.png|svg`; goes on where it was stopped.

    Args:
        setup, data: what is run on what. With a limit of 0 no model is loaded, and the gates are all that is looked at.
        against: output folders of other runs, drawn beside this one.
        closing: also close the layers one by one, where the prompts have a response.
    """
    plots.check()
    others = runs.earlier(against, "gates")
    if data.limit == 0:
        folder = checkpoint.resolve(setup.fuser, subfolder=setup.subfolder)
        alone = {"fuser": setup.fuser or checkpoint.DEFAULT, "fuser_hash": checkpoint.fuser_hash(folder)}
        about = runs.begin(setup, alone, "gates", [])
        result = {"about": about, **gates(checkpoint.load(folder))}
        runs.finish(setup.output, result)
        draw([*others, (setup.output.name, result)], setup.output)
        return result
    examples = runs.examples_of(data, setup.seed)
    closing = closing and bool(examples[0].response)
    pair, store, settings = runs.open_pair(setup)
    fuser = pair.fusers[0]
    items = runs.items_of(pair, examples)
    settings |= {"data": data.record(), "closing": closing}
    about = runs.begin(setup, settings, "gates", examples)
    runs.check_store(store, [i.prompt for i in items], setup.max_bytes)
    state = empty(fuser, len(items), closing)
    for start, batch in runs.batches(items, setup, state, "prompts"):
        made = runs.fuse(pair, [i.prompt for i in batch], store)
        clean, fused = made.clean, made.fused
        add_weights(state, fuser, clean.kv, made.sharer, made.where)
        add_sizes(state, fuser, clean.kv, fused.kv, made.where)
        if closing:
            rows = slice(start, start + len(batch))
            state["tokens"][rows] = torch.tensor([len(i.response) for i in batch])
            state["receiver"][rows] = losses(pair, batch, replace(fused, kv=clean.kv))
            state["loss"][rows] = losses(pair, batch, fused)
            for g, (what, layer) in enumerate(closable(fuser)):
                state["closed"][rows, g] = losses_without(pair, batch, fused, clean.kv, layer, what)
    result = {"about": about, **gates(fuser), **weights_of(fuser, state)}
    if closing:
        result["closing"] = worth(fuser, state)
    runs.finish(setup.output, result)
    results = [*others, (setup.output.name, result)]
    draw(results, setup.output)
    if fuser.config.weighting:
        draw_heads(result, setup.output)
    return result


# ---- gates -----------------------------------------------------------------------------------------------------------


def gates(fuser: C2CFuser) -> dict[str, Any]:
    """The layer map, and per kind the logits (None without gates) and what is open."""
    is_open = fuser.open_gates.view(2, -1)
    gating = fuser.config.gating
    logits = fuser.gate_logit.detach().float().view(2, -1) if gating else [None, None]
    found: dict[str, Any] = {
        "receiver_layers": fuser.receiver_layers.tolist(),
        "sharer_layers": fuser.sharer_layers.tolist(),
        "depth": {who: model.num_layers for who, model in zip(("receiver", "sharer"), fuser.models, strict=True)},
    }
    for kind, one, logit in zip(KINDS, is_open, logits, strict=True):
        found[kind] = {"open": one.tolist(), "logit": logit}
    found["open_share"] = is_open.float().mean().item()
    return runs.rounded(found)


# ---- weights ---------------------------------------------------------------------------------------------------------


def empty(fuser: C2CFuser, items: int, closing: bool) -> dict[str, Tensor]:
    """Sums to begin with: over positions, per module and head; and the losses of each item."""
    modules, heads = 2 * len(fuser.receiver_layers), fuser.models[0].num_kv_heads
    state = {
        "positions": torch.zeros((), dtype=torch.long),
        "change": torch.zeros(modules, dtype=torch.float64),  # squares of what is added,
        "before": torch.zeros(modules, dtype=torch.float64),  # and of what it is added to
    }
    if fuser.config.weighting:
        state["histogram"] = torch.zeros(modules, heads, BINS, dtype=torch.long)
        state["sum"] = torch.zeros(modules, heads, dtype=torch.float64)
        state["squares"] = torch.zeros(modules, heads, dtype=torch.float64)
    if closing:
        state |= {name: torch.full((items,), math.nan) for name in ("receiver", "loss", "tokens")}
        state["closed"] = torch.full((items, len(closable(fuser))), math.nan)
    return state


@torch.no_grad()
def weights_at(fuser: C2CFuser, receiver: KV, sharer: KV, where: Tensor) -> Iterator[Tensor]:
    """The dynamic weights at the fused positions, (2n, N, heads), some positions at a time."""
    where = where.to(receiver.keys.device)
    sharer = sharer.to(receiver.keys.device)
    for piece in where.split(CHUNK, dim=1):
        theirs, ours = fuser.inputs(receiver, sharer, piece)
        yield fuser.weights(theirs, ours).float()


def add_weights(state: dict[str, Tensor], fuser: C2CFuser, receiver: KV, sharer: KV, where: Tensor) -> None:
    """Add the weights of a batch to the sums."""
    state["positions"] += where.shape[1]
    if not fuser.config.weighting:
        return
    histogram = state["histogram"]
    modules, heads, _ = histogram.shape
    first = torch.arange(modules * heads).view(modules, 1, heads) * BINS
    for weight in weights_at(fuser, receiver, sharer, where):
        weight = weight.cpu()
        bins = (weight * BINS).long().clamp(0, BINS - 1)
        histogram += (first + bins).flatten().bincount(minlength=histogram.numel()).view_as(histogram)
        state["sum"] += weight.double().sum(1)
        state["squares"] += weight.double().square().sum(1)


def add_sizes(state: dict[str, Tensor], fuser: C2CFuser, clean: KV, fused: KV, where: Tensor) -> None:
    """Add how much each module changes, and what it changes, to the sums."""
    row, position = where[:2].to(clean.keys.device)
    n = len(fuser.receiver_layers)
    for k, kind in enumerate(KINDS):
        for i, layer in enumerate(fuser.receiver_layers.tolist()):
            old = getattr(clean, kind)[layer][row, :, position].double()
            new = getattr(fused, kind)[layer][row, :, position].double()
            state["before"][k * n + i] += old.square().sum().cpu()
            state["change"][k * n + i] += (new - old).square().sum().cpu()


def weights_of(fuser: C2CFuser, state: dict[str, Tensor]) -> dict[str, Any]:
    """The weights' distributions: per kind and layer, over all heads and of each head.

    `size` is the norm of what a layer's fusion adds in units of that of the receiver's own numbers, 0 where closed.
    """
    positions = int(state["positions"])
    found: dict[str, Any] = {"positions": positions}
    size = (state["change"] / state["before"].clamp(min=1e-30)).sqrt().view(2, -1)
    for k, kind in enumerate(KINDS):
        found[f"{kind}_size"] = size[k].tolist()
    if not fuser.config.weighting or not positions:
        return runs.rounded(found)
    histogram = state["histogram"]
    heads = histogram.shape[1]
    mean = state["sum"] / positions
    deviation = (state["squares"] / positions - mean.square()).clamp(min=0).sqrt()
    n = len(fuser.receiver_layers)
    found["weights"] = {}
    for k, kind in enumerate(KINDS):
        own = slice(k * n, k * n + n)
        counts = histogram[own]
        found["weights"][kind] = {
            "mean": mean[own].mean(1),
            "quantiles": [quantiles(c.sum(0)) for c in counts],
            "large": share_above(counts.sum(1)),
            "heads": {
                "mean": mean[own],
                "deviation": deviation[own],
                "quantiles": [[quantiles(h) for h in c] for c in counts],
            },
            "histogram": counts.sum(1).view(n, BINS // 10, 10).sum(-1) / (positions * heads),
        }
    open_counts = histogram.sum(1)[fuser.open_gates.cpu()]
    found["weights"]["large_of_open"] = share_above(open_counts.sum(0, keepdim=True))[0] if len(open_counts) else None
    found["weights"]["probabilities"] = list(QUANTILES)
    return runs.rounded(found)


def quantiles(counts: Tensor) -> list[float]:
    """The QUANTILES of weights, from their histogram (BINS,), interpolated within a bin."""
    edges = np.linspace(0, 1, BINS + 1)
    below = np.concatenate([[0], counts.numpy().cumsum() / max(1, int(counts.sum()))])
    return [float(np.interp(q, below, edges)) for q in QUANTILES]


def share_above(counts: Tensor) -> list[float]:
    """The share of weights above LARGE, from histograms (…, BINS)."""
    return (counts[:, round(LARGE * BINS) :].sum(-1) / counts.sum(-1).clamp(min=1)).tolist()


# ---- closing a layer -------------------------------------------------------------------------------------------------


def closable(fuser: C2CFuser) -> list[tuple[str, int]]:
    """What is closed one after the other, see CLOSED, with the receiver's layer: everything that is open.

    Of a layer with one open kind, that kind alone: both would be the same.
    """
    is_open = fuser.open_gates.view(2, -1)
    found = []
    for what in CLOSED:
        one = is_open.all(0) if what == "both" else is_open[KINDS.index(what)]
        found += [(what, layer) for layer in fuser.receiver_layers[one].tolist()]
    return found


@contextmanager
def closed(fused: KV, clean: KV, layer: int, what: str = "both") -> Iterator[None]:
    """Meanwhile the fused cache holds one layer's clean keys, values, or both."""
    kept = {kind: getattr(fused, kind)[layer].clone() for kind in KINDS if what in ("both", kind)}
    try:
        for kind in kept:
            getattr(fused, kind)[layer] = getattr(clean, kind)[layer]
        yield
    finally:
        for kind, before in kept.items():
            getattr(fused, kind)[layer] = before


def losses_without(
    pair: C2C, items: Sequence[Item], fused: FusedCache, clean: KV, layer: int, what: str = "both"
) -> Tensor:
    """As `losses`, with the fusion of one layer closed."""
    with closed(fused.kv, clean, layer, what):
        return losses(pair, items, fused)


def losses(pair: C2C, items: Sequence[Item], fused: FusedCache) -> Tensor:
    """How unlikely each item's response is, in nats, summed over its tokens, (B,)."""
    if empty := [i.id for i in items if not i.response]:
        raise C2CError(f"{empty[0]} has no response whose loss could change; give questions or instruction rows")
    found = score(pair.receiver, fused, [[i.response] for i in items])
    return torch.tensor([-one.logprob for (one,) in found])


def worth(fuser: C2CFuser, state: dict[str, Tensor]) -> dict[str, Any]:
    """Next-token loss in nats per token, and by how much closing each layer raises it, with 95% intervals.

    Intervals are the bootstrap's over responses, paired: loss with and without a layer on the same ones. A layer that
    is closed already has 0.
    """
    tokens = state["tokens"].double().numpy()
    loss, receiver = (state[name].double().numpy() for name in ("loss", "receiver"))
    count = len(tokens)

    def change(difference: np.ndarray) -> dict[str, Any]:
        low, high = bootstrap(count, lambda times: times @ difference / (times @ tokens))
        return {"change": difference.sum() / tokens.sum(), "interval": [low, high]}

    n = len(fuser.receiver_layers)
    place = {layer: i for i, layer in enumerate(fuser.receiver_layers.tolist())}
    found: dict[str, Any] = {
        "responses": count,
        "tokens": int(tokens.sum()),
        "loss": loss.sum() / tokens.sum(),
        "all_closed": change(receiver - loss),
        **{what: [{"change": 0.0, "interval": [0.0, 0.0]} for _ in range(n)] for what in CLOSED},
    }
    measured = {}
    for g, (what, layer) in enumerate(closable(fuser)):
        measured[what, layer] = change(state["closed"][:, g].double().numpy() - loss)
        found[what][place[layer]] = measured[what, layer]
    for kind in KINDS:  # the only open kind of its layer is both
        for (what, layer), one in measured.items():
            if what == kind and ("both", layer) not in measured:
                found["both"][place[layer]] = one
    return runs.rounded(found)


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw(results: Sequence[tuple[str, dict[str, Any]]], output: Path) -> None:
    """Against the receiver's layers: gate logits; weights; what closing a layer does. One dash style a run."""
    panels = ["gates"]
    panels += ["weights"] * any("weights" in r for _, r in results) + ["size"] * any(
        "keys_size" in r for _, r in results
    )
    panels += ["closing"] * any("closing" in r for _, r in results)
    made, axes = plots.figure(len(panels), 1, (7.5, 1 + 2.1 * len(panels)), sharex=True)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for index, (_, result) in enumerate(results):
            _PANELS[panel](axis, result, plots.DASHES[index % len(plots.DASHES)], results, index)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, ncols=2)
    axes[-1, 0].set_xlabel("receiver layer")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    plots.name_runs(made, [(label, result["about"]) for label, result in results])
    plots.save(made, output, "gates")


def _draw_gates(axis: Any, result: dict[str, Any], style: str, results: Any, index: int) -> None:
    layers = result["receiver_layers"]
    for kind, marker, aside in zip(KINDS, "os", (-0.15, 0.15), strict=True):
        logits, is_open = result[kind]["logit"], result[kind]["open"]
        height = [1.0 if one else 0.0 for one in is_open] if logits is None else logits
        colour = plots.COLOURS[kind]
        faces = [colour if one else "none" for one in is_open]
        label = plots.titled(results, index, f"{kind}, {sum(is_open)} of {len(is_open)} open")
        places = [layer + aside for layer in layers]
        axis.plot(places, height, style, color=colour, linewidth=0.8, alpha=0.6)
        axis.scatter(places, height, s=18, marker=marker, facecolors=faces, edgecolors=colour, label=label)
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_ylabel("gate logit" if logits is not None else "open (without gates)")
    axis.set_title("gates (filled: open)", fontsize=9)


def _draw_weights(axis: Any, result: dict[str, Any], style: str, results: Any, index: int) -> None:
    layers = result["receiver_layers"]
    for kind in KINDS if "weights" in result else ():
        rows = list(zip(*result["weights"][kind]["quantiles"], strict=True))
        colour = plots.COLOURS[kind]
        label = plots.titled(results, index, f"{kind}, median; 5 to 95%")
        axis.plot(layers, rows[2], style, color=colour, label=label, linewidth=1.4)
        axis.fill_between(layers, rows[0], rows[4], color=colour, alpha=0.15, linewidth=0)
    axis.set_ylim(0, 1)
    axis.set_ylabel("weight")
    axis.set_title("dynamic weights, all heads and positions", fontsize=9)


def _draw_size(axis: Any, result: dict[str, Any], style: str, results: Any, index: int) -> None:
    for kind in KINDS if "keys_size" in result else ():
        label = plots.titled(results, index, kind)
        axis.plot(
            result["receiver_layers"], result[f"{kind}_size"], style, color=plots.COLOURS[kind], label=label,
            linewidth=1.4,
        )  # fmt: skip
    axis.set_ylim(bottom=0, auto=None)  # the next run may be larger
    axis.set_ylabel("relative norm")
    axis.set_title("what is added, in units of the receiver's own cache", fontsize=9)


def _draw_closing(axis: Any, result: dict[str, Any], style: str, results: Any, index: int) -> None:
    if "closing" not in result:
        return
    layers = result["receiver_layers"]
    found = result["closing"]["both"]
    middle = [one["change"] for one in found]
    ends = [
        [m - one["interval"][0] for m, one in zip(middle, found, strict=True)],
        [one["interval"][1] - m for m, one in zip(middle, found, strict=True)],
    ]
    total = result["closing"]["all_closed"]["change"]
    label = plots.titled(results, index, f"keys and values, 95% interval; all layers closed: {total:+.3f}")
    axis.errorbar(
        layers, middle, yerr=ends, fmt="o", linestyle=style, color=plots.COLOURS["c2c"], markersize=3, linewidth=1,
        label=label,
    )  # fmt: skip
    for kind in KINDS:
        each = [one["change"] for one in result["closing"][kind]]
        axis.plot(layers, each, ".", color=plots.COLOURS[kind], markersize=4, label=plots.titled(results, index, kind))
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_ylabel("nats per token")
    axis.set_title("loss when one layer is closed, less loss with all open", fontsize=9)


_PANELS = {"gates": _draw_gates, "weights": _draw_weights, "size": _draw_size, "closing": _draw_closing}


def draw_heads(result: dict[str, Any], output: Path) -> None:
    """Mean weight of each head in each layer; closed layers are marked."""
    layers = result["receiver_layers"]
    made, axes = plots.figure(2, 1, (7.5, 4.2), sharex=True)
    for axis, kind in zip(axes[:, 0], KINDS, strict=True):
        mean = np.array(result["weights"][kind]["heads"]["mean"]).T  # (heads, layers)
        extent = (-0.5, len(layers) - 0.5, mean.shape[0] - 0.5, -0.5)
        image = axis.imshow(mean, aspect="auto", vmin=0, vmax=1, cmap="viridis", extent=extent, interpolation="nearest")
        axis.set_yticks(range(mean.shape[0]))
        axis.set_xticks(range(len(layers)), layers, fontsize=7)
        axis.set_ylabel("receiver head")
        axis.grid(False)
        axis.set_title(f"{kind} (crossed out: gate closed)", fontsize=9)
        for i, is_open in enumerate(result[kind]["open"]):
            if not is_open:
                axis.plot([i - 0.4, i + 0.4], [-0.4, mean.shape[0] - 0.6], color="white", linewidth=1)
        made.colorbar(image, ax=axis, label="mean weight")
    axes[-1, 0].set_xlabel("receiver layer")
    plots.name_runs(made, [("", result["about"])])
    plots.save(made, output, "heads")
