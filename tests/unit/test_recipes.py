"""Every shipped recipe, step file, sweep and demo line is loaded and checked against the notebooks."""

import json
from pathlib import Path

import pytest

from lab import pipeline
from lab.running import papers
from lab.running.parameters import parameters_of
from lab.running.provenance import home
from lab.sweep import _grid

KEYS = papers.papers()
RECIPES = [(key, recipe) for key in KEYS for recipe in papers.recipes(key)]


@pytest.mark.parametrize("key", KEYS)
def test_a_paper_is_complete(key):
    folder = papers.folder(key)
    assert (folder / "README.md").is_file(), "the card: equation, function, test"
    assert papers.pipeline(key).title
    assert {"smoke", "toy"} <= set(papers.recipes(key))


@pytest.mark.parametrize("key", KEYS)
def test_every_notebook_of_a_pipeline_can_be_given_a_run_and_a_seed(key):
    for spec in papers.pipeline(key).steps:
        found = parameters_of(spec.path)
        assert (found["run"].annotation, found["run"].default) == ("str", "")
        assert found["seed"].annotation == "int"


@pytest.mark.parametrize(("key", "recipe"), RECIPES, ids=[f"{key}-{recipe}" for key, recipe in RECIPES])
def test_a_recipe_fits_its_notebooks(key, recipe):
    planned = papers.plan(key, recipe)
    assert planned, "no step takes part"
    taking_part = {step.step for step in planned}
    for step in planned:
        optional = {spec.step for spec in papers.pipeline(key).steps if spec.when}
        assert set(step.spec.needs) <= taking_part | optional


@pytest.mark.parametrize(("key", "recipe"), RECIPES, ids=[f"{key}-{recipe}" for key, recipe in RECIPES])
def test_a_dry_run_describes_every_recipe(key, recipe):
    described = pipeline.describe(key, recipe)
    assert json.loads(json.dumps(described))["steps"]
    assert pipeline.describe_text(described).startswith(papers.pipeline(key).title)


@pytest.mark.parametrize("key", KEYS)
def test_what_a_paper_reports_names_its_source(key):
    assert all(line.claim and line.source for line in papers.reported(key))


@pytest.mark.parametrize("key", KEYS)
def test_a_sweep_names_a_recipe_and_values_it_accepts(key):
    for recipe in papers.sweeps(key):
        for name, choices in _grid(key, recipe, {}).items():
            for choice in choices:
                papers.plan(key, recipe, {name: choice})


def test_the_demo_lists_existing_recipes():
    wanted = papers.read_yaml(home() / "papers" / "demo.yaml")
    assert wanted
    for key, about in wanted.items():
        assert papers.plan(key, about["recipe"]) and about["seconds"] > 0


def test_no_recipe_file_is_left_out():
    known = {home() / "papers" / key / "recipes" / f"{recipe}.yaml" for key, recipe in RECIPES}
    parts = {path.parent / f"{path.stem}-{spec.step}.yaml" for path in known for spec in papers.pipeline(path.parent.parent.name).steps}
    found = {Path(path) for path in (home() / "papers").glob("*/recipes/*")}
    assert found <= known | parts
