"""kill -9 at random moments of a training and of an evaluation: resumed, they end as if nothing had happened."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import files
from lab.stability import kept_and_discarded

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
PROGRAM = "import sys, json; sys.path.insert(0, sys.argv[1]); import launch_targets as t; {call}"


def start(call):
    return subprocess.Popen([sys.executable, "-c", PROGRAM.format(call=call), str(HERE)])


def run_to_the_end(call):
    process = start(call)
    assert process.wait(300) == 0


def kill_at(call, path, lines):
    """Starts `call` and kills it once `path` has so many lines."""
    process = start(call)
    end = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < end:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9, "it ended before it could be killed"


def test_a_training_killed_again_and_again(tmp_path):
    def call(name):
        return f"t.train({str(tmp_path / name)!r}, steps=1200, save_every=100, log_every=1)"

    run_to_the_end(call("whole"))
    draw, path, seen = random.Random(0), tmp_path / "broken" / "metrics.jsonl", 0
    for _ in range(4):
        seen += draw.randint(60, 260)
        kill_at(call("broken"), path, seen)
        seen = path.read_bytes().count(b"\n")
    run_to_the_end(call("broken"))
    curves = [[row["loss"] for row in kept_and_discarded(files.read_lines(tmp_path / n / "metrics.jsonl"))[0]] for n in ("whole", "broken")]
    assert len(curves[0]) == 1200 and curves[0] == curves[1]
    weights = [(tmp_path / name / "checkpoint-1200" / "weights.safetensors").read_bytes() for name in ("whole", "broken")]
    assert weights[0] == weights[1]
    assert not list((tmp_path / "broken").glob(".checkpoint-*"))


def test_an_evaluation_killed_again_and_again(tmp_path):
    def call(name):
        return f"t.ask({str(tmp_path / name)!r})"

    run_to_the_end(call("whole"))
    path = tmp_path / "broken" / "samples.jsonl"
    for lines in (3, 30, 31, 75):
        kill_at(call("broken"), path, lines)
    run_to_the_end(call("broken"))
    answers = []
    for name in ("whole", "broken"):
        rows = [json.loads(line) for line in (tmp_path / name / "samples.jsonl").read_text().splitlines()]
        assert len(rows) == len({(row["id"], row["sample"]) for row in rows}) == 120
        answers.append(sorted((row["id"], row["sample"], row["output"], row["is_correct"]) for row in rows))
    assert answers[0] == answers[1]
