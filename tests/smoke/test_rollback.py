"""Divergence injected into a real training: skipped, rolled back, continued, reported (distill.md 2C.5)."""

import math

import pytest
import torch
from torch import nn

from lab import files
from lab.errors import TrainingError
from lab.train import TrainSettings, fit
from lab.training.stability import kept_and_discarded

torch.set_num_threads(1)


class Tiny(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.drop, self.head = nn.Embedding(7, 8), nn.Dropout(0.1), nn.Linear(8, 7)
        self.to(dtype)

    def forward(self, ids):
        return self.head(self.drop(self.embed(ids)))


DATA = [[i % 7, (2 * i + 1) % 7] for i in range(35)]


def collate(rows):
    ids = torch.tensor(rows)
    return {"ids": ids, "labels": ids}


class Poison:
    """Two loss components; for 60 calls from call `first` on the second is 1000 times too large, until a rollback cures it."""

    def __init__(self, folder, first=10**9, length=60, factor=1000.0):
        self.folder, self.first, self.length, self.factor = folder, first, length, factor
        self.seen = []

    @property
    def sick(self):
        cured = any(event["kind"] == "rollback" for event in files.read_lines(self.folder / "divergence.jsonl"))
        return self.first <= len(self.seen) < self.first + self.length and not cured

    def __call__(self, model, batch):
        logits = model(batch["ids"])[:, 0]
        ce = nn.functional.cross_entropy(logits.float(), batch["ids"][:, 1])
        penalty = logits.float().square().mean() * 0.1 + 0.5
        self.seen.append((len(batch["ids"]), float(logits.detach().float().sum())))
        if self.sick:
            penalty = penalty * self.factor
        return ce + penalty, {"ce": ce, "penalty": penalty, "logits/max": logits.max()}


def settings(**changes):
    return TrainSettings.check(**{"steps": 600, "global_batch": 5, "lr": 1e-3, "log_every": 1, "save_every": 50, "clip": 5.0, **changes})


def weights(model):
    return torch.cat([p.detach().float().flatten() for p in model.parameters()])


def test_a_nonfinite_update_is_skipped_and_the_weights_stay(tmp_path):
    seen = []

    def remember(model):
        seen.append(weights(model))
        return {"entropy": 0.0}

    poison = Poison(tmp_path, first=30, length=1, factor=math.nan)
    result = fit(Tiny(), DATA, collate, poison, settings(steps=40, eval_every=1), tmp_path, validate=remember)
    assert result.steps == 40 and (result.skipped, result.rollbacks) == (1, 0)
    assert torch.equal(seen[29], seen[28]) and not torch.equal(seen[30], seen[29])
    assert all(torch.isfinite(w).all() for w in seen)
    rows = {row["step"]: row for row in files.read_lines(tmp_path / "metrics.jsonl") if "lr" in row}
    assert rows[30]["skipped"] == 1 and "loss" not in rows[30] and "skipped" not in rows[31]


def test_a_spike_leads_back_to_the_right_checkpoint_and_the_training_ends_on_time(tmp_path):
    model = Tiny()
    result = fit(model, DATA, collate, Poison(tmp_path, first=301), settings(), tmp_path)
    assert result.steps == 600 and result.rollbacks == 1
    event = next(event for event in result.events if event["kind"] == "rollback")
    assert (event["rule"], event["onset"], event["step"], event["attempt"]) == ("spike of penalty", 301, 320, 1)
    assert event["resumed"] == 50, "the newest that was healthy 50 steps before the onset"
    assert "logits/max" in event["extras"]
    kept, discarded = kept_and_discarded(files.read_lines(tmp_path / "metrics.jsonl"))
    assert [row["step"] for row in kept] == list(range(1, 601))
    assert [row["step"] for row in discarded[0]] == list(range(51, 320))
    assert max(row["penalty"] for row in kept) < 10
    assert max(row["penalty"] for row in discarded[0]) > 100


def test_the_only_checkpoint_on_probation_means_back_to_the_start(tmp_path):
    result = fit(Tiny(), DATA, collate, Poison(tmp_path, first=121), settings(steps=250, save_every=100), tmp_path)
    assert result.steps == 250 and result.events[-1]["resumed"] == 0


def test_a_rollback_repeats_the_data_with_other_draws(tmp_path):
    poison = Poison(tmp_path / "a", first=121)
    fit(Tiny(), DATA, collate, poison, settings(steps=250, save_every=0), tmp_path / "a")
    again = poison.seen[140:]
    assert poison.seen[0][1] != again[0][1], "another dropout mask"

    class Silent(Tiny):
        def forward(self, ids):
            return self.head(self.embed(ids))

    poison = Poison(tmp_path / "b", first=121)
    fit(Silent(), DATA, collate, poison, settings(steps=250, save_every=0), tmp_path / "b")
    assert poison.seen[:100] == poison.seen[140:240], "the same data"


def test_three_attempts_get_gentler_then_it_stops_with_a_report(tmp_path):
    model = Tiny(torch.bfloat16)
    with pytest.raises(TrainingError, match=r"3 rollbacks .*attempt 2 from step 0 failed by spike of penalty.*divergence.jsonl"):
        fit(model, DATA, collate, Sticky(tmp_path), settings(steps=400, save_every=0, stability="paper"), tmp_path)
    events = [event for event in files.read_lines(tmp_path / "divergence.jsonl") if event["kind"] != "warning"]
    assert [event["kind"] for event in events] == ["rollback"] * 3 + ["gave up"]
    assert [event["attempt"] for event in events[:3]] == [1, 2, 3]
    assert [event["lr_scale"] for event in events[:3]] == [1.0, 0.7, 0.5]
    assert next(model.parameters()).dtype == torch.float32, "the last attempt trains in float32"
    rows = [row for row in files.read_lines(tmp_path / "metrics.jsonl")]
    starts = [index for index, row in enumerate(rows) if row.get("event") == "rollback"]
    assert rows[starts[1] + 1]["lr"] == pytest.approx(1e-3 * 0.7 / 200), "a new warm-up"


class Sticky(Poison):
    """Diverges again after every rollback, at the same step."""

    @property
    def sick(self):
        return len(self.seen) % 140 in (*range(121, 140), 0)


def test_a_training_killed_after_a_rollback_remembers_it(tmp_path):
    class Killed(Exception):
        pass

    class Dying(Poison):
        def __call__(self, model, batch):
            if len(self.seen) == 340:
                raise Killed
            return super().__call__(model, batch)

    whole, broken = Tiny(), Tiny()
    fit(whole, DATA, collate, Poison(tmp_path / "whole", first=301), settings(), tmp_path / "whole")
    with pytest.raises(Killed):
        fit(broken, DATA, collate, Dying(tmp_path / "broken", first=301), settings(), tmp_path / "broken")
    fit(broken, DATA, collate, Poison(tmp_path / "broken"), settings(), tmp_path / "broken")
    assert torch.equal(weights(whole), weights(broken))
