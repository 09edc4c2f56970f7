"""TRL's GRPOTrainer, with rollouts and log-probabilities from a method that thinks latently (see `lab.rl`)."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl import GRPOConfig, GRPOTrainer

from lab.latent.draws import Keyed
from lab.launch import check_world, rank, world_size
from lab.training import optim, sharding
from lab.training.acts import Acts, Completions, PromptOrder, Thinking, check_gap, gap
from lab.training.settings import RLSettings
from lab.training.stability import Recovery
from lab.training.stability.guarded import Guarded
from lab.training.trainer import Supervised, sharded, shared_arguments

RECORD = "record_"


class Actor(nn.Module):
    """What TRL takes for the model: its forward is the method's log-probabilities; without `dropout` the learner stays in eval mode."""

    is_gradient_checkpointing = is_activation_checkpointing = False

    def __init__(self, learner: nn.Module, thinking: Thinking, dropout: bool):
        super().__init__()
        self.learner, self._thinking, self._dropout = learner, [thinking], dropout
        self.config, self.generation_config = learner.backbone.config, learner.backbone.generation_config

    def forward(self, batch: Completions, temperature: float) -> tuple[Tensor, Tensor]:
        """(R, C) log-probabilities and entropies of the completions."""
        return self._thinking[0].log_probs(batch, temperature)

    def train(self, mode: bool = True) -> "Actor":
        super().train(mode)
        if not self._dropout:
            self.learner.eval()
        return self

    def add_model_tags(self, tags: Any) -> None:
        """Tags are for model cards on the hub; nothing is pushed from here."""


class _Reference:
    """Stands where TRL keeps a second model: log-probabilities of the model before training."""


class LatentGRPOTrainer(Guarded, GRPOTrainer):
    """GRPO for one `Thinking` method; built anew by `lab.rl.reinforce` after each rollback."""

    _validate_if_due, _judge_score, save_best = Supervised._validate_if_due, Supervised._judge_score, Supervised.save_best

    def __init__(
        self,
        model: nn.Module,
        thinking: Thinking,
        prompts: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        rewards: Mapping[Callable, float],
        settings: RLSettings,
        job: Any,
        folder: Path,
        recovery: Recovery,
    ):
        self.s, self.job, self.plan, self.thinking = settings, job, settings, thinking
        self.order = PromptOrder(len(prompts), settings.prompts, settings.seed)
        self.best, self.stopped, self.last_row = {"score": -math.inf, "step": 0}, False, {}
        self._acts: Acts | None = None
        self._batch: dict[str, Tensor] = {}
        if settings.stability == "safe":
            optim.learn_in_float32(model)
        data = Dataset.from_list([{"prompt": list(ids), **{k: v[i] for k, v in columns.items()}} for i, ids in enumerate(prompts)])
        super().__init__(
            model=sharded(Actor(model, thinking, settings.dropout), settings),
            reward_funcs=list(rewards),
            args=_arguments(settings, str(folder), recovery.clip, list(rewards.values())),
            train_dataset=data,
            processing_class=model.tokenizer,
            rollout_func=self._roll_out,
        )
        check_world(world_size(), self.args.world_size)
        self.beta, self.ref_model = settings.beta, _Reference() if settings.beta else None
        self.remove_callback(PrinterCallback)

    learner = Supervised.learner

    @property
    def micro_batch(self) -> int:
        """Completions in one forward of the update."""
        return self.args.per_device_train_batch_size

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    # ---- data and optimiser ----
    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return _Stream(self)

    @property
    def generate_every(self) -> int:
        """Micro-steps between two rollouts."""
        return self.args.steps_per_generation * self.num_iterations

    create_optimizer = Supervised.create_optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        self.lr_scheduler = optim.follow(self.optimizer, lambda step: self.s.rate(step) * self.recovery.lr_scale(step))
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # ---- rollout ----
    def _roll_out(self, prompts: list[list[int]], trainer: Any) -> dict[str, Any]:
        """Called by TRL with this process's prompts, each repeated for its samples, in groups."""
        samples, number = self.s.samples, self._step // self.generate_every
        asked = prompts[::samples]
        first = number * self.s.prompts + rank() * len(asked)
        question = torch.arange(first, first + len(asked), device=self.accelerator.device).repeat_interleave(samples)
        sample = torch.arange(samples, device=question.device).repeat(len(asked))
        draws = Keyed.of(self.s.seed + 7919 * self.recovery.generation, question, sample)
        with torch.no_grad():
            acts = self.thinking.act(asked, samples, draws, temperature=self.s.temperature, longest=self.s.longest)
        self._acts = acts
        torch.default_generator.manual_seed((self.s.seed + 7919 * self.recovery.generation) * 1_000_003 + number)  # TRL's shuffle, dropout
        given = {"prompt_ids": prompts, "completion_ids": acts.ids, "logprobs": acts.logprobs}
        return given | {"env_mask": [[int(own) for own in row] for row in acts.own], **acts.extras}

    def _generate_and_score_completions(self, inputs: list) -> dict[str, Any]:
        out = super()._generate_and_score_completions(inputs)
        return out | {RECORD + name: value for name, value in self._acts.record.items()}

    # ---- update ----
    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, batch_size: int | None = None, **ignored: Any
    ) -> tuple[Tensor, Tensor | None, None]:
        record = {k[len(RECORD) :]: v for k, v in self._batch.items() if k.startswith(RECORD)} or (self._acts.record if self._acts else {})
        size, parts = batch_size or len(input_ids), []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            ids, mask = input_ids[rows], attention_mask[rows]
            kept = {name: value[rows] for name, value in record.items()}
            batch = Completions(
                ids[:, :-logits_to_keep], mask[:, :-logits_to_keep], ids[:, -logits_to_keep:], mask[:, -logits_to_keep:], kept
            )
            parts.append(self._score(model, batch))
        logps, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
        return logps, entropies, None

    def _score(self, model: Any, batch: Completions) -> tuple[Tensor, Tensor]:
        if not isinstance(model, _Reference):
            with self.accelerator.autocast():
                return model(batch, self.s.temperature)
        with self.thinking.reference(), torch.no_grad():
            return self.thinking.log_probs(batch, self.s.temperature)

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        self._batch, seen = inputs, self._get_per_token_logps_and_entropies
        told: list[Tensor] = []

        def noted(*args: Any, **options: Any) -> Any:
            found = seen(*args, **options)
            told.append(found[0])
            return found

        self._get_per_token_logps_and_entropies = noted
        try:
            loss = super()._compute_loss(model, inputs)
        finally:
            del self._get_per_token_logps_and_entropies
            self._batch = {}
        self._measure(told[0], inputs)
        self.signals = {"rl/loss": self.signals.get("rl/loss", 0.0) + loss.detach()}
        return loss

    def _measure(self, logps: Tensor, inputs: dict[str, Tensor]) -> None:
        """Logs the gap while the policy is still the one that acted."""
        if self._step % self.generate_every >= self.args.gradient_accumulation_steps:
            return
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        value = gap(logps, inputs["sampling_per_token_logps"], mask)
        self._metrics["train"]["logp_gap"].append(value)
        check_gap(value, self.s, self.state.global_step + 1)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._step % self.args.gradient_accumulation_steps == 0:
            self.signals = {}
        with sharding.whole(self.model), sharding.accumulating(self.model, self.accelerator.sync_gradients):
            return super().training_step(model, inputs, num_items_in_batch)

    def _defer_fsdp_gradient_reduction(self) -> AbstractContextManager:
        return nullcontext()  # training_step does it

    # ---- after a step ----
    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, learning_rate: float | None = None, **kwargs: Any) -> None:
        step = self.state.global_step
        if step == getattr(self, "_finished_step", -1):
            return  # the Trainer calls once more at the end of the epoch
        self._finished_step = step
        self._metrics["train"]["loss"].append(self.values["rl/loss"] / world_size())
        self._metrics["train"]["grad_norm"].append(self.gradient_norm)
        validated = self._validate_if_due(step)
        if step % self.s.log_every == 0 or step == self.s.steps:
            self._log_row(step, learning_rate)
        self.save_if_due(validated)
        self.job.on_step(step, f"reward {self.last_row['reward']:.3g}" if "reward" in self.last_row else "")

    def _log_row(self, step: int, rate: float | None) -> None:
        metrics = self._metrics["train"]
        row: dict[str, Any] = {"step": step, "lr": rate}
        for name, values in metrics.items():
            known = [value for value in values if not math.isnan(value)]
            row[name] = (max(known) if name == "logp_gap" else sum(known) / len(known)) if known else math.nan
        metrics.clear()
        self._emit(row)
        self.last_row = row

    def _emit(self, row: dict[str, Any]) -> None:
        if rank() == 0:
            self.job.write_row(row)
        if self.s.report_to != "none":
            super(GRPOTrainer, self).log({name: value for name, value in row.items() if name != "step"})

    def more_state(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "stopped": self.stopped,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
        }

    def take_state(self, state: dict[str, Any]) -> None:
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self.best, self.stopped = {**state["best"], "score": float(state["best"]["score"])}, state["stopped"]
        self._metrics["train"].update({name: list(map(float, values)) for name, values in state["metrics"].items()})


class _Stream(Sampler):
    """Places of prompts, each repeated for its samples, for every micro-step from where training begins."""

    def __init__(self, trainer: LatentGRPOTrainer):
        self.trainer = trainer

    def __len__(self) -> int:
        args = self.trainer.args
        return args.max_steps * args.gradient_accumulation_steps * args.generation_batch_size

    def __iter__(self) -> Iterator[int]:
        trainer, args = self.trainer, self.trainer.args
        per_step = args.gradient_accumulation_steps
        for micro in range(trainer.state.global_step * per_step, args.max_steps * per_step):
            places = trainer.order.rollout(micro // trainer.generate_every)
            yield from (place for place in places for _ in range(trainer.s.samples))


def _arguments(s: RLSettings, folder: str, clip: float, weights: list[float]) -> GRPOConfig:
    micro = s.micro(world_size())
    pieces = s.share(world_size()) // micro
    return GRPOConfig(
        **shared_arguments(s, folder),
        max_steps=s.steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=pieces,
        steps_per_generation=pieces * s.updates,
        num_generations=s.samples,
        num_iterations=s.iterations,
        max_completion_length=s.longest,
        temperature=s.temperature,
        max_grad_norm=min(s.clip or math.inf, clip),
        beta=0.0,
        use_bias_correction_kl=False,  # TRL's default has another gradient than the papers' (dtt.md 2.6, distill.md 2B.7)
        epsilon=s.epsilon,
        loss_type=s.loss_type,
        scale_rewards=s.scale_rewards,
        reward_weights=[float(weight) for weight in weights],
        activation_checkpointing=False,
    )
