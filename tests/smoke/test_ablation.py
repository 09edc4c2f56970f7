"""Replacing thoughts changes what should change and nothing else."""

import pytest
import torch

from lab.ablation import INTERVENTIONS, Thoughts, ablate, without
from lab.data.examples import Example
from lab.errors import SettingsError
from lab.methods.coconut.config import CoconutSettings
from lab.methods.coconut.model import CoconutModel
from lab.models.backbones import load_backbone
from lab.models.layouts import load
from lab.models.tokenizers import byte_tokenizer

EXAMPLES = [Example(str(i), f"{i}+{i + 1}?", (), str(2 * i + 1)) for i in range(6)]


def thoughts():
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 1, 2, 3])
    vectors = torch.randn(4, 3, 5, generator=generator)
    return Thoughts(vectors, counts).changed(vectors)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_padding_stays_padding_and_counts_stay_counts(name):
    own = thoughts()
    new = INTERVENTIONS[name](own, 0)
    if name == "first half":
        assert new.counts.tolist() == [1, 0, 1, 1]
        return
    assert torch.equal(new.counts, own.counts)
    assert (new.vectors * (1 - own.real) == 0).all()
    if name == "noise":
        torch.testing.assert_close(new.vectors.norm(dim=-1), own.vectors.norm(dim=-1))
    if name == "shuffled":
        torch.testing.assert_close(new.vectors.sum(1), own.vectors.sum(1))
    if name == "mean":
        torch.testing.assert_close(new.vectors[0, 0], own.vectors[:, 0].mean(0))
    if name == "another question's":
        assert all((new.vectors[row] != own.vectors[row]).any() for row in range(4))


def test_leaving_one_out_replaces_that_one_by_its_mean():
    own = thoughts()
    new = without(1)(own, 0)
    torch.testing.assert_close(new.vectors[0, 1], own.vectors[[0, 2, 3], 1].mean(0))
    torch.testing.assert_close(new.vectors[:, [0, 2]], own.vectors[:, [0, 2]])


def test_every_intervention_on_a_model():
    tokenizer = byte_tokenizer()
    backbone = load_backbone("toy:gpt2-micro", vocab_size=len(tokenizer), initializer_range=0.5)
    model = CoconutModel.start(backbone, tokenizer, CoconutSettings(thoughts=4)).eval()
    rows = {row["intervention"]: row for row in ablate(model, EXAMPLES, "number", each=True, max_new_tokens=8, batch=4)}
    assert len(rows) == 1 + 6 + 4
    again = ablate(model, EXAMPLES, "number", interventions=(), max_new_tokens=8)
    assert again[0]["changed"] == 0.0 and rows["zeroed"]["changed"] > 0 and rows["noise"]["changed"] > 0
    assert all(row["questions"] == 6 and row["low"] <= row["accuracy"] <= row["high"] for row in rows.values())


def test_own_thoughts_given_back_change_nothing(monkeypatch):
    tokenizer = byte_tokenizer()
    backbone = load_backbone("toy:qwen3-micro", vocab_size=len(tokenizer), initializer_range=0.5)
    model = CoconutModel.start(backbone, tokenizer, CoconutSettings(thoughts=3)).eval()
    monkeypatch.setitem(INTERVENTIONS, "itself", lambda own, seed: own)
    rows = ablate(model, EXAMPLES, "number", interventions=("itself",), max_new_tokens=8, batch=4)
    assert rows[1]["changed"] == 0.0


def test_mistakes_get_one_sentence():
    plain = load("toy:gpt2-micro")
    with pytest.raises(SettingsError, match="no thoughts to replace"):
        ablate(plain, EXAMPLES, "number")
    with pytest.raises(SettingsError, match="zeroed"):
        ablate(plain, EXAMPLES, "number", interventions=("zeroo",))
