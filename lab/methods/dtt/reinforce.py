"""The gated side of GRPO: rollouts with drawn gates, updates over the same states and noise (`dtt.md` 2.7).

States and noise are given inputs of the update, so it is one parallel pass; or made again, with gradient through time (`recompute`).
Axes: Q prompts, N samples, R = Q·N rows, C columns, D width.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lab import files
from lab.config import Settings
from lab.errors import SettingsError
from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.sampling import Sampling
from lab.methods.dtt.data import inside
from lab.methods.dtt.gate import open_probability
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.objective import gate_error, gate_log_probs, log_probs, read, seen_gates, unrolled
from lab.methods.dtt.policy import GatedPolicy, check_gates
from lab.training.acts import Acts, Completions

Credit = Literal["pathwise", "policy", "none"]
NOTES = ("logprob", "state", "noise", "gate", "gate_logit", "open")


class GateLearning(Settings):
    """How the gate learns.

    `credit`: the reward's gate term reaches the gate `pathwise` (its gradient is added to the loss; the noise is exogenous), as a
    `policy` of its own (log-probabilities of hard gates), or not (`none`, as published).
    """

    credit: Credit = "pathwise"
    weight: float = Field(0.05, ge=0)  # of the gate term: the reward's gate_penalty_coeff
    min_temperature: float = Field(0.1, gt=0)
    anneal: bool = True  # from the model's temperature down to min_temperature, linearly over the steps
    constant_groups: Literal["keep", "drop"] = "keep"  # groups in which all are right, or all wrong
    recompute: Literal["given", "bptt"] = "given"  # states of the update: as recorded, or made again with gradient through time


class GatedThinking:
    """The gated side of `lab.rl`; `error` (R,) is the gate term of the last update's rows, with gradient."""

    def __init__(self, model: SparseGatedModel, how: GateLearning):
        if how.credit == "policy" and not model.config.hard:
            raise SettingsError("credit='policy' needs hard gates: a soft gate is no act that has a probability.")
        if how.recompute == "bptt" and model.config.gate == "hrpo":
            raise SettingsError("recompute='bptt' is for DTT's gate: what HRPO's gate mixes in carries no gradient.")
        self.model, self.how = model, how
        self.start = getattr(model.gate, "temperature", 1.0)
        self.error: Tensor | None = None
        self._held: SparseGatedModel | None = None
        self._plain = False

    @property
    def credit(self) -> Credit:
        """The credit in force: HRPO's gate has no term of its own, and a forced one nothing to learn."""
        return "none" if self.model.config.gate == "hrpo" or self.model.config.forced else self.how.credit

    def at(self, progress: float) -> None:
        """Sets the gate's temperature for `progress` (0 to 1) of the training."""
        if hasattr(self.model.gate, "temperature"):
            low = min(self.start, self.how.min_temperature) if self.how.anneal else self.start
            self.model.gate.temperature = max(low, self.start - (self.start - low) * min(1.0, progress))

    def hold_reference(self) -> None:
        """Keeps the model as it is now as the reference; with adapters nothing is kept, they are switched off instead."""
        self._held = None if self.model.has_lora else copy.deepcopy(self.model).eval().requires_grad_(False)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, log-probabilities are the reference's: without adapters and without gates, as published."""
        if self._held is None and not self.model.has_lora:
            raise SettingsError("beta needs a reference: add adapters (lora_rank), or call hold_reference() before training.")
        self._plain = True
        try:
            with self.model.adapters_off():
                yield
        finally:
            self._plain = False

    def act(self, prompts: list[list[int]], samples: int, draws: Keyed, *, temperature: float, longest: int) -> Acts:
        """Completions of the prompts; see `lab.training.acts.Thinking`. The prompt is read once for its samples."""
        self.model.eval()
        self.model.check_prompts(prompts, longest)
        policy = GatedPolicy(self.model, Sampling(temperature=temperature))
        prompt = Prompt.of_ids(self.model.decoder, prompts)
        done = rollout(self.model.decoder, policy, prompt, samples, draws, budget=Budget(answer=longest), keep=NOTES)
        eos, s = self.model.config.eos_id, self.model.config
        ids = [row if cut else [*row, eos] for row, cut in zip(done.answers(), done.finish.tolist(), strict=True)]
        device, lengths = done.tokens.device, [len(row) for row in ids]
        keep = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
        check_gates(done.notes["gate"][keep])
        record = {"state": done.notes["state"].masked_fill(~keep[..., None], 0.0), "inside": inside(ids, max(lengths), s).to(device)}
        if "noise" in done.notes:
            record |= {"noise": done.notes["noise"].masked_fill(~keep, 0.5)}
        record |= {"open": keep if s.gate == "dtt" else done.notes["open"].bool() & keep}
        told = done.notes["logprob"] + self._gate_part(done.notes["gate"], done.notes["gate_logit"], keep)
        gates = [row[: n - 1] for row, n in zip(done.notes["gate"].tolist(), lengths, strict=True)]
        logprobs = [row[:n] for row, n in zip(told.tolist(), lengths, strict=True)]
        return Acts(ids, logprobs, [[True] * n for n in lengths], {"gates": gates}, record)

    def _gate_part(self, gates: Tensor, logits: Tensor, keep: Tensor) -> Tensor | float:
        """(R, C) log-probability of each drawn gate where gates are acts of their own; the last token has none."""
        if self.credit != "policy":
            return 0.0
        part = gate_log_probs(gates, open_probability(logits, self.model.config.noise))
        fed = torch.cat((keep[:, 1:], torch.zeros_like(keep[:, :1])), 1)
        return part.masked_fill(~fed, 0.0)

    def log_probs(self, batch: Completions, temperature: float) -> tuple[Tensor, Tensor]:
        """(R, C) log-probabilities and entropies over the recorded states and noise; see `lab.training.acts.Thinking`."""
        model, record = self._held if self._plain and self._held is not None else self.model, batch.record
        if self._plain:
            return log_probs(model, read(model, batch), batch, temperature)
        states, gates, logits = self._read(batch)
        found, entropy = log_probs(model, states, batch, temperature)
        self.error = gate_error(gates, record["inside"], batch.mask)
        if self.credit == "policy":
            wide = torch.nn.functional.pad
            found = found + self._gate_part(wide(gates.detach(), (0, 1)), wide(logits, (0, 1)), batch.mask.bool())
        return found, entropy

    def _read(self, batch: Completions) -> tuple[Tensor, Tensor, Tensor]:
        """States that predict the written columns, and the gates and logits that were read with them."""
        model, record = self.model, batch.record
        if self.how.recompute == "bptt" and batch.ids.shape[1] > 1:
            return unrolled(model, batch, record["noise"])
        given = {"prev_hidden": record["state"], "gate_mask": record["open"]}
        given |= {"gate_noise": record["noise"]} if "noise" in record else {}
        return read(model, batch, **given), *seen_gates(model, batch.prompt.shape[1])


# ---- what a training shows ----

PROGRESS = {
    "loss": "loss",
    "reward": "reward_mean",
    "rewards/correctness/mean": "correctness_mean",
    "rewards/token_efficiency/mean": "token_penalty_mean",
    "rewards/gate_sparsity/mean": "gate_penalty_mean",
    "gate/mean": "gate_mean_overall",
    "gate/inside": "gate_mean_reasoning",
    "gate/outside": "gate_mean_non_reasoning",
    "gate/temperature": "gumbel_temp_model",
    "logp_gap": "gate/logp_gap",
}


def progress_table(folder: Path | str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The published progress table of a training: one row a logged step, under the seed's column names."""
    rows = [row for row in files.read_lines(Path(folder) / name) if "reward" in row]
    return [{"step": row["step"], **{shown: row.get(key, float("nan")) for key, shown in PROGRESS.items()}} for row in rows]
