"""c2c analyze rank | gates | positions | agreement: looking inside a pair, with numbers and figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache2cache.cli import options
from cache2cache.tasks import TASKS

if TYPE_CHECKING:
    from cache2cache.analysis.runs import Data, Setup

app = typer.Typer(help="Look inside a pair: numbers as JSON, figures as PNG and SVG.", no_args_is_help=True)

Tasks = Annotated[list[str] | None, typer.Option("--task", help=f"{', '.join(TASKS)} or a .jsonl; repeatable.")]
Split = Annotated[str, typer.Option(help="Split of the question sets.")]
Put = Annotated[str, typer.Option(help="How questions are put: paper or short.")]
Jsonl = Annotated[Path | None, typer.Option(help="Instead of questions, instruction rows.")]
Text = Annotated[Path | None, typer.Option(help="Instead of questions, a file with a prompt in each line.")]
BatchSize = Annotated[int, typer.Option(min=2, help="Prompts at once.")]
Seed = Annotated[int, typer.Option(min=0, max=options.MAX_SEED, help="Which of the prompts a limit takes.")]
DEFAULT_TASKS = ("arc-easy", "openbookqa")


@app.command()
def rank(
    context: typer.Context,
    fuser: options.OneFuser = None,
    subfolder: options.Subfolder = None,
    task: Tasks = None,
    split: Split = "validation",
    data_dir: options.DataDir = None,
    prompt: Put = "paper",
    jsonl: Jsonl = None,
    text: Text = None,
    limit: Annotated[int, typer.Option(min=2, help="That many prompts of each set.")] = 150,
    batch_size: BatchSize = 8,
    receiver: options.OtherReceiver = None,
    sharer: options.OtherSharer = None,
    receiver_dtype: options.ReceiverDtype = "auto",
    sharer_dtype: options.SharerDtype = "auto",
    store: options.Prefills = None,
    store_precision: options.StorePrecision = None,
    max_gb: options.MaxGb = 20.0,
    seed: Seed = 0,
    against: options.Against = None,
    output: Annotated[
        Path, typer.Option(callback=options.folder, help="Folder for result.json and the figure.")
    ] = Path("runs/rank"),
) -> None:
    """Effective rank of keys and values, layer by layer: sharer, receiver, fused.

    Run it again after an interruption: it goes on where it was.
    """
    from cache2cache.analysis.rank import run

    result = run(*_given(context), against or [])
    for who in ("sharer", "receiver", "fused"):
        keys, values = result[who]["keys"]["rank"], result[who]["values"]["rank"]
        print(f"{who:<10}keys {keys['mean']:7.1f}  values {values['mean']:7.1f}  of {result[who]['width']}")
    print(f"{result['tokens']:,} tokens; {output / 'result.json'}, rank.png and rank.svg beside it")


@app.command()
def gates(
    context: typer.Context,
    fuser: options.OneFuser = None,
    subfolder: options.Subfolder = None,
    task: Tasks = None,
    split: Split = "validation",
    data_dir: options.DataDir = None,
    prompt: Put = "paper",
    jsonl: Jsonl = None,
    text: Text = None,
    limit: Annotated[
        int, typer.Option(min=0, help="That many prompts of each set; 0: the gates alone, no model is loaded.")
    ] = 100,
    closing: Annotated[bool, typer.Option(help="Also close the layers one by one and measure the loss.")] = True,
    batch_size: BatchSize = 8,
    receiver: options.OtherReceiver = None,
    sharer: options.OtherSharer = None,
    receiver_dtype: options.ReceiverDtype = "auto",
    sharer_dtype: options.SharerDtype = "auto",
    store: options.Prefills = None,
    store_precision: options.StorePrecision = None,
    max_gb: options.MaxGb = 20.0,
    seed: Seed = 0,
    against: options.Against = None,
    output: Annotated[
        Path, typer.Option(callback=options.folder, help="Folder for result.json and the figures.")
    ] = Path("runs/gates"),
) -> None:
    """Which layers are open, how large the weights are over data, and what closing each layer costs.

    Run it again after an interruption: it goes on where it was.
    """
    from cache2cache.analysis.gates import run

    result = run(*_given(context), against or [], closing=closing)
    count = len(result["receiver_layers"])
    print(f"open      keys {sum(result['keys']['open'])}/{count}, values {sum(result['values']['open'])}/{count}")
    if "weights" in result:
        large = result["weights"]["large_of_open"]
        share = "nothing is open" if large is None else f"{100 * large:.1f}% of the open layers' are above 0.4"
        print(f"weights   {result['positions']:,} positions; {share}")
    if "closing" in result:
        found = result["closing"]
        layers = zip(result["receiver_layers"], found["both"], strict=True)
        order = sorted(layers, key=lambda one: -one[1]["change"])
        dearest = ", ".join(f"{layer} ({one['change']:+.4f})" for layer, one in order[:3])
        print(f"loss      {found['loss']:.4f} nats a token; all closed {found['all_closed']['change']:+.4f}")
        print(f"closing   costs most in layers {dearest}")
    print(f"{output / 'result.json'}, figures beside it")


@app.command()
def positions(
    context: typer.Context,
    fuser: options.OneFuser = None,
    subfolder: options.Subfolder = None,
    task: Tasks = None,
    split: Split = "validation",
    data_dir: options.DataDir = None,
    prompt: Put = "paper",
    limit: Annotated[int, typer.Option(min=2, help="That many questions of each set.")] = 150,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Share of the positions from either side; repeatable.  [default: 0.1, 0.25, 0.5, 0.75, 0.9]"),
    ] = None,
    batch_size: BatchSize = 8,
    receiver: options.OtherReceiver = None,
    sharer: options.OtherSharer = None,
    receiver_dtype: options.ReceiverDtype = "auto",
    sharer_dtype: options.SharerDtype = "auto",
    store: options.Prefills = None,
    store_precision: options.StorePrecision = None,
    max_gb: options.MaxGb = 20.0,
    seed: Seed = 0,
    against: options.Against = None,
    output: Annotated[
        Path, typer.Option(callback=options.folder, help="Folder for answers, result.json and the figure.")
    ] = Path("runs/positions"),
) -> None:
    """Accuracy where only some positions are fused: from the front, from the back, content, template.

    Run it again after an interruption: what stands in the output folder is not computed again.
    """
    from cache2cache.analysis.positions import SHARES, run

    run(*_given(context), against or [], shares=share or SHARES)
    print(f"{output / 'result.json'}, positions.png and positions.svg beside it")


@app.command()
def agreement(
    context: typer.Context,
    runs: Annotated[list[Path], typer.Argument(help="Output folders of c2c evaluate, with receiver, sharer and c2c.")],
    bins: Annotated[int, typer.Option(min=2, help="Parts by the sharer's confidence.")] = 5,
    output: Annotated[
        Path, typer.Option(callback=options.folder, help="Folder for result.json and the figures.")
    ] = Path("runs/agreement"),
) -> None:
    """Which questions receiver, sharer, text-to-text and C2C get right together; several runs side by side."""
    from cache2cache.analysis.agreement import run

    run(runs, output, bins=bins, command=options.typed(context))
    print(f"{output / 'result.json'}, figures beside it")


def _given(context: typer.Context) -> tuple[Setup, Data]:
    """The options that the commands on a pair share."""
    from cache2cache import heap
    from cache2cache.analysis.runs import Data, Setup

    heap.keep()
    given: dict[str, Any] = context.params
    setup = Setup(
        given["fuser"],
        given["output"],
        subfolder=given["subfolder"],
        receiver=(given["receiver"], given["receiver_dtype"]),
        sharer=(given["sharer"], given["sharer_dtype"]),
        store=(given["store"], given["store_precision"]),
        max_bytes=int(given["max_gb"] * 1e9),
        batch_size=given["batch_size"],
        seed=given["seed"],
        command=options.typed(context),
    )
    files = given.get("jsonl"), given.get("text")
    return setup, Data(
        tasks=given["task"] or (() if any(files) else DEFAULT_TASKS),
        split=given["split"],
        data_dir=given["data_dir"],
        prompt=given["prompt"],
        jsonl=files[0],
        text=files[1],
        limit=given["limit"],
    )
