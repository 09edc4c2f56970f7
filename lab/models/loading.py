"""Strict reading of weights: every missing, unexpected or mis-shaped tensor is named, and no file can run code."""

from collections.abc import Collection, Iterable

from lab.errors import CheckpointError


def check_complete(name: str, missing: Collection, unexpected: Collection, misshaped: Iterable[tuple]) -> None:
    """Raise CheckpointError unless all three are empty; `misshaped` holds (key, shape found, shape wanted)."""
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if misshaped := [f"{key}: found {tuple(found)}, wanted {tuple(wanted)}" for key, found, wanted in misshaped]:
        problems.append(f"{len(misshaped)} of another shape ({_some(misshaped)})")
    if problems:
        raise CheckpointError(f"The weights of {name!r} do not fit its configuration: {'; '.join(problems)}.")


def _some(names: Collection[str], count: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
