"""One HTML page about run folders, self-contained: what ran, results with intervals, figures, views, warnings, manifests."""

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lab import papers
from lab.errors import LabError
from lab.files import write_text
from lab.progress import clock
from lab.records import StepRecord, results_of
from lab.runs import MANIFEST, Run, open_run
from lab.tables import Row, cell_text, columns, number_text, rows_of, split, table_text
from lab.view import palette

TABLE_LIMIT = 60  # rows of a step's table that the page shows; all are in the CSV beside it
LINES_LIMIT = 400  # points of a training curve


def write(folders: Iterable[Path], path: Path) -> Path:
    """Writes the page about `folders` (run folders, or sweep folders, which stand for their runs) to `path` and returns it.

    Raises RunError if a folder is no run.
    """
    runs = [open_run(folder) for folder in expand(folders)]
    body = "\n".join([_overview(runs), *(_run(run) for run in runs)])
    return write_text(Path(path), _once(_page(body, [run.manifest for run in runs])))


def text(folders: Iterable[Path]) -> str:
    """The headline table of the runs for a terminal."""
    return table_text(_headlines([open_run(folder) for folder in expand(folders)]))


def expand(folders: Iterable[Path]) -> list[Path]:
    """Run folders; a sweep's folder is replaced by those of its runs."""
    found: list[Path] = []
    for folder in map(Path, folders):
        inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
        found += inside if inside and not (folder / MANIFEST).exists() else [folder]
    return found


def _headlines(runs: list[Run]) -> list[Row]:
    several = len({run.manifest["paper"] for run in runs}) > 1
    points = []
    for run in runs:
        manifest = run.manifest
        which = {"paper": manifest["paper"]} if several else {}
        points.append(({**which, **manifest.get("overrides", {})}, results_of(run.folder)))
    return rows_of(points)


def _page(body: str, manifests: list[Mapping[str, Any]]) -> str:
    names = ", ".join(dict.fromkeys(_title(manifest["paper"]) for manifest in manifests))
    style = resources.files("lab").joinpath("report.css").read_text()
    light, dark = (palette.css_variables(theme) for theme in ("light", "dark"))
    themes = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{_safe(names)}</title><link rel="icon" href="data:,"><style>{themes}{style}</style></head>'
        f"<body><main><h1>{_safe(names)}</h1>\n{body}</main></body></html>\n"
    )


def _overview(runs: list[Run]) -> str:
    links = "".join(
        f'<li><a href="#{_anchor(run)}">{_safe(_title(run.manifest["paper"]))} · {_safe(run.folder.name)}</a></li>' for run in runs
    )
    tables = "".join(_table(table) for table in split(_headlines(runs)))
    note = '<p class="soft">Means over runs that differ in their seed only, ± half a 95 % t-interval, and the number of runs.</p>'
    navigation = f"<nav><ul>{links}</ul></nav>" if len(runs) > 1 else ""
    return f'{navigation}<section><h2 id="results">Results</h2>{tables}{note if len(runs) > 1 else ""}</section>'


def _run(run: Run) -> str:
    manifest = run.manifest
    steps = "".join(_step(record) for record in run.steps())
    heading = f'<h2 id="{_anchor(run)}">{_name(run)}</h2>'
    return f"<section>{heading}{_facts(manifest)}{_warnings(manifest)}{_steps(manifest)}{steps}{_manifest(manifest)}</section>"


def _name(run: Run) -> str:
    manifest = run.manifest
    return f"{_safe(_title(manifest['paper']))} <small>{_safe(manifest.get('recipe') or '')} · {_safe(run.folder.name)}</small>"


def _title(paper: str) -> str:
    try:
        return papers.pipeline(paper).title
    except LabError:
        return paper


def _facts(manifest: Mapping[str, Any]) -> str:
    git = manifest["git"]
    commit = (git["commit"] or "unknown")[:10] + (" with uncommitted changes" if git["dirty"] else "")
    changed = ", ".join(f"{name}={value}" for name, value in manifest.get("overrides", {}).items()) or "none"
    seconds = sum(step.get("wall_s") or step.get("seconds") or 0 for step in manifest["steps"].values())
    facts = {
        "started": manifest["created"],
        "time": clock(seconds),
        "device": manifest["machine"]["device"],
        "commit": commit,
        "changed": changed,
    }
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{_safe(value)}</dd></div>" for name, value in facts.items()) + "</dl>"


def _warnings(manifest: Mapping[str, Any]) -> str:
    failed = [
        f"{name} did not finish: {step.get('error', step['status'])}"
        for name, step in manifest["steps"].items()
        if step["status"] != "done"
    ]
    items = "".join(f"<li>{_safe(item)}</li>" for item in [*failed, *manifest["warnings"]])
    return f'<aside role="note"><strong>To know</strong><ul>{items}</ul></aside>' if items else ""


def _steps(manifest: Mapping[str, Any]) -> str:
    rows = [_step_row(name, step) for name, step in manifest["steps"].items()]
    return f"<details><summary>Steps, time and memory</summary>{_table(rows)}</details>"


def _step_row(name: str, step: Mapping[str, Any]) -> Row:
    memory = {f"peak MiB ({where})": mib for where, mib in (step.get("peak_memory_mib") or {}).items()}
    return {"step": name, "status": step["status"], "seconds": step.get("wall_s") or step.get("seconds"), **memory}


def _step(record: StepRecord) -> str:
    parts = [_figure(path) for path in record.files("figures", "*.svg")]
    parts += [f"<div class=view>{path.read_text()}</div>" for path in record.files("views", "*.html")]
    parts += [_captioned(name, rows) for name, rows in record.tables.items()]
    if curve := _curve(record):
        parts.append(curve)
    return f"<section><h3>{_safe(record.name)}</h3>{''.join(parts)}</section>" if parts else ""


def _figure(path: Path) -> str:
    name, data = path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{_safe(name)}" src="data:image/svg+xml;base64,{data}"><figcaption>{_safe(name)}</figcaption></figure>'


def _captioned(name: str, rows: list[Row]) -> str:
    note = f" (first {TABLE_LIMIT} of {len(rows)} rows; all in tables/{name}.csv)" if len(rows) > TABLE_LIMIT else ""
    return _table(rows[:TABLE_LIMIT], name.replace("_", " ") + note)


def _table(rows: list[Row], caption: str = "") -> str:
    if not rows:
        return ""
    names = columns(rows)
    head = "".join(f'<th scope="col"{_numeric(rows, name)}>{_safe(name.replace("_", " "))}</th>' for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td{_numeric(rows, name)}>{_safe(cell_text(row.get(name)))}</td>" for name in names) + "</tr>" for row in rows
    )
    title = f"<caption>{_safe(caption)}</caption>" if caption else ""
    return f'<div class="scroll" tabindex="0"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cells(rows: list[Row], row: Row, names: list[str]) -> str:
    return "".join(f"<td{_numeric(rows, name)}>{_safe(cell_text(row.get(name)))}</td>" for name in names)


def _numeric(rows: list[Row], name: str) -> str:
    return ' class="n"' if all(isinstance(row.get(name), Mapping | int | float | None) for row in rows) else ""


def _curve(record: StepRecord) -> str:
    """The step's losses against training steps as a small inline drawing with its last value in words."""
    lines = [line for line in record.metrics if "step" in line and isinstance(line.get("loss"), int | float)]
    if len(lines) < 3:
        return ""
    lines = lines[:: max(1, len(lines) // LINES_LIMIT)]
    points = [(line["step"], line["loss"]) for line in lines]
    (left, right), (low, high) = _range([x for x, _ in points]), _range([y for _, y in points])
    path = " ".join(f"{300 * (x - left) / (right - left):.1f},{80 - 80 * (y - low) / (high - low):.1f}" for x, y in points)
    words = f"loss from {number_text(float(points[0][1]))} to {number_text(float(points[-1][1]))} in {points[-1][0]} steps"
    drawing = f'<svg viewBox="-2 -2 304 84" role="img" aria-label="{_safe(words)}"><polyline points="{path}"/></svg>'
    return f'<figure class="curve">{drawing}<figcaption>{_safe(words)}</figcaption></figure>'


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def _manifest(manifest: Mapping[str, Any]) -> str:
    return f"<details><summary>Manifest</summary><pre>{_safe(json.dumps(manifest, indent=1, ensure_ascii=False))}</pre></details>"


def _anchor(run: Run) -> str:
    return "run-" + re.sub(r"[^A-Za-z0-9-]", "-", str(run.folder)[-60:])


def _safe(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _once(page: str) -> str:
    """`page` with every style and script block that several views bring along kept the first time only."""
    seen: set[str] = set()

    def keep(match: re.Match[str]) -> str:
        block = match.group(0)
        if block in seen:
            return ""
        seen.add(block)
        return block

    return re.sub(r"<(style|script)\b[^>]*>.*?</\1>", keep, page, flags=re.S)
