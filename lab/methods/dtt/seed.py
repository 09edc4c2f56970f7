"""The seed project's commands and YAML files (`dtt.md` 3, 6), translated.

`accelerate launch --num_processes 4 train.py --config_path configs/train_gsm8k.yaml` is here
`python -m lab.methods.dtt.seed train --config_path configs/train_gsm8k.yaml --num_processes 4`, and `python eval.py …` is `… seed eval …`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from lab.errors import DataError, LabError, SettingsError, unknown
from lab.files import write_json
from lab.launch import launch

Values = dict[str, Any]
DATASETS = {"gsm8k": "gsm8k", "prosqa": "prosqa", "prontoqa": "prontoqa", "permutations": "permutations"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant"}

# The seed's key -> where it goes here; "" is read by the functions below, None changes nothing (the reason stands in the card).
TRAIN: dict[str, str | None] = {
    "dataset_name": "",
    "data_dir": "data",
    "model_name": "model",
    "hidden_size": None,
    "embedding_dim": None,
    "lora_rank": "lora.rank",
    "lora_target_modules": "lora.targets",
    "initial_gate_temperature": "gated.temperature",
    "min_gate_temperature": "gate.min_temperature",
    "gumbel_hard_generation_train": "gated.hard",
    "lambda_penalty": "rewards.lambda_penalty",
    "gate_penalty_coeff": "rewards.gate_penalty_coeff",
    "lr": "rl.lr",
    "lr_scheduler_type": "",
    "warmup_ratio": "",
    "optimizer": "",
    "max_grad_norm": "rl.clip",
    "per_device_train_batch_size": "",
    "gradient_accumulation_steps": "",
    "num_train_epochs": "",
    "max_steps": "",
    "group_size_grpo": "rl.samples",
    "sampling_temperature_grpo": "rl.temperature",
    "beta_grpo": None,
    "epsilon_clip": "rl.epsilon",
    "beta_kl": "rl.beta",
    "max_prompt_length": "max_prompt_length",
    "max_completion_length": "rl.longest",
    "save_steps": "rl.save_every",
    "save_total_limit": "rl.keep",
    "logging_steps": "rl.log_every",
    "seed": "seed",
    "use_bf16": "rl.bf16",
    "use_fp16": "",
    "output_dir": "folder",
    "overwrite_output_dir": None,
    "wandb_project": "",
    "resume_from_checkpoint": None,
}
EVAL: dict[str, str | None] = {
    "dataset_name": "",
    "data_dir": "data",
    "model_checkpoint_path": "checkpoint",
    "checkpoint_path": "checkpoint",
    "base_model_name_for_eval": "backbone",
    "eval_output_dir": "folder",
    "eval_gate_temperature": "temperature",
    "eval_gumbel_hard": "hard",
    "eval_batch_size": "decoding.batch",
    "sampling_temperature_eval": "decoding.temperature",
    "max_completion_length": "decoding.max_new_tokens",
    "max_prompt_length": "max_prompt_length",
    "load_in_4bit_eval": "",
    "lora_target_modules_eval": None,
    "dataset_split_eval": "split",
    "wandb_project_eval": "",
    "seed": "decoding.seed",
    "hidden_size": None,
    "embedding_dim": None,
}
DEFAULTS = {"initial_gate_temperature": 1.0, "min_gate_temperature": 0.1, "gumbel_hard_generation_train": False, "lambda_penalty": 0.01}
DEFAULTS |= {"gate_penalty_coeff": 0.05, "logging_steps": 10, "seed": 42, "max_steps": -1, "num_train_epochs": 1}


def read_yaml(path: Path | str, known: Mapping[str, Any]) -> Values:
    """The keys of a seed YAML file; SettingsError with the closest match for one that no published file has."""
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"Cannot read {str(path)!r}: {str(error).splitlines()[0]}.") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{str(path)!r} holds no keys and values.")
    for key in found:
        if key not in known:
            raise unknown(f"key of {Path(path).name}", key, known)
    if found.get("load_in_4bit_eval") or found.get("use_fp16"):
        raise SettingsError("4-bit loading and fp16 are not offered (dtt.md 7: 1e-10 underflows in fp16); use use_bf16, or float32.")
    return found


def train_arguments(found: Values, examples: int, world: int = 1) -> Values:
    """The arguments of `run_arm` for a training YAML; `examples` are the prompts there are, `world` the processes."""
    v = DEFAULTS | found
    out: Values = {"rl": {"seed": v["seed"], "loss_type": "grpo"}, "gate": {}, "rewards": {}, "lora": {}, "gated": {"noise": "gumbel"}}
    _place(out, v, TRAIN)
    each = v.get("per_device_train_batch_size", 1)
    prompts, samples = each * world * v.get("gradient_accumulation_steps", 1), v.get("group_size_grpo", 8)
    steps = v["max_steps"] if v["max_steps"] > 0 else max(1, int(v["num_train_epochs"] * examples) // prompts)
    out["rl"] |= {"prompts": prompts, "micro_batch": each * samples, "steps": steps}
    out["rl"] |= {"warmup_steps": int(v.get("warmup_ratio", 0) * steps), "schedule": _schedule(v.get("lr_scheduler_type", "linear"))}
    out["rl"] |= {"report_to": "wandb"} if v.get("wandb_project") else {}
    if v.get("optimizer", "adamw_torch") != "adamw_torch":
        raise SettingsError(f"optimizer = {v['optimizer']!r}: only adamw_torch is offered.")
    return out | {"benchmark": _dataset(v), "arm": "pathwise"}


def _place(out: Values, v: Values, table: Mapping[str, str | None]) -> None:
    for key, value in v.items():
        where = table.get(key)
        if not where:
            continue
        part, _, name = where.rpartition(".")
        (out.setdefault(part, {}) if part else out)[name] = value


def _dataset(v: Values) -> str:
    name = str(v.get("dataset_name", "")).lower()
    if name not in DATASETS:
        raise unknown("dataset_name", v.get("dataset_name", ""), DATASETS)
    return DATASETS[name]


def _schedule(name: str) -> str:
    if name not in SCHEDULES:
        raise unknown("lr_scheduler_type", name, SCHEDULES)
    return SCHEDULES[name]


def train(path: str, processes: int = 1) -> Values:
    """Trains as the YAML says and keeps the model under its `output_dir`; what `run_arm` tells."""
    from lab.methods.dtt.stages import TOY, examples, run_arm

    found = read_yaml(path, TRAIN)
    count = 256 if _dataset(found) == TOY else len(examples(_dataset(found), "train", data=found.get("data_dir", "")))
    arguments = train_arguments(found, count, processes)
    if Path(arguments.get("model", "gpt2"), "lab.json").is_file():
        arguments["gated"] = None
    arguments |= {"rows": count, "folder": arguments.get("folder", "outputs/dtt-seed")}
    return launch(run_arm, processes, **{"model": "gpt2", **arguments})


def evaluate(path: str) -> Values:
    """Evaluates as the YAML says; the artefacts lie in `eval_output_dir`, by default `<checkpoint>/evaluation`.

    With `wandb_project_eval`, numbers, tables and histograms go to W&B as well, under the published names.
    """
    from lab.evaluate import Decoding
    from lab.methods.dtt.data import prepare
    from lab.methods.dtt.evaluate import evaluate_gated
    from lab.methods.dtt.stages import TOY, examples, gated_model

    found, out = read_yaml(path, EVAL), {"decoding": {}}
    _place(out, found, EVAL)
    if not out.get("checkpoint"):
        raise SettingsError("The YAML names no checkpoint (model_checkpoint_path).")
    if found.get("wandb_project_eval") and find_spec("wandb") is None:
        raise SettingsError("wandb_project_eval needs a package that is not there; run: pip install wandb (or take the key out).")
    own = Path(out["checkpoint"], "lab.json").is_file()
    model = gated_model(out["checkpoint"], **({} if own or "backbone" not in out else {"backbone": out["backbone"]}))
    model.gate.temperature, model.gate.hard = out.get("temperature", 1.0), out.get("hard", True)
    asked = examples(_dataset(found), out.get("split", "test"), 64 if _dataset(found) == TOY else 0, data=out.get("data", ""))
    kept = set(prepare(asked, model.tokenizer, model.config, out.get("max_prompt_length", 10**6)).ids)
    chosen = [example for example in asked if example.id in kept]
    folder = Path(out.get("folder") or Path(out["checkpoint"]) / "evaluation")
    numbers = evaluate_gated(model, chosen, _dataset(found), folder, Decoding.check(**out["decoding"]), drawn=not model.gate.hard)
    numbers |= {"eval_accuracy": numbers["accuracy"]}
    write_json(folder / "evaluation.numbers.json", numbers)
    if found.get("wandb_project_eval"):
        _to_wandb(found["wandb_project_eval"], numbers, folder)
    return numbers


SENT = ("eval_accuracy", "avg_latent_steps", "avg_gate_inside", "avg_gate_outside")
EVAL_TABLE = {
    "prompt": "question",
    "predicted_answer": "answer",
    "gate_mean_reasoning": "gate_inside",
    "gate_mean_non_reasoning": "gate_outside",
}


def _to_wandb(project: str, numbers: Values, folder: Path) -> None:
    import pandas as pd
    import wandb

    from lab.methods.dtt.evaluate import TABLE, said_in

    rows, table = said_in(folder), pd.read_csv(folder / TABLE)
    early = table.drop(columns="reasoning_text").rename(columns=EVAL_TABLE).assign(generated=[row["text"] for row in rows])
    shown = {"evaluation/accuracy": numbers["accuracy"], **{name: numbers[name] for name in SENT}}
    shown |= {"evaluation/results_table": wandb.Table(dataframe=table), "eval_table": wandb.Table(dataframe=early)}
    shown |= {"gate_histogram": wandb.Histogram([gate for row in rows for gate in row["gate"]])}
    if lengths := table["latent_steps"].dropna().tolist():
        shown["reasoning_length_histogram"] = wandb.Histogram(lengths)
    with wandb.init(project=project, job_type="evaluation") as run:
        run.log(shown)


def main(arguments: Sequence[str] | None = None, show: Callable[[str], Any] = sys.stdout.write) -> int:
    """The command line; 0, or 2 with a sentence where the input is wrong."""
    parser = argparse.ArgumentParser(prog="python -m lab.methods.dtt.seed", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("train", "eval"))
    parser.add_argument("yaml", nargs="?", help="the YAML file, as the published scripts take it")
    parser.add_argument("--config_path", help="the same, as the seed document writes it")
    parser.add_argument("--num_processes", type=int, default=1)
    asked = parser.parse_args(arguments)
    path = asked.config_path or asked.yaml
    try:
        if not path:
            raise DataError("Give the YAML file: --config_path configs/train_gsm8k.yaml.")
        show(json.dumps(train(path, asked.num_processes) if asked.what == "train" else evaluate(path), indent=1) + "\n")
    except LabError as error:
        show(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
