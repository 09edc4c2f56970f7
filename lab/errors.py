"""Errors a person can act on: what was wrong, what is allowed, what to do next."""

from collections.abc import Iterable
from difflib import get_close_matches


class LabError(Exception):
    """Base of every error that `lab` raises on purpose; its message is one clear sentence or two."""

    status = 2  # what the command line exits with


class SettingsError(LabError):
    """A parameter, recipe or option that is unknown, contradictory or of the wrong type."""


class DataError(LabError):
    """A record, file or benchmark that cannot be used; names the file and line where there is one."""


class CheckpointError(LabError):
    """A checkpoint with missing, unexpected, mis-shaped or unreadable content."""


class RunError(LabError):
    """A run folder that is locked, holds another run, or cannot be written."""


class BusyError(RunError):
    """A folder in use, a full or read-only disk: nothing is wrong with the request, which may be made again later or elsewhere."""

    status = 3


class Interrupted(RunError):
    """Somebody stopped the work; the message says how to go on."""

    status = 130


class DeviceError(LabError):
    """A device, process or server that was asked for and is not there."""

    status = 3


class OutOfMemory(DeviceError):
    """A device without room for a micro-batch, which may be made smaller."""


class TrainingError(LabError):
    """Training that cannot go on: diverged for good, or data that gives it nothing to learn."""


def closest(name: str, options: Iterable[str], count: int = 3) -> list[str]:
    """The options most similar to `name`, best first, ignoring case."""
    by_lower = {option.lower(): option for option in map(str, options)}
    return [by_lower[match] for match in get_close_matches(name.lower(), list(by_lower), n=count, cutoff=0.5)]


def unknown(kind: str, name: str, options: Iterable[str], error: type[LabError] = SettingsError) -> LabError:
    """An error for an unknown `name`: the closest match first, then what exists (at most a dozen)."""
    options = sorted(map(str, options))
    near = closest(str(name), options)
    hint = f"Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(options[:12]) + (f", … ({len(options)} in all)" if len(options) > 12 else "")
    return error(" ".join(filter(None, [f"Unknown {kind} {name!r}.", hint, f"Known: {listed or 'none'}."])))
