"""Adaptive latent reasoning: a training step against plain transformers forwards, and one chain of thoughts shared by a prompt's samples
against a chain for each: `python benchmarks/adaptive.py`.

Ratios of CPU times inside one run (float32, one thread, the sides taking turns, median of the rounds). The floor of the step is what a
careful user would write with transformers alone: teacher and student read the question each, thoughts start at one column, the
vocabulary head runs on labelled columns, the two-way head on the deciding ones.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch.nn import functional as F
from turns import compare, ids, main

from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.plan import IGNORE, Row, collate_pairs
from lab.latent.sampling import Sampling
from lab.latent.tree import rollout_tree, unroll_tree
from lab.latent.unroll import Block, unroll
from lab.methods.adaptive.config import AdaptiveSettings, Distil
from lab.methods.adaptive.model import AdaptiveModel
from lab.methods.adaptive.objective import SFT
from lab.methods.adaptive.policy import Adaptive
from lab.models.backbones import load_backbone

QUESTION, REASONING, ANSWER, ROWS, SAMPLES, PROMPTS = 60, 25, 8, 16, 16, 4
BOUNDS = {("training step", "mid"): 1.1}


def model_of(size: str) -> AdaptiveModel:
    backbone = load_backbone(f"toy:gpt2-{size}")
    settings = AdaptiveSettings(start=1, end=2, go_on=3, stop=4)
    return AdaptiveModel.build(backbone, None, settings)


def training_step(size: str, rounds: int) -> list[tuple]:
    model, distil = model_of(size), Distil(weight_codi=20.0, distance="smooth_l1", scale="layerwise_std")
    counts = torch.arange(ROWS) % 5 + 6  # 6 to 10 thoughts, as in Latent-6-by-1
    question, cot, answer = ids(ROWS, QUESTION), ids(ROWS, REASONING), ids(ROWS, ANSWER)
    batch = collate_pairs([_pair(*row) for row in zip(question.tolist(), cot.tolist(), answer.tolist(), counts.tolist(), strict=True)])
    loss, body, layers = SFT(distil), model.backbone.transformer, model.backbone.config.n_layer

    def ours() -> None:
        model.zero_grad()
        loss(model, batch)[0].backward()

    def floor() -> None:
        model.zero_grad()
        _floor(model, body, layers, question, cot, answer, counts).backward()

    return [("training step", size, f"{ROWS} rows, 6–10", *compare(ours, floor, rounds))]


def _pair(question: list[int], cot: list[int], answer: list[int], count: int) -> tuple[Row, Row]:
    after = (*cot, *answer)
    teacher = Row(tuple(question), after, (*[IGNORE] * len(question), *after), target=len(cot) + 3)
    return teacher, Row((1,), (2, *answer), (1, IGNORE, *answer), thoughts=count, target=4)


def _floor(model: AdaptiveModel, body, layers: int, question, cot, answer, counts) -> torch.Tensor:
    """The same losses with transformers' forwards and cache; padding thoughts are masked."""
    head, filter, rows = model.backbone.lm_head.weight, model.parts.recurrent_filter, len(question)
    taught = body(torch.cat((question, cot, answer), 1), use_cache=False, output_hidden_states=True)
    told = taught.last_hidden_state[:, QUESTION - 1 : -1]
    total = F.cross_entropy((told @ head.T).flatten(0, 1), torch.cat((cot, answer), 1).flatten())
    start, most = torch.full((rows, 1), 1), int(counts.max())
    out = body(torch.cat((question, start), 1), use_cache=True)
    first, states = out.last_hidden_state[:, -2], [out.last_hidden_state[:, -1:]]
    mask, pos = torch.ones(rows, QUESTION + 1, dtype=torch.long), torch.full((rows, 1), QUESTION)
    for step in range(most):
        live = (step < counts)[:, None].long()
        mask, pos = torch.cat((mask, live), 1), pos + live
        x = filter(states[-1])
        out = body(inputs_embeds=x, past_key_values=out.past_key_values, attention_mask=mask, position_ids=pos)
        states.append(out.last_hidden_state)
    after = torch.cat((torch.full((rows, 1), 2), answer), 1)
    mask, place = torch.cat((mask, torch.ones_like(after)), 1), pos + 1 + torch.arange(after.shape[1])
    said = body(after, past_key_values=out.past_key_values, attention_mask=mask, position_ids=place, output_hidden_states=True)
    every, column = torch.cat(states, 1), torch.arange(most + 1)
    made = column <= counts[:, None]
    decided = F.cross_entropy(every[made] @ head[[3, 4]].T, (column == counts[:, None])[made].long())
    words = torch.cat((first[:, None], said.last_hidden_state[:, :-1]), 1)
    total = total + decided + F.cross_entropy((words @ head.T).flatten(0, 1), torch.cat((start, answer), 1).flatten())
    for a, b in zip(said.hidden_states[1:], taught.hidden_states[1:], strict=True):
        target = b[:, QUESTION + REASONING + 3].detach()
        total = total + 20 * F.smooth_l1_loss(a[:, 4], target) / target.std() / layers
    return total


def shared_rollout(size: str, rounds: int) -> list[tuple]:
    model = model_of(size)
    policy = Adaptive(model.thinker, [-1], sampling=Sampling(temperature=1.0))
    policy.stop_ids, ask = torch.tensor([-1]), Prompt(model.thinker.embed(ids(PROMPTS, QUESTION)))
    draws = Keyed.of(0, torch.arange(PROMPTS).repeat_interleave(SAMPLES), torch.arange(SAMPLES).repeat(PROMPTS))
    rows = []
    for name, bias in (("mean count 1", 0.0), ("mean count 6", 1.8)):
        policy.halt = _halting(policy, bias)
        how = dict(budget=Budget(thoughts=20, answer=ANSWER), keep=("decision", "logprob"))
        shared = partial(rollout_tree, model.thinker, policy, ask, SAMPLES, draws, **how)
        apart = partial(rollout, model.thinker, policy, ask, SAMPLES, draws, **how)
        rows.append(("shared rollout", size, f"{PROMPTS} × {SAMPLES}, {name}", *compare(shared, apart, rounds)))
    return rows


def _halting(policy: Adaptive, bias: float) -> Callable:
    """The head's decision with a bias towards going on, so that chains have a length worth sharing."""
    from lab.latent.draws import Stream

    def halt(rows) -> torch.Tensor:
        stop = torch.sigmoid(torch.full((len(rows),), -bias))
        rows.note("decision", stop.log())
        return rows.draws.uniform(rows.thoughts, Stream.STOP) < stop

    return halt


def shared_update(size: str, rounds: int) -> list[tuple]:
    model = model_of(size)
    total = PROMPTS * SAMPLES
    prompts, counts = ids(PROMPTS, QUESTION), torch.randint(3, 10, (total,))
    group, after = torch.arange(PROMPTS).repeat_interleave(SAMPLES), ids(total, ANSWER)
    thinker = model.thinker

    def shared() -> None:
        model.zero_grad()
        states, read = unroll_tree(thinker, Block(thinker.embed(prompts)), group, counts, Block(thinker.embed(after)), thinker.feedback)
        (states.pow(2).mean() + read.pow(2).mean()).backward()

    def apart() -> None:
        model.zero_grad()
        run = unroll(thinker, Block(thinker.embed(prompts[group])), counts, Block(thinker.embed(after)), thinker.feedback)
        (run.states.pow(2).mean() + run.after.pow(2).mean()).backward()

    return [("shared update", size, f"{PROMPTS} × {SAMPLES}, 3–9", *compare(shared, apart, rounds))]


if __name__ == "__main__":
    main(__doc__, [training_step, shared_rollout, shared_update], BOUNDS)
