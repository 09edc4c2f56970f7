"""One HTML page about run folders, self-contained: what ran, results with intervals, figures, views, warnings, manifests."""

import base64
import html
import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lab import reported
from lab.errors import LabError
from lab.files import write_text
from lab.progress import clock
from lab.running import papers
from lab.running.records import StepRecord, results_of
from lab.running.runs import MANIFEST, Run, open_run
from lab.tables import SEED, Row, cell_text, columns, rows_of, split, table_html, table_text
from lab.view import palette

FOLDED = 12  # rows from which a table is folded
TABLE_LIMIT = 60  # rows of a step's table that the page shows; all are in the CSV beside it
LONGEST_TEXT = 24  # of a value in the table of results; sentences stand in their step's own table
MOST_COLUMNS = 9  # of a table of results, before it is turned


def write(folders: Iterable[Path], path: Path) -> Path:
    """Writes the page about `folders` (run folders, or sweep folders, which stand for their runs) to `path` and returns it.

    Raises RunError if a folder is no run.
    """
    runs = [open_run(folder) for folder in expand(folders)]
    body = "\n".join([_overview(runs), *map(_group, _groups(runs))])
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
    """Rows of the steps that hold their paper's result (see Pipeline.result), seeds together."""
    several = len({run.manifest["paper"] for run in runs}) > 1
    points = []
    for run in runs:
        manifest = run.manifest
        which = {"paper": manifest["paper"]} if several else {}
        shown = papers.result_of(manifest["paper"], results_of(run.folder))
        points.append(({**which, **manifest.get("overrides", {})}, shown))
    return rows_of(points)


def _result_step(paper: str) -> str:
    return papers.pipeline(paper).result if paper in papers.papers() else ""


def _page(body: str, manifests: list[Mapping[str, Any]]) -> str:
    titles = list(dict.fromkeys(_title(manifest["paper"]) for manifest in manifests))
    names = titles[0] if len(titles) == 1 else f"Latent reasoning: {len(titles)} papers, {len(manifests)} runs"
    style = resources.files("lab").joinpath("report.css").read_text()
    days = sorted({manifest["created"][:10] for manifest in manifests})
    made = f'<p class="soft">Runs of {" to ".join(dict.fromkeys((days[0], days[-1])))} on {_safe(_devices(manifests))}.</p>'
    light, dark = (palette.css_variables(theme) for theme in ("light", "dark"))
    themes = f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<title>{_safe(names)}</title><link rel="icon" href="data:,"><style>{themes}{style}</style></head>'
        f"<body><main><h1>{_safe(names)}</h1>{made}\n{body}</main></body></html>\n"
    )


def _devices(manifests: list[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(manifest["machine"]["device"] for manifest in manifests))


def _about(paper: str) -> str:
    text = papers.pipeline(paper).about if paper in papers.papers() else ""
    return f"<p>{_safe(text)}</p>" if text else ""


def _overview(runs: list[Run]) -> str:
    groups = _groups(runs)
    links = "".join(f'<li><a href="#{_anchor(group[0])}">{_name(group[0])}</a></li>' for group in groups)
    navigation = f'<nav aria-label="runs"><ul>{links}</ul></nav>' if len(groups) > 1 else ""
    by_paper: dict[str, list[Run]] = {}
    for run in runs:
        by_paper.setdefault(run.manifest["paper"], []).append(run)
    tables = "".join(_results(paper, part, len(by_paper) > 1) for paper, part in by_paper.items())
    seeds = "Means over runs that differ in their seed only, ± half a 95 % t-interval, and the number of runs."
    questions = "In brackets the 95 % interval over the questions of a run."
    note = seeds if len(runs) > len(groups) else questions if re.search(r"\d \[\d", tables) else ""
    return f'{navigation}<section><h2 id="results">Results</h2><p class="soft">{note}</p>{tables}</section>'


def _results(paper: str, runs: list[Run], titled: bool) -> str:
    """The headline of a paper's runs: a table with an arm a row, or on its side where it has more measures than fit."""
    rows = _headlines(runs)
    wordy = {name for row in rows for name, value in row.items() if name != "arm" and isinstance(value, str) and len(value) > LONGEST_TEXT}
    rows = [{name: value for name, value in row.items() if name not in wordy} for row in rows]
    steps = {row.pop("step") for row in rows}
    named = f"{next(iter(steps))} step" if len(steps) == 1 else "arms"
    arms = "".join(_begun(_turned(part), named) for part in split([row for row in rows if row["arm"]]))
    single = "".join(_key_numbers(row) for row in rows if not row["arm"])
    heading = f'<h3><a href="#{_anchor(runs[0])}">{_safe(_title(paper))}</a></h3>' if titled else ""
    return f"{heading}{arms}{single}" if arms or single else ""


def _turned(rows: list[Row]) -> list[Row]:
    """Rows with the measures downwards and the arms across, where that is narrower."""
    if len(columns(rows)) <= MOST_COLUMNS or len(rows) >= MOST_COLUMNS or len({tuple(row) for row in rows}) > 1:
        return rows
    names = [name for name in columns(rows) if name != "arm"]
    return [{"measure": name.replace("_", " "), **{row["arm"]: row.get(name) for row in rows}} for name in names]


def _key_numbers(row: Row) -> str:
    """The numbers of a step that belong to no arm, each under its name."""
    about = [
        str(value) if name in ("paper", "step") else f"{name} {value}"
        for name, value in row.items()
        if value and not isinstance(value, Mapping)
    ]
    numbers = {name: cell_text(value) for name, value in row.items() if isinstance(value, Mapping)}
    heading = " · ".join(filter(None, about))
    return (f"<h4>{_safe(heading)}</h4>" if heading else "") + _definitions(numbers) if numbers else ""


def _definitions(facts: Mapping[str, Any]) -> str:
    return (
        "<dl>"
        + "".join(f"<div><dt>{_safe(name.replace('_', ' '))}</dt><dd>{_safe(value)}</dd></div>" for name, value in facts.items())
        + "</dl>"
    )


def _groups(runs: list[Run]) -> list[list[Run]]:
    """Runs that differ in their seed only, together."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        manifest = run.manifest
        changed = {name: value for name, value in manifest.get("overrides", {}).items() if name != SEED}
        found.setdefault(json.dumps([manifest["paper"], manifest.get("recipe"), changed], sort_keys=True), []).append(run)
    return list(found.values())


def _group(runs: list[Run]) -> str:
    """The first run of a group in full, the others folded."""
    others = "".join(f"<details><summary>{_name(run)}</summary>{_run(run)}</details>" for run in runs[1:])
    about = _about(runs[0].manifest["paper"])
    return f'<section><h2 id="{_anchor(runs[0])}">{_name(runs[0])}</h2>{about}{_run(runs[0])}{others}{_reported(runs)}</section>'


def _reported(runs: list[Run]) -> str:
    """The paper's own numbers beside ours; folded where none of them was measured under our setting."""
    rows = reported.of_runs(runs)
    if not rows:
        return ""
    same = sum(row["ours"] != "" for row in rows)
    words = f"{same} of {len(rows)} on the data set of this run" if same else "none was measured on the data set of this run"
    shown = [{name: value for name, value in row.items() if name != "ours" or same} for row in rows]
    table = table_html(shown)
    return f"<details{' open' if same else ''}><summary>The paper's numbers and ours: {words}</summary>{table}</details>"


def _run(run: Run) -> str:
    manifest = run.manifest
    steps = "".join(_step(record, manifest["paper"]) for record in run.steps())
    return f"{_facts(manifest)}{_warnings(manifest)}{steps}{_steps(manifest)}{_manifest(manifest)}"


def _name(run: Run) -> str:
    manifest = run.manifest
    which = " · ".join(filter(None, [manifest.get("recipe"), run.folder.name]))
    return f"{_safe(_title(manifest['paper']))} <small>{_safe(which)}</small>"


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
    return _definitions(facts)


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
    return f"<details><summary>Steps, time and memory</summary>{table_html(rows)}</details>"


def _step_row(name: str, step: Mapping[str, Any]) -> Row:
    memory = {f"peak MiB ({where})": mib for where, mib in (step.get("peak_memory_mib") or {}).items()}
    return {"step": name, "status": step["status"], "seconds": step.get("wall_s") or step.get("seconds"), **memory}


def _step(record: StepRecord, paper: str) -> str:
    figures = _parts([_figure(path) for path in record.files("figures", "*.svg")])
    tables = [] if record.name == _result_step(paper) else [_own_headline(record)]
    tables += [_captioned(name, rows) for name, rows in record.tables.items()]
    views = "".join(f"<div class=view>{path.read_text()}</div>" for path in record.files("views", "*.html"))
    shown = figures + _parts(tables) + views + _training(record)
    return f"<section><h3>{_safe(record.name)}</h3>{shown}</section>" if shown else ""


def _parts(parts: list[str]) -> str:
    """What stands side by side where there is room."""
    return f"<div class=parts>{''.join(parts)}</div>" if any(parts) else ""


def _own_headline(record: StepRecord) -> str:
    rows = rows_of([({}, {record.name: record.results})])
    arms = [{name: value for name, value in row.items() if name != "step"} for row in rows if row["arm"]]
    single = "".join(_key_numbers({**row, "step": ""}) for row in rows if not row["arm"])
    tables = "".join(_folding(part, "results") for part in split(arms))
    return f"<div>{tables}{single}</div>" if arms or single else ""


def _figure(path: Path) -> str:
    name, data = path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode()
    return f'<figure><img alt="{_safe(name)}" src="data:image/svg+xml;base64,{data}"><figcaption>{_safe(name)}</figcaption></figure>'


def _captioned(name: str, rows: list[Row]) -> str:
    """A step's table under its name, folded where it is long."""
    note = f", the first {TABLE_LIMIT} here, all in tables/{name}.csv" if len(rows) > TABLE_LIMIT else ""
    return _folding(rows, name.replace("_", " "), note)


def _begun(rows: list[Row], title: str) -> str:
    """A table of results whose first rows are open."""
    rest = rows[FOLDED:]
    more = f"<details><summary>{len(rest)} more rows</summary>{table_html(rest)}</details>" if rest else ""
    return table_html(rows[:FOLDED], title) + more


def _folding(rows: list[Row], title: str, note: str = "") -> str:
    if len(rows) < FOLDED:
        return table_html(rows, title)
    return f"<details><summary>{_safe(title)}: {len(rows)} rows{_safe(note)}</summary>{table_html(rows[:TABLE_LIMIT])}</details>"


def _training(record: StepRecord) -> str:
    """The curves of what the step logged at several points."""
    if len({line["step"] for line in record.metrics if "step" in line}) < 3:
        return ""
    from lab.view import training

    drawn = training(record.folder)
    opened = " open" if drawn.events else ""
    return f"<details{opened}><summary>Curves of what was logged</summary><div class=view>{drawn.html()}</div></details>"


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
