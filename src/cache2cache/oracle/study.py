"""What the oracle studies share: how a run begins and ends, and paired comparisons.

A study's folder holds `settings.json` (which a second run must agree with), `rows.jsonl` (a row per question, added as
it goes), `result.json` with every number, and its figures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..analysis import runs
from ..errors import C2CError
from ..evaluation.summary import paired
from ..models.load import LM
from ..pair import identity

Results = Sequence[tuple[str, dict[str, Any]]]  # several runs' results, each with a label


def described(lm: LM) -> dict[str, Any]:
    """A model as a study's settings name it."""
    return {**identity(lm).model_dump(), "dtype": str(lm.dtype)}


def begin(
    output: Path, settings: dict[str, Any], kind: str, rows: Sequence[object], seed: int, command: str
) -> dict[str, Any]:
    """Claim the folder for one study of these questions; what its result says of the run."""
    setup = runs.Setup(None, output, seed=seed, command=command)
    return runs.begin(setup, settings, f"oracle {kind}", rows)


def finish(output: Path, about: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Write `result.json`; returns what was written, as it would be read."""
    result = json.loads(json.dumps({"about": about, **results}))
    runs.finish(output, result)
    return dict(result)


def kind_of(run: Path) -> str:
    """Which study a finished run's folder holds: enrich, transform or structure."""
    kind = runs.finished(run, "c2c oracle")["about"]["kind"]
    if not kind.startswith("oracle "):
        raise C2CError(f"{run} holds a run of {runs.command_of(kind)}; give one of c2c oracle")
    return str(kind).removeprefix("oracle ")


def earlier(folders: Sequence[Path], kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The results of finished runs of one study, with a label each."""
    return runs.earlier(folders, f"oracle {kind}")


def against(right: Sequence[bool], baseline: Sequence[bool]) -> dict[str, Any]:
    """A method compared with a baseline on the same questions, see `summary.paired`."""
    return paired(dict(enumerate(right)), dict(enumerate(baseline)))


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
