"""c2c evaluate [FUSER | RECIPE.yaml]: accuracy of receiver, sharer, C2C, baselines and controls, with a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cache2cache.cli import options
from cache2cache.tasks import OPEN_TASKS, TASKS


def print_keys(wanted: bool) -> None:
    """Every key of a recipe."""
    if wanted:
        from cache2cache.config import EvalConfig

        options.print_keys(EvalConfig)


def evaluate(
    what: Annotated[
        str | None,
        typer.Argument(
            help="Fuser: folder or hub id; or a recipe (.yaml). Otherwise the packaged fuser.", metavar="[WHAT]"
        ),
    ] = None,
    subfolder: Annotated[
        list[str] | None, typer.Option(help="Where in the folder or repository the fuser is; once for each of several.")
    ] = None,
    fuser: Annotated[
        list[str] | None, typer.Option(help="In place of the argument, or a fuser for each further sharer; repeatable.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over recipe and options, see --keys; repeatable.")
    ] = None,
    keys: Annotated[
        bool,
        typer.Option(
            "--keys", callback=print_keys, is_eager=True, help="Print every key of a recipe, for --set too, and leave."
        ),
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join([*TASKS, *OPEN_TASKS])} or a .jsonl; of a recipe, one of its sets. Repeatable."),
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the question sets.  [default: validation, or a set's own]")
    ] = None,
    data_dir: options.DataDir = None,
    prompt: Annotated[str | None, typer.Option(help="paper, short, chinese or cot.  [default: paper]")] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="receiver, sharer, c2c, other, all by default; text, text-options, text-answer, few-shot, route, "
            "route-confidence; the controls zeroed, gaussian, self, off; receiver-generate. Repeatable."
        ),
    ] = None,
    answers: Annotated[
        str | None,
        typer.Option(help="likelihood, generation (in words, which takes longer) or both.  [default: likelihood]"),
    ] = None,
    skip: options.Skip = None,
    single: Annotated[
        Path | None, typer.Option(help="Also the receiver with this adapter, the baseline of c2c train's single.")
    ] = None,
    identical: Annotated[
        str | None, typer.Option(help="Also the receiver as its own sharer, with this fuser of c2c train's identical.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="That many questions of each set, drawn with the seed.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Questions at once.  [default: 16]")] = None,
    receiver: options.OtherReceiver = None,
    sharer: Annotated[
        list[str] | None, typer.Option(help="Instead of the fuser's own sharer; once for each of several.")
    ] = None,
    receiver_dtype: Annotated[str | None, typer.Option(help="What the receiver computes in.  [default: auto]")] = None,
    sharer_dtype: Annotated[str | None, typer.Option(help="What the sharer computes in.  [default: auto]")] = None,
    store: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder of a prefill store: the sharer's caches are read from it, missing ones put there first. Once "
            "for each of several sharers."
        ),
    ] = None,
    store_precision: options.StorePrecision = None,
    max_gb: Annotated[
        float | None, typer.Option(min=0, help="Refuse to put more than that into the store.  [default: 20]")
    ] = None,
    timing: Annotated[int | None, typer.Option(min=0, help="Also clock so many questions, one by one.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, max=options.MAX_SEED, help="Of the questions drawn, of noise and resampling.  [default: 0]"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for samples, summary and report.  [default: runs/evaluation]")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Folder that also gets numbers and ids, without text.")] = None,
) -> None:
    """Accuracy on question sets, and whether a gain is what the sharer knows or its mere presence.

    Run it again after an interruption: what stands in the output folder is not asked again.
    """
    from accelerate import PartialState
    from rich.console import Console

    from cache2cache import heap
    from cache2cache.config import EvalConfig, EvalTask
    from cache2cache.errors import C2CError
    from cache2cache.evaluation.report import tables
    from cache2cache.evaluation.run import run
    from cache2cache.training.recipe import checked, read_yaml, with_settings

    is_recipe = what is not None and what.endswith((".yaml", ".yml"))
    given: dict[str, Any] = {
        "fuser": [*([what] if what is not None and not is_recipe else []), *(fuser or [])] or None,
        "subfolder": subfolder, "split": split, "data_dir": data_dir, "prompt": prompt,
        "methods": method,
        "answers": answers, "skip": skip, "single": single, "identical": identical, "limit": limit,
        "batch_size": batch_size, "receiver": receiver, "sharer": sharer, "receiver_dtype": receiver_dtype,
        "sharer_dtype": sharer_dtype, "store": store, "store_precision": store_precision, "max_gb": max_gb,
        "timing": timing, "seed": seed, "output": output, "results": results,
    }  # fmt: skip
    recipe = read_yaml(Path(str(what))) if is_recipe else {}
    known = {e.label: e for e in map(EvalTask.model_validate, recipe.get("tasks", []))} if task is not None else {}
    given["tasks"] = task and [known[t].model_dump(exclude_unset=True) if t in known else t for t in task]
    recipe |= {name: value for name, value in given.items() if value is not None}
    config = checked(EvalConfig, with_settings(recipe, settings or []), str(what) if is_recipe else "c2c evaluate")
    heap.keep()
    summary = run(config)
    if summary:
        for table in tables(summary):
            Console().print(table)
        print(config.output / "report.html")
        for failure in summary["failed"]:
            Console(stderr=True).print(
                "failed: {task} {id}, {method} by {answers}: {error}".format(**failure), markup=False
            )
    PartialState().destroy_process_group()
    if summary:
        differs = sum(
            r.get("off_differs", 0)
            for way in summary.values()
            if isinstance(way, dict)
            for r in way.get("tasks", {}).values()
        )
        if summary["failed"] or differs:
            raise C2CError(
                f"{len(summary['failed'])} answers failed and count as wrong, and with fusion off {differs} differ "
                f"from the receiver's; the report is in {config.output}; run it again to ask the failed ones again"
            )
