"""Finished steps read back, and what decides whether a step must run again. Reports, figures and sweeps start here."""

import os
from pathlib import Path
from typing import Any

from lab.files import digest, file_digest, read_json, read_lines
from lab.running import provenance
from lab.tables import rows_of, table_html, table_text

STEP, RESULTS, METRICS = "step.json", "results.json", "metrics.jsonl"
WHERE = {"device", "processes", "sharding", "report_to"}


class StepRecord:
    """A finished step, read back: `info` (step.json), `results`, `metrics`, `tables`, and the paths of figures and views."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.info: dict[str, Any] = read_json(folder / STEP)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        """The headline as a table: what the last cell of a notebook shows."""
        rows = rows_of([({}, {self.name: self.results})])
        return {"text/html": table_html(rows), "text/plain": f"{table_text(rows)}\n\n{self.folder}"}

    def summary(self) -> dict[str, Any]:
        """What the manifest says about this step."""
        keys = ("status", "started", "finished", "seconds", "peak_memory_mib", "parameters", "notebook", "fingerprint", "token")
        return {key: self.info[key] for key in keys}

    @property
    def results(self) -> dict[str, Any]:
        return read_json(self.folder / RESULTS) if (self.folder / RESULTS).exists() else {}

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder)

    @property
    def tables(self) -> dict[str, list[dict[str, Any]]]:
        return {path.stem: read_json(path) for path in sorted((self.folder / "tables").glob("*.json"))}

    def files(self, kind: str, pattern: str) -> list[Path]:
        """Paths below `figures` or `views`, by name."""
        return sorted((self.folder / kind).glob(pattern))

    def unchanged(self, fingerprint: str) -> bool:
        """Whether running the step again would do the same: same parameters, notebook, data, inputs and code."""
        return self.info["fingerprint"] == fingerprint and not provenance.changed_code(self.info["code"])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; where a resumed step logged the same point again (same `step`, names and texts), the later one counts."""
    last: dict[Any, dict[str, Any]] = {}
    for number, line in enumerate(read_lines(folder / METRICS)):
        key = tuple(sorted((name, str(value) if name == "step" or isinstance(value, str) else "") for name, value in line.items()))
        last[key if "step" in line else number] = line
    return list(last.values())


def fingerprint(spec: Any, parameters: dict[str, Any], run: Path) -> tuple[str, dict[str, Any]]:
    """(fingerprint, data files) of a step: its parameters, notebook code, named data files, and the results it builds on.

    Parameters that say where it runs (`WHERE`) are left out: a step that was stopped goes on elsewhere.
    """
    data = {name: _data_facts(value) for name, value in parameters.items() if _is_path(value)}
    inputs = {need: _token(run / need) for need in spec.needs}
    parameters = {name: value for name, value in parameters.items() if name not in WHERE}
    return digest(parameters, _notebook_code(spec.path), {name: facts["digest"] for name, facts in data.items()}, inputs), data


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "." in value) and len(value) < 1024 and os.path.exists(value)


def _data_facts(value: str) -> dict[str, Any]:
    return {"path": os.path.abspath(value), "digest": file_digest(Path(value))}


def _token(folder: Path) -> str | None:
    return read_json(folder / STEP)["token"] if (folder / STEP).exists() else None


def _notebook_code(path: Path) -> str:
    cells = [cell for cell in read_json(path)["cells"] if cell["cell_type"] == "code"]
    return digest(["".join(cell["source"]) for cell in cells if "parameters" not in cell["metadata"].get("tags", [])])


def finished_steps(run: Path) -> list[StepRecord]:
    """The finished steps of a run folder: in the order the recipe planned, whatever a clock that jumps wrote down; others as they ended."""
    planned = read_json(run / "manifest.json").get("planned", []) if (run / "manifest.json").exists() else []
    records = [StepRecord(path.parent) for path in run.glob(f"[!.]*/{STEP}")]
    places = {name: place for place, name in enumerate(planned)}
    return sorted(records, key=lambda record: (places.get(record.name, len(places)), record.info["finished"]))


def results_of(run: Path) -> dict[str, dict[str, Any]]:
    """{step: headline} of a run folder's finished steps, in their order."""
    return {record.name: record.results for record in finished_steps(run)}
