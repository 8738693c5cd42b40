"""What the oracle studies share: a folder that a run resumes in, what it records, and paired comparisons.

A study's folder holds `settings.json` (which a second run must agree with), `rows.jsonl` (one row per question, added
as it goes), `summary.json` with every number, and its figures.
"""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from torch import nn

from .. import __version__
from ..errors import C2CError
from ..evaluation.report import COLUMNS
from ..evaluation.statistics import bootstrap, mcnemar, wilson
from ..files import replace_text
from ..models.load import LM
from ..pair import identity


def described(lm: LM) -> dict[str, Any]:
    """A model as a study's settings name it."""
    return {**identity(lm).model_dump(), "dtype": str(lm.dtype)}


def progress() -> Progress:
    """A bar on stderr."""
    return Progress(*COLUMNS, console=Console(stderr=True))


def finish(output: Path, settings: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Write `summary.json`: settings, command, versions and results. Returns what was written."""
    summary = {
        "settings": settings,
        "command": shlex.join(["c2c", *sys.argv[1:]]),
        "versions": {
            "cache2cache": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        **results,
    }
    replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def read_summary(run: Path) -> dict[str, Any]:
    """The summary of a finished study."""
    path = run / "summary.json"
    if not path.is_file():
        raise C2CError(f"{run} holds no finished study; expected the output folder of a c2c oracle command")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        summary["settings"]["study"]
    except (ValueError, KeyError, TypeError) as error:
        raise C2CError(f"{path} is no summary of an oracle study ({error}); run the study again") from error
    return dict(summary)


def accuracy(right: Sequence[bool]) -> dict[str, Any]:
    """Accuracy in % with its 95% Wilson interval."""
    low, high = wilson(sum(right), len(right))
    return {
        "questions": len(right),
        "accuracy": round(100 * sum(right) / len(right), 2),
        "interval": [round(100 * low, 2), round(100 * high, 2)],
    }


def against(right: Sequence[bool], baseline: Sequence[bool]) -> dict[str, Any]:
    """How much better than a baseline on the same questions: points, their paired 95% bootstrap interval, and
    McNemar's exact p from the questions that only one of the two answers right."""
    change = np.array(right, dtype=float) - np.array(baseline, dtype=float)
    interval = bootstrap(len(change), lambda times: 100 * (times @ change) / len(change))
    only = int((change > 0).sum()), int((change < 0).sum())
    return {
        "difference": round(100 * float(change.mean()), 2),
        "interval": [round(x, 2) for x in interval],
        "only_this": only[0],
        "only_baseline": only[1],
        "p": float(f"{mcnemar(*only):.3g}"),
    }


def attention(lm: LM, layer: int) -> nn.Module:
    """The attention module of a layer, by the name that transformers' decoders give it."""
    layers = getattr(lm.decoder, "layers", None)
    found = getattr(layers[layer], "self_attn", None) if layers is not None else None
    if not isinstance(found, nn.Module):
        raise C2CError(
            f"{lm.name} ({lm.text_config.model_type}) doesn't name its attention decoder.layers[i].self_attn, which "
            "this study has to look into; choose another model"
        )
    return found
