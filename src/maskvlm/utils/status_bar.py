"""A one-line progress display on a terminal, for training, data preparation and embedding."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

REDRAW = 0.2  # seconds
BAR = 16  # characters
NARROW = 100  # characters; on a narrower terminal the words replace the bar


class StatusBar:
    """A name, a bar, and words on the progress. Nothing is drawn without a terminal: the caller then prints a plain
    line from time to time.

    It is redrawn on updates, not by a thread, which would take time from two busy cores.

    Args:
        name: name of the activity.
        total: final value of `done`; None if unknown.
        console: console to draw on.
        visible: False draws nothing, even on a terminal.

    Attributes:
        drawn: whether anything is drawn.
    """

    def __init__(self, name: str, total: float | None, console: Console, visible: bool = True) -> None:
        self.drawn = visible and console.is_terminal
        self._bar = [BarColumn(BAR)] if console.width >= NARROW else []
        self._progress = Progress(
            # Names may contain square brackets, which rich would treat as styles.
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
        """Number of characters of the line left for the words next to this name."""
        return self._progress.console.width - len(name) - 1 - len(self._bar) * (BAR + 1)

    def show(self, done: float | None, words: str, name: str | None = None, now: bool = False) -> None:
        """Update the progress. done: None leaves the bar as is. now: redraw even if it was just drawn."""
        self._progress.update(self._task, description=name, completed=done, words=words)
        if now or time.monotonic() - self._at > REDRAW:
            self._progress.refresh()
            self._at = time.monotonic()

    def close(self) -> None:
        """Draw it one last time."""
        self._progress.refresh()
        self._progress.stop()
