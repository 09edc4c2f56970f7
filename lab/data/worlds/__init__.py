"""Small worlds that a toy model learns in a minute.

Each is a frozen dataclass of settings with a `vocabulary` (token strings), `examples(n, seed)` as text, and, where problems are
rows of tokens, `batch(n, seed)` as arrays. The same settings and seed give the same data on every machine.
"""

from importlib import import_module
from typing import Any

from lab.errors import unknown

WORLDS = {
    "arithmetic": "Arithmetic",
    "instruct": "Instruct",
    "maxmin": "MaxMin",
    "permutations": "Permutations",
    "pointers": "Pointers",
    "prontoqa": "ProntoQA",
    "prosqa": "ProsQA",
    "sums": "Sums",
}


def world(name: str, **settings: Any) -> Any:
    """The world of that name; SettingsError with the closest match for an unknown name or setting."""
    if name not in WORLDS:
        raise unknown("world", name, WORLDS)
    made = getattr(import_module(f"{__name__}.{name}"), WORLDS[name])
    for setting in settings:
        if setting not in made.__dataclass_fields__:
            raise unknown(f"setting of the world {name}", setting, made.__dataclass_fields__)
    return made(**settings)
