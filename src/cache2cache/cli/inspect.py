"""c2c inspect FUSER "prompt": one prompt as a page to look into, which opens from a file and loads nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cache2cache.cli import options


def inspect(
    context: typer.Context,
    fuser: Annotated[str, typer.Argument(help="Fuser: folder, hub id or a packaged one's name ('default').")],
    prompt: Annotated[str, typer.Argument(help="What the user says.")],
    prefix: Annotated[str, typer.Option(help="Start of the answer, behind which the next token is looked at.")] = "",
    system: options.System = None,
    subfolder: options.Subfolder = None,
    receiver: options.OtherReceiver = None,
    sharer: options.OtherSharer = None,
    receiver_dtype: options.ReceiverDtype = "auto",
    sharer_dtype: options.SharerDtype = "auto",
    output: Annotated[
        Path, typer.Option(callback=options.file, help="The page; its numbers go beside it as .json.")
    ] = Path("inspect.html"),
) -> None:
    """Token map, layer map, gates, weights per token and layer, and next tokens of receiver, sharer and C2C."""
    from cache2cache.analysis.inspect import run
    from cache2cache.analysis.runs import Setup
    from cache2cache.errors import C2CError

    if not prompt.strip():
        raise C2CError("the prompt is empty; give some text")
    if output.suffix.lower() not in (".html", ".htm"):
        raise C2CError(f"the page {output} has another ending than .html; give one with it")
    messages = [{"role": "system", "content": system}] if system else []
    setup = Setup(
        fuser,
        output,
        subfolder=subfolder,
        receiver=(receiver, receiver_dtype),
        sharer=(sharer, sharer_dtype),
        command=options.typed(context),
    )
    data = run(setup, [*messages, {"role": "user", "content": prompt}], prefix=prefix)
    for who, label in (("receiver", "receiver"), ("sharer", "sharer"), ("c2c", "C2C")):
        shown = ", ".join(f"{token!r} {100 * p:.1f}%" for token, p in data["next"][who]["tokens"][:3])
        print(f"{label:<10}{shown}")
    count = len(data["receiver"]["tokens"])
    print(f"{len(data['fused'])} of {count} tokens fused; {output}, {output.stat().st_size:,} bytes")
