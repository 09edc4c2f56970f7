"""One training over one or several processes, started from a notebook or a script."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lab.errors import LabError

Value = TypeVar("Value")


def world_size() -> int:
    """How many processes train together (1 outside a launch)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 for the one that writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def on_main(call: Callable[[], Value]) -> Value:
    """What `call()` returns or raises on rank 0, on every rank; others wait for it."""
    if world_size() == 1:
        return call()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = call()
        except (LabError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
