"""Two processes sample, label, score and search as one does, and go on where a kill left them."""

import pytest
import torch
from safetensors import safe_open

from lab import launch
from lab.files import append_line
from lab.methods.latenttts import toy
from lab.methods.latenttts.model import RewardModel
from lab.sampling.curves import scored
from lab.sampling.labels import Labelling, label
from lab.sampling.pool import Pool, sample
from lab.sampling.sampler import Sampler
from lab.sampling.search import search

HOW = Labelling(rollouts=3, drop_all_wrong=False, drop_all_right=False, answer=3)


def contents(folder):
    """{file: its metadata and the bytes of its tensors}."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118 - no mapping
            found[path.name] = (file.metadata(), tensors)
    return found


@pytest.fixture(scope="module")
def model():
    return toy.untrained(3).eval()


@pytest.fixture
def started(monkeypatch):
    """How many processes each launch had."""
    counts, real = [], launch.launch
    monkeypatch.setattr(launch, "launch", lambda target, count, **how: (counts.append(count), real(target, count, **how))[1])
    return counts


def test_samples_and_labels_of_two_processes_are_those_of_one(model, tmp_path, started):
    torch.set_num_threads(1)
    data, noise = toy.questions("test", 10, 0), Sampler(by="noise", strength=2.0)
    dropout = Sampler(by="dropout", strength=0.3, regime="annotation")
    for name, processes in (("one", 1), ("two", 2)):
        pool = sample(model, data, noise, 3, tmp_path / name, processes=processes, max_new_tokens=3, chunk=2)
        label(model, pool, dropout, HOW, tmp_path / f"{name}-labels", processes=processes)
    reward = RewardModel.start(model, seed=1)
    assert scored(pool, reward, 2) == scored(Pool(tmp_path / "one"), reward) and len(scored(pool, reward)) == 10
    assert started == [2, 2, 2] and len(contents(tmp_path / "one")) == 5
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert contents(tmp_path / "one-labels") == contents(tmp_path / "two-labels")


def test_a_search_of_two_processes_is_that_of_one_and_keeps_what_a_killed_one_found(model, tmp_path, started):
    torch.set_num_threads(1)
    noise, told = Sampler(by="noise", strength=2.0), {"rule": "latenttts-coconut", "answer": 3, "batch": 6}
    asked = sample(model, toy.questions("test", 10, 0), noise, 2, tmp_path / "pool", max_new_tokens=3).asked
    reward = RewardModel.start(model, seed=1)
    alone = search(model, reward, asked, noise, 2, 3, tmp_path / "one", **told)
    (tmp_path / "two").mkdir()
    for line in (alone[1] | {"text": "kept"}, alone[8]):
        append_line(tmp_path / "two" / "beams-2x3.part-1", line)
    together = search(model, reward, asked, noise, 2, 3, tmp_path / "two", processes=2, **told)
    assert together == [line | ({"text": "kept"} if line["number"] == 1 else {}) for line in alone] and started == [2]
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["beams-2x3.jsonl"]
    assert [line["number"] for line in alone] == list(range(10)) and all(line["nodes"] for line in alone)
