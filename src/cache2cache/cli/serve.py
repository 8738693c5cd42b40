"""c2c serve and c2c demo: an OpenAI-compatible server of pairs, and a page where one sees the difference."""

from __future__ import annotations

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache2cache.cli import options
from cache2cache.errors import C2CError

if TYPE_CHECKING:
    from cache2cache.serving.engine import PairEngine

KEYS_VARIABLE = "C2C_API_KEYS"
GRADIO = "6.12"  # as in pyproject.toml: the page uses what came with it

Fusers = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[[NAME=]FUSER]...",
        help="Fusers: folders or hub ids, each a model of that name.  [default: the one that comes along, as default]",
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all, which takes a key.")]
Waiting = Annotated[int, typer.Option(min=1, help="Requests that may wait for a model; more are told to come back.")]
Batch = Annotated[int, typer.Option(min=1, help="Answers that are written together.")]
NewTokens = Annotated[int, typer.Option(min=1, help="The longest answer that may be asked for, in tokens.")]
Keep = Annotated[
    int, typer.Option(min=0, help="Memory for each pair's earlier turns, so that a later one reads only what is new.")
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take, its wait included.")]
Grace = Annotated[int, typer.Option(min=0, help="Seconds that running requests may take to end after Ctrl-C.")]


def serve(
    fuser: Fusers = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 8000,
    receiver: options.Receiver = None,
    sharer: options.Sharers = None,
    subfolder: options.Subfolders = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_waiting: Waiting = 64,
    max_batch: Batch = 16,
    max_new_tokens: NewTokens = 1024,
    keep_mb: Keep = 512,
    timeout: Timeout = 600.0,
    grace: Grace = 60,
    warmup: Annotated[bool, typer.Option("--warmup", help="Answer once in each way before taking requests.")] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts and answers too.")] = False,
    ui: Annotated[
        bool | None, typer.Option("--ui/--no-ui", help="The page under /ui.  [default: where gradio is installed]")
    ] = None,
) -> None:
    """Serve pairs as the OpenAI API has it until Ctrl-C: /v1/chat/completions, /v1/completions, /v1/models.

    NAME:receiver, NAME:sharer and NAME:text are a pair's receiver alone, its sharer alone and text-to-text.
    With the environment variable C2C_API_KEYS set (one or more, with commas), only who sends one of them is answered.
    """
    limits = {
        "max_waiting": max_waiting,
        "max_batch": max_batch,
        "max_new_tokens": max_new_tokens,
        "keep_bytes": keep_mb << 20,
        "silence": timeout,
    }
    engines = _engines(fuser, receiver, sharer, subfolder, dtype, device, limits, warmup)
    _run(engines, host, port, timeout, grace, log_prompts, ui, "serving {names} at {address}/v1; Ctrl-C stops it")


def demo(
    fuser: Fusers = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 for a free one.")] = 7860,
    receiver: options.Receiver = None,
    sharer: options.Sharers = None,
    subfolder: options.Subfolders = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """A page on which each question is answered in four ways side by side; the same server as c2c serve."""
    engines = _engines(fuser, receiver, sharer, subfolder, dtype, device, {}, True)
    _run(engines, host, port, 600.0, 5, False, True, "the page is at {address}/ui; Ctrl-C stops it")


def _engines(
    fusers: list[str] | None,
    receiver: str | None,
    sharers: list[str] | None,
    subfolders: list[str] | None,
    dtype: str | None,
    device: str | None,
    limits: dict[str, Any],
    warmup: bool,
) -> list[PairEngine]:
    try:
        from cache2cache.serving.engine import Limits, PairEngine, PairSpec
        from cache2cache.serving.openai import check_names, log_line
    except ImportError as error:
        raise C2CError(
            f"serving needs the package {error.name}; install it with: pip install 'cache2cache[serve]'"
        ) from error
    named: list[tuple[str, str | None]] = [_named(given) for given in fusers or []] or [("default", None)]
    check_names([name for name, _ in named])
    if len(named) > 1 and (receiver or sharers or subfolders):
        raise C2CError("--receiver, --sharer and --subfolder are for one fuser; several run with their own models")
    if subfolders and len(subfolders) > 1:  # one pair with several sharers
        ((name, place),) = named
        specs = [(name, PairSpec(place, list(subfolders), receiver, sharers, dtype, device))]
    else:
        inside = subfolders[0] if subfolders else None
        specs = [(name, PairSpec(place, inside, receiver, sharers, dtype, device)) for name, place in named]
    return [PairEngine(name, spec, Limits(**limits), warmup=warmup, log=log_line) for name, spec in specs]


def _named(given: str) -> tuple[str, str]:
    """Name and place of a fuser: NAME=FUSER, or named after the last part of its path."""
    name, equals, place = given.partition("=")
    if equals and not os.path.exists(given):
        return name, place
    return PurePath(given.rstrip("/")).name, given


def _run(
    engines: list[PairEngine],
    host: str,
    port: int,
    timeout: float,
    grace: int,
    log_prompts: bool,
    ui: bool | None,
    says: str,
) -> None:
    from cache2cache.serving import openai
    from cache2cache.serving.http import is_loopback
    from cache2cache.serving.metrics import Metrics

    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if not keys and not is_loopback(host):
        raise C2CError(f"{host} can be reached from other machines, so a key is needed; set {KEYS_VARIABLE}")
    found = None if ui is False else _installed("gradio")
    enough = found is not None and _numbers(found) >= _numbers(GRADIO)
    if ui and not enough:
        raise C2CError(
            f"the page needs gradio {GRADIO} or newer, {found or 'none'} is installed; "
            "install it with: pip install 'cache2cache[demo]'"
        )
    if found and not enough:
        print(f"no page: it needs gradio {GRADIO} or newer, {found} is installed", file=sys.stderr)
    names = ", ".join(engine.name for engine in engines)
    metrics = Metrics(engines)

    def make() -> Any:
        app = openai.make_app(
            engines, keys=keys, timeout=timeout, log=openai.log_line, log_prompts=log_prompts, metrics=metrics
        )
        if enough:
            from cache2cache.serving.page import mount

            app = mount(app, engines, metrics, keys=keys)
        return app

    def ready(address: str) -> None:
        print(says.format(names=names, address=address), file=sys.stderr, flush=True)

    print(f"loading the models of {names} …", file=sys.stderr, flush=True)
    openai.serve(engines, host, port, ready=ready, make=make, grace=grace)


def _installed(package: str) -> str | None:
    """Its version; None where it isn't installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(said: str) -> list[int]:
    """Major and minor version."""
    return [int(part) for part in said.split(".")[:2]]
