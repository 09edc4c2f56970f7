"""Two processes train as one does; nothing is left behind when one of them fails."""

import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import launch_targets as targets

from lab import files
from lab.errors import DataError, DeviceError, OutOfMemory, SettingsError
from lab.launch import launch
from lab.running import memory

pytestmark = pytest.mark.slow
DEEPSPEED = find_spec("deepspeed") is not None
zero = pytest.mark.skipif(not DEEPSPEED, reason="DeepSpeed is not installed: pip install -e '.[deepspeed]'")


def close(one, two):
    return all(one[name] == pytest.approx(two[name], abs=1e-6, rel=1e-5) for name in ("losses", "norms", "gradients", "weights"))


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return targets.train(str(tmp_path_factory.mktemp("one")))


def test_two_processes_give_the_losses_of_one(tmp_path, one):
    two = launch(targets.train, 2, folder=str(tmp_path))
    assert (one["world"], two["world"]) == (1, 2)
    assert len(one["losses"]) == 12 and one["losses"][0] > one["losses"][-1]
    assert close(one, two)

    shutil.rmtree(tmp_path / "checkpoint-12")  # as if killed before: one process continues
    resumed = targets.train(str(tmp_path))
    assert resumed["weights"] == pytest.approx(one["weights"], rel=1e-5)
    assert resumed["losses"][12:] == pytest.approx(one["losses"][4:], abs=1e-6)


@pytest.mark.parametrize("sharding", ["fsdp", pytest.param("zero1", marks=zero), pytest.param("zero2", marks=zero)])
def test_sharded_processes_give_the_losses_of_one_and_their_checkpoints_are_whole(tmp_path, one, sharding):
    def stop(**row):
        if row.get("step") == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        targets.train(str(tmp_path), logger=stop)
    two, again = launch(targets.train_and_resume, 2, folder=str(tmp_path), sharding=sharding)  # goes on where one process stopped
    assert two["world"] == 2 and two["plain"] and again["plain"]
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5) and again["weights"] == pytest.approx(two["weights"], rel=1e-7)
    assert two["losses"] == pytest.approx(one["losses"][4:], abs=1e-6)

    shutil.rmtree(tmp_path / "checkpoint-12")
    resumed = targets.train(str(tmp_path))
    assert resumed["weights"] == pytest.approx(one["weights"], rel=1e-5)


def test_a_step_that_is_not_finite_is_judged_before_the_update_under_every_sharding(tmp_path):
    one = targets.skipping(str(tmp_path / "one"), ["ddp"])["ddp"]
    two = launch(targets.skipping, 2, folder=str(tmp_path / "two"), shardings=["ddp", "fsdp", *(["zero1", "zero2"] if DEEPSPEED else [])])
    for how, found in two.items():
        assert found["skipped"] == one["skipped"] and 1 <= len(one["skipped"]) <= 3, how
        assert found["weights"] == pytest.approx(one["weights"], rel=1e-5), how


@zero
def test_zero_keeps_the_moments_in_pieces_and_stage_two_the_gradients_between_micro_batches():
    one, two = launch(targets.in_pieces, 2)
    whole = one["parameters"]
    assert one["gradients"] == whole and two["gradients"] == pytest.approx(whole / 2, rel=0.05)
    for found in (one, two):
        assert found["moments"] == pytest.approx(whole, rel=0.02)  # two of half of the parameters
        assert found["norms"][0] == pytest.approx(found["norms"][1], rel=1e-5) and found["norms"][0] > 2e-3
        assert found["clipped"] == pytest.approx(1e-3, rel=1e-3)
        assert found["not finite"] == float("inf") and found["unchanged"]


def test_settings_ask_for_processes_and_the_model_here_learns(tmp_path, one):
    rows = []
    two = targets.train(str(tmp_path), processes=2, logger=lambda **row: rows.append(row))
    assert two["world"] == 1 and [row["test/world"] for row in rows if "loss" in row] == [2] * 12
    assert [row["loss"] for row in rows if "loss" in row] == pytest.approx(one["losses"], abs=1e-6)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-5)


@pytest.mark.parametrize("loss", [targets.greedy, targets.hungry])
def test_where_one_of_two_processes_runs_out_of_memory_both_go_on_with_half_the_micro_batch(tmp_path, caplog, monkeypatch, loss):
    monkeypatch.setattr(memory, "kills", itertools.count().__next__)  # as if the system ended a process whenever one dies
    one = targets.train(str(tmp_path / "one"), dropout=0.0, loss=loss)
    two = targets.train(str(tmp_path / "two"), dropout=0.0, processes=2, loss=loss)
    rows = files.read_lines(tmp_path / "two" / "metrics.jsonl")
    assert [row for row in rows if row.get("event")] == [
        {"event": "out_of_memory", "step": 4, "micro_batch": 1},
        {"event": "resume", "step": 4},
    ]
    assert "all processes go on from step 4 with a micro-batch of 1" in caplog.text
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-6) and two["weights"] == pytest.approx(one["weights"], rel=1e-5)


def test_two_machines_of_one_process_train_as_one_does(tmp_path, one, monkeypatch):
    """The second machine is a process that knows the address of the first and nothing else."""
    address = f"127.0.0.1:{free_port()}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "lab.launch", "--address", address, "--nodes", "2", "--node-rank", "1"]
    other = subprocess.Popen(command, env=environment)
    monkeypatch.setenv("LAB_NODES", "2")
    monkeypatch.setenv("LAB_ADDRESS", address)
    try:
        two = launch(targets.train, 1, folder=str(tmp_path))
    finally:
        other.send_signal(signal.SIGINT)
    assert other.wait(120) == 0
    assert two["world"] == 2 and close(one, two)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_an_evaluation_shared_by_processes_is_that_of_one_even_where_one_of_them_died(tmp_path):
    alone = targets.asked(tmp_path / "one")
    with pytest.raises(DeviceError, match="died"):
        targets.asked(tmp_path / "two", processes=2, dies_after=9)
    left = {path.name: len(files.read_lines(path)) for path in (tmp_path / "two").glob("part-*.jsonl")}
    assert left["part-1.jsonl"] == 9
    together = targets.asked(tmp_path / "two", processes=2)

    def told(result):
        return [{name: value for name, value in row.items() if name != "processing_time"} for row in result.rows]

    assert told(together) == told(alone) and together.row() == alone.row()
    rows = files.read_lines(tmp_path / "two" / "samples.jsonl")
    assert len(rows) == 120 and not list((tmp_path / "two").glob("part-*"))
    answered = {(row["id"], row["sample"]): row["processing_time"] for row in rows}
    assert targets.asked(tmp_path / "two", processes=2).rows == together.rows  # nothing is asked again
    assert {(row["id"], row["sample"]): row["processing_time"] for row in files.read_lines(tmp_path / "two" / "samples.jsonl")} == answered


def test_gates_and_states_of_an_evaluation_shared_by_processes_are_those_of_one(tmp_path):
    alone, together = targets.gated(tmp_path / "one"), targets.gated(tmp_path / "two", processes=2)
    assert len(list((tmp_path / "two").glob("gates-*.jsonl"))) == 2 and together[2] == alone[2]
    torch.testing.assert_close(together[3:], alone[3:])
    assert {name: len(values) for name, values in together[1].items()} == {name: len(values) for name, values in alone[1].items()}


def test_the_error_of_one_process_is_raised_here_and_ends_all(tmp_path):
    began = time.monotonic()
    with pytest.raises(DataError, match="line 7 has no answer"):
        launch(targets.complain, 2)
    with pytest.raises(DeviceError, match=r"killed \(SIGKILL\).* The others were stopped") as caught:
        launch(targets.die, 2, number=signal.SIGKILL)
    assert not isinstance(caught.value, OutOfMemory), "nothing tells that it was for want of memory"
    assert time.monotonic() - began < 500, "before the other process has slept enough"


PARENT = """
import sys
sys.path.insert(0, sys.argv[1])
import launch_targets
from lab.launch import launch
launch(launch_targets.wait, 2, folder=sys.argv[2])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupt_or_the_end_of_the_one_that_started_them_stops_all_processes(tmp_path, number):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(Path(__file__).parent), str(tmp_path)], stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("rank-*"))) < 2 and parent.poll() is None:
        time.sleep(0.1)
    workers = [psutil.Process(int(note.read_text())) for note in tmp_path.glob("rank-*")]
    assert len(workers) == 2
    parent.send_signal(number)
    assert parent.wait(120) == -number
    _, alive = psutil.wait_procs(workers, 120)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_what_cannot_be_launched(monkeypatch):
    with pytest.raises(SettingsError, match="cannot be handed"):
        launch(print, 2, file=(i for i in "x"))
    with pytest.raises(SettingsError, match="need the address"):
        launch(targets.train, 2, nodes=2, folder="x")
    with pytest.raises(SettingsError, match="LAB_NODES"):
        monkeypatch.setenv("LAB_NODES", "two")
        launch(targets.train, 2, folder="x")


def test_processes_that_came_some_other_way_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="2 processes were asked for, 1 came"):
        targets.train(str(tmp_path))
