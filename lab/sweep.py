"""One recipe over a grid of parameters: a bounded pool with one process per run, and a table with intervals over seeds."""

import itertools
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab import kernels, papers, provenance
from lab.errors import DeviceError, SettingsError
from lab.files import make_folder, write_json
from lab.progress import Display, Progress
from lab.records import results_of
from lab.tables import rows_of, table_text

log = logging.getLogger(__name__)
SEEDS = (0, 1, 2, 3, 4)  # where neither the command nor the paper names a grid


@dataclass
class SweepResult:
    """What became of a sweep: the run folder of every point, the failed ones with their message, rows with intervals over seeds."""

    folder: Path
    runs: dict[str, Path]
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        runs = {name: str(path) for name, path in self.runs.items()}
        return {"folder": str(self.folder), "runs": runs, "failed": self.failed, "table": self.rows}

    def text(self) -> str:
        """The table, then what failed and why."""
        lines = [table_text(self.rows), f"\n{len(self.runs) - len(self.failed)} of {len(self.runs)} runs done in {self.folder}"]
        lines += [f"failed: {name}: {message}" for name, message in self.failed.items()]
        return "\n".join(lines)


def run_sweep(
    paper: str,
    recipe: str,
    values: dict[str, str] | None = None,
    jobs: int = 1,
    devices: list[str] | None = None,
    folder: Path | None = None,
    show: Display | None = None,
) -> SweepResult:
    """Runs every point of the grid and keeps going when one fails; finished points are skipped, broken ones taken up.

    values: {parameter: texts separated by commas}; without any, the paper's sweeps.yaml, else five seeds. devices: CUDA indices,
    one slot each (then jobs is their number). Everything is checked before the first run starts: SettingsError, DeviceError.
    """
    grid = _grid(paper, recipe, values or {})
    points = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]
    for point in points:
        papers.plan(paper, recipe, point)
    _check_devices(devices or [])
    folder = make_folder((folder or provenance.outputs() / paper / f"sweep-{recipe}").resolve())
    result = SweepResult(folder, {point_name(point): folder / point_name(point) for point in points})
    with kernels.server(), Progress(f"{paper} {recipe}", len(points), show) as shown:
        _pool(paper, recipe, points, result, devices or [""] * jobs, shown)
    done = [point for point in points if point_name(point) not in result.failed]
    result.rows = rows_of((point, results_of(result.runs[point_name(point)])) for point in done)
    write_json(folder / "sweep.json", result.as_json())
    return result


def point_name(point: dict[str, str]) -> str:
    """A folder name for a point of the grid, as in `lr=0.1,seed=0`."""
    return ",".join(f"{name}={value}" for name, value in sorted(point.items())).replace("/", "_") or "only"


def _grid(paper: str, recipe: str, values: dict[str, str]) -> dict[str, list[str]]:
    """{parameter: value texts}."""
    planned = papers.sweeps(paper).get(recipe, {"seed": list(SEEDS)})
    grid = {name: [_text(value) for value in choices] for name, choices in planned.items()}
    return {**grid, **{name: _choices(name, text) for name, text in values.items()}}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _choices(name: str, text: str) -> list[str]:
    try:
        choices = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise SettingsError(f"-p {name}={text}: write values separated by commas.") from None
    if not choices:
        raise SettingsError(f"-p {name}=: no value to go through.")
    return [_text(value) for value in choices]


def _check_devices(devices: list[str]) -> None:
    if not devices:
        return
    import torch

    there = [str(index) for index in range(torch.cuda.device_count())]
    if missing := [device for device in devices if device not in there]:
        raise DeviceError(f"CUDA device {missing[0]} was asked for; this machine has {', '.join(there) or 'none'}.")


def _pool(paper: str, recipe: str, points: list[dict[str, str]], result: SweepResult, slots: list[str], shown: Progress) -> None:
    free: queue.Queue[str] = queue.Queue()
    for slot in slots:
        free.put(slot)
    threads = str(max(1, (os.cpu_count() or 1) // len(slots)))
    drawing = threading.Lock()

    def one(point: dict[str, str]) -> None:
        device = free.get()
        try:
            message = _run_point(paper, recipe, point, result.folder, device, threads)
        finally:
            free.put(device)
        with drawing:
            if message:
                result.failed[point_name(point)] = message
            shown.advance(note=f"{point_name(point)} {'failed' if message else 'done'}")

    with ThreadPoolExecutor(len(slots)) as pool:
        list(pool.map(one, points))


def _run_point(paper: str, recipe: str, point: dict[str, str], folder: Path, device: str, threads: str) -> str:
    """Runs one point in a process of its own; returns "" or what went wrong."""
    run = folder / point_name(point)
    chosen = [part for name, value in point.items() for part in ("-p", f"{name}={value}")]
    lab = [sys.executable, "-m", "lab.cli", "--quiet"]
    command = [*lab, "run", paper, "--recipe", recipe, "--run", str(run), "--resume", "--json", *chosen]
    environment = {"OMP_NUM_THREADS": threads, **os.environ, **({"CUDA_VISIBLE_DEVICES": device} if device else {})}
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    return (done.stderr.strip() or f"exit status {done.returncode}").removeprefix("lab: ").splitlines()[0]
