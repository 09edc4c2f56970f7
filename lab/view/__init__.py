"""Pictures of recorded runs: `view.tokens(trace)` and its siblings show themselves in a notebook, a file or a terminal."""

from lab.view.base import View
from lab.view.compare import Compare, compare
from lab.view.tokens import Tokens, tokens

__all__ = ["Compare", "Tokens", "View", "compare", "tokens"]
