"""Fixtures and settings for all tests: tiny random models, no network, no colours."""

from __future__ import annotations

import os

# `make test` gives each core a worker of its own. Threads of two workers on one core wait for each other, so each has
# its share of the cores, and so have the commands it starts; torch reads this as it is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tiny import TOKENIZER_OF, tiny_model, tiny_tokenizer

# Tests of the command line read what is printed: as it goes into a pipe, whatever terminal runs the tests.
for _name in ("FORCE_COLOR", "CLICOLOR_FORCE", "PY_COLORS"):
    os.environ.pop(_name, None)
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "120"
# Servers of the tests are on this machine, whatever proxy leads out of it.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"

# A machine that stops for a moment is no failure, and one commit has one result.
hypothesis.settings.register_profile("here", deadline=None, derandomize=True)
hypothesis.settings.load_profile("here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What a worker gets at once: the tests of a file, which share its servers and runs; of the documents each page by
    itself, for they are the longest."""
    here = Path(__file__).parent
    for item in items:
        file = item.path.relative_to(here)
        if file.name != "test_docs.py":
            item.add_marker(pytest.mark.xdist_group(file.as_posix()))


@pytest.fixture
def tiny() -> Callable[..., tuple[PreTrainedModel, PreTrainedTokenizerFast]]:
    """tiny(family, seed=0, **overrides) -> (model, its natural tokenizer)."""

    def make(family: str, seed: int = 0, **overrides: object) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        return tiny_model(family, seed, **overrides), tiny_tokenizer(TOKENIZER_OF[family])

    return make


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Callable[..., Path]:
    """tiny_folder(family, seed=0, **overrides) -> a model folder with weights, tokenizer and chat template."""

    def make(family: str, seed: int = 0, **overrides: object) -> Path:
        folder = tmp_path / f"{family}-{seed}"
        tiny_model(family, seed, **overrides).save_pretrained(folder)
        tiny_tokenizer(TOKENIZER_OF[family]).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_pair_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a fuser that was never trained but is open, and beside it the tiny models it is for."""
    from cache2cache.config import FuserConfig
    from cache2cache.pair import C2C

    root = tmp_path_factory.mktemp("pair")
    for family in ("llama", "qwen3"):
        tiny_model(family).save_pretrained(root / family)
        tiny_tokenizer(TOKENIZER_OF[family]).save_pretrained(root / family)
    config = FuserConfig(hidden_dim=16, intermediate_dim=16, gate_init=1.0)
    torch.manual_seed(0)
    C2C.from_models(root / "llama", root / "qwen3", config).save_pretrained(root / "fuser")
    return root / "fuser"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The optional folder of data sets beside the checkout; the test is skipped where it is absent."""
    folder = Path(__file__).parents[1].resolve().parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder shared/data beside the checkout")
    return folder


@pytest.fixture(scope="module")  # while its driver runs, the test's thread has an event loop, so not for longer
def browser() -> Iterator[Any]:
    """Headless Chromium, driven by Playwright; the test is skipped where either is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser with")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a batch are read together, however unlike their lengths."""
    monkeypatch.setattr("cache2cache.kv.like_lengths", lambda lengths: [list(range(len(lengths)))])
