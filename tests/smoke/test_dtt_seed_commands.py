"""The seed's two commands on the toy world: train, then evaluate what it made, with the artefacts under their names."""

import csv
import json
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import torch

from lab.methods.dtt.seed import main

TRAIN = """
dataset_name: permutations
model_name: toy:gpt2
gumbel_hard_generation_train: true
per_device_train_batch_size: 2
group_size_grpo: 4
max_steps: 1
max_completion_length: 8
lr: 1.0e-4
beta_kl: 0.01
lora_rank: 2
output_dir: {folder}
"""
EVAL = """
dataset_name: permutations
checkpoint_path: {folder}/pathwise
eval_batch_size: 32
max_completion_length: 8
"""


def test_train_and_evaluate_from_yaml(tmp_path, monkeypatch):
    said, sent = [], {}
    tracked = find_spec("wandb") is not None
    if tracked:
        run = SimpleNamespace(log=sent.update)
        monkeypatch.setattr("wandb.init", lambda **about: nullcontext(run) if about["project"] == "dtt-eval" else None)
    for name, text in (("train", TRAIN), ("eval", EVAL + "wandb_project_eval: dtt-eval\n" * tracked)):
        (tmp_path / f"{name}.yaml").write_text(text.format(folder=tmp_path / "out"))
    assert main(["train", "--config_path", str(tmp_path / "train.yaml")], said.append) == 0, said
    assert json.loads(said[-1])["largest_gap"] <= 1e-4
    assert main(["eval", str(tmp_path / "eval.yaml")], said.append) == 0, said
    numbers, folder = json.loads(said[-1]), tmp_path / "out" / "pathwise" / "evaluation"
    assert numbers["examples"] == 64 and 0 <= numbers["eval_accuracy"] <= 1
    rows = list(csv.DictReader((folder / "evaluation_results.csv").open()))
    assert len(rows) == 64 and {"predicted_answer", "is_correct", "gate_mean_reasoning"} <= rows[0].keys()
    gates = torch.load(folder / "gate_values.pt", weights_only=True)
    states = torch.load(folder / "hidden_states.pt", weights_only=True)
    assert len(gates) == len(states) == 64 and all(len(g) == len(h) for g, h in zip(gates, states, strict=True))
    correct = sum(row["is_correct"] == "True" for row in rows)
    assert numbers["accuracy"] == correct / 64
    if tracked:
        assert sent["evaluation/accuracy"] == sent["eval_accuracy"] == correct / 64
        assert {"avg_latent_steps", "avg_gate_inside", "avg_gate_outside", "gate_histogram"} <= sent.keys()
        assert ("reasoning_length_histogram" in sent) is any(row["latent_steps"] for row in rows)
        assert len(sent["eval_table"].data) == len(sent["evaluation/results_table"].data) == 64
        wanted = {"question", "generated", "answer", "ground_truth", "is_correct", "latent_steps", "gate_inside", "gate_outside"}
        assert set(sent["eval_table"].columns) == wanted
