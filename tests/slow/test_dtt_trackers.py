"""A gated training reports to real trackers: an offline Weights & Biases run, a TensorBoard folder."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import trainer_targets as targets

pytestmark = pytest.mark.slow


def test_an_offline_wandb_run_holds_numbers_tables_and_histograms(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the extra trackers is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    found = targets.measured("dtt_rl", tmp_path / "run", report_to="wandb")
    summary, run = dict(wandb.run.summary), Path(wandb.run.dir).parent
    wandb.finish()
    assert summary["train/reward"] == pytest.approx(found["rewards"][-1])
    assert {"train/rewards/correctness/mean", "train/gate/mean", "train/gate_histogram_overall"} <= summary.keys()
    assert run.name.startswith("offline-run-") and next(run.glob("run-*.wandb")).stat().st_size > 1000
    examples, *_ = (json.loads(path.read_text()) for path in sorted(run.glob("files/media/table/train/examples_*.json")))
    assert {"prompt", "completion", "correctness", "gate_inside"} <= set(examples["columns"]) and len(examples["data"]) == 8
    progress = [json.loads(path.read_text()) for path in run.glob("files/media/table/train/train_progress_summary_*.json")]
    longest = max(progress, key=lambda table: len(table["data"]))
    assert [row[longest["columns"].index("reward_mean")] for row in longest["data"]] == pytest.approx(found["rewards"])


def test_a_tensorboard_folder_holds_the_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the extra trackers is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    found = targets.measured("dtt_rl", tmp_path / "run", report_to="tensorboard")
    (events,) = tmp_path.rglob("events.out.tfevents*")
    read = EventAccumulator(str(events.parent))
    read.Reload()
    assert [event.value for event in read.Scalars("train/reward")] == pytest.approx(found["rewards"])
    assert "train/gate/inside" in read.Tags()["scalars"]
