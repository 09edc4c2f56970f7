"""Sharing a prompt among samples must not depend on how tensors happen to be laid out: grouped heads, one and several prompts."""

import pytest
import torch

from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.policy import Policy
from lab.models.backbones import load_backbone
from lab.models.decoder import decoder_for


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("questions", [1, 3])
def test_shared_equals_repeated(heads, questions):
    sizes = {"heads": heads[0], "kv_heads": heads[1], "head_dim": 16, "hidden": 48, "layers": 2, "initializer_range": 0.3}
    decoder = decoder_for(load_backbone("toy:qwen3", vocab_size=60, **sizes))
    x = torch.randn(questions, 40, 48, generator=torch.Generator().manual_seed(0))
    shared, repeated = (
        rollout(decoder, Policy(decoder, (1,)), Prompt(x), 5, budget=Budget(answer=6), share=share) for share in (True, False)
    )
    assert shared.answers() == repeated.answers()
