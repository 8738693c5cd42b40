"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once it is written; a kill leaves the old or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file, or write it anew, see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def remove_partials(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder that nobody else writes: hidden files that end in the
    number of their process."""
    for path in folder.glob(".*"):
        if path.suffix[1:].isdigit():
            path.unlink(missing_ok=True)
