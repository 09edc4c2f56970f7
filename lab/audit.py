"""Looking twice: are a run's files as written, does a run repeat itself, is this machine fit to run anything."""

import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import pipeline
from lab.errors import RunError
from lab.files import file_digest, make_folder, read_json
from lab.running import papers, provenance
from lab.running.records import results_of
from lab.running.runs import open_run
from lab.tables import Row, arms, table_text

FREE_GIB = 2.0  # below this the doctor complains


def verify(folder: Path) -> list[str]:
    """What is wrong with a run folder's finished steps: files that are missing or not as the step wrote them; [] if all is well."""
    problems = []
    for record in open_run(folder).steps():
        for name, known in record.info["files"].items():
            path = record.folder / name
            if not path.is_file():
                problems.append(f"{record.name}/{name} is missing")
            elif file_digest(path) != known:
                problems.append(f"{record.name}/{name} has changed")
    return problems


@dataclass
class Comparison:
    """Two runs of the same recipe: where their headlines differ."""

    first: Path
    second: Path
    compared: int
    differences: list[Row]

    def as_json(self) -> dict[str, Any]:
        return {"first": str(self.first), "second": str(self.second), "compared": self.compared, "differences": self.differences}

    def text(self) -> str:
        """One sentence, and the table of differences if there are any."""
        if not self.differences:
            return f"{self.second} repeats {self.first}: all {self.compared} results are equal."
        count = f"{len(self.differences)} of {self.compared} results differ between {self.first} and {self.second}."
        return f"{table_text(self.differences)}\n\n{count}"


def rerun(folder: Path, tolerance: float = 1e-6) -> Comparison:
    """Runs what `folder` recorded again, in a new folder, and compares every number of the headlines.

    Results that measure time (names ending in `_s` or containing `seconds`) are left out. RunError if its code has changed since.
    """
    run = open_run(folder)
    manifest = run.manifest
    for record in run.steps():
        if changed := provenance.changed_code(record.info["code"]):
            made = (manifest["git"]["commit"] or "an unknown commit")[:12]
            raise RunError(f"lab/{changed[0]} has changed since {folder} was made; check out {made} to run it again.")
    if manifest.get("recipe") is None:
        raise RunError(f"{folder} was not made by `lab run`; there is no recipe to run again.")
    second = pipeline.run_recipe(manifest["paper"], manifest["recipe"], manifest.get("overrides", {}))
    return compare(folder, second, tolerance)


def compare(first: Path, second: Path, tolerance: float) -> Comparison:
    """Every result of two run folders side by side; numbers within relative `tolerance` are equal."""
    ours, theirs = _flat(first), _flat(second)
    names = [name for name in {**ours, **theirs} if not (name[2].endswith("_s") or "seconds" in name[2])]
    differing = [name for name in names if not _equal(ours.get(name), theirs.get(name), tolerance)]
    rows = [{"step": n[0], "arm": n[1], "result": n[2], "first": ours.get(n), "second": theirs.get(n)} for n in differing]
    return Comparison(first, second, len(names), rows)


def _flat(folder: Path) -> dict[tuple[str, str, str], Any]:
    headlines = results_of(folder)
    return {(step, arm, name): v for step, head in headlines.items() for arm, row in arms(head).items() for name, v in row.items()}


def _equal(one: Any, two: Any, tolerance: float) -> bool:
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=tolerance, abs_tol=tolerance)
    return one == two


def doctor() -> list[dict[str, Any]]:
    """One {"name", "ok", "needed", "found", "advice"} for everything a run depends on; `needed` where nothing works without it."""
    checks: list[tuple[str, bool, Callable[[], tuple[bool, str]], str]] = [
        ("python", True, _python, "Install Python 3.11, 3.12 or 3.13 and make a new environment."),
        ("packages", True, _packages, "Install them: pip install -c constraints.txt -e .[test]"),
        ("torch", True, _torch, "Install a torch build for this driver, or a newer driver: https://pytorch.org/get-started/locally"),
        ("kernel", True, _kernel, "Register one: python -m ipykernel install --sys-prefix"),
        ("papers", True, _papers, "Run inside a checkout, or set LAB_HOME to one."),
        ("outputs", True, _outputs, "Set LAB_OUTPUTS to a folder you may write to."),
        ("disk", False, _disk, "Free some space, or set LAB_OUTPUTS to another disk."),
        ("hub", False, _hub, "For gated models: hf auth login; without network: HF_HUB_OFFLINE=1. Toy recipes need no hub."),
        ("engines", False, _engines, "For sweeps on a cluster: pip install -e '.[slurm]' (and Slurm's sbatch), or '.[ray]'."),
        ("browser", False, _browser, "Only the browser tests need it: apt-get install chromium, or playwright install chromium."),
    ]
    return [_check(*check) for check in checks]


def _check(name: str, needed: bool, look: Callable[[], tuple[bool, str]], advice: str) -> dict[str, Any]:
    try:
        ok, found = look()
    except (OSError, ImportError, RuntimeError, RunError, ValueError) as error:
        ok, found = False, f"{type(error).__name__}: {error}"
    return {"name": name, "ok": ok, "needed": needed, "found": found, "advice": advice}


def _python() -> tuple[bool, str]:
    return (3, 11) <= sys.version_info[:2] < (3, 14), f"{sys.version.split()[0]} at {sys.executable}"


def _packages() -> tuple[bool, str]:
    from packaging.requirements import Requirement

    wrong = []
    for text in importlib.metadata.requires("lab") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "absent"
        if version == "absent" or not requirement.specifier.contains(version.partition("+")[0]):
            wrong.append(f"{requirement.name} {version} (wanted {requirement.specifier})")
    return not wrong, ", ".join(wrong) or "as required"


def _torch() -> tuple[bool, str]:
    import torch

    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")  # a build without this card's kernels fails here
        return True, f"{torch.__version__}, {torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if shutil.which("nvidia-smi") is None:
        return True, f"{torch.__version__}, CPU only"
    built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    return False, f"{torch.__version__}, {built}, sees no GPU; driver {_driver()}"


def _driver() -> str:
    """The driver's version and the newest CUDA it can run, as nvidia-smi says."""
    done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
    found = re.search(r"Driver Version:\s*([\d.]+)\s+CUDA Version:\s*([\d.]+)", done.stdout)
    return f"{found[1]}, up to CUDA {found[2]}" if found else f"silent ({(done.stderr or done.stdout).strip()[:80] or done.returncode})"


def _kernel() -> tuple[bool, str]:
    from jupyter_client.kernelspec import KernelSpecManager

    found = KernelSpecManager().find_kernel_specs()
    if "python3" not in found:
        return False, "no kernel named python3"
    command = read_json(Path(found["python3"]) / "kernel.json")["argv"][0]
    there = shutil.which(command) if command not in ("python", "python3") else sys.executable
    same = there is not None and Path(there).resolve() == Path(sys.executable).resolve()
    return same, found["python3"] + ("" if same else f" starts {command}, which is not this Python")


def _papers() -> tuple[bool, str]:
    return bool(papers.papers()), f"{', '.join(papers.papers()) or 'none'} in {provenance.home()}"


def _outputs() -> tuple[bool, str]:
    folder = make_folder(provenance.outputs())
    return os.access(folder, os.W_OK), str(folder)


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(make_folder(provenance.outputs())).free / 2**30
    return free >= FREE_GIB, f"{free:.1f} GiB free for outputs"


def _hub() -> tuple[bool, str]:
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import HfHubHTTPError

    from lab.hub import reachable

    if constants.HF_HUB_OFFLINE:
        return True, "offline mode (HF_HUB_OFFLINE)"
    if not reachable():
        return False, f"{constants.ENDPOINT} does not answer"
    if (token := get_token()) is None:
        return False, f"{constants.ENDPOINT} answers; no token"
    try:
        return True, f"{constants.ENDPOINT} answers; token of {HfApi().whoami(token)['name']}"
    except HfHubHTTPError:
        return False, f"{constants.ENDPOINT} answers, but refuses the token"


def _engines() -> tuple[bool, str]:
    found = {name: importlib.util.find_spec(package) is not None for name, package in (("slurm", "submitit"), ("ray", "ray"))}
    found["slurm"] = found["slurm"] and shutil.which("sbatch") is not None
    there = [name for name, ok in found.items() if ok]
    return bool(there), ", ".join(["local", *there])


def _browser() -> tuple[bool, str]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        return False, "none found"
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20)
    return done.returncode == 0, done.stdout.strip() or path
