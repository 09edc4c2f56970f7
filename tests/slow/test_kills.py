"""Kill -9 at random moments of a run, again and again until it is done: the result is that of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time

from lab.pipeline import run_recipe
from lab.records import StepRecord, results_of
from lab.runs import open_run

KILLS = 20
SLOW = {"count": "8", "pause_s": "0.3"}


def attempt(folder, seconds):
    """Starts or resumes the run and kills it after `seconds`: "killed", "done", or "refused" while an orphaned kernel still ends."""
    chosen = [part for name, value in SLOW.items() for part in ("-p", f"{name}={value}")]
    command = [sys.executable, "-m", "lab.cli", "--quiet", "run", "mini", "--recipe", "toy", "--run", str(folder), "--resume", *chosen]
    process = subprocess.Popen(command, env={**os.environ, "LAB_WARM": "0"}, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        _, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return "killed"
    assert process.returncode == 0 or "running already" in error, error
    return "refused" if process.returncode else "done"


def test_a_run_killed_at_random_moments_ends_as_if_nothing_had_happened(bench, tmp_path):
    whole = run_recipe("mini", "toy", {**SLOW, "pause_s": "0.0"})
    moments, kills = random.Random(0), 0
    while kills < KILLS:
        folder = tmp_path / f"killed-{kills}"
        outcome = ""
        while outcome != "done":
            outcome = attempt(folder, moments.uniform(0.3, 9.0))
            kills += outcome == "killed"
            time.sleep(0.5)
        assert results_of(folder) == results_of(whole)
        assert [line["step"] for line in StepRecord(folder / "draw").metrics] == list(range(8))
        assert (folder / "draw" / "numbers.txt").read_text() == (whole / "draw" / "numbers.txt").read_text()
        assert not list(folder.glob(".*.partial"))
        assert {step["status"] for step in open_run(folder).manifest["steps"].values()} == {"done"}
