"""CoLaR against the numbers of the official code: grouping, embeddings, losses, latent rollout, log-probabilities, GRPO losses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from lab.latent.draws import Recorded, Stream
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.sampling import Sampling
from lab.methods.colar.config import ColarSettings
from lab.methods.colar.data import ColarRow, collate, question_text, speed_text
from lab.methods.colar.model import ColarModel, ColarParts
from lab.methods.colar.objective import Experience, advantages, embed, log_probs, loss
from lab.methods.colar.policy import ColarPolicy
from lab.methods.colar.trainer import parts

FOLDER = Path(__file__).parents[1] / "fixtures" / "colar"
META = json.loads((FOLDER / "meta.json").read_text())
SEP, EOS, PAD, NEWLINE = 1, 0, 98, 97


def merged_state():
    """The base weights with the adapters added."""
    base, trained = load_file(FOLDER / "frozen_base_state.safetensors"), load_file(FOLDER / "trainable_state.safetensors")
    state = {}
    for key, value in base.items():
        name = key.removeprefix("llm.base_model.model.").replace(".base_layer", "")
        a = trained.get(key.replace("base_layer", "lora_A.default"))
        if "base_layer" in key:
            value = value + META["lora_scaling"]["default"] * trained[key.replace("base_layer", "lora_B.default")] @ a
        state[name] = value
    return state


def model(**settings):
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    backbone = LlamaForCausalLM(config).eval()
    state = merged_state()
    result = backbone.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    assert not result.missing_keys
    s = ColarSettings.check(
        lp_intermediate_size=48, embeds_std=0.018, lora_r=0, sep_id=SEP, pad_id=PAD, eos_id=EOS, official_padding=True, **settings
    )
    parts = ColarParts(32, s)
    state = load_file(FOLDER / "trainable_state.safetensors")
    parts.load_state_dict({key.replace("latent_policy", "head"): value for key, value in state.items() if key.startswith("latent_policy")})
    return ColarModel(backbone, None, s, parts).eval()


def ids(text):
    out = []
    while text:
        special = {"###": SEP, "<eos>": EOS}
        hit = next((mark for mark in special if text.startswith(mark)), None)
        out.append(special[hit] if hit else NEWLINE if text[0] == "\n" else ord(text[0]) - 30)
        text = text[len(hit) if hit else 1 :]
    return tuple(out)


def rows():
    raw = json.loads((FOLDER / "batch.json").read_text())
    return [
        ColarRow({str(r): ids(question_text(q) + speed_text(r)) for r in (1, 2, 3, 5)}, ids("###" + steps), ids(f"###Answer:{answer}<eos>"))
        for q, steps, answer in zip(raw["question"], raw["steps"], raw["answer"], strict=True)
    ]


def batch_of(m, r, data, key):
    made = collate(rows(), r, m.config, torch.Generator().manual_seed(0))
    made.labels = data[f"{key}.labels"]
    return made


@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("pooling", ["sqrt", "mean"])
def test_embeddings_masks_and_losses(r, pooling):
    data, m = load_file(FOLDER / "sft.safetensors"), model(sqrt_mean=pooling == "sqrt")
    key = f"r{r}.mse.{pooling}"
    batch = batch_of(m, r, data, key)
    assert torch.equal(batch.valid.long(), data[f"{key}.attention_mask"])
    valid = batch.valid
    torch.testing.assert_close(embed(m, batch)[valid], data[f"{key}.inputs_embeds"][valid], atol=1e-6, rtol=0)
    for kind in ("mse", "nll") if f"r{r}.nll.{pooling}" in META["losses"] else ("mse",):
        m.settings = m.config.but(latent_loss=kind).model_dump(mode="json")
        want = META["losses"][f"r{r}.{kind}.{pooling}"]
        with torch.no_grad():
            got, parts = loss(m, batch, data[f"{key}.eps"])
        assert float(parts["ce"]) == pytest.approx(want["ce_loss"], rel=1e-5)
        assert float(parts["latent"]) == pytest.approx(want["embed_modeling_loss"], rel=2e-5)
        assert float(got) == pytest.approx(want["total_loss"], rel=2e-5)


def test_the_labels_of_groups_are_their_own_tokens_and_the_fix_leaves_no_empty_last_group():
    s, examples = model().config, rows()
    for r in (2, 3, 5):
        fixed = collate(examples, r, s.but(official_padding=False), torch.Generator().manual_seed(1))
        official = collate(examples, r, s, torch.Generator().manual_seed(1))
        steps = fixed.labels[:, fixed.steps]
        own = (fixed.groups == steps[..., None]) & fixed.groups_mask
        assert own.any(-1)[fixed.groups_mask.any(-1)].all()
        assert fixed.groups_mask.any(-1)[:, -1].all()
        assert [m.sum().item() for m in fixed.groups_mask] == [m.sum().item() for m in official.groups_mask]
        first = fixed.groups_mask.any(-1).float().argmax(1)
        assert (fixed.groups_mask[torch.arange(4), first].sum(-1) == 1).all(), "the separator is a group of its own"


def rl():
    data, m = load_file(FOLDER / "rl_generation.safetensors"), model(latent_loss="nll")
    with torch.no_grad():
        table = m.backbone.get_input_embeddings().weight
        table[0], table[1] = data["embed_row_0_override"], data["embed_row_1_override"]
    return data, m


def test_the_latent_rollout_with_recorded_draws():
    data, m = rl()
    prompts = [row[mask.bool()].tolist() for row, mask in zip(data["question_input_ids"], data["question_attention_mask"], strict=True)]
    policy = ColarPolicy(m, Sampling(), latent_temperature=1.0, end_temperature=0.0)
    draws = Recorded({Stream.THOUGHT: data["eps"][:, :, 0].transpose(0, 1)})
    result = rollout(m.decoder, policy, Prompt.of_ids(m.decoder, prompts), 1, draws, budget=Budget(thoughts=8, answer=10))
    assert result.counts.tolist() == data["n_latent_forward"][:, 0].tolist()
    mask = data["latent_attention_mask"].bool()
    torch.testing.assert_close(
        result.thoughts[mask[:, : result.thoughts.shape[1]]], data["latent_inputs_embeds"][mask], atol=5e-5, rtol=1e-4
    )
    for mine, row in zip(result.answers(), data["pred_ids"].tolist(), strict=True):
        want = [token for token in row if token != PAD]
        assert mine == (want[: want.index(EOS)] if EOS in want else want)


def test_generate_takes_recorded_draws_whatever_the_batches():
    data, m = rl()
    prompts = [row[mask.bool()].tolist() for row, mask in zip(data["question_input_ids"], data["question_attention_mask"], strict=True)]
    draws = Recorded({Stream.THOUGHT: data["eps"][:, :, 0].transpose(0, 1)})
    how = {"sampling": Sampling(), "end_temperature": 0.0, "thoughts": 8, "max_new_tokens": 10}
    found = m.generate([ids[:-1] for ids in prompts], draws=draws, batch=3, **how)
    assert [row.thoughts for row in found.rows] == data["n_latent_forward"][:, 0].tolist()
    for row, ids in zip(found.rows, data["pred_ids"].tolist(), strict=True):
        want = [token for token in ids if token != PAD]
        assert row.ids == (want[: want.index(EOS)] if EOS in want else want)


def experience(data):
    answer = data["answer_input_ids"]
    return Experience(
        data["question_input_ids"],
        data["question_attention_mask"].bool(),
        data["latent_inputs_embeds"],
        data["latent_attention_mask"].bool(),
        answer,
        answer != PAD,
    )


def test_log_probabilities_and_grpo_losses():
    data, m = rl()
    seen = experience(data)
    with torch.no_grad():
        latent, answer = log_probs(m, seen)
    torch.testing.assert_close(latent[seen.thoughts_mask], data["latent_logprobs"][seen.thoughts_mask], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(answer[seen.answer_mask], data["answer_logprobs"][seen.answer_mask], atol=1e-4, rtol=0)
    rows = [torch.cat((a[m], b[n])) for a, m, b, n in zip(latent, seen.thoughts_mask, answer, seen.answer_mask, strict=True)]
    old = zip(data["old_latent_logprobs"], seen.thoughts_mask, data["old_answer_logprobs"], seen.answer_mask, strict=True)
    old = [torch.cat((a[m], b[n])) for a, m, b, n in old]
    new, old = (torch.nn.utils.rnn.pad_sequence(side, batch_first=True) for side in (rows, old))
    mask = torch.arange(new.shape[1]) < torch.tensor([[len(row)] for row in rows])
    ratio = (new - old).exp()
    for average, weight in ((True, parts(mask, seen.thoughts_mask.sum(1)) / mask.sum(1, keepdim=True)), (False, 1 / 32)):
        gain = torch.minimum(ratio * data["adv_punished"], ratio.clamp(0.8, 1.2) * data["adv_punished"])
        want = META[f"grpo_loss_average_{average}"]["total_loss"]
        assert -float((gain * weight * mask).sum(1).mean()) == pytest.approx(want, rel=1e-3)


def test_advantages_are_those_of_the_groups():
    data, _ = rl()
    for name in ("", "_punished"):
        torch.testing.assert_close(advantages(data[f"rewards{name}"][:, 0], 4), data[f"adv{name}"], atol=1e-5, rtol=1e-5)


def test_a_padded_row_costs_what_it_costs_alone():
    m = model(pred_embed_forward_weight=0.1)
    m.settings = m.config.but(official_padding=False).model_dump(mode="json")
    for r in (1, 2, 3, 5):
        together = collate(rows(), r, m.config, torch.Generator().manual_seed(0))
        eps = torch.randn(4, together.groups.shape[1], 32)
        _, parts = loss(m, together, eps)
        ce, second, latent, tokens, groups = 0.0, 0.0, 0.0, 0, 0
        for index in range(4):
            alone = collate(rows()[index : index + 1], r, m.config, torch.Generator().manual_seed(0))
            mask, own = together.groups_mask[index].any(-1), alone.groups_mask[0].any(-1)
            alone.labels[0, alone.steps][own] = together.labels[index, together.steps][mask]
            _, single = loss(m, alone, eps[index, -alone.groups.shape[1] :][None])
            n, k = int((alone.labels != -100).sum()), int(own.sum())
            ce, second, latent = ce + n * single["ce"], second + n * single["forward"], latent + k * single["latent"]
            tokens, groups = tokens + n, groups + k
        torch.testing.assert_close(parts["ce"], ce / tokens, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(parts["forward"], second / tokens, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(parts["latent"], latent / groups, rtol=1e-4, atol=1e-6)
