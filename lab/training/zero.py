"""DeepSpeed's ZeRO-1 and ZeRO-2 as an optimizer that any Trainer can drive; imported only where `sharding` asks for it.

DeepSpeed's engine updates inside its backward pass, before a step can be judged, and its hooks sum gradients in the order in which they
appear, which differs between processes where the batch decides how a model thinks. Here is its optimizer without engine and hooks:
gradients are summed when they are told to be, in the order of the parameters.
"""

import warnings
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import comm, ops
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from deepspeed.utils.timer import NoopTimer
from torch import Tensor, nn

_BUCKET = 2**26  # gradients summed at a time


class Zero(DeepSpeedZeroOptimizer, torch.optim.Optimizer):
    """An AdamW that keeps, on each process, the moments of its share of the parameters (stage 1), and the gradients too (stage 2).

    Its state dict is AdamW's own, with whole moments: all processes must ask for it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stage: int, clip: float):
        _join_processes()
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        super().__init__(
            optimizer,
            {parameter: str(number) for number, parameter in enumerate(parameters)},
            NoopTimer(),
            {},
            dp_process_group=dist.group.WORLD,
            reduce_bucket_size=min(_BUCKET, sum(parameter.numel() for parameter in parameters)),
            clip_grad=clip if clip < float("inf") else 0.0,
            communication_data_type=torch.float32,
            partition_grads=stage == 2,
            check_grad_overflow=False,
        )
        self.defaults, self.unused = optimizer.defaults, []
        for hook in self._grad_acc_hooks:
            hook.remove()

    # ---- each step ----
    def reduce(self, last: bool) -> None:
        """Sums what backward passes left in the parameters: stage 1 after the last micro-batch of a step, stage 2 after each."""
        if not last and not self.partition_gradients:
            return
        self.set_gradient_accumulation_boundary(last)
        for number, group in enumerate(self.bit16_groups):
            for parameter in group:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                self.process_gradients(parameter, number)
        if self.partition_gradients:
            self.overlapping_partition_gradients_reduce_epilogue()
        else:
            self.reduce_gradients()

    def norm(self) -> Tensor:
        """Of the whole gradient, after the last `reduce`; infinite where a part of it is not finite."""
        norm = self.scaled_global_norm()
        return torch.where(norm < 0, torch.inf, norm)  # DeepSpeed's mark

    def drop(self) -> None:
        """Forgets the gradients: the next `step` does nothing."""
        for number in self.averaged_gradients:
            self.averaged_gradients[number] = self.all_grad_tensors[number] = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Clips and updates this process's share, then gives all processes all weights; does nothing after `drop`.

        `unused` parameters stay as they are; where they are used later, their moments' bias is corrected as if they had always been.
        """
        if all(gradient is None for gradient in self.averaged_gradients.values()):
            return
        self._link()
        before = [[tensor.clone() for tensor in self._parts(parameter)] for parameter in self.unused]
        super().step()
        for parameter, kept in zip(self.unused, before, strict=True):
            for tensor, old in zip(self._parts(parameter), kept, strict=False):  # before the first step there are no moments
                tensor.copy_(old)

    def _parts(self, parameter: nn.Parameter) -> list[Tensor]:
        """The parameter's weights, and what this process has of their master copy and of their moments."""
        own = parameter._hp_mapping
        return [parameter.data, *([own.hp_fragment.data, *(own.optim_fragment or {}).values()] if own else [])]

    def _link(self) -> None:
        """Lets every parameter find its moments; DeepSpeed does so when only those of the first group are there."""
        self._hp_optimizer_states_linked = False
        self._lazy_init_hp_params_optimizer_state()

    # ---- checkpoints ----
    def state_dict(self) -> dict[str, Any]:
        self._link()
        state, groups, first = {}, self.optimizer.state_dict()["param_groups"], 0
        for group, parameters, flat in zip(groups, self.bit16_groups, self.single_partition_of_fp32_groups, strict=True):
            group["params"] = list(range(first, first + len(parameters)))
            own = self.optimizer.state.get(flat, {})
            for number, parameter in zip(group["params"], parameters, strict=True) if own else ():
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in own if name != "step"}
                state[number] = {"step": own["step"].clone(), **moments}
            first += len(parameters)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up an AdamW's state and the model's present weights."""
        self.refresh_fp32_params()
        own = zip(state["param_groups"], self.optimizer.param_groups, self.single_partition_of_fp32_groups, strict=True)
        for saved, group, flat in own:
            group.update({name: value for name, value in saved.items() if name != "params"})
            if found := [state["state"][number] for number in saved["params"] if number in state["state"]]:
                blank = {name: torch.zeros_like(flat) for name in found[0] if name != "step"}
                self.optimizer.state[flat] = {"step": max(one["step"] for one in found).to(flat.device, copy=True), **blank}
        self._link()
        parameters = [parameter for group in self.bit16_groups for parameter in group]
        for number, saved in state["state"].items():
            for name in saved.keys() - {"step"}:
                safe_set_full_optimizer_state(parameters[number], saved[name].to(parameters[number].device), name)


def _join_processes() -> None:
    """Lets DeepSpeed use the process group there is, without compiling a kernel of its own for it (minutes, on a CPU)."""
    ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", ".*all_gather_into_tensor. is deprecated", FutureWarning)
    comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
