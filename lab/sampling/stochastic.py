"""Ways to make thoughts stochastic: additive Gaussian noise and Monte Carlo dropout (`latenttts.md` 2.3, 2.4).

Every draw is keyed by (seed, question, sample, step), so one run of N = 64 holds every smaller N and no result depends on
batch size or padding. Axes: R rows, t columns, D width.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lab.config import Settings
from lab.errors import SettingsError, unknown
from lab.latent.draws import Draws, Stream
from lab.latent.policy import Phase, Policy, Rows

SITES = ("embedding", "attention", "mlp")
AHEAD = 1 << 18  # most numbers drawn in advance


class Noise(Settings):
    """Additive Gaussian noise on every thought.

    `sigma` is absolute, or with `relative` a share of the thought's root mean square. `where` is `after` the method's
    feedback (on the vector that is fed, as published) or `before` it (on the hidden state).
    """

    sigma: float = Field(gt=0)
    relative: bool = False
    where: Literal["after", "before"] = "after"


class Dropout(Settings):
    """Monte Carlo dropout.

    Attributes:
        p: probability that an element is dropped.
        sites: which of the decoder's dropout sites are live: `embedding`, `attention` and `mlp` outputs of each layer.
        prompt: whether the prompt is read under dropout too, by each sample for itself (the published regimes); otherwise
            it is read once, clean, and only the thoughts are stochastic (the cheap scope).
        answer: whether the closing and answer tokens are read under dropout as well.
    """

    p: float = Field(gt=0, lt=1)
    sites: tuple[str, ...] = ("attention", "mlp")
    prompt: bool = False
    answer: bool = False


REGIMES = {
    "thoughts": {},
    "vote": {"prompt": True},
    "annotation": {"prompt": True, "sites": SITES},
    "annotation-rollouts": {"prompt": True, "sites": SITES, "answer": True},
    "colar": {"prompt": True, "sites": ("mlp",), "answer": True},
}


def dropout(regime: str, p: float, decoder=None) -> Dropout:
    """The settings of a named regime; raises SettingsError for an unknown one and for a decoder without dropout sites.

    `thoughts` is the cheap scope of ours; the others mask what the released scripts mask (`latenttts.md` 2.3).
    """
    if regime not in REGIMES:
        raise unknown("dropout regime", regime, REGIMES)
    if decoder is not None and not (hasattr(decoder, "blocks") or decoder.sites):
        raise SettingsError(f"{decoder.config.model_type!r} has no dropout sites that lab can reach; use noise instead.")
    return Dropout.check(p=p, **REGIMES[regime])


class Noisy:
    """A policy whose thoughts carry noise, also those it reads mixed into its words; everything else is the policy's own."""

    def __init__(self, policy: Policy, noise: Noise):
        self._policy, self._noise = policy, noise
        self._mixes = getattr(type(policy), "mixed", Policy.mixed) is not Policy.mixed
        self._ahead: Tensor | None = None
        self._loop: object = None

    def __getattr__(self, name: str):
        return getattr(self._policy, name)

    def begin(self, rows: Rows) -> None:
        """Draws the noise of all thoughts at once where their number is known and it is little: the same numbers in fewer calls."""
        self._policy.begin(rows)
        count, (total, width) = getattr(self._policy, "count", None), rows.h.shape
        self._ahead, self._loop = None, rows.write
        if isinstance(count, int) and count and rows.draws is not None and count * total * width <= AHEAD:
            place = torch.arange(total * count, device=rows.h.device)
            draws = rows.draws.select(place % total)
            self._ahead = draws.normal(place // total, Stream.THOUGHT, (width,)).view(count, total, width)

    def thought(self, rows: Rows) -> Tensor:
        """(R, D) the noisy thought of each row."""
        if self._noise.where == "after":
            return self._disturb(self._policy.thought(rows), rows)
        clean, rows.h = rows.h, self._disturb(rows.h, rows)
        thought = self._policy.thought(rows)
        rows.h = clean
        return thought

    def read(self, token: Tensor, rows: Rows) -> Tensor:
        """(R, D) what is read of the tokens just said, noisy where it holds a thought."""
        if not self._mixes:
            return self._policy.read(token, rows)
        if self._noise.where == "after":
            x = self._policy.read(token, rows)
            return torch.where(self._policy.mixed(token, rows).which[:, None], self._disturb(x, rows), x)
        clean, rows.h = rows.h, self._disturb(rows.h, rows)
        x, rows.h = self._policy.read(token, rows), clean
        return x

    def _disturb(self, x: Tensor, rows: Rows) -> Tensor:
        if self._ahead is not None and rows.write is self._loop:
            eps = self._ahead[rows.thoughts, rows.index]
        else:
            eps = rows.draws.normal(rows.thoughts + rows.said, Stream.THOUGHT, (x.shape[-1],))
        if not self._noise.relative:
            return torch.add(x.float(), eps, alpha=self._noise.sigma).to(x.dtype)
        scale = x.float().pow(2).mean(-1, keepdim=True).sqrt()
        return (x.float() + self._noise.sigma * scale * eps).to(x.dtype)


@dataclass
class Masks:
    """Keyed dropout masks for one call: `step` (R,) counts each row's calls, `live` (R,) says which rows are masked.

    Without `step` it is the first call of every row, the one that reads the prompt.
    """

    settings: Dropout
    draws: Draws
    step: Tensor | None = None
    live: Tensor | None = None

    def __call__(self, x: Tensor, site: str, layer: int) -> Tensor:
        if site not in self.settings.sites:
            return x
        stream = Stream.DROPOUT + (layer + 1) * len(SITES) + SITES.index(site)
        step = torch.zeros(len(x), dtype=torch.long, device=x.device) if self.step is None else self.step
        from_the_right = self.draws.uniform(step, stream, tuple(x.shape[1:])).flip(1)  # so that left padding moves no draw
        keep = from_the_right >= self.settings.p
        masked = x * keep / (1 - self.settings.p)
        return masked if self.live is None else torch.where(self.live[:, None, None], masked, x)


class DropoutRegime:
    """When masks are live during a rollout (the protocol of `lab.latent.loop`).

    The call that reads a row's last thought is not masked: its output is not a thought any more. `count` is the number of
    thoughts where the policy fixes it; without it every thinking row is masked.
    """

    def __init__(self, settings: Dropout, count: int | None = None):
        self.settings, self.count, self.shares_prompt = settings, count, not settings.prompt

    def prefill(self, draws: Draws) -> Masks | None:
        return Masks(self.settings, draws) if self.settings.prompt else None

    def at(self, rows: Rows) -> Masks | None:
        step = rows.thoughts + rows.closed + rows.said
        if self.settings.answer:
            return Masks(self.settings, rows.draws, step)
        live = rows.phase == Phase.THINK
        if self.count is not None:
            live = live & (rows.thoughts < self.count)
        return Masks(self.settings, rows.draws, step, live) if bool(live.any()) else None
