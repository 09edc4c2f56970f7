"""GRPO of latent policies: the update repeats the rollout, chains are shared without changing anything, training resumes exactly."""

import pytest
import torch
from adaptive_fixture import lora_model, numbers, tensors

from lab.errors import DataError, DeviceError, OutOfMemory, SettingsError, TrainingError
from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.plan import left, right
from lab.latent.sampling import Sampling
from lab.latent.tree import rollout_tree
from lab.methods.adaptive.data import Writer
from lab.methods.adaptive.model import read_ids, scores
from lab.methods.adaptive.policy import Adaptive
from lab.methods.adaptive.reinforce import AdaptiveThinking, LengthReward, distribution, rewards_of
from lab.rl import RLSettings, reinforce
from lab.training.acts import Completions, PromptOrder, gap

QUESTIONS = [row["question"] for row in numbers("tokenized")["rows"]]
LABELS = [str(i) for i in range(5)]


@pytest.fixture
def model():
    return lora_model()


def prompts_of(model):
    writer = Writer(model.tokenizer, model.config)
    return [writer.prompt(question) for question in QUESTIONS]


def keys(q, n, seed=0):
    return Keyed.of(seed, torch.arange(q).repeat_interleave(n), torch.arange(n).repeat(q))


def batch_of(model, prompts, acts, samples):
    given, said = left([p for p in prompts for _ in range(samples)]), right(acts.ids)
    ones = [torch.ones_like(side.ids) if side.valid is None else side.valid.long() for side in (given, said)]
    return Completions(given.ids, ones[0], said.ids, ones[1])


def test_a_shared_chain_gives_what_separate_rows_give(model):
    policy = Adaptive(model.thinker, [1], sampling=Sampling(temperature=1.0))
    prompt, draws = Prompt.of_ids(model.thinker, prompts_of(model)), keys(5, 16)
    how = dict(budget=Budget(thoughts=4, answer=6), keep=("thoughts", "decision", "logprob"))
    apart = rollout(model.thinker, policy, prompt, 16, draws, **how)
    shared = rollout_tree(model.thinker, policy, prompt, 16, draws, **how)
    assert len(set(apart.counts.tolist())) > 2
    assert torch.equal(apart.counts, shared.counts) and torch.equal(apart.capped, shared.capped)
    assert torch.equal(apart.tokens, shared.tokens) and torch.equal(apart.finish, shared.finish)
    torch.testing.assert_close(apart.thoughts, shared.thoughts, atol=1e-5, rtol=1e-5)
    for name in ("decision", "logprob"):
        torch.testing.assert_close(apart.notes[name], shared.notes[name], atol=1e-4, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    ("share", "temperature", "ending"), [(True, 1.0, False), (True, 0.5, False), (False, 1.0, False), (True, 1.0, True)]
)
def test_the_update_repeats_the_rollout(model, share, temperature, ending):
    model.but(add_latent_to_end=ending)
    prompts, thinking = prompts_of(model), AdaptiveThinking(model, most=4, share=share)
    acts = thinking.act(prompts, 4, keys(5, 4), temperature=temperature, longest=12)
    batch = batch_of(model, prompts, acts, 4)
    logps, entropies = thinking.log_probs(batch, temperature)
    own = right([[int(x) for x in row] for row in acts.own]).ids.bool() & batch.mask.bool()
    told = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in acts.logprobs], batch_first=True)
    assert gap(logps, told, own) <= 1e-4
    assert entropies.isfinite().all() and (entropies[batch.mask.bool()] > 0).all()
    shuffled = torch.randperm(len(batch.ids), generator=torch.Generator().manual_seed(1))
    again, _ = thinking.log_probs(
        Completions(*(x[shuffled] for x in (batch.prompt, batch.prompt_mask, batch.ids, batch.mask))), temperature
    )
    torch.testing.assert_close(again, logps[shuffled], atol=1e-5, rtol=1e-5)
    logps.sum().backward()
    assert model.parts.recurrent_filter.input_layer.weight.grad.abs().sum() > 0  # thoughts are made again with gradient


def test_log_probabilities_of_any_ids_are_the_official_ones():
    given = tensors("merged_and_grpo")
    ids, mask, said = given["grpo/input_ids"], given["grpo/attention_mask"], given["grpo/completion_ids"]
    model = lora_model().merge()
    width = said.shape[1]
    with torch.no_grad():
        logits = scores(model.thinker, ids, read_ids(model.thinker, ids, mask).last)[:, -width - 1 : -1]
        for temperature in (1.0, 0.5):
            logs = torch.log_softmax(logits / temperature, -1).gather(2, said[..., None])[..., 0]
            torch.testing.assert_close(logs, given[f"grpo/logps_temp{temperature}"], atol=1e-4, rtol=0)
        model.but(head_temperature=2.0)
        logits = scores(model.thinker, ids, read_ids(model.thinker, ids, mask).last)[:, -width - 1 : -1]
        logs = torch.log_softmax(logits, -1).gather(2, said[..., None])[..., 0]
    torch.testing.assert_close(logs, given["grpo/logps_binary_head_temp2"], atol=1e-4, rtol=0)


def test_stop_probabilities_along_the_chain_give_the_distribution_of_counts(model):
    prompts = prompts_of(model)[:2]
    found = distribution(model, Prompt.of_ids(model.thinker, prompts), most=5)
    torch.testing.assert_close(found.sum(1), torch.ones(2))
    policy = Adaptive(model.thinker, [1], sampling=Sampling(temperature=1.0))
    done = rollout_tree(
        model.thinker, policy, Prompt.of_ids(model.thinker, prompts), 2000, keys(2, 2000), budget=Budget(thoughts=5, answer=1), keep=()
    )
    seen = torch.stack([torch.bincount(done.counts[done_rows], minlength=6) / 2000 for done_rows in (slice(0, 2000), slice(2000, 4000))])
    torch.testing.assert_close(seen, found, atol=0.04, rtol=0)


# ---- the trainer ----

SETTINGS = RLSettings(
    steps=3, prompts=2, samples=4, longest=10, lr=1e-3, schedule="constant", beta=1e-2, save_every=1, keep=9, log_every=1, device="cpu"
)


def fewer(thoughts, **_):
    return [-float(count) for count in thoughts]


def rewards():
    return {**rewards_of(LengthReward()), fewer: 1.0}


def train(model, folder, settings=SETTINGS, thinking=None, **options):
    thinking = thinking or AdaptiveThinking(model, most=4)
    thinking.hold_reference()
    rows = []
    columns = {"label": LABELS, "prompt_id": list(range(5))}
    result = reinforce(model, thinking, prompts_of(model), columns, rewards(), settings, folder, lambda **row: rows.append(row), **options)
    return result, rows


def learned(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_training_logs_a_gap_of_rounding_only_and_moves_the_filter(model, tmp_path):
    before = learned(model)
    result, rows = train(model, tmp_path)
    assert result.steps == 3 and [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["logp_gap"] <= 1e-4 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[-1]["kl"] > 0  # the reference is the model before training
    assert {"rewards/form/mean", "rewards/answer/mean", "rewards/relative_length/mean", "reward_std", "frac_reward_zero_std"} <= set(
        rows[0]
    )
    after = learned(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("recurrent_filter" in name for name in moved) and any("stop_embed" in name for name in moved)


@pytest.mark.parametrize(("loss_type", "micro"), [("dapo", 0), ("dapo", 2), ("bnpo", 0), ("grpo", 0), ("grpo", 2)])
def test_the_loss_is_the_one_named(model, tmp_path, loss_type, micro):
    """On-policy the ratio is 1: the loss is minus the mean advantage, over acts (dapo, bnpo) or rows (grpo); forced ids do not count."""
    seen = []

    class Seen(AdaptiveThinking):
        def act(self, *args, **options):
            seen.append(super().act(*args, **options))
            return seen[-1]

    rows, thinking = [], Seen(model, most=1)
    settings = SETTINGS.but(steps=1, beta=0.0, save_every=0, loss_type=loss_type, micro_batch=micro)
    reinforce(model, thinking, prompts_of(model), {}, {fewer: 1.0}, settings, tmp_path, lambda **row: rows.append(row))
    reward = -torch.tensor(seen[0].extras["thoughts"], dtype=torch.float).view(2, 4)
    advantage = ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()
    own = torch.tensor([float(sum(row)) for row in seen[0].own])
    assert any(not all(row) for row in seen[0].own)  # some STOP was forced
    wanted = -advantage.mean() if loss_type == "grpo" else -(advantage * own).sum() / own.sum()
    assert rows[0]["loss"] == pytest.approx(float(wanted), abs=1e-5)


def test_micro_batches_give_the_same_update(model, tmp_path):
    other = lora_model()
    settings = SETTINGS.but(steps=1, eps=1.0, save_every=0)  # a large eps: the step is smooth in the gradient
    before = learned(model)
    train(model, tmp_path / "a", settings)
    train(other, tmp_path / "b", settings.but(micro_batch=2))
    for name, value in learned(model).items():
        torch.testing.assert_close(learned(other)[name], value, atol=1e-7, rtol=1e-5)
    assert any(not torch.equal(before[name], value) for name, value in learned(model).items())


def test_out_of_memory_takes_fewer_completions_at_a_time_and_changes_nothing_else(tmp_path, caplog):
    class Greedy(AdaptiveThinking):
        def log_probs(self, batch, temperature):
            if len(batch.ids) > 2 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("injected")
            return super().log_probs(batch, temperature)

    settings, roomy, tight = SETTINGS.but(loss_type="grpo"), lora_model(), lora_model()
    train(roomy, tmp_path / "a", settings.but(micro_batch=2))
    result, rows = train(tight, tmp_path / "b", settings, Greedy(tight, most=4))
    assert result.micro_batch == 2 and "reduced to 2 completions" in caplog.text
    assert [row["micro_batch"] for row in rows if row.get("event") == "out_of_memory"] == [4, 2]
    for name, parameter in learned(roomy).items():
        torch.testing.assert_close(learned(tight)[name], parameter, atol=1e-6, rtol=1e-5)
    with pytest.raises(DeviceError, match="8 completions at a time"):
        model = lora_model()
        train(model, tmp_path / "c", settings.but(save_every=0, guard={"enabled": False}), Greedy(model, most=4))


def test_all_of_several_processes_start_again_with_fewer_completions(tmp_path, monkeypatch):
    asked = []

    def launch(function, processes, on_row=None, **arguments):
        asked.append((processes, arguments["arguments"]["settings"].micro_batch))
        if len(asked) < 3:
            raise OutOfMemory("injected")
        return function(**arguments)

    monkeypatch.setattr("lab.training.together.launch", launch)
    result, rows = train(lora_model(), tmp_path, SETTINGS.but(steps=1, processes=2))
    assert asked == [(2, 0), (2, 2), (2, 1)] and result.steps == 1  # each has half of the 8
    assert [row["micro_batch"] for row in rows if row.get("event") == "out_of_memory"] == [2, 1]
    asked.clear()
    with pytest.raises(OutOfMemory, match="injected"):
        train(lora_model(), tmp_path / "b", SETTINGS.but(micro_batch=1, processes=2))


def test_a_killed_training_resumes_to_the_same_weights(tmp_path):
    whole, parted = lora_model(), lora_model()
    train(whole, tmp_path / "whole")

    def kill(row):
        if row.get("step") == 2:
            raise KeyboardInterrupt

    thinking = AdaptiveThinking(parted, most=4)
    thinking.hold_reference()
    columns = {"label": LABELS, "prompt_id": list(range(5))}
    given = (prompts_of(parted), columns, rewards(), SETTINGS, tmp_path / "parted")
    with pytest.raises(KeyboardInterrupt):
        reinforce(parted, thinking, *given, lambda **row: kill(row))
    fresh = lora_model()
    thinking = AdaptiveThinking(fresh, most=4)
    thinking.hold_reference()
    result = reinforce(fresh, thinking, *given)
    assert result.resumed_from == 1
    for name, value in learned(whole).items():
        assert torch.equal(learned(fresh)[name], value), name


def test_an_update_that_is_not_the_rollout_stops_training(model, tmp_path):
    class Wrong(AdaptiveThinking):
        def log_probs(self, batch, temperature):
            return super().log_probs(batch, 0.7 * temperature)

    with pytest.raises(TrainingError, match="another policy than the one that acted"):
        train(model, tmp_path, thinking=Wrong(model, most=4))
    _, rows = train(lora_model(), tmp_path / "logged", SETTINGS.but(largest_gap=0.0), thinking=None)
    assert max(row["logp_gap"] for row in rows) <= 1e-4


def test_groups_with_one_reward_teach_nothing(model, tmp_path):
    def constant(prompts, **_):
        return [1.0] * len(prompts)

    before, thinking = learned(model), AdaptiveThinking(model, most=4)
    rows = []
    settings = SETTINGS.but(steps=1, beta=0.0, save_every=0)
    reinforce(model, thinking, prompts_of(model), {}, {constant: 1.0}, settings, tmp_path, lambda **row: rows.append(row))
    assert rows[-1]["frac_reward_zero_std"] == 1.0
    assert all(torch.equal(before[name], value) for name, value in learned(model).items())


def test_bad_input_is_refused_before_anything_runs(model, tmp_path):
    with pytest.raises(SettingsError, match="drops the cache"):
        SETTINGS.but(gradient_checkpointing=True)
    with pytest.raises(SettingsError, match="does not divide"):
        SETTINGS.but(micro_batch=3)
    thinking = AdaptiveThinking(model, most=4)
    with pytest.raises(DataError, match="no prompts"):
        reinforce(model, thinking, [], {}, {lambda **_: []: 1.0}, SETTINGS, tmp_path)
    with pytest.raises(SettingsError, match="weight other than 0"):
        reinforce(model, thinking, [[1]], {}, {lambda **_: []: 0.0}, SETTINGS, tmp_path)
    with pytest.raises(DataError, match="values for"):
        reinforce(model, thinking, [[1]], {"label": []}, {lambda **_: []: 1.0}, SETTINGS, tmp_path)
    with pytest.raises(SettingsError, match="No reference"), thinking.reference():
        pass


def test_prompts_of_a_step_follow_from_the_seed():
    order = PromptOrder(5, 2, seed=3)
    seen = [place for number in range(5) for place in order.rollout(number)]
    assert sorted(seen[:5]) == sorted(seen[5:]) == list(range(5))
    assert order.rollout(4) == PromptOrder(5, 2, seed=3).rollout(4)
