"""Feedback methods against plain transformers forwards of the same shapes: `python benchmarks/feedback.py`.

Every figure is a ratio of CPU times inside one run (float32, one thread, the two sides taking turns, median of the rounds), so that
another machine or a busy one says the same. The floor is what a careful user would write with transformers alone:

* generation: the question read once, its cache repeated for the samples, then one forward of all rows per thought and per token;
* training: the same passes over the same columns with a growing cache, the vocabulary head on labelled columns alone; for CODI the
  question is read by teacher and student each, as there is no way to share it.

Beside it stands `generate` of transformers for as many new tokens, which thinks nothing.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.nn import functional as F
from turns import compare, ids, main

from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.plan import IGNORE, Row, collate, collate_pairs
from lab.methods.coconut.config import CoconutSettings
from lab.methods.coconut.model import CoconutModel
from lab.methods.coconut.objective import loss as coconut_loss
from lab.methods.coconut.policy import policy as coconut_policy
from lab.methods.codi.config import CodiSettings
from lab.methods.codi.data import pair
from lab.methods.codi.model import CodiModel
from lab.methods.codi.objective import loss as codi_loss
from lab.methods.codi.policy import policy as codi_policy
from lab.models.backbones import load_backbone

QUESTION, THOUGHTS, REASONING, ANSWER, ROWS = 60, 6, 25, 8, 16
BOUNDS = {("generation", "mid"): 0.95, ("generation", "tiny"): 0.6, ("codi step", "mid"): 0.9, ("coconut step", "mid"): 1.1}


def models(size: str) -> tuple[CoconutModel, CodiModel]:
    """One GPT-2 of a size as both methods."""
    backbone = load_backbone(f"toy:gpt2-{size}")
    width = backbone.config.hidden_size
    coconut = CoconutModel(backbone, None, CoconutSettings(start_id=1, end_id=2, latent_id=3))
    settings = CodiSettings(prj_dim=width, lora_r=0, pad_id=4, bot_id=1, eot_id=2, eos_id=0)
    return coconut, CodiModel.build(copy.deepcopy(backbone), None, settings.model_dump(mode="json"))


# ---- generation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def stock(model, prompt: torch.Tensor, n: int, think: Callable) -> torch.Tensor:
    """Thoughts and answer with transformers' own forward and cache."""
    out = model(prompt, use_cache=True, output_hidden_states=True, logits_to_keep=1)
    cache, h = out.past_key_values, out.hidden_states[-1][:, -1:].repeat_interleave(n, 0)
    cache.batch_repeat_interleave(n)
    for _ in range(THOUGHTS):
        out = model(inputs_embeds=think(h), past_key_values=cache, output_hidden_states=True, logits_to_keep=1)
        h = out.hidden_states[-1]
    token = torch.full((len(h), 1), 2)
    for _ in range(ANSWER):
        out = model(token, past_key_values=cache, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    return token


def generation(size: str, rounds: int) -> Iterator[tuple]:
    coconut, codi = models(size)
    for name, model in (("coconut", coconut), ("codi", codi)):
        for questions, samples in ((1, 16), (4, 4), (1, 64), (4, 16)):
            prompt = ids(questions, QUESTION)
            think = (lambda h: h) if name == "coconut" else codi.parts.prj
            make = coconut_policy(model.decoder, model.config, THOUGHTS) if name == "coconut" else codi_policy(model, THOUGHTS)
            make.stop_ids = torch.tensor([-1])  # every row says all its tokens, on both sides
            budget = Budget(thoughts=THOUGHTS, answer=ANSWER)
            ours = partial(rollout, model.decoder, make, Prompt(model.decoder.embed(prompt)), samples, budget=budget)
            floor = partial(stock, model.backbone, prompt, samples, think)
            yield "generation", size, f"{name}, {questions} × {samples}", *compare(ours, floor, rounds)
    prompt = ids(1, QUESTION).repeat(16, 1)
    tokens = dict(max_new_tokens=THOUGHTS + ANSWER, do_sample=False, eos_token_id=None, pad_token_id=0)
    plain, floor = partial(coconut.backbone.generate, prompt, **tokens), partial(stock, coconut.backbone, prompt[:1], 16, lambda h: h)
    yield "plain generate", size, "1 × 16", *compare(plain, floor, rounds)


# ---- training --------------------------------------------------------------------------------------------------------


def head_loss(model, states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy on labelled columns alone: states (R, t, D), labels (R, t) of the next token."""
    keep = labels != IGNORE
    return F.cross_entropy(model.lm_head(states[keep]), labels[keep])


def shifted(block: torch.Tensor) -> torch.Tensor:
    return torch.cat((block[:, 1:], torch.full_like(block[:, :1], IGNORE)), 1)


def coconut_step(size: str, rounds: int) -> Iterator[tuple]:
    model, _ = models(size)
    question, after = ids(ROWS, QUESTION), ids(ROWS, REASONING + ANSWER)
    plan = collate(
        [
            Row(tuple(q), tuple(a), (IGNORE,) * (len(q) + 1) + tuple(a[1:]), THOUGHTS)
            for q, a in zip(question.tolist(), after.tolist(), strict=True)
        ]
    )
    body = model.backbone.transformer

    def ours() -> None:
        model.zero_grad()
        coconut_loss(model, plan)[0].backward()

    def floor() -> None:
        model.zero_grad()
        out = body(question, use_cache=True)
        for _ in range(THOUGHTS - 1):
            out = body(inputs_embeds=out.last_hidden_state[:, -1:], past_key_values=out.past_key_values)
        x = torch.cat((out.last_hidden_state[:, -1:], body.wte(after)), 1)
        states = body(inputs_embeds=x, past_key_values=out.past_key_values).last_hidden_state[:, 1:]
        head_loss(model.backbone, states, shifted(after)).backward()

    yield "coconut step", size, f"{ROWS} rows", *compare(ours, floor, rounds)


def codi_step(size: str, rounds: int) -> Iterator[tuple]:
    _, model = models(size)
    question, cot, answer = ids(ROWS, QUESTION), ids(ROWS, REASONING), ids(ROWS, ANSWER)
    triples = zip(question.tolist(), cot.tolist(), answer.tolist(), strict=True)
    batch = collate_pairs([pair(q, c, a, 3, model.config) for q, c, a in triples])
    body, layers = model.backbone.transformer, model.backbone.config.n_layer
    written = torch.cat((question, batch.teacher.after.ids), 1)
    begun, after = torch.cat((question, torch.full((ROWS, 1), 1)), 1), batch.student.after.ids
    labels = shifted(written)
    labels[:, : QUESTION - 1] = IGNORE

    def ours() -> None:
        model.zero_grad()
        codi_loss(model, batch)[0].backward()

    def floor() -> None:
        model.zero_grad()
        taught = body(written, use_cache=False, output_hidden_states=True)
        out = body(begun, use_cache=True)
        for _ in range(THOUGHTS):
            out = body(inputs_embeds=model.parts.prj(out.last_hidden_state[:, -1:]), past_key_values=out.past_key_values)
        said = body(after, past_key_values=out.past_key_values, output_hidden_states=True)
        total = head_loss(model.backbone, taught.last_hidden_state, labels) + head_loss(
            model.backbone, said.last_hidden_state, shifted(after)
        )
        for a, b in zip(said.hidden_states, taught.hidden_states, strict=True):
            target = b[:, QUESTION + REASONING + 3].detach()
            total = total + F.smooth_l1_loss(a[:, 4], target) / target.std() / (layers + 1)
        total.backward()

    yield "codi step", size, f"{ROWS} rows", *compare(ours, floor, rounds)


if __name__ == "__main__":
    main(__doc__, [coconut_step, codi_step, generation], BOUNDS)
