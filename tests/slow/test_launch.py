"""Two processes train as one does; nothing is left behind when one of them fails."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import launch_targets as targets

from lab.errors import DataError, DeviceError, SettingsError
from lab.launch import launch

pytestmark = pytest.mark.slow


def close(one, two):
    return all(one[name] == pytest.approx(two[name], abs=1e-6, rel=1e-5) for name in ("losses", "norms", "gradients", "weights"))


def test_two_processes_give_the_losses_of_one(tmp_path):
    one = launch(targets.train, 1, folder=str(tmp_path / "one"))
    two = launch(targets.train, 2, folder=str(tmp_path / "two"))
    assert (one["world"], two["world"]) == (1, 2)
    assert len(one["losses"]) == 12 and one["losses"][0] > one["losses"][-1]
    assert close(one, two)

    (tmp_path / "two" / "checkpoint-12").rename(tmp_path / "checkpoint-12")  # as if killed before: one process continues
    resumed = launch(targets.train, 1, folder=str(tmp_path / "two"))
    assert resumed["weights"] == pytest.approx(one["weights"], rel=1e-5)
    assert resumed["losses"][12:] == pytest.approx(one["losses"][4:], abs=1e-6)


def test_the_error_of_one_process_is_raised_here_and_ends_all(tmp_path):
    began = time.monotonic()
    with pytest.raises(DataError, match="line 7 has no answer"):
        launch(targets.complain, 2)
    with pytest.raises(DeviceError, match="died"):
        launch("launch_targets:die", 2)
    assert time.monotonic() - began < 120


def test_an_interrupt_stops_all_processes(tmp_path):
    def interrupt():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        launch(targets.wait, 2, folder=str(tmp_path))
    time.sleep(0.5)
    for note in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(note.read_text()), 0)


def test_what_cannot_be_launched():
    with pytest.raises(SettingsError, match="put the function into a module"):
        launch(lambda: 1, 2)
    with pytest.raises(SettingsError, match="cannot be handed"):
        launch(targets.train, 2, folder=Path("x"))
    with pytest.raises(SettingsError, match="need the address"):
        launch(targets.train, 2, nodes=2, folder="x")
