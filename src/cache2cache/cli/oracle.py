"""c2c oracle enrich | transform | structure | plot: why cache communication works, on any models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options
from cache2cache.tasks import TASKS

app = typer.Typer(help="Oracle studies of caches: numbers as JSON, figures as PNG and SVG.", no_args_is_help=True)

Dtype = Annotated[str, typer.Option(help="What it computes in.")]
SETS = f"{', '.join(TASKS)} or a .jsonl"


def _show(output: Path, against: list[Path] | None) -> None:
    from rich.console import Console

    from cache2cache.oracle.report import show

    for table in show(output, against or []):
        Console().print(table)
    print(output)


@app.command()
def enrich(
    context: typer.Context,
    receiver: Annotated[str, typer.Option(help="The model: catalogue name, hub id, folder or GGUF file.")] = (
        "qwen2.5-coder-0.5b-instruct"
    ),
    task: Annotated[str, typer.Option(help=f"What is asked: {SETS}.")] = "mmlu",
    split: Annotated[str, typer.Option(help="Split of what is asked.")] = "validation",
    exemplars: Annotated[str, typer.Option(help="Where exemplars come from, by subject: likewise.")] = "mmlu",
    exemplar_split: Annotated[str, typer.Option(help="Split of the exemplars.")] = "dev",
    data_dir: options.DataDir = None,
    shots: Annotated[int, typer.Option(min=0, help="Exemplars.")] = 5,
    limit: Annotated[int, typer.Option(min=2, help="That many questions, evenly over the subjects.")] = 300,
    max_tokens: Annotated[int, typer.Option(min=1, help="Subjects with longer exemplars are left out.")] = 1024,
    positions: Annotated[
        str, typer.Option(help="Of the layers that are enriched: kept, or rotated back to Direct's.")
    ] = "kept",
    layers: Annotated[bool, typer.Option(help="Also layer by layer.")] = True,
    dtype: Dtype = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, help="Which questions, and which half chooses the layers.")
    ] = 0,
    against: options.Against = None,
    output: Annotated[Path, typer.Option(callback=options.folder, help="Folder of the results.")] = Path("runs/enrich"),
) -> None:
    """Is a cache better for having read exemplars, when their slots are gone again? And in which layers?

    Direct reads the question, Few-shot exemplars and question; Oracle is Few-shot's cache without the exemplars. Run it
    again after an interruption: what stands in the output folder is not computed again.
    """
    from cache2cache import heap
    from cache2cache.models import load_lm
    from cache2cache.oracle import enrich as study
    from cache2cache.oracle.report import check
    from cache2cache.tasks import load

    check(against or [], "enrich")
    asked, dev = load(task, split, data_dir), load(exemplars, exemplar_split, data_dir)
    heap.keep()
    study.run(
        load_lm(receiver, dtype=dtype),
        asked,
        dev,
        output,
        shots=shots,
        limit=limit,
        max_tokens=max_tokens,
        positions=positions,
        layers=layers,
        seed=seed,
        data={"task": task, "split": split, "exemplars": exemplars, "exemplar_split": exemplar_split},
        command=options.typed(context),
    )
    _show(output, against)


@app.command()
def transform(
    context: typer.Context,
    receiver: Annotated[str, typer.Option(help="Whose cache is predicted.")] = "qwen2.5-coder-0.5b-instruct",
    sharer: Annotated[str, typer.Option(help="From whose.")] = "qwen2.5-coder-1.5b-instruct",
    task: Annotated[str, typer.Option(help=f"{SETS}; whole prompts are read.")] = "arc-easy",
    train_split: Annotated[str, typer.Option(help="Split that is trained on.")] = "train",
    test_task: Annotated[str | None, typer.Option(help="Another set to test on.  [default: the same]")] = None,
    test_split: Annotated[str, typer.Option(help="Split that is tested on.")] = "validation",
    data_dir: options.DataDir = None,
    train_limit: Annotated[int, typer.Option(min=16, help="Questions to train on.")] = 300,
    test_limit: Annotated[int, typer.Option(min=1, help="Questions to test on.")] = 150,
    layer: Annotated[list[int] | None, typer.Option(help="Receiver layer; repeatable.  [default: all]")] = None,
    layer_map: Annotated[str, typer.Option(help="terminal, last_aligned or k_nearest.")] = "terminal",
    key_space: Annotated[str, typer.Option(help="rotated: keys as they are; unrotated: without position.")] = (
        "unrotated"
    ),
    hidden_dim: Annotated[int, typer.Option(min=1, help="Hidden width of the MLP.")] = 512,
    start: Annotated[str, typer.Option(help="The MLP starts as the ridge regression, or at random.")] = "ridge",
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the positions.")] = 10,
    batch_size: Annotated[int, typer.Option(min=1, help="Positions a step.")] = 512,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW, falling to zero.")] = 1e-3,
    train_positions: Annotated[int, typer.Option(min=1, help="Drawn from each question to train on.")] = 32,
    test_positions: Annotated[int, typer.Option(min=1, help="Drawn from each question to test on.")] = 16,
    tsne_layer: Annotated[int | None, typer.Option(help="Receiver layer of the map.  [default: the highest]")] = None,
    tsne_samples: Annotated[int, typer.Option(min=2, help="Positions in the map.")] = 300,
    perplexity: Annotated[float, typer.Option(min=1, help="Of t-SNE.")] = 50.0,
    receiver_dtype: Dtype = "auto",
    sharer_dtype: Dtype = "auto",
    seed: Annotated[
        int, typer.Option(min=0, max=options.MAX_SEED, help="Of draws, order, first weights and t-SNE.")
    ] = 0,
    against: options.Against = None,
    output: Annotated[Path, typer.Option(callback=options.folder, help="Folder of the results.")] = Path(
        "runs/transform"
    ),
) -> None:
    """Can a sharer's cache be turned into the receiver's, and does the receiver answer from it?

    An MLP, ridge regression and the mean are fitted on some questions and measured on others. Run it again after an
    interruption: what was read and trained is found in the output folder.
    """
    from cache2cache import heap
    from cache2cache.evaluation.answers import drawn
    from cache2cache.models import load_lm
    from cache2cache.oracle import transform as study
    from cache2cache.oracle.report import check
    from cache2cache.tasks import load

    check(against or [], "transform")
    train = drawn(load(task, train_split, data_dir), train_limit, seed)
    test = drawn(load(test_task or task, test_split, data_dir), test_limit, seed)
    heap.keep()
    main = load_lm(receiver, dtype=receiver_dtype)
    same = (sharer, sharer_dtype) == (receiver, receiver_dtype)
    study.run(
        main,
        main if same else load_lm(sharer, dtype=sharer_dtype),
        train,
        test,
        output,
        layers=layer,
        layer_map=layer_map,
        key_space=key_space,
        hidden_dim=hidden_dim,
        start=start,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        train_positions=train_positions,
        test_positions=test_positions,
        tsne_layer=tsne_layer,
        tsne_samples=tsne_samples,
        perplexity=perplexity,
        seed=seed,
        data={"task": task, "train_split": train_split, "test_task": test_task or task, "test_split": test_split},
        command=options.typed(context),
    )
    _show(output, against)


@app.command()
def structure(
    context: typer.Context,
    fuser: options.OneFuser = None,
    subfolder: options.Subfolder = None,
    count: Annotated[int, typer.Option(min=2, help="Generated questions, a third of each kind.")] = 210,
    setting: Annotated[
        list[str] | None, typer.Option(help="both models read the document, or only the sharer (private); repeatable.")
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="What the sharer may write: tell (anything), published (no answer); repeatable."),
    ] = None,
    max_message_tokens: Annotated[int, typer.Option(min=1, help="Longest message of the sharer.")] = 64,
    batch_size: Annotated[int, typer.Option(min=2, help="Documents at once.")] = 8,
    receiver: options.Receiver = None,
    sharer: options.OtherSharer = None,
    receiver_dtype: Dtype = "auto",
    sharer_dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(min=0, max=options.MAX_SEED, help="Of the generated documents.")] = 0,
    against: options.Against = None,
    output: Annotated[Path, typer.Option(callback=options.folder, help="Folder of the results.")] = Path(
        "runs/structure"
    ),
) -> None:
    """What text loses and a cache keeps: roles and nesting in markup, keys in JSON, argument order in code.

    Without --setting both settings are run, without --text the sharer may tell anything. Run it again after an
    interruption: what stands in the output folder is not asked again.
    """
    from cache2cache import heap
    from cache2cache.evaluation.loading import load_pair
    from cache2cache.oracle import structure as study
    from cache2cache.oracle.report import check

    check(against or [], "structure")
    heap.keep()
    pair, data = load_pair([fuser], [subfolder], (receiver, receiver_dtype), ([sharer], sharer_dtype))
    study.run(
        pair,
        output,
        count=count,
        settings=setting or list(study.SETTINGS),
        forms=text or ["tell"],
        max_message_tokens=max_message_tokens,
        batch_size=batch_size,
        seed=seed,
        data=data,
        command=options.typed(context),
    )
    _show(output, against)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="Output folders of one c2c oracle command.")],
    output: Annotated[Path, typer.Option(callback=options.folder, help="Folder of the figures.")] = Path(
        "runs/figures"
    ),
) -> None:
    """Draw finished runs of one study into the same figures, such as of other models."""
    from cache2cache.oracle.report import draw_together

    for name in draw_together(runs, output):
        print(output / f"{name}.svg")
