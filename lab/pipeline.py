"""One recipe, from its plan to a finished run folder: what `lab run` does."""

import contextlib
import importlib.util
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lab import report
from lab.errors import Interrupted, LabError, RunError, unknown
from lab.files import make_folder, read_json, sketch_json
from lab.progress import Display, clock, display
from lab.running import kernels, papers, runs
from lab.running.pool import LIVE
from lab.running.records import fingerprint
from lab.tables import number_text

REPORT = "report.html"
PROGRESS = ".progress.json"  # where a kernel writes the state of its loop


class StepFailed(RunError):
    """A step of a run did not finish; the message says where to look and how to go on."""

    status = 1


def run_recipe(
    paper: str,
    recipe: str | None = None,
    overrides: Mapping[str, str] | None = None,
    folder: Path | None = None,
    resume: bool = False,
    from_step: str | None = None,
    show: Display | None = None,
) -> Path:
    """Runs the steps of a recipe that are not done yet and returns the run folder, which holds report.html at the end.

    overrides: {name or step.name: text}. resume: continue `folder` (default: the newest run of this paper and recipe) with the recipe and
    overrides it was started with; finished steps are skipped as long as their parameters, code, data and inputs are the same.
    from_step: run this step and the later ones again; the earlier ones must be finished. Raises before any kernel starts for
    everything that can be known then (SettingsError, RunError); StepFailed if a step fails.
    """
    folder, recipe, overrides = _settle(paper, recipe, dict(overrides or {}), folder, resume or from_step is not None)
    planned = papers.plan(paper, recipe, overrides)
    forced = _forced(planned, from_step)
    facts = {"recipe": recipe, "overrides": overrides, "planned": [step.step for step in planned], "command": _command()}
    run = runs.Run.open(folder, paper, **facts)
    try:
        _check_earlier(run, planned, forced)
        with _belongs_to(run), kernels.server():
            live = Live(f"{paper} {recipe}", planned, _history(paper, recipe), show)
            for step in planned:
                _run_step(run, step, step.step in forced, live)
        report.write([run.folder], run.folder / REPORT)
    except KeyboardInterrupt:
        raise Interrupted(f"Stopped. Everything so far is kept; go on with: {_go_on(run)}") from None
    finally:
        run.close()
    return run.folder


def _command() -> str:
    return shlex.join(["lab", *sys.argv[1:]])


def _settle(
    paper: str, recipe: str | None, overrides: dict[str, str], folder: Path | None, resume: bool
) -> tuple[Path, str, dict[str, str]]:
    """(folder, recipe, overrides) after what a resumed run was started with; RunError where folder and wish disagree."""
    papers.folder(paper)
    if resume and folder is None:
        folder = runs.latest(paper, recipe)
    folder = (folder or runs.new_folder(paper)).resolve()
    if not (folder / runs.MANIFEST).exists():
        return folder, recipe or "toy", overrides
    if not resume:
        raise RunError(f"{folder} already holds a run; continue it with --resume, or choose another folder.")
    held = read_json(folder / runs.MANIFEST)
    if held.get("paper") != paper or (recipe and held.get("recipe") not in (recipe, None)):
        raise RunError(f"{folder} holds a run of {held.get('paper')} {held.get('recipe')}; it cannot go on as {paper} {recipe or ''}.")
    return folder, recipe or held.get("recipe") or "toy", {**held.get("overrides", {}), **overrides}


def _forced(planned: list[papers.Planned], from_step: str | None) -> set[str]:
    names = [step.step for step in planned]
    if from_step is None:
        return set()
    if from_step not in names:
        raise unknown("step", from_step, names)
    return set(names[names.index(from_step) :])


def _check_earlier(run: runs.Run, planned: list[papers.Planned], forced: set[str]) -> None:
    if not forced:
        return
    for step in planned:
        if step.step not in forced and run.step(step.step) is None:
            raise RunError(f"Step {step.step!r} of {run.folder} has not finished: continue with --resume and without --from.")


def is_finished(folder: Path, planned: list[papers.Planned]) -> bool:
    """Whether `folder` holds a run of these steps, all done, and its report, with the same parameters, code and data."""
    if not (folder / runs.MANIFEST).exists() or not (folder / REPORT).exists():
        return False
    return all(_is_done(folder, step) for step in planned)


def _is_done(folder: Path, step: papers.Planned) -> bool:
    record = runs.Run(folder).step(step.step)
    return record is not None and record.unchanged(fingerprint(step.spec, step.values, folder)[0])


def _kept(folder: Path, planned: list[papers.Planned], forced: set[str]) -> set[str]:
    """The steps that a run which goes on would skip: done, unchanged, and after none that is run again."""
    kept: set[str] = set()
    for step in planned:
        if step.step not in forced and kept.issuperset(set(step.spec.needs) & {p.step for p in planned}) and _is_done(folder, step):
            kept.add(step.step)
    return kept


def describe(
    paper: str,
    recipe: str | None = None,
    overrides: Mapping[str, str] | None = None,
    folder: Path | None = None,
    resume: bool = False,
    from_step: str | None = None,
) -> dict[str, Any]:
    """What `run_recipe` would do, given the same: steps with their settings, and what the method's own plan adds, touching no weights.

    A method adds `lab/methods/<key>/plan.py` with `describe(settings) -> dict` (parameter counts, optimizer steps); `settings` is
    {step: values}.
    """
    goes_on, recipe = resume or from_step is not None, recipe or None
    if goes_on:
        folder, recipe, overrides = _settle(paper, recipe, dict(overrides or {}), folder, True)
    recipe = recipe or "toy"
    planned = papers.plan(paper, recipe, overrides or {})
    kept, took = _kept(folder, planned, _forced(planned, from_step)) if goes_on else set(), _history(paper, recipe)
    steps = [
        {
            "step": p.step,
            "notebook": p.spec.notebook,
            "needs": p.spec.needs,
            "given": p.given,
            "values": p.values,
            "took_s": took.get(p.step),
            "kept": p.step in kept,
        }
        for p in planned
    ]
    details = _details(paper, {p.step: p.values for p in planned})
    told = {"paper": paper, "recipe": recipe, "overrides": dict(overrides or {}), "title": papers.pipeline(paper).title}
    return told | {"steps": steps, "details": details} | ({"run": str(folder)} if goes_on else {})


def _details(paper: str, settings: dict[str, dict[str, Any]]) -> dict[str, Any]:
    name = f"lab.methods.{paper}"
    if importlib.util.find_spec(name) is None or importlib.util.find_spec(f"{name}.plan") is None:
        return {}
    own = getattr(importlib.import_module(f"{name}.plan"), "describe", None)
    return own(settings) if own else {}


def describe_text(described: Mapping[str, Any]) -> str:
    """`describe`'s answer for a terminal: a star marks values that differ from the notebook's default."""
    lines = [f"{described['title']} · {described['recipe']}"]
    lines += [f"goes on in {described['run']}"] if "run" in described else []
    for number, step in enumerate(described["steps"], 1):
        if step["kept"]:
            lines.append(f"\n{number}. {step['step']} is done and kept")
            continue
        needs = f" after {', '.join(step['needs'])}" if step["needs"] else ""
        took = f", took {clock(step['took_s'])} last time" if step["took_s"] else ""
        lines.append(f"\n{number}. {step['step']} ({step['notebook']}){needs}{took}")
        lines += [f"   {'*' if name in step['given'] else ' '} {name} = {value!r}" for name, value in step["values"].items()]
    if described["details"]:
        lines += ["", *(f"{name}: {number_text(value)}" for name, value in described["details"].items())]
    return "\n".join(lines)


@contextlib.contextmanager
def _belongs_to(run: runs.Run) -> Iterator[None]:
    """Kernels started within belong to `run`: they may write into it although it is locked."""
    before = dict(os.environ)
    os.environ |= {"LAB_RUN": str(run.folder), "LAB_PROGRESS": str(run.folder / PROGRESS)}
    try:
        yield
    finally:
        for name in (PROGRESS, LIVE):
            (run.folder / name).unlink(missing_ok=True)
        for name in ("LAB_RUN", "LAB_PROGRESS"):
            os.environ.pop(name)
            os.environ |= {name: before[name]} if name in before else {}


def _run_step(run: runs.Run, planned: papers.Planned, forced: bool, live: "Live") -> None:
    from lab.running.notebooks import execute

    name = planned.step
    mark, _ = fingerprint(planned.spec, planned.values, run.folder)
    record = run.step(name)
    if record is not None and not forced and record.unchanged(mark):
        live.skip(name)
        return
    token = record.info["token"] if record is not None else None
    output = make_folder(run.folder / "notebooks") / f"{name}.ipynb"
    with live.step(name):
        try:
            execute(planned.spec.path, output, {**planned.given, "run": str(run.folder)}, live.cell)
        except LabError as error:
            _failed(run, name, error)
    record = run.step(name)
    if record is None or record.info["token"] == token:
        _failed(run, name, RunError(f"{planned.spec.notebook} ended without step.finish()."))
    output.with_suffix(".log").unlink(missing_ok=True)
    run.record(**{name: {"wall_s": round(live.seconds(name), 2)}})


def _failed(run: runs.Run, name: str, error: LabError) -> None:
    run.record(**{name: {"status": "failed", "error": str(error)}})
    raise StepFailed(f"Step {name} failed: {error}\nEverything before it is kept; go on with: {_go_on(run)}") from error


def _go_on(run: runs.Run) -> str:
    return f"lab run {run.manifest['paper']} --run {run.folder} --resume"


def _history(paper: str, recipe: str) -> dict[str, float]:
    """{step: wall seconds} of the newest finished run of this recipe."""
    found = sorted(runs.provenance.outputs().glob(f"{paper}/*/{runs.MANIFEST}"), key=lambda path: -path.stat().st_mtime)
    for path in found:
        with contextlib.suppress(RunError):
            manifest = read_json(path)
            times = {name: facts.get("wall_s") for name, facts in manifest["steps"].items()}
            if manifest.get("recipe") == recipe and times and all(times.values()):
                return times
    return {}


class Live:
    """The line that says where a run is: step, cell, the loop inside it, the time left in the step and in all."""

    def __init__(self, title: str, planned: list[papers.Planned], history: dict[str, float], show: Display | None = None) -> None:
        self.title, self.names, self.history = title, [step.step for step in planned], history
        self.display = show or display()
        self._cells, self._began = (0, 1), time.monotonic()
        self._inner: dict[str, Any] = {}
        self._wall: dict[str, float] = {}
        self._skipped: set[str] = set()

    def cell(self, done: int, total: int) -> None:
        """`done` code cells of `total` have run; the loops of the last one are over."""
        self._cells = (done, total)
        Path(os.environ["LAB_PROGRESS"]).unlink(missing_ok=True)

    def skip(self, name: str) -> None:
        """A finished step stays as it is."""
        self._skipped.add(name)
        self.display.end(f"{self._head(name)} · unchanged, skipped")

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Keeps the line up to date while the step runs, and leaves one line behind."""
        self._cells, self._began = (0, 1), time.monotonic()
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(name, stop), daemon=True)
        thread.start()
        ended = "failed after"
        try:
            yield
            ended = "done in"
        except KeyboardInterrupt:
            ended = "stopped after"
            raise
        finally:
            self._wall[name] = time.monotonic() - self._began
            stop.set()
            thread.join()
            self.display.end(f"{self._head(name)} · {ended} {clock(self._wall[name])}{self._left_in_all(name, 0.0)}")

    def seconds(self, name: str) -> float:
        """Wall time of a step that has run."""
        return self._wall[name]

    def _head(self, name: str) -> str:
        return f"{self.title} · {name} {self.names.index(name) + 1}/{len(self.names)}"

    def _watch(self, name: str, stop: threading.Event) -> None:
        while not stop.wait(0.4):
            state = self.state(name)
            sketch_json(Path(os.environ["LAB_PROGRESS"]).with_name(LIVE), state)
            if self.display.draw_due():
                self.display.draw(self.text(name, state))

    def state(self, name: str) -> dict[str, Any]:
        """Where `name` is: step, cell, the loop inside it and its last metric, seconds left, share of the run, device and memory."""
        inner = {**self._inner, **_inner()}
        self._inner = {key: inner[key] for key in ("device", "memory_mib") if key in inner}
        spent, known = time.monotonic() - self._began, self.history.get(name)
        left = max(inner.get("left_s") or 0.0, known - spent if known else 0.0)
        done, total = self._cells
        share = (self.names.index(name) + done / max(1, total)) / len(self.names)  # steps count alike, cells of a step too
        where = {"step": f"{name} {self.names.index(name) + 1}/{len(self.names)}", "cell": f"cell {done + 1}/{total}", "loop": _loop(inner)}
        return {**where, "metric": inner.get("note", ""), "left_s": left, "spent_s": spent, "share": share, **self._inner}

    def text(self, name: str, state: dict[str, Any] | None = None) -> str:
        """The line for a step that is running."""
        state = state or self.state(name)
        time_text = f"{clock(state['left_s'])} left" if state["left_s"] > 0 else clock(state["spent_s"])
        parts = [self._head(name), state["cell"], f"{state['loop']} {state['metric']}".strip(), time_text]
        return " · ".join(part for part in parts if part) + self._left_in_all(name, state["left_s"])

    def _left_in_all(self, name: str, left: float) -> str:
        """Time left with the steps to come: as long as last time, or as the steps so far on average."""
        to_come = [later for later in self.names[self.names.index(name) + 1 :] if later not in self._skipped]
        past = list(self._wall.values())
        mean = sum(past) / len(past) if past else None
        guesses = [self.history.get(later, mean) for later in to_come]
        if not to_come or any(guess is None for guess in guesses):
            return ""
        return f" · about {clock(left + sum(guesses))} left in all"  # type: ignore[arg-type]


def _inner() -> dict[str, Any]:
    """The state of the loop inside the running cell, if there is one (see `lab.progress`)."""
    try:
        return read_json(Path(os.environ["LAB_PROGRESS"]))
    except (RunError, KeyError):
        return {}


def _loop(inner: dict[str, Any]) -> str:
    if "label" not in inner:
        return ""
    return f"{inner['label']} {inner['done']}" + (f"/{inner['total']}" if inner["total"] else "")
