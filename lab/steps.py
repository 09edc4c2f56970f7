"""One step of a run, as a notebook sees it: where its files go, what it reads, what it reports."""

import csv
import io
import logging
import os
import shutil
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from lab import machine
from lab.errors import RunError, SettingsError, unknown
from lab.files import append_line, file_digest, plain, read_json, write_json, write_text, writing
from lab.running import provenance
from lab.running.records import METRICS, RESULTS, STEP, StepRecord, fingerprint
from lab.running.runs import Run, latest, new_folder, now, put_in_place, wait_lock

log = logging.getLogger(__name__)
_open_steps: list["Step"] = []


def begin(paper: str, step: str, run: str = "", parameters: dict[str, Any] | None = None) -> "Step":
    """Opens one step of a run and shows one line: device, commit, folder. The first call of every notebook.

    run: a run folder, "latest" (the newest of this paper) or "" (a new folder). parameters: what distinguishes this step's result;
    by default the values that the caller's parameters cell holds now. Random generators are seeded with `seed` if that is among them.
    A step killed earlier with the same parameters and code is taken up where it stopped (`step.resumed`).
    Raises RunError if the folder is in use, holds another paper's run or something else, or cannot be written;
    SettingsError for a step the paper does not have or a parameter of the wrong type.
    """
    for earlier in list(_open_steps):
        earlier.close()
    spec = _spec(paper, step)
    if parameters is None:
        parameters = _parameters_of_caller(spec, sys._getframe(1).f_globals)
    owner = Run.open(_folder(paper, run), paper)
    try:
        opened = Step(owner, step, parameters, spec)
    except BaseException:
        owner.close()
        raise
    _open_steps.append(opened)
    _seed(parameters.get("seed"))
    taken_up = " (taken up where it stopped)" if opened.resumed else ""
    show_line(f"{machine.device_name()} · {_commit_text(opened.info['git'])} · {owner.folder}/{step}{taken_up}")
    return opened


def _folder(paper: str, run: str) -> Path:
    if run == "latest":
        return latest(paper)
    return Path(run).resolve() if run else new_folder(paper)


def _spec(paper: str, step: str) -> Any:
    from lab.running import papers

    return papers.pipeline(paper).spec(step)


def _parameters_of_caller(spec: Any, names: dict[str, Any]) -> dict[str, Any]:
    from lab.running.parameters import parameters_of

    known = {name: parameter for name, parameter in parameters_of(spec.path).items() if name != "run"}
    if missing := sorted(set(known) - set(names)):
        raise SettingsError(f"Run the parameters cell first: {missing[0]} is not set.")
    return {name: parameter.check(names[name]) for name, parameter in known.items()}


def _seed(seed: int | None) -> None:
    if seed is None:
        return
    import random

    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed % 2**32)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def _commit_text(git: dict[str, Any]) -> str:
    return f"commit {(git['commit'] or 'unknown')[:8]}" + (" + uncommitted changes" if git["dirty"] else "")


def show_line(text: str) -> None:
    """Shows a line where people look: a notebook's output, else the log."""
    if (ipython := sys.modules.get("IPython")) and ipython.get_ipython() is not None:
        ipython.display.display({"text/plain": text}, raw=True)
        return
    log.info(text)


class Step:
    """An open step: where its files go, what it reads, what it reports. Made by `begin`."""

    def __init__(self, run: Run, name: str, parameters: dict[str, Any], spec: Any) -> None:
        self.run, self.name, self.parameters, self._spec = run, name, parameters, spec
        self.folder = run.folder / f".{name}.partial"
        dying = 60.0 if "LAB_RUN" in os.environ else 0.0  # the kernel of a killed command ends by itself, within moments
        self._lock = wait_lock(run.folder / f".{name}.lock", f"Step {name} of {run.folder} is running already; stop that process", dying)
        self._started = time.monotonic()
        mark, data = fingerprint(spec, parameters, run.folder)
        self.resumed = self._can_take_up(mark)
        earlier = read_json(self.folder / STEP) if self.resumed else {"seconds": 0.0, "attempts": 0, "warnings": []}
        if not self.resumed:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._seconds_before = earlier["seconds"]
        about = {"step": name, "parameters": plain(parameters), "notebook": spec.notebook, "fingerprint": mark, "token": None, "data": data}
        origin = {"code": provenance.imported_code(), "git": provenance.commit(), "machine": machine.facts()}
        state = {"status": "running", "started": now(), "finished": None, "peak_memory_mib": {}, "attempts": earlier["attempts"] + 1}
        self.info: dict[str, Any] = {**about, **origin, **state, "seconds": earlier["seconds"], "warnings": earlier["warnings"]}
        write_json(self.folder / STEP, self.info)
        run.record(**{name: {"status": "running", "started": self.info["started"]}})

    def _can_take_up(self, mark: str) -> bool:
        if not (self.folder / STEP).exists():
            return False
        info = read_json(self.folder / STEP)
        return info["fingerprint"] == mark and not provenance.changed_code(info["code"])

    def input(self, step: str) -> Path:
        """The folder of an earlier step of this run; RunError with the command that makes it if it has not finished."""
        if step not in self._spec.needs:
            raise unknown(f"input of {self.name} (add it to `needs` in pipeline.yaml)", step, self._spec.needs, RunError)
        if not self.has(step):
            paper = self.run.manifest["paper"]
            raise RunError(
                f"{self.run.folder} has no finished step {step!r}. Make it with: lab run {paper} --run {self.run.folder} --resume "
                f"(or open that step's notebook with run = {str(self.run.folder)!r}; run = 'latest' takes the newest run)."
            )
        return self.run.folder / step

    def has(self, step: str) -> bool:
        """Whether an earlier step of this run has finished (an optional one may not take part)."""
        return (self.run.folder / step / STEP).exists()

    def log(self, **values: Any) -> None:
        """Adds one line to metrics.jsonl; give `step=` so that a resumed run's repeated points count once."""
        append_line(self.folder / METRICS, {**values, "time": round(time.time(), 3)})

    def warn(self, text: str) -> None:
        """Notes something the reader of the report must know."""
        self.info["warnings"] = [*self.info["warnings"], text]
        write_json(self.folder / STEP, self.info)
        log.warning(text)

    def table(self, name: str, rows: Any) -> None:
        """Keeps a table (rows as mappings, or a DataFrame) as tables/<name>.json and .csv; the report shows it."""
        records = _records(rows)
        write_text(self.folder / "tables" / f"{name}.csv", _csv(records))
        write_json(self.folder / "tables" / f"{name}.json", records)

    def save_figure(self, fig: Any, name: str, table: Any) -> Path:
        """Keeps a figure as figures/<name>.svg, .png and .pdf with the numbers it drew beside it as .csv; returns the SVG's path.

        What `lab.figures` drew can be drawn again from this folder at another size (`lab figures`) and brings its numbers along; those of
        another figure are `table`.
        """
        import pandas as pd

        from lab import figures

        folder, own = self.folder / "figures", getattr(fig, "table", None)
        table = table if own is None else own
        with writing(folder):
            figures.save(fig, table if isinstance(table, pd.DataFrame) else pd.DataFrame(_records(table)), folder, name)
        if source := getattr(fig, "source", None):
            write_json(folder / f"{name}.json", source)
        return folder / f"{name}.svg"

    def save_view(self, view: Any, name: str) -> Path:
        """Keeps a view's HTML (an object with `html()`, or text) as views/<name>.html; the report shows it inline."""
        html = view if isinstance(view, str) else view.html()
        return write_text(self.folder / "views" / f"{name}.html", html)

    def trace(self, trace: Any, name: str = "trace") -> Path:
        """Keeps a Trace as <name>.npz."""
        path = self.folder / f"{name}.npz"
        with writing(path):
            trace.save(path)
        return path

    def finish(self, **headline: Any) -> StepRecord:
        """Ends the step: `headline` (numbers, or {arm: {metric: number}}) becomes results.json; returns the step, which shows it."""
        if self.info["status"] == "done":
            raise RunError(f"Step {self.name} has finished already; run the set-up cell again to do it anew.")
        write_json(self.folder / RESULTS, headline)
        done = {"status": "done", "finished": now(), "seconds": round(self.seconds, 2), "token": uuid.uuid4().hex}
        self.info |= done | {"code": provenance.imported_code(), "peak_memory_mib": machine.peak_memory_mib()}
        self.info["files"] = self._files()
        write_json(self.folder / STEP, self.info)
        final = self.run.folder / self.name
        put_in_place(self.folder, final)
        self.folder = final
        self.run.record()
        self.close()
        return StepRecord(final)

    def _files(self) -> dict[str, str]:
        paths = [path for path in sorted(self.folder.rglob("*")) if path.is_file() and path != self.folder / STEP]
        return {str(path.relative_to(self.folder)): file_digest(path) for path in paths}

    @property
    def seconds(self) -> float:
        """Time spent on this step, earlier attempts included."""
        return self._seconds_before + time.monotonic() - self._started

    def close(self) -> None:
        """Lets others work on the step; a step that has not finished stays as it is, to be taken up."""
        if self in _open_steps:
            _open_steps.remove(self)
        self._lock.close()
        self.run.close()


def _records(rows: Any) -> list[dict[str, Any]]:
    if hasattr(rows, "to_dict"):
        rows = rows.to_dict("records")
    elif isinstance(rows, dict):
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    return plain(list(rows))


def _csv(records: list[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    names = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()
