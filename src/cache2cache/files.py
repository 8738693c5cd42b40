"""Text files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file, or write it anew; a kill leaves the old or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def remove_partials(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder that nobody else writes: hidden files that end in the
    number of their process."""
    for path in folder.glob(".*"):
        if path.suffix[1:].isdigit():
            path.unlink(missing_ok=True)
