"""c2c train RECIPE: train a fuser."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache2cache.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from cache2cache.training.plan import Plan


def print_keys(wanted: bool) -> None:
    """Every key of a recipe."""
    if wanted:
        from cache2cache.config import TrainConfig

        options.print_keys(TrainConfig)


def train(
    recipe: Annotated[Path, typer.Argument(help="Training recipe (YAML).")],
    settings: options.Settings = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys", callback=print_keys, is_eager=True, help="Print every key of a recipe, for --set too, and leave."
        ),
    ] = False,
    data_dir: options.DataDir = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; otherwise the recipe's.")] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Compute the sharer's prefills instead of reading the store.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take: memory, steps, time, disk; write nothing.")
    ] = False,
) -> None:
    """Train a fuser, fit one that has a closed form (ridge), or train a baseline (the recipe's method).

    Run it again after an interruption: training goes on from the last checkpoint.

    Needs the store that `c2c precompute` makes, unless the recipe names none or --live is given.
    """
    from rich.console import Console
    from rich.live import Live

    from cache2cache import heap
    from cache2cache.errors import C2CError
    from cache2cache.progress import EVERY, Bar, encoding
    from cache2cache.training.data import examples
    from cache2cache.training.fit import fit
    from cache2cache.training.items import prepare, this_process
    from cache2cache.training.loop import Trainer
    from cache2cache.training.plan import SAMPLE, plan
    from cache2cache.training.ready import check, load
    from cache2cache.training.recipe import read_recipe

    heap.keep()
    config = read_recipe(recipe, settings or [])
    changes: dict[str, Any] = {"data_dir": data_dir or config.data_dir, "output": output or config.output}
    config = config.model_copy(update=changes | ({"store": None, "receiver_store": None} if live else {}))
    # With several processes this also chooses each one's GPU, so it comes before anything is loaded.
    processes = this_process()
    console = Console(stderr=True, quiet=not processes.is_main_process)
    if not processes.is_main_process:
        warnings.simplefilter("ignore")  # the first one says the same
    # First: what is wrong with outputs, stores, fusers and data shows before models are loaded.
    check(config, writes=not dry_run)
    read = examples(config)
    ready = load(config, processes)
    if ready.fitted and processes.num_processes > 1:
        raise C2CError(f"fitting {config.fuser.variant} takes one process, {processes.num_processes} were started")
    if ready.fitted and dry_run:
        raise C2CError(f"--dry-run is for training; fitting {config.fuser.variant} reads each example once")
    with encoding(console) as progress:
        data = prepare(ready.encoder, config, read, progress, SAMPLE if dry_run else None)
    del read
    parameters = sum(p.numel() for p in ready.trained.parameters())
    about = f"{parameters:,} parameters, {len(data.train)} examples, {len(data.holdout)} held out, {data.truncation}"
    stores = ready.stores or None
    if ready.fitted:
        console.print(about)
        with Bar(console) as bar:
            task = bar.add_task("reading", total=len(data.train) + len(data.holdout))
            folder, rows = fit(ready.fitted, config, stores, data, lambda n: bar.advance(task, n), ready.receiver_store)
        for row in rows:
            console.print(f"{row['kind']} of layer {row['layer']}: R² {row['r2']:.3f}, penalty {row['penalty']:g}")
        print(folder)
        return
    trainer = Trainer(ready.what, config, stores, data, ready.receiver_store)
    if dry_run:
        found = plan(trainer)
        if processes.is_main_process:
            print_plan(found)
        processes.destroy_process_group()
        return
    console.print(f"{about}, {trainer.steps} steps")
    recent: deque[dict[str, Any]] = deque(maxlen=20)
    said = time.monotonic()
    with Live(console=console, refresh_per_second=4) as live_table:

        def show(record: dict[str, Any]) -> None:
            nonlocal said
            if "loss" in record:  # else of what there was before the first step
                if not recent and record["step"] > 1:
                    console.print(f"going on behind step {record['step'] - 1}")
                recent.append(record)
                live_table.update(status(recent, trainer.steps))
            if recent and not console.is_terminal and time.monotonic() - said > EVERY:
                said = time.monotonic()
                console.print(status(recent, trainer.steps))
            if "holdout_loss" in record:
                console.print(
                    f"step {record['step']}: hold-out loss {record['holdout_loss']:.4f}, exact "
                    f"{100 * record['holdout_exact']:.1f}%, {record['seconds']:.0f} s"
                )

        def calibrating(done: int, of: int) -> None:
            nonlocal said
            what = f"calibration: {done} of {of} prompts read"
            live_table.update(what)
            if not console.is_terminal and time.monotonic() - said > EVERY:
                said = time.monotonic()
                console.print(what)

        try:
            folder = trainer.run(show, calibrating)
        except KeyboardInterrupt:
            if (config.output / "checkpoint.pt").is_file():
                console.print("the same command goes on from the last checkpoint")
            raise
    if not recent:
        console.print(f"this run had come to its end, at step {trainer.step}")
    if not console.is_terminal:
        console.print()  # rich ends a live table's last line only on a terminal
    if trainer.out_of_patience:
        console.print(f"stopped: no better hold-out loss since step {trainer.best_step}")
    if processes.is_main_process:
        print(folder)
    processes.destroy_process_group()


def status(recent: Sequence[Mapping[str, Any]], steps: int) -> Table:
    """The state of a run after the last of some steps in a row, as one row of a table."""
    from rich.table import Table

    first, last = recent[0], recent[-1]
    done, seconds = last["step"] - first["step"], last["seconds"] - first["seconds"]
    tokens = sum(record["tokens"] for record in recent) - first["tokens"]
    known = done > 0 and seconds > 0
    cells = {
        "step": f"{last['step']} of {steps}",
        "loss": f"{sum(record['loss'] for record in recent) / len(recent):.3f}",
        **({"gates open": str(last["gates_open"])} if "gates_open" in last else {}),
        **({"mean weight": f"{last['mean_weight']:.3f}"} if "mean_weight" in last else {}),
        "tokens/s": f"{tokens / seconds:,.0f}" if known else "",
        "left": str(timedelta(seconds=round((steps - last["step"]) * seconds / done))) if known else "",
    }
    table = Table(*cells)
    table.add_row(*cells.values())
    return table


def print_plan(found: Plan) -> None:
    """What a run will take, in lines."""

    def size(count: int) -> str:
        unit = next((u for u in ("GB", "MB") if count >= {"GB": 1e9, "MB": 1e6}[u]), "kB")
        return f"{count / {'GB': 1e9, 'MB': 1e6, 'kB': 1e3}[unit]:.1f} {unit}"

    print(f"parameters  {found.parameters:,} are trained")
    print(
        f"memory      {size(found.memory)} a process: receiver {size(found.receiver)}, sharer {size(found.sharers)}, "
        f"what is trained with gradients and optimizer {size(found.fuser)}, activations {size(found.activations)} "
        "(measured)"
    )
    print(f"examples    {found.examples:,}, {size(found.data)} of main memory a process")
    print(f"steps       {found.steps}, about {found.seconds_per_step:.2f} s each")
    print(f"time        about {timedelta(seconds=round(found.seconds))} with encoding, calibration and evaluations")
    print(
        f"disk        {size(found.checkpoint + found.weights)}: checkpoint {size(found.checkpoint)} (twice that for a "
        f"moment), result {size(found.weights)}; {size(found.free)} are free"
    )
