"""Beam search over thoughts, guided by a step scorer (`latenttts.md` 2.10; absent from the release).

Every beam draws C stochastic next thoughts, all B·C candidates of a question are scored, the B with the largest running
sums survive with their own keys and values. Axes: Q questions, B beams, C candidates, T thoughts, D width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lab.config import Settings
from lab.errors import SettingsError
from lab.latent.draws import Draws
from lab.latent.loop import Budget, Prompt, Rollout, continue_from, read_prompt
from lab.latent.policy import Phase, Rows
from lab.models.inference import inference
from lab.sampling.reward import LatentRM


class Beam(Settings):
    """Beams kept, candidates drawn by each, thoughts made."""

    beams: int = 4
    candidates: int = 4
    thoughts: int = 6


@dataclass
class BeamResult:
    """What the search did.

    Attributes:
        thoughts: (Q, B, T, D) of the survivors, best first; `scores` (Q, B) their running sums.
        candidate_scores: (T, Q, B, C) running sums of all candidates.
        kept: (T, Q, B, 2) the (beam, candidate) each survivor came from, in the order kept.
        kept_scores: (T, Q, B).
        rollout: the answers of the best beam of each question.
    """

    thoughts: Tensor
    scores: Tensor
    candidate_scores: Tensor
    kept: Tensor
    kept_scores: Tensor
    rollout: Rollout


@inference
def beam_search(
    decoder, policy, scorer: LatentRM, prompt: Prompt, draws: Draws, settings: Beam, budget: Budget, dropout=None
) -> BeamResult:
    """Searches over thoughts and decodes the best beam greedily.

    Args:
        policy: makes a thought from a hidden state, stochastic by noise on it (`Noisy`) or through `dropout`.
        draws: randomness of the Q·B·C candidates, question-major, then beam, then candidate.
        dropout: a regime; candidates then differ through the call that reads the last input.
    """
    if settings.beams < 1 or settings.candidates < 1:
        raise SettingsError("A beam search needs at least one beam and one candidate.")
    search = _Search(decoder, policy, scorer, prompt, draws, settings, dropout)
    for step in range(settings.thoughts):
        search.step(step)
    return search.finish(budget)


class _Search:
    def __init__(self, decoder, policy, scorer, prompt, draws, settings, dropout):
        self.decoder, self.policy, self.scorer, self.draws, self.settings, self.dropout = decoder, policy, scorer, draws, settings, dropout
        self.questions, self.beams, self.candidates = prompt.x.shape[0], settings.beams, settings.candidates
        self.judge = scorer.decoder
        fan, room = self.beams * (self.candidates if dropout else 1), settings.thoughts + 1
        if dropout is None or dropout.shares_prompt:
            kv, h, pos = read_prompt(decoder, prompt)
            self.kv, self.h, self.pos = kv.fan_out(fan, room), h.repeat_interleave(fan, 0), pos.repeat_interleave(self.beams, 0)
        else:
            self.kv, self.h, pos = read_prompt(decoder, prompt.repeat(fan), dropout.prefill(draws))
            self.pos = pos.view(-1, self.candidates)[:, 0]
        self.judge_kv = read_prompt(self.judge, scorer.own(prompt))[0].fan_out(self.beams, room)
        self.scores = torch.zeros(self.questions, self.beams, device=self.h.device)
        self.paths = self.h.new_zeros(self.questions * self.beams, 0, self.h.shape[-1])
        self.log: dict[str, list[Tensor]] = {"candidates": [], "kept": [], "scores": []}

    def step(self, number: int) -> None:
        thoughts = self._candidates(number)
        count = self.questions * self.beams
        parents = torch.arange(count, device=self.h.device).repeat_interleave(self.candidates)
        judge_kv = self.judge_kv.select(parents)
        out = self.judge(thoughts[:, None], (self.pos[parents])[:, None], judge_kv)
        worth = self.scorer.worth(self.scorer.score(out.last[:, 0]))
        running = self.scores.view(count, 1) + worth.view(count, self.candidates)
        chosen, place = self._survivors(running)
        self.judge_kv = judge_kv.select(chosen)
        self.paths = torch.cat((self.paths[parents[chosen]], thoughts[chosen, None]), 1)
        self._remember(running, place)
        self._feed(number, chosen, parents, thoughts)
        self.pos = self.pos + 1

    def _candidates(self, number: int) -> Tensor:
        """(Q·B·C, D) the next thoughts every beam might take."""
        total = self.questions * self.beams * self.candidates
        h = self.h if self.dropout else self.h.repeat_interleave(self.candidates, 0)
        return self.policy.thought(self._rows(h, number, total))

    def _rows(self, h: Tensor, number: int, total: int) -> Rows:
        zeros = torch.zeros(total, dtype=torch.long, device=h.device)
        return Rows(zeros, h, zeros, zeros + int(Phase.THINK), zeros + number, zeros, zeros, self.draws)

    def _survivors(self, running: Tensor) -> tuple[Tensor, Tensor]:
        """Flat candidate rows kept (Q·B,) and their places within the question (Q, B), best first; ties keep the order."""
        flat = running.view(self.questions, -1)
        place = flat.sort(dim=1, descending=True, stable=True).indices[:, : self.beams]
        base = torch.arange(self.questions, device=place.device)[:, None] * flat.shape[1]
        return (base + place).flatten(), place

    def _remember(self, running: Tensor, place: Tensor) -> None:
        by_question = running.view(self.questions, self.beams, self.candidates)
        self.scores = by_question.flatten(1).gather(1, place)
        self.log["candidates"].append(by_question)
        self.log["kept"].append(torch.stack((place // self.candidates, place % self.candidates), -1))
        self.log["scores"].append(self.scores)

    def _feed(self, number: int, chosen: Tensor, parents: Tensor, thoughts: Tensor) -> None:
        """Reads the surviving thoughts: once per beam, or under dropout once per candidate of the next step."""
        rows, pos = (chosen if self.dropout else parents[chosen]), self.pos
        masks, last = None, number + 1 == self.settings.thoughts
        self.kv, x = self.kv.select(rows), thoughts[chosen]
        if self.dropout and not last:
            again = torch.arange(len(x), device=x.device).repeat_interleave(self.candidates)
            self.kv, x, pos = self.kv.select(again), x[again], pos[again]
            masks = self.dropout.at(self._rows(x, number + 1, len(x)))
        self.h = self.decoder(x[:, None], pos[:, None], self.kv, dropout=masks).last[:, 0]

    def finish(self, budget: Budget) -> BeamResult:
        best = torch.arange(self.questions, device=self.h.device) * self.beams
        done = torch.full_like(best, self.settings.thoughts)
        rollout = continue_from(
            self.decoder, self.policy, self.kv.select(best), self.h[best], self.pos[best], None, budget=budget, thoughts=done
        )
        candidates, kept, scores = (torch.stack(self.log[name]) for name in ("candidates", "kept", "scores"))
        paths = self.paths.view(self.questions, self.beams, *self.paths.shape[1:])
        return BeamResult(paths, self.scores, candidates, kept, scores, rollout)
