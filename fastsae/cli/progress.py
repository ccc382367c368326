"""Progress bars of the commands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int], Any]]:
    """Gives `progress(title, total)`: a context manager whose value advances the bar.

    Where stderr is no terminal, a line now and then and at the end of each step takes the place of
    the bars.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines
        return

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            if not speed or (task.total or 0) < 5000:  # only tokens have a rate worth showing
                return Text("")
            return Text(f"{speed:>9,.0f} tokens/s", style="cyan")

    with Progress(
        TextColumn("{task.description:<34}"), BarColumn(30), TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(), Rate(), console=console,
    ) as bars:  # fmt: skip

        @contextmanager
        def step(title: str, total: int) -> Iterator[Callable[[int], None]]:
            task = bars.add_task(title, total=total)
            yield lambda n: bars.advance(task, n)
            bars.update(task, completed=total)

        yield step


LINE_EVERY_S = 15.0


@contextmanager
def _lines(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A line now and then, and one at the end."""
    start = last = time.perf_counter()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, last
        done, now = done + n, time.perf_counter()
        if now - last >= LINE_EVERY_S:
            last = now
            typer.echo(f"{title}: {100 * done // max(total, 1)}% in {now - start:.0f} s", err=True)

    yield advance
    typer.echo(f"{title}: {time.perf_counter() - start:.1f} s", err=True)
