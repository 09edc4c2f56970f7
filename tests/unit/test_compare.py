"""The comparison without a model: budgets, what is read back, what the papers say."""

import json
from dataclasses import fields

import pytest

from lab import compare, reported
from lab.data.source import Source
from lab.entrants import ENTRANTS, Start, entrant
from lab.errors import SettingsError
from lab.train import TrainSettings
from lab.view import palette


def answered(folder, name, right, passes, written, **record):
    """The folder of a method that answered `len(right)` questions."""
    own = folder / name
    (own / "test").mkdir(parents=True)
    for number, correct in enumerate(right):
        spent = {"passes": passes, "output_tokens": written, "processing_time": 0.002}
        line = {"id": f"q{number}", "sample": 0, "is_correct": correct, **spent}
        with open(own / "test" / "samples.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
    spent = {"steps": 6, "tokens": 100, "seconds": 1.5}
    (own / compare.SPENT).write_text(json.dumps({"prompted": 0, "arm": name, "spent": spent} | record))


def test_the_table_is_read_back_from_the_folder(tmp_path):
    answered(tmp_path, "codi", [True] * 9 + [False], passes=8, written=5)
    answered(tmp_path, "softcot", [True] * 10, passes=7, written=7, prompted=3, arm="softcot")
    first, second = compare.table(tmp_path)
    assert (first["method"], first["accuracy"], first["thoughts"], first["written"], first["passes"]) == ("codi", 0.9, 3, 5, 8)
    assert first["accuracy_low"] == pytest.approx(0.596, abs=1e-3) and first["milliseconds"] == 2 and first["tokens"] == 100
    assert second["method"] == "softcot" and second["thoughts"] == 3


def fake(cost, unit="tokens"):
    """An entrant whose training of n steps costs `cost(n)`, and the numbers of steps it was asked for."""
    asked = []

    def train(begin, steps):
        asked.append(steps)
        setattr(begin.meter, unit, getattr(begin.meter, unit) + cost(steps))
        return steps

    return train, asked


def labels_then_stages(steps):
    """What a method of several parts costs: reading everything once, then steps whose first hundred are dearer than the others."""
    return 20_000 + 700 * min(steps, 100) + 400 * max(0, steps - 100) + 0.05 * steps**2


@pytest.mark.parametrize("unit", ["tokens", "seconds", "cpu_seconds"])
@pytest.mark.parametrize(
    "cost", [labels_then_stages, lambda n: 900 * n, lambda n: 5_000 * n**0.7], ids=["parts", "linear", "cheaper later"]
)
def test_a_budget_holds_whatever_steps_cost(cost, unit, tmp_path, monkeypatch):
    train, asked = fake(cost, unit)
    monkeypatch.setattr(compare, "entrant", lambda name: train)
    begin = Start(*(None for _ in fields(Start)[:5]), how=TrainSettings(steps=1), folder=tmp_path)
    trained, spent = compare.learn("any", begin, compare.Budget(unit=unit, amount=800_000, probe=12))
    assert abs(spent[unit] / 800_000 - 1) <= compare.MISSED and spent[unit] == pytest.approx(cost(trained), rel=1e-6)
    assert len(asked) <= 3 + compare.TRIES, "three probes, and two corrections at most"
    assert (len(asked) == 4) == (cost(asked[3]) == pytest.approx(800_000, rel=compare.MISSED)), "a budget that was met is not spent again"


def test_a_cost_that_jumps_past_the_budget_ends_with_the_nearest_training(tmp_path, monkeypatch):
    def cost(steps):
        return 1_000 * steps + (300_000 if steps > 500 else 0)

    train, asked = fake(cost)
    monkeypatch.setattr(compare, "entrant", lambda name: train)
    begin = Start(*(None for _ in fields(Start)[:5]), how=TrainSettings(steps=1), folder=tmp_path)
    trained, spent = compare.learn("any", begin, compare.Budget(unit="tokens", amount=650_000))
    assert cost(trained) == spent["tokens"] and abs(cost(trained) - 650_000) == min(abs(cost(steps) - 650_000) for steps in asked[3:])


def test_a_budget_as_small_as_a_probe_is_trained_for(tmp_path, monkeypatch):
    train, asked = fake(lambda steps: 100 * steps + len(asked))
    monkeypatch.setattr(compare, "entrant", lambda name: train)
    begin = Start(*(None for _ in fields(Start)[:5]), how=TrainSettings(steps=1), folder=tmp_path)
    assert compare.learn("any", begin, compare.Budget(unit="tokens", amount=1200, probe=12))[1]["steps"] == 12 == asked[-1]


def test_what_trains_nothing_is_not_tried_again(tmp_path, monkeypatch):
    train, asked = fake(lambda steps: 0)
    monkeypatch.setattr(compare, "entrant", lambda name: train)
    begin = Start(*(None for _ in fields(Start)[:5]), how=TrainSettings(steps=1), folder=tmp_path)
    assert compare.learn("start", begin, compare.Budget(unit="tokens", amount=100))[1]["steps"] == 0 and asked[3:] == [0]


PLANS = [
    ({12: 8, 36: 16}, 288),
    ({12: 14, 36: 12}, 270),
    ({12: 0, 36: 0}, 0),
    ({12: 51, 36: 52, 1205: 164}, 537),  # TaH: both probes lie nearer than the training that went too far
]


@pytest.mark.parametrize(("costs", "steps"), PLANS)
def test_steps_are_planned_even_where_a_measurement_was_disturbed(costs, steps):
    assert compare.planned(costs, 100) == steps


def test_a_method_left_out_says_why_and_has_no_row(tmp_path):
    (tmp_path / "tah").mkdir()
    (tmp_path / "tah" / compare.SPENT).write_text('{"left_out": "Not a single hard token"}')
    assert compare.left_out(tmp_path) == {"tah": "Not a single hard token"} and compare.table(tmp_path) == []


def test_the_papers_numbers_stand_beside_with_what_differs(tmp_path):
    answered(tmp_path, "coconut", [True, False], passes=5, written=2)
    answered(tmp_path, "no_cot", [False, False], passes=2, written=2)
    toy = {"backbone": "toy:llama", "benchmark": "permutations", "temperature": 0.0}
    rows = compare.against_papers(tmp_path, toy)
    assert {row["method"] for row in rows} == {"coconut"} and {row["paper"] for row in rows} >= {"34.100"}
    assert {row["claim"] for row in rows} == {"COCONUT", "No-CoT", "COCONUT with the repository's settings"}
    gsm8k = [row for row in rows if "gsm8k" in row["measure"]]
    assert gsm8k and all(row["ours"] == "" and "dataset: gsm8k, here permutations" in row["what differs"] for row in gsm8k)
    same = compare.against_papers(tmp_path, {"backbone": "openai-community/gpt2", "benchmark": "gsm8k", "temperature": 0.0})
    ours = {(row["claim"], row["measure"]): row["ours"] for row in same}
    assert ours["COCONUT", "gsm8k accuracy"] == "50.000" and ours["COCONUT", "prosqa accuracy"] == ""


def test_every_method_of_the_workbench_takes_part_or_is_named_as_left_out():
    card = (reported.papers.home() / "papers" / "compare" / "README.md").read_text()
    for key in palette.METHODS:
        assert key in ENTRANTS or palette.TITLES[key] in card.split("Left out:")[1]


def test_toy_problems_are_spelled_so_that_every_method_can_write_them():
    (example, *_) = compare.problems(Source(train_problems=4, test_problems=4), "train")
    operators = example.question.split()[:3]
    assert [step.split()[0] for step in example.steps] == operators and example.steps[-1].split()[1] == example.answer
    assert example.answer.isdigit() and "s" not in example.question.replace("ops", "")


@pytest.mark.parametrize("values", [{"unit": "hours"}, {"amount": 0}, {"unit": "steps", "probe": 2}])
def test_budgets_are_checked(values):
    with pytest.raises(SettingsError):
        compare.Budget.check(**values)


def test_an_unknown_method_is_named_with_the_closest():
    with pytest.raises(SettingsError, match="Did you mean 'coconut'"):
        entrant("coconutt")
