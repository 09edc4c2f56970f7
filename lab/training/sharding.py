"""How the processes of a training share its memory: copies of everything (ddp), or the optimizer state in pieces (fsdp, zero1, zero2).

A latent training passes through the model many times a step (once for every thought) and reads the weights directly, so FSDP2 holds
the whole model as one unit: the weights are gathered once a step, stay whole for all its passes, and are freed after the update; gradients
are in pieces once they are summed, not before. DeepSpeed's ZeRO leaves the weights whole (see `lab.training.zero`); gradients are in pieces
after each micro-batch in zero2, after the last in zero1.
Every function here does nothing to a module that is not sharded. Checkpoints hold whole tensors: they open with `lab.load` and resume
under any number of processes and any sharding.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lab.errors import SettingsError

Sharding = Literal["ddp", "fsdp", "zero1", "zero2"]
NOT_OFFERED = (
    "not offered: ZeRO-3 gathers weights where a module is called, and thoughts read them elsewhere. "
    "zero1 and zero2 (DeepSpeed) and fsdp keep the optimizer state in pieces"
)


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been called on `module`."""
    return hasattr(module, "used")


def _is_fsdp(module: nn.Module) -> bool:
    return hasattr(module, "unshard")


def shard(module: nn.Module, device: torch.device, how: Sharding) -> nn.Module:
    """Moves `module` to `device`, with rank 0's weights everywhere, so that transformers' Trainer wraps it no further.

    With fsdp each process is left its piece of every parameter; with zero1 and zero2 it is `split` that cuts what the optimizer keeps.
    """
    module.to(device)
    for tensor in module.state_dict().values():
        dist.broadcast(tensor, src=0)
    if how == "fsdp":
        _fully_shard(module)
    elif learning := [name for name, p in module.named_parameters() if p.requires_grad and p.dtype != torch.float32]:
        raise SettingsError(f"{learning[0]} does not learn in float32, as ZeRO has it here; set stability to safe.")
    module.stage = 0 if how == "fsdp" else int(how[-1])
    module.is_distributed_loading_by_transformers = True
    module.used = _Used(module)
    return module


def _fully_shard(module: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard

    scalars = {name: parameter for name, parameter in module.named_parameters() if not parameter.dim()}
    if learning := [name for name, parameter in scalars.items() if parameter.requires_grad]:
        raise SettingsError(f"{learning[0]} is a single number that learns, which FSDP cannot shard; set sharding to ddp or zero1.")
    fully_shard(module, reshard_after_forward=False, ignored_params=set(scalars.values()))
    module.set_reduce_scatter_unused_params(True)  # a micro-batch of one process may use a parameter that another's does not


def split(module: nn.Module, optimizer: torch.optim.Optimizer, clip: float) -> torch.optim.Optimizer:
    """The optimizer to train `module` with: `optimizer` itself, or DeepSpeed's around it, which clips the gradient's norm at `clip`."""
    if not getattr(module, "stage", 0):
        return optimizer
    from lab.training.zero import Zero

    module.zero = Zero(optimizer, module.stage, clip)
    return module.zero


def zero(module: nn.Module) -> Any:
    """The `lab.training.zero.Zero` of a module trained with one, else None."""
    return getattr(module, "zero", None)


class _Used:
    """Which parameters had a gradient on any process: those that had none keep none, as in one process, instead of zeros."""

    def __init__(self, module: nn.Module):
        self.names: set[str] = set()
        with whole(module):
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(lambda _, name=name: self.names.add(name))

    def others(self, module: nn.Module) -> list[nn.Parameter]:
        """The parameters without a gradient since the last call."""
        learning = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        flags = torch.tensor([name in self.names for name, _ in learning], dtype=torch.int32, device=learning[0][1].device)
        dist.all_reduce(flags)
        self.names.clear()
        return [parameter for (_, parameter), used in zip(learning, flags.tolist(), strict=True) if not used]


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, every process has all weights of `module`. All processes must enter."""
    if _is_fsdp(module):
        module.unshard()
    try:
        yield
    finally:
        if _is_fsdp(module):
            module.reshard()


@contextmanager
def accumulating(module: nn.Module, last: bool) -> Iterator[None]:
    """A backward pass inside sums gradients over processes only if it is the `last` of its step (with zero2 always)."""
    if _is_fsdp(module):
        module.set_requires_gradient_sync(last)
        module.set_reshard_after_backward(last)
    yield
    if zero(module):
        zero(module).reduce(last)
    if is_sharded(module) and last:
        unused = module.used.others(module)
        drop_gradients(unused)
        if zero(module):
            zero(module).unused = unused


def keep_up(module: nn.Module, rounds: int) -> None:
    """Where every micro-batch is summed over processes: takes part in the sums of those that have more than `rounds` of them."""
    if getattr(module, "stage", 0) < 2:
        return
    most = torch.tensor(rounds, device=next(module.parameters()).device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    for _ in range(int(most) - rounds):
        with accumulating(module, last=False):
            pass


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Leaves the parameters as if no backward pass had come to them."""
    for parameter in parameters:
        parameter.grad = None


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
    if any(hasattr(parameter, "full_tensor") for parameter in parameters):
        own = {
            key: {name: pieces(value, parameters[key]) if value.shape == parameters[key].shape else value for name, value in of.items()}
            for key, of in state["state"].items()
        }
        state = {**state, "state": own}
    optimizer.load_state_dict(state)


def join(module: nn.Module) -> None:
    """Ends the sharding: every process has all weights as plain parameters again."""
    if not is_sharded(module):
        return
    if _is_fsdp(module):
        module.reshard()
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(full(parameter.detach()).clone(), parameter.requires_grad)
            setattr(part, name, made[id(parameter)])
