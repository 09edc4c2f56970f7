"""A run is a folder: what ran, what came out, and enough to go on after a kill at any moment.

    outputs/<paper>/<run>/
      manifest.json     paper, recipe, command, commit, packages, device, data, and each step's status, time and memory
      <step>/           a finished step: step.json, results.json, metrics.jsonl, tables/ figures/ views/, and its own files
      .<step>.partial/  the same while the step runs; renamed when it finishes, taken up again when it was killed
      notebooks/        executed notebooks and their HTML
      report.html

A step's `step.json` is the truth about that step; the manifest's list of steps is rebuilt from these files.
"""

import os
import shutil
import time
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

from lab import machine
from lab.errors import BusyError, RunError
from lab.files import lock, make_folder, read_json, write_json, write_text, writing
from lab.running import provenance
from lab.running.records import STEP, StepRecord, finished_steps

MANIFEST = "manifest.json"


def open_run(folder: str | Path) -> "Run":
    """A run to read from; RunError if `folder` is none."""
    return Run(_existing(Path(folder)))


def latest(paper: str, recipe: str | None = None, finished: bool = False) -> Path:
    """The newest run folder of a paper (and recipe; all of whose steps have finished); RunError with the command that makes one."""
    found = sorted((provenance.outputs() / paper).glob(f"*/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    for path in reversed(found):
        run = Run(path.parent)
        if (recipe is None or run.manifest.get("recipe") == recipe) and (run.finished or not finished):
            return path.parent
    wanted = "finished run" if finished else "run"
    raise RunError(f"There is no {wanted} of {paper} yet; make one with: lab run {paper}" + (f" --recipe {recipe}" if recipe else ""))


def new_folder(paper: str) -> Path:
    """The name of a run folder that does not exist yet."""
    return provenance.outputs() / paper / f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}"


def _existing(folder: Path) -> Path:
    if not (folder / MANIFEST).is_file():
        raise RunError(f"{folder} is not a run folder: it has no {MANIFEST}.")
    return folder.resolve()


class Run:
    """A run folder and its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock: Any = None

    @classmethod
    def open(cls, folder: Path, paper: str, **facts: Any) -> "Run":
        """The run in `folder`, made with `facts` in its manifest if the folder is new or empty; locked unless this process belongs to it.

        Raises RunError if another process works on it, or if the folder holds another paper's run or anything else.
        """
        if (folder / MANIFEST).exists():
            held = read_json(folder / MANIFEST).get("paper")
            if held != paper:
                raise RunError(f"{folder} already holds a run of {held!r}; choose another folder for {paper!r}.")
        elif folder.exists() and not _is_blank(folder):
            raise RunError(f"{folder} already exists and is not a run; nothing was changed, choose another folder.")
        run = cls(make_folder(folder))
        run._take()
        if not (folder / MANIFEST).exists():
            run._write_new_manifest(paper, facts)
        run.repair(facts)
        return run

    def _take(self) -> None:
        if os.environ.get("LAB_RUN") != str(self.folder):
            self._lock = lock(self.folder / ".lock", f"{self.folder} is in use; wait for it, or choose another folder with --run")

    def close(self) -> None:
        """Lets others work on the folder."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _write_new_manifest(self, paper: str, facts: dict[str, Any]) -> None:
        git = provenance.commit()
        about = {"format": 1, "run": self.folder.name, "paper": paper, "recipe": None, "created": now("seconds"), **facts}
        here = {"git": git, "packages": provenance.versions(), "machine": machine.facts()}
        write_json(self.folder / MANIFEST, {**about, **here, "data": {}, "steps": {}, "warnings": []})
        if git["dirty"]:
            write_text(self.folder / "uncommitted.diff", provenance.uncommitted())

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.folder / MANIFEST)

    @property
    def finished(self) -> bool:
        """Whether every step that its recipe planned is done."""
        manifest = self.manifest
        planned = manifest.get("planned") or ["?"]
        return all(manifest["steps"].get(name, {}).get("status") == "done" for name in planned)

    def steps(self) -> list["StepRecord"]:
        """The finished steps, in their order."""
        return finished_steps(self.folder)

    def step(self, name: str) -> "StepRecord | None":
        """The finished step `name`, if there is one."""
        return StepRecord(self.folder / name) if (self.folder / name / STEP).exists() else None

    def repair(self, facts: dict[str, Any]) -> None:
        """Puts in place what a kill left between the end of a step and its renaming, and brings the manifest up to date with `facts`."""
        for partial in self.folder.glob(".*.partial"):
            if (partial / STEP).exists() and read_json(partial / STEP)["status"] == "done":
                put_in_place(partial, self.folder / partial.name[1 : -len(".partial")])
        self.record(facts)

    def record(self, facts: dict[str, Any] | None = None, **changed: dict[str, Any]) -> None:
        """Rebuilds the manifest's steps from the step files; `facts` are about the run, `changed` ({step: facts}) about steps."""
        mutex = wait_lock(self.folder / ".manifest.lock", f"{self.folder} is being written")
        with mutex:
            manifest = {**self.manifest, **(facts or {})}
            steps = {**manifest["steps"], **{name: {**manifest["steps"].get(name, {}), **about} for name, about in changed.items()}}
            for record in self.steps():
                if record.name not in changed:
                    kept = {name: value for name, value in steps.get(record.name, {}).items() if name == "wall_s"}
                    steps[record.name] = {**kept, **record.summary()}
            manifest["steps"] = steps
            manifest["data"] = {**manifest["data"], **{k: v for record in self.steps() for k, v in record.info["data"].items()}}
            manifest["warnings"] = [f"{record.name}: {text}" for record in self.steps() for text in record.info["warnings"]]
            write_json(self.folder / MANIFEST, manifest)


def wait_lock(path: Path, refusal: str, seconds: float = 20.0) -> Any:
    """`lock`, which the present holder has so many seconds to give back."""
    end = time.monotonic() + seconds
    while True:
        try:
            return lock(path, refusal)
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)


def put_in_place(partial: Path, final: Path) -> None:
    """Gives a finished step its name; an earlier result of that name is kept aside in `.replaced`."""
    with writing(final):
        if final.exists():
            replaced = final.parent / ".replaced" / final.name
            shutil.rmtree(replaced, ignore_errors=True)
            replaced.parent.mkdir(exist_ok=True)
            final.rename(replaced)
        partial.rename(final)


def _is_blank(folder: Path) -> bool:
    """Whether nothing but what a kill during the making of a run leaves behind lies in `folder`."""
    return folder.is_dir() and all(item.name.startswith((".lock", f".{MANIFEST}.")) for item in folder.iterdir())


def now(precision: str = "milliseconds") -> str:
    """The local time with its zone, as the records have it."""
    return datetime.now().astimezone().isoformat(timespec=precision)
