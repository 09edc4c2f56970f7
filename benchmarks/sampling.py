"""Sampling and scoring thoughts against plain transformers: CPU-time ratios in one process, one thread, float32, alternating, medians.

    python benchmarks/sampling.py [--sizes mid,tiny] [--repeat 5] [--only samples,scoring]

Floors (1.00 = as fast as): samples, transformers' own forward with its cache: each question is read once, the cache repeated N times,
then one batched step a thought and an answer token (thoughts fed back with noise, greedy answers); scoring, the same model reading
L + N·T positions: the prompt once, then the thoughts of all samples in one call over the repeated cache. What the released code
does (every sample reads its own prompt; the reward model re-reads prompt, thoughts and answer) stands in the last column.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import DynamicCache, GPT2LMHeadModel

from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.policy import Counted
from lab.models.backbones import load_backbone
from lab.models.decoder import Decoder, decoder_for
from lab.sampling.reward import LatentRM
from lab.sampling.stochastic import Noise, Noisy

SIZES = {
    "mid": {"layers": 6, "hidden": 384, "intermediate": 1536, "heads": 6, "vocab_size": 32000, "max_positions": 1024},
    "tiny": {"layers": 2, "hidden": 64, "intermediate": 256, "heads": 4, "vocab_size": 256, "max_positions": 1024},
}
CASES = [(1, 16), (1, 64), (4, 16), (4, 64)]  # questions, samples each
PROMPT, THOUGHTS, ANSWER, END, NEVER = 64, 6, 10, 1, -7  # no row ever says the last, so that all work is the same


def model_of(size: str) -> GPT2LMHeadModel:
    return load_backbone("toy:gpt2", **SIZES[size])


def prompts(questions: int) -> torch.Tensor:
    return torch.randint(2, 200, (questions, PROMPT), generator=torch.Generator().manual_seed(0))


# ---- samples ----


def ours(decoder: Decoder, ids: torch.Tensor, n: int) -> None:
    row = torch.arange(len(ids) * n)
    policy = Noisy(Counted(decoder, (NEVER,), count=THOUGHTS, closing=(END,)), Noise(sigma=0.6))
    rollout(
        decoder,
        policy,
        Prompt.of_ids(decoder, ids.tolist()),
        n,
        Keyed.of(0, row // n, row % n),
        budget=Budget(thoughts=THOUGHTS, answer=ANSWER),
    )


@torch.no_grad()
def floor(model: GPT2LMHeadModel, ids: torch.Tensor, n: int, again: bool = False) -> None:
    """Plain transformers; `again`: every sample reads the prompt itself, as the released code does."""
    body, table, head = model.transformer, model.transformer.wte, model.lm_head
    cache = DynamicCache(config=model.config)
    h = body(input_ids=ids.repeat_interleave(n, 0) if again else ids, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    if not again:
        cache.batch_repeat_interleave(n)
        h = h.repeat_interleave(n, 0)
    for _ in range(THOUGHTS):
        x = h + 0.6 * torch.randn_like(h)
        h = body(inputs_embeds=x[:, None], past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    token = torch.full((len(h),), END)
    for _ in range(ANSWER):
        h = body(inputs_embeds=table(token)[:, None], past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        token = head(h).argmax(-1)


# ---- scoring ----


def rate(reward: LatentRM, ids: torch.Tensor, thoughts: torch.Tensor) -> None:
    reward.rate(Prompt.of_ids(reward.decoder, ids.tolist()), thoughts)


@torch.no_grad()
def rate_floor(reward: LatentRM, ids: torch.Tensor, thoughts: torch.Tensor) -> None:
    body, cache = reward.model.transformer, DynamicCache(config=reward.model.config)
    body(input_ids=ids, past_key_values=cache, use_cache=True)
    cache.batch_repeat_interleave(len(thoughts) // len(ids))
    reward.classifier(body(inputs_embeds=thoughts, past_key_values=cache, use_cache=True).last_hidden_state)


@torch.no_grad()
def rate_again(reward: LatentRM, ids: torch.Tensor, thoughts: torch.Tensor) -> None:
    table, n = reward.model.transformer.wte, len(thoughts) // len(ids)
    answer = torch.full((len(thoughts), 1 + ANSWER), END)
    whole = torch.cat((table(ids).repeat_interleave(n, 0), thoughts, table(answer)), 1)
    reward.classifier(reward.model.transformer(inputs_embeds=whole).last_hidden_state)


# ---- measuring ----


def cpu_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(works: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """The median over rounds of each work's CPU time over that of `floor`, works taken in turn after one warm-up."""
    for work in works.values():
        work()
    rounds = [{name: cpu_time(work) for name, work in works.items()} for _ in range(repeat)]
    return {name: statistics.median(times[name] / times["floor"] for times in rounds) for name in works}


def works_of(kind: str, model: GPT2LMHeadModel, questions: int, n: int) -> dict[str, Callable[[], object]]:
    ids = prompts(questions)
    if kind == "samples":
        decoder = decoder_for(model)
        return {
            "floor": partial(floor, model, ids, n),
            "lab": partial(ours, decoder, ids, n),
            "released": partial(floor, model, ids, n, True),
        }
    reward = LatentRM(copy.deepcopy(model)).eval()
    thoughts = torch.randn(questions * n, THOUGHTS, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    return {name: partial(work, reward, ids, thoughts) for name, work in {"floor": rate_floor, "lab": rate, "released": rate_again}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="mid,tiny")
    parser.add_argument("--only", default="samples,scoring")
    parser.add_argument("--repeat", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'work':8} {'size':5} {'questions':>9} {'N':>3} {'lab / floor':>12} {'must':>5} {'released / floor':>17}")
    must = {("samples", "mid"): 0.95, ("samples", "tiny"): 0.6}
    for kind in asked.only.split(","):
        for size in asked.sizes.split(","):
            model = model_of(size)
            for questions, n in CASES:
                found = compare(works_of(kind, model, questions, n), asked.repeat)
                limit = must.get((kind, size), 1.1)
                print(f"{kind:8} {size:5} {questions:9} {n:3} {found['lab']:12.2f} {limit:5.2f} {found['released']:17.2f}")


if __name__ == "__main__":
    main()
