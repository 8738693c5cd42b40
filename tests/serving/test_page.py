"""The page in headless Chromium, on tiny models: it is asked, switched, looked into, and never complains."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cache2cache.serving import page as pages
from cache2cache.serving import worker as service
from cache2cache.serving.engine import Limits, PairEngine
from cache2cache.serving.metrics import Metrics
from serving.conftest import Here, Served, ask_on_page, opened, spec_of
from serving.wire import ask

WAYS = list(pages.LABELS)
# Every text that any of the columns has had.
WATCH = """() => {
  window.seen = new Set();
  const look = () => document.querySelectorAll('.c2c-answer .text').forEach(e => window.seen.add(e.innerText));
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


@pytest.fixture(scope="module")
def served(tiny_pair_folder: Path) -> Iterator[Served]:
    patch = pytest.MonkeyPatch()  # a random model never ends its message by itself
    patch.setattr(service, "MAX_MESSAGE_TOKENS", 24)
    engines: list[PairEngine] = [
        Here(name, spec_of(tiny_pair_folder), Limits(max_new_tokens=256)) for name in ("one", "two")
    ]
    server = Served(engines).start(page=True)
    yield server
    server.stop()
    patch.undo()


@pytest.fixture
def tab(served: Served, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, opened; the test fails if its console shows an error."""
    with opened(browser, served, getattr(request, "param", 1280)) as tab:
        yield tab


@pytest.mark.parametrize("tab", [1280, 375], indirect=True)
def test_the_page(tab: Any, served: Served, tmp_path: Path) -> None:
    tab.evaluate(WATCH)
    tab.fill("#question textarea", "Plants make food from?")
    tab.click("#ask")
    for way in WAYS:
        tab.wait_for_selector(f"#way-{way} [data-state=done]", timeout=120_000)
        figures = tab.inner_text(f"#way-{way} dl").split("\n")
        assert any(figure.endswith(" s") for figure in figures)
        assert tab.inner_text(f"#way-{way} .text") != ""
    assert tab.evaluate("window.seen.size") > 6  # it streams
    assert tab.inner_text("#way-c2c dl").split()[-1] != "0" and tab.inner_text("#way-receiver dl").split()[-1] == "0"
    assert "sharer:" in tab.inner_text("#way-text .message")
    tab.click("#panel button")
    tab.wait_for_selector("#gates table", state="visible")
    assert "6 of 6 gates are open" in tab.inner_text("#gates")
    tab.wait_for_selector("#weights svg", timeout=60_000)
    assert tab.locator("#weights svg").count() == 2 and tab.locator("#weights rect").count() > 6
    # Nothing is wider than the screen but what scrolls by itself.
    assert tab.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
    tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_switching_and_all_at_once(tab: Any) -> None:
    first = ask_on_page(tab, "Iron?")
    tab.click("#fuser input")
    tab.click("#fuser [role=option]:has-text('two'), [role=listbox] [role=option]:has-text('two')")
    tab.wait_for_selector("#way-c2c [data-state=waiting]", timeout=30_000)
    assert tab.inner_text("#way-c2c .text") == ""
    tab.check("#at-once input")
    assert ask_on_page(tab, "Iron?") == first  # the same models behind another name


def test_stop(tab: Any, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """No column goes on, the models stop, and one may ask again."""
    hear = Here._hear

    def slowly(self: Here, what: str, content: Any) -> None:
        time.sleep(0.1)
        hear(self, what, content)

    monkeypatch.setattr(Here, "_hear", slowly)  # or a browser on a busy machine would be too late
    tab.fill("#question textarea", "Plants?")
    tab.evaluate("document.querySelector('#ask').click()")
    tab.wait_for_selector("[data-state=running]")
    tab.click("#stop")
    tab.wait_for_selector("[data-state=stopped]")
    tab.wait_for_function("!document.querySelector('[data-state=running]')")
    engine = served.engines[0]
    for _ in range(400):
        if not engine.waiting and not engine.running:
            break
        tab.wait_for_timeout(50)
    assert not engine.waiting and not engine.running
    tab.wait_for_timeout(500)  # nothing comes in late
    states = tab.eval_on_selector_all(".c2c-answer", "all => all.map(each => each.dataset.state)")
    assert "running" not in states and "stopped" in states
    monkeypatch.undo()
    ask_on_page(tab, "Iron?")


def test_examples_fill_the_question(tab: Any) -> None:
    row = pages.read_examples()[0]["question"]
    tab.get_by_text(row[:40]).first.click()
    tab.wait_for_function("document.querySelector('#question textarea').value.length > 20", timeout=20_000)
    assert tab.input_value("#question textarea") == row


def test_an_open_page_does_not_hold_the_shutdown(tiny_pair_folder: Path) -> None:
    server = Served([Here("one", spec_of(tiny_pair_folder))]).start(page=True, grace=3600)
    held = http.client.HTTPConnection(server.address.removeprefix("http://"), timeout=60)
    held.request("GET", "/ui/gradio_api/heartbeat/session")  # a page may hold this for as long as it is open
    response = held.getresponse()
    assert response.status == 200 and response.read(4) == b"data"
    server.stop()
    held.close()


def test_what_the_page_takes(served: Served) -> None:
    """Bodies are limited on its routes too, with and without a declared length, and files are not taken."""
    large, join = b"x" * ((8 << 20) + 1), "/ui/gradio_api/queue/join"
    for body in (large, iter([large[: 1 << 20]] * 9)):
        status, raw = ask(served.address, "POST", join, body)
        assert status == 413 and json.loads(raw)["error"]["code"] == "body_too_large"
    assert ask(served.address, "POST", join, b"{}")[0] == 422
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    file = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nhello\r\n--x--\r\n'
    assert ask(served.address, "POST", "/ui/gradio_api/upload", file, **form)[0] == 404


def test_with_keys_the_page_asks_for_one(tiny_pair_folder: Path, browser: Any) -> None:
    import threading

    import uvicorn

    from cache2cache.serving import openai
    from cache2cache.serving.http import listening

    class Idle:
        name, ready, waiting, running, kept_bytes, restarts = "idle", True, 0, 0, 0, 0
        about = pages.About("r", ("s",), ("c2c",), 100, 32)

        def close(self) -> None: ...

    engine: Any = Idle()
    app = pages.mount(openai.make_app([engine], keys=["sesame"]), [engine], Metrics([engine]), keys=["sesame"])
    with listening("127.0.0.1", 0) as (listener, address):
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        tab = browser.new_page()
        tab.goto(f"{address}/ui/")
        tab.wait_for_selector("input[type=password]", timeout=60_000)
        assert tab.locator("#ask").count() == 0
        tab.close()
        server.should_exit = True
        thread.join(30)


def test_an_answer_is_shown_as_text() -> None:
    column = pages.Column("text", "<b>model</b>", text="<script>alert(1)</script>", message="<i>")
    shown = column.html()
    assert "<script>" not in shown and "<b>" not in shown and "<i>" not in shown and "&lt;script&gt;" in shown


def test_leaving_the_page_stops_the_models(served: Served) -> None:
    engine = served.engines[0]

    async def run() -> None:
        stream = pages.answers(Metrics([engine]), engine, "Plants?", False, 256, asyncio.Event())
        async for columns, _ in stream:
            if columns["receiver"].text:
                break
        await stream.aclose()
        for _ in range(200):
            if not engine.waiting and not engine.running:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("it goes on")

    with ThreadPoolExecutor(1) as pool:  # the browser's driver has a loop in this one
        pool.submit(asyncio.run, run()).result(60)
