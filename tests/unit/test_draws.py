"""Draws are functions of (seed, question, sample, step, stream) and have the distribution they claim."""

import pytest
import torch

from lab.errors import SettingsError
from lab.latent.draws import Keyed, Recorded, Stream, unit


def keyed(count, seed=0):
    row = torch.arange(count)
    return Keyed.of(seed, row // 8, row % 8)


def test_no_number_rounds_to_an_end_of_the_interval():
    ends = unit(torch.tensor([0, 1, (1 << 24) - 2, (1 << 24) - 1]))
    assert bool((ends > 0).all()) and bool((ends < 1).all())
    assert bool(torch.erfinv(2 * ends - 1).isfinite().all())


def test_a_draw_does_not_depend_on_the_other_rows():
    steps = torch.arange(64)
    whole = keyed(64).normal(steps, Stream.THOUGHT, (16,))
    picked = torch.tensor([63, 5, 17])
    torch.testing.assert_close(keyed(64).select(picked).normal(steps[picked], Stream.THOUGHT, (16,)), whole[picked], rtol=0, atol=0)


@pytest.mark.parametrize("change", ["seed", "step", "stream", "question", "sample"])
def test_every_part_of_the_key_matters(change):
    row = torch.arange(32)
    base = Keyed.of(0, row, row).uniform(row, 0, (8,))
    other = {
        "seed": lambda: Keyed.of(1, row, row).uniform(row, 0, (8,)),
        "step": lambda: Keyed.of(0, row, row).uniform(row + 1, 0, (8,)),
        "stream": lambda: Keyed.of(0, row, row).uniform(row, 1, (8,)),
        "question": lambda: Keyed.of(0, row + 1, row).uniform(row, 0, (8,)),
        "sample": lambda: Keyed.of(0, row, row + 1).uniform(row, 0, (8,)),
    }[change]()
    assert (base != other).float().mean() > 0.99
    assert abs(torch.corrcoef(torch.stack((base.flatten(), other.flatten())))[0, 1]) < 0.2


def test_uniform_and_normal_have_their_moments():
    steps = torch.zeros(64, dtype=torch.long)
    uniform, normal = keyed(64).uniform(steps, 0, (4096,)), keyed(64).normal(steps, 1, (4096,))
    assert uniform.min() > 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 2e-3 and abs(uniform.var() - 1 / 12) < 1e-3
    assert abs(normal.mean()) < 5e-3 and abs(normal.std() - 1) < 5e-3 and normal.isfinite().all()
    counts = torch.histc(uniform, 64, 0, 1) / uniform.numel() * 64
    assert (counts - 1).abs().max() < 0.05


def test_neighbouring_keys_are_uncorrelated():
    steps = torch.zeros(8, dtype=torch.long)
    values = keyed(8).normal(steps, 0, (20000,))
    correlation = torch.corrcoef(values) - torch.eye(8)
    assert correlation.abs().max() < 0.04


def test_recorded_draws_replay_and_name_what_is_missing():
    values = torch.rand(3, 4, 2)
    recorded = Recorded({Stream.THOUGHT: values}).select(torch.tensor([2, 0]))
    got = recorded.normal(torch.tensor([1, 3]), Stream.THOUGHT, (2,))
    torch.testing.assert_close(got, torch.stack((values[2, 1], values[0, 3])))
    with pytest.raises(SettingsError, match="stream 0"):
        recorded.uniform(torch.tensor([0, 0]), Stream.TOKEN)
