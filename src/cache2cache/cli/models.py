"""c2c models list | pull NAME | path NAME: the built-in catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="List, fetch and find the models of the built-in catalogue.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A name from `c2c models list`.")]
