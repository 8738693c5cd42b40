"""Where long work is: a bar on a terminal, and a line a minute where nobody can see one, such as in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

EVERY = 60.0  # seconds between two lines in a log


class Bar(Progress):
    """Progress of counted things.

    Args:
        console: where it is shown; stderr without one.
        unit: what is counted, where the description doesn't say it.
    """

    def __init__(self, console: Console | None = None, unit: str = "") -> None:
        counted: list[ProgressColumn] = [MofNCompleteColumn(), *([TextColumn(unit)] if unit else [])]
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), *counted, TimeRemainingColumn())
        super().__init__(*columns, console=console or Console(stderr=True))
        self.unit, self._said = unit, time.monotonic()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """See `rich.progress.Progress`."""
        super().update(task_id, **fields)
        self._say(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """See `rich.progress.Progress`."""
        super().advance(task_id, advance)
        self._say(task_id)

    def _say(self, task_id: TaskID) -> None:
        if self.console.is_interactive or time.monotonic() - self._said < EVERY:
            return
        self._said = time.monotonic()
        task = self._tasks[task_id]
        total = "" if task.total is None else f" of {task.total:.0f}"
        left = task.time_remaining
        ends = "" if left is None else f", {timedelta(seconds=round(left))} left"
        self.console.print(f"{task.description}: {task.completed:.0f}{total} {self.unit}".rstrip() + ends, markup=False)


@contextmanager
def encoding(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar of how many examples are token ids, for `training.items.prepare`."""
    with Bar(console) as bar:
        task = bar.add_task("encoding", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
