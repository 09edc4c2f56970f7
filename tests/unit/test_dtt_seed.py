"""The seed's YAML files are translated, and what is wrong in them is answered; rewards and spans by hand."""

from pathlib import Path

import pytest

from lab.errors import SettingsError
from lab.methods.dtt.config import GatedSettings
from lab.methods.dtt.reinforce import GateLearning
from lab.methods.dtt.reward import RewardSettings, find_span, gate_sparsity, rewards_of, token_efficiency
from lab.methods.dtt.seed import EVAL, TRAIN, main, read_yaml, train_arguments
from lab.rl import RLSettings

YAML = """
dataset_name: GSM8K
model_name: gpt2
lora_rank: 16
lora_target_modules: [c_attn, c_proj, c_fc]
gumbel_hard_generation_train: true
lambda_penalty: 0.02
lr: 1.0e-5
lr_scheduler_type: cosine
warmup_ratio: 0.1
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
num_train_epochs: 2
group_size_grpo: 8
beta_kl: 0.01
max_completion_length: 128
use_bf16: false
output_dir: out
wandb_project: dtt-project
"""


def test_every_key_of_the_specification_is_known():
    assert len(TRAIN) == 38 and {"epsilon_clip", "resume_from_checkpoint", "min_gate_temperature"} <= TRAIN.keys()
    assert {"checkpoint_path", "eval_gumbel_hard", "dataset_split_eval", "load_in_4bit_eval"} <= EVAL.keys()
    card = (Path(__file__).parents[2] / "papers/dtt/README.md").read_text()
    assert not [key for key in TRAIN | EVAL if f"`{key}`" not in card], "the card's table translates every key"


def test_a_training_yaml_becomes_our_settings(tmp_path):
    (tmp_path / "train.yaml").write_text(YAML)
    made = train_arguments(read_yaml(tmp_path / "train.yaml", TRAIN), examples=640, world=4)
    rl = RLSettings.check(**made["rl"])
    assert (rl.prompts, rl.samples, rl.micro_batch, rl.steps) == (32, 8, 16, 40)
    assert (rl.warmup_steps, rl.schedule, rl.beta, rl.longest, rl.report_to, rl.seed) == (4, "cosine", 0.01, 128, "wandb", 42)
    assert made["benchmark"] == "gsm8k" and made["lora"]["rank"] == 16 and made["folder"] == "out"
    gated = GatedSettings.check(**made["gated"])
    assert gated.hard and gated.noise == "gumbel" and gated.temperature == 1.0
    assert GateLearning.check(**made["gate"]).min_temperature == 0.1
    assert RewardSettings.check(**made["rewards"]).lambda_penalty == 0.02


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("dataset_nam: GSM8K", "dataset_name"),
        ("dataset_name: MATH", "gsm8k"),
        ("dataset_name: GSM8K\nuse_fp16: true", "fp16"),
        ("dataset_name: GSM8K\noptimizer: lion", "adamw_torch"),
        ("- a", "keys and values"),
        ("a: [", "Cannot read"),
    ],
)
def test_a_wrong_yaml_is_answered(tmp_path, text, answer):
    (tmp_path / "train.yaml").write_text(text)
    with pytest.raises(SettingsError, match=answer):
        train_arguments(read_yaml(tmp_path / "train.yaml", TRAIN), 10)


def test_the_command_says_what_is_missing():
    said = []
    assert main(["train"], said.append) == 2 and "--config_path" in said[0]
    assert main(["eval", "--config_path", "nowhere.yaml"], said.append) == 2 and "nowhere.yaml" in said[1]


def test_spans_and_their_rewards():
    bot, eot = 94, 95
    assert find_span([1, bot, 2, 3, eot, 4], bot, eot) == (1, 4)
    assert find_span([eot, bot, 1], bot, eot) is None
    assert find_span([1, 2, eot], bot, eot, in_prompt=True) == (-1, 2)
    span = find_span([bot, eot, 5], bot, eot)
    assert token_efficiency(span) == 0 and token_efficiency(None) == 0
    assert gate_sparsity([], span, 3) == -1.0 and gate_sparsity([], None, 0) == 0.0
    assert gate_sparsity([1.0, 0.0], span, 3) == -1.0  # open at [bot], closed at [eot]: both wrong


def test_reward_functions_are_three_and_named():
    class Words:
        def decode(self, ids, skip_special_tokens):
            return " ".join(map(str, ids))

    s = GatedSettings(bot_id=94, eot_id=95, eos_id=93)
    weights = rewards_of(Words(), s, RewardSettings(lambda_penalty=0.5, gate_penalty_coeff=0.25))
    assert {function.__name__: weight for function, weight in weights.items()} == {
        "correctness": 1.0,
        "token_efficiency": 0.5,
        "gate_sparsity": 0.25,
    }
    rows = [[94, 1, 2, 95, 7], [7]]
    given = {"completion_ids": rows, "answer": ["7", "7"], "gates": [[0.0, 1.0, 1.0, 1.0], []]}
    assert [function(**given) for function in weights] == [[1.0, -0.5], [-2.0, 0.0], [0.0, -1.0]]


def test_the_penalty_on_tokens_rises_over_its_warm_up():
    from types import SimpleNamespace

    s = GatedSettings(bot_id=94, eot_id=95, eos_id=93)
    of_tokens = next(f for f in rewards_of(None, s, RewardSettings(lambda_warmup=4)) if f.__name__ == "token_efficiency")
    paid = [of_tokens([[94, 1, 2, 95, 7]], trainer_state=SimpleNamespace(global_step=step)) for step in (0, 1, 3, 9)]
    assert paid == [[-0.5], [-1.0], [-2.0], [-2.0]]
