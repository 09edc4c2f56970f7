"""Notebooks run headless on a pipeline without a model: executed copies, resume, kills, failures, plain papermill."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from papermill.cli import papermill

from lab import files, pipeline
from lab.pipeline import StepFailed, run_recipe
from lab.running import memory, notebooks, runs
from lab.running.notebooks import execute
from lab.running.records import StepRecord, results_of


@pytest.fixture
def fresh(monkeypatch):
    """Kernels of their own: these notebooks import nothing heavy, so a warm server would only cost time."""
    monkeypatch.setenv("LAB_WARM", "0")


def outputs_of(path):
    cells = json.loads(path.read_text())["cells"]
    return [output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]]


def test_a_recipe_becomes_a_run_folder_with_executed_notebooks_and_pages(bench, monkeypatch):
    monkeypatch.delenv("LAB_WARM", raising=False)
    folder = run_recipe("mini", "toy", {"seed": "3"})
    assert results_of(folder)["draw"]["count"] == 4
    manifest = runs.open_run(folder).manifest
    assert [step["status"] for step in manifest["steps"].values()] == ["done", "done"]
    assert runs.latest("mini", "toy", finished=True) == folder
    assert set(pipeline._history("mini", "toy")) == {"draw", "double"}, "the next run knows how long each step takes"
    assert (manifest["recipe"], manifest["overrides"]) == ("toy", {"seed": "3"})
    for step in ("draw", "double"):
        executed = folder / "notebooks" / f"{step}.ipynb"
        assert not [output for output in outputs_of(executed) if output["output_type"] == "error"]
        html = executed.with_suffix(".html").read_text()
        assert 'src="http' not in html and "<script src" not in html and "import('http" not in html
    shown = [output["data"]["text/plain"] for output in outputs_of(folder / "notebooks" / "draw.ipynb") if "data" in output]
    assert any("commit" in "".join(text) and str(folder) in "".join(text) for text in shown)
    assert any("drawing 4/4 100%" in "".join(text) for text in shown)
    assert not list(folder.glob(".*.partial")) and not (folder / ".progress.json").exists()


def test_a_resumed_run_skips_what_is_unchanged_and_redoes_what_is_not(bench, fresh):
    folder = run_recipe("mini", "toy")
    first = {step: StepRecord(folder / step).info["token"] for step in ("draw", "double")}
    run_recipe("mini", folder=folder, resume=True)
    assert {step: StepRecord(folder / step).info["token"] for step in first} == first
    run_recipe("mini", folder=folder, resume=True, overrides={"double.factor": "5"})
    assert StepRecord(folder / "draw").info["token"] == first["draw"]
    assert StepRecord(folder / "double").info["parameters"]["factor"] == 5.0
    notebook = bench / "notebooks" / "mini" / "2_double.ipynb"
    notebook.write_text(notebook.read_text().replace("mean=sum", "average=sum"))
    run_recipe("mini", folder=folder, resume=True)
    assert StepRecord(folder / "draw").info["token"] == first["draw"] and "average" in results_of(folder)["double"]
    run_recipe("mini", folder=folder, from_step="draw")
    assert StepRecord(folder / "draw").info["token"] != first["draw"]
    assert StepRecord(folder / "double").info["parameters"]["factor"] == 5.0


def test_a_run_folder_is_not_overwritten(bench, fresh):
    folder = run_recipe("mini", "toy")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(runs.RunError, match="already holds a run; continue it with --resume"):
        run_recipe("mini", "toy", folder=folder)
    with pytest.raises(runs.RunError, match="cannot go on as mini long"):
        run_recipe("mini", "long", folder=folder, resume=True)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_failing_cell_is_named_linked_and_leaves_what_ran(bench, fresh, outputs):
    with pytest.raises(
        StepFailed, match=r"Step draw failed: ValueError in cell \d+: asked to fail .*draw.html#papermill-error-cell"
    ) as caught:
        run_recipe("mini", "toy", {"fail": "true"})
    assert "go on with: lab run mini --run" in str(caught.value)
    (folder,) = (outputs / "mini").iterdir()
    page = (folder / "notebooks" / "draw.html").read_text()
    assert 'id="papermill-error-cell"' in page and "<b>here</b>" not in page.split("Execution using papermill")[1][:20000]
    assert any("commit" in str(output) for output in outputs_of(folder / "notebooks" / "draw.ipynb"))
    step = runs.open_run(folder).manifest["steps"]["draw"]
    assert step["status"] == "failed" and "asked to fail" in step["error"]
    with pytest.raises(runs.RunError, match="no finished run of mini"):
        runs.latest("mini", finished=True)
    run_recipe("mini", folder=folder, resume=True, overrides={"fail": "false"})
    assert set(results_of(folder)) == {"draw", "double"}


def test_a_notebook_that_never_finishes_its_step_is_a_failure(bench, fresh):
    notebook = bench / "notebooks" / "mini" / "1_draw.ipynb"
    notebook.write_text(notebook.read_text().replace("step.finish(", "dict("))
    with pytest.raises(StepFailed, match=r"mini/1_draw.ipynb ended without step.finish\(\)"):
        run_recipe("mini", "toy")


def test_a_kernel_that_dies_is_a_failure_that_says_so(bench, fresh):
    notebook = bench / "notebooks" / "mini" / "1_draw.ipynb"
    notebook.write_text(
        notebook.read_text().replace("if fail:", "import os\\nos.kill(os.getpid(), 9)\\nif fail:", 1).replace("\\\\n", "\\n")
    )
    with pytest.raises(StepFailed, match="kernel of 1_draw.ipynb died"):
        run_recipe("mini", "toy")


DIES = """
import os
from ipykernel.kernelapp import launch_new_instance
try:
    os.mkdir(os.environ["MINI_STARTS"])
except FileExistsError:
    launch_new_instance()
"""


def test_a_kernel_that_dies_before_its_first_cell_is_started_again(bench, fresh, tmp_path, monkeypatch):
    (tmp_path / "ipykernel_launcher.py").write_text(DIES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MINI_STARTS", str(tmp_path / "started"))
    assert set(results_of(run_recipe("mini", "toy"))) == {"draw", "double"} and (tmp_path / "started").exists()


def test_a_kernel_that_dies_again_before_its_first_cell_is_a_failure_that_says_so(bench, fresh, tmp_path, monkeypatch):
    (tmp_path / "ipykernel_launcher.py").write_text("raise SystemExit(1)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(memory, "kills", itertools.count().__next__)
    with pytest.raises(StepFailed, match="kernel of 1_draw.ipynb was ended by Linux for want of memory: run fewer"):
        run_recipe("mini", "toy")


def test_a_kernel_that_keeps_its_last_words_is_a_failure_that_says_so(bench, fresh, monkeypatch):
    monkeypatch.setattr(notebooks, "PATIENCE_S", 1)
    notebook = bench / "notebooks" / "mini" / "1_draw.ipynb"
    words = ("import sys, time", "sys.stdout.flush_timeout = sys.stderr.flush_timeout = 0.1", "kernel = get_ipython().kernel")
    silence = "\\n".join((*words, "kernel.iopub_thread.schedule(lambda: time.sleep(60))", "if fail:"))
    notebook.write_text(notebook.read_text().replace("if fail:", silence, 1))
    with pytest.raises(StepFailed, match="kernel of 1_draw.ipynb has not answered for 1 seconds"):
        run_recipe("mini", "toy")


def test_plain_papermill_runs_the_same_steps_from_the_recipe_files(bench, outputs, tmp_path):
    folder = tmp_path / "by-hand"
    recipes = bench / "papers" / "mini" / "recipes"
    for notebook, extra in {"1_draw": [], "2_double": ["-f", str(recipes / "toy-double.yaml")]}.items():
        source = bench / "notebooks" / "mini" / f"{notebook}.ipynb"
        arguments = [str(source), str(tmp_path / "out.ipynb"), "-f", str(recipes / "toy.yaml"), *extra, "-p", "run", str(folder)]
        assert CliRunner().invoke(papermill, [*arguments, "--no-progress-bar"]).exit_code == 0
    by_command = run_recipe("mini", "toy")
    assert results_of(folder) == results_of(by_command)
    for step in ("draw", "double"):
        assert StepRecord(folder / step).info["fingerprint"] is not None
    assert StepRecord(folder / "draw").info["fingerprint"] == StepRecord(by_command / "draw").info["fingerprint"]


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "lab.cli", "run", "mini", "--recipe", "toy", "--run", str(folder), *arguments]
    environment = {**os.environ, "LAB_WARM": "0", "MINI_SLOWER": "1000"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not path.exists() or not path.stat().st_size:
        assert process.poll() is None and time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.05)


def test_a_killed_run_goes_on_to_the_same_result_and_nothing_counts_twice(bench, tmp_path, fresh):
    folder = tmp_path / "killed"
    process = start(folder, "-p", "pause_s=0.1", "-p", "count=6")
    wait_for(folder / ".draw.partial" / "numbers.txt", process)
    process.kill()
    process.wait()
    _wait_until_free(folder)
    first = (folder / ".draw.partial" / "numbers.txt").read_text().split()
    assert len(first) == 1
    run_recipe("mini", folder=folder, resume=True)
    whole = run_recipe("mini", "toy", {"pause_s": "0.0", "count": "6"})
    assert results_of(folder) == results_of(whole)
    assert [line["step"] for line in StepRecord(folder / "draw").metrics] == list(range(6))
    assert StepRecord(folder / "draw").info["attempts"] == 2


def _wait_until_free(folder: Path, seconds: float = 60.0) -> None:
    """The kernel of a killed command ends by itself within moments; until then its step is locked."""
    end = time.monotonic() + seconds
    while True:
        try:
            files.lock(folder / ".draw.lock", "").close()
            return
        except runs.RunError:
            assert time.monotonic() < end, "the orphaned kernel never ended"
            time.sleep(0.1)


def test_two_commands_on_one_folder(bench, tmp_path):
    folder = tmp_path / "shared"
    first = start(folder, "-p", "pause_s=1")
    try:
        wait_for(folder / ".draw.partial" / "numbers.txt", first)
        second = start(folder, "--resume")
        _, error = second.communicate(timeout=300)
        assert second.returncode == 3 and "is in use" in error and f"process {first.pid}" in error
        first.send_signal(signal.SIGINT)
        _, error = first.communicate(timeout=300)
        assert first.returncode == 130 and "Stopped. Everything so far is kept; go on with: lab run mini" in error
    finally:
        first.kill()
        first.wait()


def test_without_the_process_that_starts_kernels_a_run_says_so(bench, tmp_path, monkeypatch):
    gone = socket.socket(socket.AF_UNIX)
    gone.bind(str(tmp_path / "socket"))
    monkeypatch.setenv("LAB_WARM", str(tmp_path / "socket"))
    with pytest.raises(StepFailed, match="process that starts kernels has ended .* LAB_WARM=0"):
        run_recipe("mini", "toy")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_disk_that_fills_up_stops_the_run_with_a_sentence_and_more_space_lets_it_go_on(bench, fresh, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting a tmpfs")
    try:
        with pytest.raises(runs.RunError, match="no space is left on the disk; free some, then continue with --resume"):
            run_recipe("mini", "toy", folder=disk / "run")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        run_recipe("mini", folder=disk / "run", resume=True)
        assert set(results_of(disk / "run")) == {"draw", "double"}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_notebook_may_run_a_recipe_itself(bench, fresh, tmp_path):
    notebook = bench / "notebooks" / "mini" / "1_draw.ipynb"
    content = json.loads(notebook.read_text())
    work = ["from pathlib import Path\n", "import lab\n", "lab.run('mini', 'toy', folder=Path(data))"]
    content["cells"][2:] = [{**content["cells"][2], "source": work}]
    outer = tmp_path / "outer.ipynb"
    outer.write_text(json.dumps(content))
    execute(outer, tmp_path / "out" / "outer.ipynb", {"data": str(tmp_path / "inner")})
    assert set(results_of(tmp_path / "inner")) == {"draw", "double"}
    shown = ["".join(output["data"]["text/plain"]) for output in outputs_of(tmp_path / "out" / "outer.ipynb") if "data" in output]
    assert any("draw 1/2 · done in" in text for text in shown) and any("double 2/2 · done in" in text for text in shown)


def test_describing_a_run_starts_no_kernel(bench, monkeypatch):
    monkeypatch.setattr(pipeline, "run_recipe", None)
    described = pipeline.describe("mini", "toy", {"count": "9"})
    assert described["steps"][0]["given"] == {"count": 9}
    assert "* count = 9" in pipeline.describe_text(described)
