"""A recipe's parameters as settings, and what a dry run tells: parameters, optimizer steps, without touching weights."""

import math
from pathlib import Path
from typing import Any

from lab.errors import SettingsError
from lab.files import read_lines
from lab.methods.tah.config import TahConfig
from lab.methods.tah.toy import SHAPE, TASKS, world

Values = dict[str, Any]


def training_settings(values: Values) -> Values:
    """The `TrainSettings` of a train step's parameters, as plain values."""
    names = ("steps", "epochs", "global_batch", "micro_batch", "order", "lr", "warmup_steps", "warmup_ratio", "weight_decay", "clip")
    own = {name: values[name] for name in (*names, "bf16", "eval_every", "save_every", "report_to", "sharding", "seed")}
    if values["stage"] == 2:
        own["eval_every"] = 0
    return own | {"betas": [0.9, values["beta2"]], "schedule": "cosine_with_min_lr", "min_lr_ratio": 0.1, "log_every": 10}


def model_settings(values: Values) -> Values:
    """The `TahConfig` of a train step's parameters, as plain values."""
    lora = {"r": values["lora_r"], "lora_alpha": values["lora_alpha"], "lora_dropout": values["lora_dropout"]}
    loss = {"hard_token_relative_weight": values["hard_token_relative_weight"]}
    config = TahConfig.check(
        max_iter=values["max_iter"], input_updater_kwargs={"topk": values["input_topk"]}, adapter_kwargs=lora, train_loss_kwargs=loss
    )
    return config.model_dump(exclude_defaults=True)


def example_settings(values: Values) -> Values:
    """The `ExampleSettings` of a train step's parameters, as plain values."""
    ratios = ("random_token_ratio", "top_entropy_ratio", "top_ce_ratio", "top_ds_ratio")
    strategy = {"name": values["strategy"], **dict.fromkeys(ratios, values["strategy_ratio"])}
    window = {"max_length": values["max_length"] or None, "max_length_action": values["max_length_action"]}
    return {**window, "query_iter_count": values["query_iter_count"], "strategy": strategy, "seed": values["seed"]}


def decider_settings(values: Values) -> Values:
    """The settings of the MLP decider and its loss in a train step's parameters, as plain values."""
    names = {"topk": "decider_topk", "hidden_states_layer_nums": "decider_layers", "hidden_dims": "decider_dims"}
    names |= {"expansion_factor": "decider_expansion", "dropout_rate": "decider_dropout", "dtype": "decider_dtype"}
    loss = {"pos_weight": values["pos_weight"], "loss_scaling": values["loss_scaling"]}
    return {official: values[own] for official, own in names.items()} | {"threshold": values["train_threshold"]} | loss


def loss_table(folder: Path):
    """The logged losses of every training under a step's folder: arm, step, mean."""
    import pandas as pd

    rows = [
        {"arm": path.parent.name.removeprefix("training-"), "step": row["step"], "mean": row["loss"]}
        for path in sorted(Path(folder).glob("training-*/metrics.jsonl"))
        for row in read_lines(path)
        if "loss" in row and "event" not in row
    ]
    return pd.DataFrame(rows, columns=["arm", "step", "mean"])


def describe(settings: dict[str, Values]) -> dict[str, Any]:
    """What a recipe ({step: parameters}) will train: parameters by part, optimizer steps and rows a step; no weights, no data."""
    label, first = settings["label"], settings["train1"]
    shape = _toy_shape(label) if label["benchmark"] in TASKS else {}
    if label["backbone"].startswith("toy:") and not shape:
        shape = {"vocab_size": label["vocabulary"]}
    dropped = settings["prune"]["num_prune"] if first["pruned"] else 0
    found: dict[str, Any] = {}
    if "train2" in settings:
        found |= {f"TaH {name}": count for name, count in _counts(label["backbone"], first, settings["train2"], dropped, shape).items()}
    if "sft" in first["arms"]:
        found |= {f"Standard {name}": count for name, count in _standard(label["backbone"], shape).items()}
    for name in (name for name in ("train1", "train2") if name in settings):
        found[f"{name} optimizer steps"] = _steps(settings[name], label["train_records"])
    return found


def _toy_shape(label: Values) -> Values:
    return {**SHAPE, "vocab_size": len(world(label["benchmark"]).vocabulary) + 1}


def _counts(backbone: str, first: Values, second: Values, dropped: int, shape: Values) -> dict[str, int]:
    from lab.models.plan import parameter_counts, planned_config

    kwargs = {name: value for name, value in decider_settings(second).items() if name not in ("pos_weight", "loss_scaling")}
    kwargs["hidden_states_size"] = planned_config(backbone, **shape).hidden_size
    deep = {**model_settings(first), "iter_decider": "MLPIterDecider", "iter_decider_kwargs": kwargs}
    counts = parameter_counts(backbone, "tah", deep, pruned=dropped, **shape)
    return {name: counts[name] for name in ("layers", "one layer", "lora", "decider", "total")} | {"layers dropped": dropped}


def _standard(backbone: str, shape: Values) -> dict[str, int]:
    from lab.models.plan import parameter_counts

    return {"total": parameter_counts(backbone, **shape)["total"]}


def _steps(values: Values, records: int) -> int | str:
    if values["steps"]:
        return values["steps"]
    if not values["epochs"]:
        raise SettingsError(f"stage {values['stage']}: give steps or epochs.")
    if not records:
        return f"ceil({values['epochs']:g} × records / {values['global_batch']})"
    return math.ceil(values["epochs"] * records / values["global_batch"])
