"""Looking twice: a run repeats itself, its files are as written, and both notice when they are not."""

import pytest

from lab import audit, files
from lab.errors import RunError
from lab.pipeline import run_recipe
from lab.running import provenance
from lab.running.records import StepRecord


@pytest.fixture
def run(bench, monkeypatch):
    monkeypatch.setenv("LAB_WARM", "0")
    return run_recipe("mini", "toy", {"seed": "3"})


def test_a_run_repeats_itself_and_a_difference_is_shown(run):
    same = audit.rerun(run)
    assert same.second != run and same.differences == [] and same.compared == 5
    assert "all 5 results are equal" in same.text()
    results = files.read_json(run / "draw" / "results.json")
    files.write_json(run / "draw" / "results.json", {**results, "total": results["total"] + 1})
    other = audit.compare(run, same.second, 1e-6)
    assert [(row["step"], row["result"]) for row in other.differences] == [("draw", "total")]
    assert "1 of 5 results differ" in other.text()
    assert audit.verify(run) == ["draw/results.json has changed"]
    (run / "draw" / "numbers.txt").unlink()
    assert "draw/numbers.txt is missing" in audit.verify(run)
    assert audit.verify(same.second) == []


def test_a_run_of_other_code_is_not_repeated(run, monkeypatch):
    assert StepRecord(run / "draw").info["code"], "the step recorded what it imported"
    monkeypatch.setattr(provenance, "changed_code", lambda recorded: ["tables.py"])
    with pytest.raises(RunError, match=r"lab/tables.py has changed since .* was made; check out"):
        audit.rerun(run)
