"""Samples of every method that thinks at positions: fewer are the first of many, whatever the batch and the padding; votes on all."""

from pathlib import Path

import pytest
import torch
from adaptive_fixture import lora_model
from test_codi import open_fixture
from test_dtt import made as gated
from test_lta_model import EXAMPLES as TEXTS
from test_lta_model import model as thought_model

import lab
from lab.backends import Latent
from lab.data.examples import Dataset, Example
from lab.errors import SettingsError
from lab.evaluate import Decoding, evaluate
from lab.methods.colar import toy as colar
from lab.methods.colar.config import ColarSettings
from lab.sampling.curves import curves
from lab.sampling.pool import Evaluated, Pool, sample
from lab.sampling.sampler import Sampler
from lab.sampling.stochastic import REGIMES

TAH = Path(__file__).parents[1] / "fixtures" / "tah" / "checkpoint_official_layout"
SAMPLERS = [Sampler(by="noise", strength=1.5), Sampler(by="noise", strength=1.0, relative=True, where="before")]
SAMPLERS += [Sampler(by="dropout", strength=0.3, regime=regime) for regime in REGIMES]


def _colar():
    model = colar.untrained("toy:llama", 0, ColarSettings.check(max_compression_factor=2, lp_intermediate_size=16, lora_r=0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    return model, colar.examples("test", 5, 0), {"thoughts": 3, "max_new_tokens": 4}


def _dtt():
    asked = [Example(str(i), " ".join(["Q", *(f"w{j}" for j in range(i + 1)), "[bot]"]), answer="1") for i in range(5)]
    return gated(bias=2.0, bot_in_prompt=True), asked, {"max_new_tokens": 6}


def _codi():
    asked = [Example(str(i), "How many? " * (1 + i % 3), answer="7") for i in range(5)]
    return open_fixture("gpt2"), asked, {"max_new_tokens": 4}


def _adaptive():
    asked = [Example(str(i), "2 + 3 = ? " * (1 + i % 3), answer="5") for i in range(5)]
    return lora_model(), asked, {"thoughts": 3, "max_new_tokens": 4}


@pytest.fixture(scope="module", params=[_codi, _adaptive, _colar, _dtt], ids=["codi", "adaptive", "colar", "dtt"])
def case(request):
    model, asked, budget = request.param()
    return model, Dataset("few", "test", tuple(asked), ""), budget


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.label} {s.where}" if s.by == "noise" else s.regime)
def test_fewer_samples_are_the_first_of_many_whatever_the_batch(case, sampler, tmp_path):
    model, asked, budget = case
    many = sample(model, asked, sampler, 8, tmp_path / "many", chunk=5, **budget)
    few = sample(model, asked, sampler, 3, tmp_path / "few", batch=4, chunk=2, **budget)
    for one, two in zip(few.asked, many.first(3), strict=True):
        assert (one.prompt, one.ids, one.answers) == (two.prompt, two.ids, two.answers)
        assert one.counts.tolist() == two.counts.tolist()
        torch.testing.assert_close(one.thoughts, two.thoughts[:, : one.thoughts.shape[1]], atol=1e-4, rtol=1e-4)
    told = [tuple(ids) for question in many.asked for ids in question.ids]
    thoughts = torch.cat([question.thoughts.flatten(1) for question in many.asked[:1]])
    moved = thoughts.shape[1] and float((thoughts - thoughts[0]).abs().max()) > 1e-4
    assert moved or len(set(told)) > len(asked), "samples of a question differ"
    assert Pool(tmp_path / "many").complete and {"vote", "coverage"} <= {row["measure"] for row in curves(many)}


@pytest.mark.parametrize("method", ["tah", "lta", "softcot"])
def test_votes_and_coverage_of_methods_that_think_elsewhere(method, tmp_path):
    if method == "tah":
        model, asked = lab.load(TAH), [Example(str(i), "1 2 3"[: 1 + 2 * i], answer="7") for i in range(3)]
        model.prompt_ids = lambda question, **_: [3 + len(question.question), 5, 9]
    else:
        model, asked = thought_model("block" if method == "lta" else "assistant").eval(), TEXTS
    result = evaluate(Latent(model), asked, "number", tmp_path, Decoding(temperature=1.0, max_new_tokens=6), repeat=4)
    rows = {(row["measure"], row["n"]): row["mean"] for row in curves(Evaluated(tmp_path)) if row["subset"] == "all"}
    assert result.samples == 4 * len(asked) and rows["coverage", 4] >= rows["coverage", 1] and ("vote", 4) in rows
    with pytest.raises(SettingsError, match="N = 5, but .* holds 4 samples"):
        Evaluated(tmp_path).first(5)
