"""Functions that the gated launch test runs in other processes."""

from pathlib import Path

import torch

from lab import files
from lab.launch import on_main, world_size
from lab.methods.dtt.config import BOT, EOT, GatedSettings
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.reinforce import GatedThinking, GateLearning
from lab.methods.dtt.reward import RewardSettings, rewards_of
from lab.methods.dtt.trainer import CustomGRPOTrainer
from lab.models.backbones import load_backbone
from lab.models.tokenizers import word_tokenizer
from lab.rl import RLSettings, reinforce


def train(folder, steps=3, **changes):
    """Losses, rewards, gaps of every step and a checksum of the weights."""
    tokenizer = word_tokenizer([f"w{i}" for i in range(12)], special=(BOT, EOT))
    backbone = load_backbone("toy:gpt2-micro", vocab_size=len(tokenizer), initializer_range=0.3, max_positions=32)
    torch.manual_seed(0)
    model = SparseGatedModel.start(backbone, tokenizer, GatedSettings(bias=0.0))
    rewards = rewards_of(tokenizer, model.config, RewardSettings(gate_penalty_coeff=0.3))
    settings = RLSettings(
        steps=steps,
        prompts=4,
        samples=4,
        longest=8,
        lr=1e-3,
        loss_type="grpo",
        schedule="constant",
        save_every=0,
        log_every=1,
        device="cpu",
        **changes,
    )
    prompts, answers = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]], ["w1", "w2", "w3", "w4"]
    thinking = GatedThinking(model, GateLearning(weight=0.3))
    reinforce(model, thinking, prompts, {"answer": answers}, rewards, settings, folder, trainer_class=CustomGRPOTrainer)
    rows = [row for row in on_main(lambda: files.read_lines(Path(folder) / "metrics.jsonl")) if "reward" in row]
    return {
        "rewards": [row["reward"] for row in rows],
        "gradients": [row["grad_norm"] for row in rows],
        "gaps": [row["logp_gap"] for row in rows],
        "weights": [float(p.detach().double().square().sum()) for p in model.parameters()],
        "world": world_size(),
    }
