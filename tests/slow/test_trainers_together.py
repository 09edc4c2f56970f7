"""Every trainer gives with two gloo processes, under every sharding, what it gives with one: same global batch, same losses."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import trainer_targets as targets

import lab
from lab import launch as launching
from lab.training import together

pytestmark = pytest.mark.slow
there = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'")
SHARDINGS = ("ddp", "fsdp", pytest.param("zero1", marks=there), pytest.param("zero2", marks=there))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    shardings = ("ddp", "fsdp", *(("zero1", "zero2") if find_spec("deepspeed") else ()))
    return launching.launch(targets.every, 2, folder=str(tmp_path_factory.mktemp("two")), shardings=shardings)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return targets.every(tmp_path_factory.mktemp("one"), ("ddp",))


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("name", targets.TRAINERS)
def test_two_processes_train_as_one_does(one, two, name, sharding):
    alone, together = one["ddp", name], two[sharding, name]
    assert (alone["world"], together["world"]) == (1, 2)
    assert len(alone["gradients"]) >= 2 and max(alone["gradients"]) > 0
    for what in ("losses", "rewards", "gradients", "weights"):
        assert together[what] == pytest.approx(alone[what], abs=2e-6, rel=2e-4), what


@pytest.mark.parametrize("sharding", SHARDINGS[1:])
@pytest.mark.parametrize("name", ["coconut", "adaptive", "colar", "dtt_rl"])
def test_what_was_trained_in_pieces_opens(two, name, sharding):
    found = two[sharding, name]
    weights = dict(lab.load(found["saved"]).named_parameters())
    assert sorted(float(p.detach().double().square().sum()) for p in weights.values()) == pytest.approx(sorted(found["weights"]), rel=1e-6)


@pytest.mark.parametrize("name", targets.TRAINERS)
def test_the_training_can_be_handed_to_other_processes_and_its_weights_come_back(one, name, tmp_path, monkeypatch):
    """As `launch` does it, files included, but without the seconds that a start of processes takes."""

    def handed(function, processes, on_row=None, **arguments):
        launching._save((function, arguments), tmp_path / "asked")
        function, arguments = launching._read(tmp_path / "asked")
        launching._save(function(**arguments), tmp_path / "result")
        return launching._read(tmp_path / "result")

    monkeypatch.setattr(together, "launch", handed)
    monkeypatch.setattr(together, "send_row", lambda row: targets.files.append_line(tmp_path / "training" / "metrics.jsonl", row))
    found = targets.measured(name, tmp_path / "training", processes=2)
    for what in ("losses", "gradients", "weights"):
        assert found[what] == pytest.approx(one["ddp", name][what], abs=1e-7, rel=1e-6), what


@pytest.mark.parametrize("name", targets.TRAINERS)
def test_every_trainer_reports_to_tensorboard(one, name, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra trackers is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    found = targets.measured(name, tmp_path / "training", report_to="tensorboard")
    told = []
    for path in tmp_path.rglob("events.out.tfevents*"):
        events = EventAccumulator(str(path))
        events.Reload()
        told += [event.value for event in events.Scalars("train/loss")] if "train/loss" in events.Tags()["scalars"] else []
    assert sorted(told) == pytest.approx(sorted(found["losses"]), rel=1e-5, abs=1e-9)
    assert found["losses"] == pytest.approx(one["ddp", name]["losses"], rel=1e-5, abs=1e-7)


def test_an_offline_wandb_run_holds_the_loss(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra trackers is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    found = targets.measured("codi", tmp_path / "training", report_to="wandb")
    summary, place = dict(wandb.run.summary), Path(wandb.run.dir).parent  # an earlier session in this process keeps its folder
    wandb.finish()
    assert summary["train/loss"] == pytest.approx(found["losses"][-1])
    assert place.name.startswith("offline-run-") and list(place.glob("*.wandb"))
