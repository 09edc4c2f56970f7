"""Plain sampling from the backbone through the one loop."""

from collections.abc import Sequence
from typing import Any

from lab.latent.loop import Budget
from lab.latent.policy import Policy
from lab.latent.record import Ask, Responses, respond
from lab.latent.sampling import Sampling
from lab.models.latent_model import LatentModel
from lab.models.tokenizers import stop_ids


def generate(
    model: LatentModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    thinking: bool | None = None,
    **ask: Any,
) -> Responses:
    """Answers to texts, `Example`s or ids; see `lab.latent.record.Ask` for the other arguments.

    Args:
        sampling: greedy where None.
        thinking: switch of the chat template, where it has one.
    """
    prompts = [model.prompt_ids(question, thinking=thinking) for question in questions]
    stops = () if model.tokenizer is None else tuple(stop_ids(model.tokenizer, model.backbone))
    policy = Policy(model.decoder, stops, sampling)
    return respond(model, prompts, lambda group: policy, Ask(samples=samples, budget=Budget(answer=max_new_tokens), **ask))
