"""Where a run comes from: repository, commit, packages, device, and the exact code a step imported."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from lab.files import file_digest

PACKAGES = ("lab", "torch", "transformers", "peft", "accelerate", "trl", "datasets", "tokenizers", "safetensors", "numpy", "papermill")
_SOURCE = Path(__file__).resolve().parents[1]  # the package
_PLUMBING = {f"{name}.py" for name in ("__init__", "errors", "files", "machine", "progress", "steps", "tables")}  # shape no result


def home() -> Path:
    """The folder with `papers/` and `notebooks/`: LAB_HOME, else the checkout `lab` is imported from, else the working directory."""
    if named := os.environ.get("LAB_HOME"):
        return Path(named).resolve()
    return _SOURCE.parent if (_SOURCE.parent / "papers").is_dir() else Path.cwd()


def outputs() -> Path:
    """The folder that holds all runs: LAB_OUTPUTS, else `outputs` at home."""
    return Path(os.environ.get("LAB_OUTPUTS") or home() / "outputs").resolve()


def _git(*arguments: str) -> str | None:
    if not (_SOURCE.parent / ".git").exists():
        return None  # installed somewhere: a repository further up is not ours
    command = ["git", "-C", str(_SOURCE.parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def commit() -> dict[str, Any]:
    """{"commit", "dirty"} of the checkout; commit None where `lab` is not in a git checkout."""
    head = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": head.strip() if head else None, "dirty": bool(status and status.strip())}


def uncommitted(limit: int = 1 << 20) -> str:
    """The diff of tracked files against the commit, at most `limit` characters."""
    return (_git("diff", "HEAD") or "")[:limit]


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def imported_code() -> dict[str, str]:
    """{path below the package: content hash} of every file of `lab` this process has imported, bar those that only carry runs."""
    modules = [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "lab"]
    files = [Path(file) for module in modules if (file := getattr(module, "__file__", None))]
    names = {str(file.relative_to(_SOURCE)) for file in files if file.is_relative_to(_SOURCE)}
    return {name: file_digest(_SOURCE / name) for name in sorted(names - _PLUMBING) if not name.startswith("running/")}


def changed_code(recorded: dict[str, str]) -> list[str]:
    """The files of an earlier `imported_code()` that are not the same any more."""
    return [name for name, known in recorded.items() if not (_SOURCE / name).is_file() or file_digest(_SOURCE / name) != known]
