"""What makes any transformers Trainer watch itself, save resumable checkpoints and stop when it diverges."""

import logging
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab import files
from lab.errors import CheckpointError, LabError
from lab.launch import on_main, rank, world_size
from lab.models.loading import read_torch
from lab.training import sharding
from lab.training.stability.detector import OK, Detector, Guard, Signals, Verdict
from lab.training.stability.recovery import Recovery
from lab.training.stability.ring import Ring

log = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER, RANDOM, STATE = "weights.safetensors", "optimizer.pt", "random.pt", "training.json"


class Diverged(LabError):
    """Raised out of a Trainer's loop, before the update, when the detector has decided."""

    def __init__(self, verdict: Verdict, step: int, extras: Mapping[str, float]):
        super().__init__(f"{verdict.rule} since step {verdict.onset}, seen at step {step}")
        self.verdict, self.step, self.extras = verdict, step, dict(extras)


class Guarded:
    """Mixin before a Trainer class: skips non-finite updates, raises `Diverged`, and owns checkpoints (distill.md 2C).

    Call `watch` after construction. The trainer puts each step's scalars into `self.signals` (0-dim tensors or floats, the
    total under `loss`; a name with a slash is recorded but judged by no rule) before gradients are clipped. It must be built with
    `save_strategy="no"`, and with `ignore_data_skip=True` only if its own sampler starts at `self.state.global_step`.
    """

    def watch(self, ring: Ring, recovery: Recovery, detector: Detector, save_every: int) -> None:
        """Sets where checkpoints go and who judges."""
        self.ring, self.recovery, self.detector, self.save_every = ring, recovery, detector, save_every
        self.signals: dict[str, Tensor | float] = {}
        self.values: dict[str, float] = {}
        self._warned: dict[str, tuple[int, int]] = {}  # the onset and step of each rule's last warning
        self.gradient_norm = 0.0
        self.args.max_grad_norm = min(self.args.max_grad_norm or math.inf, recovery.clip)  # infinity: measured, never clipped

    @property
    def learner(self) -> nn.Module:
        """The module whose learning parameters and buffers a checkpoint holds."""
        return self.model

    # ---- each step ----
    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        zero = sharding.zero(self.model)
        norm = zero.norm() if zero else sharding.full(super()._clip_grad_norm(model))
        names = sorted(self.signals)
        self.gradient_norm, self.values = self._transfer(norm, names)
        verdict = self._judge()
        if verdict.action == "diverged":
            raise Diverged(verdict, self.state.global_step + 1, self._extras())
        if verdict.action == "skip":
            sharding.drop_gradients(model.parameters())
            if zero:
                zero.drop()
        if verdict.action in ("skip", "warn"):
            self._note(verdict)
        return norm

    def _sync_replicated_trainable_parameters(self, model: nn.Module) -> None:
        """What a sharded module has whole is summed by `sharding`."""

    def _transfer(self, norm: Tensor, names: list[str]) -> tuple[float, dict[str, float]]:
        """The step's numbers on the host, in one transfer, summed over processes."""
        device = norm.device
        vector = torch.stack([torch.as_tensor(self.signals[name], dtype=torch.float32, device=device).detach() for name in names])
        if world_size() > 1:
            torch.distributed.all_reduce(vector)
        first, *rest = torch.cat([norm.detach().float().reshape(1), vector]).tolist()
        return first, dict(zip(names, rest, strict=True))

    def _judge(self) -> Verdict:
        guard = self.detector.guard
        losses = {name: value for name, value in self.values.items() if "/" not in name}
        if not guard.enabled:
            return OK
        return self.detector.update(Signals(self.state.global_step + 1, losses, self.gradient_norm, self._extras()))

    def _extras(self) -> dict[str, float]:
        return {name: value for name, value in self.values.items() if "/" in name}

    def _note(self, verdict: Verdict) -> None:
        step = self.state.global_step + 1
        if verdict.action == "warn" and not self._first_warning(verdict):
            return
        log.warning("step %d: %s (%s)", step, "update skipped" if verdict.action == "skip" else "warning", verdict.rule)
        if rank() == 0:
            self.recovery.note("skipped" if verdict.action == "skip" else "warning", step, rule=verdict.rule, values=dict(verdict.values))

    def _first_warning(self, verdict: Verdict) -> bool:
        """Whether nothing warned of this before: neither of the same onset, nor a few steps ago, where the onset moves with its window."""
        step, (onset, last) = self.state.global_step, self._warned.get(verdict.rule, (None, -math.inf))
        self._warned[verdict.rule] = (verdict.onset, step)
        return verdict.onset != onset and step - last > self.detector.guard.gradient_window

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.save_if_due()

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own schedule, times what the recoveries so far ask for."""
        scheduler = super().create_scheduler(*args, **kwargs)
        if hasattr(scheduler, "lr_lambdas"):
            gentler = self.recovery.lr_scale
            scheduler.lr_lambdas = [lambda step, own=own: own(step) * gentler(step) for own in scheduler.lr_lambdas]
        return scheduler

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        ready = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if resume_from_checkpoint is None and self.detector.guard.enabled:
            self.save(0)
        return ready

    def save_if_due(self, validated: bool = False) -> None:
        """Settles probations, and saves where the cadence says so."""
        step = self.state.global_step
        if rank() == 0 and self.detector.guard.enabled:
            self.ring.settle(step, validated)
        if self.save_every and step % self.save_every == 0:
            self.save(step)

    # ---- checkpoints ----
    def save(self, step: int) -> None:
        """Writes the resumable checkpoint of `step` (rank 0; the others wait)."""
        weights, optimizer = self.weights(), sharding.full_state(self.optimizer.state_dict())
        on_main(lambda: self.ring.save(step, lambda folder: self._write(folder, weights, optimizer)) and None)

    def weights(self) -> dict[str, Tensor]:
        """What learns, whole, by name (called by all processes)."""
        return {name: sharding.full(tensor.detach()).contiguous() for name, tensor in learned(self.learner).items()}

    def end(self) -> None:
        """Leaves the learner with plain, whole parameters."""
        sharding.join(self.model)

    def more_state(self) -> dict[str, Any]:
        """What a trainer wants to keep beside the rest (JSON-like); `take_state` gets it back."""
        return {}

    def take_state(self, state: dict[str, Any]) -> None:
        """Takes up what `more_state` returned when the checkpoint was written."""

    def _write(self, folder: Path, weights: dict[str, Tensor], optimizer: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        save_file(weights, folder / WEIGHTS)
        torch.save(optimizer, folder / OPTIMIZER)
        torch.save(_random_state(), folder / RANDOM)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        state = {"detector": self.detector.state(), "more": self.more_state(), "processes": world_size()}
        files.write_json(folder / STATE, state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_learned(self.learner, Path(resume_from_checkpoint) / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        sharding.restore(self.optimizer, read_torch(folder / OPTIMIZER))
        state = files.read_json(folder / STATE)
        self.detector.restore(state["detector"])
        self.take_state(state["more"])
        self._set_rate(self.state.global_step)

    def _set_rate(self, step: int) -> None:
        """Puts a LambdaLR scheduler and its groups at `step`, by the factor that holds now."""
        scheduler = self.lr_scheduler
        if not hasattr(scheduler, "lr_lambdas"):
            raise CheckpointError(f"A schedule of kind {type(scheduler).__name__} cannot be resumed exactly; choose linear or cosine.")
        scheduler.last_epoch = step
        factors = [factor(step) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        _set_random_state(read_torch(Path(checkpoint) / RANDOM))
        events = self.recovery.events
        if events and events[-1]["resumed"] == self.state.global_step:  # the same data with new draws
            torch.manual_seed(torch.initial_seed() + len(events))


def train_guarded(build: Any, ring: Ring, guard: Guard, recovery: Recovery, on_event: Any) -> Any:
    """Trains to the end through rollbacks, and returns the trainer that got there.

    Args: build: () -> a `Guarded` trainer for the present recovery; on_event: called with ("rollback", step) when a training
    goes back. Raises TrainingError when the attempts in one region are used up.
    """
    last = on_main(lambda: max(ring.steps(), default=None))
    while True:
        trainer = build()
        try:
            if last is not None:
                files.read_json(ring.path(last) / "trainer_state.json")  # damaged, it is named here
            trainer.train(resume_from_checkpoint=str(ring.path(last)) if last is not None else None)
            return trainer
        except Diverged as error:
            trainer.end()
            last = on_main(lambda error=error: _go_back(error, ring, guard, recovery))
            recovery.events[:] = on_main(lambda: recovery.events)
            on_event("rollback", last)


def _go_back(error: Diverged, ring: Ring, guard: Guard, recovery: Recovery) -> int:
    target = ring.newest_healthy(before=error.verdict.onset - guard.margin)
    if target is None:
        raise CheckpointError(f"Training diverged ({error}) and no healthy checkpoint is left in {ring.folder}; start it again.")
    ring.drop_after(target)
    event = recovery.roll_back(error.verdict, error.step, target, error.extras)
    log.warning("Training diverged: %s. Back to step %d, attempt %d.", error, target, event["attempt"])
    return target


def learned(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that learn and the buffers that are saved, by name; a tied parameter once."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kept = model.state_dict(keep_vars=True)
    return parameters | {name: buffer for name, buffer in model.named_buffers() if name in kept}


def load_learned(model: nn.Module, path: Path) -> None:
    """Copies saved weights into `model`; CheckpointError unless names and shapes are exactly those of `learned(model)`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"Cannot read {path}: {error}; delete its folder, and training resumes from the one before.") from None
    own = learned(model)
    wrong = sorted(set(saved) ^ set(own)) or sorted(name for name in own if own[name].shape != saved[name].shape)
    if wrong:
        raise CheckpointError(f"{path} was saved from another model: {wrong[0]!r} is missing, unexpected or of another shape.")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(sharding.pieces(saved[name], tensor))


def _random_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, following = random.getstate()
    state = {"torch": torch.random.get_rng_state(), "numpy": [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss]}
    state["python"] = [version, torch.tensor(internal), following]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    version, internal, following = state["python"]
    random.setstate((version, tuple(internal.tolist()), following))
    torch.random.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
