"""c2c rewrite RECIPE OUT.jsonl --teacher MODEL: a teacher's answers to a recipe's prompts, as rows to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cache2cache.cli import options


def rewrite(
    recipe: Annotated[Path, typer.Argument(help="Training recipe (YAML), or rows (.jsonl, .jsonl.gz).")],
    output: Annotated[
        Path,
        typer.Argument(callback=options.file, help="File of JSON lines; rows that it has are not asked for again."),
    ],
    teacher: Annotated[
        str, typer.Option(help="A model as for --receiver of c2c ask, or an OpenAI-compatible http://host/v1.")
    ],
    model: Annotated[str | None, typer.Option(help="Of a served teacher: which model, where it has several.")] = None,
    settings: options.Settings = None,
    data_dir: options.DataDir = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer; a longer one is cut.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts, or requests to a server, at a time.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="0 answers greedily.")] = 0.0,
    dtype: Annotated[str, typer.Option(help="What a model here computes in.")] = "auto",
    extra_body: Annotated[
        str | None,
        typer.Option(help='Of a served teacher: JSON that is added to each request, such as {"top_p": 0.8}.'),
    ] = None,
) -> None:
    """Let a teacher answer a recipe's instruction rows. Run it again after an interruption: it goes on where it was."""
    from rich.console import Console

    from cache2cache.config import DataSource, is_address
    from cache2cache.errors import C2CError
    from cache2cache.models.load import load_lm
    from cache2cache.progress import Bar
    from cache2cache.training import rewrite as run
    from cache2cache.training.data import draw, without_held_out
    from cache2cache.training.recipe import read_recipe

    console = Console(stderr=True)
    try:
        more = json.loads(extra_body or "{}")
    except ValueError:
        more = None
    if not isinstance(more, dict):
        raise C2CError(f"--extra-body is {extra_body!r}; expected a JSON object in braces")
    seed = 0
    if recipe.name.endswith((".jsonl", ".jsonl.gz")):
        if settings:
            raise C2CError("--set goes over a recipe, and rows were given; write a recipe that names them as jsonl")
        sources = [DataSource(jsonl=recipe)]
    else:
        config = read_recipe(recipe, settings or [])
        seed, data_dir = config.drawn_by, data_dir or config.data_dir
        sources = [source for source in config.data if not source.task]
        if tasks := [source.name for source in config.data if source.task]:
            console.print(f"{', '.join(tasks)} stay as they are: questions have their answers")
    if not sources:
        raise C2CError(f"{recipe} has no instruction rows (rows or jsonl) to rewrite")
    if output.name.endswith(".gz"):
        raise C2CError(f"{output}: rows are appended one by one, to a file that isn't packed; name it .jsonl")
    if any(source.jsonl and source.jsonl.resolve() == output.resolve() for source in sources):
        raise C2CError(f"{output} is what would be rewritten; choose another file")
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    found = without_held_out([example for source in sources for example in draw(source, seed, data_dir)])
    if is_address(teacher):
        server = run.Server(teacher)
        name = model or server.model()
        answers = run.served(server, name, **how, parallel=batch_size, extra_body=more)
    else:
        if model:
            raise C2CError("--model is for a served teacher; name the model here with --teacher")
        if more:
            raise C2CError("--extra-body is for a served teacher; a model here takes the other options")
        lm = load_lm(teacher, None, **({} if dtype == "auto" else {"dtype": dtype}))
        name = lm.name
        answers = run.local(lm, **how, batch_size=batch_size)
        how["dtype"] = str(lm.dtype).removeprefix("torch.")
    with Bar(console) as bar:
        task = bar.add_task("rewriting", total=len(found))
        done = run.rewrite(
            found,
            output,
            name,
            answers,
            lambda there, failed: bar.update(task, completed=there, description=f"rewriting, {failed} failed"),
            {**how, **more},
        )
    console.print(f"{done.written} rows written, {done.there} were there, {len(done.failed)} failed")
    if done.failed:
        if not done.written + done.there:
            raise C2CError(f"no row could be rewritten; the first: {done.failed[0]}")
        console.print(f"the first that failed: {done.failed[0]}; run it again to try them once more", markup=False)
    print(output)
