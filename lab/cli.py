"""The `lab` command.

Exit status: 0 done; 1 a run failed, or a check found something wrong; 2 the request was wrong (arguments, parameters, files);
3 the request was right but something it needs is not there or in use (device, cluster, disk, run folder); 130 stopped by Ctrl-C or
SIGTERM, to be taken up.
"""

import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lab.errors import Interrupted, LabError
from lab.running import completion

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help="A workbench for latent reasoning.")


Paper = Annotated[str, typer.Argument(help="Key of a paper; `lab papers` lists them.", autocompletion=completion.papers)]
RECIPE = "A recipe of the paper (default: toy, or what a resumed run was started with)."
Recipe = Annotated[str, typer.Option("--recipe", "-R", help=RECIPE, autocompletion=completion.recipes)]
GRID = "Values to go through (default: the paper's sweeps.yaml)."
Grid = Annotated[list[str], typer.Option("-p", metavar="NAME=V1,V2", help=GRID, autocompletion=completion.parameters)]
VALUES = "Change a parameter; STEP.NAME=VALUE for one step only."
Values = Annotated[list[str], typer.Option("-p", metavar="NAME=VALUE", help=VALUES, autocompletion=completion.parameters)]
Runs = Annotated[list[Path], typer.Argument(help="Run folders.", autocompletion=completion.runs)]
Step = Annotated[
    str, typer.Option("--from", metavar="STEP", help="Run this step and the later ones again.", autocompletion=completion.steps)
]
RECIPES = "A recipe, or several: toy,toy-claims."
POINTS = "A YAML list of points, {NAME: VALUE, ...}, instead of a grid."
OPTION = "What else submitit or Ray is asked for."
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.callback()
def options(
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only errors and results.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also what the libraries log.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """`lab run tah` runs a paper's toy recipe; `lab COMMAND --help` tells more."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr)
    logging.getLogger("lab").setLevel(logging.WARNING if quiet else logging.INFO)


@app.command()
def run(
    paper: Paper,
    recipe: Recipe = "",
    values: Values = [],  # noqa: B006 - typer copies it
    from_step: Step = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run: --run, or the newest of this recipe.")] = False,
    folder: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: every step that is not done yet, then the report."""
    from lab import estimate as estimates
    from lab import pipeline, report

    overrides = _overrides(values)
    if dry_run:
        described = pipeline.describe(paper, recipe, overrides, folder, resume, from_step or None)
        needs = estimates.estimate(paper, described["recipe"], described["overrides"])
        told = f"{pipeline.describe_text(described)}\n\n{estimates.text(needs)}"
        _show({**described, "estimate": needs}, told, as_json)
        return
    done = pipeline.run_recipe(paper, recipe or None, overrides, folder, resume, from_step or None)
    page = done / pipeline.REPORT
    _show({"run": str(done), "report": str(page)}, f"{report.text([done])}\n\nreport: {page}", as_json)


@app.command()
def estimate(
    paper: Paper,
    recipe: Annotated[str, typer.Option("--recipe", "-R", help="A recipe of the paper.")] = "toy",
    values: Values = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Say what a recipe's trainings will need: parameters, memory, steps, and time from one measured step."""
    from lab import estimate as estimates

    rows = estimates.estimate(paper, recipe, _overrides(values))
    _show(rows, estimates.text(rows), as_json)


@app.command()
def sweep(
    paper: Annotated[str, typer.Argument(help="Key of a paper, or several, as in tah,codi.", autocompletion=completion.papers)],
    recipe: Annotated[str, typer.Option("--recipe", "-R", help=RECIPES, autocompletion=completion.recipes)] = "toy-claims",
    values: Grid = [],  # noqa: B006
    points: Annotated[Path | None, typer.Option(metavar="FILE", help=POINTS)] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time.")] = 1,
    engine: Annotated[
        str, typer.Option(help="local, slurm (a job a run) or ray (a task a run).", autocompletion=completion.engines)
    ] = "local",
    devices: Annotated[str, typer.Option(help="CUDA devices of this machine, one run on each, as in 0,1,2,3.")] = "",
    gpus: Annotated[int, typer.Option(min=0, help="GPUs a run needs.")] = 0,
    cpus: Annotated[int, typer.Option(min=0, help="Cores a run needs.")] = 0,
    memory: Annotated[float, typer.Option(min=0, metavar="GIB", help="Memory a run needs; one that takes more is stopped.")] = 0,
    timeout: Annotated[float | None, typer.Option(metavar="MINUTES", help="Stop a run that takes longer.")] = None,
    address: Annotated[str, typer.Option(help="Of the Ray cluster; local starts one here.")] = "auto",
    option: Annotated[list[str], typer.Option("--option", "-o", metavar="NAME=VALUE", help=OPTION)] = [],  # noqa: B006
    folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The sweep's folder.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a run that failed is taken up again.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which runs there would be, and what they need.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run recipes over seeds and parameters, one process a run; the same command again takes up what is left."""
    from lab import sweep as sweeps
    from lab import tables
    from lab.running import engines

    out = folder or sweeps.sweep_folder(paper, recipe)
    listed = sweeps.read_points(points) if points else None
    needs = engines.Needs(gpus, cpus, memory, timeout)
    chosen = engines.engine(engine, out / ".jobs", jobs, [d for d in devices.split(",") if d], needs, address, _overrides(option))
    if dry_run:
        rows = sweeps.preview(paper, recipe, _overrides(values), out, listed)
        _show({"folder": str(out), "runs": rows}, f"{tables.table_text(rows)}\n\n{len(rows)} runs into {out}", as_json)
        return
    result = sweeps.run_sweep(paper, recipe, _overrides(values), chosen, out, retries, listed=listed)
    _show(result.as_json(), result.text(), as_json)
    if result.failed:
        raise typer.Exit(1)


@app.command()
def demo(
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: as many as cores, at most 4.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the toy recipe of every paper in papers/demo.yaml, then write one report."""
    from lab import report
    from lab import sweep as sweeps
    from lab.running import provenance

    result = sweeps.run_demo(jobs or min(4, os.cpu_count() or 1))
    done = [folder for name, folder in result.runs.items() if name not in result.failed]
    page = str(report.write(done, provenance.outputs() / "demo.html")) if done else None
    _show({**result.as_json(), "report": page}, result.text() + (f"\n\nreport: {page}" if page else ""), as_json)
    if result.failed:
        raise typer.Exit(1)


@app.command()
def papers(as_json: AsJson = False) -> None:
    """List papers with their steps and recipes."""
    from lab.running import papers as shelf

    found = {}
    for key in shelf.papers():
        pipe = shelf.pipeline(key)
        found[key] = {"title": pipe.title, "steps": [spec.step for spec in pipe.steps], "recipes": shelf.recipes(key)}
    lines = [
        f"{key:12} {about['title']}\n{'':12} steps: {', '.join(about['steps'])}\n{'':12} recipes: {', '.join(about['recipes'])}"
        for key, about in found.items()
    ]
    _show(found, "\n".join(lines) or "No papers here.", as_json)


@app.command()
def report(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page about run folders."""
    from lab import report as reports

    page = reports.write(runs, out)
    _show({"report": str(page)}, f"{reports.text(runs)}\n\nreport: {page}", as_json)


@app.command()
def figures(
    runs: Runs,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("figures"),
    size: Annotated[str, typer.Option(help="column, wide or slide.")] = "column",
    as_json: AsJson = False,
) -> None:
    """Draw the figures of run folders again from their numbers, as PDF, SVG and PNG with a CSV beside them."""
    from lab.figures import redraw
    from lab.report import expand

    paths = [str(path) for path in redraw(expand(runs), out, size)]
    _show(paths, "\n".join(paths) or "These runs have no figures.", as_json)


@app.command()
def verify(runs: Runs, as_json: AsJson = False) -> None:
    """Check that the files of finished steps are the ones that were written."""
    from lab.audit import verify as check

    found = {str(folder): check(folder) for folder in runs}
    lines = [f"{folder}: {'; '.join(problems) or 'all finished steps are as written'}" for folder, problems in found.items()]
    _show(found, "\n".join(lines), as_json)
    if any(found.values()):
        raise typer.Exit(1)


@app.command()
def rerun(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder to repeat.", autocompletion=completion.runs)],
    tolerance: Annotated[float, typer.Option(help="Relative difference that still counts as equal.")] = 1e-6,
    as_json: AsJson = False,
) -> None:
    """Run a recipe again as a run folder recorded it, in a new folder, and compare the results."""
    from lab.audit import rerun as repeat

    comparison = repeat(folder, tolerance)
    _show(comparison.as_json(), comparison.text(), as_json)
    if comparison.differences:
        raise typer.Exit(1)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check Python, torch, disk, hub, kernels and browser, and say what to do."""
    from lab.audit import doctor as examine

    checks = examine()
    _show(checks, "\n".join(_check_line(check) for check in checks), as_json)
    if any(not check["ok"] and check["needed"] for check in checks):
        raise typer.Exit(1)


def _check_line(check: dict[str, Any]) -> str:
    mark, advice = ("ok", "") if check["ok"] else ("NO" if check["needed"] else "--", f"\n{'':14} {check['advice']}")
    return f"{mark} {check['name']:10} {check['found']}{advice}"


def _overrides(values: list[str]) -> dict[str, str]:
    from lab.running.papers import split_override

    return dict(split_override(item) for item in values)


def _show(value: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def main() -> None:
    """Runs the command line; every expected error is one sentence on standard error."""
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a run as Ctrl-C does: cleanly, to be resumed
    if parent := os.environ.pop("LAB_PARENT", None):
        _end_with(int(parent))
    try:
        app()
    except LabError as error:
        if debug:
            raise
        typer.echo(f"lab: {error}", err=True)
        sys.exit(error.status)
    except SystemExit as end:
        if end.code == Interrupted.status:
            typer.echo("lab: Stopped.", err=True)
        raise
    finally:
        exec("")  # clears CPython's mark of an interrupt that passed through exec of a text: it would turn our status into -SIGINT


def _end_with(parent: int) -> None:
    from lab.running.kernels import end_with_parent

    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(130)


if __name__ == "__main__":
    main()
