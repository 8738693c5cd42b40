"""Files that are there whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from .errors import C2CError

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of `path` once it is written; a kill leaves the old or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise a C2CError where a folder can't be made or written to: before long work, which would end with that."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    if not there.is_dir():
        raise C2CError(f"{folder} can't be a folder: {there} is a file; choose another output")
    if not os.access(there, os.W_OK | os.X_OK):
        raise C2CError(f"{there} can't be written to; choose another output than {folder}")


@contextmanager
def holding(lock: Path, taken: str) -> Iterator[None]:
    """Hold a lock of the system's, which goes with its holder, however that ends; a C2CError that says `taken` where
    another process has it."""
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise C2CError(taken) from error
    except NotImplementedError:  # what filelock raises on a file system without locks
        warnings.warn(f"{lock} can't be locked; see to it that no other process does the same", stacklevel=2)
    try:
        yield
    finally:
        held.release()


def only_writer(folder: Path) -> AbstractContextManager[None]:
    """Hold the folder of a run, made where it isn't there: a second process that would write there is refused."""
    folder.mkdir(parents=True, exist_ok=True)
    return holding(folder / ".lock", f"another process writes to {folder}; wait for it, or choose another output")


def replace_text(path: Path, text: str) -> None:
    """Write a text file, or write it anew, see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' `save_file`, with errors of the system as OSError: there their number stands in words only."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata=metadata)
        path.chmod(0o644)  # it lets only the owner read; a wheel or a shared folder is read by others
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def save_state(state: Any, path: Path) -> None:
    """`torch.save`, with errors of the system as OSError: by itself it says at which byte of its archive it stopped."""
    import torch

    try:
        with path.open("wb") as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        found = error if isinstance(error, OSError) else error.__context__
        if not isinstance(found, OSError):
            raise
        raise OSError(found.errno, found.strerror, str(path)) from error


def remove_partials(folder: Path, names: Iterable[str]) -> None:
    """Remove what `replacing` has left of these files where it was killed. No other process may write them now."""
    for name in names:
        for path in folder.glob(f".{glob.escape(name)}.*"):
            if path.suffix[1:].isdigit():
                path.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
