"""Rewards of adaptive RL against the official numbers, and the arithmetic of advantages near a penalty of 1e-4."""

import json
from pathlib import Path

import pytest
import torch

from lab.errors import SettingsError
from lab.methods.adaptive.reinforce import LengthReward, is_correct, length_of, rewards_of, well_formed

OFFICIAL = json.loads((Path(__file__).parent.parent / "fixtures/adaptive/rewards.json").read_text())


def setting(values):
    return LengthReward(
        penalty=values["relative_length_penalty"],
        requirement=values.get("relative_length_accuracy_requirement") and float(values["relative_length_accuracy_requirement"]),
        reward=values.get("relative_length_reward"),
    )


def total(case, how):
    texts, lengths = (
        case["completions_w_special"],
        [length_of(p, c) for p, c in zip(case["prompts"], case["completions_w_special"], strict=True)],
    )
    given = dict(written=texts, label=case["label"], prompt_id=case["prompt_id"], thoughts=[length - 2 for length in lengths])
    parts = {f.__name__: (torch.tensor(f(**given)), weight) for f, weight in rewards_of(how).items()}
    return sum(weight * values for values, weight in parts.values()), {name: values for name, (values, _) in parts.items()}


def test_verifiers_judge_as_the_official_ones():
    for text, wanted in OFFICIAL["verifiers"]["format"]:
        assert well_formed(text) is wanted, text
    for text, label, wanted in OFFICIAL["verifiers"]["answer"]:
        assert is_correct(text, label) is wanted, text
    for prompt, completion, wanted in OFFICIAL["verifiers"]["length"]:
        assert length_of(prompt, completion) == wanted


@pytest.mark.parametrize("case", OFFICIAL["cases"])
@pytest.mark.parametrize("name", OFFICIAL["settings"])
def test_rewards_and_advantages_are_the_official_ones(case, name):
    content = OFFICIAL["cases"][case]
    found, parts = total(content, setting(OFFICIAL["settings"][name]))
    torch.testing.assert_close(found, torch.tensor(content["rewards"][name]), atol=1e-6, rtol=0)
    if "advantages_std_eps1e-4" in content:
        advantages = (found - found.mean()) / (found.std() + 1e-4)
        torch.testing.assert_close(advantages, torch.tensor(content["advantages_std_eps1e-4"][name]), atol=1e-3, rtol=0)
    logged = content["logging_rewards"]
    assert parts["well"].tolist() == [float(x) for x in logged["format"]]
    assert parts["thought_length"].tolist() == logged["latent_length"]
    assert float(parts["all_correct"].mean()) == pytest.approx(
        logged["AllGensCorrectProportion"][0]
    )  # the official one is the share over prompts
    assert float(parts["some_correct"].mean()) == pytest.approx(logged["SomeGensCorrectProportion"][0])
    assert float(parts["none_correct"].mean()) == pytest.approx(logged["AllGensWrongProportion"][0])


def test_half_precision_would_erase_the_penalty():
    """Why rewards are float32: in an all-correct group they differ by 1e-4."""
    how = LengthReward()
    group = dict(written=["<|STOP|> The answer is: 5"] * 3, label=["5"] * 3, prompt_id=[0] * 3, thoughts=[1, 3, 5])
    term = next(f for f in rewards_of(how) if f.__name__ == "relative_length")(**group)
    assert term == pytest.approx([5e-5, 0.0, -5e-5])
    assert (1 + torch.tensor(term)).std() > 0 and (1 + torch.tensor(term, dtype=torch.bfloat16)).std() == 0


def test_a_reward_without_a_requirement_is_refused():
    with pytest.raises(SettingsError, match="requirement"):
        LengthReward.check(requirement=None, reward=0.1)


def test_gold_that_is_no_number_is_never_right():
    for label in ("inf", "nan", "", "many"):
        assert not is_correct("<|STOP|> The answer is: 5", label)
