"""The `lab` command. Exit status: 0 done, 1 a run failed, 2 the request was wrong, 130 interrupted."""

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lab.errors import LabError

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False, help="A workbench for latent reasoning.")

Paper = Annotated[str, typer.Argument(help="Key of a paper; `lab papers` lists them.")]
Recipe = Annotated[
    str, typer.Option("--recipe", "-R", help="A recipe of the paper (default: toy, or what a resumed run was started with).")
]
Grid = Annotated[list[str], typer.Option("-p", metavar="NAME=V1,V2", help="Values to go through (default: the paper's sweeps.yaml).")]
Values = Annotated[list[str], typer.Option("-p", metavar="NAME=VALUE", help="Change a parameter; STEP.NAME=VALUE for one step only.")]
Runs = Annotated[list[Path], typer.Argument(help="Run folders.")]
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
    from_step: Annotated[str, typer.Option("--from", metavar="STEP", help="Run this step and the later ones again.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run: --run, or the newest of this recipe.")] = False,
    folder: Annotated[Path | None, typer.Option("--run", metavar="DIR", help="The run folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a recipe: every step that is not done yet, then the report."""
    from lab import pipeline, report

    overrides = _overrides(values)
    if dry_run:
        described = pipeline.describe(paper, recipe or "toy", overrides)
        _show(described, pipeline.describe_text(described), as_json)
        return
    done = pipeline.run_recipe(paper, recipe or None, overrides, folder, resume, from_step or None)
    page = done / pipeline.REPORT
    _show({"run": str(done), "report": str(page)}, f"{report.text([done])}\n\nreport: {page}", as_json)


@app.command()
def sweep(
    paper: Paper,
    recipe: Annotated[str, typer.Option("--recipe", "-R", help="A recipe of the paper.")] = "toy-claims",
    values: Annotated[
        list[str], typer.Option("-p", metavar="NAME=V1,V2", help="Values to go through (default: the paper's sweeps.yaml).")
    ] = [],  # noqa: B006
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at a time.")] = 1,
    devices: Annotated[str, typer.Option(help="CUDA devices, one slot each, as in 0,1,2,3.")] = "",
    engine: Annotated[str, typer.Option(help="local, or slurm: a job for each run.")] = "local",
    option: Annotated[list[str], typer.Option("--option", "-o", metavar="NAME=VALUE", help="What a Slurm job asks for.")] = [],  # noqa: B006
    folder: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The sweep's folder.")] = None,
    retries: Annotated[int, typer.Option(min=0, help="How often a run that failed is taken up again.")] = 0,
    timeout: Annotated[float | None, typer.Option(metavar="MINUTES", help="Stop a run that takes longer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a recipe over seeds and parameters, one process a run; the same command again takes up what is left."""
    from lab import sweep as sweeps

    out = folder or sweeps.sweep_folder(paper, recipe)
    seconds = 60 * timeout if timeout is not None else None
    result = sweeps.run_sweep(paper, recipe, _overrides(values), _engine(engine, out, jobs, devices, option), out, retries, seconds)
    _show(result.as_json(), result.text(), as_json)
    if result.failed:
        raise typer.Exit(1)


@app.command()
def demo(
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=0, help="Runs at a time; 0: as many as cores, at most 4.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Run the toy recipe of every paper in papers/demo.yaml, then write one report."""
    import os

    from lab import provenance, report
    from lab import sweep as sweeps

    result = sweeps.run_demo(jobs or min(4, os.cpu_count() or 1))
    done = [folder for name, folder in result.runs.items() if name not in result.failed]
    page = report.write(done, provenance.outputs() / "demo.html")
    _show({**result.as_json(), "report": str(page)}, f"{result.text()}\n\nreport: {page}", as_json)
    if result.failed:
        raise typer.Exit(1)


@app.command()
def papers(as_json: AsJson = False) -> None:
    """List papers with their steps and recipes."""
    from lab import papers as shelf

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
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder to repeat.")],
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


def _engine(name: str, out: Path, jobs: int, devices: str, options: list[str]) -> Any:
    import yaml

    from lab import engines
    from lab.errors import unknown

    if name not in ("local", "slurm"):
        raise unknown("engine", name, ["local", "slurm"])
    if name == "local":
        return engines.Local(jobs, [device for device in devices.split(",") if device])
    asked = {key: yaml.safe_load(value) for key, value in _overrides(options).items()}
    return engines.Cluster(out / ".jobs", jobs, asked)


def _overrides(values: list[str]) -> dict[str, str]:
    from lab.papers import split_override

    return dict(split_override(item) for item in values)


def _show(value: Any, text: str, as_json: bool) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False) if as_json else text)


def main() -> None:
    """Runs the command line; every expected error is one sentence on standard error."""
    debug = "--debug" in sys.argv
    try:
        app()
    except LabError as error:
        if debug:
            raise
        typer.echo(f"lab: {error}", err=True)
        sys.exit(_status(error))


def _status(error: LabError) -> int:
    from lab.pipeline import Interrupted, StepFailed

    return {StepFailed: 1, Interrupted: 130}.get(type(error), 2)


if __name__ == "__main__":
    main()
