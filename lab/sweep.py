"""One recipe over a grid of parameters, and the demo over papers: pools of runs with a table, intervals over seeds, at the end."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab import papers, provenance, report
from lab.engines import Engine, Local
from lab.errors import SettingsError
from lab.files import make_folder, write_json
from lab.pipeline import REPORT
from lab.pool import Task, run_tasks
from lab.progress import Display
from lab.records import results_of
from lab.tables import rows_of, table_text

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
        lines += [f"report: {path}"] if (path := self.folder / REPORT).exists() else []
        return "\n".join(lines)


def run_sweep(
    paper: str,
    recipe: str,
    values: dict[str, str] | None = None,
    engine: Engine | None = None,
    folder: Path | None = None,
    retries: int = 0,
    timeout_s: float | None = None,
    show: Display | None = None,
) -> SweepResult:
    """Runs every point of the grid and keeps going when one fails; finished points are skipped, broken ones taken up.

    values: {parameter: texts separated by commas}, over the grid of the paper's sweeps.yaml, else five seeds. engine: Local() unless
    given. retries, timeout_s: see `run_tasks`. Everything is checked before the first run starts: SettingsError.
    """
    grid = _grid(paper, recipe, values or {})
    points = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]
    for point in points:
        papers.plan(paper, recipe, point)
    folder = make_folder((folder or sweep_folder(paper, recipe)).resolve())
    tasks = [Task(point_name(point), paper, recipe, point, folder / point_name(point)) for point in points]
    failed = run_tasks(f"{paper} {recipe}", tasks, engine or Local(), retries, timeout_s, show)
    rows = rows_of((task.overrides, _result(task)) for task in tasks if task.name not in failed)
    result = SweepResult(folder, {task.name: task.folder for task in tasks}, failed, rows)
    write_json(folder / "sweep.json", result.as_json())
    report.write([path for name, path in result.runs.items() if name not in failed], folder / REPORT)
    return result


def run_demo(jobs: int, show: Display | None = None) -> SweepResult:
    """Runs the recipes of `papers/demo.yaml` ({paper: {recipe, seconds}}), each in `outputs/<paper>/demo-<recipe>`.

    What is unchanged since the last demo is skipped.
    """
    path = provenance.home() / "papers" / "demo.yaml"
    wanted = papers.read_yaml(path)
    if not wanted:
        raise SettingsError(f"{path} lists no paper.")
    for paper, about in wanted.items():
        papers.plan(paper, about["recipe"])
    tasks = [_demo_task(key, about) for key, about in wanted.items()]
    failed = run_tasks("demo", tasks, Local(jobs), show=show)
    rows = rows_of(({"paper": task.paper}, _result(task)) for task in tasks if task.name not in failed)
    return SweepResult(provenance.outputs(), {task.name: task.folder for task in tasks}, failed, rows)


def _demo_task(paper: str, about: dict[str, Any]) -> Task:
    recipe = about["recipe"]
    return Task(paper, paper, recipe, {}, provenance.outputs() / paper / f"demo-{recipe}", about.get("seconds"))


def _result(task: Task) -> dict[str, Any]:
    return papers.result_of(task.paper, results_of(task.folder))


def sweep_folder(paper: str, recipe: str) -> Path:
    """Where a sweep lies unless told otherwise."""
    return provenance.outputs() / paper / f"sweep-{recipe}"


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
