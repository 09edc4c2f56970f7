"""The seed's recipe names, each with the published option strings, and every shipped recipe resolvable."""

import json
from pathlib import Path

import pytest

from lab.methods.adaptive import options
from lab.running import papers

PUBLISHED = json.loads((Path(__file__).parent.parent / "fixtures/adaptive/recipes.json").read_text())["recipes"]
BY_NAME = {recipe["raw"]["DIR_NAME"]: recipe["raw"] for recipe in PUBLISHED.values()}


@pytest.mark.parametrize("name", BY_NAME)
def test_published_recipes_carry_the_published_strings(name):
    raw = BY_NAME[name]
    plan = {step.step: step.values for step in papers.plan("adaptive", name)}
    rl = "GRPO_CONFIG_OPTIONS" in raw
    given = plan["rl" if rl else "train"]
    assert given["training_config_options"] == raw["TRAINING_CONFIG_OPTIONS"]
    assert given["val_config_options"] == raw["VAL_CONFIG_OPTIONS"] and given["dir_name"] == name
    assert given["rl_lora_config_options" if rl else "lora_config_options"] == raw["LORA_CONFIG_OPTIONS"]
    if rl:
        assert given["grpo_config_options"] == raw["GRPO_CONFIG_OPTIONS"] and "train" not in plan
        fields = options.rl_fields(given["grpo_config_options"], given["training_config_options"])
        assert (fields["prompts"], fields["samples"], fields["steps"], fields["longest"]) == (8, 16, 60000, 40)
    else:
        assert given["latent_settings_options"] == raw["LATENT_SETTINGS_OPTIONS"] and "rl" not in plan
        assert given["model_path_or_repo"] == raw["MODEL_PATH_OR_REPO"]


@pytest.mark.parametrize("name", ["smoke", "toy", "toy-claims", "toy-distillation"])
def test_own_recipes_resolve(name):
    for step in papers.plan("adaptive", name):
        if step.step == "train":
            v = step.values
            found = options.Resolved.of(
                *(v[f"{kind}_options"] for kind in ("training_config", "latent_settings", "lora_config", "val_config"))
            )
            assert found.distil.mode == "latent"
        if step.step == "rl":
            options.rl_fields(step.values["grpo_config_options"], step.values["training_config_options"])


def test_one_string_for_sft_and_rl_goes_where_its_tokens_belong():
    sft, rl = BY_NAME["latent-6"]["TRAINING_CONFIG_OPTIONS"], BY_NAME["latent-6+rl"]["TRAINING_CONFIG_OPTIONS"]
    assert options.of_stage(sft, "training", "x") == sft and options.of_stage(rl, "training", "x") == "x"
    assert options.of_stage(rl, "RL", "y") == rl and options.of_stage(sft, "RL", "y") == "y"
    assert options.of_stage("gsm8k-ag/steps_2k", "training", "x") == "gsm8k-ag/steps_2k"  # a typo is reported, not passed over
