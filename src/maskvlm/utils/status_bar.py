"""One line of progress on a terminal: of training, of a preparation, of an embedding."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

REDRAW = 0.2  # seconds
BAR = 16  # characters
NARROW = 100  # characters; on a narrower terminal the words take the bar's place


class StatusBar:
    """What is done, a bar, and words that say how it goes. Nothing is drawn where there is no terminal: who works there
    prints a plain line now and then.

    It is redrawn when it is told something, not by a thread, which would take time from two busy cores.

    Args:
        name: what is done.
        total: what `done` reaches in the end; None where unknown.
        console: where it is drawn.
        visible: False draws nothing on a terminal either.

    Attributes:
        drawn: whether there is anything to see.
    """

    def __init__(self, name: str, total: float | None, console: Console, visible: bool = True) -> None:
        self.drawn = visible and console.is_terminal
        self._bar = [BarColumn(BAR)] if console.width >= NARROW else []
        self._progress = Progress(
            # Names may hold square brackets, which rich would take for styles.
            TextColumn("{task.description}", markup=False),
            *self._bar,
            TextColumn("{task.fields[words]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
            auto_refresh=False,
            disable=not self.drawn,
        )
        self._task = self._progress.add_task(name, total=total, words="")
        self._progress.start()
        self._at = time.monotonic()

    def room(self, name: str) -> int:
        """Characters of a line that are left for the words beside this name."""
        return self._progress.console.width - len(name) - 1 - len(self._bar) * (BAR + 1)

    def show(self, done: float | None, words: str, name: str | None = None, now: bool = False) -> None:
        """Tell how far it is. done: None leaves the bar as it is. now: draw it even if it was just drawn."""
        self._progress.update(self._task, description=name, completed=done, words=words)
        if now or time.monotonic() - self._at > REDRAW:
            self._progress.refresh()
            self._at = time.monotonic()

    def close(self) -> None:
        """Draw it for the last time."""
        self._progress.refresh()
        self._progress.stop()
