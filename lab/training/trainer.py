"""transformers' Trainer, driving one optimizer step at a time over a global batch that it splits itself."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from lab import files
from lab.errors import OutOfMemory, TrainingError
from lab.launch import check_world, on_main, rank, world_size
from lab.training import optim, sharding
from lab.training.batches import Batches, Plan
from lab.training.stability.guarded import STATE, WEIGHTS, Diverged, Guarded

log = logging.getLogger(__name__)
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed where it is installed, which would else warn of it

Loss = Callable[[nn.Module, Any], tuple[Tensor, dict[str, Any]]]


class Step(nn.Module):
    """Model and objective as one module, so that everything an objective does happens inside one wrapped forward."""

    accepts_loss_kwargs = False

    def __init__(self, model: nn.Module, loss: Loss):
        super().__init__()
        self.model, self._loss = model, [loss]

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Any]]:
        return self._loss[0](self.model, batch)


@dataclass
class Job:
    """Everything one training is made of; `Supervised` is built from it anew after a rollback."""

    model: nn.Module
    dataset: Any
    collate: Callable[[list], Any]
    loss: Loss
    count: Callable[[Any], int | dict[str, int]]
    validate: Callable[[nn.Module], Mapping[str, float]] | None
    write_row: Callable[[dict[str, Any]], None]
    settings: Any
    plan: Plan
    on_step: Callable[[int, str], None]


class Supervised(Guarded, Trainer):
    """One training job. The Trainer's own batch is the process's share of a global batch; micro-batches are made here."""

    def __init__(self, job: Job, folder: str) -> None:
        self.job, self.s, self.plan = job, job.settings, job.plan
        super().__init__(model=sharded(Step(job.model, job.loss), self.s), args=_arguments(self.s, self.plan, folder))
        check_world(world_size(), self.args.world_size)
        self.args._n_gpu = 1  # one process drives one device
        self.loss_is_scaled_for_ga = True
        self.accelerator.free_memory = lambda *objects: list(objects)  # nothing to free yet; a full collection takes a quarter second
        self.remove_callback(PrinterCallback)
        self.sums: dict[str, float] = {}
        self.summed = 0
        self.best: dict[str, Any] = {"score": -math.inf, "step": 0}
        self.last_row: dict[str, Any] = {}
        self.stopped = False
        self._clock = time.monotonic()

    @property
    def learner(self) -> nn.Module:
        return self.job.model

    @property
    def micro_batch(self) -> int:
        """Rows at a time, after all halvings."""
        return self.plan.micro_batch

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        """Trains to the end; a checkpoint of the end is only taken up."""
        if resume_from_checkpoint is None or not self._is_end(Path(resume_from_checkpoint)):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._load_from_checkpoint(resume_from_checkpoint)
        return None

    def _is_end(self, folder: Path) -> bool:
        self.state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.take_state(files.read_json(folder / STATE)["more"])
        return self.stopped or self.state.global_step >= self.plan.steps

    # ---- what the Trainer asks for ----
    def get_train_dataloader(self) -> DataLoader:
        batches = Batches(self.plan, lambda: self.state.global_step, self.recovery.shift)
        return DataLoader(self.job.dataset, batch_sampler=batches, collate_fn=list, generator=torch.Generator())

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        groups = optim.parameter_groups(self.learner, self.s.lr, self.s.weight_decay, self.s.groups, self.s.decay_all)
        self.optimizer = sharding.split(self.model, optim.adamw(groups, self.s.betas, self.s.eps), self.args.max_grad_norm)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.optimizer = self.optimizer.optimizer  # accelerate's wrapper has nothing to scale, and looks for a package at every step
        self.lr_scheduler = optim.follow(self.optimizer, lambda step: self.s.rate(step, self.plan.steps))
        self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # not reported

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> None:
        return None  # counted in _accumulate, per component

    # ---- one optimizer step ----
    def training_step(self, model: nn.Module, inputs: list, num_items_in_batch: Any = None) -> Tensor:
        if not model.training:
            model.train()
        while True:
            try:
                with sharding.whole(self.model):
                    return self._accumulate(model, inputs)
            except RuntimeError as error:
                self._make_room(model, error)

    def _accumulate(self, model: nn.Module, examples: list) -> Tensor:
        """Gradients of the whole global batch's loss; each component is a mean over all its items, whatever the micro-batches."""
        pieces = self._pieces(examples)
        batches = [self.job.collate(list(rows)) for _, rows in pieces]
        counts = [self._counts(batch) for batch in batches]
        totals = _over_processes(_added(counts), self.args.device)
        whole = list(zip(pieces, batches, counts, strict=True))
        work = [item for item in whole if any(item[2].values())] or whole[:1]
        if not any(totals.values()):
            raise TrainingError(f"Step {self.state.global_step + 1}: a batch without a single item to learn from; filter the data first.")
        if hasattr(self.job.loss, "prepare"):  # an objective that must see the whole batch first (a scale over all its rows)
            self.job.loss.prepare(self.job.model, [self._to_device(batch) for _, batch, _ in work])
        signals: dict[str, Any] = {}
        sharding.keep_up(self.model, len(work))
        for index, ((row, _), batch, count) in enumerate(work):
            _seed_draws(self.plan.key(self.recovery.generation, self.state.global_step, row))
            with self._summing(model, index == len(work) - 1):
                loss, parts = self._weighted(*model(self._to_device(batch)), count, totals)
                self.accelerator.backward(loss * world_size())
            for name, value in parts.items():
                signals[name] = signals.get(name, 0.0) + value
        self.signals = signals
        return torch.zeros((), device=self.args.device)

    def _summing(self, model: nn.Module, last: bool) -> AbstractContextManager:
        """Gradients are summed over processes in the last micro-batch of a step only."""
        if sharding.is_sharded(self.model):
            return sharding.accumulating(self.model, last)
        return nullcontext() if last else self.accelerator.no_sync(model)

    def _pieces(self, examples: list) -> list[tuple[int, list]]:
        """This process's micro-batches with the row of the global batch at which each begins."""
        pieces = self.plan.micro_batches(examples)
        return [((index * world_size() + rank()) * self.plan.micro_batch, rows) for index, (_, rows) in enumerate(pieces)]

    def _counts(self, batch: Any) -> dict[str, int]:
        count = self.job.count(batch)
        return count if isinstance(count, dict) else {"loss": int(count)}

    def _weighted(
        self, loss: Tensor, parts: dict[str, Any], count: dict[str, int], totals: dict[str, int]
    ) -> tuple[Tensor, dict[str, Any]]:
        """(this micro-batch's share of the global loss, its share of every reported number)."""
        share = {name: count[name] / totals[name] if totals[name] else 0.0 for name in totals}
        if set(share) == {"loss"}:
            whole = loss * share["loss"]
            shares = {name: value * share["loss"] for name, value in parts.items()}
        else:
            whole = sum((parts[name] * share[name] for name in share if count[name]), loss.new_zeros(()))
            rows = sum(share.values()) / len(share)
            shares = {name: value * share.get(name, rows) if count.get(name, 1) else 0.0 for name, value in parts.items()}
        detached = {name: value.detach() if isinstance(value, Tensor) else value for name, value in shares.items()}
        return whole, {**detached, "loss": whole.detach()}

    def _to_device(self, batch: Any) -> Any:
        return batch.to(self.args.device) if hasattr(batch, "to") else self._prepare_input(batch)

    def _make_room(self, model: nn.Module, error: RuntimeError) -> None:
        """Halves the micro-batch after an out-of-memory error; anything else goes on upwards, as does what one process cannot settle."""
        if not _out_of_memory(error):
            raise error
        if world_size() > 1 or self.plan.micro_batch == 1:
            raise OutOfMemory(
                f"Out of memory at a micro-batch of {self.plan.micro_batch}; set a smaller micro_batch (the global batch stays), "
                "shorter sequences or a smaller model."
            ) from error
        model.zero_grad()
        torch.cuda.empty_cache()
        self.plan.micro_batch = math.ceil(self.plan.micro_batch / 2)
        log.warning("Out of memory: micro-batch halved to %d, the global batch stays %d.", self.plan.micro_batch, self.plan.global_batch)
        step = self.state.global_step + 1
        self.job.write_row({"event": "out_of_memory", "step": step, "micro_batch": self.plan.micro_batch})

    # ---- after a step ----
    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, learning_rate: float | None = None, **kwargs: Any) -> None:
        step = self.state.global_step
        if step == getattr(self, "_finished_step", -1):
            return  # the Trainer calls once more at the end of the epoch
        self._finished_step = step
        self._add_up()
        validated = self._validate_if_due(step)
        if self.s.log_every and (step % self.s.log_every == 0 or step == self.plan.steps):
            self._log_row(step, learning_rate)
        self.save_if_due(validated)
        self.job.on_step(step, f"loss {self.values['loss']:.3g}")

    def _add_up(self) -> None:
        """Adds a step's numbers to the next row; a skipped update counts as skipped and adds nothing else."""
        if not math.isfinite(self.gradient_norm + sum(self.values.values())):
            self.sums["skipped"] = self.sums.get("skipped", 0.0) + 1
            return
        self.summed += 1
        for name, value in {**self.values, "grad_norm": self.gradient_norm}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _log_row(self, step: int, rate: float | None) -> None:
        means = {name: value if name == "skipped" else value / max(1, self.summed) for name, value in self.sums.items()}
        row = {"step": step, **means, "lr": rate, "epoch": step * self.plan.global_batch / self.plan.examples}
        row["seconds"] = round(time.monotonic() - self._clock, 3)
        self._emit(row)
        self.last_row = row
        self.sums, self.summed = {}, 0

    def _emit(self, row: dict[str, Any]) -> None:
        if rank() == 0:
            self.job.write_row(row)
        if self.s.report_to != "none":
            self.log({name: value for name, value in row.items() if name != "step"})

    def _validate_if_due(self, step: int) -> bool:
        """Whether a validation was made after this step, and passed."""
        if self.job.validate is None or not self.s.eval_every or (step % self.s.eval_every and step != self.plan.steps):
            return False
        self.model.eval()
        with torch.no_grad(), sharding.whole(self.model):
            found = on_main(lambda: dict(self.job.validate(self.job.model)))
        self.model.train()
        self.stopped = bool(found.pop("stop", False))
        self.control.should_training_stop = self.control.should_training_stop or self.stopped
        self._emit({"step": step, **{f"eval_{name}": value for name, value in found.items()}})
        return self._judge_score(step, found)

    def _judge_score(self, step: int, found: Mapping[str, float]) -> bool:
        if "score" not in found:
            return False
        verdict = self.detector.validated(step, found["score"]) if self.s.guard.enabled else None
        if verdict is not None and verdict.action == "diverged":
            raise Diverged(verdict, step, self._extras())
        if verdict is not None and verdict.action == "warn":
            self._note(verdict)
        if found["score"] > self.best["score"]:
            self.best = {"score": found["score"], "step": step}
            if self.s.keep_best:
                self.save_best()
        return True

    def save_best(self) -> None:
        """Puts the weights at their best in `best/`, replacing the earlier ones."""
        from safetensors.torch import save

        path = self.ring.folder / "best" / WEIGHTS
        weights = {name: tensor.cpu() for name, tensor in self.weights().items()}
        on_main(lambda: files.write_bytes(path, save(weights)) and None)

    def more_state(self) -> dict[str, Any]:
        return {"sums": self.sums, "summed": self.summed, "best": self.best, "stopped": self.stopped, "row": self.last_row}

    def take_state(self, state: dict[str, Any]) -> None:
        self.sums, self.summed, self.stopped, self.last_row = state["sums"], state["summed"], state["stopped"], state["row"]
        self.best = {**state["best"], "score": float(state["best"]["score"])}


def sharded(module: nn.Module, s: Any) -> nn.Module:
    """What the Trainer is given: `module`, in pieces where the settings ask for it and there are several processes."""
    if s.sharding == "ddp" or world_size() == 1:
        return module
    cuda = torch.cuda.is_available() and s.device != "cpu"
    return sharding.shard(module, torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"), s.sharding)


def _arguments(s: Any, plan: Plan, folder: str) -> TrainingArguments:
    own = {"max_steps": plan.steps, "per_device_train_batch_size": plan.global_batch, "max_grad_norm": s.clip}
    return TrainingArguments(**shared_arguments(s, folder), **own, logging_nan_inf_filter=False)


def shared_arguments(s: Any, folder: str) -> dict[str, Any]:
    """What every Trainer here is told: its settings' common part, and to leave saving, validating, logging and progress to us."""
    return {
        "output_dir": folder,
        "learning_rate": s.lr,
        "bf16": s.bf16,
        "use_cpu": s.device == "cpu" or not torch.cuda.is_available(),
        "seed": s.seed,
        "report_to": s.report_to,
        **dict.fromkeys(("save_strategy", "eval_strategy", "logging_strategy"), "no"),
        "ignore_data_skip": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": world_size() > 1,
    }


def _added(counts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _over_processes(totals: dict[str, int], device: torch.device) -> dict[str, int]:
    if world_size() == 1:
        return totals
    vector = torch.tensor(list(totals.values()), device=device)
    torch.distributed.all_reduce(vector)
    return dict(zip(totals, vector.tolist(), strict=True))


def _seed_draws(key: int) -> None:
    torch.default_generator.manual_seed(key)  # torch.manual_seed formats a traceback where there is no GPU: 0.7 ms
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(key)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
