"""The guard on a Trainer that is not ours: its own data order, draws and schedule (as TRL's trainers have)."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from lab import files
from lab.errors import CheckpointError
from lab.train import TrainSettings
from lab.training.stability import Detector, Guard, Recovery, Ring, Verdict
from lab.training.stability.guarded import Guarded, load_learned, train_guarded

torch.set_num_threads(1)
GUARD = Guard(history=40, enough=10, spike_count=4, spike_window=8, margin=5, region=50)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lines, self.drop = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2)), nn.Dropout(0.2)
        self.register_buffer("scale", torch.ones(2))

    def forward(self, x, y):
        return {"loss": (self.drop(self.lines(x)) * self.scale - y).square().mean()}


DATA = [{"x": torch.randn(4, generator=torch.Generator().manual_seed(i)), "y": torch.tensor([1.0, -1.0])} for i in range(30)]


class Killed(Exception):
    pass


class Plain(Guarded, Trainer):
    """Reports its loss; sick from step `sick` on until the first rollback; dies at step `dies`."""

    sick, dies = 10**9, 10**9

    def compute_loss(self, *args, **kwargs):
        step = self.state.global_step + 1
        if step == self.dies:
            raise Killed
        loss = super().compute_loss(*args, **kwargs)
        seen = loss * (1e8 if step >= self.sick and not self.recovery.events else 1)
        self.signals = {"loss": seen.detach()}
        rates.append((step, self.recovery.generation, self.optimizer.param_groups[0]["lr"], float(loss.detach())))
        return loss


rates = []


def train(folder, steps=40, sick=10**9, dies=10**9, save_every=10):
    model = Model()
    ring, recovery = Ring(folder, probation=10), Recovery.read(folder, GUARD)

    def build():
        args = TrainingArguments(
            output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.05, lr_scheduler_type="cosine",
            save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, warmup_steps=4,
        )  # fmt: skip
        trainer = Plain(model=model, args=args, train_dataset=DATA)
        trainer.sick, trainer.dies = sick, dies
        trainer.watch(ring, recovery, Detector(GUARD), save_every)
        return trainer

    rates.clear()
    trainer = train_guarded(build, ring, GUARD, recovery, lambda *_: None)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), trainer


@pytest.mark.parametrize("dies", [5, 23, 31])
def test_resume_is_bit_for_bit(tmp_path, dies):
    whole, _ = train(tmp_path / "whole")
    with pytest.raises(Killed):
        train(tmp_path / "broken", dies=dies)
    resumed, trainer = train(tmp_path / "broken")
    assert rates[0][0] == 10 * ((dies - 1) // 10) + 1
    assert torch.equal(whole, resumed) and trainer.state.global_step == 40


def test_rollback_repeats_the_data_with_new_draws(tmp_path):
    first, _ = train(tmp_path / "healthy")
    healthy = list(rates)
    weights, trainer = train(tmp_path / "sick", sick=28)
    events = files.read_lines(tmp_path / "sick" / "divergence.jsonl")
    assert [(event["onset"], event["step"], event["resumed"]) for event in events] == [(28, 31, 20)]
    again = [(step, rate) for step, generation, rate, _ in rates if generation == 1]
    assert again == [(step, rate) for step, _, rate, _ in healthy if step > 20], "the same schedule"
    losses = {g: [loss for s, own, _, loss in rates if own == g and 20 < s <= 30] for g in (0, 1)}
    assert losses[0] != losses[1], "other dropout"
    assert trainer.state.global_step == 40 and not torch.equal(first, weights)

    with pytest.raises(Killed):
        train(tmp_path / "killed", sick=28, dies=36)
    # the second life starts at the checkpoint after the rollback, with the draws of that rollback
    again, _ = train(tmp_path / "killed", sick=28)
    assert torch.equal(weights, again)


def test_weights_of_another_model_are_refused(tmp_path):
    train(tmp_path, steps=10)
    path = tmp_path / "checkpoint-10" / "weights.safetensors"
    other = Model()
    other.lines[2] = nn.Linear(8, 3)
    with pytest.raises(CheckpointError, match="'lines.2.bias' is missing, unexpected or of another shape"):
        load_learned(other, path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="Cannot read .*weights.safetensors"):
        load_learned(Model(), path)


def test_trainings_with_a_teacher_that_learns_are_judged_by_their_cross_entropies(tmp_path, monkeypatch):
    from lab.methods.adaptive import stages, toy
    from lab.methods.adaptive.config import Distil
    from lab.methods.codi import train as codi

    given, how = [], TrainSettings(steps=1, device="cpu")
    for module in (stages, codi):
        monkeypatch.setattr(module, "fit", lambda model, rows, batch_of, loss, settings, *_, **__: given.append(settings.guard.level_on))
    stages.train_sft(stages.start_model("toy", {}, {}, 0), toy.examples(4, 0), Distil(mode="cot"), how, tmp_path)
    codi.train(None, [], how, tmp_path)
    codi.train(None, [], how, tmp_path, arm="cot")
    codi.train(None, [], how.but(guard=how.guard.but(level_on=["distill"])), tmp_path)
    assert given == [["teacher_ce", "student_ce"], ["ce", "ref_ce"], ["loss"], ["distill"]]


def test_a_stretch_of_warnings_is_one():
    trainer = Guarded()
    trainer._warned, trainer.detector, trainer.state = {}, Detector(Guard()), SimpleNamespace(global_step=0)
    told = []
    for step in (*range(100, 180), *range(400, 410)):
        trainer.state.global_step = step
        told += [step] * trainer._first_warning(Verdict("warn", "gradient norm", step - 9))
    for step in (200, 300, 400):
        trainer.state.global_step = step
        told += [step] * trainer._first_warning(Verdict("warn", "overfit", 150))
    assert told == [100, 400, 200]
