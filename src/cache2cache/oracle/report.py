"""Figures and tables of the oracle studies, of one run or of several beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

from rich.table import Table

from ..analysis import plots
from ..errors import C2CError
from . import study
from .study import Results

# One colour a run (Okabe and Ito), one dash style for each of what is compared within it.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LABELS = {
    "direct": "Direct",
    "few-shot": "Few-shot",
    "oracle": "Oracle",
    "oracle-rotated": "Oracle, keys rotated back",
    "receiver": "receiver",
    "sharer": "sharer",
    "mlp": "MLP",
    "ridge": "ridge",
    "mean": "mean",
    "text:tell": "text",
    "text:published": "text, published",
    "c2c": "C2C",
    "other": "C2C, another's cache",
}


def draw(runs: Sequence[Path], output: Path) -> list[str]:
    """Draw runs of one study into the same figures, in `output`; their names."""
    kind = study.kind_of(runs[0])
    results = study.earlier(runs, kind)
    if len({label for label, _ in results}) < len(results):
        results = [(str(run), result) for run, (_, result) in zip(runs, results, strict=True)]
    output.mkdir(parents=True, exist_ok=True)
    figures = FIGURES[kind](results)
    for name, figure in figures.items():
        plots.name_runs(figure, [(label, result["about"]) for label, result in results])
        plots.save(figure, output, name)
    return list(figures)


def _colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def _points(axis: Any, results: Results, names: Sequence[str], get: Callable[[Any, str], Any]) -> None:
    """Accuracies with their intervals: names along the axis, runs beside each other."""
    for run, (label, result) in enumerate(results):
        shift = (run - (len(results) - 1) / 2) * 0.8 / max(3, len(results))
        there = [(i, found) for i, name in enumerate(names) if (found := get(result, name)) is not None]
        means = [found["accuracy"] for _, found in there]
        low = [found["accuracy"] - found["interval"][0] for _, found in there]
        high = [found["interval"][1] - found["accuracy"] for _, found in there]
        places = [i + shift for i, _ in there]
        axis.errorbar(places, means, (low, high), fmt="o", color=_colour(run), label=label, capsize=2, markersize=4)
    axis.set_xticks(range(len(names)), [LABELS[name].replace(", ", ",\n") for name in names], fontsize=7)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.axhline(25, color="grey", linewidth=0.7, linestyle=":")  # four options
    axis.set_ylabel("accuracy, %")


def _legend(axis: Any, results: Results) -> None:
    if len(results) > 1:
        axis.legend(fontsize=7)


def _here(results: Results, names: Sequence[str], get: Callable[[Any, str], Any]) -> list[str]:
    return [name for name in names if any(get(result, name) is not None for _, result in results)]


# ---- enrichment -----------------------------------------------------------------------------------------------------

ENDS = {"best": "best alone first", "worst": "worst alone first", "bottom": "from the bottom", "top": "from the top"}


def enrich(results: Results) -> dict[str, Any]:
    """Whole caches; each layer alone; several layers at once."""

    def whole(result: Any, name: str) -> Any:
        return result["all"].get(name)

    names = _here(results, ("direct", "few-shot", "oracle", "oracle-rotated"), whole)
    made, axes = plots.figure(1, 1, (4.8, 3.2))
    _points(axes[0, 0], results, names, whole)
    _legend(axes[0, 0], results)
    made.suptitle(f"Cache enrichment, {_questions(results, 'all')} questions [95%]", fontsize=10)
    figures = {"enrichment": made}
    layered = [(label, result) for label, result in results if "reported_on" in result]
    if not layered:
        return figures

    made, axes = plots.figure(1, 1, (6.4, 3.2))
    axis = axes[0, 0]
    for run, (label, result) in enumerate(layered):
        layers = list(range(result["num_layers"]))
        gains = [result["reported_on"][f"layer:{layer}"]["against_direct"] for layer in layers]
        differences = [gain["difference"] for gain in gains]
        axis.plot(layers, differences, color=_colour(run), marker="o", markersize=3, linewidth=1.2, label=label)
        bounds = [[gain["interval"][end] for gain in gains] for end in (0, 1)]
        axis.fill_between(layers, *bounds, color=_colour(run), alpha=0.12, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.7)
    axis.set_xlabel("the one enriched layer")
    axis.set_ylabel("accuracy against Direct, points")
    _legend(axis, layered)
    made.suptitle(f"One layer at a time, {_questions(layered, 'reported_on')} questions [95%]", fontsize=10)
    figures["enrichment-layers"] = made

    made, axes = plots.figure(1, 4, (10, 3.0), sharey=True)
    for axis, (end, title) in zip(axes[0], ENDS.items(), strict=True):
        for run, (label, result) in enumerate(layered):
            found, depth = result["reported_on"], result["num_layers"]
            whole_oracle = "oracle" if result["about"]["positions"] == "kept" else "oracle-rotated"
            curve = {int(name.split(":")[1]): found[name]["accuracy"] for name in found if name.startswith(f"{end}:")}
            curve = {0: found["direct"]["accuracy"], **curve, depth: found[whole_oracle]["accuracy"]}
            axis.plot(list(curve), list(curve.values()), color=_colour(run), marker="o", markersize=3, label=label)
            axis.axhline(found["direct"]["accuracy"], color=_colour(run), linewidth=0.8, linestyle="--")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("layers enriched")
    axes[0, 0].set_ylabel("accuracy, %")
    _legend(axes[0, 0], layered)
    made.suptitle(
        f"Several layers at once, {_questions(layered, 'reported_on')} questions other than those that chose "
        "(dashed: Direct)",
        fontsize=10,
    )
    figures["enrichment-counts"] = made
    return figures


def _questions(results: Results, part: str) -> str:
    return " / ".join(str(result[part]["direct"]["questions"]) for _, result in results)


def enrich_tables(result: dict[str, Any]) -> list[Table]:
    whole = _accuracies(f"cache enrichment, {result['tokens']:g} tokens, {result['removed']:g} of exemplars removed")
    for name, found in result["all"].items():
        _row(whole, LABELS[name], found, found.get("against_direct"))
    if "reported_on" not in result:
        return [whole]
    layers = _accuracies("layers, on the half that didn't choose them")
    found = result["reported_on"]
    for end in ENDS:
        for name in (name for name in found if name.startswith(f"{end}:")):
            _row(layers, name.replace(":", " "), found[name], found[name]["against_direct"])
    return [whole, layers]


def _accuracies(title: str, other: str = "Direct") -> Table:
    table = Table(title=title)
    for heading in ("", "accuracy, % [95%]", f"against {other} [95%]", "p"):
        table.add_column(heading, justify="right" if heading else "left")
    return table


def _row(table: Table, label: str, found: dict[str, Any], against: dict[str, Any] | None, *more: str) -> None:
    cells = ["{:.1f}  [{:.1f}, {:.1f}]".format(found["accuracy"], *found["interval"]), "", ""]
    if against is not None:
        cells[1] = "{:+.1f}  [{:+.1f}, {:+.1f}]".format(against["difference"], *against["interval"])
        cells[2] = f"{against['p']:.2g}"
    table.add_row(label, *cells, *more)


# ---- transformation -------------------------------------------------------------------------------------------------

CURVES = ("mlp", "ridge", "mean", "receiver", "sharer")


def _curve(axis: Any, results: Results, name: str, *keys: str) -> None:
    """The number under `keys` of each layer: a colour for the run, a dash style for what (`name`) it is of."""
    style = {"mlp": "-", "ridge": "--", "mean": ":", "receiver": "-.", "sharer": (0, (1, 4))}[name]
    for run, (_, result) in enumerate(results):
        layers = [layer["receiver_layer"] for layer in result["layers"]]
        values = [reduce(getitem, keys, layer) for layer in result["layers"]]
        label = plots.titled(results, run, LABELS[name])
        mark = {"marker": "o", "markersize": 3} if len(layers) == 1 else {}
        axis.plot(layers, values, linestyle=style, color=_colour(run), label=label, linewidth=1.3, **mark)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("receiver layer")


def transform(results: Results) -> dict[str, Any]:
    """R², attention error, effective rank, regions, accuracy, t-SNE."""
    figures = {}
    made, axes = plots.figure(2, 2, (8, 5.4), sharex=True)
    for column, kind in enumerate(("keys", "values")):
        for row, (key, title) in enumerate((("r2", "R²"), ("cosine", "cosine"))):
            for name in CURVES[: 2 + row]:
                _curve(axes[row, column], results, name, kind, name, key)
            axes[row, column].set_ylabel(title)
            lowest = axes[row, column].get_ylim()[0]
            axes[row, column].set_ylim(max(-1.0, min(0.0, lowest)), 1.03)  # an R² far below 0 says no more than that
        axes[0, column].set_title(kind, fontsize=9)
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    made.suptitle("How much of the receiver's cache the sharer's predicts", fontsize=10)
    figures["transformation-fit"] = made

    made, axes = plots.figure(1, 1, (5.6, 3.2))
    for name in CURVES[:3]:
        _curve(axes[0, 0], results, name, "attention_error", name)
    axes[0, 0].set_ylabel("relative error")
    axes[0, 0].set_ylim(bottom=0)
    axes[0, 0].legend(fontsize=7)
    made.suptitle("Attention output of a layer that reads the transformed cache", fontsize=10)
    figures["transformation-attention"] = made

    made, axes = plots.figure(1, 2, (8, 3.2))
    for axis, kind in zip(axes[0], ("keys", "values"), strict=True):
        for name in ("receiver", "sharer", "mlp", "ridge"):
            _curve(axis, results, name, kind, "rank", name)
        axis.set_title(kind, fontsize=9)
        axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("effective rank")
    axes[0, 0].legend(fontsize=7)
    tokens = ", ".join(f"{result['positions']['test']:,}" for _, result in results)
    made.suptitle(f"Effective rank ({tokens} positions)", fontsize=10)
    figures["transformation-rank"] = made

    made, axes = plots.figure(1, 3, (10, 3.2), sharey=True)
    titles = {
        "precision": "precision: where the receiver's are",
        "coverage": "coverage: everywhere where they are",
        "neighbours": "neighbours that are the receiver's",
    }
    for axis, (key, title) in zip(axes[0], titles.items(), strict=True):
        for name in ("receiver", "sharer", "mlp", "ridge"):
            _curve(axis, results, name, "region", name, key)
        axis.set_title(title, fontsize=9)
        axis.set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("share")
    axes[0, 0].legend(fontsize=7)
    made.suptitle("Where the vectors lie in the receiver's space", fontsize=10)
    figures["transformation-region"] = made

    made, axes = plots.figure(1, 1, (4.8, 3.2))
    _points(axes[0, 0], results, CURVES[3:] + CURVES[:3], lambda result, name: result["answers"].get(name))
    _legend(axes[0, 0], results)
    count = " / ".join(str(result["answers"]["mlp"]["questions"]) for _, result in results)
    made.suptitle(f"Answers from the transformed cache, {count} questions [95%]", fontsize=10)
    figures["transformation-answers"] = made

    made, axes = plots.figure(1, len(results), (4.2 * len(results), 3.8))
    for axis, (label, result) in zip(axes[0], results, strict=True):
        found = result["tsne"]
        for name, marker in (("sharer", "^"), ("receiver", "o"), ("transformed", "x")):
            colour = plots.COLOURS["fused" if name == "transformed" else name]
            axis.scatter(
                *zip(*found["points"][name], strict=True), s=10, marker=marker, c=colour, label=name, alpha=0.7
            )
        axis.set_title(
            f"{label}, layer {found['layer']}" if len(results) > 1 else f"layer {found['layer']}", fontsize=9
        )
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0, 0].legend(fontsize=7)
    said = {f"perplexity {result['tsne']['perplexity']:g}, seed {result['tsne']['seed']}" for _, result in results}
    made.suptitle(f"t-SNE of keys and values, {' / '.join(sorted(said))}", fontsize=10)
    figures["transformation-tsne"] = made
    return figures


def transform_tables(result: dict[str, Any]) -> list[Table]:
    answers = _accuracies(f"answers from one cache, {100 * result['mapped']:.0f}% of it transformed", "the receiver")
    for name in ("receiver", "sharer", "mlp", "ridge", "mean"):
        found = result["answers"][name]
        _row(answers, LABELS[name], found, found.get("against_receiver"))
    fit = Table(title=f"means over {len(result['layers'])} layers")
    for heading in ("", "R² keys", "R² values", "cosine keys", "cosine values", "attention error"):
        fit.add_column(heading, justify="right" if heading else "left")
    for name, found in result["average"].items():
        keys = ("keys_r2", "values_r2", "keys_cosine", "values_cosine", "attention_error")
        fit.add_row(LABELS[name], *(f"{found[key]:.3f}" for key in keys))
    return [answers, fit]


# ---- structure ------------------------------------------------------------------------------------------------------


def structure(results: Results) -> dict[str, Any]:
    """One figure a setting, so that the two are never read as one: accuracy by kind of structure, and bytes."""
    figures = {}
    names = ("receiver", "sharer", "text:published", "text:tell", "c2c", "other")
    for setting in ("both", "private"):
        some = [(label, result) for label, result in results if setting in result]
        if not some:
            continue
        kinds = list(dict.fromkeys(kind for _, result in some for kind in result[setting]))
        made, axes = plots.figure(1, len(kinds) + 1, (3.1 * len(kinds) + 3.1, 3.4))
        for axis, kind in zip(axes[0], kinds, strict=False):
            get = partial(_found, setting, kind)
            _points(axis, some, _here(some, names, get), get)
            axis.set_title(kind, fontsize=9)
            axis.tick_params(axis="x", rotation=45)
            axis.set_ylim(0, 105)
        _legend(axes[0, 0], some)
        axis = axes[0, -1]
        for run, (_, result) in enumerate(some):
            for name, found in result[setting]["all"].items():
                if "bytes" in found and name != "other":
                    axis.plot(found["bytes"], found["accuracy"], "o", color=_colour(run), markersize=4)
                    axis.annotate(LABELS[name], (found["bytes"], found["accuracy"]), fontsize=7, xytext=(3, 3),
                                  textcoords="offset points")  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("bytes from the sharer, mean")
        axis.set_ylabel("accuracy, %")
        axis.set_ylim(0, 105)
        axis.set_title("what it costs", fontsize=9)
        axis.margins(x=0.3)
        made.suptitle(f"Structure: {some[0][1]['meaning'][setting]}", fontsize=10)
        figures[f"structure-{setting}"] = made
    return figures


def _found(setting: str, kind: str, result: Any, name: str) -> Any:
    return result[setting].get(kind, {}).get(name)


def structure_tables(result: dict[str, Any]) -> list[Table]:
    made = []
    for setting, meaning in result["meaning"].items():
        table = _accuracies(f"{setting}: {meaning}", "it, C2C")
        for heading in ("bytes", "tokens", "names it, %"):
            table.add_column(heading, justify="right")
        for name, found in result[setting]["all"].items():
            more = [f"{found[key]:,.0f}" if key in found else "" for key in ("bytes", "message_tokens")]
            more.append(f"{found['named']['accuracy']:.1f}" if "named" in found else "")
            _row(table, LABELS[name], found, found.get("c2c_against"), *more)
        made.append(table)
    return made


FIGURES: dict[str, Callable[[Results], dict[str, Any]]] = {
    "enrich": enrich,
    "transform": transform,
    "structure": structure,
}
TABLES: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    "enrich": enrich_tables,
    "transform": transform_tables,
    "structure": structure_tables,
}


def check(against: Sequence[Path], kind: str) -> None:
    """Raise a C2CError before hours of work where the figures couldn't be drawn, alone or beside other runs."""
    plots.check()
    study.earlier(against, kind)


def show(output: Path, against: Sequence[Path] = ()) -> list[Table]:
    """Draw a finished run, beside others if there are any; its tables."""
    kind = study.kind_of(output)
    draw([output, *against], output)
    return TABLES[kind](study.earlier([output], kind)[0][1])


def draw_together(runs: Sequence[Path], output: Path) -> list[str]:
    """Draw several finished runs of one study; the figures' names."""
    if not runs:
        raise C2CError("no runs were given; name the output folders of a c2c oracle command")
    plots.check()
    return draw(runs, output)
