"""Bad input of every kind, some of it made up by hypothesis: one sentence, never a traceback, nothing written."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab import files
from lab.errors import LabError, RunError, SettingsError
from lab.running import papers, runs
from lab.running.parameters import parameters_of, parse_cell

MINI = Path(__file__).parents[1] / "fixtures" / "bench"
often = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
words = st.text(max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words, lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


@pytest.fixture(autouse=True)
def mini(monkeypatch):
    monkeypatch.setenv("LAB_HOME", str(MINI))


def is_sentence(error: LabError) -> bool:
    text = str(error)
    return bool(text.strip()) and "Traceback" not in text


@often
@given(name=words, text=words)
def test_any_override_is_taken_or_refused(name, text):
    try:
        papers.plan("mini", "toy", {name: text})
    except SettingsError as error:
        assert is_sentence(error)


@often
@given(content=st.binary(max_size=60) | st.dictionaries(words, values, max_size=3).map(lambda content: json.dumps(content).encode()))
def test_any_recipe_file_is_taken_or_refused(bench, content):
    (bench / "papers" / "mini" / "recipes" / "toy.yaml").write_bytes(content)
    os.environ["LAB_HOME"] = str(bench)
    try:
        papers.plan("mini", "toy")
    except SettingsError as error:
        assert is_sentence(error) and "toy.yaml" in str(error)


@often
@given(source=st.text(max_size=60) | st.builds("{}: {} = {!r}".format, st.sampled_from(["a", "b"]), words, values))
def test_any_parameters_cell_is_read_or_refused(source):
    try:
        parse_cell(source)
    except SyntaxError as error:
        assert error.msg


@often
@given(content=st.binary(max_size=80) | values.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_a_notebook_or_refused(tmp_path, content):
    path = tmp_path / "n.ipynb"
    path.write_bytes(content)
    with pytest.raises(SettingsError):
        parameters_of(path)


@settings(often, max_examples=15)
@given(cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_a_damaged_manifest_is_refused_and_left_alone(tmp_path, cut, flip):
    folder = tmp_path / f"run-{cut}-{flip}"
    runs.Run.open(folder, "mini").close()
    path = folder / "manifest.json"
    damaged = bytearray(path.read_bytes()[: max(1, len(path.read_bytes()) - cut)])
    damaged[flip % len(damaged)] = 0xFF
    path.write_bytes(damaged)
    with pytest.raises(RunError) as caught:
        runs.Run.open(folder, "mini")
    assert is_sentence(caught.value) and path.read_bytes() == damaged


@often
@given(value=st.dictionaries(words, values, max_size=4))
def test_whatever_is_logged_comes_back(tmp_path, value):
    path = tmp_path / "log.jsonl"
    path.unlink(missing_ok=True)
    files.append_line(path, value)
    assert files.read_lines(path) == [files.plain(value)]
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
