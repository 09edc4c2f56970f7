"""One Ctrl-C or SIGTERM at any moment ends a run, leaves no process and no folder behind, and the run goes on to the same result."""

import os
import random
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lab import sweep
from lab.pipeline import run_recipe
from lab.running import pool
from lab.running.engines import Local, Needs
from lab.running.records import StepRecord, results_of

pytestmark = pytest.mark.slow
SEED = int(os.environ.get("LAB_SOAK_SEED", "0"))
MOMENTS = 5


def start(folder):
    command = [sys.executable, "-m", "lab.cli", "run", "mini", "--recipe", "toy", "--resume", "--run", str(folder), "-p", "pause_s=0.3"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def everything_below(process):
    return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]


def gone(processes, seconds=60.0):
    _, alive = psutil.wait_procs(processes, seconds)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_always_suffices(bench, tmp_path, monkeypatch, record_property, number):
    monkeypatch.delenv("LAB_WARM", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    draw, folder = random.Random(SEED), tmp_path / "run"
    began = time.monotonic()
    assert start(tmp_path / "whole").wait(900) == 0
    took, stopped = time.monotonic() - began, 0
    for _ in range(MOMENTS):
        process = start(folder)
        time.sleep(draw.uniform(0.3, 0.9 * took))
        if process.poll() is None:
            below = everything_below(process)
            process.send_signal(number)
            _, error = process.communicate(timeout=300)
            assert process.returncode in (130, 0, -number), error
            said = "go on with: lab run mini" in error or error.strip() in ("", "lab: Stopped.")  # the second: before the run began
            assert process.returncode != 130 or said, error
            assert gone(below) == []
            stopped += process.returncode != 0
    assert start(folder).wait(900) == 0
    assert results_of(folder) == results_of(tmp_path / "whole")
    assert not list((tmp_path / "tmp").glob("lab-warm-*"))
    record_property("interrupts", stopped)


def test_a_worker_that_dies_is_taken_up_and_the_others_do_not_notice(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("LAB_WARM", "0")
    names = ("a", "b")
    tasks = [pool.Task(name, "mini", "toy", {"seed": str(i), "pause_s": "0.1"}, tmp_path / name) for i, name in enumerate(names)]

    class Deadly(Local):
        """Kills the first attempt at `a` once it has something to lose."""

        def attempt(self, command):
            if str(tasks[0].folder) in command and not (tasks[0].folder / ".draw.partial").exists():
                slower = {**os.environ, "MINI_SLOWER": "6000"}
                process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=slower)
                while not (tasks[0].folder / ".draw.partial" / "numbers.txt").exists() and process.poll() is None:
                    time.sleep(0.1)
                process.kill()
                return f"ended by signal {-process.wait()}"
            return super().attempt(command)

    assert pool.run_tasks("t", tasks, Deadly(2), retries=1) == {}
    assert [StepRecord(task.folder / "draw").info["attempts"] for task in tasks] == [2, 1]
    for i, task in enumerate(tasks):
        assert results_of(task.folder) == results_of(run_recipe("mini", "toy", {"seed": str(i)}))


def test_a_sweep_on_a_disk_that_cannot_be_written(bench, tmp_path, monkeypatch):
    if os.geteuid() != 0:
        pytest.skip("mounting read-only needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        environment = {**os.environ, "LAB_OUTPUTS": str(disk / "outputs")}
        for command in (["run", "mini"], ["sweep", "mini", "-p", "seed=0"]):
            done = subprocess.run([sys.executable, "-m", "lab.cli", *command], capture_output=True, text=True, env=environment)
            assert (done.returncode, done.stdout) == (3, "") and "the file system is read-only; choose another folder" in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_memory_of_a_run_is_also_that_of_its_warm_kernels(bench, monkeypatch):
    """The run itself has 0.2 GiB; its kernel, which is not its child, takes it beyond what it was given."""
    monkeypatch.delenv("LAB_WARM", raising=False)
    result = sweep.run_sweep("mini", "toy-claims", {"seed": "0", "pause_s": "30"}, Local(needs=Needs(memory=0.3)))
    assert list(result.failed.values()) == ["took more than the 0.3 GiB it was given and was stopped"]
