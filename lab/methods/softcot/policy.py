"""Answering with SoftCoT: as LTA-Thinker does, drawn as SoftCoT's scripts draw."""

from collections.abc import Sequence
from typing import Any

from lab.latent.record import Responses
from lab.latent.sampling import Sampling
from lab.methods.lta import policy
from lab.methods.lta.model import ThoughtModel


def generate(
    model: ThoughtModel, questions: Sequence[Any], samples: int = 1, *, sampling: Sampling | None = None, **options: Any
) -> Responses:
    """See `lab.methods.lta.policy.generate`.

    Args:
        sampling: None = as published (`softcot.md` 2): temperature 1 and the base's own top_k, 50 where it names none.
    """
    if sampling is None:
        top_k = getattr(model.backbone.generation_config, "top_k", None)
        sampling = Sampling(temperature=1.0, top_k=50 if top_k is None else top_k)
    return policy.generate(model, questions, samples, sampling=sampling, **options)
