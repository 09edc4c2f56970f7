"""A notebook-first research workbench for latent reasoning."""

from importlib import import_module
from typing import Any

_PUBLIC = {"begin": "lab.runs", "open_run": "lab.runs", "Trace": "lab.trace", "load": "lab.models", "progress": "lab.progress"}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    return module if module.__name__ == f"lab.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
