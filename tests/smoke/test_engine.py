"""The engine's promises: cached = uncached, batched = single, padded = unpadded, shared = repeated, small N inside large N."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lab.errors import DataError, SettingsError
from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.policy import Counted, Given, Policy
from lab.latent.sampling import Sampling
from lab.latent.unroll import Block, unroll
from lab.models.decoder import Decoder, decoder_for
from lab.models.hf_decoder import HFDecoder
from lab.models.lora import GatedLora

WIDE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.25,
}
GROUPED = WIDE | {"num_key_value_heads": 2, "max_position_embeddings": 600}
PROMPTS = [[5, 6, 7], [9, 10, 11, 12, 13, 14], [3] * 9, [7]]
STOPS = (1, 2, 3, 4, 5)


def backbone(name):
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3, bos_token_id=1, eos_token_id=1)
        return GPT2LMHeadModel(config).eval()
    if name == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE, bos_token_id=1, eos_token_id=1)).eval()
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config, model = kinds[name]
    return model(config(**GROUPED, **({"head_dim": 8} if name == "qwen3" else {}))).eval()


@torch.no_grad()
def test_a_sliding_window_of_all_layers_is_kept():
    model = MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4)).eval()
    decoder, ids = decoder_for(model), torch.tensor([[0, 0, 5, 6, 7, 8, 9, 10, 11, 12]])
    valid = torch.arange(10)[None] > 1
    out = decoder(decoder.embed(ids), (valid.cumsum(1) - 1).clamp(min=0), decoder.slots(1, 10), valid=valid).last
    torch.testing.assert_close(decoder.logits(out)[0, 2:], model(ids[:, 2:]).logits[0], atol=1e-4, rtol=1e-4)


@pytest.fixture(params=["gpt2", "llama", "qwen2", "qwen3", "neox"])
def model(request):
    return backbone(request.param)


def padded(model):
    ids = torch.randint(0, 97, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 11, dtype=torch.long)
    mask[1, :4], mask[2, :1] = 0, 0
    pos = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, position_ids=pos).logits
    return ids, mask.bool(), pos, want


def test_one_call_and_step_by_step_equal_the_models_own_forward(model):
    ids, mask, pos, want = padded(model)
    decoder = decoder_for(model)
    with torch.no_grad():
        whole = decoder.logits(decoder(decoder.embed(ids), pos, decoder.grow(), valid=mask).last)
        kv = decoder.slots(3, 4)
        decoder(decoder.embed(ids[:, :7]), pos[:, :7], kv, valid=mask[:, :7])
        steps = [decoder.logits(decoder(decoder.embed(ids[:, t : t + 1]), pos[:, t : t + 1], kv).last) for t in range(7, 11)]
    torch.testing.assert_close(whole[mask], want[mask], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.cat(steps, 1), want[:, 7:], atol=1e-4, rtol=1e-4)


def test_the_last_column_alone_is_the_last_of_all_and_leaves_the_same_cache(model):
    decoder, prompt = decoder_for(model), Prompt.of_ids(decoder_for(model), PROMPTS)
    ends = []
    with torch.no_grad():
        for tail in (False, True):
            kv = decoder.slots(*prompt.pos.shape)
            read = decoder(prompt.x, prompt.pos, kv, valid=prompt.valid, tail=tail).last
            assert read.shape[1] == (1 if tail else prompt.x.shape[1])
            first = read[:, -1:]
            ends.append(torch.cat((first, decoder(first, prompt.pos[:, -1:] + 1, kv).last), 1))
    torch.testing.assert_close(*ends, atol=1e-5, rtol=1e-5)


def test_taps_are_the_models_hidden_states(model):
    ids = torch.randint(0, 97, (2, 6))
    decoder = decoder_for(model)
    with torch.no_grad():
        want = model(input_ids=ids, output_hidden_states=True).hidden_states
        taps = decoder(decoder.embed(ids), torch.arange(6).expand(2, 6), decoder.grow(), taps=(0, 2, 3)).taps
    for layer in (0, 2, 3):
        torch.testing.assert_close(taps[layer], want[layer], atol=1e-4, rtol=1e-4)


def test_other_architectures_fall_back_and_refuse_what_they_cannot_do():
    model = backbone("neox")
    assert isinstance(decoder_for(model), HFDecoder) and isinstance(decoder_for(backbone("qwen3")), Decoder)
    with pytest.raises(SettingsError, match="gpt_neox"):
        decoder_for(model, lora=object())


def test_a_row_gate_equals_the_adapter_switched_on_and_off():
    model = backbone("qwen3")
    lora = GatedLora(model.config, rank=4, alpha=8)
    for adapter in lora.modules():
        if hasattr(adapter, "B"):
            torch.nn.init.normal_(adapter.B, std=0.2)
    decoder, x, pos = Decoder(model, lora), torch.randn(2, 5, 32), torch.arange(5).expand(2, 5)
    with torch.no_grad():
        off, on = (decoder(x, pos, decoder.grow(), lora_gate=gate).last for gate in (False, True))
        mixed = decoder(x, pos, decoder.grow(), lora_gate=torch.tensor([[[0.0]], [[1.0]]])).last
    torch.testing.assert_close(mixed, torch.stack((off[0], on[1])))
    assert (on - off).abs().max() > 0.1


def sample(model, prompts, n, numbers=None, **options):
    decoder = decoder_for(model)
    policy = Counted(decoder, STOPS, count=4, closing=(50, 51), sampling=Sampling(temperature=1.0, top_k=20))
    row = torch.arange(len(prompts) * n)
    question = torch.tensor(numbers or range(len(prompts)))[row // n]
    draws = Keyed.of(7, question, row % n)
    return rollout(decoder, policy, Prompt.of_ids(decoder, prompts), n, draws, budget=Budget(thoughts=6, answer=12), **options)


def test_samples_do_not_depend_on_batch_sharing_or_compaction(model):
    together = sample(model, PROMPTS, 8, share=True)
    apart = sample(model, PROMPTS, 8, share=False, compact=2.0)
    alone = sample(model, PROMPTS[2:3], 3, numbers=[2])
    assert together.answers() == apart.answers()
    assert alone.answers() == together.answers()[16:19]
    torch.testing.assert_close(together.thoughts, apart.thoughts, atol=1e-4, rtol=1e-4)
    assert together.row_steps < apart.row_steps and together.lengths.unique().numel() > 3


def uncached(model, prompt, count):
    x = model.get_input_embeddings()(torch.tensor([prompt]))
    with torch.no_grad():
        for _ in range(count):
            x = torch.cat((x, model(inputs_embeds=x, output_hidden_states=True).hidden_states[-1][:, -1:]), 1)
        for token in (50, 51):
            x = torch.cat((x, model.get_input_embeddings()(torch.tensor([[token]]))), 1)
        out = []
        while len(out) < 12:
            token = int(model(inputs_embeds=x).logits[0, -1].argmax())
            if token in STOPS:
                break
            out.append(token)
            x = torch.cat((x, model.get_input_embeddings()(torch.tensor([[token]]))), 1)
    return out


def test_rows_with_different_numbers_of_thoughts_equal_an_uncached_loop(model):
    counts = [4, 0, 2, 1]
    decoder = decoder_for(model)
    policy = Counted(decoder, STOPS, count=torch.tensor(counts), closing=(50, 51))
    result = rollout(decoder, policy, Prompt.of_ids(decoder, PROMPTS), budget=Budget(thoughts=6, answer=12))
    assert result.answers() == [uncached(model, prompt, count) for prompt, count in zip(PROMPTS, counts, strict=True)]
    assert result.counts.tolist() == counts and not result.capped.any()


def test_a_row_at_its_cap_is_closed_and_marked():
    decoder = decoder_for(backbone("gpt2"))
    result = rollout(
        decoder, Counted(decoder, STOPS, count=9, closing=(50,)), Prompt.of_ids(decoder, PROMPTS), budget=Budget(thoughts=3, answer=2)
    )
    assert result.counts.tolist() == [3] * 4 and result.capped.all()
    assert (result.lengths <= 2).all()


def test_given_thoughts_continue_where_another_run_stood(model):
    whole = sample(model, PROMPTS, 1)
    decoder = decoder_for(model)
    policy = Given(Counted(decoder, STOPS, count=4, closing=(50, 51)), whole.thoughts[:, :2])
    again = rollout(decoder, policy, Prompt.of_ids(decoder, PROMPTS), budget=Budget(thoughts=6, answer=12))
    torch.testing.assert_close(again.thoughts, whole.thoughts, atol=1e-4, rtol=1e-4)


def test_plain_policy_equals_generate():
    model = backbone("qwen3")
    decoder = decoder_for(model)
    result = rollout(decoder, Policy(decoder, (1,)), Prompt.of_ids(decoder, [PROMPTS[1]]), budget=Budget(answer=10))
    ids = torch.tensor([PROMPTS[1]])
    want = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, eos_token_id=1, pad_token_id=0)
    assert result.answers()[0] == [token for token in want[0, ids.shape[1] :].tolist() if token != 1]


def test_an_empty_prompt_is_refused():
    decoder = decoder_for(backbone("gpt2"))
    with pytest.raises(DataError, match="without a single token"):
        Prompt.of_ids(decoder, [[1, 2], []])


def unrolled(decoder, prompts, counts, tails):
    prompt = Prompt.of_ids(decoder, prompts)
    width = max(map(len, tails))
    ids = torch.tensor([tail + [0] * (width - len(tail)) for tail in tails])
    valid = torch.tensor([[True] * len(tail) + [False] * (width - len(tail)) for tail in tails])
    after = Block(decoder.embed(ids), valid)
    return unroll(decoder, Block(prompt.x, prompt.valid), torch.tensor(counts), after, lambda h, step: h.tanh(), taps=(1, 3)), valid


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "neox"])
def test_a_ragged_training_pass_equals_its_rows_alone_with_gradient(name):
    model = backbone(name)
    decoder = decoder_for(model)
    counts, tails = [2, 0, 3], [[50, 4, 5], [50], [50, 9]]
    together, valid = unrolled(decoder, PROMPTS[:3], counts, tails)
    together.after[valid].pow(2).sum().backward()
    grad, apart = model.get_input_embeddings().weight.grad.clone(), 0.0
    model.zero_grad()
    for row in range(3):
        alone, _ = unrolled(decoder, PROMPTS[row : row + 1], counts[row : row + 1], tails[row : row + 1])
        torch.testing.assert_close(together.after[row, : len(tails[row])], alone.after[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(together.last_state()[row], alone.last_state()[0], atol=1e-4, rtol=1e-4)
        apart = apart + alone.after.pow(2).sum()
    apart.backward()
    torch.testing.assert_close(grad, model.get_input_embeddings().weight.grad, atol=1e-3, rtol=1e-3)


def test_training_goes_on_with_what_a_rollout_made(model):
    """Rollouts run in inference mode: neither the thoughts they return nor the tables they leave behind may be unfit for a graph."""
    decoder = decoder_for(model)
    done = rollout(decoder, Counted(decoder, STOPS, count=2), Prompt.of_ids(decoder, PROMPTS), 2, budget=Budget(answer=3))
    assert not any(value.is_inference() for value in (done.thoughts, done.tokens, done.counts, done.capped))
    weight = torch.ones_like(done.thoughts, requires_grad=True)
    pos = torch.arange(2).expand(len(done.thoughts), 2)
    decoder(done.thoughts * weight, pos, decoder.grow()).last.pow(2).sum().backward()
    assert weight.grad.abs().sum() > 0
