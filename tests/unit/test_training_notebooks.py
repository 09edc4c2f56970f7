"""Every notebook that trains offers the same ways to spread a training and to follow it; so do those that answer benchmarks."""

import pytest

from lab.running import papers
from lab.running.parameters import parameters_of
from lab.running.provenance import home

TRAINING = [
    *("adaptive/1_train", "adaptive/2_rl", "coconut/1_train", "codi/1_train", "colar/1_train", "dtt/1_warm_up", "dtt/2_train"),
    *("latenttts/2_train_rm", "lta/1_train", "tah/3_train"),
]


@pytest.mark.parametrize("name", TRAINING)
def test_processes_sharding_and_tracker_are_parameters(name):
    path = home() / "notebooks" / f"{name}.ipynb"
    known = {parameter: about.default for parameter, about in parameters_of(path).items()}
    assert (known["processes"], known["sharding"], known["report_to"]) == (1, "ddp", "none")
    for parameter in ("processes", "sharding", "report_to"):
        text = path.read_text()
        assert text.count(parameter) > 1 or "step.parameters" in text  # used, not only declared


def test_no_training_notebook_is_missing_above():
    steps = {spec.notebook for paper in papers.papers() for spec in papers.pipeline(paper).steps}
    assert {name for name in steps if "train" in name or "warm_up" in name or "rl" in name} == {f"{name}.ipynb" for name in TRAINING}


@pytest.mark.parametrize(
    "name",
    [f"{paper}/2_evaluate" for paper in ("coconut", "codi", "colar", "lta")] + ["adaptive/3_evaluate", "dtt/3_evaluate", "tah/4_evaluate"],
)
def test_evaluations_of_benchmarks_can_be_shared_by_processes(name):
    assert parameters_of(home() / "notebooks" / f"{name}.ipynb")["processes"].default == 1
