"""One server on tiny models for the tests of a module, and what its requests have in common."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cache2cache.pair import C2C
from cache2cache.serving import openai
from cache2cache.serving.engine import Limits, PairEngine, PairSpec, Way
from cache2cache.serving.metrics import Metrics
from cache2cache.serving.page import LABELS
from cache2cache.serving.worker import Worker, about, load


class Here(PairEngine):
    """An engine whose worker is in this process, which is there at once."""

    def _run_worker(self) -> str | None:
        worker = Worker(self._load(), self.limits, lambda e: self._hear("events", e), lambda n: self._hear("kept", n))
        self._outbox = _Straight(worker)  # type: ignore[assignment]
        threading.Thread(target=worker.run, daemon=True).start()
        self._hear("ready", about(worker.pair, worker.limits))
        self._wake.wait()
        return None

    def _load(self) -> C2C:
        return load(self.spec)


class _Straight:
    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def put(self, item: Any) -> None:
        if item is not None and item[0] == "job":
            self.worker.submit(*item[1:])
        elif item is not None:
            self.worker.cancel(item[1])


def spec_of(fuser: Path) -> PairSpec:
    """The pair of `tiny_pair_folder`."""
    return PairSpec(str(fuser), receiver=str(fuser.parent / "llama"), sharers=[str(fuser.parent / "qwen3")])


@dataclass
class Served:
    """A server in a thread of the tests."""

    engines: list[PairEngine]
    address: str = ""
    records: list[dict[str, Any]] = field(default_factory=list)
    server: Any = None
    thread: Any = None

    def start(self, page: bool = False, grace: int = 60, **settings: Any) -> Served:
        up = threading.Event()
        metrics = Metrics(self.engines)

        def make() -> Any:
            app = openai.make_app(self.engines, log=self.records.append, metrics=metrics, **settings)
            if page:
                from cache2cache.serving import page as pages

                app = pages.mount(app, self.engines, metrics)
            return app

        def ready(address: str) -> None:
            self.address = address
            up.set()

        def run() -> None:
            openai.serve(
                self.engines,
                "127.0.0.1",
                0,
                ready=ready,
                make=make,
                grace=grace,
                on_server=lambda s: setattr(self, "server", s),
            )

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert up.wait(120)
        return self

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextmanager
def opened(browser: Any, served: Served, width: int) -> Iterator[Any]:
    """The page in a window of that width; it is an error if its console shows one."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    context.set_default_timeout(120_000)
    tab = context.new_page()
    complaints: list[str] = []
    tab.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: complaints.append(str(error)))
    tab.goto(f"{served.address}/ui/")
    tab.wait_for_selector("#ask", timeout=60_000)
    yield tab
    context.close()
    assert not complaints, complaints


def ask_on_page(tab: Any, question: str) -> dict[Way, str]:
    """Ask and wait for the four answers; returns their texts."""
    tab.fill("#question textarea", question)
    tab.click("#ask")
    for way in LABELS:
        tab.wait_for_selector(f"#way-{way} [data-state=done]", timeout=120_000)
    return {way: tab.inner_text(f"#way-{way} .text") for way in LABELS}


@pytest.fixture(scope="module")
def served(tiny_pair_folder: Path) -> Iterator[Served]:
    engines: list[PairEngine] = [Here("tiny", spec_of(tiny_pair_folder), Limits(max_new_tokens=64, max_waiting=24))]
    server = Served(engines).start()
    yield server
    server.stop()
