"""The command line: sentences instead of tracebacks, exit statuses that mean something, a quick start."""

import json
import os
import resource
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from lab import audit, cli, steps
from lab.pipeline import StepFailed
from lab.running import runs


def call(monkeypatch, capsys, *arguments):
    """(exit status, stdout, stderr) of `lab ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["lab", *arguments])
    try:
        cli.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status or 0, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "mni"], "Did you mean 'mini'"),
        (["run", "mini", "--recipe", "toi"], "Did you mean 'toy'"),
        (["run", "mini", "-p", "cuont=3"], "Did you mean 'count'"),
        (["run", "mini", "-p", "count=x"], "count = 'x'"),
        (["run", "mini", "-p", "count"], "write name=value"),
        (["run", "mini", "--from", "drwa"], "There is no run of mini yet"),
        (["run", "mini", "--resume"], "There is no run of mini yet"),
        (["sweep", "mini", "--recipe", "toy", "-p", "seed=a,b"], "seed = 'a'"),
        (["sweep", "mini", "--recipe", "toy", "-p", "seed="], "no value to go through"),
        (["report", "nowhere"], "is not a run folder"),
        (["verify", "nowhere"], "is not a run folder"),
        (["rerun", "nowhere"], "is not a run folder"),
    ],
)
def test_a_wrong_request_is_one_sentence_and_status_2(bench, outputs, monkeypatch, capsys, arguments, words):
    status, out, err = call(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "") and words in err
    assert err.startswith("lab: ") and len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert not outputs.exists()


def test_an_option_that_does_not_exist_is_status_2(bench):
    result = CliRunner().invoke(cli.app, ["run", "mini", "--resme"])
    assert result.exit_code == 2 and "--resume" in result.output


def test_debug_shows_the_traceback(bench, monkeypatch, capsys):
    from lab.errors import SettingsError

    monkeypatch.setattr(sys, "argv", ["lab", "--debug", "run", "mni"])
    with pytest.raises(SettingsError):
        cli.main()


def test_a_failed_step_is_status_1(bench, monkeypatch, capsys):
    def fail(*_, **__):
        raise StepFailed("Step draw failed.")

    monkeypatch.setattr("lab.pipeline.run_recipe", fail)
    status, _, err = call(monkeypatch, capsys, "run", "mini")
    assert (status, err) == (1, "lab: Step draw failed.\n")


def test_ctrl_c_says_how_to_go_on(bench, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lab.pipeline._run_step", stop)
    status, _, err = call(monkeypatch, capsys, "run", "mini")
    assert status == 130 and "--resume" in err


def test_a_dry_run_shows_steps_and_settings_and_makes_nothing(bench, outputs, monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "run", "mini", "--dry-run", "-p", "count=9")
    assert status == 0 and "1. draw (mini/1_draw.ipynb)" in out and "* count = 9" in out and "* factor = 3.0" in out
    assert not outputs.exists()


def test_a_dry_run_asks_the_methods_own_plan(bench, monkeypatch, capsys, tmp_path):
    package = tmp_path / "extra" / "lab" / "methods" / "mini"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "plan.py").write_text("def describe(settings):\n    return {'optimizer steps': 10 * settings['draw']['count']}\n")
    import lab.methods

    monkeypatch.setattr(lab.methods, "__path__", [*lab.methods.__path__, str(package.parent)])
    for name in ("lab.methods.mini", "lab.methods.mini.plan"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)  # so that what is imported now is forgotten afterwards
    status, out, _ = call(monkeypatch, capsys, "run", "mini", "--dry-run", "--json")
    assert status == 0 and json.loads(out)["details"] == {"optimizer steps": 40}


def test_papers_lists_steps_and_recipes(bench, monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "papers", "--json")
    assert status == 0
    assert json.loads(out)["mini"]["steps"] == ["draw", "double", "extra"]
    assert json.loads(out)["mini"]["recipes"] == ["long", "toy", "toy-claims"]


def test_the_doctor_finds_this_environment_fit(bench, monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert status == 0 and all(check["ok"] for check in checks.values() if check["needed"])
    assert "mini" in checks["papers"]["found"]


def test_the_doctor_says_what_to_do(bench, monkeypatch, capsys):
    monkeypatch.setattr("sys.version_info", (3, 9, 0))
    status, out, _ = call(monkeypatch, capsys, "doctor")
    assert status == 1 and "NO python" in out and "Install Python 3.11" in out


SMI = "#!/bin/sh\necho '| NVIDIA-SMI 470.1   Driver Version: 470.1   CUDA Version: 11.4 |'\n"


def test_the_doctor_holds_the_torch_build_against_the_driver(monkeypatch, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine's driver fits")
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    check = audit._check("torch", True, audit._torch, "advice")
    assert not check["ok"] and "sees no GPU; driver 470.1, up to CUDA 11.4" in check["found"]
    assert "CPUs only" in check["found"] or f"CUDA {torch.version.cuda}" in check["found"]


def test_the_doctor_tells_a_hub_that_does_not_answer_from_a_token_that_is_missing(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("lab.hub.reachable", lambda: False)
    assert audit._hub()[1].endswith("does not answer")
    monkeypatch.setattr("lab.hub.reachable", lambda: True)
    assert audit._hub() == (False, "https://huggingface.co answers; no token")


def test_the_doctor_sees_a_kernel_of_another_python(monkeypatch, tmp_path):
    (tmp_path / "kernels" / "python3").mkdir(parents=True)
    (tmp_path / "kernels" / "python3" / "kernel.json").write_text('{"argv": ["/elsewhere/python"]}')
    monkeypatch.setattr(
        "jupyter_client.kernelspec.KernelSpecManager.find_kernel_specs", lambda _: {"python3": str(tmp_path / "kernels/python3")}
    )
    ok, found = audit._kernel()
    assert not ok and "starts /elsewhere/python, which is not this Python" in found


@pytest.mark.parametrize(
    ("shell", "words"), [("bash", ["COMP_WORDS", "complete "]), ("zsh", ["#compdef lab"]), ("fish", ["complete ", "--command lab"])]
)
def test_each_shell_gets_its_completion(shell, words):
    done = CliRunner().invoke(cli.app, [], prog_name="lab", env={"_LAB_COMPLETE": f"source_{shell}"})
    assert done.exit_code == 0 and all(word in done.output for word in words), done.output
    assert "--install-completion" in CliRunner().invoke(cli.app, ["--help"]).output


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lab swe", {"sweep"}),
        ("lab run ", {"mini"}),
        ("lab run mini --recipe ", {"toy", "toy-claims", "long"}),
        ("lab run mini --from d", {"draw", "double"}),
        ("lab run mini -p c", {"count="}),
        ("lab run nothing --recipe ", set()),
        ("lab sweep mini --engine ", {"local", "slurm", "ray"}),
        ("lab run mini --rec", {"--recipe"}),
    ],
)
def test_the_shell_is_offered_what_may_stand_there(bench, line, offered):
    words = line.split() + ([""] if line.endswith(" ") else [])
    environment = {"_LAB_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    done = CliRunner().invoke(cli.app, [], prog_name="lab", env=environment)
    assert set(done.output.split()) == offered


@pytest.mark.parametrize(
    "command", [[], ["run"], ["sweep"], ["demo"], ["papers"], ["report"], ["figures"], ["verify"], ["rerun"], ["doctor"]]
)
def test_every_command_explains_itself(command):
    result = CliRunner().invoke(cli.app, [*command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output


def test_every_command_speaks_json():
    for command in cli.app.registered_commands:
        assert "as_json" in command.callback.__annotations__, command.callback.__name__


@pytest.mark.parametrize("code", ["import lab", "import sys; sys.argv = ['lab', '--help']; import lab.cli; lab.cli.main()"])
def test_starting_is_quick_and_loads_nothing_heavy(code):
    """Quick by the processor's time: a busy machine is no fault of ours."""
    heavy = ["torch", "transformers", "peft", "trl", "datasets", "pandas", "numpy", "matplotlib", "papermill", "nbformat"]
    check = f"import sys, atexit; atexit.register(lambda: print(sorted(set({heavy!r}) & set(sys.modules)), file=sys.stderr)); {code}"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env={**os.environ, "COLUMNS": "100"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stderr.strip() == "[]"
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


SAID = "Stopped; go on with: lab run."


@pytest.mark.parametrize(("ending", "words"), [(f"raise Interrupted('{SAID}')", f"lab: {SAID}"), ("raise", "lab: Stopped.")])
def test_an_interrupt_in_the_middle_of_an_import_leaves_our_status(tmp_path, ending, words):
    """A dataclass is made by exec of a text: CPython would end the process by SIGINT whatever it is told afterwards."""
    lines = ["try:", "    exec('raise KeyboardInterrupt')", "except KeyboardInterrupt:", f"    {ending}"]
    body = ["import typer", "from lab import cli", "from lab.errors import Interrupted", "cli.app = typer.Typer()", "@cli.app.command()"]
    (tmp_path / "stopped.py").write_text("\n".join([*body, "def stop():", *(f"    {line}" for line in lines), "cli.main()"]))
    done = subprocess.run([sys.executable, "-m", "stopped"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (130, words)


def test_a_dry_run_of_a_run_that_goes_on_says_what_it_keeps(bench, outputs, monkeypatch, capsys):
    from lab import pipeline
    from lab.running.records import StepRecord

    folder = outputs / "mini" / "before"
    runs.Run.open(folder, "mini", recipe="toy", overrides={"double.factor": "5"}).close()
    monkeypatch.setattr(StepRecord, "unchanged", lambda record, mark: True)
    step = steps.begin("mini", "draw", str(folder), {"count": 4, "seed": 0, "data": "", "pause_s": 0.0, "more": False, "fail": False})
    step.finish(count=4)
    status, out, _ = call(monkeypatch, capsys, "run", "mini", "--resume", "--dry-run")
    assert status == 0 and f"goes on in {folder}" in out and "1. draw is done and kept" in out and "* factor = 5.0" in out
    status, out, _ = call(monkeypatch, capsys, "run", "mini", "--from", "draw", "--dry-run")
    assert "1. draw (mini/1_draw.ipynb)" in out and "kept" not in out
    assert [step["kept"] for step in pipeline.describe("mini")["steps"]] == [False, False]
