"""c2c chat-quality [FUSER]: bits per byte of held-out responses, and what greedy answers look like."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options


def chat_quality(
    fuser: options.OneFuser = None,
    subfolder: options.Subfolder = None,
    rows: Annotated[str | None, typer.Option(help="Instruction rows, owner/name[/config].")] = None,
    jsonl: Annotated[Path | None, typer.Option(help="Instruction rows, a local file.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="Training recipe: the instruction rows of its hold-out.")] = None,
    settings: options.Settings = None,
    split: Annotated[str, typer.Option(help="Split of --rows.")] = "train",
    data_dir: options.DataDir = None,
    limit: Annotated[int | None, typer.Option(min=2, help="That many rows, chosen by their ids' hashes.")] = None,
    generate: Annotated[int, typer.Option(min=0, help="Greedy answers to that many prompts too.")] = 0,
    max_new_tokens: options.MaxNewTokens = 256,
    max_tokens: Annotated[int, typer.Option(min=2, help="Rows with more, prompt and response, are left out.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=2, help="Rows at once.")] = 4,
    store: options.Prefills = None,
    store_precision: options.StorePrecision = None,
    max_gb: options.MaxGb = 20.0,
    receiver: options.OtherReceiver = None,
    sharer: options.OtherSharer = None,
    receiver_dtype: options.ReceiverDtype = "auto",
    sharer_dtype: options.SharerDtype = "auto",
    output: Annotated[
        Path, typer.Option(callback=options.folder, help="Folder for scores, answers and summary.json.")
    ] = Path("runs/chat"),
) -> None:
    """How likely held-out responses are for receiver, sharer and C2C, on rows that the fuser was not trained on.

    Run it again after an interruption: what stands in the output folder is not computed again.
    """
    from cache2cache import heap
    from cache2cache.config import DataSource, TrainConfig
    from cache2cache.errors import C2CError
    from cache2cache.evaluation.chat import run
    from cache2cache.training.recipe import read_recipe

    given = [name for name, value in (("rows", rows), ("jsonl", jsonl), ("recipe", recipe)) if value is not None]
    if len(given) != 1:
        raise C2CError(f"--{' and --'.join(given) or 'rows, --jsonl or --recipe'}: give exactly one source of rows")
    source: DataSource | TrainConfig
    if recipe is not None:
        config = read_recipe(recipe, settings or [])
        source = config.model_copy(update={"data_dir": data_dir or config.data_dir})
    elif settings:
        raise C2CError("--set changes a recipe; give --recipe")
    else:
        if rows is not None and not 2 <= len([part for part in rows.split("/") if part]) <= 3:
            raise C2CError(f"--rows {rows} is no data set; expected owner/name or owner/name/config")
        source = DataSource(rows=rows, jsonl=jsonl, split=split, on_bad_rows="skip")
    heap.keep()
    run(
        fuser,
        source,
        subfolder=subfolder,
        data_dir=data_dir,
        limit=limit,
        generate=generate,
        max_new_tokens=max_new_tokens,
        max_tokens=max_tokens,
        batch_size=batch_size,
        store=(store, store_precision),
        max_bytes=int(max_gb * 1e9),
        receiver=(receiver, receiver_dtype),
        sharer=(sharer, sharer_dtype),
        output=output,
    )
