"""A bounded pool of runs: a failed one never stops the others, and one line shows them all."""

import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.engines import Engine
from lab.errors import RunError
from lab.files import read_json
from lab.progress import Display, clock, display

LIVE = ".live.json"  # where a run says what it is doing


@dataclass(frozen=True, eq=False)
class Task:
    """A run to make: its folder is taken up if it holds an earlier attempt, and left alone where it is finished."""

    name: str
    paper: str
    recipe: str
    overrides: dict[str, str]
    folder: Path
    seconds: float | None = None  # how long it may take, if that is known beforehand


def run_tasks(
    title: str, tasks: list[Task], engine: Engine, retries: int = 0, timeout_s: float | None = None, show: Display | None = None
) -> dict[str, str]:
    """Runs `tasks` on `engine`; returns {name: what went wrong} of those that failed.

    A run that fails, or takes longer than `timeout_s` (and is stopped), is taken up again up to `retries` times. Every task must have
    been planned before (see papers.plan): here a bad one fails alone.
    """
    board = Board(title, tasks, engine.slots, show)

    def one(task: Task) -> None:
        with board.running(task):
            board.failed |= _run(task, engine, retries, timeout_s)

    with engine, board, ThreadPoolExecutor(engine.slots) as pool:
        list(pool.map(one, tasks))
    return board.failed


def _run(task: Task, engine: Engine, retries: int, timeout_s: float | None) -> dict[str, str]:
    """{} once an attempt ends well, else {name: the last attempt's message}."""
    lab = [sys.executable, "-m", "lab.cli", "--quiet", "run", task.paper, "--recipe", task.recipe]
    chosen = [part for name, value in task.overrides.items() for part in ("-p", f"{name}={value}")]
    message = ""
    for _ in range(retries + 1):
        message = engine.attempt([*lab, "--run", str(task.folder), "--resume", "--json", *chosen], timeout_s)
        if not message:
            return {}
    return {task.name: message}


class Board:
    """The line above a pool: how many are done, what each running one does, and the time left. A context manager."""

    def __init__(self, title: str, tasks: list[Task], slots: int, show: Display | None = None) -> None:
        self.title, self.tasks, self.slots = title, tasks, slots
        self.display = show or display()
        self.failed: dict[str, str] = {}
        self._active: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._drawing = threading.Lock()
        self._began = time.monotonic()

    def __enter__(self) -> "Board":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.display.end(f"{self.title} · {len(self._took)} of {len(self.tasks)} ended in {clock(time.monotonic() - self._began)}")

    @contextlib.contextmanager
    def running(self, task: Task):
        """Counts `task` as running within."""
        self._active[task.name] = time.monotonic()
        yield
        self._took[task.name] = time.monotonic() - self._active.pop(task.name)
        with self._drawing:
            ended = "failed after" if task.name in self.failed else "done in"
            self.display.end(f"{self._count()} · {task.name} {ended} {clock(self._took[task.name])}{self._left_text()}")

    def _watch(self) -> None:
        while not self._stop.wait(0.3):
            if self.display.draw_due():
                with self._drawing:
                    self.display.draw(self.text())

    def text(self) -> str:
        """The line now."""
        doing = [_doing(task) for task in self.tasks if task.name in list(self._active)]
        return " · ".join([self._count() + self._left_text(), *doing])

    def _count(self) -> str:
        return f"{self.title} {len(self._took)}/{len(self.tasks)}"

    def _left_text(self) -> str:
        left = self.seconds_left()
        return "" if left is None else f" · about {clock(left)} left"

    def seconds_left(self) -> float | None:
        """From the expected times, corrected by how the ended runs compare with theirs; without any, from the mean so far."""
        expected = {task.name: task.seconds for task in self.tasks if task.seconds}
        known = [name for name in self._took if name in expected]
        ratio = sum(self._took[name] for name in known) / sum(expected[name] for name in known) if known else 1.0
        mean = sum(self._took.values()) / len(self._took) if self._took else None
        wholes = {task: expected[task.name] * ratio if task.name in expected else mean for task in self.tasks}
        guesses = [self._left_of(task, whole) for task, whole in wholes.items() if task.name not in self._took]
        if any(guess is None for guess in guesses):
            return None
        return sum(guesses) / self.slots  # type: ignore[arg-type]

    def _left_of(self, task: Task, whole: float | None) -> float | None:
        """Of a run that should take `whole` seconds: what is left by the clock, by its own account, or at its speed once it is overdue."""
        if whole is None or task.name not in self._active:
            return whole
        spent = time.monotonic() - self._active[task.name]
        share = _live(task).get("share", 0.0)
        overdue = spent / share - spent if share and spent > whole else 0.0
        return max(whole - spent, whole * (1 - share), overdue)


def _live(task: Task) -> dict[str, Any]:
    try:
        return read_json(task.folder / LIVE)
    except RunError:
        return {}


def _doing(task: Task) -> str:
    return f"{task.name}: {_live(task).get('text', 'starting')}"
