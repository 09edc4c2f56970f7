"""Thoughts from an assistant against plain transformers work of the same shapes: CPU time, one thread, alternating, median.

Training: one LTA step against forward and backward of the frozen base over the same rows. Evaluation: R sampled answers to Q questions
against one prefill and batched single-token steps with the model's own cache and sampling.

python benchmarks/prefix.py [--rounds 5]
"""

import argparse
import statistics
import time

import torch

from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.plan import IGNORE, Row
from lab.latent.policy import Policy
from lab.latent.sampling import Sampling
from lab.methods.lta.config import LtaSettings
from lab.methods.lta.data import batch_of
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.objective import loss
from lab.methods.lta.prompting import Prompted
from lab.models.backbones import load_backbone

ROWS, PREFIX, THOUGHTS, REST, ASSISTANT, STEPS = 4, 160, 8, 140, 320, 4
PROMPT, ANSWER, RETURNED = 200, 32, 10
SAMPLING = Sampling(temperature=0.7, top_k=20, top_p=0.8)


def cpu_seconds(work):
    began = time.process_time()
    work()
    return time.process_time() - began


def against(floor, ours, rounds):
    """Median ratio of CPU seconds, the two in turn."""
    floor(), ours()
    pairs = [(cpu_seconds(floor), cpu_seconds(ours)) for _ in range(rounds)]
    return statistics.median(mine / theirs for theirs, mine in pairs), statistics.median(theirs for theirs, _ in pairs)


def rows_of(vocabulary, generator):
    def ids(count):
        return tuple(torch.randint(10, vocabulary, (count,), generator=generator).tolist())

    for row in range(ROWS):
        before, after = ids(PREFIX - 10 * row), ids(REST - 5 * row)
        labels = (*[IGNORE] * (len(before) + 2), *after[2:])
        steps = tuple((200 + 20 * i, 218 + 20 * i) for i in range(STEPS))
        slots = tuple(range(ASSISTANT - THOUGHTS, ASSISTANT))
        yield Prompted(
            Row(before, after, labels, thoughts=THOUGHTS),
            ids(ASSISTANT),
            slots,
            199,
            steps,
            tuple(e for _, e in steps),
            ids(3),
            tuple(range(200, 300)),
        )


def training(model, kind, rounds):
    base, batch = model.backbone, batch_of(list(rows_of(32000, torch.Generator().manual_seed(0))))
    width = PREFIX + THOUGHTS + REST
    ids = torch.randint(10, 32000, (ROWS, width), generator=torch.Generator().manual_seed(1))
    labels = torch.cat((torch.full((ROWS, PREFIX + THOUGHTS + 2), -100), ids[:, PREFIX + THOUGHTS + 2 :]), 1)

    def floor():
        x = base.get_input_embeddings()(ids).detach().requires_grad_(True)
        base(inputs_embeds=x, labels=labels, use_cache=False).loss.backward()

    if kind == "softcot":
        batch.states = torch.randn(ROWS, THOUGHTS, model.config.assistant_width)

    def ours():
        model.zero_grad()
        loss(model, batch)[0].backward()

    return against(floor, ours, rounds)


def evaluation(model, questions, rounds):
    base, decoder = model.backbone, model.decoder
    x = torch.randn(questions, PROMPT, base.config.hidden_size) * 0.02

    @torch.no_grad()
    def floor():
        from transformers import DynamicCache
        from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)]
        cache = DynamicCache(config=base.config)
        h = base.model(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
        cache.batch_repeat_interleave(RETURNED)
        h = h.repeat_interleave(RETURNED, 0)
        for _ in range(ANSWER):
            scores = base.lm_head(h)[:, 0]
            for warper in warpers:
                scores = warper(None, scores)
            token = torch.multinomial(torch.softmax(scores, -1), 1)
            h = base.model(inputs_embeds=base.get_input_embeddings()(token), past_key_values=cache, use_cache=True).last_hidden_state

    class Endless(Policy):
        def stopped(self, token, rows):
            return torch.zeros_like(token, dtype=torch.bool)

    def ours():
        rollout(decoder, Endless(decoder, (0,), SAMPLING), Prompt(x), RETURNED, budget=Budget(answer=ANSWER), keep=())

    return against(floor, ours, rounds)


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    rounds = arguments.parse_args().rounds
    torch.set_num_threads(1)
    base = load_backbone("toy:qwen3-mid").requires_grad_(False)
    settings = LtaSettings.check(num_thought_tokens=THOUGHTS)
    lta = ThoughtModel.build(base, None, settings.model_dump(mode="json")).train()
    only = {"sft_loss_weight": 1.0, "contrastive_loss_weight": 0.0, "kl_loss_weight": 0.0}
    softcot = settings.but(generator="assistant", assistant_width=256, **only)
    softcot = ThoughtModel.build(base, None, softcot.model_dump(mode="json")).train()
    print(f"{'work':<48}{'ratio':>8}{'floor s':>10}")
    for name, result in (
        ("LTA training step", training(lta, "lta", rounds)),
        ("SoftCoT training step, assistant states cached", training(softcot, "softcot", rounds)),
        ("10 answers to one question", evaluation(lta, 1, rounds)),
        ("10 answers to each of four questions", evaluation(lta, 4, rounds)),
    ):
        print(f"{name:<48}{result[0]:>8.2f}{result[1]:>10.3f}")


if __name__ == "__main__":
    main()
