"""Sweeps: a process a run, one failing run among others, resumed by content, a table with intervals."""

import json
import shutil

import pytest

from lab import pool, sweep
from lab.engines import Local, Needs, Slurm
from lab.errors import DeviceError, SettingsError
from lab.records import StepRecord, results_of


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("LAB_WARM", "0")


def test_runs_go_side_by_side_a_failure_stands_alone_and_a_second_sweep_only_repairs(bench, outputs):
    first = sweep.run_sweep("mini", "toy-claims", {"seed": "0", "fail": "false,true"}, Local(2))
    assert list(first.failed) == ["fail=true,seed=0"] and "asked to fail" in first.failed["fail=true,seed=0"]
    (row,) = [row for row in first.rows if row["step"] == "draw"]
    assert row["fail"] == "false" and row["total"]["mean"] == StepRecord(first.runs["fail=false,seed=0"] / "draw").results["total"]
    assert json.loads((first.folder / "sweep.json").read_text())["failed"] == first.failed
    assert "fail=false" in (first.folder / "report.html").read_text() and "report: " in first.text()
    token = StepRecord(first.runs["fail=false,seed=0"] / "double").info["token"]
    second = sweep.run_sweep("mini", "toy-claims", {"seed": "0", "fail": "false"})
    assert not second.failed and StepRecord(second.runs["fail=false,seed=0"] / "double").info["token"] == token


class Scripted(Local):
    """An engine whose attempts end as told."""

    def __init__(self, outcomes):
        super().__init__()
        self.outcomes, self.commands = iter(outcomes), []

    def attempt(self, command):
        self.commands.append(command)
        return next(self.outcomes)


def test_a_failed_run_is_taken_up_again_as_often_as_asked(tmp_path):
    task = pool.Task("one", "mini", "toy", {"seed": "3"}, tmp_path)
    engine = Scripted(["cell 3 failed", "cell 3 failed", ""])
    assert pool.run_tasks("t", [task], engine, retries=1) == {"one": "cell 3 failed"}
    assert pool.run_tasks("t", [task], engine) == {}
    assert all(command[-2:] == ["-p", "seed=3"] and "--resume" in command for command in engine.commands)


def test_runs_become_jobs_of_a_cluster(bench):
    pytest.importorskip("submitit", reason="the slurm extra is not installed: pip install -e '.[slurm]'")
    out = sweep.sweep_folder("mini", "toy-claims")
    engine = Slurm(out / ".jobs", 2, Needs(minutes=5), cluster="local")
    result = sweep.run_sweep("mini", "toy-claims", {"seed": "0", "fail": "false,true"}, engine, out)
    assert list(result.failed) == ["fail=true,seed=0"] and "asked to fail" in result.failed["fail=true,seed=0"]
    assert set(results_of(result.runs["fail=false,seed=0"])) == {"draw", "double"}


def test_a_cluster_that_is_not_there_or_an_option_it_does_not_know(tmp_path):
    pytest.importorskip("submitit", reason="the slurm extra is not installed: pip install -e '.[slurm]'")
    with pytest.raises(SettingsError, match="--option: "):
        Slurm(tmp_path, 1, options={"gpus": 3}, cluster="local")
    if not shutil.which("srun"):
        with pytest.raises(DeviceError, match="No slurm cluster can be reached"):
            Slurm(tmp_path, 1)


def test_the_time_left_follows_the_expected_times(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(pool.time, "monotonic", lambda: now[0])
    tasks = [pool.Task(name, "mini", "toy", {}, tmp_path, seconds) for name, seconds in {"a": 10.0, "b": 30.0}.items()]
    board = pool.Board("demo", tasks, slots=1)
    assert board.seconds_left() == 40.0
    with board.running(tasks[0]):
        now[0] = 20.0
    assert board.seconds_left() == pytest.approx(60.0), "twice as slow as expected so far"


def test_a_run_that_hangs_is_stopped_and_taken_up(bench):
    slow = {"seed": "0", "pause_s": "30"}
    result = sweep.run_sweep("mini", "toy-claims", slow, Local(needs=Needs(minutes=8 / 60)))
    (name,) = result.runs
    assert result.failed == {name: "stopped after 8 s"} and "failed: " in result.text()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sed": "0,1"}, "Did you mean 'seed'"),
        ({"count": "1,x"}, "count = 'x'"),
        ({"seed": "[0"}, "separated by commas"),
        ({"seed": ""}, "no value"),
    ],
)
def test_a_bad_point_is_refused_before_any_run(bench, outputs, values, words):
    with pytest.raises(SettingsError, match=words):
        sweep.run_sweep("mini", "toy", values)
    assert not outputs.exists()


def test_a_device_that_is_not_there_is_an_error_at_once(bench, outputs):
    with pytest.raises(DeviceError, match="CUDA device 99 was asked for"):
        sweep.run_sweep("mini", "toy", {"seed": "0"}, Local(devices=["99"]))
    assert not outputs.exists()


def test_the_papers_own_grid_is_the_default(bench):
    assert sweep._grid("mini", "toy", {}) == {"seed": ["0", "1", "2"]}
    assert sweep._grid("mini", "long", {"widths": "[1, 2], [3]"}) == {"seed": ["0", "1", "2", "3", "4"], "widths": ["[1, 2]", "[3]"]}


def test_the_demo_runs_what_its_list_names_and_skips_what_is_unchanged(bench, outputs):
    (bench / "papers" / "demo.yaml").write_text("mini: {recipe: toy-claims, seconds: 5}\n")
    first = sweep.run_demo(jobs=1)
    assert not first.failed and [row["paper"] for row in first.rows] == ["mini"] * 3
    token = StepRecord(first.runs["mini"] / "draw").info["token"]
    sweep.run_demo(jobs=1)
    assert StepRecord(first.runs["mini"] / "draw").info["token"] == token
