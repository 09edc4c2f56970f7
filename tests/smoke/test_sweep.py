"""Sweeps: a process a run, one failing run among others, resumed by content, a table with intervals."""

import json

import pytest

from lab import sweep
from lab.errors import DeviceError, SettingsError
from lab.records import StepRecord


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setenv("LAB_WARM", "0")


def test_a_grid_runs_side_by_side_a_failure_stands_alone_and_a_second_sweep_only_repairs(bench, outputs):
    first = sweep.run_sweep("mini", "toy-claims", {"seed": "0,1", "fail": "false,true"}, jobs=2)
    assert sorted(first.failed) == ["fail=true,seed=0", "fail=true,seed=1"]
    assert all("asked to fail" in message for message in first.failed.values())
    rows = {row["step"]: row for row in first.rows if not row["arm"]}
    draws = [StepRecord(first.runs[f"fail=false,seed={seed}"] / "draw").results["total"] for seed in (0, 1)]
    assert rows["draw"]["total"]["mean"] == pytest.approx(sum(draws) / 2) and rows["draw"]["total"]["n"] == 2
    assert json.loads((first.folder / "sweep.json").read_text())["failed"] == first.failed
    tokens = {name: StepRecord(path / "double").info["token"] for name, path in first.runs.items() if name not in first.failed}
    notebook = bench / "notebooks" / "mini" / "1_draw.ipynb"
    notebook.write_text(notebook.read_text().replace("asked to fail", "asked again"))
    second = sweep.run_sweep("mini", "toy-claims", {"seed": "0", "fail": "true"}, retries=1)
    assert "asked again" in second.failed["fail=true,seed=0"]
    assert {name: StepRecord(path / "double").info["token"] for name, path in first.runs.items() if name in tokens} == tokens


def test_a_run_that_hangs_is_stopped_and_taken_up(bench):
    slow = {"seed": "0", "pause_s": "30"}
    result = sweep.run_sweep("mini", "toy-claims", slow, timeout_s=8)
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
        sweep.run_sweep("mini", "toy", {"seed": "0"}, devices=["99"])
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
