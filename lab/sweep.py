"""Recipes over grids and lists of parameters, and the demo over papers: pools of runs with a table and figures, intervals over seeds."""

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lab import report
from lab.errors import SettingsError
from lab.files import digest, make_folder, write_json, writing
from lab.pipeline import REPORT, is_finished
from lab.progress import Display
from lab.running import papers, provenance
from lab.running.engines import Engine, Local
from lab.running.pool import Task, run_tasks
from lab.running.records import results_of
from lab.tables import Row, columns, rows_of, table_html, table_text

SEEDS = (0, 1, 2, 3, 4)  # where neither the command nor the paper names a grid


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a paper's recipe with other values, as texts."""

    paper: str
    recipe: str
    values: dict[str, str]


@dataclass
class SweepResult:
    """What became of a sweep: the run folder of every point, the failed ones with their message, rows with intervals over seeds."""

    folder: Path
    runs: dict[str, Path]
    failed: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    figures: list[Path] = field(default_factory=list)
    skipped: int = 0  # runs that were finished already

    def as_json(self) -> dict[str, Any]:
        places = {"runs": {name: str(path) for name, path in self.runs.items()}, "figures": [str(path) for path in self.figures]}
        return {"folder": str(self.folder), **places, "failed": self.failed, "skipped": self.skipped, "table": self.rows}

    def text(self) -> str:
        """The table, then what failed and why."""
        earlier = f" ({self.skipped} of them earlier)" if self.skipped else ""
        lines = [table_text(self.rows), f"\n{len(self.runs) - len(self.failed)} of {len(self.runs)} runs done{earlier} in {self.folder}"]
        lines += [f"failed: {name}: {message}" for name, message in self.failed.items()]
        lines += [f"figure: {path}" for path in self.figures]
        lines += [f"report: {path}"] if (path := self.folder / REPORT).exists() else []
        return "\n".join(lines)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The table and the figures, for a notebook."""
        pictures = "".join(f"<figure>{path.read_text()[path.read_text().index('<svg') :]}</figure>" for path in self.figures)
        return {"text/html": table_html(self.rows) + pictures, "text/plain": self.text()}


def run_sweep(
    paper: str,
    recipe: str,
    values: dict[str, str] | None = None,
    engine: Engine | None = None,
    folder: Path | None = None,
    retries: int = 0,
    show: Display | None = None,
    listed: list[dict[str, Any]] | None = None,
) -> SweepResult:
    """Runs every point (see `points_of`) and keeps going when one fails; finished points are skipped, broken ones taken up.

    engine: Local() unless given. folder: default `sweep_folder`. retries: see `run_tasks`. Everything is checked before the first run
    starts: SettingsError.
    """
    folder = (folder or sweep_folder(paper, recipe)).resolve()
    tasks, plans = _planned(points_of(paper, recipe, values or {}, listed), folder)
    make_folder(folder)
    result = _run(f"{paper} {recipe}", tasks, plans, engine or Local(), folder, retries, show)
    result.figures = _figures(result.rows, folder / "figures")
    write_json(folder / "sweep.json", result.as_json())
    if done := [path for name, path in result.runs.items() if name not in result.failed]:
        report.write(done, folder / REPORT)
    return result


def preview(paper: str, recipe: str, values: dict[str, str], folder: Path, listed: list[dict[str, Any]] | None = None) -> list[Row]:
    """What `run_sweep` would do, a row a point: whether its run is finished, broken off or new, and what its trainings will need."""
    tasks, plans = _planned(points_of(paper, recipe, values, listed), folder.resolve())
    rows = []
    for task, plan in zip(tasks, plans, strict=True):
        state = "finished" if is_finished(task.folder, plan) else "taken up" if task.folder.exists() else "new"
        rows.append({"run": task.name, "state": state, **_needs(task)})
    return rows


def _needs(task: Task) -> Row:
    """The most memory and all hours of a run's trainings, as far as they can be estimated."""
    from lab.estimate import estimate

    found = [row for row in estimate(task.paper, task.recipe, task.overrides) if "hours" in row]
    if not found:
        return {}
    most = max(found, key=lambda row: row["all GiB"])
    return {"GiB a device": round(most["all GiB"], 2), "fits": most["fits"], "hours here": round(sum(row["hours"] for row in found), 2)}


def _planned(points: list[Point], folder: Path) -> tuple[list[Task], list[list[papers.Planned]]]:
    """The runs of a sweep and the steps of each; SettingsError for one that cannot be planned."""
    return _tasks(points, folder), [papers.plan(point.paper, point.recipe, point.values) for point in points]


def _run(
    title: str, tasks: list[Task], plans: list[list[papers.Planned]], engine: Engine, folder: Path, retries: int, show: Display | None
) -> SweepResult:
    fresh = [task for task, plan in zip(tasks, plans, strict=True) if not is_finished(task.folder, plan)]
    failed = run_tasks(title, fresh, engine, retries, show) if fresh else {}
    done = [task for task in tasks if task.name not in failed]
    rows = rows_of((task.about, papers.result_of(task.paper, results_of(task.folder))) for task in done)
    return SweepResult(folder, {task.name: task.folder for task in tasks}, failed, rows, skipped=len(tasks) - len(fresh))


def points_of(paper: str, recipe: str, values: dict[str, str], listed: list[dict[str, Any]] | None = None) -> list[Point]:
    """The runs of a sweep: for every paper and recipe (names separated by commas), every combination of `values` (texts, likewise).

    Without values: the grid of the paper's sweeps.yaml, else five seeds. listed: points given one by one, {parameter: value}, each of
    which may name its own `paper` and `recipe`; the combinations of `values` are run for each of them. SettingsError for an empty one.
    """
    found: dict[str, Point] = {}
    for key, name, line in itertools.product(_names(paper), _names(recipe), [{}] if listed is None else listed):
        key, name = line.get("paper", key), line.get("recipe", name)
        fixed = {parameter: _text(value) for parameter, value in line.items() if parameter not in ("paper", "recipe")}
        grid = _grid(key, name, values, planned=listed is None)
        for combination in itertools.product(*grid.values()):
            point = Point(key, name, {**fixed, **dict(zip(grid, combination, strict=True))})
            found[digest(vars(point))] = point
    if not found:
        raise SettingsError("The list of points is empty.")
    return list(found.values())


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise SettingsError("Name at least one paper and one recipe.")
    return list(dict.fromkeys(names))


def _tasks(points: list[Point], folder: Path) -> list[Task]:
    """Each point with its folder, named after what tells it from the others."""
    shown = [name for name in ("paper", "recipe") if len({getattr(point, name) for point in points}) > 1]
    abouts = [{**{name: getattr(point, name) for name in shown}, **point.values} for point in points]
    return [
        Task(point_name(about), point.paper, point.recipe, point.values, folder / point_name(about), about=about)
        for about, point in zip(abouts, points, strict=True)
    ]


def read_points(path: Path) -> list[dict[str, Any]]:
    """A list of points from a YAML file; SettingsError if it holds anything else."""
    lines = papers.load_yaml(path)
    if not isinstance(lines, list) or not all(isinstance(line, dict) and all(isinstance(name, str) for name in line) for line in lines):
        raise SettingsError(f"{path}: must hold a list of points, as in `- {{seed: 0, lr: 1.0e-4}}`.")
    return lines


def _figures(rows: list[Row], folder: Path) -> list[Path]:
    """A figure for each measure of the result, the first six: a dot a row, with its interval."""
    import pandas as pd

    from lab import figures

    measures = [name for name in columns(rows) if not name.endswith("_s") and any(isinstance(row.get(name), dict) for row in rows)]
    drawn = []
    for measure in measures[:6]:
        table = pd.DataFrame(
            {"method": _row_name(row), **row[measure]} for row in rows if isinstance(row.get(measure), dict) and _finite(row[measure])
        )
        if len(table):
            picture = figures.method_comparison(table, xlabel=measure.replace("_", " "), share=False)
            with writing(folder):
                figures.save(picture, table, folder, measure.replace("/", "_"))
            drawn.append(folder / f"{measure.replace('/', '_')}.svg")
    return drawn


def _finite(cell: dict[str, Any]) -> bool:
    return cell["mean"] is not None and math.isfinite(cell["mean"])


def _row_name(row: Row) -> str:
    texts = {name: value for name, value in row.items() if isinstance(value, str) and value}
    return " ".join(value if name in ("paper", "recipe", "step", "arm") else f"{name}={value}" for name, value in texts.items())


def run_demo(jobs: int, show: Display | None = None) -> SweepResult:
    """Runs the recipes of `papers/demo.yaml` ({paper: {recipe, seconds}}), each in `outputs/<paper>/demo-<recipe>`.

    What is unchanged since the last demo is skipped.
    """
    path = provenance.home() / "papers" / "demo.yaml"
    wanted = papers.read_yaml(path)
    if not wanted:
        raise SettingsError(f"{path} lists no paper.")
    plans = [papers.plan(paper, about["recipe"]) for paper, about in wanted.items()]
    tasks = [_demo_task(key, about) for key, about in wanted.items()]
    return _run("demo", tasks, plans, Local(jobs), provenance.outputs(), 0, show)


def _demo_task(paper: str, about: dict[str, Any]) -> Task:
    recipe = about["recipe"]
    return Task(paper, paper, recipe, {}, provenance.outputs() / paper / f"demo-{recipe}", about.get("seconds"), {"paper": paper})


def sweep_folder(paper: str, recipe: str) -> Path:
    """Where a sweep lies unless told otherwise."""
    return provenance.outputs() / paper.replace(",", "+") / f"sweep-{recipe.replace(',', '+')}"


def point_name(point: dict[str, str]) -> str:
    """A folder name for a point of the grid, as in `lr=0.1,seed=0`; a long one ends in a digest."""
    name = ",".join(f"{name}={value}" for name, value in sorted(point.items())).replace("/", "_") or "only"
    return name if len(name.encode()) <= 150 else f"{name[:30]}…{digest(point)}"


def _grid(paper: str, recipe: str, values: dict[str, str], planned: bool = True) -> dict[str, list[str]]:
    """{parameter: value texts}: `values` over what the paper has planned for this recipe."""
    own = papers.sweeps(paper).get(recipe, {"seed": list(SEEDS)}) if planned else {}
    grid = {name: [_text(value) for value in choices] for name, choices in own.items()}
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
