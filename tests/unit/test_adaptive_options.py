"""Option strings of the adaptive recipes: the published resolutions, typos and contradictions."""

import json
from pathlib import Path

import pytest

from lab.errors import SettingsError
from lab.methods.adaptive import options

PUBLISHED = json.loads((Path(__file__).parent.parent / "fixtures/adaptive/recipes.json").read_text())
SFT = {name: recipe for name, recipe in PUBLISHED["recipes"].items() if "training_config" in recipe}
RL = {name: recipe for name, recipe in PUBLISHED["recipes"].items() if "grpo_training_config" in recipe}


@pytest.mark.parametrize("name", SFT)
def test_published_sft_strings_resolve_to_the_published_settings(name):
    recipe = SFT[name]
    raw = recipe["raw"]
    assert options.resolve_sft(raw["TRAINING_CONFIG_OPTIONS"]) == recipe["training_config"]
    assert options.resolve_latent(raw["LATENT_SETTINGS_OPTIONS"]) == recipe["latent_settings"]
    assert options.resolve_lora(raw["LORA_CONFIG_OPTIONS"]) == recipe["lora"]
    assert options.resolve_val(raw["VAL_CONFIG_OPTIONS"]) == recipe["val"]
    found = options.Resolved.of(*(raw[f"{k}_OPTIONS"] for k in ("TRAINING_CONFIG", "LATENT_SETTINGS", "LORA_CONFIG", "VAL_CONFIG")))
    assert found.distil.weight_codi == recipe["training_config"]["codi_loss"]
    assert found.fitting["steps"] == 30000 and found.fitting["clip"] == 2.0


@pytest.mark.parametrize("name", RL)
def test_published_rl_strings_resolve_to_the_published_settings(name):
    recipe = RL[name]
    raw = recipe["raw"]
    assert options.resolve_rl(raw["TRAINING_CONFIG_OPTIONS"]) == recipe["grpo_training_config"]
    assert options.resolve_grpo(raw["GRPO_CONFIG_OPTIONS"]) == recipe["grpo_config_options"]
    assert options.resolve_lora(raw["LORA_CONFIG_OPTIONS"]) == recipe["lora"]


@pytest.mark.parametrize(("text", "outcome"), PUBLISHED["parse_outcomes"].items())
def test_what_the_official_parser_refuses_is_refused(text, outcome):
    if outcome == "ok":
        assert options.resolve_sft(text)["steps"] == 2000
    else:
        with pytest.raises(SettingsError):
            options.resolve_sft(text)


def test_thoughts_follow_the_number_of_steps():
    by_one = options.Resolved.of(SFT["Latent-6-by-1"]["raw"]["TRAINING_CONFIG_OPTIONS"], "recurrent_filter_MLP", "", "gsm8k-aug-val").distil
    assert [by_one.thoughts(k) for k in (1, 2, 5, 9)] == [6, 7, 10, 10]
    flat = options.Resolved.of(SFT["Latent-6"]["raw"]["TRAINING_CONFIG_OPTIONS"], "recurrent_filter_MLP", "", "gsm8k-aug-val").distil
    assert [flat.thoughts(k) for k in (0, 3, 12)] == [6, 6, 6]
    inner = SFT["codi + intermediate"]["raw"]["TRAINING_CONFIG_OPTIONS"]
    assert options.Resolved.of(inner, "recurrent_filter_MLP", "", "gsm8k-aug-val").distil.layers(16) == tuple(range(4, 14))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: options.resolve_sft("gsm8k-aug/steps_2k/slice_proportion_85"), "slice_proportion_85p"),
        (lambda: options.resolve_sft("gsm8k-aug/steps_2k/epochs_1"), "either steps_… or epochs_…"),
        (lambda: options.resolve_sft("gsm8k-aug/steps_2k/batch_size_100"), "power of two"),
        (lambda: options.resolve_sft("gsm8k-aug/steps_2k/calc_smooth_l1"), "needs a latent loss"),
        (lambda: options.resolve_latent("recurrent_filter_mlp"), "recurrent_filter_MLP"),
        (lambda: options.resolve_lora("r_128"), "target_modules"),
        (lambda: options.resolve_val("latent_thinking"), "no data set"),
        (lambda: options.resolve_val("gsm8k-aug-val/latent_thought_count_override_6"), "needs latent_thinking"),
        (lambda: options.resolve_rl("model-latent-6/batch_size_64/rel_len_reward_1"), "rel_len_acc_req_ALL"),
        (lambda: options.resolve_grpo("eval_steps_200/save_steps_500"), "multiple"),
        (lambda: options.Resolved.of("gsm8k-aug/steps_2k", "recurrent_filter_MLP", "", "gsm8k-aug-val"), "leave it empty"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(SettingsError, match=message):
        call()


def test_later_tokens_win_and_every_listed_token_parses():
    assert options.resolve_sft("gsm8k-aug/steps_2k/lr_1e-4/lr_8e-4")["lr"] == 8e-4
    for kind in ("latent settings", "LoRA", "training", "validation", "GRPO", "RL"):
        for token in options.tokens(kind):
            options.parse(kind, token)
