"""CoLaR learns: batches at one factor, order that a resume repeats, parts of the loss, GRPO on stored thoughts without a gap."""

import copy

import pytest
import torch

from lab.errors import SettingsError
from lab.evaluate import read_samples
from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, rollout
from lab.methods.colar import toy
from lab.methods.colar.config import ColarSettings
from lab.methods.colar.data import collate, group
from lab.methods.colar.objective import loss
from lab.methods.colar.policy import generate
from lab.methods.colar.reinforce import Acting, ColarThinking, rewards_of, train_rl
from lab.methods.colar.stages import decoding, deviation, evaluate, recorded, start
from lab.methods.colar.train import Batches, collator, count, prepare, train, warm_up
from lab.methods.colar.trainer import PublishedGRPO
from lab.models.layouts import load
from lab.rl import RLSettings, reinforce
from lab.train import TrainSettings
from lab.training.acts import Completions, gap

SETTINGS = {"lora_r": 0, "max_compression_factor": 3, "lp_intermediate_size": 32}
HOW = {"global_batch": 8, "lr": 2e-3, "device": "cpu", "log_every": 1}


@pytest.fixture
def model():
    return toy.untrained("toy:llama", 0, ColarSettings.check(**SETTINGS, latent_loss="nll"))


@pytest.fixture
def rows(model):
    return prepare(toy.examples("train", 40, 0), model).rows


def test_a_batch_has_one_factor_and_an_item_is_a_function_of_its_place(rows):
    data, again = Batches(rows, 6, 4, [1, 2, 3], 7), Batches(rows, 6, 4, [1, 2, 3], 7)
    factors = [data[i].factor for i in range(24)]
    assert all(len(set(factors[start : start + 4])) == 1 for start in range(0, 24, 4)) and len(set(factors)) > 1
    assert [data[i] for i in reversed(range(24))][::-1] == [again[i] for i in range(24)]
    assert sorted(item.row.steps for item in map(Batches(rows, 5, 8, [1], 0).__getitem__, range(40))) == sorted(row.steps for row in rows)


def test_the_toy_layout_is_one_token_a_phrase(model, rows):
    assert len(rows[0].steps) == 7 and rows[0].steps[0] == model.config.sep_id
    assert len({len(ids) for ids in rows[0].speeds.values()}) == 1
    assert model.tokenizer.decode(rows[0].answer[:2]).replace(" ", "") == "###Answer:"


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_every_last_group_holds_something_unless_official_padding_is_asked_for(model, factor):
    empty = 0
    for longest in range(12, 17):
        steps = [(9, *range(10, 10 + length)) for length in range(1, longest)]
        _, mask = group(steps, factor, model.config)
        _, official = group(steps, factor, model.config.but(official_padding=True))
        assert mask[:, -1].any(-1).all()
        empty += int((~official[:, -1].any(-1)).sum())
        for rows_mask in (mask, official):
            assert rows_mask.sum((1, 2)).tolist() == [len(row) for row in steps]
    assert empty


def test_micro_batches_give_the_step_of_the_whole_batch(rows, tmp_path):
    found = []
    for micro in (0, 3):
        one = toy.untrained("toy:llama", 0, ColarSettings.check(**SETTINGS, ce_weight=1.0, embed_modeling_weight=0.0))
        settings = TrainSettings.check(steps=3, micro_batch=micro, save_every=0, **HOW)
        train(one, rows, settings, tmp_path / str(micro), factors=[1])
        found.append(one.parts.head.mean.weight.detach().clone() + one.backbone.lm_head.weight.sum())
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_parts_of_the_loss_are_means_over_what_is_counted(model, rows):
    batch = collate(rows[:6], 2, model.config, torch.Generator().manual_seed(0))
    total, parts = loss(model, batch)
    assert set(parts) <= set(count(batch)) and count(batch)["latent"] == int(batch.groups_mask.any(-1).sum())
    torch.testing.assert_close(total, sum(parts.values()))


def test_training_keeps_the_table_and_warm_up_measures_it(model, rows, tmp_path):
    before = model.config.embeds_std
    warm_up(model, rows, TrainSettings.check(steps=3, save_every=0, **HOW), tmp_path / "w")
    table = model.backbone.get_input_embeddings().weight
    assert model.config.embeds_std == pytest.approx(float(table.detach().std()), rel=1e-5) and model.config.embeds_std != before
    assert model.config.embed_modeling_weight == 1.0
    kept = table.detach().clone()
    result = train(model, rows, TrainSettings.check(steps=4, save_every=2, **HOW), tmp_path / "s")
    assert torch.equal(kept, table) and {"ce", "latent"} <= set(result.row)
    model.save(tmp_path / "m")
    again = load(tmp_path / "m")
    asked = toy.examples("test", 3, 0)
    want, got = (generate(m, asked, speed=2, **decoding(True), thoughts=4, max_new_tokens=3) for m in (model.eval(), again))
    assert [row.ids for row in want.rows] == [row.ids for row in got.rows]


def test_impossible_factors_are_refused(model, rows, tmp_path):
    with pytest.raises(SettingsError, match="prompts for 1 to 3"):
        train(model, rows, TrainSettings.check(steps=1, **HOW), tmp_path, factors=[4])
    with pytest.raises(SettingsError, match="no deviation"):
        ColarThinking(toy.untrained("toy:llama", 0, ColarSettings.check(**SETTINGS, lp_deterministic=True)), 4)


def completions(acts, prompts, samples):
    wide = max(map(len, acts.ids))
    ids = torch.tensor([row + [0] * (wide - len(row)) for row in acts.ids])
    mask = torch.tensor([[1] * len(row) + [0] * (wide - len(row)) for row in acts.ids])
    width = max(map(len, prompts))
    prompt = torch.tensor([[0] * (width - len(row)) + row for row in prompts]).repeat_interleave(samples, 0)
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts]).repeat_interleave(samples, 0)
    old = torch.tensor([row + [0.0] * (wide - len(row)) for row in acts.logprobs])
    own = torch.tensor([row + [False] * (wide - len(row)) for row in acts.own])
    return Completions(prompt, seen, ids, mask, acts.record), old, own


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_update_gives_the_log_probabilities_of_the_rollout(model, reduction, temperature):
    prompts = [[*model.prompt(example, 2), model.config.sep_id] for example in toy.examples("test", 3, 1)]
    prompts[1] = prompts[1][2:]
    question, sample = torch.arange(3).repeat_interleave(4), torch.arange(4).repeat(3)
    thinking = ColarThinking(model, 5, reduction)
    acts = thinking.act(prompts, 4, Keyed.of(0, question, sample), temperature=temperature, longest=10)
    batch, old, own = completions(acts, prompts, 4)
    new, _ = thinking.log_probs(batch, temperature)
    assert len(set(acts.extras["thoughts"])) > 1, "rows of different length"
    assert gap(new, old, own) < (1e-4 if reduction == "mean" else 5e-3)
    assert new.requires_grad


def test_a_budgets_separator_is_no_act_of_the_policy(model):
    policy, prompt = Acting(model, 1.0, "mean"), Prompt.of_ids(model.decoder, [[2, 3, 4, model.config.sep_id]])
    assert rollout(model.decoder, policy, prompt, 2, budget=Budget(thoughts=1, answer=2)).counts.tolist() == [1, 1]
    acts = ColarThinking(model, 1).act(
        [[2, 3, 4, model.config.sep_id]], 8, Keyed.of(0, torch.zeros(8).long(), torch.arange(8)), temperature=1.0, longest=4
    )
    capped = [not own[1] for own in acts.own]
    assert any(capped) and all(own[0] for own in acts.own)


def shorter(thoughts, **_):
    return [-float(count) for count in thoughts]


def test_reinforcement_moves_the_head_leaves_the_table_and_has_no_gap(model, tmp_path):
    table, head = (weight.detach().clone() for weight in (model.backbone.get_input_embeddings().weight, model.parts.head.mean.weight))
    settings = RLSettings.check(steps=2, prompts=2, samples=4, longest=10, lr=1e-3, save_every=0, log_every=1, loss_type="grpo")
    rows, data = [], toy.examples("train", 8, 0)
    result = train_rl(model, data, settings, tmp_path, most=5, rewards={shorter: 1.0}, logger=lambda **row: rows.append(row))
    assert result.steps == 2 and torch.equal(table, model.backbone.get_input_embeddings().weight)
    assert max(row["logp_gap"] for row in rows if "logp_gap" in row) < 1e-3
    assert not torch.equal(head, model.parts.head.mean.weight)


def naive_log_probs(m, prompt, thoughts, said):
    """Densities of one row's thoughts, averaged over the width, and log-probabilities of what it said, from one uncached reading."""
    table = m.backbone.get_input_embeddings()
    x = torch.cat((table(torch.tensor(prompt)), thoughts, table(torch.tensor(said))))[None]
    h = m.backbone.model(inputs_embeds=x).last_hidden_state[0, len(prompt) - 1 : -1]
    mean, std = m.parts.head(h[: len(thoughts)])
    density = torch.distributions.Normal(mean, std).log_prob(thoughts / m.config.embeds_std).mean(-1)
    words = m.backbone.lm_head(h[len(thoughts) :]).log_softmax(-1)
    return density, words[torch.arange(len(said)), torch.tensor(said)]


def published_loss(new, old, advantage, average):
    """−A·clipped ratio of each part (rows of log-probabilities), over a row's acts or 32, then over rows; the parts are added."""
    total = 0.0
    for parts in zip(new, old, advantage, strict=True):
        for now, before in zip(*parts[:2], strict=True):
            ratio = (now - before).exp()
            gain = torch.minimum(ratio * parts[2], ratio.clamp(0.8, 1.2) * parts[2])
            total = total - (gain.mean() if average else gain.sum() / 32) / len(new)
    return total


@pytest.mark.parametrize("average", [True, False])
def test_the_published_update_is_the_released_codes(model, tmp_path, average):
    """Two losses added, deviation + 1e-8, nucleus and forced separators counted, a step for each share of the rows (`colar.md` 2.6)."""
    naive, told, acted, rolled, updated = copy.deepcopy(model), [], [], [], []

    class Seen(ColarThinking):
        def act(self, prompts, *args, **options):
            acts = super().act(prompts, *args, **options)
            acts.record["row"] = torch.arange(len(acts.ids))
            rolled.append((prompts, acts))
            return acts

        def log_probs(self, batch, temperature):
            if torch.is_grad_enabled():
                updated.append(batch.record["row"].tolist())
            return super().log_probs(batch, temperature)

    def reward(completion_ids, **_):
        acted.append([sum(row) % 7 / 1e4 for row in completion_ids])  # so small that 1e-4 in the denominator would show
        return acted[-1]

    kind = "grpo" if average else "dr_grpo"
    how = {
        "steps": 4,
        "updates": 2,
        "prompts": 2,
        "samples": 4,
        "longest": 9,
        "lr": 1e-3,
        "schedule": "constant",
        "weight_decay": 0.01,
        "eps": 1e-4,
    }
    settings = RLSettings.check(**how, clip=1.0, loss_type=kind, save_every=0, log_every=1, device="cpu")
    prompts = [[*model.prompt(example, 2), model.config.sep_id] for example in toy.examples("train", 8, 0)]
    thinking = Seen(model, 4, compat=True)
    reinforce(model, thinking, prompts, {}, {reward: 1.0}, settings, tmp_path, lambda **r: told.append(r), trainer_class=PublishedGRPO)
    assert len(rolled) == 2 and [sorted(updated[i] + updated[i + 1]) for i in (0, 2)] == [list(range(8))] * 2
    learning = [p for p in naive.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-3, weight_decay=0.01, eps=1e-4)
    for number, ((asked, acts), paid) in enumerate(zip(rolled, acted, strict=True)):
        r = torch.tensor(paid).view(2, 4)
        advantage = ((r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-8)).flatten()

        def rows(chosen, asked=asked, acts=acts):
            counts = acts.record["counts"].tolist()
            given = [(asked[i // 4], acts.record["thoughts"][i, : counts[i]], acts.ids[i][counts[i] :]) for i in chosen]
            return [naive_log_probs(naive, *row) for row in given]

        with torch.no_grad():
            before = rows(range(8))
        ours = -advantage[updated[2 * number]].mean().item()  # of the default update: one mean over a row's acts, and 1e-4
        assert abs(told[2 * number]["loss"] - ours) > 1e-3
        for step, chosen in enumerate(updated[2 * number : 2 * number + 2], 2 * number):
            optimiser.zero_grad()
            value = published_loss(rows(chosen), [before[i] for i in chosen], advantage[chosen], average)
            value.backward()
            norm = torch.nn.utils.clip_grad_norm_(learning, 1.0)
            optimiser.step()
            assert told[step]["loss"] == pytest.approx(float(value.detach()), rel=1e-3, abs=1e-5)
            assert told[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    for ours, theirs in zip(model.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_published_training_that_was_killed_resumes_between_rollouts(tmp_path):
    models = [toy.untrained("toy:llama", 0, ColarSettings.check(**SETTINGS, latent_loss="nll")) for _ in range(3)]
    how = {"steps": 4, "updates": 2, "prompts": 2, "samples": 4, "longest": 9, "lr": 1e-3, "save_every": 2, "loss_type": "grpo"}
    settings, data = RLSettings.check(**how, log_every=1, device="cpu"), toy.examples("train", 8, 0)

    def stop(**row):
        if row.get("step") == 4:
            raise KeyboardInterrupt

    def run(model, name, logger=None):
        return train_rl(model, data, settings, tmp_path / name, most=4, compat=True, rewards={shorter: 1.0}, logger=logger)

    run(models[0], "whole")
    with pytest.raises(KeyboardInterrupt):
        run(models[1], "parted", stop)
    assert run(models[2], "parted").resumed_from == 2
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[2].parameters(), strict=True))
    with pytest.raises(SettingsError, match="multiple of the 2 steps of a rollout"):
        settings.but(save_every=1)
    with pytest.raises(SettingsError, match="cannot be shared out to 3 updates"):
        settings.but(updates=3, save_every=0)
    with pytest.raises(SettingsError, match="mean over each row"):
        train_rl(models[0], data, settings.but(loss_type="bnpo"), tmp_path / "bnpo", compat=True)


def test_rewards_may_be_divided_by_the_number_of_thoughts():
    right = next(iter(rewards_of("colar", True)))
    assert right(["Answer: 5", "Answer: 4"], ["5", "5"], [2, 2]) == [0.5, 0.0]


def test_evaluation_counts_thoughts_and_caps(model):
    row, found = evaluate(model, toy.examples("test", 4, 0), 1, **decoding(True), thoughts=3, max_new_tokens=2)
    assert row["thoughts"] <= 3 and 0 <= row["capped"] <= 1 and len(found.rows) == 4
    assert deviation(model, toy.examples("test", 4, 0)) > 0
    assert collator(model.config)


@pytest.mark.parametrize("greedy", [True, False])
def test_an_evaluation_that_is_kept_says_the_same_and_goes_on_where_it_was(model, tmp_path, greedy):
    asked, way, how = toy.examples("test", 6, 0), decoding(greedy), {"max_new_tokens": 2, "batch": 4, "seed": 5}
    kept = {"repeats": 2, "thoughts": 3}
    want, said = zip(*(evaluate(model, asked, speed, **way, **kept, max_new_tokens=2, seed=5) for speed in (1, 2)), strict=True)
    found = recorded(model, asked, (1, 2), tmp_path, "permutations", way, how, **kept)
    alike = ("accuracy", "thoughts", "tokens", "capped")
    assert [[row[name] for name in alike] for row in found] == [[row[name] for name in alike] for row in want]
    assert [row["output"] for row in read_samples(tmp_path / "speed-2")] == [row.text for row in said[1].rows]
    samples = tmp_path / "speed-2" / "samples.jsonl"
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:5]))
    assert repr(recorded(model, asked, (1, 2), tmp_path, "permutations", way, how, **kept)) == repr(found)
    assert [row["output"] for row in read_samples(tmp_path / "speed-2")] == [row.text for row in said[1].rows]


def test_a_model_with_adapters_is_saved_whole_and_trains_on_under_new_ones(tmp_path):
    settings = ColarSettings.check(lora_r=4, max_compression_factor=2, lp_intermediate_size=16)
    model = toy.untrained("toy:llama", 0, settings)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    asked, exact = toy.examples("test", 3, 0), {**decoding(True), "speed": 1, "thoughts": 4, "vectors": True}
    want = model.eval().generate(asked, **exact)
    model.save(tmp_path / "model")
    assert hasattr(model.backbone, "merge_and_unload"), "saving leaves the model as it was"
    again = start("toy:llama", str(tmp_path / "model"), settings, 0)
    found = again.eval().generate(asked, **exact)
    assert [row.ids for row in found.rows] == [row.ids for row in want.rows]
    torch.testing.assert_close(torch.stack(found.vectors), torch.stack(want.vectors), atol=1e-4, rtol=1e-4)
    assert {name.split(".")[-3] for name, p in again.backbone.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
