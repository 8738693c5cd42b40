"""c2c calibrate RUN: from which confidence of the receiver on the sharer can be skipped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    run: Annotated[Path, typer.Argument(help="Output folder of c2c evaluate with the methods receiver and c2c.")],
    check: Annotated[
        Path | None, typer.Option(help="Such a folder of other questions, to try the threshold on.")
    ] = None,
    tolerance: Annotated[float, typer.Option(min=0, help="Accuracy that may be lost against C2C, in points.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Find the threshold for --skip: the lowest that costs no more accuracy than the tolerance."""
    from rich.console import Console

    from cache2cache.evaluation.skipping import calibration, table

    result = calibration(run, check, tolerance=tolerance)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    Console().print(table(result))
    found = result["threshold"]
    print("never skip: no question can be left to the receiver at that price" if found is None else f"--skip {found}")
