"""A recipe's parameters as settings, and what it trains; no weights, no data."""

from collections.abc import Iterator
from typing import Any

from lab.estimate import Training, of
from lab.methods.dtt.config import GatedSettings

Values = dict[str, Any]
SHAPE = {"layers": 2, "hidden": 64, "intermediate": 256, "heads": 4, "max_positions": 32}  # of the toy


def gated_settings(v: Values) -> Values:
    """The `GatedSettings` of a warm-up step's parameters, as plain values."""
    names = ("gate", "noise", "hard", "temperature", "bias", "bot_in_prompt", "r_min", "r_max", "residual_temperature")
    return GatedSettings.check(**{name: v[name] for name in names}).model_dump(exclude_defaults=True)


def warm_up_training(v: Values) -> dict[str, Values]:
    """`training` and `gated_training` of `run_warm_up`, each empty where it has no steps."""
    names = ("global_batch", "micro_batch", "weight_decay", "bf16", "save_every", "report_to", "sharding", "seed")
    shared = {name: v[name] for name in names} | {"order": "as_given", "schedule": "cosine", "log_every": 50}

    def of(steps: int, lr: float) -> Values:
        return shared | {"steps": steps, "lr": lr, "warmup_steps": min(v["warmup_steps"], steps // 2)} if steps else {}

    return {"training": of(v["steps"], v["lr"]), "gated_training": of(v["gated_steps"], v["gated_lr"])}


def rl_arguments(v: Values, model: str) -> Values:
    """The arguments of `run_arm` of a train step's parameters; `model` is the checkpoint it starts from."""
    same = ("prompts", "samples", "longest", "iterations", "schedule", "betas", "clip", "beta", "epsilon", "loss_type", "scale_rewards")
    other = {"steps": "rl_steps", "micro_batch": "rl_micro_batch", "temperature": "sampling_temperature", "lr": "lr_body"}
    other |= {"warmup_steps": "rl_warmup_steps", "weight_decay": "rl_weight_decay"}
    rl = {name: v[name] for name in (*same, "save_every", "bf16", "report_to", "sharding", "log_every", "seed")}
    rl |= {ours: v[name] for ours, name in other.items()}
    return {
        "model": model,
        "benchmark": v["benchmark"],
        "rl": rl,
        "rewards": {name: v[name] for name in ("lambda_penalty", "lambda_warmup", "gate_penalty_coeff", "malformed")},
        "gate": {name: v[name] for name in ("constant_groups", "recompute", "anneal", "min_temperature")},
        "lora": {"rank": v["lora_rank"], "alpha": v["lora_alpha"], "dropout": v["lora_dropout"]},
        "lr_gate": v["lr_gate"],
        "lr_lambda": v["lr_lambda"],
        "rows": v["train_rows"],
        "seed": v["seed"],
        "data": v["data"],
        "max_prompt_length": v["max_prompt_length"],
    }


def trainings(settings: dict[str, Values]) -> Iterator[Training]:
    """The warm-ups, and GRPO of every arm."""
    v = settings["warm_up"]
    toy = v["backbone"].startswith("toy:")
    own = {"method": "dtt", "settings": gated_settings(v), "shape": SHAPE if toy else {}, "examples": v["rows"]}
    for name in (name for name in ("steps", "gated_steps") if v[name]):
        yield of(f"warm_up, {name}", v, v["backbone"], v["global_batch"], v["benchmark"], steps=v[name], **own)
    if "train" not in settings:
        return
    t = settings["train"]
    own |= {"lora": (t["lora_rank"], ()), "decoded": t["longest"], "examples": t["train_rows"]}
    how = {**t, "micro_batch": t["rl_micro_batch"]}
    yield of("train", how, v["backbone"], t["prompts"] * t["samples"], t["benchmark"], steps=len(t["arms"]) * t["rl_steps"], **own)
