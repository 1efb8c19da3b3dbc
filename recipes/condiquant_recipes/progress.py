"""Progress on the terminal, through rich, which is loaded where it is needed; silent by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Advance = Callable[..., object]


class Progress:
    """Bars for long steps; without a console nothing is shown."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._said: set[str] = set()

    def note(self, text: str) -> None:
        """A line that the user should read before long work; once, also if it is given again."""
        if self.console is not None and text not in self._said:
            self.console.print(f"note: {text}", soft_wrap=True, highlight=False, markup=False)
        self._said.add(text)

    @contextmanager
    def bar(self, description: str, total: int) -> Iterator[Advance]:
        """A bar; the yielded function advances it: ``advance(detail="", done=None, total=None)``."""
        if self.console is None:
            yield lambda *_: None
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}"),
        )
        with RichProgress(*columns, console=self.console) as progress:
            task = progress.add_task(description, total=total, detail="")

            def advance(
                detail: str = "", done: int | None = None, total: int | None = None
            ) -> None:
                step = 1 if done is None else None
                progress.update(task, advance=step, completed=done, total=total, detail=detail)

            yield advance

    @contextmanager
    def status(self, description: str) -> Iterator[None]:
        """A line for a step whose hosts show their own progress or that is short."""
        if self.console is not None:
            self.console.print(f"{description} ...")
            yield
            return
        import rich

        hosts = rich.get_console()  # NNCF's bars are shown on it
        before, hosts.quiet = hosts.quiet, True
        try:
            yield
        finally:
            hosts.quiet = before
