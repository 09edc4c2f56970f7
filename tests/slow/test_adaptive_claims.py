"""The toy claim of adaptive latent reasoning on one seed: RL makes thoughts fewer at the same accuracy, its control does not."""

import pytest

from lab.methods.adaptive import options, report, stages
from lab.methods.adaptive.reinforce import LengthReward
from lab.rl import RLSettings

pytestmark = pytest.mark.slow


def test_rl_shortens_thoughts_at_equal_accuracy(tmp_path):
    seed = 0
    source = stages.Source(seed=seed)
    data, test = source.train("", None), source.held_out("", "test", 500)
    model = stages.start_model("toy", {"recurrent_filter_mode": "MLP"}, {}, seed)
    stages.warm_up(model, data, 250, tmp_path / "warm_up", seed)
    resolved = options.Resolved.of(stages.TOY_TRAINING, "recurrent_filter_MLP", "", "gsm8k-aug-val/latent_thinking")
    settings = stages.fitting(resolved, seed=seed, device="cpu", bf16=False, schedule="linear", warmup_steps=20)
    stages.train_sft(model, data, resolved.distil.but(jitter=3), settings, tmp_path / "sft")
    model.save(tmp_path / "model")
    before, _ = report.evaluate(model, test, max_new_tokens=16)
    assert before["score"] >= 0.9
    rl = RLSettings(steps=200, longest=16, lr=1e-4, beta=1e-3, save_every=0, device="cpu", seed=seed)
    after = {}
    for name in ("given", "no length reward"):
        import lab

        trained = lab.load(tmp_path / "model")
        result = stages.reinforce_length(
            trained, data, rl, tmp_path / name.replace(" ", "_"), how=stages.rl_arm(LengthReward(), name), most=8
        )
        assert result.row["logp_gap"] <= 1e-4
        after[name], _ = report.evaluate(trained, test, max_new_tokens=16)
    assert after["given"]["score"] >= before["score"] - 0.05 and after["given"]["thoughts"] <= 0.65 * before["thoughts"]
    assert after["no length reward"]["thoughts"] >= 0.8 * before["thoughts"]
