"""Figures for papers and slides: one function each, a DataFrame in, a matplotlib figure out, its numbers saved beside it.

Intervals come as columns mean, low, high. matplotlib is imported when the first figure is asked for.
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "ablation": "interventions",
    "accuracy_against_passes": "curves",
    "accuracy_against_thoughts": "curves",
    "divergence_events": "curves",
    "learning_curves": "curves",
    "loss_components": "curves",
    "scaling": "curves",
    "gate_histogram": "counts",
    "hard_tokens": "counts",
    "iteration_histogram": "counts",
    "pruning": "counts",
    "thought_map": "maps",
    "thoughts_against_gold_steps": "counts",
    "token_strip": "strips",
    "accuracy_against_cost": "comparison",
    "method_comparison": "comparison",
    "redraw": "again",
    "save": "style",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'lab.figures' has no attribute {name!r}")
    return getattr(import_module(f"lab.figures.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return __all__
