"""What an estimate says against what a training takes."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from lab import cli, estimate
from lab.estimate import Training, counts, row
from lab.models.backbones import load_backbone
from lab.running import papers
from lab.train import TrainSettings, fit
from lab.training import place, probe
from lab.training.probe import activations

torch.set_num_threads(1)
SHAPE = {"vocab_size": 300, "layers": 3, "hidden": 64, "intermediate": 128, "heads": 4, "kv_heads": 2}
TINY = Training("train", "toy:llama", rows=8, tokens=64, steps=6, shape=SHAPE)


def collate(rows):
    ids = torch.tensor(rows)
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def own_time(monkeypatch):
    """Time counts where this process works: another may be at work."""
    for module in (probe, place):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=time.process_time, monotonic=time.process_time))


def test_memory_is_what_a_training_holds_and_time_within_a_factor_of_five(tmp_path, own_time):
    model, most = load_backbone("toy:llama", **SHAPE), []

    def loss(model, batch):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            value = model(**batch, use_cache=False).loss
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        most.append(sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own))
        return value, {}

    settings = TrainSettings.check(steps=6, global_batch=8, save_every=1, keep=1, device="cpu")
    result = fit(model, [[i % 300] * 64 for i in range(48)], collate, loss, settings, tmp_path)
    told = row(TINY)
    parameters = sum(p.numel() for p in model.parameters())
    assert (told["parameters"], told["learning"]) == (parameters, result.learning) == (parameters, parameters)
    moments = torch.load(tmp_path / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"].values()
    held = sum(tensor.nbytes for state in moments for tensor in state.values() if tensor.dim())
    assert told["optimizer GiB"] * estimate.GIB == held
    assert told["activations GiB"] * estimate.GIB == pytest.approx(max(most) + 2 * 4 * 8 * 64 * 300, rel=0.1)  # twice the logits
    assert told["seconds a step"] / 5 < result.seconds / 6 < 5 * told["seconds a step"] + 0.2
    assert told["tokens"] == 6 * 8 * 64 and told["fits"]


def test_what_is_frozen_shared_or_halved_takes_less():
    from dataclasses import replace

    plain, half = row(TINY, measure=False), row(replace(TINY, bf16=True), measure=False)
    assert half["activations GiB"] < 0.8 * plain["activations GiB"] and half["optimizer GiB"] == plain["optimizer GiB"]
    pieces = row(replace(TINY, processes=4, sharding="fsdp"), measure=False)
    assert pieces["optimizer GiB"] == plain["optimizer GiB"] / 4 and pieces["activations GiB"] < 0.3 * plain["activations GiB"]
    total, learning = counts(replace(TINY, lora=(4, ("q", "v"))))
    assert learning == 3 * 4 * (64 + 64 + 64 + 32) and total == plain["parameters"] + learning
    kept = activations(("toy:llama", 0, tuple(sorted(SHAPE.items()))), 8, 64)
    assert kept + 2 * 4 * 8 * 64 * 300 == plain["activations GiB"] * estimate.GIB


def test_a_frozen_backbone_keeps_less_and_is_gone_through_faster(own_time):
    from dataclasses import replace

    told = row(replace(TINY, frozen=True, parts=lambda config: torch.nn.Linear(8, 8)))
    assert told["learning"] == 72 and told["activations GiB"] < 0.9 * row(TINY, measure=False)["activations GiB"]
    body = replace(TINY, shape={"vocab_size": 300, "layers": 2, "hidden": 256})
    assert row(replace(body, lora=(2, ("q",))))["seconds a step"] < 0.9 * row(body)["seconds a step"]


def test_a_method_that_says_few_words_needs_less():
    from dataclasses import replace

    large = replace(TINY, shape={**SHAPE, "vocab_size": 5000})
    some, none = (row(replace(large, said=said), measure=False)["activations GiB"] for said in (0.5, 0.0))
    assert none < some < 0.6 * row(large, measure=False)["activations GiB"]


def test_what_cannot_fit_is_told(monkeypatch):
    monkeypatch.setattr(estimate, "free_memory", lambda: (1000, "a small device"))
    told = row(TINY, measure=False)
    assert not told["fits"] and "does NOT fit" in estimate.text([told]) and "a small device" in estimate.text([told])


@pytest.mark.parametrize("paper", [paper for paper in papers.papers() if paper != "compare"])
def test_every_recipe_is_estimated(paper, monkeypatch):
    monkeypatch.setattr(estimate, "activations", lambda *asked: 1.0)  # counted in the tests above; slow for a hundred recipes
    for recipe in papers.recipes(paper):
        extra = {"data": "somewhere"} if (paper, recipe) == ("tah", "gsm8k-toy") else {}
        rows = estimate.estimate(paper, recipe, extra, measure=False)
        steps = {planned.step for planned in papers.plan(paper, recipe, extra)}
        assert rows or (paper, recipe) not in {(paper, "toy"), (paper, "smoke")}
        assert all(row["steps"] > 0 and row["tokens"] > 0 and row["step"].split(",")[0] in steps for row in rows)
        assert all(row["learning"] <= row["parameters"] for row in rows if "parameters" in row)
        if recipe == "toy":
            assert all(row["fits"] for row in rows)


@pytest.mark.parametrize(
    ("paper", "recipe", "step", "learning"),
    [
        ("tah", "qwen3-1.7b-plus", "train1", 1_720_574_976 + 34_865_152),
        ("tah", "qwen3-1.7b-plus", "train2", 34_865_152 + 18_318_850),
        ("coconut", "gpt2-gsm8k-aug", "train", 124_439_808),
    ],
)
def test_published_sizes(paper, recipe, step, learning):
    assert {row["step"]: row["learning"] for row in estimate.estimate(paper, recipe, measure=False)}[step] == learning


def test_the_command_and_the_dry_run_say_the_same(capsys, monkeypatch):
    from typer.testing import CliRunner

    told = json.loads(CliRunner().invoke(cli.app, ["estimate", "coconut", "--recipe", "smoke", "--json"]).stdout)
    dry = json.loads(CliRunner().invoke(cli.app, ["run", "coconut", "--recipe", "smoke", "--dry-run", "--json"]).stdout)
    same = ("step", "parameters", "learning", "steps", "tokens", "activations GiB")
    assert [[row[name] for name in same] for row in told] == [[row[name] for name in same] for row in dry["estimate"]]
