"""Changing thoughts while a model thinks: what an intervention sees and may do, the same in all three places a thought can stand.

An engine (loop, depth, the prompt of the prefix engine) asks its `Editing` about every vector it is about to read as a thought, about the
hidden states of those columns at the layers the edit names, and about how many thoughts there may be. An `Edit` that returns what
it is given records without changing anything. Axes: R rows, n thoughts, t columns, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

READ = -1  # the layer of the vector that is read; 0 = what enters the first block, k = after block k, as `taps` of a decoder


@dataclass(frozen=True)
class Place:
    """Where n thoughts stand: number of the question, of the sample and of the thought, (n,) each, and the layer."""

    question: Tensor
    sample: Tensor
    step: Tensor
    layer: int = READ


class Edit:
    """Changes nothing; interventions override what they change. `layers`: hidden states they want to see beside what is read."""

    layers: tuple[int, ...] = ()

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        """(n, D) what stands there instead of `x` (n, D)."""
        return x

    def most(self, question: Tensor, sample: Tensor) -> Tensor | None:
        """(n,) how many thoughts rows make at the most (where a row thinks before it answers: exactly); None = as the model decides."""
        return None


class Mix(NamedTuple):
    """Tokens read with thoughts in them: `which` rows (R,) bool; what is read without them (`rest`) and of the token alone (`plain`)."""

    which: Tensor
    rest: Tensor
    plain: Tensor


class Editing:
    """An edit at work on the R rows of a rollout, whose `question` and `sample` (R,) it knows."""

    def __init__(self, edit: Edit, question: Tensor, sample: Tensor):
        self.edit, self.question, self.sample = edit, question, sample
        self.made = torch.zeros_like(question)  # where the engine does not count thoughts itself
        self.step = torch.full_like(question, -1)  # of the thought a row reads now, -1 = none

    def of_prompts(self, copies: int) -> Self:
        """The same for prompts that are read once for `copies` rows each: as their first rows."""
        return type(self)(self.edit, self.question[::copies], self.sample[::copies])

    def rest(self) -> None:
        """No row reads a thought until told otherwise."""
        self.step.fill_(-1)

    def stop(self, own: Tensor | None, index: Tensor, made: Tensor) -> Tensor | None:
        """(n,) bool: which rows stop thinking after `made` (n,) thoughts; `own` is the model's decision."""
        most = self.edit.most(self.question[index], self.sample[index])
        return own if most is None else made >= most

    def vectors(self, x: Tensor, index: Tensor, step: Tensor | None = None) -> Tensor:
        """(n, D) what the rows `index` (n,) read as their thought number `step` (n,); None = the next one."""
        if step is None:
            step = self.made[index]
            self.made[index] += 1
        self.step[index] = step
        return self.edit(x, Place(self.question[index], self.sample[index], step))

    def mixed(self, x: Tensor, mix: Mix, index: Tensor) -> Tensor:
        """(R, D) the inputs `x` of tokens with thoughts in them, edited; a row that may have no more reads the token alone."""
        stop = self.stop(None, index, self.made[index])
        closed = mix.which & stop if stop is not None else torch.zeros_like(mix.which)
        at = (mix.which & ~closed).nonzero()[:, 0]
        thought = x[at] - mix.rest[at]
        new = self.vectors(thought, index[at])
        same = (new == thought).all(-1, keepdim=True)
        x = torch.where(closed[:, None], mix.plain, x)
        return x.index_put((at,), torch.where(same, x[at], mix.rest[at] + new))

    def allowed(self, wanted: Tensor) -> Tensor:
        """(R, t) bool: which of the columns `wanted` (R, t) bool may be thoughts, counted from the left."""
        most = self.edit.most(self.question, self.sample)
        return wanted if most is None else wanted & (self._steps(wanted) < most[:, None])

    def block(self, x: Tensor, real: Tensor) -> tuple[Tensor, Callable | None]:
        """What is read in the columns `real` (R, t) instead of `x` (n, D), row by row, and the patch for their hidden states."""
        steps = torch.where(real, self._steps(real), -1)
        row, column = real.nonzero(as_tuple=True)
        self.made = self.made + real.sum(1)
        new = self.edit(x, Place(self.question[row], self.sample[row], steps[row, column]))
        return new, self._patch(torch.arange(len(real), device=real.device), steps)

    def patch(self, index: Tensor) -> Callable[[Tensor, int], Tensor] | None:
        """What changes the hidden states of the one column that rows `index` read now; None = nothing does."""
        return self._patch(index, self.step[index][:, None])

    def _steps(self, real: Tensor) -> Tensor:
        return self.made[:, None] + real.cumsum(1) - 1

    def _patch(self, index: Tensor, steps: Tensor) -> Callable[[Tensor, int], Tensor] | None:
        row, column = (steps >= 0).nonzero(as_tuple=True)
        if not self.edit.layers or not len(row):
            return None
        place = Place(self.question[index[row]], self.sample[index[row]], steps[row, column])

        def patched(h: Tensor, layer: int) -> Tensor:
            if layer not in self.edit.layers:
                return h
            return h.index_put((row, column), self.edit(h[row, column], replace(place, layer=layer)))

        return patched
