"""c2c train RECIPE: train a fuser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="Training recipe (YAML).")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe, such as epochs=2; repeatable.")
    ] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Local mirror of the data sets; the hub without it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; otherwise the recipe's.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Compute the sharer's prefills instead of reading the store.")
    ] = False,
) -> None:
    """Train a fuser, or fit one that has a closed form (ridge). Run it again after an interruption: training goes on
    from the last checkpoint.

    Needs the store that `c2c precompute` makes, unless the recipe names none or --live is given.
    """
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from cache2cache import heap
    from cache2cache.models.load import load_lm
    from cache2cache.pair import C2C
    from cache2cache.training.fit import Fitted, fit
    from cache2cache.training.loop import Trainer, prepare
    from cache2cache.training.recipe import read_recipe
    from cache2cache.training.store import Store

    heap.keep()
    config = read_recipe(recipe, settings or [])
    changes: dict[str, Any] = {"data_dir": data_dir or config.data_dir, "output": output or config.output}
    config = config.model_copy(update=changes | ({"store": None} if live else {}))
    console = Console(stderr=True)
    # With a store the sharer's weights are only compared with those the store was made with; the smallest load will do.
    as_small: dict[str, Any] = {"dtype": "bfloat16", "device": "cpu"} if config.store else {}
    receiver, sharer = load_lm(config.receiver), load_lm(config.sharer, None, **as_small)
    torch.manual_seed(config.seed)  # the fuser's first weights
    pair = C2C.from_models(receiver, sharer, config.fuser)
    store = Store(config.store, pair.sharers[0]) if config.store else None
    data = prepare(pair, config)
    parameters = sum(p.numel() for p in pair.fusers.parameters())
    about = f"{parameters:,} parameters, {len(data.train)} examples, {len(data.holdout)} held out, {data.truncation}"
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    if isinstance(pair.fusers[0], Fitted):
        console.print(about)
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("reading", total=len(data.train) + len(data.holdout))
            folder, rows = fit(pair, config, store, data, lambda n: bar.advance(task, n))
        for row in rows:
            console.print(f"{row['kind']} of layer {row['layer']}: R² {row['r2']:.3f}, penalty {row['penalty']:g}")
        print(folder)
        return
    trainer = Trainer(pair, config, store, data)
    console.print(f"{about}, {trainer.steps} steps")
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=trainer.steps)

        def show(record: dict[str, Any]) -> None:
            bar.update(
                task,
                completed=record["step"],
                description=f"loss {record['loss']:.3f}, {record['gates_open']} gates open",
            )
            if "holdout_loss" in record:
                console.print(
                    f"step {record['step']}: hold-out loss {record['holdout_loss']:.4f}, exact "
                    f"{100 * record['holdout_exact']:.1f}%, {record['seconds']:.0f} s"
                )

        folder = trainer.run(show)
    print(folder)
