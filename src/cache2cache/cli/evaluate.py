"""c2c evaluate [FUSER]: accuracy of receiver, sharer, C2C (also skipping), the control and text-to-text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options
from cache2cache.tasks import TASKS


def evaluate(
    fuser: Annotated[str | None, typer.Argument(help="Fuser: folder or hub id; otherwise the packaged one.")] = None,
    subfolder: Annotated[str | None, typer.Option(help="Where in the folder or repository the fuser is.")] = None,
    task: Annotated[list[str] | None, typer.Option(help=f"{', '.join(TASKS)} or a .jsonl; repeatable.")] = None,
    split: Annotated[str, typer.Option(help="Split of the question sets.")] = "validation",
    data_dir: Annotated[Path | None, typer.Option(help="Local mirror of the data sets; the hub without it.")] = None,
    prompt: Annotated[str, typer.Option(help="paper or short.")] = "paper",
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="receiver, sharer, c2c, other, all by default; receiver-generate, text: these write, which takes "
            "longer. Repeatable."
        ),
    ] = None,
    skip: options.Skip = None,
    single: Annotated[
        Path | None, typer.Option(help="Also the receiver with this adapter, the baseline of c2c train's single.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=2, help="Only the first questions of each set.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Questions at once.")] = 16,
    receiver: Annotated[str | None, typer.Option(help="Instead of the fuser's own receiver.")] = None,
    sharer: Annotated[str | None, typer.Option(help="Instead of the fuser's own sharer.")] = None,
    receiver_dtype: Annotated[str, typer.Option(help="What the receiver computes in.")] = "auto",
    sharer_dtype: Annotated[str, typer.Option(help="What the sharer computes in.")] = "auto",
    store: options.Prefills = None,
    store_precision: options.StorePrecision = None,
    max_gb: Annotated[float, typer.Option(min=0, help="Refuse to put more than that into the store.")] = 20.0,
    output: Annotated[Path, typer.Option(help="Folder for samples.jsonl and summary.json.")] = Path("runs/evaluation"),
) -> None:
    """Accuracy on question sets, and how much of the gain another question's cache would give as well.

    Run it again after an interruption: what stands in the output folder is not asked again.
    """
    from cache2cache import heap
    from cache2cache.evaluation.likelihood import METHODS, SINGLE, SKIP
    from cache2cache.evaluation.report import run

    heap.keep()
    extra = [name for name, given in ((SKIP, skip), (SINGLE, single)) if given is not None]
    run(
        fuser,
        subfolder=subfolder,
        tasks=task or ["arc-easy", "openbookqa"],
        split=split,
        data_dir=data_dir,
        prompt=prompt,
        methods=list(dict.fromkeys([*(method or METHODS), *extra])),
        skip=skip,
        single=single,
        limit=limit,
        batch_size=batch_size,
        receiver=(receiver, receiver_dtype),
        sharer=(sharer, sharer_dtype),
        output=output,
        store=(store, store_precision),
        max_bytes=int(max_gb * 1e9),
    )
