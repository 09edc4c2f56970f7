"""Small worlds that a toy model learns in a minute: each has a `vocabulary`, `batch(n, seed)` and, as text, `examples(n, seed)`."""

from importlib import import_module
from typing import Any

from lab.errors import unknown

WORLDS = {
    "pointers": "Pointers",
}


def world(name: str, **settings: Any) -> Any:
    """The world of that name; SettingsError with the closest match for an unknown one."""
    if name not in WORLDS:
        raise unknown("world", name, WORLDS)
    return getattr(import_module(f"{__name__}.{name}"), WORLDS[name])(**settings)
