"""A bounded pool of runs: a failed one never stops the others, and one table shows them all."""

import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lab.errors import Interrupted, RunError
from lab.files import read_json
from lab.progress import Display, clock, display
from lab.running.engines import Engine
from lab.tables import Row, table_text

LIVE = ".live.json"  # where a run says what it is doing


@dataclass(frozen=True, eq=False)
class Task:
    """A run to make: its folder is taken up if it holds an earlier attempt, and left alone where it is finished."""

    name: str
    paper: str
    recipe: str
    overrides: dict[str, str]
    folder: Path
    seconds: float | None = None  # how long it should take, if that is known beforehand
    about: dict[str, str] = field(default_factory=dict)  # what tells it from the other tasks


def run_tasks(title: str, tasks: list[Task], engine: Engine, retries: int = 0, show: Display | None = None) -> dict[str, str]:
    """Runs `tasks` on `engine`; returns {name: what went wrong} of those that failed.

    A run that fails, or takes longer than the engine gives it, is taken up again up to `retries` times. Every task must have been
    planned before (see papers.plan): here a bad one fails alone. Interrupted, it stops every run so that it can be taken up.
    """
    board = Board(title, tasks, engine.slots, show)

    def one(task: Task) -> None:
        with board.running(task):
            board.failed |= _run(task, engine, retries)

    with engine, board:
        pool = ThreadPoolExecutor(engine.slots)
        try:
            attempts = [pool.submit(one, task) for task in tasks]
            while wait(attempts, timeout=0.5).not_done:
                pass
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            engine.stop()
            raise Interrupted("Stopped. What has finished is kept; the same command takes up the rest.") from None
        finally:
            pool.shutdown()
        for attempt in attempts:
            attempt.result()
    return board.failed


def _run(task: Task, engine: Engine, retries: int) -> dict[str, str]:
    """{} once an attempt ends well, else {name: the last attempt's message}."""
    lab = [sys.executable, "-m", "lab.cli", "--quiet", "run", task.paper, "--recipe", task.recipe]
    chosen = [part for name, value in task.overrides.items() for part in ("-p", f"{name}={value}")]
    message = ""
    for _ in range(retries + 1):
        message = engine.attempt([*lab, "--run", str(task.folder), "--resume", "--json", *chosen])
        if not message:
            return {}
    return {task.name: message}


class Board:
    """What a pool is doing: how many runs are done, the time left, and a table of those under way. A context manager."""

    def __init__(self, title: str, tasks: list[Task], slots: int, show: Display | None = None) -> None:
        self.title, self.tasks, self.slots = title, tasks, slots
        self.display = show or display()
        self.failed: dict[str, str] = {}
        self._active: dict[str, float] = {}
        self._took: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._drawing = threading.Lock()  # held by whoever counts or draws: runs end in threads of their own
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
        with self._drawing:
            self._active[task.name] = time.monotonic()
        yield
        with self._drawing:
            self._took[task.name] = time.monotonic() - self._active.pop(task.name)
            ended = "failed after" if task.name in self.failed else "done in"
            self.display.end(f"{self._count()} · {task.name} {ended} {clock(self._took[task.name])}{self._left_text()}")

    def _watch(self) -> None:
        while not self._stop.wait(0.3):
            if self.display.draw_due():
                with self._drawing:
                    self.display.draw(self.text())

    def text(self) -> str:
        """The count and the table now."""
        active = [self._row(task) for task in self.tasks if task.name in self._active]
        return self._count() + self._left_text() + ("\n" + table_text(active) if active else "")

    def _row(self, task: Task) -> Row:
        live = _live(task)
        memory = f"{live['memory_mib'] / 1024:.1f} GiB" if "memory_mib" in live else ""
        doing = {name: live.get(name, "") for name in ("step", "cell", "loop")}
        left = self._left_of(task, self._expected()[task.name])
        if left is None and live.get("share"):
            left = (time.monotonic() - self._active[task.name]) * (1 / live["share"] - 1)
        return {
            "run": task.name,
            **(doing if live else {**doing, "step": "starting"}),
            "left": "" if left is None else clock(left),
            "device": live.get("device", ""),
            "memory": memory,
            "metric": live.get("metric", ""),
        }

    def _count(self) -> str:
        failed = f" · {len(self.failed)} failed" if self.failed else ""
        return f"{self.title} {len(self._took)}/{len(self.tasks)}{failed}"

    def _left_text(self) -> str:
        left = self.seconds_left()
        return "" if left is None else f" · about {clock(left)} left"

    def seconds_left(self) -> float | None:
        """Of the whole pool, where the runs to come can be guessed."""
        wholes = self._expected()
        guesses = [self._left_of(task, wholes[task.name]) for task in self.tasks if task.name not in self._took]
        if any(guess is None for guess in guesses):
            return None
        return sum(guesses) / self.slots  # type: ignore[arg-type]

    def _expected(self) -> dict[str, float | None]:
        """How long each run should take: as known beforehand, corrected by how the ended ones compare; else as long as those on average."""
        known = {task.name: task.seconds for task in self.tasks if task.seconds}
        ended = [name for name in self._took if name in known]
        ratio = sum(self._took[name] for name in ended) / sum(known[name] for name in ended) if ended else 1.0
        mean = sum(self._took.values()) / len(self._took) if self._took else None
        return {task.name: known[task.name] * ratio if task.name in known else mean for task in self.tasks}

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
