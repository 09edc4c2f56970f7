"""The toy claim of Think-at-Hard for one seed (tah.md 9.1): differences and passes are asserted, never a baseline's level."""

import pytest
import torch

from lab.methods.tah.labels import Labelling
from lab.methods.tah.plan import decider_settings, example_settings, model_settings, training_settings
from lab.methods.tah.prepare import Labelled, Preparation
from lab.methods.tah.score import differences
from lab.methods.tah.stages import arms_of, label, run_arm, run_step2, token_table
from lab.methods.tah.training import choose_threshold
from lab.models.layouts import load
from lab.running import papers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("recipe", "passes"), [("toy-claims", 1.15), ("toy-judged", 1.25)])
def test_the_decider_beats_equal_steps_of_plain_training_on_hard_questions(recipe, passes, tmp_path):
    torch.set_num_threads(1)
    plan = {step.step: step.values for step in papers.plan("tah", recipe, {"seed": "0"})}
    data, first, second = plan["label"], plan["train1"], plan["train2"]
    label(tmp_path / "label", Preparation.check(benchmark=data["benchmark"], base_steps=data["base_steps"]), Labelling())
    for arm in ("tah", "sft"):
        settings = training_settings(first), model_settings(first), example_settings(first)
        run_arm(arm, str(tmp_path / "label"), str(tmp_path / "train1"), *settings)
    step2 = training_settings(second), decider_settings(second), example_settings(second)
    run_step2(str(tmp_path / "label"), str(tmp_path / "train1" / "tah"), str(tmp_path / "train2"), *step2, True, second["feature_tokens"])
    deep, source = load(tmp_path / "train2" / "tah"), Labelled(tmp_path / "label")
    choose_threshold(deep, source.examples("validation"), "accuracy", 0.0, second["max_passes"])
    deep.save(tmp_path / "train2" / "tah", overwrite=True)
    models = arms_of(source, tmp_path / "train1", tmp_path / "train2")
    table = token_table(models, source.examples("test"), source.hard("test"))
    chosen, difference = table["tah decider"], differences(table)["tah decider minus sft"]
    assert difference["accuracy_hard"] > 0.35
    assert chosen["accuracy_easy"] >= 0.95 and chosen["passes"] <= passes
    assert table["tah always"]["accuracy_easy"] < chosen["accuracy_easy"] - 0.3, "thinking about everything twice breaks easy tokens"
