"""Training of a tiny model: exact normalisation, exact resume, guards."""

import math

import pytest
import torch
from torch import nn

from lab import files
from lab.errors import DataError, DeviceError, RunError, SettingsError, TrainingError
from lab.train import TrainSettings, fit
from lab.training.stability import Guard, kept_and_discarded

torch.set_num_threads(1)


class Tiny(nn.Module):
    """Next-token model over 11 symbols: embedding, normalisation, dropout, linear head."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.drop, self.head = nn.Embedding(11, 16), nn.LayerNorm(16), nn.Dropout(dropout), nn.Linear(16, 11)

    def forward(self, ids):
        return self.head(self.drop(self.norm(self.embed(ids))))


def rows(n=24):
    """Rows of different lengths: the symbol after s is 3s + 1."""
    made = []
    for i in range(n):
        ids = [i % 11]
        for _ in range(2 + i % 5):
            ids.append((3 * ids[-1] + 1) % 11)
        made.append(ids)
    return made


def collate(batch):
    width = max(map(len, batch))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in batch])
    labels = torch.tensor([row + [-100] * (width - len(row)) for row in batch])
    return {"ids": ids, "labels": labels}


def loss(model, batch):
    logits = model(batch["ids"])[:, :-1]
    ce = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
    return ce, {"ce": ce}


def settings(**changes):
    base = dict(steps=12, global_batch=8, lr=1e-2, log_every=1, save_every=4)
    return TrainSettings.check(**{**base, **changes})


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def losses(folder):
    return [row["loss"] for row in kept_and_discarded(files.read_lines(folder / "metrics.jsonl"))[0]]


def test_it_learns(tmp_path):
    model = Tiny()
    result = fit(model, rows(), collate, loss, settings(steps=150, lr=3e-2, schedule="cosine", warmup_steps=5), tmp_path)
    curve = losses(tmp_path)
    assert result.steps == 150 and len(curve) == 150
    assert curve[0] > 2.0 and curve[-1] < 0.1
    assert not model.training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("micro", [1, 3, 5])
def test_micro_batches_do_not_change_anything(tmp_path, micro):
    whole, split = Tiny(), Tiny()
    fit(whole, rows(), collate, loss, settings(), tmp_path / "a")
    fit(split, rows(), collate, loss, settings(micro_batch=micro), tmp_path / "b")
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    assert torch.allclose(weights(whole), weights(split), atol=1e-5)


def test_the_loss_is_a_mean_over_tokens_not_over_micro_batches(tmp_path):
    model, data = Tiny(), rows()
    fit(model, data, collate, loss, settings(steps=1, micro_batch=2, order="as_given"), tmp_path)
    by_hand = loss(Tiny(), collate(data[:8]))[0].item()
    mean_of_means = sum(loss(Tiny(), collate(data[i : i + 2]))[0].item() for i in range(0, 8, 2)) / 4
    assert losses(tmp_path)[0] == pytest.approx(by_hand, abs=1e-6)
    assert abs(by_hand - mean_of_means) > 1e-4


def test_components_with_different_denominators(tmp_path):
    """A cross-entropy per token beside a penalty per row: each is a mean over its own items."""

    def two(model, batch):
        ce = loss(model, batch)[0]
        penalty = (model(batch["ids"]).square().mean(dim=(1, 2)) * 0.5).mean()
        return ce + penalty, {"ce": ce, "penalty": penalty, "width/max": float(batch["ids"].shape[1])}

    def count(batch):
        return {"ce": int((batch["labels"][:, 1:] != -100).sum()), "penalty": len(batch["ids"])}

    found, same_width = [], [row for row in rows() if len(row) == 7] * 6
    for micro in (0, 3):
        model = Tiny()
        fit(model, same_width, collate, two, settings(micro_batch=micro), tmp_path / str(micro), count=count)
        found.append((losses(tmp_path / str(micro)), weights(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)


class Killed(Exception):
    pass


def killed_after(calls):
    def dying(model, batch, counter=[0]):  # noqa: B006 - the count must survive between calls
        counter[0] += 1
        if counter[0] > calls:
            raise Killed
        return loss(model, batch)

    return dying


@pytest.mark.parametrize("calls", [1, 6, 9, 11])
def test_a_killed_training_resumes_bit_for_bit(tmp_path, calls):
    whole, broken = Tiny(dropout=0.3), Tiny(dropout=0.3)
    same = settings(schedule="cosine", warmup_steps=3, weight_decay=0.1, log_every=3)
    result = fit(whole, rows(), collate, loss, same, tmp_path / "whole")
    with pytest.raises(Killed):
        fit(broken, rows(), collate, killed_after(calls), same, tmp_path / "broken")
    resumed = Tiny(dropout=0.3)
    again = fit(resumed, rows(), collate, loss, same, tmp_path / "broken")
    assert torch.equal(weights(whole), weights(resumed))
    assert again.resumed_from == 4 * (calls // 4)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")
    assert {**result.row, "seconds": 0} == {**again.row, "seconds": 0}


def test_a_finished_training_is_not_repeated(tmp_path):
    model = Tiny()
    fit(model, rows(), collate, loss, settings(), tmp_path)
    fresh = Tiny()
    fit(fresh, rows(), collate, killed_after(0), settings(), tmp_path)
    assert torch.equal(weights(model), weights(fresh))


def test_another_training_in_the_folder_is_refused(tmp_path):
    fit(Tiny(), rows(), collate, loss, settings(), tmp_path)
    with pytest.raises(RunError, match="another lr"):
        fit(Tiny(), rows(), collate, loss, settings(lr=0.5), tmp_path)
    with pytest.raises(RunError, match="holds a training already"):
        fit(Tiny(), rows(), collate, loss, settings(), tmp_path, resume=False)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tmp_path, caplog):
    def greedy(model, batch):
        if len(batch["ids"]) > 3:
            raise torch.OutOfMemoryError("injected")
        return loss(model, batch)

    roomy, tight = Tiny(), Tiny()
    fit(roomy, rows(), collate, loss, settings(), tmp_path / "a")
    result = fit(tight, rows(), collate, greedy, settings(), tmp_path / "b")
    assert result.micro_batch == 2 and "halved to 2" in caplog.text
    halvings = [row for row in files.read_lines(tmp_path / "b" / "metrics.jsonl") if row.get("event") == "out_of_memory"]
    assert [(row["step"], row["micro_batch"]) for row in halvings] == [(1, 4), (1, 2)]
    assert torch.allclose(weights(roomy), weights(tight), atol=1e-5)

    def hopeless(model, batch):
        raise torch.OutOfMemoryError("injected")

    with pytest.raises(DeviceError, match="micro-batch of 1"):
        fit(Tiny(), rows(), collate, hopeless, settings(), tmp_path / "c")


def test_freezing_groups_and_precision(tmp_path):
    model = Tiny().bfloat16()
    before = model.embed.weight.clone()
    chosen = settings(freeze=["model.embed"], bf16=True, groups=[{"match": "head", "lr": 1e-9, "weight_decay": 0.0}])
    head = model.head.weight.clone()
    fit(model, rows(), collate, loss, chosen, tmp_path)
    assert torch.equal(before, model.embed.weight) and model.embed.weight.dtype == torch.bfloat16
    assert model.norm.weight.dtype == torch.float32 and not torch.equal(model.norm.weight, torch.ones(16))
    assert torch.allclose(head.float(), model.head.weight, atol=1e-6)
    with pytest.raises(SettingsError, match=r"'model.embde'.*Did you mean 'embed"):
        fit(Tiny(), rows(), collate, loss, settings(freeze=["model.embde"]), tmp_path / "b")
    with pytest.raises(SettingsError, match="'haed' matches no parameter"):
        fit(Tiny(), rows(), collate, loss, settings(groups=[{"match": "haed"}]), tmp_path / "c")
    with pytest.raises(SettingsError, match="half precision"):
        fit(Tiny().bfloat16(), rows(), collate, loss, settings(freeze=["embed"]), tmp_path / "d")


def test_validation_chooses_the_best_weights_and_may_stop(tmp_path):
    seen = []

    def validate(model):
        assert not model.training and not torch.is_grad_enabled()
        seen.append(weights(model))
        return {"score": [0.1, 0.9, 0.5][len(seen) - 1], "stop": len(seen) == 3}

    model = Tiny()
    result = fit(model, rows(), collate, loss, settings(steps=40, eval_every=5, load_best=True), tmp_path, validate=validate)
    assert result.stopped and result.steps == 15 and len(seen) == 3
    assert result.best == {"score": 0.9, "step": 10}
    assert torch.equal(weights(model), seen[1])
    again = fit(Tiny(), rows(), collate, killed_after(0), settings(steps=40, eval_every=5, load_best=True), tmp_path, validate=validate)
    assert again.stopped and again.steps == 15


def test_epochs_and_lengths(tmp_path):
    order = []

    def recording(batch):
        order.append([tuple(row) for row in batch])
        return collate(batch)

    data = rows(20)
    chosen = TrainSettings.check(epochs=2.0, global_batch=8, log_every=0, save_every=0)
    result = fit(Tiny(), data, recording, loss, chosen, tmp_path, lengths=[len(row) for row in data])
    assert result.steps == 5 and math.isnan(result.loss)
    assert all([len(row) for row in batch] == sorted(len(row) for row in batch) for batch in order)
    seen = [row for batch in order for row in batch]
    assert sorted(seen) == sorted(2 * [tuple(row) for row in data])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"epochs": 1.0}, "either steps or epochs"),
        ({"steps": 0}, "either steps or epochs"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "either warmup_steps or warmup_ratio"),
        ({"min_lr_ratio": 0.1}, "cosine_with_min_lr"),
        ({"load_best": True}, "needs eval_every"),
        ({"lr": "1e-3"}, "lr = '1e-3'"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"schedule": "cosin"}, "schedule"),
        ({"sharding": "zero3"}, "zero3: not offered: ZeRO-3 gathers weights where a module is called"),
        ({"sharding": "fdsp"}, "sharding = 'fdsp'"),
        ({"processes": 0}, "processes = 0"),
    ],
)
def test_settings_that_cannot_be_meant(wrong, message):
    with pytest.raises(SettingsError, match=message):
        settings(**wrong)


def test_what_cannot_be_trained_is_refused_with_a_sentence(tmp_path):
    with pytest.raises(DataError, match="empty"):
        fit(Tiny(), [], collate, loss, settings(), tmp_path / "a")
    with pytest.raises(TrainingError, match="without a single item"):
        fit(Tiny(), [[1], [2]], collate, loss, settings(), tmp_path / "b")

    def feeding(model, batch):
        return loss(model, batch)

    feeding.feeds_back = True
    with pytest.raises(SettingsError, match="fed back"):
        fit(Tiny(), rows(), collate, feeding, settings(gradient_checkpointing=True), tmp_path / "c")
    with pytest.raises(SettingsError, match="everything is frozen"):
        fit(Tiny(), rows(), collate, loss, settings(freeze=["embed", "norm", "head"]), tmp_path / "d")


def test_zero_without_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs DeepSpeed: pip install -e '.\[deepspeed\]'"):
        fit(Tiny(), rows(), collate, loss, settings(sharding="zero2"), tmp_path)


def test_a_guard_can_be_switched_off(tmp_path):
    fit(Tiny(), rows(), collate, loss, settings(guard=Guard(enabled=False), save_every=0), tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
