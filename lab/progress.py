"""Progress with the time left, for every long loop: one line that is updated in a notebook or terminal, plain lines elsewhere."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from lab import machine
from lab.files import sketch_json

log = logging.getLogger(__name__)
Item = TypeVar("Item")

EVERY_S = 10.0  # between plain lines, where nothing can be updated in place


def progress(items: Iterable[Item], label: str, total: int | None = None) -> Iterator[Item]:
    """Yields `items` while showing how many are done and the time left; `total` where `items` has no length."""
    with Progress(label, total if total is not None else _length(items)) as shown:
        for item in items:
            yield item
            shown.advance()


def _length(items: Any) -> int | None:
    return len(items) if hasattr(items, "__len__") else None


class Progress:
    """A count that shows itself: call `advance` (or `at`) as often as you like, it draws at a bearable rate.

    Used as a context manager. Inside `lab run` it also writes its state to the file named by LAB_PROGRESS, which the command displays.
    """

    def __init__(self, label: str, total: int | None = None, show: "Display | None" = None) -> None:
        self.label, self.total, self.done, self.note = label, total, 0, ""
        self._display = show or display()
        self._began = self._first = time.monotonic()
        self._offset = 0

    def __enter__(self) -> "Progress":
        self._display.draw(self.text(), force=False)
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._report()
        self._display.end(self.text(ended=True, failed=kind is not None))

    def start_at(self, done: int) -> None:
        """Counts `done` items as finished earlier (a resumed loop): they do not enter the speed."""
        self.done = self._offset = done
        self._began = time.monotonic()

    def advance(self, by: int = 1, note: str = "") -> None:
        """`by` more are done; `note` (a loss, an accuracy) stands behind the time."""
        self.at(self.done + by, note)

    def at(self, done: int, note: str = "") -> None:
        """`done` of `total` are done now."""
        self.done, self.note = done, note or self.note
        if self._display.draw_due():
            self._report()
            self._display.draw(self.text())

    @property
    def seconds_left(self) -> float | None:
        """An estimate from the speed so far; None while unknown."""
        fresh = self.done - self._offset
        if not self.total or fresh <= 0:
            return None
        return (time.monotonic() - self._began) / fresh * max(0, self.total - self.done)

    def text(self, ended: bool = False, failed: bool = False) -> str:
        """`label 120/500 24% · 0:12 left · note`."""
        parts = [f"{self.label} {self.done}" + (f"/{self.total} {100 * self.done // self.total}%" if self.total else "")]
        spent = time.monotonic() - self._first
        if ended:
            parts.append(f"{'stopped after' if failed else 'in'} {clock(spent)}")
        elif self.seconds_left is not None:
            parts.append(f"{clock(self.seconds_left)} left")
        else:
            parts.append(clock(spent))
        return " · ".join([*parts, self.note] if self.note else parts)

    def _report(self) -> None:
        if path := os.environ.get("LAB_PROGRESS"):
            state = {"label": self.label, "done": self.done, "total": self.total, "left_s": self.seconds_left, "note": self.note}
            memory = machine.peak_memory_mib()
            device = " ".join(filter(None, [machine.device_name(), os.environ.get("CUDA_VISIBLE_DEVICES")]))
            here = {"device": device, "memory_mib": memory.get("device", memory["host"])}
            sketch_json(Path(path), {**state, **here})


def clock(seconds: float) -> str:
    """`0:07`, `12:03`, `1:02:03`."""
    minutes, seconds_ = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds_:02}" if hours else f"{minutes}:{seconds_:02}"


class Display:
    """Where progress is drawn; this one logs a plain line every `every` seconds."""

    def __init__(self, every: float = EVERY_S) -> None:
        self.every, self._last = every, time.monotonic()

    def draw_due(self) -> bool:
        """Whether it is time to draw again."""
        return time.monotonic() - self._last >= self.every

    def draw(self, text: str, force: bool = True) -> None:
        """Shows the present state; without `force` only where that costs no line."""
        self._last = time.monotonic()
        if force:
            log.info(text)

    def end(self, text: str) -> None:
        """Shows the last state."""
        log.info(text)


class Terminal(Display):
    """Lines of a terminal, overwritten in place."""

    def __init__(self) -> None:
        super().__init__(0.2)
        self._above = 0  # lines drawn before the cursor's

    def draw(self, text: str, force: bool = True) -> None:
        self._last = time.monotonic()
        width, height = _size()
        lines = [line[: width - 1] for line in text.splitlines()[: height - 1]]
        up = f"\x1b[{self._above}A" if self._above else ""
        sys.stderr.write(f"\r{up}\x1b[J" + "\n".join(lines))
        sys.stderr.flush()
        self._above = len(lines) - 1

    def end(self, text: str) -> None:
        self.draw(text)
        sys.stderr.write("\n")
        self._above = 0


class Notebook(Display):
    """One output of a cell, updated in place: live in JupyterLab, and its last state in an executed notebook."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self._handle: Any = None

    def draw(self, text: str, force: bool = True) -> None:
        import IPython.display

        self._last = time.monotonic()
        bundle = {"text/plain": text}
        if self._handle is None:
            self._handle = IPython.display.display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def end(self, text: str) -> None:
        self.draw(text)
        self._handle = None


def _size() -> tuple[int, int]:
    with contextlib.suppress(OSError):
        return tuple(os.get_terminal_size(sys.stderr.fileno()))
    return 100, 24


def display() -> Display:
    """The display that fits where this process runs: a notebook's cell, a terminal, else the log."""
    if ipython := sys.modules.get("IPython"):
        shell = ipython.get_ipython()
        if shell is not None and getattr(shell, "kernel", None) is not None:
            return Notebook()
    return Terminal() if sys.stderr.isatty() else Display()
