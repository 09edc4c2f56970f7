"""GRPO on CoLaR: thoughts and answer are acts, the update reads the stored thoughts in one pass (`colar.md` 2.6).

A completion is a place-holder for each thought, the separator, the answer. A thought's log-probability is the density of its
Gaussian, averaged over the width as published; the separator's is its share at the last thought.
Axes: R rows, P prompt columns, C completion columns, T thoughts, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.data.answers import strict
from lab.data.examples import Example
from lab.errors import SettingsError
from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, Rollout, rollout
from lab.latent.plan import left, right
from lab.latent.policy import Rows
from lab.latent.sampling import Sampling
from lab.methods.colar.model import ColarModel
from lab.methods.colar.objective import Experience, log_normal, log_probs
from lab.methods.colar.policy import PUBLISHED, ColarPolicy
from lab.rl import RLSettings, reinforce
from lab.train import TrainResult
from lab.training.acts import Acts, Completions, WithReference

KEPT = ("thoughts", "logprob", "stop_prob", "density")


class Acting(ColarPolicy):
    """CoLaR's policy, noting the density of each thought it draws.

    Args:
        reduction: `mean` over the width (published) or `sum` (the true density).
        top_p: nucleus that answers are drawn from.
    """

    def __init__(self, model: ColarModel, temperature: float, reduction: str, top_p: float = 1.0):
        super().__init__(model, Sampling(temperature=temperature, top_p=top_p), temperature, temperature)
        self.reduction = reduction

    def thought(self, rows: Rows) -> Tensor:
        x = super().thought(rows)
        mean, std = self.model.parts.head(rows.h, self.latent_temperature)
        density = log_normal(x.float() / self.model.config.embeds_std, mean, std)
        rows.note("density", density.mean(-1) if self.reduction == "mean" else density.sum(-1))
        return x


class ColarThinking(WithReference):
    """CoLaR's side of `lab.rl`.

    Args:
        most: thoughts at which a row is closed; that separator is not the policy's own and is left out of the update.
        reduction: of a thought's log-density over the width: `mean` (published) or `sum`.
        compat: as released: answers from the nucleus, a forced separator counts as said, log-probabilities from a second pass.
    """

    def __init__(self, model: ColarModel, most: int, reduction: str = "mean", compat: bool = False):
        if model.config.lp_deterministic:
            raise SettingsError("This model's latent head has no deviation, so its thoughts have no probability; train one with it.")
        if most < 1 or reduction not in ("mean", "sum"):
            raise SettingsError(f"most = {most}, reduction = {reduction!r}: at least one thought, and mean or sum.")
        self.model, self.most, self.reduction, self.compat = model, most, reduction, compat

    def act(self, prompts: list[list[int]], samples: int, draws: Keyed, *, temperature: float, longest: int) -> Acts:
        """Completions of the prompts (which end with the separator); see `lab.training.acts.Thinking`."""
        most = min(self.most, longest - 2)
        if most < 1:
            raise SettingsError(f"longest = {longest}: a completion needs room for a thought, the separator and an answer.")
        self.model.eval()
        policy = Acting(self.model, temperature, self.reduction, PUBLISHED.top_p if self.compat else 1.0)
        prompt = Prompt.of_ids(self.model.decoder, prompts)
        done = rollout(
            self.model.decoder, policy, prompt, samples, draws, budget=Budget(thoughts=most, answer=longest - most - 1), keep=KEPT
        )
        acts = self._acts(done)
        return self._scored(acts, [prompt for prompt in prompts for _ in range(samples)], temperature) if self.compat else acts

    @torch.no_grad()
    def _scored(self, acts: Acts, prompts: list[list[int]], temperature: float) -> Acts:
        """The same with every act the policy's own, and the log-probabilities that the update would give now."""
        sides = []
        for side in (left(prompts), right(acts.ids, self.model.config.pad_id)):
            ids = side.ids.to(acts.record["counts"].device)
            sides += [ids, torch.ones_like(ids) if side.valid is None else side.valid.to(ids)]
        found = self.log_probs(Completions(*sides, acts.record), temperature)[0].tolist()
        logprobs = [row[: len(ids)] for row, ids in zip(found, acts.ids, strict=True)]
        return replace(acts, logprobs=logprobs, own=[[True] * len(ids) for ids in acts.ids])

    def _acts(self, done: Rollout) -> Acts:
        s, out = self.model.config, Acts([], [], [], {"written": [], "thoughts": []})
        density, ends, said = (done.notes[name].tolist() for name in ("density", "stop_prob", "logprob"))
        told = zip(done.answers(), done.counts.tolist(), done.capped.tolist(), done.finish.tolist(), strict=True)
        for row, (ids, count, capped, cut) in enumerate(told):
            answer = ids if cut else [*ids, s.eos_id]
            end = torch.tensor(ends[row][count] if count < len(ends[row]) else 1.0).log().item()
            out.ids.append([s.pad_id] * count + [s.sep_id, *answer])
            out.logprobs.append([*density[row][:count], end, *said[row][: len(answer)]])
            out.own.append([True] * count + [not capped] + [True] * len(answer))
            out.extras["thoughts"].append(count)
            out.extras["written"].append(self.model.tokenizer.decode(ids, skip_special_tokens=True))
        room = self.most - done.thoughts.shape[1]
        out.record = {"thoughts": torch.nn.functional.pad(done.thoughts, (0, 0, 0, room)), "counts": done.counts}
        return out

    def log_probs(self, batch: Completions, temperature: float) -> tuple[Tensor, Tensor]:
        """(R, C) log-probabilities with the stored thoughts as inputs, in one pass; entropies are not computed (0)."""
        model, counts = self._active or self.model, batch.record["counts"]
        most = int(counts.max())
        seen = self._experience(batch, counts, most)
        latent, answer = log_probs(model, seen, self.reduction, temperature)
        column = torch.arange(batch.ids.shape[1], device=counts.device)
        thinking = column < counts[:, None]
        at_thought = latent.gather(1, column.clamp(max=most - 1).expand_as(batch.ids))
        at_word = answer.gather(1, (column - counts[:, None]).clamp(0, answer.shape[1] - 1))
        logps = torch.where(thinking, at_thought, at_word)
        return logps, torch.zeros_like(logps)

    def _experience(self, batch: Completions, counts: Tensor, most: int) -> Experience:
        wide = int((batch.mask.sum(1) - counts).max())
        places = counts[:, None] + torch.arange(wide, device=counts.device)
        kept = places < batch.mask.sum(1)[:, None]
        answer = batch.ids.gather(1, places.clamp(max=batch.ids.shape[1] - 1)).masked_fill(~kept, self.model.config.pad_id)
        live = torch.arange(most, device=counts.device) < counts[:, None]
        thoughts = batch.record["thoughts"][:, :most].to(self.model.backbone.dtype)
        return Experience(batch.prompt, batch.prompt_mask.bool(), thoughts, live, answer, kept)


def rewards_of(rule: str, punish_length: bool) -> dict[Callable[..., list[float]], float]:
    """Reward functions by weight: 1 for a right answer (divided by the number of thoughts where `punish_length`), and two only logged."""

    def right(written: list[str], gold: list[str], thoughts: list[int], **_: Any) -> list[float]:
        hits = [float(strict(text, answer, rule)[1]) for text, answer in zip(written, gold, strict=True)]
        return [hit / count if punish_length else hit for hit, count in zip(hits, thoughts, strict=True)]

    def accuracy(written: list[str], gold: list[str], **_: Any) -> list[float]:
        return [float(strict(text, answer, rule)[1]) for text, answer in zip(written, gold, strict=True)]

    def thought_count(thoughts: list[int], **_: Any) -> list[float]:
        return [float(count) for count in thoughts]

    return {right: 1.0, accuracy: 0.0, thought_count: 0.0}


def train_rl(
    model: ColarModel,
    data: Sequence[Example],
    settings: RLSettings,
    folder: Path | str,
    *,
    speed: int | str = 2,
    most: int = 64,
    rule: str = "colar",
    punish_length: bool = False,
    reduction: str = "mean",
    compat: bool = False,
    rewards: Mapping[Callable[..., Sequence[float]], float] | None = None,
    logger: Callable[..., None] | None = None,
    validate: Callable[[Any], dict[str, float]] | None = None,
) -> TrainResult:
    """GRPO in place on `data` at one speed; a completion has room for `most` thoughts beside its answer.

    Args:
        compat: the update of the released code (`PublishedGRPO`); its mini-batches are `settings.updates`.
        rewards: function -> weight, instead of `rewards_of(rule, punish_length)`.
    """
    if compat and settings.loss_type not in ("grpo", "dr_grpo"):
        raise SettingsError("The published update is a mean over each row (loss_type grpo) or a sum over 32 (dr_grpo).")
    thinking = ColarThinking(model, most, reduction, compat)
    if settings.beta:
        thinking.hold_reference()
    prompts = [[*model.prompt(example, speed), model.config.sep_id] for example in data]
    columns = {"gold": [example.answer for example in data]}
    model.backbone.get_input_embeddings().weight.requires_grad_(False)
    rewards = rewards or rewards_of(rule, punish_length)
    own = {"validate": validate, "trainer_class": _trainer(compat)}
    return reinforce(model, thinking, prompts, columns, rewards, settings, folder, logger, **own)


def _trainer(compat: bool) -> type | None:
    if not compat:
        return None
    from lab.methods.colar.trainer import PublishedGRPO

    return PublishedGRPO
