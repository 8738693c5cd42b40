"""c2c report RUN…: the report of one evaluation, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options


def report(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of c2c evaluate.")],
    output: Annotated[
        Path | None,
        typer.Option(callback=options.folder, help="Folder for report.md and report.html.  [default: the first run's]"),
    ] = None,
) -> None:
    """Write the report anew, or that of several runs: Markdown, and one HTML file that needs nothing else."""
    from cache2cache.evaluation.report import read_run, write

    for path in write(output or runs[0], [read_run(folder) for folder in runs]):
        print(path)
