"""The toy claim of gated GRPO, one seed: gates learn the span and reasoning gets shorter at little loss of accuracy (`dtt.md` 9.1).

The bounds leave room for another processor's rounding, after which 600 updates are another training: this seed came to gates of .96 to .98
inside and .04 to .07 outside, accuracy .84 to .94 after .97, 3.05 to 3.24 steps after 4.48.
"""

import pytest

from lab.methods.dtt.plan import rl_arguments, warm_up_training
from lab.methods.dtt.stages import evaluate_arms, run_arm, run_warm_up
from lab.running.papers import plan

pytestmark = pytest.mark.slow


def test_gates_learn_the_span(tmp_path):
    steps = {step.step: step.values for step in plan("dtt", "toy-claims")}
    warm = steps["warm_up"]
    source = {name: warm[name] for name in ("backbone", "benchmark", "rows", "seed")}
    run_warm_up(str(tmp_path), gated={}, **warm_up_training(warm), **source)
    run_arm("pathwise", folder=str(tmp_path), **rl_arguments(steps["train"], str(tmp_path / "model")))
    how = {"max_new_tokens": 12, "temperature": 1.0, "batch": 256}
    table = evaluate_arms(tmp_path, tmp_path, tmp_path / "evaluation", "permutations", 1000, how, drawn=True)
    found, before = table["pathwise"], table["warm_up"]
    assert found["avg_gate_inside"] > 0.85 and found["avg_gate_outside"] < 0.2
    assert found["accuracy"] > before["accuracy"] - 0.3 and found["avg_latent_steps"] < 3.7 < 4.2 < before["avg_latent_steps"]
