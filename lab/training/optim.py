"""What an optimizer is given: which parameters learn, at which rate, along which schedule."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import nn

from lab.config import Settings
from lab.errors import SettingsError, unknown

Schedule = Literal["linear", "cosine", "cosine_with_min_lr", "constant"]


class Group(Settings):
    """Parameters whose dotted name matches the regular expression `match`, with a rate or a weight decay of their own."""

    match: str
    lr: float | None = None
    weight_decay: float | None = None


def lr_factor(step: int, total: int, schedule: Schedule, warmup: int, floor: float = 0.0) -> float:
    """The fraction of the base rate at `step` (0-based) of `total`; the same numbers as transformers' schedules of these names.

    Args: warmup: steps of linear rise from 0; floor: what `cosine_with_min_lr` ends at (`linear` and `cosine` end at 0).
    """
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return max(0.0, 1.0 - progress)
    half_cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return max(0.0, half_cosine * (1.0 - floor) + floor if schedule == "cosine_with_min_lr" else half_cosine)


def learn_in_float32(model: nn.Module) -> None:
    """Holds in float32 what learns, and with it its moments; what is frozen stays as it is."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def freeze(model: nn.Module, paths: Iterable[str]) -> int:
    """Stops the parameters under each dotted path from learning and counts them; a path that is not there is an error.

    A leading `model.` is optional, as in the TaH recipes (`freeze_component`).
    """
    parts = {**dict(model.named_modules()), **dict(model.named_parameters(remove_duplicate=False))}
    parts.pop("")
    frozen = 0
    for path in paths:
        part = parts.get(path, parts.get(path.removeprefix("model.")))
        if part is None:
            raise unknown("part of the model to freeze", path, parts)
        for parameter in [part] if isinstance(part, nn.Parameter) else part.parameters():
            frozen += parameter.numel() if parameter.requires_grad else 0
            parameter.requires_grad_(False)
    return frozen


def undecayed(model: nn.Module) -> set[str]:
    """Names of biases and of every parameter inside a normalisation layer."""
    norms = {f"{name}." for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    return {name for name, _ in model.named_parameters() if name.endswith("bias") or name.startswith(tuple(norms))}


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, groups: Sequence[Group] = (), decay_all: bool = False) -> list[dict]:
    """Optimizer groups over the parameters that learn: the first matching group decides, then `decay_all`.

    Raises SettingsError for a pattern that matches nothing that learns, or if nothing learns at all.
    """
    free = set() if decay_all else undecayed(model)
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    used = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        index = next((i for i, group in enumerate(groups) if re.search(group.match, name)), None)
        used.add(index)
        own = groups[index] if index is not None else Group(match="")
        decay = own.weight_decay if own.weight_decay is not None else (0.0 if name in free else weight_decay)
        found.setdefault((own.lr if own.lr is not None else lr, decay), []).append(parameter)
    for index, group in enumerate(groups):
        if index not in used:
            raise SettingsError(f"The parameter group {group.match!r} matches no parameter that learns; check the pattern and `freeze`.")
    if not found:
        raise SettingsError("No parameter of the model learns: everything is frozen.")
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for (rate, decay), parameters in found.items()]


def adamw(groups: list[dict], betas: Sequence[float], eps: float) -> torch.optim.AdamW:
    """AdamW, with the fused kernel wherever every parameter allows it."""
    fused = all(p.dtype.is_floating_point and p.device.type in ("cpu", "cuda") for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=eps, fused=fused)


def follow(optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> torch.optim.lr_scheduler.LambdaLR:
    """A scheduler that sets every group's rate to its base rate times `factor(step)`."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
