"""What the user sees while it takes: plain lines, or a bar when standard error is a terminal."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress:
    """Plain lines: each step once, and every full quarter of a long one."""

    def __init__(self) -> None:
        self._step = ""
        self._quarter = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put away."""

    def step(self, text: str) -> None:
        """A new step begins."""
        self._step, self._quarter = text, 0
        self.note(text)

    def percent(self, value: float) -> None:
        """The step is ``value`` per cent done."""
        quarter = int(value) // 25
        if quarter > self._quarter:
            self._quarter = quarter
            self.note(f"{self._step}: {quarter * 25} %")

    def note(self, text: str) -> None:
        """One line, for example a warning."""
        click.echo(text, err=True)


class BarProgress(Progress):
    """The same, drawn by rich."""

    def __init__(self, bar: Bar) -> None:
        super().__init__()
        self._bar = bar
        self._task = bar.add_task("", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, text: str) -> None:
        self._bar.reset(self._task, description=text, total=None)

    def percent(self, value: float) -> None:
        self._bar.update(self._task, total=100, completed=value)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)


def for_terminal() -> Progress:
    """The progress that fits standard error. rich is slow to import: only a terminal asks for it."""
    if not sys.stderr.isatty():
        return Progress()
    from rich.console import Console
    from rich.progress import Progress as Bar

    return BarProgress(Bar(console=Console(stderr=True), transient=True))
