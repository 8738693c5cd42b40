"""The command line `c2c`: one small file per command, nothing but arguments and printing.

The commands' modules import only typer at the top; torch and transformers are imported inside the functions, so that
`c2c --help` stays quick. Every expected failure ends here as one line on stderr.
"""

from __future__ import annotations

import errno
import sys
import warnings
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from cache2cache import __version__
from cache2cache.cli import (
    analyze,
    ask,
    calibrate,
    chat,
    chat_quality,
    compare,
    evaluate,
    fuser,
    inspect,
    lm_eval,
    models,
    oracle,
    precompute,
    report,
    rewrite,
    serve,
    sharer,
    train,
)
from cache2cache.errors import C2CError


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _leave("interrupted", 130)


app = typer.Typer(
    name="c2c",
    cls=_Group,
    help="Language models that talk through their key-value caches.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(ask.ask)
app.command()(chat.chat)
app.command()(precompute.precompute)
app.command()(rewrite.rewrite)
app.command()(train.train)
app.command()(evaluate.evaluate)
app.command()(chat_quality.chat_quality)
app.command()(lm_eval.lm_eval)
app.command()(compare.compare)
app.command()(report.report)
app.command()(calibrate.calibrate)
app.command()(inspect.inspect)
app.add_typer(analyze.app, name="analyze")
app.add_typer(oracle.app, name="oracle")
app.command()(serve.serve)
app.command()(serve.demo)
app.add_typer(models.app, name="models")
app.add_typer(fuser.app, name="fuser")
app.add_typer(sharer.app, name="sharer")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"cache2cache {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
) -> None:
    # --debug is read by main(), which also sees it behind the command's name.
    pass


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            app(args=arguments, prog_name="c2c")
    except C2CError as error:
        if debug:
            raise
        _leave(f"error: {error}", 1)
    except OSError as error:
        if debug:
            raise
        _leave(f"error: {_os_error(error)}", 1)
    except Exception as error:
        if debug:
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which needn't be imported for that
            _leave(f"error: {_out_of_memory(str(error))}", 1)
        _leave(f"error: unexpected {type(error).__name__}: {error}; run again with --debug for the traceback", 1)


def _print_warning(message: Warning | str, *where: Any, **more: Any) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr)


def _os_error(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk{where}; free some, or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{where}; choose another folder, or change its permissions"
    return f"{error.strerror or type(error).__name__}{where or f': {error}'}; run again with --debug for the traceback"


def _out_of_memory(said: str) -> str:
    """What torch says in several sentences, of which the first ones hold the sizes."""
    sizes = ". ".join(said.split(". ")[:3]).rstrip(".")
    return (
        f"{sizes}; take fewer rows at once (--batch-size; of a training recipe batch_size, or accumulate, which keeps "
        "its result), or end what else uses this GPU"
    )


def _leave(line: str, code: int) -> NoReturn:
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(code)
