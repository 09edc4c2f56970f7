"""Writes notebooks/README.md from the notebooks' first cells and the pipelines: python benchmarks/index.py"""

import json
from pathlib import Path

from lab.running import papers

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
INTRO = """# Notebooks

Every notebook runs by itself in JupyterLab (`make lab`), headless with `lab run PAPER`, or with plain papermill. The second cell holds its
parameters; the defaults are a toy that learns in seconds to minutes on two CPU cores, and `papers/<key>/recipes` hold the published
settings. `run = ""` starts a new run folder; to go on from an earlier step's result give its folder, or `"latest"`.

This page is written by `python benchmarks/index.py`.
"""


def title_and_text(path: Path) -> tuple[str, str]:
    """The heading and the sentences of a notebook's first cell."""
    first = "".join(json.loads(path.read_text())["cells"][0]["source"])
    title, _, text = first.partition("\n")
    return title.lstrip("# "), " ".join(text.split()).replace("|", r"\|")


def row(path: Path, needs: str) -> str:
    title, text = title_and_text(path)
    return f"| [{title}]({path.relative_to(NOTEBOOKS)}) | {text} | {needs} |"


def table(title: str, rows: list[str]) -> str:
    return "\n".join([f"\n## {title}\n", "| notebook | what it does, what comes out | needs |", "|---|---|---|", *rows, ""])


def paper_table(key: str, shown: set[Path]) -> str:
    """The notebooks of a paper's pipeline in order, then what else lies in its folder."""
    pipe, rows = papers.pipeline(key), {}
    for spec in pipe.steps:
        rows.setdefault(spec.path, row(spec.path, ", ".join(spec.needs) or "nothing"))
    for path in sorted((NOTEBOOKS / key).glob("*.ipynb")):
        rows.setdefault(path, row(path, "a checkpoint"))
    shown |= set(rows)
    return table(f"{pipe.title} (`{key}`)", list(rows.values()))


def main() -> None:
    shown: set[Path] = set()
    parts = [paper_table(key, shown) for key in papers.papers()]
    others = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path not in shown]
    across = [table("Across methods", [row(path, "see its first cell") for path in others])] if others else []
    (NOTEBOOKS / "README.md").write_text("".join([INTRO, *across, *parts]))


if __name__ == "__main__":
    main()
