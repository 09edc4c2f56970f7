"""The comparison with tiny real models: equal budgets, results that a second call finds, methods that cannot take part."""

from dataclasses import replace

import pytest
import torch

from lab import compare
from lab.data.source import Source
from lab.entrants import Start
from lab.errors import SettingsError
from lab.evaluate import Decoding
from lab.train import TrainSettings

SOURCE = Source(train_problems=64, test_problems=8)
HOW = TrainSettings(steps=1, global_batch=8, lr=1e-3, save_every=0, log_every=0, device="cpu")
DECODING = Decoding(max_new_tokens=4, batch=8)


@pytest.fixture(scope="module")
def begin(tmp_path_factory) -> Start:
    return compare.start("toy:llama-micro", SOURCE, tmp_path_factory.mktemp("compare"), HOW, thoughts=3, base_steps=2)


def test_equal_tokens_are_equal_for_trainings_of_one_and_of_several_parts(begin, tmp_path):
    spent, budget = {}, compare.Budget(unit="tokens", amount=10_000, probe=6)
    for name in ("cot", "coconut", "tah", "dtt"):
        _, spent[name] = compare.learn(name, replace(begin, folder=tmp_path / name), budget)
    assert all(abs(one["tokens"] / budget.amount - 1) <= compare.MISSED for one in spent.values()), spent
    assert spent["cot"]["steps"] > spent["dtt"]["steps"], "dearer steps are fewer"


def test_what_was_measured_is_not_measured_again_and_a_wrong_name_comes_first(begin, tmp_path):
    test, budget = compare.problems(SOURCE, "test"), compare.Budget(amount=6)
    compare.run(["no_cot"], begin, budget, test, tmp_path, DECODING)
    before = (tmp_path / "no_cot" / compare.SPENT).stat().st_mtime_ns
    compare.run(["start", "no_cot", "lta"], begin, budget, test, tmp_path, DECODING)
    assert (tmp_path / "no_cot" / compare.SPENT).stat().st_mtime_ns == before
    rows = {row["method"]: row for row in compare.table(tmp_path)}
    assert rows["lta"]["thoughts"] == 3 and rows["no_cot"]["thoughts"] == 0 and rows["lta"]["questions"] == len(test)
    assert rows["start"]["steps"] == 0 and rows["no_cot"]["steps"] == 6
    with pytest.raises(SettingsError, match="Unknown method to compare"):
        compare.run(["no_cot", "codee"], begin, budget, test, tmp_path / "other", DECODING)
    assert not (tmp_path / "other").exists()


def test_a_method_learns_the_same_alone_and_after_others(begin, tmp_path):
    made = []
    for others in ([], ["cot", "colar"]):
        for name in [*others, "codi"]:
            trained, _ = compare.learn(name, replace(begin, folder=tmp_path / f"{len(made)}" / name), compare.Budget(amount=2))
        made.append(trained.model.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_a_start_without_a_mistake_leaves_tah_out(begin, tmp_path, monkeypatch):
    from lab.methods.tah import labels

    monkeypatch.setattr(labels, "statistics", lambda body, rows: [row | {"mismatch": [0] * len(row["mask"])} for row in rows])
    compare.run(["tah"], begin, compare.Budget(amount=6), compare.problems(SOURCE, "test"), tmp_path, DECODING)
    assert "Not a single hard token" in compare.left_out(tmp_path)["tah"] and compare.table(tmp_path) == []
