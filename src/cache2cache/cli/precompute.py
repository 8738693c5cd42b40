"""c2c precompute RECIPE: the sharer's prefills of a recipe's prompts, once, into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options


def precompute(
    recipe: Annotated[Path, typer.Argument(help="Training recipe (YAML).")],
    settings: options.Settings = None,
    data_dir: options.DataDir = None,
    store: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the store, once for each of several sharers; otherwise the recipe's."),
    ] = None,
    precision: Annotated[
        str, typer.Option(help="bfloat16, or int8: half the size; its error is printed.")
    ] = "bfloat16",
    dtype: Annotated[str, typer.Option(help="What the models compute in.")] = "auto",
    max_gb: Annotated[float, typer.Option(min=0, help="Refuse to start above this size.")] = 20.0,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens that go through the sharer at once.")] = 512,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print prompts, size and time, and write nothing.")
    ] = False,
) -> None:
    """Fill a prefill store. Run it again after an interruption: it goes on where it was.

    Several of it, on machines that share the store's folder too, divide the work among themselves.
    """
    from cache2cache import heap
    from cache2cache.errors import C2CError
    from cache2cache.training.precompute import precompute as run
    from cache2cache.training.recipe import read_recipe

    heap.keep()
    config = read_recipe(recipe, settings or [])
    folders = store or config.stores
    if len(folders) != len(config.sharers) and config.method != "single":
        named = f"names {len(config.sharers)} sharers, --store {len(folders)} folders" if store else "names no store"
        raise C2CError(f"{recipe} {named}; give --store FOLDER{', once for each' * (len(config.sharers) > 1)}")
    config = config.model_copy(update={"data_dir": data_dir or config.data_dir, "store": folders})
    run(
        config,
        precision=precision,
        dtype=dtype,
        max_bytes=int(max_gb * 1e9),
        batch_tokens=batch_tokens,
        dry_run=dry_run,
    )
