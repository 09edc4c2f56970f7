"""A training by several processes of this machine: started, started again with less where memory ran out, its weights brought back."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lab.errors import OutOfMemory, SettingsError
from lab.launch import launch, machines, rank, send_row, world_size
from lab.training.place import TrainResult, row_writer
from lab.training.stability import Ring

log = logging.getLogger(__name__)


def together(train: Callable[..., TrainResult], model: nn.Module, settings: Any, logger: Callable | None, **arguments: Any) -> TrainResult:
    """What `train(model=…, settings=…, **arguments)` comes to in `settings.processes` processes, which leaves its weights in `model`.

    Where one of them runs out of memory all are started again from the last checkpoint, with half the micro-batch.
    """
    if world_size() > 1:
        raise SettingsError(f"These are {world_size()} processes already; set processes to 1 in the training's settings.")
    arguments |= {"model": model, "step_logger": _send if logger else None}
    on_row = (lambda row: logger(**row)) if logger else None
    while True:
        arguments |= {"settings": settings.but(processes=1)}
        try:
            result, weights = launch(_trained, settings.processes, on_row=on_row, train=train, arguments=arguments)
        except OutOfMemory as error:
            settings = _with_less(settings, error, Path(arguments["folder"]), logger)
            arguments |= {"resume": True} if "resume" in arguments else {}
            continue
        _take_up(model, weights)
        return result


def _with_less(s: Any, error: OutOfMemory, folder: Path, logger: Callable | None) -> Any:
    """Settings to start again with; `error` where the micro-batch cannot be smaller."""
    smaller, step = s.smaller(s.processes * machines()), max(Ring(folder, s.keep).steps(), default=0)
    if smaller is None:
        raise error
    log.warning(
        "Out of memory: all processes go on from step %d with a micro-batch of %d, the global batch stays.", step, smaller.micro_batch
    )
    row_writer(folder, logger)({"event": "out_of_memory", "step": step, "micro_batch": smaller.micro_batch})
    return smaller


def _send(**row: Any) -> None:
    send_row(row)


def _trained(train: Callable[..., TrainResult], arguments: dict[str, Any]) -> tuple[TrainResult, dict[str, Tensor]]:
    from lab.training.stability.guarded import learned

    result = train(**arguments)
    return result, {name: tensor.detach().cpu() for name, tensor in learned(arguments["model"]).items()} if rank() == 0 else {}


def _take_up(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Gives `model` what the processes trained, in the type it was trained in; it is left as a training here leaves it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in weights)
        if name in weights:
            parameter.data = weights[name].to(parameter.device)
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(weights[name])
    model.eval()
