"""Answering with thoughts in the prompt: they are made once, the prompt is read once for all samples (`lta.md` 2.11)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lab.data.examples import Example
from lab.latent.loop import Budget, Prompt
from lab.latent.policy import Policy
from lab.latent.prefix import inject
from lab.latent.record import Ask, Responses, respond
from lab.latent.sampling import Sampling
from lab.methods.lta.config import FAMILIES
from lab.methods.lta.data import ThoughtBatch, batch_of
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.prompting import Prompted, build

SAMPLING = {"qwen3": Sampling(temperature=0.7, top_p=0.8, top_k=20)}
OTHERS = Sampling(temperature=0.5, top_k=10)


class _Ids(list):
    """A prompt's ids that know which prompt they are."""

    number: int


def generate(
    model: ThoughtModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    thoughts: int | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 1024,
    **ask: Any,
) -> Responses:
    """Answers to texts, `Example`s or `Prompted`s.

    Args:
        thoughts: how many, instead of what the model was trained with.
        sampling: None = the published settings of the model's family.
        ask: see `lab.latent.record.Ask`. With K sets of thoughts, sample s reads set s mod K, so K·R samples are R answers to each.
    """
    s, sets = model.config, model.config.num_scaling_times
    asked = [prompted(model, question, thoughts) for question in questions]
    with torch.no_grad():
        made = make_all(model, asked)
    prompts = [_numbered(row, number) for number, row in enumerate(row for row in asked for _ in range(sets))]
    stops = tuple({s.eos_id, *_turn_end(model)} - {-1})
    policy = Policy(model.decoder, stops, sampling or SAMPLING.get(s.family, OTHERS))
    first, skip = ask.pop("first", 0), ask.pop("skip", 0)
    each, skipped = -(-(skip + samples) // sets) - skip // sets, skip // sets
    about = Ask(samples=each, first=first * sets, skip=skipped, budget=Budget(answer=max_new_tokens), **ask)

    def prompt_of(decoder, group: list[_Ids]) -> Prompt:
        question = [ids.number // sets for ids in group]
        rows = [asked[number].row for number in question]
        picked = None if made is None else made[[ids.number for ids in group]]
        return inject(decoder, [list(row.prompt) for row in rows], picked, [list(row.after) for row in rows], question)

    found = respond(model, prompts, lambda group: policy, about, prompt_of)
    return found if sets == 1 else _regrouped(found, sets, range(skip, skip + samples))


def prompted(model: ThoughtModel, question: Any, thoughts: int | None = None) -> Prompted:
    """The test prompt of a text or `Example`; a `Prompted` as it is."""
    if isinstance(question, Prompted):
        return question
    s = model.config
    example = question if isinstance(question, Example) else Example("question", str(question), answer="?")
    n = 0 if s.generator == "none" else s.num_thought_tokens if thoughts is None else thoughts
    where = {"family": s.family, "task": s.task, "split": "test", "pack": model.pack, "distinct": s.distinct_slots}
    return build(example, n, tokenizer=model.tokenizer, assistant_tokenizer=model.assistant_tokenizer, **where)


def make_all(model: ThoughtModel, asked: Sequence[Prompted], size: int = 64) -> Tensor | None:
    """Thoughts (Q·K, n, D) of all questions, question-major."""
    if not asked or asked[0].row.thoughts == 0:
        return None
    parts = [model.make(to_batch(model, asked[start : start + size])) for start in range(0, len(asked), size)]
    return None if parts[0] is None else torch.cat(parts)


def to_batch(model: ThoughtModel, rows: Sequence[Prompted]) -> ThoughtBatch:
    """The batch of `rows` on the model's device."""
    marks, tokenizer = FAMILIES[model.config.family], model.tokenizer
    placeholder = 0 if tokenizer is None else tokenizer.convert_tokens_to_ids(marks.placeholder) or 0
    pad = 0 if tokenizer is None or tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return batch_of(rows, pad, placeholder).to(model.device)


def _numbered(row: Prompted, number: int) -> _Ids:
    ids = _Ids([*row.row.prompt, *[0] * row.row.thoughts, *row.row.after])
    ids.number = number
    return ids


def _turn_end(model: ThoughtModel) -> set[int]:
    if model.tokenizer is None:
        return set()
    found = model.tokenizer.convert_tokens_to_ids(FAMILIES[model.config.family].turn_end)
    return set() if found is None or found == model.tokenizer.unk_token_id else {found}


def _regrouped(found: Responses, sets: int, wanted: range) -> Responses:
    """The sets of a question as further samples of it, those that are wanted."""
    rows = [replace(row, question=row.question // sets, sample=row.sample * sets + row.question % sets) for row in found.rows]
    kept = sorted((i for i, row in enumerate(rows) if row.sample in wanted), key=lambda i: (rows[i].question, rows[i].sample))
    return replace(found, rows=[rows[i] for i in kept], vectors=[found.vectors[i] for i in kept] if found.vectors else [])
