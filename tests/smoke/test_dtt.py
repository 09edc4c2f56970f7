"""Gated models: the update repeats the rollout, batches change nothing, LoRA with token rows, files round-trip, bad input is answered."""

import copy
import json

import pytest
import torch

import lab
from lab.data.examples import Example
from lab.errors import DataError, SettingsError, TrainingError
from lab.latent.draws import Keyed
from lab.latent.plan import left, right
from lab.latent.sampling import Sampling
from lab.methods.dtt.checkpoint import export_adapter
from lab.methods.dtt.config import BOT, EOT, GatedSettings, LoraSettings
from lab.methods.dtt.data import collate, prepare
from lab.methods.dtt.data import inside as spans
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.objective import gate_error, hrpo_loss, read
from lab.methods.dtt.policy import Marker
from lab.methods.dtt.reinforce import GatedThinking, GateLearning, progress_table
from lab.methods.dtt.reward import RewardSettings, rewards_of
from lab.methods.dtt.stages import gate_groups
from lab.methods.dtt.tables import rollout_tables
from lab.models.backbones import load_backbone
from lab.models.tokenizers import byte_tokenizer, word_tokenizer
from lab.rl import RLSettings, reinforce
from lab.training.acts import Completions, gap
from lab.training.optim import parameter_groups

WORDS = ["Q", *(f"w{i}" for i in range(20)), "####"]
PROMPTS = [[1, 2, 3, 4], [5, 6], [7, 8, 9]]
ARCHS = ["gpt2", "llama", "qwen3"]
GATES = [{}, {"hard": False, "temperature": 0.7}, {"noise": "gumbel"}, {"gate": "hrpo", "r_min": 0.1, "r_max": 0.5}]


def made(arch="gpt2", spread=0.3, bias=0.0, **settings):
    tokenizer = word_tokenizer(WORDS, special=(BOT, EOT))
    backbone = load_backbone(f"toy:{arch}", vocab_size=len(tokenizer), initializer_range=spread, max_positions=64)
    torch.manual_seed(0)
    return SparseGatedModel.start(backbone, tokenizer, GatedSettings(bias=bias, **settings)).eval()


def keys(q, n, seed=0):
    return Keyed.of(seed, torch.arange(q).repeat_interleave(n), torch.arange(n).repeat(q))


def completions(prompts, acts):
    given, said = left([p for p in prompts for _ in range(len(acts.ids) // len(prompts))]), right(acts.ids)
    masks = [torch.ones_like(side.ids) if side.valid is None else side.valid.long() for side in (given, said)]
    return Completions(given.ids, masks[0], said.ids, masks[1], acts.record)


def acted(model, samples=4, longest=10, temperature=1.0, **how):
    thinking = GatedThinking(model, GateLearning(**how))
    acts = thinking.act(PROMPTS, samples, keys(len(PROMPTS), samples), temperature=temperature, longest=longest)
    batch = completions(PROMPTS, acts)
    told = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in acts.logprobs], batch_first=True)
    return thinking, acts, batch, told


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "settings", [{}, {"hard": False, "temperature": 0.7}, {"noise": "gumbel"}, {"gate": "hrpo", "r_min": 0.1, "r_max": 0.5}]
)
def test_the_update_repeats_the_rollout_and_plain_embeddings_do_not(arch, settings):
    model = made(arch, **settings)
    thinking, _, batch, told = acted(model)
    logps, entropy = thinking.log_probs(batch, 1.0)
    assert gap(logps, told, batch.mask) <= 1e-4
    plain = Completions(
        batch.prompt, batch.prompt_mask, batch.ids, batch.mask, batch.record | {"open": torch.zeros_like(batch.record["open"])}
    )
    assert gap(thinking.log_probs(plain, 1.0)[0], told, batch.mask) > 0.1
    assert (entropy[batch.mask.bool()] > 0).all()
    logps.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.gate.parameters())


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_gradient_through_time_is_the_slope_of_the_same_values(arch):
    """With soft gates and fixed noise, log-probabilities are a smooth function of the gate's bias."""
    model = made(arch, spread=0.1, hard=False)
    given, _, batch, told = acted(model)
    through = GatedThinking(model, GateLearning(recompute="bptt"))
    assert gap(through.log_probs(batch, 1.0)[0], told, batch.mask) <= 1e-4
    bias, slopes = model.gate.gate_linear.bias, []
    for thinking in (through, given):
        slopes.append(torch.autograd.grad(thinking.log_probs(batch, 1.0)[0].sum(), bias)[0].item())
    values = []
    for step in (-1e-2, 1e-2):
        with torch.no_grad():
            bias += step
            values.append(through.log_probs(batch, 1.0)[0].double().sum().item())
            bias -= step
    assert slopes[0] == pytest.approx((values[1] - values[0]) / 2e-2, rel=5e-3)
    assert slopes[1] != pytest.approx(slopes[0], rel=0.1)  # the parallel pass leaves the part through time out
    with pytest.raises(SettingsError, match="HRPO"):
        GatedThinking(made(gate="hrpo"), GateLearning(recompute="bptt"))


def test_hard_gates_with_a_credit_of_their_own_repeat_too():
    thinking, _, batch, told = acted(made(), credit="policy")
    assert gap(thinking.log_probs(batch, 1.0)[0], told, batch.mask) <= 1e-4
    with pytest.raises(SettingsError, match="hard gates"):
        GatedThinking(made(hard=False), GateLearning(credit="policy"))


def test_rows_do_not_depend_on_their_batch_and_gates_are_the_drawn_ones():
    model = made()
    together = model.generate(PROMPTS, 3, sampling=Sampling(temperature=1.0), max_new_tokens=8, drawn=True)
    alone = [
        model.generate([p], 3, sampling=Sampling(temperature=1.0), max_new_tokens=8, drawn=True, first=i) for i, p in enumerate(PROMPTS)
    ]
    assert [row.ids for row in together.rows] == [row.ids for one in alone for row in one.rows]
    gates = together.trace().tokens.query("role != 'prompt'").gate
    assert set(gates.unique()) == {0.0, 1.0}


def test_the_gate_term_counts_eot_as_reasoning_and_leaves_the_last_token_out():
    model = made()
    s = model.config
    rows = [(1, s.bot_id, 2, s.eot_id, 3, s.eos_id), (4, 5, s.eos_id)]
    inside = spans(rows, 6, s)
    assert inside.tolist() == [[False, False, True, True, False, False], [False] * 6]
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    closed = gate_error(torch.zeros(2, 5), inside, mask)
    torch.testing.assert_close(closed, torch.tensor([2 / 5, 0.0]))
    torch.testing.assert_close(gate_error(torch.ones(2, 5), inside, mask), torch.tensor([3 / 5, 1.0]))


# ---- adapters and files ----


def test_lora_trains_the_special_rows_in_table_and_head_and_round_trips(tmp_path):
    model = made()
    with torch.no_grad():
        before = model.decoder.logits(read(model, batch_of(model))).clone()
    model.add_lora(LoraSettings(rank=2, dropout=0.0))
    batch = batch_of(model)
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimiser.zero_grad()
        model.decoder.logits(read(model, batch)).logsumexp(-1).sum().backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        logits = model.decoder.logits(read(model, batch))
        head = model.backbone.get_output_embeddings()(read(model, batch))
        torch.testing.assert_close(head, logits)
        marks = [model.config.bot_id, model.config.eot_id]
        table = model.decoder.embed(torch.arange(logits.shape[-1]))
        torch.testing.assert_close(read(model, batch) @ table.T, logits, atol=1e-4, rtol=1e-4)  # still tied
        assert (table[marks] - made().decoder.embed(torch.tensor(marks))).abs().mean() > 1e-2
        with model.adapters_off():
            torch.testing.assert_close(model.decoder.logits(read(model, batch)), before)
        whole, adapter = lab.load(model.save(tmp_path / "whole")), tmp_path / "adapter"
        export_adapter(model, adapter)
        base = made()
        base.backbone.save_pretrained(tmp_path / "base")
        again = lab.load(adapter, backbone=str(tmp_path / "base"), noise="logistic")
        for other in (whole, again):
            torch.testing.assert_close(other.decoder.logits(read(other, batch)), logits, atol=1e-5, rtol=1e-5)
            assert other.config.bot_id == model.config.bot_id
            for name, value in model.gate.state_dict().items():
                torch.testing.assert_close(other.gate.state_dict()[name], value)


def test_trl_fused_head_sees_the_gate_and_the_trained_rows():
    from trl.trainer.utils import add_fused_lm_head

    model = made()
    model.add_lora(LoraSettings(rank=2, dropout=0.0))
    _, _, batch, _ = acted(model)
    ids, mask = torch.cat((batch.prompt, batch.ids), 1), torch.cat((batch.prompt_mask, batch.mask), 1)
    wide, record = batch.prompt.shape[1], batch.record

    def padded(value):
        return torch.cat((value.new_zeros(len(value), wide, *value.shape[2:]), value), 1)

    gated = {"prev_hidden": padded(record["state"]), "gate_noise": padded(record["noise"]) + 1e-6, "gate_mask": padded(record["open"])}
    gated["gate_noise"][:, wide:] = record["noise"]
    add_fused_lm_head(model.backbone.get_base_model())
    with torch.no_grad():
        pos = (mask.cumsum(1) - 1).clamp(min=0)
        told = model.backbone(input_ids=ids, attention_mask=mask, position_ids=pos, labels=ids, fused_lm_head=True, **gated).log_probs
        own = GatedThinking(model, GateLearning()).log_probs(batch, 1.0)[0]
    keep = batch.mask.bool()
    torch.testing.assert_close(told[:, wide - 1 :][keep], own[keep], atol=1e-5, rtol=1e-5)


def batch_of(model):
    rows = prepare([Example("a", "w1 w2", ("w3",), "w4"), Example("b", "w5", ("w6", "w7"), "w8")], model.tokenizer, model.config).rows
    return collate(rows, model.config)


def test_hrpo_adapters_load_and_the_folder_says_the_temperature(tmp_path):
    model = made("qwen3", gate="hrpo")
    model.backbone.save_pretrained(tmp_path / "base")
    model.add_lora(LoraSettings(rank=2, dropout=0.0))
    torch.nn.init.normal_(next(p for n, p in model.named_parameters() if "lora_B" in n))
    folder = export_adapter(model, tmp_path / "Toy-gsm8k-group4-lora32-rmin0.99-temp0.7")
    keys_there = set(lab.models.loading.tensor_shapes(folder / "adapter_model.safetensors"))
    assert "base_model.model.model.thinking_residual_Lambda.Lambda" in keys_there
    again = lab.load(folder, backbone=str(tmp_path / "base"))
    assert (again.config.gate, again.config.residual_temperature) == ("hrpo", 0.7)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids, torch.ones_like(ids)), model(ids, torch.ones_like(ids)), atol=1e-5, rtol=1e-5)


def test_the_marker_is_found_however_it_is_cut():
    tokenizer = byte_tokenizer()
    marker, run, seen = Marker(tokenizer, "cpu"), torch.zeros(1, dtype=torch.long), []
    for token in tokenizer("a##b####c").input_ids:
        found, run = marker.step(torch.tensor([token]), run)
        seen.append(bool(found))
    assert seen == [False] * 7 + [True, False]
    whole = Marker(word_tokenizer(["a", "##", "x##", "####y"]), "cpu")
    assert whole.step(torch.tensor([3]), run)[0].item()
    _, run = whole.step(torch.tensor([2]), torch.zeros(1, dtype=torch.long))
    assert whole.step(torch.tensor([1]), run)[0].item()


# ---- the trainer ----

SETTINGS = RLSettings(steps=3, prompts=2, samples=4, longest=8, lr=1e-3, save_every=1, log_every=1, device="cpu", loss_type="grpo")


def trained(folder, model=None, settings=SETTINGS, **how):
    from lab.methods.dtt.trainer import CustomGRPOTrainer

    model = model or made()
    thinking = GatedThinking(model, GateLearning(weight=0.2, **how))
    if settings.beta:
        thinking.hold_reference()
    rewards = rewards_of(model.tokenizer, model.config, RewardSettings(gate_penalty_coeff=0.2))
    columns = {"answer": ["w1", "w2", "w3"]}
    result = reinforce(model, thinking, PROMPTS, columns, rewards, settings, folder, trainer_class=CustomGRPOTrainer)
    return result, model


def test_training_logs_what_the_seed_names_and_keeps_the_gap_small(tmp_path):
    result, _ = trained(tmp_path, settings=SETTINGS.but(beta=0.01, steps=2), constant_groups="drop")
    table = progress_table(tmp_path)
    assert [row["step"] for row in table] == [1, 2] and all(row["gate/logp_gap"] <= 1e-4 for row in table)
    assert table[0]["gumbel_temp_model"] == 1.0 and table[1]["gumbel_temp_model"] == pytest.approx(0.55)
    assert all(row[name] == row[name] for row in table for name in ("reward_mean", "correctness_mean", "gate_mean_overall", "loss"))
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert {"prompt", "completion", "correctness", "token_efficiency", "gate_sparsity", "gate_inside"} <= set(examples[0])
    gates, lengths = rollout_tables(tmp_path)
    assert set(gates["span"]) <= {"inside", "outside"} and gates["tokens"].sum() > 0
    assert lengths["answers"].sum() == 0  # not one is [bot] … [eot]
    assert result.row["groups/varied"] == 0.0  # an untrained model: all are malformed, and nothing but penalties would be learned


def test_pathwise_credit_is_the_gradient_of_the_gate_term(tmp_path):
    model = made()
    thinking, _, batch, _ = acted(model)
    thinking.log_probs(batch, 1.0)
    thinking.error.mean().backward()
    assert model.gate.gate_linear.bias.grad.abs() > 1e-4
    trained_gates = {}
    for credit in ("pathwise", "none"):
        learner = made()
        trained(tmp_path / credit, learner, SETTINGS.but(steps=1, clip=0.0), credit=credit)
        trained_gates[credit] = learner.gate.gate_linear.weight.detach().clone()
    assert not torch.equal(trained_gates["pathwise"], trained_gates["none"])


# ---- bad input ----


def test_bad_input_is_answered_in_a_sentence(tmp_path):
    model = made()
    with pytest.raises(DataError, match="does not fit into the model's 64 positions"):
        model.generate([[1] * 60], max_new_tokens=10)
    with pytest.raises(DataError, match="longer than 2 tokens"):
        prepare([Example("a", "w1 w2 w3", (), "w4")], model.tokenizer, model.config, max_prompt_length=2)
    with pytest.raises(SettingsError, match="does not divide"):
        SETTINGS.but(micro_batch=3)
    with pytest.raises(SettingsError, match="reference"), GatedThinking(model, GateLearning()).reference():
        pass
    with pytest.raises(SettingsError, match="r_min"):
        GatedSettings.check(gate="hrpo", r_min=0.9, r_max=0.5)
    model.gate.gate_linear.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="gates are NaN"):
        model.generate([[1, 2]], max_new_tokens=4)


def test_a_model_without_a_gate_and_a_toy_on_real_data_are_refused(tmp_path):
    from lab.methods.dtt.stages import fresh, run_arm

    made().backbone.save_pretrained(tmp_path / "plain")
    with pytest.raises(SettingsError, match="no gated model; step warm_up"):
        run_arm("pathwise", str(tmp_path / "plain"), str(tmp_path), "permutations", {"steps": 1}, {}, {})
    with pytest.raises(SettingsError, match="name a pretrained backbone for 'gsm8k'"):
        fresh("toy:gpt2", "gsm8k", {}, 0)
    assert fresh("toy:gpt2", "permutations", {"gate": "hrpo"}, 0).tokenizer("####").input_ids


def test_reasoning_that_collapses_to_nothing_is_said_once(tmp_path, caplog, monkeypatch):
    import lab.methods.dtt.trainer as trainer
    from lab.methods.dtt.reward import Span

    monkeypatch.setattr(trainer, "find_span", lambda *_: Span(0, 1))
    trained(tmp_path, settings=SETTINGS.but(steps=2))
    assert caplog.text.count("reasons for no token at all") == 1


def test_a_tracker_that_is_not_there_is_named_before_anything_starts(tmp_path, monkeypatch):
    import importlib.util

    import lab.methods.dtt.trainer  # noqa: F401 - TRL looks for trackers when it is imported

    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else there(name, *rest))
    with pytest.raises(SettingsError, match="pip install wandb"):
        trained(tmp_path, settings=SETTINGS.but(report_to="wandb"))


def test_a_published_adapter_without_its_gate_says_so(tmp_path, caplog):
    from safetensors.torch import load_file, save_file

    model = made()
    model.backbone.save_pretrained(tmp_path / "base")
    model.add_lora(LoraSettings(rank=2, dropout=0.0, token_rows=False))
    folder = export_adapter(model, tmp_path / "adapter")
    kept = {key: value for key, value in load_file(folder / "adapter_model.safetensors").items() if "lora_" in key}
    save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
    again = lab.load(folder, backbone=str(tmp_path / "base"))
    assert "holds no gate and no projection" in caplog.text
    assert again.config.bot_id == model.config.bot_id and again.gate.gate_linear.bias.item() == -3.0


def test_hrpo_trains_with_the_same_trainer(tmp_path):
    settings = SETTINGS.but(steps=1, temperature=0.5, beta=0.005)
    result, _ = trained(tmp_path, made("qwen3", gate="hrpo", r_min=0.2, r_max=0.6), settings)
    assert result.row["logp_gap"] <= 1e-4 and "rewards/gate_sparsity/mean" not in result.row
    assert 0 < result.row["gate/mean"] < 1


def test_hrpo_gates_learn_and_decay_as_published():
    model = made("qwen3", gate="hrpo")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 5e-6, 0.1, gate_groups(model, 1e-4, 1e-3, 0.1))
    told = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert told["parts.thinking_residual_gate_r.weight"] == told["parts.thinking_residual_gate_i.bias"] == (1e-4, 0.1)
    assert told["parts.thinking_residual_Lambda.Lambda"] == (1e-3, 0.1)
    assert {told[name] for name in told if "norm" in name} == {(5e-6, 0.0)}


def test_hrpo_updates_by_the_published_loss(tmp_path, monkeypatch):
    """All rewards are 0, so the divergence from the ungated reference is all there is: its value and its gradient."""
    model, seen, act = made("qwen3", gate="hrpo", r_min=0.2, r_max=0.6), [], GatedThinking.act
    monkeypatch.setattr(GatedThinking, "act", lambda self, *a, **o: seen.append((a[0], act(self, *a, **o))) or seen[-1][1])
    twin = copy.deepcopy(model)
    result, _ = trained(tmp_path, model, SETTINGS.but(steps=1, beta=0.5, clip=0.0))
    batch, thinking = completions(*seen[0]), GatedThinking(twin, GateLearning())
    thinking.hold_reference()
    with thinking.reference(), torch.no_grad():
        ref, _ = thinking.log_probs(batch, 1.0)
    loss, kl = hrpo_loss(thinking.log_probs(batch, 1.0)[0], ref, torch.zeros(len(batch.ids)), batch.mask, 0.5)
    loss.backward()
    assert result.loss == pytest.approx(float(loss.detach()), rel=1e-5) and float(kl.detach()) > 1e-3
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    assert result.row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_completions_of_one_token_have_no_gate_and_no_span(tmp_path, caplog):
    result, model = trained(tmp_path, settings=SETTINGS.but(longest=1, steps=1))
    assert "Warm the model up on that format first" in caplog.text
    assert result.row["rewards/gate_sparsity/mean"] == -1.0 and result.row["logp_gap"] <= 1e-4
    assert all(p.isfinite().all() for p in model.parameters())
