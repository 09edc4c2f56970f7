"""Rates against transformers' own schedules; which parameters learn, and how fast."""

import pytest
import torch
from torch import nn

from lab.errors import SettingsError
from lab.train import TrainSettings
from lab.training import optim
from lab.training.optim import Group


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_min_lr", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_rates_are_those_of_transformers(name, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    kind = "constant_with_warmup" if name == "constant" else name
    extra = {"min_lr_rate": 0.1} if name == "cosine_with_min_lr" else {}
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=50, scheduler_specific_kwargs=extra)
    for step in range(50):
        ours = optim.lr_factor(step, 50, name, warmup, 0.1 if extra else 0.0)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-12), step
        optimizer.step()
        theirs.step()


def test_warm_up_from_a_ratio_and_steps_from_epochs():
    settings = TrainSettings.check(epochs=5.0, global_batch=128, warmup_ratio=0.03)
    assert settings.total(1000) == 40 and settings.warmup(40) == 2
    assert settings.rate(0, 40) == 0.0 and settings.rate(1, 40) == 0.5 and settings.rate(2, 40) == 1.0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.head = nn.Linear(4, 2)
        self.head2 = nn.Linear(4, 2, bias=False)
        self.head2.weight = self.head.weight


def by_name(model, groups):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_decay_and_groups():
    model = Model()
    plain = by_name(model, optim.parameter_groups(model, 1e-3, 0.1))
    assert plain == {
        "model.0.weight": (1e-3, 0.1),
        "model.0.bias": (1e-3, 0.0),
        "model.1.weight": (1e-3, 0.0),
        "model.1.bias": (1e-3, 0.0),
        "head.weight": (1e-3, 0.1),
        "head.bias": (1e-3, 0.0),
    }
    assert set(by_name(model, optim.parameter_groups(model, 1e-3, 0.1, decay_all=True)).values()) == {(1e-3, 0.1)}
    own = [Group(match=r"^head\.", lr=1e-2, weight_decay=0.5), Group(match="bias", lr=0.0)]
    mixed = by_name(model, optim.parameter_groups(model, 1e-3, 0.1, own))
    assert mixed["head.bias"] == (1e-2, 0.5) and mixed["model.0.bias"] == (0.0, 0.0) and mixed["model.0.weight"] == (1e-3, 0.1)


def test_freezing():
    model = Model()
    assert optim.freeze(model, ["model.0", "head.bias"]) == 22
    assert set(by_name(model, optim.parameter_groups(model, 1.0, 0.0))) == {"model.1.weight", "model.1.bias", "head.weight"}
    assert optim.freeze(model, ["model.head2"]) == 8, "a leading model. is optional, and a tied weight has two names"
    with pytest.raises(SettingsError, match="Did you mean 'model.1.weight'"):
        optim.freeze(model, ["model.1.wight"])
    with pytest.raises(SettingsError, match="'head' matches no parameter"):
        optim.parameter_groups(Model(), 1.0, 0.0, [Group(match="model"), Group(match="head", lr=1.0), Group(match="head")])
