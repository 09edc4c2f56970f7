"""How the processes of a training share its memory: copies of everything (ddp), or the optimizer state in pieces (fsdp).

A latent training passes through the model many times a step (once for every thought) and reads the weights directly, so FSDP2 holds
the whole model as one unit: the weights are gathered once a step, stay whole for all its passes, and are freed after the update; gradients
are in pieces once they are summed, not before.
Every function here does nothing to a module that is not sharded. Checkpoints hold whole tensors: they open with `lab.load` and resume
under any number of processes and any sharding.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lab.errors import SettingsError

Sharding = Literal["ddp", "fsdp"]
NOT_OFFERED = (
    "DeepSpeed is not used here: it updates inside its own backward pass, before the guard could judge a step. "
    "sharding fsdp keeps the optimizer state in pieces, and gradients once they are summed; "
    "weights in pieces (ZeRO-3) cannot be read directly"
)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been called on `module`."""
    return hasattr(module, "unshard")


def shard(module: nn.Module, device: torch.device) -> nn.Module:
    """Moves `module` to `device` and leaves each process its piece of every parameter; transformers' Trainer then wraps it no further."""
    from torch.distributed.fsdp import fully_shard

    scalars = {name: parameter for name, parameter in module.named_parameters() if not parameter.dim()}
    if learning := [name for name, parameter in scalars.items() if parameter.requires_grad]:
        raise SettingsError(f"{learning[0]} is a single number that learns, which FSDP cannot shard; set sharding to ddp.")
    fully_shard(module.to(device), reshard_after_forward=False, ignored_params=set(scalars.values()))
    module.set_reduce_scatter_unused_params(True)  # a micro-batch of one process may use a parameter that another's does not
    module.is_distributed_loading_by_transformers = True
    module.used = _Used(module)
    return module


class _Used:
    """Which parameters had a gradient on any process: those that had none keep none, as in one process, instead of zeros."""

    def __init__(self, module: nn.Module):
        self.names: set[str] = set()
        with whole(module):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.names.add(name))

    def drop_others(self, module: nn.Module) -> None:
        learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        flags = torch.tensor([name in self.names for name, _ in learning], dtype=torch.int32, device=learning[0][1].device)
        dist.all_reduce(flags)
        for (_, parameter), used in zip(learning, flags.tolist(), strict=True):
            parameter.grad = parameter.grad if used else None
        self.names.clear()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights of `module`. All processes must enter."""
    if is_sharded(module):
        module.unshard()
    try:
        yield
    finally:
        if is_sharded(module):
            module.reshard()


@contextmanager
def accumulating(module: nn.Module, last: bool) -> Iterator[None]:
    """A backward pass inside sums gradients over processes only if it is the `last` of its step."""
    if is_sharded(module):
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)
    yield
    if is_sharded(module) and last:
        module.used.drop_others(module)


def full(tensor: Any) -> Any:
    """A tensor as if it had never been sharded; anything else as it is. All processes must call it."""
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor  # what is gathered has room for more than its own


def pieces(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, in the form of `like`."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(like, "full_tensor"):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict with whole tensors."""
    return {**state, "state": {key: {name: full(value) for name, value in of.items()} for key, of in state["state"].items()}}


def restore(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Gives `optimizer` a state dict of whole tensors, in pieces where its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    own = {
        key: {name: pieces(value, parameters[key]) if value.shape == parameters[key].shape else value for name, value in of.items()}
        for key, of in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": own})


def join(module: nn.Module) -> None:
    """Ends the sharding: every process has all weights as plain parameters again."""
    if not is_sharded(module):
        return
    module.reshard()
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(full(parameter.detach()), parameter.requires_grad)
            setattr(part, name, made[id(parameter)])
