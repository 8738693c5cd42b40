"""c2c fuser info PATH | convert SRC DST --to FORMAT | push FOLDER REPO_ID: look at fusers, rewrite and share them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options

app = typer.Typer(help="Look into fusers, convert and share them.", no_args_is_help=True)
Source = Annotated[str, typer.Argument(help="Fuser: a folder, a hub id or the name of a packaged one.")]
Revision = Annotated[str | None, typer.Option(help="Of the fuser on the hub.")]


@app.command()
def info(
    source: Source,
    revision: Revision = None,
    subfolder: options.Subfolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything, as JSON.")] = False,
) -> None:
    """What a fuser is: models, shapes, layer map, gates, size and how it was trained. Checks the whole file."""
    import json

    from cache2cache.fuser import checkpoint

    about = checkpoint.describe(checkpoint.resolve(source, revision, subfolder))
    if as_json:
        print(json.dumps(about, indent=2, ensure_ascii=False))
        return
    for role in ("receiver", "sharer"):
        one = about[role]
        layers = one["num_layers"] or "number of layers unknown"
        print(f"{role:<12}{one['name']}: layers {layers}, KV heads {one['num_kv_heads']} of {one['head_dim']}")
    size = f"hidden {about['hidden_dim']}, inner {about['intermediate_dim']}, depth {about['num_layers']}"
    print(f"{'fuser':<12}{about['variant']}, {size}, {about['parameters']:,} parameters")
    print(f"{'on disk':<12}{about['bytes'] / 1e6:,.1f} MB, {about['dtype']}, format {about['format']}")
    n, gates = about["fused_layers"], about["gates_open"]
    print(f"{'gates open':<12}" + (f"keys {gates['keys']}/{n}, values {gates['values']}/{n}" if gates else "no gates"))
    pairs = ", ".join(f"{t}←{s}" for t, s in about["layer_map"])
    print(f"{'layer map':<12}{pairs} (receiver←sharer)")
    print(f"{'token map':<12}{about['token_map']}")
    for name, said in checkpoint.history(about["training"]).items():
        print(f"{name.lower():<12}{said}")


@app.command()
def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(help="New folder.")],
    to: Annotated[str, typer.Option(help="ours, or published: the paper authors' layout.")],
    revision: Revision = None,
    subfolder: options.Subfolder = None,
) -> None:
    """Write a fuser again in the other format; what it computes stays the same."""
    from cache2cache.fuser import checkpoint

    checkpoint.convert(checkpoint.resolve(source, revision, subfolder), destination, to)
    print(destination)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a fuser.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub; made if it isn't there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a fuser with a model card; prints its address."""
    from cache2cache.fuser import checkpoint
    from cache2cache.fuser.hub import push as upload

    print(upload([checkpoint.resolve(folder)], repo_id, private=private))
