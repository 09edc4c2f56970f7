"""The fast draw has exactly the distribution of the definition, filter by filter."""

import pytest
import torch

from lab.errors import SettingsError
from lab.latent.sampling import Sampling, draw, probabilities

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"temperature": 0.7, "top_k": 5, "min_p": 0.1},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.2, "top_p": 0.7, "top_k": 12},
    {"temperature": 2.0, "top_k": 1},
]


@pytest.mark.parametrize("values", SETTINGS)
def test_inverse_cdf_reaches_the_definition(values):
    how, logits = Sampling.check(**values), torch.randn(3, 40, generator=torch.Generator().manual_seed(0)) * 2
    want, grid = probabilities(logits, how), (torch.arange(4000) + 0.5) / 4000
    for row in range(3):
        token, logprob = draw(logits[row].expand(4000, -1), how, grid)
        got = torch.bincount(token, minlength=40) / 4000
        torch.testing.assert_close(got, want[row], atol=1e-3, rtol=0)
        torch.testing.assert_close(logprob.exp(), want[row][token], atol=1e-4, rtol=1e-3)


def test_the_definition_step_by_step():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.08, 0.02]]).log()
    assert probabilities(logits, Sampling(temperature=1.0, top_k=2))[0].count_nonzero() == 3, "ties at the k-th value survive"
    torch.testing.assert_close(probabilities(logits, Sampling(temperature=1.0, top_p=0.6))[0, :3], torch.tensor([5 / 7, 2 / 7, 0.0]))
    torch.testing.assert_close(probabilities(logits, Sampling(temperature=1.0, min_p=0.39))[0], torch.tensor([5, 2, 2, 0, 0]) / 9)
    assert probabilities(logits, Sampling())[0].tolist() == [1, 0, 0, 0, 0]


def test_ties_are_drawn_from_as_defined():
    logits = torch.zeros(1, 6).expand(600, -1)
    token, _ = draw(logits, Sampling(temperature=1.0, top_k=2), (torch.arange(600) + 0.5) / 600)
    assert torch.bincount(token, minlength=6).tolist() == [100] * 6


def test_impossible_settings_are_refused():
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"tempreature": 1.0}):
        with pytest.raises(SettingsError):
            Sampling.check(**bad)
