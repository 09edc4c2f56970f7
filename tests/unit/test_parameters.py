"""The parameters cell: read without running it, checked before anything starts."""

import json

import pytest

from lab.errors import SettingsError
from lab.running.parameters import check_values, parameters_of, parse_cell

CELL = '''"""What can be changed."""
# a heading
run: str = ""  # run folder
steps: int = 100  # optimizer steps
lr: float = 1  # learning rate
widths: list[int] = [8, 16]
note: Optional[str] = None  # anything = fine
more: dict[str, float] = {"a": 1.0}
on: bool = False
'''


def write(path, *sources, tag="parameters"):
    cells = [{"cell_type": "code", "source": text, "metadata": {"tags": [tag]}} for text in sources]
    path.write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {}}))
    return path


def test_names_types_defaults_and_meanings_are_read():
    found = parse_cell(CELL)
    assert list(found) == ["run", "steps", "lr", "widths", "note", "more", "on"]
    assert found["lr"].default == 1.0 and isinstance(found["lr"].default, float)
    assert (found["steps"].annotation, found["steps"].meaning) == ("int", "optimizer steps")
    assert found["note"].meaning == "anything = fine" and found["widths"].meaning == ""


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("steps = 3", "only `name: type = literal`"),
        ("import os", "only `name: type = literal`"),
        ("steps: int", "only `name: type = literal`"),
        ("steps: int = 2 * 3", "default of steps is not a literal"),
        ("steps: int = 'three'", "default of steps = 'three': input should be a valid integer"),
        ("steps: int = True", "default of steps = True"),
        ("rate: torch.dtype = 1", "type 'torch.dtype' is not plain"),
        ("rate: int | None = 1", "is not plain"),
        ("a: int = 1\na: int = 2", "a is given twice"),
        ("steps: __import__('os').system('true') = 1", "is not plain"),
    ],
)
def test_anything_but_plain_literals_is_refused_with_its_line(tmp_path, line, words):
    notebook = write(tmp_path / "n.ipynb", "first: int = 1\n" + line)
    with pytest.raises(SettingsError, match=r"parameters cell, line [23]: ") as caught:
        parameters_of(notebook)
    assert words in str(caught.value)


@pytest.mark.parametrize(("sources", "tag"), [([], "parameters"), (["a: int = 1", "b: int = 2"], "parameters"), (["a: int = 1"], "other")])
def test_exactly_one_cell_holds_the_parameters(tmp_path, sources, tag):
    with pytest.raises(SettingsError, match="exactly one cell must be tagged 'parameters'"):
        parameters_of(write(tmp_path / "n.ipynb", *sources, tag=tag))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"cells": 3}'])
def test_a_file_that_is_no_notebook_is_named(tmp_path, content):
    path = tmp_path / "n.ipynb"
    path.write_text(content)
    with pytest.raises(SettingsError, match="n.ipynb"):
        parameters_of(path)


def test_an_absent_notebook_is_named(tmp_path):
    with pytest.raises(SettingsError, match="There is no notebook"):
        parameters_of(tmp_path / "absent.ipynb")


def test_unknown_names_get_the_closest_match(tmp_path):
    with pytest.raises(SettingsError, match="Unknown parameter of .*n.ipynb 'step'. Did you mean 'steps'"):
        check_values(write(tmp_path / "n.ipynb", CELL), {"step": 3})


@pytest.mark.parametrize(
    ("name", "value"),
    [("steps", "3"), ("steps", 3.0), ("steps", True), ("lr", "fast"), ("on", 1), ("widths", [1, "2"]), ("widths", 3), ("note", 3)],
)
def test_wrong_types_are_refused(tmp_path, name, value):
    with pytest.raises(SettingsError, match=f"^{name} = "):
        check_values(write(tmp_path / "n.ipynb", CELL), {name: value})


def test_yamls_text_for_a_small_number_is_explained(tmp_path):
    with pytest.raises(SettingsError, match="YAML reads 1e-4 as text: write 0.0001"):
        check_values(write(tmp_path / "n.ipynb", CELL), {"lr": "1e-4"})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-4", 1e-4),
        ("lr", "2", 2.0),
        ("steps", "7", 7),
        ("run", "7", "7"),
        ("run", "'a b'", "a b"),
        ("run", "null", "null"),
        ("note", "null", None),
        ("note", "text", "text"),
        ("widths", "[1, 2]", [1, 2]),
        ("on", "true", True),
        ("more", "{a: 2}", {"a": 2.0}),
    ],
)
def test_texts_of_a_command_line_become_values_of_the_declared_type(name, text, value):
    parsed = parse_cell(CELL)[name].parse(text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize(
    ("name", "text"), [("steps", "1.5"), ("steps", "many"), ("widths", "1, 2"), ("widths", "[1,"), ("on", "1"), ("lr", "")]
)
def test_texts_of_another_type_are_refused(name, text):
    with pytest.raises(SettingsError, match=f"^{name} = "):
        parse_cell(CELL)[name].parse(text)
