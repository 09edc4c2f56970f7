"""Gated rollouts and updates against plain ones: CPU-time ratios in one process, one thread, float32, alternating, medians.

    python benchmarks/gated.py [--repeat 5] [--batches 1,8,32]

6 layers, width 384, GPT-2's vocabulary. Floors (1.00 = as fast as): rollout, transformers' own `generate` with sampling for as many rows
and tokens, each row given its prompt as TRL does; update, forward and backward of one plain GRPO update of the same rows and columns.
"""

import argparse
from functools import partial

import torch
from turns import compare

from lab.latent.draws import Keyed
from lab.latent.plan import left, right
from lab.methods.dtt.config import GatedSettings
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.reinforce import GatedThinking, GateLearning
from lab.models.backbones import load_backbone
from lab.training.acts import Completions

PROMPT, WRITTEN, SAMPLES = 64, 32, 8


def model_of() -> SparseGatedModel:
    backbone = load_backbone("toy:gpt2-mid")
    settings = GatedSettings(bias=0.0, bot_id=50255, eot_id=50256)
    return SparseGatedModel.build(backbone, None, settings.model_dump()).eval()


def rollout(model: SparseGatedModel, prompts: list[list[int]], samples: int):
    """Acts of `samples` completions a prompt, none of which ends early."""
    question = torch.arange(len(prompts)).repeat_interleave(samples)
    draws = Keyed.of(0, question, torch.arange(samples).repeat(len(prompts)))
    return GatedThinking(model, GateLearning()).act(prompts, samples, draws, temperature=1.0, longest=WRITTEN)


def generate(model: SparseGatedModel, prompts: list[list[int]], samples: int) -> torch.Tensor:
    """The floor: each row reads its own copy of the prompt."""
    ids = torch.tensor([prompt for prompt in prompts for _ in range(samples)])
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": WRITTEN, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        return model.backbone.generate(ids, attention_mask=torch.ones_like(ids), **how)


def batch_of(prompts: list[list[int]], acts, samples: int) -> Completions:
    given, said = left([prompt for prompt in prompts for _ in range(samples)]), right(acts.ids)
    return Completions(given.ids, torch.ones_like(given.ids), said.ids, torch.ones_like(said.ids), acts.record)


def gated_update(model: SparseGatedModel, batch: Completions) -> None:
    thinking = GatedThinking(model, GateLearning())
    logps, _ = thinking.log_probs(batch, 1.0)
    (logps.mean() + thinking.error.mean()).backward()
    model.zero_grad()


def plain_update(model: SparseGatedModel, batch: Completions) -> None:
    ids, mask = torch.cat((batch.prompt, batch.ids), 1), torch.cat((batch.prompt_mask, batch.mask), 1)
    logits = model.backbone(ids, attention_mask=mask, logits_to_keep=batch.ids.shape[1] + 1, use_cache=False).logits[:, :-1]
    logs = torch.log_softmax(logits.float(), -1)
    _ = -(logs.detach().exp() * logs.detach()).sum(-1)
    logs.gather(-1, batch.ids[..., None]).mean().backward()
    model.zero_grad()


def prompt_reads(model: SparseGatedModel, prompts: list[list[int]], samples: int) -> int:
    """Rows of prompt that a rollout reads."""
    decoder, seen = model.decoder, []

    class Counting:
        def __getattr__(self, name):
            return getattr(decoder, name)

        def __call__(self, x, *args, **options):
            seen.append(x.shape[0] if x.shape[1] > 1 else 0)
            return decoder(x, *args, **options)

    model.__dict__["decoder"] = Counting()
    rollout(model, prompts, samples)
    model.__dict__["decoder"] = decoder
    return sum(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--batches", default="1,8,32")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = model_of()
    random = torch.Generator().manual_seed(0)
    prompts = torch.randint(0, 50000, (8, PROMPT), generator=random).tolist()
    print(f"{'work':34}{'ratio':>8}{'must':>8}{'floor, ms':>10}")
    for rows in map(int, asked.batches.split(",")):
        samples = min(rows, SAMPLES)
        some = prompts[: rows // samples]
        found, _, floor = compare(partial(rollout, model, some, samples), partial(generate, model, some, samples), asked.repeat)
        print(f"{f'rollout, {rows} rows':34}{found:8.2f}{'1.00' if rows >= 8 else '-':>8}{floor:10.0f}")
    batch = batch_of(prompts[:1], rollout(model, prompts[:1], SAMPLES), SAMPLES)
    found, _, floor = compare(partial(gated_update, model, batch), partial(plain_update, model, batch), asked.repeat)
    print(f"{f'update, {SAMPLES} rows':34}{found:8.2f}{'1.15':>8}{floor:10.0f}")
    print(f"{'prompt rows read, 2 prompts x 8':34}{prompt_reads(model, prompts[:2], SAMPLES):8d}{2:8d}")


if __name__ == "__main__":
    main()
