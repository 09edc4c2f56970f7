"""kill -9 at random moments of a training, an evaluation and a whole pipeline: resumed, they end as if nothing had happened.

LAB_SOAK_SEED draws other moments (see benchmarks/soak.py, which repeats these tests and adds up what they counted).
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from lab import files
from lab.errors import LabError
from lab.running import kernels
from lab.running.records import read_metrics
from lab.training.stability import kept_and_discarded

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SEED = int(os.environ.get("LAB_SOAK_SEED", "0"))
KILLS = 20
PROGRAM = "import sys, json; sys.path.insert(0, sys.argv[1]); import launch_targets as t; {call}"


def command(call):
    return [sys.executable, "-c", PROGRAM.format(call=call), str(HERE)]


def run_to_the_end(call):
    subprocess.run(command(call), check=True, timeout=2000)  # seconds, unless the machine is very busy


def kill_at(call, path, lines):
    """Starts `call`, which is killed once `path` has so many lines, wherever it then is."""
    done = subprocess.run(command(f"t.die_at({str(path)!r}, {lines}); {call}"), timeout=2000)
    assert done.returncode == -signal.SIGKILL


def test_a_training_killed_again_and_again(tmp_path, record_property):
    def call(name):
        return f"t.train({str(tmp_path / name)!r}, steps=1200, save_every=100, log_every=1)"

    run_to_the_end(call("whole"))
    draw, path, seen = random.Random(SEED), tmp_path / "broken" / "metrics.jsonl", 0
    for _ in range(4):
        seen += draw.randint(60, 260)
        kill_at(call("broken"), path, seen)
        seen = path.read_bytes().count(b"\n")
    record_property("kills of a training alone", 4)
    run_to_the_end(call("broken"))
    curves = [[row["loss"] for row in kept_and_discarded(files.read_lines(tmp_path / n / "metrics.jsonl"))[0]] for n in ("whole", "broken")]
    assert len(curves[0]) == 1200 and curves[0] == curves[1]
    weights = [(tmp_path / name / "checkpoint-1200" / "weights.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "broken").glob(".checkpoint-*"))


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.pt", "random.pt", "trainer_state.json", "training.json"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_truncated_checkpoint_is_named_and_without_it_training_resumes(tmp_path, name, share):
    import launch_targets

    whole = launch_targets.train(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-12", ignore_errors=True)
    (last,) = tmp_path.glob("checkpoint-4")
    content = (last / name).read_bytes()
    (last / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(LabError, match=rf"checkpoint-4/{name}") as caught:
        launch_targets.train(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    shutil.rmtree(last)
    again = launch_targets.train(tmp_path)
    assert again["weights"] == whole["weights"]


def test_an_evaluation_killed_again_and_again(tmp_path, record_property):
    def call(name):
        return f"t.ask({str(tmp_path / name)!r})"

    run_to_the_end(call("whole"))
    path = tmp_path / "broken" / "samples.jsonl"
    for lines in (3, 30, 31, 75):
        kill_at(call("broken"), path, lines)
    record_property("kills of an evaluation alone", 4)
    run_to_the_end(call("broken"))
    answers = []
    for name in ("whole", "broken"):
        rows = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        assert len(rows) == len({(row["id"], row["sample"]) for row in rows}) == 120
        answers.append(sorted((row["id"], row["sample"], row["output"], row["is_correct"]) for row in rows))
    assert answers[0] == answers[1]


PIPELINE = ["run", "latenttts", "--recipe", "smoke", "-p", "steps=6", "-p", "save_every=1", "--resume", "--run"]


def start_pipeline(folder):
    (folder / ".live.json").unlink(missing_ok=True)
    command = [sys.executable, "-m", "lab.cli", "--quiet", *PIPELINE, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kernel_servers():
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it may be ending
            if "lab.running.kernels" in child.cmdline():
                yield child


def kill_somewhere(process, folder, draw):
    """Kills the command, its kernel, or both; returns the step that was running and whether the run had ended all the same."""
    phase = "starting"
    with contextlib.suppress(OSError, ValueError):
        phase = json.loads((folder / ".live.json").read_text())["step"].split()[0]
    kernel = [child.pid for server in kernel_servers() for child in server.children()]
    for pid in draw.choice([[process.pid], kernel or [process.pid], [process.pid, *kernel]]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert process.wait(300) in (-signal.SIGKILL, 1, 0), process.stderr.read()
    return phase, process.returncode == 0  # a kernel may have been killed when it had done its work


def what_came_out(folder):
    """{file: content} of the steps: every number, sample, checkpoint and picture, without times and what only serves to resume."""
    found = {}
    for path in sorted(folder.glob("[!.]*/**/*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".safetensors", ".csv", ".svg", ".npz") or path.name == "results.json":
            found[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            rows = read_metrics(path.parent) if path.name == "metrics.jsonl" else files.read_lines(path)
            rows = [row for row in rows if "event" not in row]  # that it was resumed is noted there
            found[name] = [{key: value for key, value in row.items() if key not in ("time", "seconds")} for row in rows]
    return found


def test_a_pipeline_killed_at_twenty_random_moments(tmp_path, record_property, monkeypatch):
    monkeypatch.delenv("LAB_WARM", raising=False)
    draw, phases, done = random.Random(SEED), Counter(), [tmp_path / "0"]
    before, slower = "", 1.0
    with kernels.server():
        began = time.monotonic()
        assert start_pipeline(tmp_path / "whole").wait(1500) == 0
        took = time.monotonic() - began
        while sum(phases.values()) < KILLS:
            process, ended = start_pipeline(done[-1]), True
            try:
                assert process.wait(slower * draw.uniform(0.05, 0.4) * took) == 0, process.stderr.read()
            except subprocess.TimeoutExpired:
                phase, ended = kill_somewhere(process, done[-1], draw)
                phases[phase] += 1
                slower, before = slower * 1.3 if phase == before else 1.0, phase  # for a machine that has become slower meanwhile
            if ended:
                done.append(tmp_path / str(len(done)))
        assert start_pipeline(done[-1]).wait(1500) == 0
    wanted = what_came_out(tmp_path / "whole")
    for folder in done:
        came = what_came_out(folder)
        assert sorted(came) == sorted(wanted)
        assert [name for name in wanted if came[name] != wanted[name]] == []
        assert not list(folder.glob(".*.partial")) and (folder / "report.html").exists()
    assert len(phases) >= 3, "the moments lie in several steps"
    for phase, count in phases.items():
        record_property(f"kills during {phase}", count)
