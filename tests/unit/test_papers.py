"""Pipelines and recipes: order, conditions, and every mistake answered before a kernel starts."""

import pytest

from lab.errors import SettingsError
from lab.running import papers


def rewrite(bench, name, text):
    path = bench / "papers" / "mini" / name
    path.write_text(text)
    return path


def values(planned):
    return {step.step: step.values for step in planned}


def test_steps_are_ordered_by_what_they_need(bench):
    assert [spec.step for spec in papers.pipeline("mini").steps] == ["draw", "double", "extra"]


def test_a_step_gets_the_shared_values_it_knows_and_its_own(bench):
    found = values(papers.plan("mini", "toy"))
    assert found["draw"]["count"] == 4 and "count" not in found["double"]
    assert found["double"]["factor"] == 3.0 and found["double"]["seed"] == 0


def test_overrides_reach_every_step_that_knows_them_and_a_named_step_wins(bench):
    found = values(papers.plan("mini", "toy", ["draw.seed=5", "seed=2", "double.factor=1e1"]))
    assert (found["draw"]["seed"], found["double"]["seed"], found["double"]["factor"]) == (5, 2, 10.0)


def test_a_step_takes_part_only_under_its_condition(bench):
    assert list(values(papers.plan("mini", "long"))) == ["draw", "double", "extra"]
    assert list(values(papers.plan("mini", "long", {"more": "false"}))) == ["draw", "double"]


def test_recipes_are_the_files_that_are_no_steps_part(bench):
    assert papers.recipes("mini") == ["long", "toy", "toy-claims"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("mni", "toy"), "Unknown paper 'mni'. Did you mean 'mini'"),
        (("mini", "tyo"), "Unknown recipe of mini 'tyo'. Did you mean 'toy'"),
        (("mini", "toy", ["sed=1"]), "Unknown parameter of mini 'sed'. Did you mean 'seed'"),
        (("mini", "toy", ["draw.factor=1"]), "Unknown parameter of draw 'factor'"),
        (("mini", "toy", ["drwa.seed=1"]), "Unknown step of mini 'drwa'. Did you mean 'draw'"),
        (("mini", "toy", ["seed"]), "write name=value"),
        (("mini", "toy", ["=3"]), "write name=value"),
        (("mini", "toy", ["run=here"]), "chosen with --run"),
        (("mini", "toy", ["count=many"]), "count = 'many': input should be a valid integer"),
    ],
)
def test_wrong_requests_are_answered(bench, call, words):
    with pytest.raises(SettingsError) as caught:
        papers.plan(*call)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("recipes/toy.yaml", "cuont: 4", "toy.yaml: Unknown parameter of the mini pipeline 'cuont'. Did you mean 'count'"),
        ("recipes/toy.yaml", "count: four", "toy.yaml: count = 'four'"),
        ("recipes/toy.yaml", "a: [1", "toy.yaml, line"),
        ("recipes/toy.yaml", "- 1", "toy.yaml: must hold `name: value` lines"),
        ("recipes/toy.yaml", "run: here", "Unknown parameter of the mini pipeline 'run'"),
        ("recipes/toy-draw.yaml", "factor: 2.0", "toy-draw.yaml: Unknown parameter of mini/1_draw.ipynb 'factor'"),
        ("recipes/toy-draw.yaml", "run: here", "run is set by the workbench"),
        ("pipeline.yaml", "title: x\nsteps: {}", "`steps` must be a list"),
        ("pipeline.yaml", "title: x\nsteps: [{step: a, notebok: b}]", "Unknown StepSpec setting 'notebok'. Did you mean 'notebook'"),
        ("pipeline.yaml", "steps: [{step: a, notebook: mini/1_draw.ipynb}]", "title"),
        ("pipeline.yaml", "title: x\nsteps: [{step: a, notebook: n, needs: [b]}]", "Unknown step needed by a 'b'"),
        ("pipeline.yaml", "title: x\nsteps: [{step: a, notebook: n}, {step: a, notebook: n}]", "stands there twice"),
        ("pipeline.yaml", "title: x\nsteps: [{step: a, notebook: n, needs: [b]}, {step: b, notebook: n, needs: [a]}]", "round in a circle"),
        ("pipeline.yaml", "title: x\nsteps: [{step: a, notebook: mini/9_none.ipynb}]", "There is no notebook"),
        ("pipeline.yaml", "title: x\nsteps: [{step: a, notebook: mini/1_draw.ipynb, when: {moer: 1}}]", "Did you mean 'more'"),
    ],
)
def test_wrong_files_are_named(bench, name, text, words):
    rewrite(bench, name, text)
    with pytest.raises(SettingsError) as caught:
        papers.plan("mini", "toy")
    assert words in str(caught.value)


def test_an_empty_recipe_means_the_notebooks_defaults(bench):
    rewrite(bench, "recipes/toy.yaml", "")
    assert values(papers.plan("mini", "toy"))["draw"]["count"] == 3
