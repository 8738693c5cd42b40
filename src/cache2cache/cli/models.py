"""c2c models list | pull NAME | path NAME: the built-in catalogue."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="List, fetch and find the models of the built-in catalogue.", no_args_is_help=True)
Name = Annotated[str, typer.Argument(help="A name from `c2c models list`.")]


@app.command("list")
def list_models() -> None:
    """The models that have a name of their own: each name pins one set of bytes."""
    from cache2cache.models.catalogue import entries

    for entry in entries():
        state = "here" if entry.installed else "not fetched"
        print(f"{entry.name:<30}{entry.download / 1e6:>6,.0f} MB  {state:<12}  {entry.licence}")
        print(f"    {entry.hub_id}: {entry.note}")


@app.command()
def pull(name: Name) -> None:
    """Fetch a model, check its SHA-256 and convert it once; prints its folder."""
    from cache2cache.models.catalogue import pull as fetch

    print(fetch(name))


@app.command()
def path(name: Name) -> None:
    """The folder of a fetched model."""
    from cache2cache.models.catalogue import path as folder_of

    print(folder_of(name))
