"""Figures: PNG and SVG beside each other, the same for the same numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import C2CError
from ..files import replacing

# Colours that are told apart with the usual kinds of colour blindness (Okabe and Ito).
COLOURS = {
    "receiver": "#0072B2",
    "sharer": "#D55E00",
    "c2c": "#009E73",
    "fused": "#009E73",
    "text": "#CC79A7",
    "keys": "#0072B2",
    "values": "#D55E00",
    "front": "#0072B2",
    "back": "#D55E00",
}
DASHES = ("-", "--", ":", "-.")  # one for each of several runs
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "cache2cache",  # ids in the file, which would be random
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}


def check() -> None:
    """Raise a C2CError where figures can't be drawn, before hours of work."""
    if find_spec("matplotlib") is None:
        raise C2CError("figures need matplotlib; install it with: pip install 'cache2cache[plots]'")


def figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns)."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        made = Figure(figsize=size, layout="constrained")
        return made, made.subplots(rows, columns, squeeze=False, **options)


def save(made: Any, output: Path, name: str) -> None:
    """Write `name`.png and `name`.svg."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with replacing(output / f"{name}.{kind}") as partial:
                made.savefig(partial, format=kind, dpi=160, metadata=metadata)


def name_runs(made: Any, runs: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Say below a figure which models and data it is of, a line a run.

    Args:
        made: the figure.
        runs: per run its label and its settings, as a result's `about` has them.
    """
    lines = [titled(runs, index, _said(about)) for index, (_, about) in enumerate(runs)]
    made.supxlabel("\n".join(lines), fontsize=7, color="#555555")


def _said(about: Mapping[str, Any]) -> str:
    models = [Path(about[who]["name"]).name for who in ("receiver", "sharer") if who in about]
    parts = [" ← ".join(models)] if models else []
    if "fuser" in about:
        parts.append(f"fuser {Path(about['fuser']).name}")
    data = about.get("data", about)
    sets = data.get("tasks") or [data[key] for key in ("test_task", "task", "file") if key in data][:1]
    split = data.get("test_split") or data.get("split")
    parts += [" ".join([", ".join(Path(name).name for name in sets), *([split] if split else [])]).strip()]
    if "shots" in about:
        parts.append(f"{about['shots']} shots")
    if "prompt" in data:
        parts.append(f"{data['prompt']} prompt")
    return "; ".join(filter(None, parts))


def titled(runs: Sequence[tuple[str, Any]], index: int, label: str) -> str:
    """A legend entry: with several runs, of which one."""
    return label if len(runs) == 1 else f"{runs[index][0]}: {label}"
