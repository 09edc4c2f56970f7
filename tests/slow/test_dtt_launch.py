"""Two gloo processes train a gated model as one does with the same global batch."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import dtt_targets as targets

from lab.launch import launch

pytestmark = pytest.mark.slow


def test_two_processes_train_as_one_does(tmp_path):
    one = launch(targets.train, 1, folder=str(tmp_path / "one"))
    two = launch(targets.train, 2, folder=str(tmp_path / "two"))
    assert (one["world"], two["world"]) == (1, 2)
    for name in ("rewards", "gradients", "weights"):
        assert one[name] == pytest.approx(two[name], abs=1e-6, rel=1e-4), name
    assert max(one["gaps"] + two["gaps"]) <= 1e-4
