"""How answers are shown: panels that fill while they stream, plain lines where stdout is no terminal, or not at all."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from cache2cache.files import replace_text
from cache2cache.methods import Answer

Runs = Mapping[str, Iterator[Answer]]
Show = Callable[[str, str, Runs, Mapping[str, str]], list[Answer]]
_WIDE = 100  # columns from which two panels stand side by side


def clean(text: str) -> str:
    """`text` without control characters but line breaks and tabs: a model must not steer the terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)


def shower() -> Show:
    """Panels on a terminal, else plain lines."""
    return panels if Console().is_terminal else lines


def panels(title: str, prompt: str, runs: Runs, labels: Mapping[str, str]) -> list[Answer]:
    """Run one method after the other and show them side by side as they stream."""
    console = Console()
    console.print(Panel(Text(clean(prompt)), title=title, border_style="cyan"))
    answers: dict[str, Answer] = {}
    with Live(console=console, refresh_per_second=12) as live:
        for method, run in runs.items():
            live.update(_grid(runs, answers, method, labels, console.width))
            for answer in _closing(run):
                answers[method] = answer
                live.update(_grid(runs, answers, method, labels, console.width))
        live.update(_grid(runs, answers, None, labels, console.width))
    return list(answers.values())


def _grid(
    runs: Iterable[str], answers: Mapping[str, Answer], running: str | None, labels: Mapping[str, str], width: int
) -> RenderableType:
    cells = [_panel(answers.get(method), method == running, labels[method]) for method in runs]
    if width < _WIDE or len(cells) == 1:
        return Group(*cells)
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    for left, right in zip(cells[::2], [*cells[1::2], *[""] * (len(cells) % 2)], strict=True):
        grid.add_row(left, right)
    return grid


def _panel(answer: Answer | None, running: bool, label: str) -> RenderableType:
    body = Text(overflow="fold")
    if answer is not None:
        if answer.message:
            body.append(f"sharer: {clean(answer.message.strip())}\n", style="dim italic")
        body.append(clean(answer.text.strip()))
    foot = f"first token {answer.first_token_s:.2f} s" if answer and answer.first_token_s else None
    return Panel(body, title=label, subtitle=foot, border_style="green" if running else "bright_black")


def lines(title: str, prompt: str, runs: Runs, labels: Mapping[str, str]) -> list[Answer]:
    """As `panels`, for a pipe: one method below the other, without control codes."""
    print(f"\n{title}\n{clean(prompt)}", flush=True)
    answers = []
    for method, run in runs.items():
        print(f"\n[{labels[method]}]", flush=True)
        before = Answer(method)
        for answer in _closing(run):
            if answer.message and not before.message:
                print("sharer: ", end="")
            if answer.text and before.message and not before.text:
                print()
            print(clean(answer.message[len(before.message) :] + answer.text[len(before.text) :]), end="", flush=True)
            before = answer
        print(flush=True)
        answers.append(before)
    return answers


def silent(title: str, prompt: str, runs: Runs, labels: Mapping[str, str]) -> list[Answer]:
    """Run the methods and show nothing."""
    return [list(run)[-1] for run in runs.values()]


@dataclass(frozen=True)
class Shown:
    """One question as it was shown: with `letters` and the `right` one if it has options."""

    title: str
    prompt: str
    answers: list[Answer]
    letters: list[str | None]
    right: str | None


def picture(path: Path, shown: list[Shown], labels: Mapping[str, str]) -> None:
    """Write questions, answers and their figures as an SVG picture of a terminal."""
    console = Console(file=io.StringIO(), record=True, width=112, force_terminal=True)
    for one in shown:
        console.print(Panel(Text(clean(one.prompt)), title=one.title, border_style="cyan"))
        answers = {answer.method: answer for answer in one.answers}
        console.print(_grid(answers, answers, None, labels, console.width))
        console.print(table(one.answers, one.letters, one.right, labels))
    replace_text(path, console.export_svg(title="c2c ask"))


def table(answers: list[Answer], letters: list[str | None], right: str | None, labels: Mapping[str, str]) -> Table:
    """Clock, tokens and bytes of each answer; for a multiple-choice question also its letter."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("", no_wrap=True)
    if right is not None:
        out.add_column(f"right: {right}")
    for column in ("first token", "in all", "new tokens", "bytes passed"):
        out.add_column(column, justify="right")
    for answer, letter in zip(answers, letters, strict=True):
        tokens = f"{answer.message_tokens} + {answer.new_tokens}" if answer.message_tokens else str(answer.new_tokens)
        verdict = [] if right is None else [f"{letter or '-'} {'yes' if letter == right else 'no'}"]
        row = [labels[answer.method], *verdict, f"{answer.first_token_s:.2f} s", f"{answer.total_s:.2f} s", tokens]
        out.add_row(*row, "skipped" if answer.skipped else f"{answer.bytes_passed:,}")
    return out


def _closing(run: Iterator[Answer]) -> Iterator[Answer]:
    with closing(cast("Generator[Answer, None, None]", run)):
        yield from run
