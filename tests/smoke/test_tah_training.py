"""Training Think-at-Hard: labels, losses, both ways of step 2, thresholds, arms."""

import pytest
import torch
from torch.nn import functional as F

from lab.errors import DataError, SettingsError
from lab.methods.tah import toy
from lab.methods.tah.config import DeciderLossSettings, TahConfig
from lab.methods.tah.data import build_example, collate
from lab.methods.tah.features import Features, collect, probabilities, threshold_for_rate
from lab.methods.tah.model import TahModel
from lab.methods.tah.objective import Decisions, decider_loss
from lab.methods.tah.passes import force_one
from lab.methods.tah.score import Point, calibrate, differences, score_tokens, sweep_thresholds
from lab.methods.tah.training import build_arm, choose_threshold, train_model, train_step2, with_mlp
from lab.models.backbones import load_backbone
from lab.train import TrainSettings

CONFIG = TahConfig.check(input_updater_kwargs={"topk": 5}, adapter_kwargs={"r": 4, "lora_alpha": 8, "lora_dropout": 0.0})
MLP = {"topk": 6, "hidden_states_layer_nums": [0, 2], "hidden_dims": [8, 8], "expansion_factor": 2, "dropout_rate": 0.0, "dtype": "float32"}


@pytest.fixture
def backbone():
    return load_backbone("toy:qwen3-tiny", vocab_size=40, initializer_range=0.2)


@pytest.fixture(scope="module")
def examples() -> list[dict]:
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 40, (n,), generator=random).tolist() for n in (9, 12, 7, 12, 10, 5, 8, 11)]
    return [build_example(row, [0, 0] + [1] * (len(row) - 2), [i % 3 == 0 for i in range(len(row))]) for row in rows]


def deep(backbone, **changes) -> TahModel:
    model = TahModel(backbone, CONFIG.but(**changes))
    for parameter in model.lora.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_one_supervised_token_always_goes_on_in_training():
    targets = torch.tensor([-100, 3, -100, 4])
    torch.manual_seed(0)
    picked = {int(force_one(torch.tensor([True, False, False, False]), targets).nonzero()[-1]) for _ in range(40)}
    assert picked == {1, 3}
    assert force_one(torch.tensor([False, True, False, False]), targets).sum() == 1
    assert not force_one(torch.zeros(4, dtype=torch.bool), torch.full((4,), -100)).any()


def test_on_policy_labels_say_where_the_argmax_is_wrong(backbone, examples):
    model = deep(backbone, iter_label_generator="DynamicMismatchIterLabelGenerator").eval()
    batch = collate(examples)
    with torch.no_grad():
        out = model(**batch)
        first = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    targets = torch.cat((batch["labels"][:, 1:], torch.full((len(examples), 1), -100)), 1)
    supervised = targets != -100
    assert torch.equal(out.iter_count_labels[supervised], 1 + (first != targets)[supervised].long())
    assert torch.equal(out.iterations[supervised], out.iter_count_labels[supervised])


def test_max_labels_read_every_token_to_the_cap(backbone, examples):
    batch = collate(examples)
    out = deep(backbone, iter_label_generator="MaxIterLabelGenerator", max_iter=3).eval()(**batch)
    assert set(out.iterations[batch["attention_mask"] == 1].tolist()) == {3}


def test_hard_tokens_can_weigh_more(backbone, examples):
    batch = collate(examples)
    loss = {"hard_token_relative_weight": 3.0, "hard_token_ratio": 0.25}
    model = deep(backbone, train_loss_kwargs=loss).train()
    out = model(**batch, return_logits=True)
    targets = torch.cat((batch["labels"][:, 1:], torch.full((len(examples), 1), -100)), 1)
    each = F.cross_entropy(out.logits.transpose(1, 2), targets, reduction="none")
    easy = 1 / (0.25 * 3 + 0.75)
    weights = torch.where(out.iterations > 1, 3 * easy, easy) * (targets != -100)
    torch.testing.assert_close(out.loss, (each * weights).sum() / weights.sum())
    torch.testing.assert_close(model(**batch, num_items_in_batch=7).loss, (each * weights).sum() / 7)


def test_the_consistency_loss_averages_over_executed_passes(backbone, examples):
    batch = collate(examples)
    model = deep(backbone, train_loss="ConsistencyLoss").train()
    out = model(**batch, return_logits=True)
    with torch.no_grad():
        once = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    targets = torch.cat((batch["labels"][:, 1:], torch.full((len(examples), 1), -100)), 1)
    first, last = (F.cross_entropy(z.transpose(1, 2), targets, reduction="none") for z in (once, out.logits))
    mean = torch.where(out.iterations > 1, (first + last) / 2, last)[targets != -100].mean()
    torch.testing.assert_close(out.loss, mean, atol=1e-5, rtol=1e-5)


def test_decider_losses_scale_as_they_say():
    logit, wanted = torch.tensor([0.3, -1.0, 2.0, 0.5]), torch.tensor([2, 1, -100, 1])
    step = [Decisions(1, logit, wanted), Decisions(2, logit, wanted)]
    bce = F.binary_cross_entropy_with_logits(logit[[0, 1, 3]], torch.tensor([1.0, 0.0, 0.0]), pos_weight=torch.tensor(2.0))
    mean, official = DeciderLossSettings(pos_weight=2.0), DeciderLossSettings(pos_weight=2.0, loss_scaling="official")
    torch.testing.assert_close(decider_loss(step, mean, 2), bce)
    torch.testing.assert_close(decider_loss(step, mean, 2, num_items=6), bce * 3 / 6)
    torch.testing.assert_close(decider_loss(step, official, 2, num_items=10, positions=8), bce / 10)
    torch.testing.assert_close(decider_loss(step, official, 2, positions=8), bce / 8)


def test_cached_features_give_the_gradient_of_the_whole_model(backbone, examples):
    model = with_mlp(deep(backbone), pos_weight=3.0, **MLP).train()
    batch = collate(examples)
    model(**batch).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.decider.named_parameters() if p.grad is not None}
    model.zero_grad()
    features = collect(model.eval(), model.decider, examples)
    assert len(features) == int(batch["attention_mask"].sum())
    from lab.methods.tah.deciders import Seen

    logit = model.decider.logit(Seen(1, len(features), features.top, features.hidden))
    F.binary_cross_entropy_with_logits(logit, (features.wanted == 1).float(), pos_weight=torch.tensor(3.0)).backward()
    for name, parameter in model.decider.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name], atol=1e-5, rtol=1e-4)


def test_features_survive_a_file_and_know_their_limits(backbone, examples, tmp_path):
    model = with_mlp(deep(backbone), **MLP)
    features = collect(model, model.decider, examples, batch_tokens=16)
    features.save(tmp_path / "features.safetensors")
    again = Features.load(tmp_path / "features.safetensors")
    assert all(torch.equal(getattr(features, name), getattr(again, name)) for name in ("hidden", "top", "wanted", "sequence"))
    assert len(collect(model, model.decider, examples, max_tokens=22)) == 21
    with pytest.raises(SettingsError, match="cached: false"):
        collect(with_mlp(deep(backbone, max_iter=3), **MLP), model.decider, examples)
    easy = [{**example, "iter_count_labels": [1] * len(example["input_ids"])} for example in examples]
    with pytest.raises(DataError, match="Not one token"):
        train_step2(model, easy, TrainSettings(steps=1, global_batch=4, save_every=0), tmp_path / "none")


@pytest.mark.parametrize("cached", [True, False])
def test_step_two_moves_the_decider_alone(backbone, examples, tmp_path, cached):
    model = with_mlp(deep(backbone), **MLP)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = TrainSettings(steps=3, global_batch=16 if cached else 4, lr=1e-2, save_every=0)
    train_step2(model, examples, settings, tmp_path, cached=cached)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.startswith("parts.decider") for name in moved) and "parts.decider.threshold" not in moved


def test_step_two_under_the_official_scaling_divides_by_labelled_tokens(backbone, examples, tmp_path):
    settings = TrainSettings(steps=1, global_batch=8, micro_batch=2, order="as_given", lr=1e-2, save_every=0, log_every=1)
    model, rows = with_mlp(deep(backbone), loss_scaling="official", pos_weight=3.0, **MLP), []
    parts = [
        model(**collate(examples[i : i + 2])).loss.detach() * 2 * max(map(len, (e["labels"] for e in examples[i : i + 2])))
        for i in (0, 2, 4, 6)
    ]
    labelled = sum(label != -100 for example in examples for label in example["labels"])
    train_step2(model, examples, settings, tmp_path, lambda **row: rows.append(row), cached=False)
    assert rows[0]["loss"] == pytest.approx(float(sum(parts)) / labelled, rel=1e-5)
    with pytest.raises(SettingsError, match="cached: false"):
        train_step2(model, examples, settings, tmp_path / "none", cached=True)


def test_the_last_pass_may_take_part_in_the_deciders_loss(backbone, examples):
    batch, loss = collate(examples), {"pos_weight": 3.0, "skip_last_iter": False}
    model = with_mlp(deep(backbone), **MLP).reconfigure(train_loss_kwargs=loss).train()
    quick, whole = (model(**batch, return_logits=logits).loss for logits in (False, True))
    torch.testing.assert_close(quick, whole)


def test_step_one_resumes_to_the_same_weights(examples, tmp_path):
    settings = TrainSettings(steps=4, global_batch=4, lr=1e-3, save_every=2)

    class Killed(RuntimeError):
        pass

    def logger(kill: bool):
        def write(**row):
            if kill and row.get("step") == 3:
                raise Killed

        return write

    def trained(folder, kill: bool = False) -> TahModel:
        torch.manual_seed(0)
        model = build_arm("tah", load_backbone("toy:qwen3-tiny", vocab_size=40), CONFIG)
        train_model(model, examples, settings.but(log_every=1), tmp_path / folder, logger(kill))
        return model

    whole = trained("whole")
    with pytest.raises(Killed):
        trained("killed", kill=True)
    resumed = trained("killed")
    for (name, first), (_, second) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        assert torch.equal(first, second), name


def test_thresholds(backbone, examples):
    model = with_mlp(deep(backbone), **MLP).eval()
    features = collect(model, model.decider, examples)
    prob = probabilities(model.decider, features)
    value = threshold_for_rate(prob, 0.25)
    assert abs(float((prob > value).float().mean()) - 0.25) < 2 / len(prob)
    for how, asked in (("rate", 0.25), ("fixed", 0.9), ("accuracy", 0.0)):
        chosen, _ = choose_threshold(model, examples, how, asked, max_passes=2.0)
        assert model.decider.effective_threshold == pytest.approx(chosen) and model.tah.iter_decider_kwargs["threshold"] == chosen
    points = sweep_thresholds(model, examples, [0.0, 1.0])
    assert points[0].passes == 2.0 and points[1].passes == 1.0


def test_calibration_takes_the_highest_threshold_that_is_good_enough():
    points = [Point(0.1, 0.90, 1.4), Point(0.3, 0.899, 1.1), Point(0.5, 0.898, 1.08), Point(0.9, 0.7, 1.0)]
    assert calibrate(points, 1.15).threshold == 0.5 and calibrate(points, 2.0).threshold == 0.5
    assert calibrate(points, 2.0, tolerance=0.0).threshold == 0.1 and calibrate(points, 0.5).threshold == 0.9


def test_scores_agree_with_full_logits(backbone, examples):
    model = with_mlp(deep(backbone), **MLP).eval()
    model.set_threshold(0.5)
    for policy in ("never", "always", "oracle", "decider"):
        summary = score_tokens(model, examples, policy, batch_tokens=24).summary()
        right, passes, read = 0, 0, 0
        for example in examples:
            batch = collate([example])
            from lab.methods.tah.score import token_decider

            with torch.no_grad():
                out = model(
                    batch["input_ids"],
                    iter_count_labels=batch["iter_count_labels"],
                    decider=token_decider(model, policy),
                    return_logits=True,
                )
            targets = torch.tensor(example["labels"][1:])
            right += int((out.logits[0, :-1].argmax(-1) == targets)[targets != -100].sum())
            passes, read = passes + int(out.iterations.sum()), read + out.iterations.numel()
        supervised = sum(label != -100 for example in examples for label in example["labels"][1:])
        assert summary["accuracy"] == pytest.approx(right / supervised) and summary["passes"] == pytest.approx(passes / read)
    assert differences({"tah decider": summary, "sft": summary})["tah decider minus sft"]["ce"] == 0


def test_continuing_a_released_decider_keeps_it(backbone):
    model = with_mlp(deep(backbone), pos_weight=5.4, **MLP)
    kept, fresh = with_mlp(model, **MLP, threshold=0.8), with_mlp(model, **{**MLP, "hidden_dims": [8, 16]})
    assert torch.equal(kept.decider.backbone.input_projection.weight, model.decider.backbone.input_projection.weight)
    assert kept.decider.effective_threshold == pytest.approx(0.8) and fresh.decider.backbone.blocks[0].dim_change is not None


def test_toy_worlds_do_not_share_draws():
    rows = {name: toy.split_rows("arrows", name, 50, seed=0) for name in toy.SPLITS}
    seen = {name: {tuple(row["real_token"]) for row in part} for name, part in rows.items()}
    assert not seen["train"] & seen["test"] and not seen["validation"] & seen["test"]
    for row in rows["test"]:
        assert all(row["mask"][i + 1] for i, hard in enumerate(row["hard"]) if hard)
    with pytest.raises(SettingsError, match="Did you mean 'pointers'"):
        toy.world("pointer")
