"""Committed notebooks: no outputs, the same first cells everywhere, thin."""

import ast
import json
from pathlib import Path

import pytest

from lab.running.parameters import TAG, parameters_of

ROOT = Path(__file__).parents[2]
NOTEBOOKS = [path for folder in ("notebooks", "tests/fixtures/bench/notebooks") for path in sorted((ROOT / folder).rglob("*.ipynb"))]
NOTEBOOKS = [path for path in NOTEBOOKS if ".ipynb_checkpoints" not in path.parts]
MOST_STATEMENTS = 15  # in one cell, imports not counted
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=[str(path.relative_to(ROOT)) for path in NOTEBOOKS])


def cells(path, kind=None):
    content = json.loads(path.read_text())
    return [cell for cell in content["cells"] if kind in (None, cell["cell_type"])]


def source(cell):
    return "".join(cell["source"])


def test_no_outputs_are_committed(path):
    content = json.loads(path.read_text())
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path, "code"))
    assert set(content["metadata"]) <= {"kernelspec", "language_info"}, "widget state or papermill's record was left"
    assert all(set(cell["metadata"]) <= {"tags"} for cell in content["cells"])
    assert content["metadata"]["kernelspec"]["name"] == "python3"


def test_the_index_lists_it(path):
    folder = ROOT / "notebooks"
    if folder in path.parents:
        assert f"({path.relative_to(folder)})" in (folder / "README.md").read_text(), "run: python benchmarks/index.py"


def test_the_first_cells_are_title_parameters_and_set_up(path):
    title, parameters, setup, *_ = cells(path)
    assert title["cell_type"] == "markdown" and source(title).startswith("# ") and len(source(title).splitlines()) > 1
    assert TAG in parameters["metadata"].get("tags", [])
    assert setup["cell_type"] == "code" and "import" in source(setup)


def test_every_parameter_says_what_it_means(path):
    assert [name for name, parameter in parameters_of(path).items() if not parameter.meaning] == []


def test_papermills_own_help_reads_every_parameter(path):
    from papermill.inspection import _infer_parameters
    from papermill.iorw import load_notebook_node

    found = _infer_parameters(load_notebook_node(str(path)), name="python3", language="python")
    assert {parameter.name for parameter in found} == set(parameters_of(path)), "a second = in the line, also in the comment, hides it"


def test_cells_call_and_show(path):
    for cell in cells(path, "code"):
        if TAG in cell["metadata"].get("tags", []):
            continue
        tree = ast.parse(source(cell))
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)], "a class belongs in lab/"
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not isinstance(node, ast.Import | ast.ImportFrom)]
        assert len(statements) <= MOST_STATEMENTS, f"{len(statements)} statements in one cell: logic belongs in lab/"


def test_what_a_step_saves_may_be_saved_again_by_one_that_is_taken_up(path):
    calls = [node for cell in cells(path, "code") for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.Call)]
    saves = [ast.unparse(call) for call in calls if ast.unparse(call.func).endswith(".save") and ".folder /" in ast.unparse(call)]
    assert all("overwrite=True" in call for call in saves), saves
