"""From the parameters of the training notebook to checked settings, and its losses as a table."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lab.estimate import Training, of
from lab.methods.colar.config import ColarSettings
from lab.methods.colar.toy import SHAPE
from lab.rl import RLSettings
from lab.running.records import read_metrics
from lab.train import TrainSettings

MODEL = ("max_compression_factor", "latent_loss", "sqrt_mean", "lp_intermediate_size", "lora_r", "lora_alpha", "official_padding")
SHARED = ("global_batch", "micro_batch", "weight_decay", "clip", "bf16", "save_every", "seed", "processes", "sharding", "report_to")


def model_settings(given: Mapping[str, Any]) -> ColarSettings:
    """The model's settings."""
    return ColarSettings.check(**{name: given[name] for name in MODEL})


def training_settings(given: Mapping[str, Any]) -> TrainSettings:
    """Of the compressed training."""
    length = {name: given[name] for name in ("steps", "epochs", "lr", "schedule", "min_lr_ratio", "warmup_steps")}
    return TrainSettings.check(**_shared(given), **length)


def warm_up_settings(given: Mapping[str, Any]) -> TrainSettings:
    """Of the written reasoning before it."""
    steps = given["warm_up_steps"]
    rise = min(given["warmup_steps"], steps // 2)
    rate = {"lr": given["warm_up_lr"] or given["lr"], "schedule": "cosine_with_min_lr", "min_lr_ratio": 0.02, "warmup_steps": rise}
    return TrainSettings.check(**_shared(given), steps=steps, **rate)


def _shared(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in SHARED} | {"betas": [0.9, given["beta2"]], "log_every": 50}


def rl_settings(given: Mapping[str, Any]) -> RLSettings:
    """Of GRPO: `rl_updates` steps on each rollout, no divergence term, gradient norm at most 1."""
    updates = given["rl_updates"]
    size = {
        "steps": given["rl_steps"] * updates,
        "updates": updates,
        "save_every": given["save_every"] * updates,
        "prompts": given["rl_prompts"],
        "samples": given["rl_samples"],
        "lr": given["rl_lr"],
    }
    size |= {"micro_batch": given["micro_batch"], "longest": given["thoughts"] + 1 + given["max_new_tokens"]}
    loss = "grpo" if given["average_per_token_loss"] else "dr_grpo"
    rest = {name: given[name] for name in ("weight_decay", "seed", "bf16", "processes", "sharding", "report_to")}
    return RLSettings.check(**size, loss_type=loss, schedule="constant", clip=1.0, **rest)


def trainings(settings: dict[str, dict[str, Any]]) -> Iterator[Training]:
    """Written reasoning, compressed reasoning, GRPO: each where it has steps."""
    v = settings["train"]
    shape = SHAPE if v["backbone"].startswith("toy:") else {}
    own = {"method": "colar", "settings": model_settings(v).model_dump(), "lora": (v["lora_r"], ("q", "v")), "shape": shape}
    own |= {"examples": v["train_questions"], "said": 0.5}
    for name, steps, epochs in (("warm-up", v["warm_up_steps"], 0.0), ("compressed", v["steps"], v["epochs"])):
        if (steps or epochs) and not (name == "warm-up" and v["checkpoint"]):
            yield of(f"train, {name}", v, v["backbone"], v["global_batch"], v["benchmark"], steps=steps, epochs=epochs, **own)
    if v["rl_steps"]:
        rows, decoded = v["rl_prompts"] * v["rl_samples"], v["thoughts"] + v["max_new_tokens"]
        yield of("train, GRPO", v, v["backbone"], rows, v["benchmark"], steps=v["rl_steps"], decoded=decoded, **own)


def loss_table(folder: Path):
    """The logged parts of the loss (a DataFrame), for `figures.loss_components`."""
    import pandas as pd

    rows = [row for row in read_metrics(folder) if "ce" in row]
    parts = ((row, name) for row in rows for name in ("ce", "latent") if name in row)
    return pd.DataFrame([{"step": row["step"], "component": name, "value": row[name]} for row, name in parts])
