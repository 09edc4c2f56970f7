"""A notebook-first research workbench for latent reasoning.

The public names are imported when first used, so that `import lab` costs nothing.
"""

from importlib import import_module
from typing import Any

_OBJECTS = {
    "load": "lab.models.layouts:load",  # any checkpoint, ours or an official one
    "generate": "lab.models.layouts:generate",  # answers of a model or of a checkpoint
    "load_backbone": "lab.models.backbones:load_backbone",
    "load_tokenizer": "lab.models.tokenizers:load_tokenizer",
    "load_benchmark": "lab.data.benchmarks:load_benchmark",
    "begin": "lab.steps:begin",  # the step a notebook is
    "open_run": "lab.running.runs:open_run",
    "run": "lab.pipeline:run_recipe",  # a paper's recipe, from its plan to its report
    "Trace": "lab.trace:Trace",
}
_MODULES = ("data", "evaluate", "figures", "progress", "train", "view")


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"lab.{name}")
    if name not in _OBJECTS:
        raise AttributeError(f"module 'lab' has no attribute {name!r}")
    module, _, attribute = _OBJECTS[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *_OBJECTS, *_MODULES})
