"""What the shell offers while a `lab` command is typed (`lab --install-completion`): papers, recipes, steps, parameters, runs.

Nothing heavy is imported, and what cannot be read completes to nothing.
"""

import os
from collections.abc import Callable
from typing import Any

import typer

from lab.errors import LabError


def papers(incomplete: str) -> list[str]:
    """Keys of papers."""
    from lab.running import papers as shelf

    return _starting(incomplete, shelf.papers)


def recipes(ctx: typer.Context, incomplete: str) -> list[str]:
    """Recipes of the paper named earlier on the line."""
    from lab.running import papers as shelf

    return _starting(incomplete, lambda: shelf.recipes(_paper(ctx)))


def steps(ctx: typer.Context, incomplete: str) -> list[str]:
    """Its steps."""
    from lab.running import papers as shelf

    return _starting(incomplete, lambda: [spec.step for spec in shelf.pipeline(_paper(ctx)).steps])


def parameters(ctx: typer.Context, incomplete: str) -> list[str]:
    """Its parameters, as in `seed=`."""
    from lab.running import papers as shelf

    return _starting(incomplete, lambda: [f"{name}=" for name in shelf.pipeline(_paper(ctx)).parameters()])


def runs(incomplete: str) -> list[str]:
    """Run folders, newest first, as seen from here."""
    from lab.running import provenance

    found = sorted(provenance.outputs().glob("*/*/manifest.json"), key=lambda path: -path.stat().st_mtime)
    absolute = os.path.isabs(incomplete)
    return _starting(incomplete, lambda: [str(path.parent) if absolute else os.path.relpath(path.parent) for path in found])


def engines(incomplete: str) -> list[str]:
    """Names of engines."""
    return _starting(incomplete, lambda: ["local", "slurm", "ray"])


def _paper(ctx: typer.Context) -> str:
    """The paper on the line; the parser leaves it among the rest where an option still waits for its value."""
    return ctx.params["paper"] or next(iter(ctx.args), "")


def _starting(incomplete: str, names: Callable[[], Any]) -> list[str]:
    try:
        return [name for name in names() if name.startswith(incomplete)]
    except LabError:
        return []
