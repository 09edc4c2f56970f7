"""A recipe's parameters as settings, and what it trains, without touching weights."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.estimate import Training, of
from lab.methods.tah.config import TahConfig
from lab.methods.tah.toy import SHAPE, TASKS, world
from lab.models.plan import planned_config
from lab.running.records import read_metrics

Values = dict[str, Any]
HARD = 0.1  # about the share of tokens that are read twice


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
        for row in read_metrics(path.parent)
        if "loss" in row
    ]
    return pd.DataFrame(rows, columns=["arm", "step", "mean"])


def trainings(settings: dict[str, Values]) -> Iterator[Training]:
    """Both steps: backbone and adapter over every arm, then the decider (from cached features where that is asked for)."""
    label, first = settings["label"], settings["train1"]
    toy, name = label["benchmark"] in TASKS, label["backbone"]
    shape = {**SHAPE, "vocab_size": len(world(label["benchmark"]).vocabulary) + 1} if toy else {}
    if name.startswith("toy:") and not toy:
        shape = {"vocab_size": label["vocabulary"]}
    own = {"shape": shape, "examples": label["train_records"], "method": "tah"}
    own |= {"pruned": settings["prune"]["num_prune"] if first["pruned"] else 0}
    arms = {"tah": 1 + HARD, "sft": 1.0, "always": 2.0}
    passes = sum(arms[arm] for arm in first["arms"])
    length = {"steps": first["steps"], "epochs": first["epochs"]}
    at_once = {"settings": model_settings(first), "passes": passes / len(first["arms"]), **length}
    one = of("train1", first, name, first["global_batch"], label["benchmark"], **own, **at_once)
    tokens = min(one.tokens, first["max_length"] or one.tokens)
    yield replace(one, tokens=tokens, steps=one.steps * len(first["arms"]))
    if "train2" in settings:
        v = settings["train2"]
        kwargs = {name: value for name, value in decider_settings(v).items() if name not in ("pos_weight", "loss_scaling")}
        kwargs["hidden_states_size"] = planned_config(name, **shape).hidden_size
        deep = {**model_settings(first), "iter_decider": "MLPIterDecider", "iter_decider_kwargs": kwargs}
        rows = max(1, v["global_batch"] // tokens) if v["cached"] else v["global_batch"]
        how = {"settings": deep, "frozen": True, "passes": 1 / 3, "steps": v["steps"], "epochs": v["epochs"], **own}
        yield replace(of("train2", v, name, rows, label["benchmark"], **how), tokens=min(tokens, v["max_length"] or tokens))
