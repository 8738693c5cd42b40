"""Progress in a log: a line now and then, and none on a terminal beside the bar."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from cache2cache import progress


def shown(monkeypatch: pytest.MonkeyPatch, seconds: float, terminal: bool = False) -> str:
    """What a bar of three steps prints, each taking so long."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    with progress.Bar(Console(file=out, force_terminal=terminal, width=100), "tokens") as bar:
        task = bar.add_task("reading", total=30)
        for _ in range(3):
            clock[0] += seconds
            bar.advance(task, 10)
    return out.getvalue()


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    *lines, last = shown(monkeypatch, 40).splitlines()
    assert [line.partition(",")[0] for line in lines] == ["reading: 20 of 30 tokens"]
    assert "30/30 tokens" in last


def test_quick_work_and_terminals_have_the_bar_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reading:" not in shown(monkeypatch, 1)
    assert "reading:" not in shown(monkeypatch, 40, terminal=True)
