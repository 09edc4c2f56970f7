"""Every paper's pipeline, two steps of everything, through papermill: judged by what it wrote."""

import json

import pytest

from lab.ablation.subjects import RUNS, subject_of
from lab.pipeline import run_recipe
from lab.running import kernels, papers, runs


@pytest.fixture(scope="module", autouse=True)
def warm():
    """One warm process for the kernels of all papers."""
    with kernels.server():
        yield


@pytest.mark.parametrize("key", papers.papers())
def test_the_smoke_recipe_runs_from_end_to_end(key, tmp_path):
    folder = run_recipe(key, "smoke", folder=tmp_path / "run")
    steps = runs.open_run(folder).steps()
    assert {step.name for step in steps} == {planned.step for planned in papers.plan(key, "smoke")}
    for step in steps:
        executed = json.loads((folder / "notebooks" / f"{step.name}.ipynb").read_text())
        outputs = [output for cell in executed["cells"] for output in cell.get("outputs", [])]
        assert not [output for output in outputs if output["output_type"] == "error"]
        assert (folder / "notebooks" / f"{step.name}.html").stat().st_size > 10_000
    wanted = papers.pipeline(key).result
    assert wanted and runs.open_run(folder).step(wanted).results, "the step that holds the result has a headline"
    assert any(step.files("figures", "*.svg") or step.files("views", "*.html") for step in steps), "something to look at"
    assert 10_000 < (folder / "report.html").stat().st_size < 5_000_000
    if key not in RUNS:
        return
    subject = subject_of(str(folder)).first(3)
    answers = subject.model.generate(subject.questions, **subject.options).rows
    assert subject.name == key and len(answers) == len(subject.gold) == 3, "an ablation can ask and judge its model"
    assert {bool(subject.right(row, gold)) for row, gold in zip(answers, subject.gold, strict=True)} <= {True, False}
