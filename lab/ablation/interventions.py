"""What is done to thoughts: each intervention is an `Edit` that knows what the model thought by itself.

Axes: R rows (question-major, `samples` a question), T thoughts, D width, n thoughts at hand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from lab.latent.draws import Keyed, Stream
from lab.latent.edit import READ, Edit, Place


@dataclass(frozen=True)
class Thoughts:
    """What all rows thought by themselves.

    Attributes:
        vectors: (R, T, D) what was read, 0 beyond `counts` (R,). states: {layer: (R, T, D)} hidden states of those columns.
        samples: rows a prompt; `each` rows a question (SoftCoT++ asks with several prompts).
        fixed: rows think before they answer, so that an intervention can keep their number.
    """

    vectors: Tensor
    counts: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)
    samples: int = 1
    each: int = 1
    fixed: bool = True

    @property
    def real(self) -> Tensor:
        """(R, T, 1) bool: where there is a thought."""
        return (torch.arange(self.vectors.shape[1], device=self.counts.device) < self.counts[:, None])[..., None]

    @cached_property
    def mean(self) -> Tensor:
        """(T, D): the mean thought of each step over the rows that made it."""
        return self.vectors.sum(0) / self.real.sum(0).clamp(min=1)

    @cached_property
    def donors(self) -> Tensor:
        """(R,) for each row the like row of another question with the most similar number of thoughts: a permutation."""
        order = torch.argsort(self.counts[:: self.each], stable=True)
        donor = torch.empty_like(order)
        donor[order] = order.roll(1)
        return (donor[:, None] * self.each + torch.arange(self.each, device=donor.device)).flatten()

    def row(self, place: Place) -> Tensor:
        """(n,) the row of each thought."""
        return place.question * self.samples + place.sample

    def of(self, rows: Tensor, step: Tensor, layer: int = READ) -> tuple[Tensor, Tensor]:
        """(n, D) what `rows` had at `step`, and (n, 1) bool whether there is such a thought."""
        table = self.vectors if layer == READ else self.states[layer]
        return table[rows, step.clamp(max=table.shape[1] - 1)], (step < self.counts[rows])[:, None]

    def mean_at(self, step: Tensor) -> Tensor:
        """(n, D) the mean thought of each step; past the longest row that of the last."""
        return self.mean[step.clamp(max=len(self.mean) - 1)]

    def taken(self, rows: Tensor) -> Self:
        """The thoughts of `rows`, in that order."""
        states = {layer: values[rows] for layer, values in self.states.items()}
        return replace(self, vectors=self.vectors[rows], counts=self.counts[rows], states=states)


class Observed(Edit):
    """Changes nothing and keeps what it sees."""

    def __init__(self, layers: Sequence[int] = ()):
        self.layers, self.seen = tuple(layers), {layer: [] for layer in (READ, *layers)}

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        if len(x):
            self.seen[place.layer].append((place.question, place.sample, place.step, x))
        return x

    def thoughts(self, rows: int, samples: int, each: int, fixed: bool) -> Thoughts | None:
        """What was seen, as tables of `rows` rows; None where there was nothing."""
        if not self.seen[READ]:
            return None
        tables = {layer: self._table(layer, rows, samples) for layer in self.seen}
        vectors, counts = tables.pop(READ)
        return Thoughts(vectors, counts, {layer: table for layer, (table, _) in tables.items()}, samples, each, fixed)

    def _table(self, layer: int, rows: int, samples: int) -> tuple[Tensor, Tensor]:
        question, sample, step, x = (torch.cat(part) for part in zip(*self.seen[layer], strict=True))
        row, table = question * samples + sample, x.new_zeros(rows, int(step.max()) + 1, x.shape[-1])
        counts = torch.zeros(rows, dtype=torch.long, device=x.device).scatter_reduce(0, row, step + 1, "amax")
        return table.index_put((row, step), x), counts


class Kept(Edit):
    """The first `share` of the thoughts there were; where their number can be kept (`Thoughts.fixed`) it is."""

    own: Thoughts
    share = 1.0

    def most(self, question: Tensor, sample: Tensor) -> Tensor | None:
        if self.share == 1.0 and not self.own.fixed:
            return None
        counts = self.own.counts[self.own.row(Place(question, sample, question))]
        return (counts * self.share).long()


class Replaced(Kept):
    """Thoughts are what `change` (x, place, own, seed) makes of them."""

    def __init__(self, own: Thoughts, change: "Change", share: float = 1.0, seed: int = 0):
        self.own, self.change, self.share, self.seed = own, change, share, seed

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        return self.change(x, place, self.own, self.seed).to(x.dtype)


class Patched(Kept):
    """The hidden states of one layer are those of another run at the same thought; past its last thought they stay."""

    def __init__(self, source: Thoughts, layer: int, own: Thoughts):
        self.source, self.layers, self.own = source, (layer,), own

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        if place.layer == READ:
            return x
        there, known = self.source.of(self.source.row(place), place.step, place.layer)
        return torch.where(known, there.to(x.dtype), x)


Change = Callable[[Tensor, Place, Thoughts, int], Tensor]


def as_is(x: Tensor, place: Place, own: Thoughts, seed: int) -> Tensor:
    return x


def zeroed(x: Tensor, place: Place, own: Thoughts, seed: int) -> Tensor:
    return torch.zeros_like(x)


def averaged(x: Tensor, place: Place, own: Thoughts, seed: int) -> Tensor:
    return own.mean_at(place.step)


def swapped(x: Tensor, place: Place, own: Thoughts, seed: int) -> Tensor:
    """Those of the question's donor; its missing ones are the mean."""
    there, known = own.of(own.donors[own.row(place)], place.step)
    return torch.where(known, there, own.mean_at(place.step))


def noise(x: Tensor, place: Place, own: Thoughts, seed: int) -> Tensor:
    """Gaussian, of each thought's norm; keyed by question, sample and step."""
    eps = Keyed.of(seed, place.question, place.sample).normal(place.step, Stream.THOUGHT, (x.shape[-1],)).to(x.dtype)
    return eps * (x.norm(dim=-1, keepdim=True) / eps.norm(dim=-1, keepdim=True))


def shuffled(x: Tensor, place: Place, own: Thoughts, seed: int) -> Tensor:
    """A row's own thoughts in another order; one beyond them stays."""
    there, known = own.of(own.row(place), _orders(own, seed)[own.row(place), place.step.clamp(max=own.vectors.shape[1] - 1)])
    return torch.where(known & (place.step < own.counts[own.row(place)])[:, None], there, x)


def without(step: int, frozen: bool = False) -> Change:
    """One thought is its mean over questions; the later ones are made anew, or (`frozen`) stay as they were."""

    def change(x: Tensor, place: Place, own: Thoughts, seed: int) -> Tensor:
        there, known = own.of(own.row(place), place.step)
        kept = torch.where(known, there, x) if frozen else x
        return torch.where((place.step == step)[:, None], own.mean_at(place.step), kept)

    return change


INTERVENTIONS: dict[str, tuple[Change, float]] = {
    "zeroed": (zeroed, 1.0),
    "mean": (averaged, 1.0),
    "another question's": (swapped, 1.0),
    "noise": (noise, 1.0),
    "shuffled": (shuffled, 1.0),
    "first half": (as_is, 0.5),
    "none at all": (as_is, 0.0),
}


def _orders(own: Thoughts, seed: int) -> Tensor:
    """(R, T) an order of each row's own thoughts."""
    rows, most = own.vectors.shape[:2]
    keys = torch.rand(rows, most, generator=torch.Generator().manual_seed(seed)).to(own.counts.device)
    return keys.masked_fill(~own.real[..., 0], 2.0).argsort(1)
