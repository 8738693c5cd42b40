"""c2c sharer serve: a model that reads prompts for pairs on other machines."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from cache2cache.cli import options
from cache2cache.errors import C2CError

app = typer.Typer(help="Run a sharer apart from its receiver.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    # Keeps `serve` a command of its own although it is the only one.
    pass


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="The sharer: catalogue name, hub id, folder or GGUF file.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all, which takes a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8600,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="The most positions of one request: prompts times the longest of them.")
    ] = 16384,
    keep_mb: Annotated[
        int, typer.Option(min=0, help="Memory for what was read lately, so that a later turn reads only what is new.")
    ] = 256,
) -> None:
    """Serve the sharer's caches until Ctrl-C. Pairs name its address instead of a model: --sharer http://HOST:PORT

    With the environment variable C2C_SHARER_KEY set, only who sends the same key is answered.
    """
    try:
        from cache2cache.serving import sharer as service
        from cache2cache.serving.http import is_loopback
    except ImportError as error:
        raise C2CError(
            f"serving needs the package {error.name}; install it with: pip install 'cache2cache[serve]'"
        ) from error
    from cache2cache import heap
    from cache2cache.models import load_lm
    from cache2cache.remote import KEY_VARIABLE, key_of

    key = key_of(os.environ.get(KEY_VARIABLE))
    if not key and not is_loopback(host):
        raise C2CError(
            f"{host} can be reached from other machines, so a key is needed; set {KEY_VARIABLE} here and where the "
            "pair runs"
        )
    heap.keep()
    print(f"loading {model} …", file=sys.stderr, flush=True)
    lm = load_lm(model, dtype=dtype or "auto", device=device)
    sharer = service.Sharer(lm, max_tokens=max_tokens, keep_bytes=keep_mb << 20)

    def ready(address: str) -> None:
        print(f"serving {lm.name} at {address}; Ctrl-C stops it", file=sys.stderr, flush=True)

    service.serve(sharer, host, port, key, ready)
