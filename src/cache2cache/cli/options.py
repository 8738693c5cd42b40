"""Options that several commands share, and the pair that they name."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from pydantic import BaseModel

    from cache2cache.pair import C2C

MAX_SEED = 2**32 - 1  # of NumPy
Fusers = Annotated[
    list[str] | None,
    typer.Option(
        "--fuser",
        help="Fuser: a folder or a hub id; once for each of several sharers.  [default: the one that comes along]",
    ),
]
Subfolders = Annotated[
    list[str] | None,
    typer.Option("--subfolder", help="Where in the folder or repository the fuser is; once for each of several."),
]
OneFuser = Annotated[str | None, typer.Argument(help="Fuser: folder or hub id; otherwise the packaged one.")]
Subfolder = Annotated[str | None, typer.Option(help="Where in the folder or repository the fuser is.")]
OtherReceiver = Annotated[str | None, typer.Option(help="Instead of the fuser's own receiver.")]
OtherSharer = Annotated[str | None, typer.Option(help="Instead of the fuser's own sharer.")]
ReceiverDtype = Annotated[str, typer.Option(help="What the receiver computes in.")]
SharerDtype = Annotated[str, typer.Option(help="What the sharer computes in.")]
Receiver = Annotated[
    str | None,
    typer.Option(
        help="Receiver: catalogue name, hub id, folder or GGUF file.  [default: the one the fuser was trained for]"
    ),
]
Sharers = Annotated[
    list[str] | None,
    typer.Option(
        "--sharer",
        help="Sharer, likewise; or http://host:port, where `c2c sharer serve` runs. Once for each of several.",
    ),
]
Dtype = Annotated[str | None, typer.Option(help="Number format of the weights.  [default: float32, on a GPU bfloat16]")]
Device = Annotated[
    str | None, typer.Option(help="Where the models run, such as cpu or cuda:0.  [default: GPU if there is one]")
]
System = Annotated[str | None, typer.Option(help="System message.")]
Skip = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Leave out the sharer where the receiver alone is at least this confident; see c2c calibrate.",
    ),
]
Prefills = Annotated[
    Path | None,
    typer.Option(help="Folder of a prefill store: the sharer's caches are read from it, missing ones put there first."),
]
MaxGb = Annotated[float, typer.Option(min=0, help="Refuse to put more than that into the store.")]
StorePrecision = Annotated[str | None, typer.Option(help="Of a new store, bfloat16 or int8.  [default: bfloat16]")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE over the recipe, such as epochs=2 or data.0.limit=100; repeatable."),
]
DataDir = Annotated[Path | None, typer.Option(help="Local mirror of the data sets; the hub without it.")]
Against = Annotated[
    list[Path] | None, typer.Option(help="Output folder of another such run, drawn in the same figures; repeatable.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]


def folder(value: Path | None) -> Path | None:
    """The callback of an option that names an output folder: said before anything is loaded."""
    from cache2cache.files import check_writable

    if value is not None:
        check_writable(value)
    return value


def file(value: Path | None) -> Path | None:
    """The same of an output file."""
    from cache2cache.errors import C2CError

    if value is not None:
        if value.is_dir():
            raise C2CError(f"{value} is a folder; expected a file to write")
        folder(value.parent)
    return value


def typed(context: typer.Context) -> str:
    """The command line with what was given, as a shell takes it."""
    words = [context.command_path]
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE":
            continue
        value = context.params[name]
        flag = [] if parameter.param_type_name == "argument" else [max(parameter.opts, key=len)]
        if isinstance(value, bool):
            words += flag if value else parameter.secondary_opts
            continue
        for one in value if isinstance(value, (list, tuple)) else [value]:
            words += [*flag, shlex.quote(str(one))]
    return " ".join(words)


def print_keys(model: type[BaseModel]) -> NoReturn:
    """Every key of a recipe with type and default, and what it means below it; then leave."""
    import shutil
    import textwrap

    from cache2cache.training.recipe import keys

    width = min(120, shutil.get_terminal_size().columns)
    for key in keys(model):
        print(f"{key.name}: {key.type}" + (f" = {key.default}" if key.default else ", to be given"))
        print(textwrap.fill(key.description, width, initial_indent="    ", subsequent_indent="    "))
    raise typer.Exit()


def load_pair(
    fusers: list[str] | None,
    subfolders: list[str] | None,
    receiver: str | None,
    sharers: list[str] | None,
    dtype: str | None,
    device: str | None,
) -> C2C:
    """Load the pair, fetching what is missing, and read one word with it.

    The first prompt of a process pays for threads, buffers and pages that no later one pays for; no answer's clock
    should hold that. What is printed goes to stderr.
    """
    from cache2cache import heap
    from cache2cache.pair import C2C

    heap.keep()
    print("loading the models …", file=sys.stderr, flush=True)
    pair = C2C.from_pretrained(
        fusers or None,
        subfolder=subfolders or None,
        receiver=receiver,
        sharers=sharers or None,
        dtype=dtype,
        device=device,
    )
    names = ", ".join(sharer.name for sharer in pair.sharers)
    print(f"receiver {pair.receiver.name}, sharer {names}", file=sys.stderr, flush=True)
    pair.chat([{"role": "user", "content": "Hello"}], max_new_tokens=1)
    return pair
