"""The engine on a CUDA device: the same results as on the processor, in float32 and bfloat16. Skipped where there is none."""

import pytest
import torch

from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.policy import Counted
from lab.latent.sampling import Sampling
from lab.models.backbones import load_backbone
from lab.models.decoder import decoder_for

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14], [3] * 9]


def run(model, n=8, **options):
    decoder = decoder_for(model)
    device = decoder.table.weight.device
    row = torch.arange(len(PROMPTS) * n, device=device)
    policy = Counted(decoder, (1,), count=4, closing=(50,), sampling=Sampling(temperature=1.0, top_k=20))
    prompt, draws = Prompt.of_ids(decoder, PROMPTS), Keyed.of(7, row // n, row % n)
    return rollout(decoder, policy, prompt, n, draws, budget=Budget(thoughts=4, answer=12), **options)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
def test_thoughts_and_answers_equal_those_of_the_processor(arch):
    model = load_backbone(f"toy:{arch}", vocab_size=97)
    want, got = run(model), run(model.cuda())
    torch.testing.assert_close(got.thoughts.cpu(), want.thoughts, atol=1e-4, rtol=1e-4)
    assert sum(a == b for a, b in zip(got.answers(), want.answers(), strict=True)) >= 0.9 * len(want.answers())


def test_draws_are_the_same_bits():
    rows = torch.arange(64)
    want = Keyed.of(3, rows, rows).uniform(rows, 5, (32,))
    got = Keyed.of(3, rows.cuda(), rows.cuda()).uniform(rows.cuda(), 5, (32,))
    assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("share", [True, False])
def test_half_precision_follows_the_models_own_forward(share):
    model = load_backbone("toy:qwen3", vocab_size=97).cuda().to(torch.bfloat16)
    decoder, ids = decoder_for(model), torch.tensor(PROMPTS[2:] * 2, device="cuda")
    with torch.no_grad():
        want = model(input_ids=ids).logits
        pos = torch.arange(ids.shape[1], device="cuda").expand_as(ids)
        got = decoder.logits(decoder(decoder.embed(ids), pos, decoder.grow()).last)
    torch.testing.assert_close(got.float(), want.float(), atol=0.1, rtol=0.05)
    assert run(model, share=share).lengths.max() > 0
