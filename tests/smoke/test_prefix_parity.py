"""LTA-Thinker's block, losses and gradients and SoftCoT's forward against the numbers of the official code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab.latent.distill import plan_cross_entropy
from lab.latent.loop import Budget, rollout
from lab.latent.plan import IGNORE, Row, collate
from lab.latent.policy import Policy
from lab.latent.prefix import inject, read_with_thoughts
from lab.methods.lta.generators import AssistantGenerator, BlockGenerator
from lab.methods.lta.losses import alignment, answer_vector, focus
from lab.models.decoder import decoder_for

FIXTURES = Path(__file__).parents[1] / "fixtures"


def backbone(folder, name, state, prefix):
    from transformers import AutoConfig, AutoModelForCausalLM

    values = json.loads((FIXTURES / folder / f"{name}_config.json").read_text())
    config = AutoConfig.for_model(**{key: value for key, value in values.items() if key not in ("transformers_version", "torch_dtype")})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if config.tie_word_embeddings:
        own["lm_head.weight"] = own["model.embed_tokens.weight"]
    result = model.load_state_dict(own)
    assert not result.missing_keys
    return model


def rows_of(data, prefix, batch):
    rows = []
    for ids, mask, labels, index in zip(*(data[f"{prefix}.{key}"] for key in batch), strict=True):
        length, (a, b) = int(mask.sum()), index[:2].tolist()
        ids, labels = ids[:length].tolist(), labels[:length].tolist()
        assert all(label == IGNORE for label in labels[: b + 1])
        rows.append(Row(tuple(ids[:a]), tuple(ids[b:]), (*[IGNORE] * a, *labels[b:]), thoughts=b - a))
    return rows


BATCH = ("input_ids", "attention_mask", "labels", "thought_index")


@pytest.fixture(scope="module")
def block():
    state = load_file(FIXTURES / "lta" / "model_block.safetensors")
    generator = BlockGenerator(32, 64)
    own = {key.replace("TransformerBlock", "block"): value for key, value in state.items() if not key.startswith("base_model")}
    generator.load_state_dict(own)
    return decoder_for(backbone("lta", "base", state, "base_model.")), generator, load_file(FIXTURES / "lta" / "forward_block.safetensors")


def test_the_block_and_its_rows(block):
    _, generator, data = block
    valid = data["in.assistant_attention_mask"].bool()
    whole = generator.block(data["block.in"], valid)
    torch.testing.assert_close(whole[valid], data["block.out"][valid], atol=1e-5, rtol=1e-4)
    at = torch.tensor([[3, 7], [0, 5], [9, 2]])
    torch.testing.assert_close(generator.block(data["block.in"], valid, at), whole.gather(1, at[..., None].expand(-1, -1, 32)))


def losses(block):
    decoder, generator, data = block
    ids, valid = data["in.assistant_input_ids"], data["in.assistant_attention_mask"].bool()
    index, thought = data["in.q_and_step_index_list"], data["in.thought_index"]
    spots = torch.stack([torch.arange(c, d) for c, d in thought[:, 2:].tolist()])
    made = generator(decoder.embed(ids), valid, torch.cat((index, spots), 1))
    anchor, steps, thoughts = made[:, 0], made[:, 1 : index.shape[1]], made[:, index.shape[1] :]
    plan = collate(rows_of(data, "in", BATCH))
    run = read_with_thoughts(decoder, plan, thoughts)
    answer = answer_vector(decoder.embed(data["in.ans_ids"]), data["in.ans_ids"] != 256)
    return {
        "sft": plan_cross_entropy(decoder, plan, run),
        "con": focus(anchor, steps, index[:, 1:] != 0, answer),
        "kl": alignment(anchor, thoughts),
    }


def test_losses_and_gradients_of_the_block_mode(block):
    _, generator, data = block
    parts = losses(block)
    for name, value in parts.items():
        assert float(value.detach()) == pytest.approx(float(data[f"train.{name}"]), rel=1e-5), name
    total = 0.33 * sum(parts.values())
    assert float(total.detach()) == pytest.approx(float(data["train.total"]), rel=1e-5)
    generator.zero_grad()
    total.backward()
    for name, parameter in generator.named_parameters():
        torch.testing.assert_close(parameter.grad, data[f"grad.{name.replace('block.', 'TransformerBlock.')}"], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("part", "weights"), [("sft", "100"), ("kl", "001")])
def test_each_loss_alone(block, part, weights):
    _, generator, data = block
    generator.zero_grad()
    value = losses(block)[part]
    value.backward()
    assert float(value.detach()) == pytest.approx(float(data[f"w{weights}.loss"]), rel=1e-5)
    torch.testing.assert_close(generator.projection.weight.grad, data[f"w{weights}.grad.projection.weight"], atol=1e-4, rtol=1e-3)


def test_the_published_focus_loss_is_dead_where_step_ends_share_an_id(block):
    decoder, generator, data = block
    equal = load_file(FIXTURES / "lta" / "focus_equal_ids.safetensors")
    index, valid = data["in.q_and_step_index_list"], data["in.assistant_attention_mask"].bool()
    made = generator(decoder.embed(equal["assistant_input_ids"]), valid, index)
    answer = answer_vector(decoder.embed(data["in.ans_ids"]), data["in.ans_ids"] != 256)
    generator.zero_grad()
    value = focus(made[:, 0], made[:, 1:], index[:, 1:] != 0, answer)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(equal["focus"]), rel=1e-5)
    assert max(float(p.grad.abs().max()) for p in generator.parameters() if p.grad is not None) < 1e-6


def test_rows_without_steps(block):
    anchor, steps, answer = torch.randn(2, 8), torch.randn(2, 3, 8), torch.randn(2, 8)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    with_step = focus(anchor[:1], steps[:1], valid[:1], answer[:1])
    want = (with_step + torch.tensor(3.0).log()) / 2
    torch.testing.assert_close(focus(anchor, steps, valid, answer), want)
    assert float(focus(anchor, steps, valid & False, answer)) == 0.0
    one = torch.tensor([[True, False, False]])
    assert float(focus(anchor[:1], steps[:1], one, answer[:1])) == pytest.approx(0.0, abs=1e-6)


@pytest.fixture(scope="module")
def softcot():
    state = load_file(FIXTURES / "softcot" / "model_softcot.safetensors")
    generator = AssistantGenerator(24, 32)
    generator.load_state_dict({key: value for key, value in state.items() if key.startswith("projection")})
    assistant = decoder_for(backbone("softcot", "asst", state, "assistant_model."))
    return (
        decoder_for(backbone("softcot", "base", state, "base_model.")),
        assistant,
        generator,
        load_file(FIXTURES / "softcot" / "forward.safetensors"),
    )


def soft_thoughts(softcot, prefix):
    _, assistant, generator, data = softcot
    ids, valid, index = (
        data[f"{prefix}.assistant_input_ids"],
        data[f"{prefix}.assistant_attention_mask"].bool(),
        data[f"{prefix}.thought_index"],
    )
    pos = (valid.cumsum(1) - 1).clamp(min=0)
    states = assistant(assistant.embed(ids), pos, assistant.grow(), valid=valid).last
    return generator(torch.stack([states[row, c:d] for row, (_, _, c, d) in enumerate(index.tolist())]))


def test_softcot_loss_gradient_and_generation(softcot):
    decoder, _, generator, data = softcot
    thoughts, index = soft_thoughts(softcot, "in2"), data["in2.thought_index"]
    spots = torch.stack([data["softcot.inputs_embeds"][row, a:b] for row, (a, b, _, _) in enumerate(index.tolist())])
    torch.testing.assert_close(thoughts, spots, atol=1e-5, rtol=1e-4)
    plan = collate(rows_of(data, "in2", BATCH))
    value = plan_cross_entropy(decoder, plan, read_with_thoughts(decoder, plan, thoughts))
    assert float(value.detach()) == pytest.approx(float(data["softcot.loss"]), rel=1e-5)
    generator.zero_grad()
    value.backward()
    for name, parameter in generator.named_parameters():
        torch.testing.assert_close(parameter.grad, data[f"softcot.grad.{name}"], atol=1e-4, rtol=1e-3)
    before = [ids[:a].tolist() for ids, (a, *_) in zip(data["in2.input_ids"], index.tolist(), strict=True)]
    after = [
        ids[b : int(mask.sum())].tolist()
        for ids, mask, (_, b, *_) in zip(data["in2.input_ids"], data["in2.attention_mask"], index.tolist(), strict=True)
    ]
    with torch.no_grad():
        result = rollout(decoder, Policy(decoder, (260,)), inject(decoder, before, thoughts, after), budget=Budget(answer=12))
    for mine, row in zip(result.answers(), data["softcot.greedy"].tolist(), strict=True):
        assert mine == (row[: row.index(260)] if 260 in row else row)


def test_a_batch_padded_on_the_left_equals_its_rows(block):
    decoder, generator, data = block
    rows = rows_of(data, "in", BATCH)
    thoughts = torch.randn(3, 3, 32, generator=torch.Generator().manual_seed(0))
    before, after = [list(row.prompt) for row in rows], [list(row.after)[:2] for row in rows]
    together = rollout(decoder, Policy(decoder, (258,)), inject(decoder, before, thoughts, after), 2, budget=Budget(answer=8))
    for index in range(3):
        alone = inject(decoder, before[index : index + 1], thoughts[index : index + 1], after[index : index + 1])
        assert rollout(decoder, Policy(decoder, (258,)), alone, budget=Budget(answer=8)).answers()[0] == together.answers()[2 * index]
