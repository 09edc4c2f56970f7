"""Runs as folders: what a step leaves, what it refuses, what a kill cannot break."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lab import files, steps
from lab.errors import RunError, SettingsError
from lab.running import runs
from lab.running.records import StepRecord, fingerprint, read_metrics

DRAW = {"seed": 0, "count": 2, "data": "", "pause_s": 0.0, "more": False, "fail": False}


@pytest.fixture
def begin(bench):
    """`lab.begin` for the mini paper; steps left open are closed."""
    yield lambda step="draw", run="", **changed: steps.begin("mini", step, str(run), {**DRAW, **changed} if step == "draw" else {"seed": 0})
    for step in list(steps._open_steps):
        step.close()


def finish(step, **headline):
    return step.finish(**headline).folder


def test_a_finished_step_lies_under_its_name_and_says_what_ran(begin):
    step = begin()
    assert step.folder.name == ".draw.partial"
    step.log(step=0, loss=1.5)
    step.table("numbers", [{"index": 0, "value": 0.5}])
    folder = finish(step, total=3, arms={"a": 1.0})
    assert folder == step.run.folder / "draw" and not (step.run.folder / ".draw.partial").exists()
    record = StepRecord(folder)
    assert record.results == {"total": 3, "arms": {"a": 1.0}}
    assert record.metrics[0]["loss"] == 1.5
    assert record.tables == {"numbers": [{"index": 0, "value": 0.5}]}
    manifest = runs.open_run(step.run.folder).manifest
    assert manifest["steps"]["draw"]["status"] == "done"
    assert {"commit", "dirty"} <= set(manifest["git"]) and manifest["packages"]["torch"] != "absent"
    assert manifest["steps"]["draw"]["parameters"] == DRAW


def test_parameters_come_from_the_callers_cell_and_are_checked(bench, outputs):
    cell = {"run": "", **DRAW, "unrelated": 1}
    exec("import lab\nstep = lab.begin('mini', 'draw', run)", cell)
    assert cell["step"].parameters == DRAW
    cell["step"].close()
    with pytest.raises(SettingsError, match="count = 'two': input should be a valid integer"):
        exec("step = lab.begin('mini', 'draw', run)", {**cell, "count": "two"})
    with pytest.raises(SettingsError, match="parameters cell first: count is not set"):
        exec("import lab\nlab.begin('mini', 'draw', '')", {name: value for name, value in DRAW.items() if name != "count"})


def test_a_step_killed_halfway_is_taken_up_when_nothing_changed(begin):
    first = begin()
    (first.folder / "half.txt").write_text("half")
    first.log(step=0, loss=1.0)
    first.log(step=1, loss=0.9)
    first.close()
    again = begin(run=first.run.folder)
    assert again.resumed and (again.folder / "half.txt").read_text() == "half" and again.info["attempts"] == 2
    again.log(step=1, accuracy=0.5)
    again.log(step=1, loss=0.8)
    lines = [{name: line.get(name) for name in ("loss", "accuracy")} for line in read_metrics(again.folder)]
    assert lines == [{"loss": 1.0, "accuracy": None}, {"loss": 0.8, "accuracy": None}, {"loss": None, "accuracy": 0.5}]


def test_a_step_killed_halfway_starts_over_with_other_parameters(begin):
    first = begin()
    (first.folder / "half.txt").write_text("half")
    first.close()
    again = begin(run=first.run.folder, count=3)
    assert not again.resumed and not (again.folder / "half.txt").exists()


def test_a_kill_between_the_end_and_the_renaming_is_repaired(begin, monkeypatch):
    step = begin()

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(steps, "put_in_place", killed)
        step.finish(total=1)
    step.close()
    other = begin("double", run=step.run.folder)
    assert other.input("draw") == step.run.folder / "draw"
    assert runs.open_run(step.run.folder).manifest["steps"]["draw"]["status"] == "done"


def test_doing_a_step_again_keeps_the_earlier_result_aside(begin):
    first = begin()
    finish(first, total=1)
    finish(begin(run=first.run.folder, count=3), total=2)
    assert StepRecord(first.run.folder / "draw").results == {"total": 2}
    assert StepRecord(first.run.folder / ".replaced" / "draw").results == {"total": 1}
    assert [record.name for record in runs.open_run(first.run.folder).steps()] == ["draw"]


def test_an_input_that_is_missing_is_answered_with_the_command_that_makes_it(begin):
    step = begin("double")
    with pytest.raises(RunError, match=r"no finished step 'draw'. Make it with: lab run mini --run .* --resume"):
        step.input("draw")
    with pytest.raises(RunError, match="Unknown input of double .*'drwa'. Did you mean 'draw'"):
        step.input("drwa")


def test_a_folder_that_is_something_else_is_refused_and_left_alone(begin, tmp_path):
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter.txt").write_text("years of work")
    with pytest.raises(RunError, match="already exists and is not a run"):
        begin(run=other)
    assert [path.name for path in other.iterdir()] == ["chapter.txt"]


def test_a_kill_while_a_run_is_being_made_leaves_a_folder_that_can_be_used(begin, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "fsync", killed)
        patched.setattr(os, "unlink", lambda *_: None)
        begin(run=folder)
    assert any(item.name.startswith(".manifest.json.") for item in folder.iterdir())
    monkeypatch.setattr(steps, "_open_steps", [])
    import gc

    gc.collect()
    assert begin(run=folder).run.folder == folder


def test_a_run_of_another_paper_is_refused(begin):
    step = begin()
    finish(step)
    manifest = files.read_json(step.run.folder / "manifest.json")
    files.write_json(step.run.folder / "manifest.json", {**manifest, "paper": "other"})
    with pytest.raises(RunError, match="already holds a run of 'other'"):
        begin(run=step.run.folder)


def test_a_damaged_manifest_is_named(begin):
    step = begin()
    finish(step)
    (step.run.folder / "manifest.json").write_text('{"paper": "mi')
    with pytest.raises(RunError, match=r"Cannot read .*manifest\.json"):
        begin(run=step.run.folder)


HOLD = """
import sys, time
from lab import steps
step = steps.begin("mini", "draw", sys.argv[1], {"seed": 0})
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_opener_is_refused_and_a_dead_ones_lock_is_taken_over(begin, bench, tmp_path):
    folder = tmp_path / "shared"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunError, match=rf"is in use.*\(process {holder.pid} on "):
            begin(run=folder)
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    assert begin(run=folder).run.folder == folder


def test_opening_another_step_in_the_same_process_lets_go_of_the_first(begin):
    first = begin()
    second = begin(run=first.run.folder)
    assert second.resumed


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere, so permissions cannot be tried as root")
def test_a_folder_without_write_permission_is_refused(begin, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with pytest.raises(RunError, match="permission is denied"):
        begin(run=locked / "run")


def test_latest_is_the_newest_run_of_the_paper(begin):
    older = begin()
    finish(older, total=1)
    newer = begin()
    finish(newer, total=2)
    os.utime(older.run.folder / "manifest.json", (1, 1))
    assert runs.latest("mini") == newer.run.folder
    assert begin("double", run="latest").run.folder == newer.run.folder


def test_latest_without_any_run_says_how_to_make_one(bench):
    with pytest.raises(RunError, match="no run of mini yet; make one with: lab run mini"):
        runs.latest("mini")


def test_figures_come_with_their_numbers_and_can_be_drawn_again(begin, tmp_path, monkeypatch, capsys):
    import sys

    import pandas as pd

    from lab import cli, figures

    table = pd.DataFrame({"iterations": [1, 2], "share": [0.9, 0.1]})
    step = begin()
    path = step.save_figure(figures.iteration_histogram(table), "histogram", table)
    assert path.with_suffix(".csv").read_text() == "iterations,share\n1,0.9\n2,0.1\n"
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    kept = path.read_bytes()
    finish(step)
    monkeypatch.setattr(sys, "argv", ["lab", "figures", str(step.run.folder), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    again = tmp_path / "out" / f"{step.run.folder.name}-draw-histogram.svg"
    assert again.read_bytes() == kept and again.with_suffix(".pdf").exists()
    assert str(again) in capsys.readouterr().out


def test_any_matplotlib_figure_can_be_kept(begin):
    from matplotlib.figure import Figure

    figure = Figure()
    figure.subplots().plot([0, 1], [1, 2])
    path = begin().save_figure(figure, "line", {"x": [0, 1], "y": [1, 2]})
    assert path.with_suffix(".csv").read_text() == "x,y\n0,1\n1,2\n" and not path.with_suffix(".json").exists()


def test_undefined_numbers_stay_readable_json(begin):
    step = begin()
    step.log(step=0, loss=float("nan"))
    folder = finish(step, accuracy=float("inf"))
    assert json.loads((folder / "results.json").read_text()) == {"accuracy": "inf"}
    assert StepRecord(folder).metrics[0]["loss"] == "nan"


def test_the_data_a_parameter_names_is_fingerprinted_by_content(begin, tmp_path):
    data = tmp_path / "questions.jsonl"
    data.write_text('{"q": 1}\n')
    first = begin(data=str(data))
    finish(first)
    facts = runs.open_run(first.run.folder).manifest["data"]["data"]
    assert facts["path"] == str(data)
    data.write_text('{"q": 2}\n')
    second = begin(run=first.run.folder, data=str(data))
    assert second.info["fingerprint"] != first.info["fingerprint"]
    assert second.info["data"]["data"]["digest"] != facts["digest"]


def test_where_a_step_runs_is_no_part_of_what_it_does(begin):
    step = begin()
    elsewhere, other = ({**DRAW, **changed} for changed in ({"processes": 8, "sharding": "zero1", "device": "cuda"}, {"count": 3}))
    assert fingerprint(step._spec, elsewhere, step.run.folder)[0] == step.info["fingerprint"]
    assert fingerprint(step._spec, other, step.run.folder)[0] != step.info["fingerprint"]


def test_a_clock_that_jumps_back_changes_no_order_and_no_duration(begin, monkeypatch):
    clock = iter(["2031-05-01T10:00:00.000+02:00"] * 4 + ["1999-01-01T00:00:00.000+00:00"] * 50)
    monkeypatch.setattr(steps, "now", lambda: next(clock))
    seconds = itertools.cycle([2e9, 1e9, 0.0])
    monkeypatch.setattr(steps.time, "time", lambda: next(seconds))
    first = begin()
    first.run.record({"planned": ["draw", "double"]})
    for number in range(3):
        first.log(step=number, loss=0.1 * number)
    finish(first, total=1)
    second = begin("double", run=first.run.folder)
    finish(second, total=2)
    run = runs.open_run(first.run.folder)
    assert [record.name for record in run.steps()] == ["draw", "double"] and run.finished
    assert [line["step"] for line in run.step("draw").metrics] == [0, 1, 2]
    assert all(0 <= record.info["seconds"] < 60 for record in run.steps())
    assert run.step("draw").unchanged(first.info["fingerprint"])


def test_warnings_reach_the_manifest(begin):
    step = begin()
    step.warn("half of the answers were cut off")
    finish(step)
    assert runs.open_run(step.run.folder).manifest["warnings"] == ["draw: half of the answers were cut off"]


def test_the_last_cell_of_a_notebook_shows_the_headline(begin):
    bundle = begin().finish(tah={"hard": 0.81}, note="<b>")._repr_mimebundle_()
    assert "0.810" in bundle["text/plain"] and "<td" in bundle["text/html"] and "&lt;b&gt;" in bundle["text/html"]


def test_finishing_twice_is_refused(begin):
    step = begin()
    finish(step)
    with pytest.raises(RunError, match="has finished already"):
        step.finish()


def test_reading_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run folder"):
        runs.open_run(Path(tmp_path))
