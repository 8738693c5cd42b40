"""c2c lm-eval [FUSER]: tasks of the lm-evaluation-harness, answered from fused caches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options


def lm_eval(
    tasks: Annotated[str, typer.Option(help="Tasks, groups or tags of the harness, with commas between.")],
    fuser: options.OneFuser = None,
    subfolder: options.Subfolder = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with tasks of your own, as YAML.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in front of a question.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in a chat, each model in its own template.")
    ] = False,
    system: options.System = None,
    method: Annotated[str, typer.Option(help="Who answers: c2c, receiver or sharer.")] = "c2c",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 16,
    receiver: options.Receiver = None,
    sharer: options.OtherSharer = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    output: Annotated[Path, typer.Option(callback=options.folder, help="Folder for results.json and samples.")] = Path(
        "runs/lm-eval"
    ),
) -> None:
    """Tasks of the lm-evaluation-harness, answered by C2C or by one of its models alone."""
    from cache2cache import heap
    from cache2cache.evaluation.lm_eval import run

    heap.keep()
    run(
        fuser,
        tasks=[task.strip() for task in tasks.split(",") if task.strip()],
        output=output,
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system,
        batch_size=batch_size,
        subfolder=subfolder,
        method=method,
        receiver=receiver,
        sharer=sharer,
        dtype=dtype,
        device=device,
    )
