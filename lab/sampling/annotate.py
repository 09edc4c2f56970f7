"""Process labels for thoughts: from every prefix of a trajectory, the share of stochastic completions that are right.

`latenttts.md` 2.6. With noise (or no sampler) the prefix is read once and its keys are kept for all completions of all
steps; where no word is drawn, the completions from the last thought are one and the same and are decoded once. Under dropout a
prefix has no fixed keys, so each completion reads it again. Axes: Q questions, N samples, M completions, T thoughts, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, continue_from, read_prompt, rollout
from lab.latent.policy import Given, Policy
from lab.models.inference import inference

Judge = Callable[[int, list[int]], bool]


@inference
def annotate(
    decoder,
    policy: Policy,
    prompt: Prompt,
    thoughts: Tensor,
    judge: Judge,
    *,
    rollouts: int,
    seed: int,
    budget: Budget,
    dropout=None,
    questions: Tensor | None = None,
    numbers: Tensor | None = None,
) -> Tensor:
    """Labels (Q, N, T) in [0, 1], float32.

    Args:
        policy: the stochastic thinker that completes (noise through `Noisy`, dropout through `dropout`).
        thoughts: (Q·N, T, D) the trajectories, question-major.
        judge: (number of the question, answer token ids) -> right or wrong.
        rollouts: M completions a step.
        seed: draws are keyed by (seed, question, trajectory, step, completion).
        questions, numbers: (Q,) and (N,) the numbers of questions and trajectories in those keys; None = counted from 0.
    """
    steps = thoughts.shape[1]
    asked = torch.arange(prompt.x.shape[0]) if questions is None else questions
    label = _Labels(asked, thoughts, judge, rollouts, seed, budget, numbers)
    if dropout is None:
        return label.cached(decoder, policy, prompt)
    return torch.stack([label.reread(decoder, policy, prompt, step, dropout) for step in range(1, steps + 1)], -1)


def _certain(policy: Policy) -> bool:
    """Whether what follows the last thought is one and the same for all completions."""
    return policy.sampling.greedy and not getattr(policy, "end_temperature", 0)


class _Labels:
    def __init__(self, asked: Tensor, thoughts, judge, rollouts, seed, budget, numbers=None):
        self.asked, self.questions, self.thoughts, self.judge, self.rollouts = asked, len(asked), thoughts, judge, rollouts
        self.seed, self.budget, self.samples = seed, budget, len(thoughts) // len(asked)
        self.numbers = torch.arange(self.samples) if numbers is None else numbers

    def cached(self, decoder, policy: Policy, prompt: Prompt) -> Tensor:
        kv, _, pos = read_prompt(decoder, prompt)
        kv, pos = kv.fan_out(self.samples, self.thoughts.shape[1]), pos.repeat_interleave(self.samples)
        labels = []
        for step in range(1, self.thoughts.shape[1] + 1):
            h = decoder(self.thoughts[:, step - 1 : step], pos[:, None], kv).last[:, 0]
            pos = pos + 1
            copies = 1 if step == self.thoughts.shape[1] and _certain(policy) else self.rollouts
            again = torch.arange(len(pos), device=pos.device).repeat_interleave(copies)
            room = self.thoughts.shape[1] + min(64, self.budget.answer)
            done = torch.full_like(again, step)
            result = continue_from(
                decoder,
                policy,
                kv.fan_out(copies, room, share=False),
                h[again],
                pos[again],
                self._draws(step, copies),
                budget=self.budget,
                thoughts=done,
            )
            labels.append(self._share(result.answers(), copies))
        return torch.stack(labels, -1)

    def reread(self, decoder, policy: Policy, prompt: Prompt, step: int, dropout) -> Tensor:
        again = self.thoughts[:, :step].repeat_interleave(self.rollouts, 0)
        given = Given(policy, again)
        result = rollout(
            decoder,
            given,
            prompt,
            self.samples * self.rollouts,
            self._draws(step, self.rollouts),
            budget=self.budget,
            dropout=dropout,
            keep=(),
        )
        return self._share(result.answers(), self.rollouts)

    def _draws(self, step: int, copies: int) -> Keyed:
        row = torch.arange(self.questions * self.samples * copies, device=self.thoughts.device)
        question = self.asked.to(row.device)[row // (self.samples * copies)]
        sample = self.numbers.to(row.device)[row // copies % self.samples] * copies + row % copies
        return Keyed.of(self.seed, question, sample + (step << 32))

    def _share(self, answers: list[list[int]], copies: int) -> Tensor:
        right = [self.judge(row // (self.samples * copies), answer) for row, answer in enumerate(answers)]
        return torch.tensor(right, dtype=torch.float32).view(self.questions, self.samples, copies).mean(-1)
