"""A first look at a model of any method: one answer with all that its method records, as a trace."""

from dataclasses import dataclass
from typing import Any

import torch

from lab.errors import SettingsError
from lab.models.latent_model import LatentModel
from lab.trace import Trace

CANDIDATES = 5


@dataclass(frozen=True)
class Look:
    """An answer and its trace; `tokens` and `thoughts` are views of it, None where there is nothing to see."""

    text: str
    trace: Trace

    @property
    def tokens(self) -> Any:
        """What was read and said, coloured by the most telling channel."""
        from lab import view

        return None if self.trace.tokens.empty else view.tokens(self.trace)

    @property
    def thoughts(self) -> Any:
        """Thoughts step by step: what the vocabulary head makes of them, and their scores."""
        from lab import view

        return None if self.trace.thoughts.empty else view.thoughts(self.trace)


def first_look(model: LatentModel, question: Any, *, generator: LatentModel | None = None, **options: Any) -> Look:
    """The answer to a question, greedy or as the method's published settings have it.

    Args:
        question: text, an `Example`, or ids; of a model without a tokenizer also ids as text, such as "3 4 5".
        generator: of a reward model: what answers, and whose thoughts it scores. options: of `generate`.
    """
    if (model if generator is None else generator).tokenizer is None and isinstance(question, str):
        question = _ids(question)
    if model.method == "latenttts":
        return _scored(model, question, generator, options)
    found = model.generate([question], **({"candidates": CANDIDATES} if model.method == "tah" else {"top": CANDIDATES}), **options)
    return Look(found.texts[0], found.trace())


def _ids(text: str) -> list[int]:
    if not text or not all(word.isdecimal() for word in text.split()):
        raise SettingsError("This model has no tokenizer: write the question as token ids, such as 3 4 5, or load it with tokenizer=….")
    return [int(word) for word in text.split()]


def _scored(reward: Any, question: Any, generator: LatentModel | None, options: dict[str, Any]) -> Look:
    from lab.sampling.records import Asked

    if generator is None:
        raise SettingsError("This is a reward model: it scores thoughts and answers nothing. Name the model that thinks as its generator.")
    reward.check_for(generator)
    found = generator.generate([question], top=CANDIDATES, vectors=True, **options)
    (row,), (thoughts,) = found.rows, found.vectors
    asked = Asked(0, row.prompt, thoughts[None], torch.tensor([len(thoughts)]), torch.tensor([False]))
    trace = found.trace()
    scores = reward.score([asked])[0][0].tolist()
    steps = trace.thoughts.assign(score=[scores[step] if step < len(scores) else float("nan") for step in trace.thoughts["step"]])
    return Look(row.text, Trace.build(trace.method, samples=trace.samples, tokens=trace.tokens, thoughts=steps))
