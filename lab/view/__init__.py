"""Pictures of recorded runs: `view.tokens(trace)` and its siblings show themselves in a notebook, a file or a terminal."""

from typing import Any

from lab.view.answers import Answers, answers
from lab.view.base import View
from lab.view.compare import Compare, compare
from lab.view.decide import passes_at, with_gates, with_threshold
from lab.view.histogram import Histogram, histogram
from lab.view.samples import Samples, Versus, samples, versus
from lab.view.thoughts import Thoughts, thoughts
from lab.view.tokens import Tokens, tokens
from lab.view.training import Training, training

_LIVE = ("Explorer", "Watch", "explore", "explore_answers", "explore_gates", "explore_histogram", "explore_pair")
_LIVE += ("explore_runs", "explore_thoughts", "explore_versus", "watch")

__all__ = ["Answers", "Compare", "Histogram", "Samples", "Thoughts", "Tokens", "Training", "Versus", "View", *_LIVE]
__all__ += ["answers", "compare", "histogram", "samples", "thoughts", "tokens", "training", "versus"]
__all__ += ["passes_at", "with_gates", "with_threshold"]


def __getattr__(name: str) -> Any:
    if name not in _LIVE:
        raise AttributeError(f"module 'lab.view' has no attribute {name!r}")
    from lab.view import widgets  # ipywidgets takes a second to import

    return getattr(widgets, name)
