"""The page with the pair that comes along: what is asked, answered and shown there, on a wide and on a narrow screen.

With C2C_SCREENSHOTS=docs the pictures of docs/serving.md are made anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cache2cache import C2C
from cache2cache.fuser import C2CFuser
from cache2cache.serving.engine import Limits, PairSpec
from cache2cache.serving.page import read_examples
from cache2cache.tasks.prompts import extract_letter
from serving.conftest import Here, Served, ask_on_page, opened

WIDTHS = {"page.png": 1280, "page-phone.png": 390}


class Loaded(Here):
    """An engine of a pair that is here already."""

    def __init__(self, name: str, pair: C2C) -> None:
        super().__init__(name, PairSpec(), Limits())
        self.pair = pair

    def _load(self) -> C2C:
        return self.pair


@pytest.fixture(scope="module")
def served(pair: C2C) -> Iterator[Served]:
    server = Served([Loaded("default", pair)]).start(page=True)
    yield server
    server.stop()


def test_a_question_that_c2c_helps_with(pair: C2C, served: Served, browser: Any, tmp_path: Path) -> None:
    (fuser,) = pair.fusers
    assert isinstance(fuser, C2CFuser)
    question = next(row["question"] for row in read_examples() if row["change"] == "better")
    with opened(browser, served, WIDTHS["page.png"]) as tab:
        answers = ask_on_page(tab, question)
        letters = {way: extract_letter(answers[way], 4) for way in answers}
        assert letters["c2c"] is not None and letters["c2c"] != letters["receiver"], answers
        tab.click("#panel button")
        tab.wait_for_selector("#weights svg", timeout=60_000)
        assert f"{int(fuser.open_gates.sum())} of {len(fuser.open_gates)} gates are open" in tab.inner_text("#gates")
        folder = Path(os.environ.get("C2C_SCREENSHOTS", tmp_path))
        for name, width in WIDTHS.items():
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0, width
            tab.screenshot(path=folder / name, full_page=True)
            assert (folder / name).stat().st_size > 20_000
