"""c2c compare RUN RUN …: several evaluations of the same questions, such as of fusers trained with other seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of c2c evaluate with the method c2c.")],
    against: Annotated[
        list[Path] | None, typer.Option(help="Such a folder of a baseline, not part of the mean; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option(callback=options.file, help="File for the same as JSON.")] = None,
) -> None:
    """Accuracy of C2C with mean and spread, the recovered gap, and whether any two runs differ (McNemar's test)."""
    from rich.console import Console

    from cache2cache.evaluation.compare import compare as of
    from cache2cache.evaluation.compare import tables
    from cache2cache.files import replace_text

    result = of(runs, against or [])
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_text(output, json.dumps(result, indent=2) + "\n")
    for table in tables(result):
        Console().print(table)
