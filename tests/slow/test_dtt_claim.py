"""The toy claim of gated GRPO, one seed: gates learn the span, reasoning gets shorter, accuracy is kept (`dtt.md` 9.1)."""

import pytest

from lab.methods.dtt.plan import rl_arguments, warm_up_training
from lab.methods.dtt.stages import evaluate_arms, run_arm, run_warm_up
from lab.papers import plan

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
    assert found["avg_gate_inside"] > 0.95 and found["avg_gate_outside"] < 0.08
    assert found["accuracy"] > before["accuracy"] - 0.08 and found["avg_latent_steps"] <= 3.3 < before["avg_latent_steps"]
