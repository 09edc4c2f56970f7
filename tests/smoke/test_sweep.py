"""Sweeps: a process a run, one failing run among others, resumed by content, a table with intervals."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lab import cli, files, sweep
from lab.errors import BusyError, DeviceError, SettingsError
from lab.running import memory, pool
from lab.running.engines import Local, Needs, Slurm
from lab.running.records import StepRecord, results_of


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


def test_a_dry_run_says_which_runs_there_would_be_and_touches_nothing(bench, outputs):
    runner, asked = CliRunner(), ["sweep", "mini", "--recipe", "toy-claims", "-p", "seed=0,1", "-p", "fail=false"]
    told = json.loads(runner.invoke(cli.app, [*asked, "--dry-run", "--json"]).stdout)
    assert [run["state"] for run in told["runs"]] == ["new", "new"] and not outputs.exists()
    sweep.run_sweep("mini", "toy-claims", {"seed": "0", "fail": "false"})
    (Path(told["folder"]) / told["runs"][1]["run"]).mkdir()
    again = runner.invoke(cli.app, [*asked, "--dry-run"])
    assert "finished" in again.stdout and "taken up" in again.stdout and "2 runs into" in again.stdout


def test_a_dry_run_says_what_the_trainings_of_each_run_need(tmp_path):
    rows = sweep.preview("codi", "smoke", {"seed": "0,1"}, tmp_path)
    assert len(rows) == 2 and all(row["fits"] and row["GiB a device"] >= 0 and row["hours here"] >= 0 for row in rows)


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


def test_a_grid_or_a_list_over_papers_recipes_and_parameters(bench, tmp_path):
    grid = sweep.points_of("mini", "toy, long", {"seed": "0,1"})
    assert [(point.recipe, point.values["seed"]) for point in grid] == [("toy", "0"), ("toy", "1"), ("long", "0"), ("long", "1")]
    path = tmp_path / "points.yaml"
    path.write_text("- {count: 2}\n- {count: 3, recipe: long}\n- {count: 2}\n")
    listed = sweep.points_of("mini", "toy", {}, sweep.read_points(path))
    assert [(point.recipe, point.values) for point in listed] == [("toy", {"count": "2"}), ("long", {"count": "3"})], "each one once"
    both = sweep.points_of("mini", "toy", {"seed": "0,1"}, [{"count": 2}])
    assert [point.values for point in both] == [{"count": "2", "seed": "0"}, {"count": "2", "seed": "1"}]
    for text, words in {"3": "must hold a list of points", "- 3": "list of points", "[]": "list of points is empty"}.items():
        path.write_text(text)
        with pytest.raises(SettingsError, match=words):
            sweep.points_of("mini", "toy", {}, sweep.read_points(path))


def test_a_long_point_still_has_a_folder_name():
    names = {sweep.point_name({"text": "x" * 300, "seed": str(seed)}) for seed in range(3)}
    assert len(names) == 3 and all(len(name.encode()) <= 150 for name in names)


def test_recipes_side_by_side_have_one_table_and_a_figure_with_intervals(bench):
    points = [{"recipe": "toy", "seed": 0}, {"recipe": "toy", "seed": 1}, {"recipe": "toy-claims", "seed": 0}]
    result = sweep.run_sweep("mini", "toy", {}, Local(2), listed=points)
    assert len(result.runs) == 3 and not result.failed
    totals = {row["recipe"]: row["total"] for row in result.rows if "total" in row}
    assert (totals["toy"]["n"], totals["toy-claims"]["n"]) == (2, 1) and totals["toy"]["low"] < totals["toy"]["mean"]
    figure = result.folder / "figures" / "total.svg"
    assert figure in result.figures and "low" in figure.with_suffix(".csv").read_text().splitlines()[0]
    assert "<svg" in result._repr_mimebundle_()["text/html"]
    again = sweep.run_sweep("mini", "toy", {}, Scripted([]), listed=points)
    assert again.skipped == 3 and again.rows == result.rows, "no process was started for what is finished"


def test_the_board_shows_every_run_under_way(tmp_path):
    tasks = [pool.Task(name, "mini", "toy", {}, tmp_path / name) for name in "abc"]
    for task, loss in zip(tasks[:2], ("loss 0.5", "loss 0.7"), strict=True):
        live = {
            "step": "train 2/4",
            "cell": "cell 3/9",
            "loop": "steps 5/20",
            "metric": loss,
            "share": 0.5,
            "device": "cpu",
            "memory_mib": 2048,
        }
        files.write_json(task.folder / pool.LIVE, live)
    board = pool.Board("sweep", tasks, slots=2)
    with board.running(tasks[0]), board.running(tasks[1]):
        text = board.text()
    assert text.startswith("sweep 0/3") and [line.split()[0] for line in text.splitlines()[1:]] == [
        "run",
        "-" * len(text.splitlines()[2]),
        "a",
        "b",
    ]
    assert all(word in text for word in ("train 2/4", "steps 5/20", "loss 0.7", "2.0 GiB", "cpu", "left"))


def test_runs_that_end_at_once_are_all_counted(tmp_path):
    tasks = [pool.Task(str(number), "mini", "toy", {}, tmp_path, 1.0) for number in range(400)]
    engine = Scripted([""] * 400)
    engine.slots, before = 16, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        assert pool.run_tasks("t", tasks, engine) == {} and len(engine.commands) == 400
    finally:
        sys.setswitchinterval(before)


def test_an_interrupted_sweep_stops_its_runs_and_the_same_command_takes_them_up(bench):
    out = sweep.sweep_folder("mini", "toy-claims")
    command = [sys.executable, "-m", "lab.cli", "sweep", "mini", "-p", "seed=0,1,2", "-p", "pause_s=20", "-p", "count=2", "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    numbers = [next_to(out, seed) for seed in (0, 1)]
    until(lambda: all(path.exists() for path in numbers) or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "Stopped. What has finished is kept; the same command takes up the rest." in error
    for seed in (0, 1):
        files.lock(numbers[seed].parents[1] / ".lock", "the run should be over").close()
        assert numbers[seed].read_text().split()
    assert not next_to(out, 2).exists()


def next_to(out, seed):
    return out / f"count=2,pause_s=20,seed={seed}" / ".draw.partial" / "numbers.txt"


def until(true, seconds=300.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_runs_of_a_killed_sweep_end_too(bench):
    out = sweep.sweep_folder("mini", "toy-claims")
    command = [sys.executable, "-m", "lab.cli", "sweep", "mini", "-p", "seed=0", "-p", "pause_s=60", "-p", "count=2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    path = out / "count=2,pause_s=60,seed=0"
    until(lambda: (path / ".draw.partial" / "numbers.txt").exists())
    process.kill()
    process.wait()

    def free():
        try:
            files.lock(path / ".lock", "").close()
        except BusyError:
            return False
        return True

    until(free)


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


def test_a_run_that_takes_more_memory_than_it_was_given_is_stopped_and_the_others_go_on():
    def taking(mib, seconds):
        return [sys.executable, "-c", f"import time; kept = bytearray({mib} << 20); time.sleep({seconds})"]

    engine = Local(2, needs=Needs(memory=0.2))
    with ThreadPoolExecutor(2) as both:
        large, small = both.map(engine.attempt, [taking(300, 600), taking(1, 3)])
    assert (large, small) == ("took more than the 0.2 GiB it was given and was stopped", "")


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


def test_runs_that_need_two_gpus_share_four(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    engine = Local(needs=Needs(gpus=2, cpus=3))
    tell = "import os, sys; sys.exit('lab: ' + os.environ['CUDA_VISIBLE_DEVICES'] + ' ' + os.environ['OMP_NUM_THREADS'])"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert engine.slots == 2 and {engine.attempt([sys.executable, "-c", tell]) for _ in range(4)} == {"0,1 3", "2,3 3"}
    assert Local(devices=["3"]).slots == 1
    with pytest.raises(DeviceError, match="asks for 5 GPUs; there are 4"):
        Local(needs=Needs(gpus=5))
    with pytest.raises(DeviceError, match="GiB of memory; this machine has"):
        Local(jobs=2, needs=Needs(memory=1e5))


def test_what_a_run_says_was_wrong_is_its_own_last_word(monkeypatch):
    noisy = "import sys; print('a warning', file=sys.stderr); print('lab: the reason', file=sys.stderr); sys.exit(2)"
    assert Local().attempt([sys.executable, "-c", noisy]) == "the reason"
    assert Local().attempt([sys.executable, "-c", "import os; os.kill(os.getpid(), 8)"]) == "ended by signal 8"
    assert Local().attempt([sys.executable, "-c", "import sys; sys.exit(7)"]) == "exit status 7"


def test_a_run_that_the_system_ended_says_what_it_held_and_what_to_do(monkeypatch):
    real = memory.held_gib

    def held(run):
        if (gib := real(run)) > 0.09:
            os.kill(run, signal.SIGKILL)
        return gib

    monkeypatch.setattr(memory, "held_gib", held)
    message = Local(needs=Needs(memory=1)).attempt([sys.executable, "-c", "import time; kept = bytearray(100 << 20); time.sleep(600)"])
    assert re.match(r"killed \(SIGKILL, when it held 0\.1 GiB\); if it was for want of memory: run fewer at a time", message), message
    monkeypatch.setattr(memory, "kills", itertools.count().__next__)
    assert (
        Local()
        .attempt([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
        .startswith("ended by Linux for want of memory: run fewer")
    )


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
