"""The steps of LTA's and SoftCoT's pipelines as one call each; a notebook calls them and shows what they return."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab.data.examples import Dataset
from lab.errors import DataError, SettingsError
from lab.latent.plan import Kept
from lab.launch import on_main
from lab.methods.lta import toy
from lab.methods.lta.checkpoint import load_weights
from lab.methods.lta.config import FAMILIES, LtaSettings, family_of
from lab.methods.lta.data import ThoughtBatch, batch_of, one_count
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.objective import counter, loss
from lab.methods.lta.prompting import Pack, Prompted, build, reasoning, shown_to_assistant
from lab.methods.lta.tasks import dataset
from lab.models.backbones import load_backbone, quiet
from lab.models.latent_model import model_class
from lab.models.layouts import load
from lab.models.tokenizers import load_tokenizer
from lab.train import TrainResult, TrainSettings, fit

TOY = "toy"
RENAMED = {"Qwen/Qwen3-8B-Instruct": "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B-Instruct": "Qwen/Qwen3-0.6B"}

Counts = tuple[Prompted, ...]  # one example with each number of thoughts


def hub_name(name: str) -> tuple[str, str]:
    """The hub id to use for `name`, and a note where the published command names one that does not exist."""
    real = RENAMED.get(name, name)
    return real, "" if real == name else f"{name} does not exist on the hub; {real} is the model the published script uses."


def toy_base(folder: Path, seed: int, steps: int) -> float:
    """Trains the micro-task's base into `folder`/base; its last loss."""
    base, value = toy.pretrain(seed, steps, Path(folder) / "training-base")
    with quiet():
        base.save_pretrained(Path(folder) / "base")
    return value


def toy_arm(arm: str, folder: str, seed: int, steps: int, thoughts: int) -> dict[str, float]:
    """Trains one arm of the micro-task on `folder`/base and saves it; what it measures on fresh questions."""
    model = toy.start(arm, load_backbone(str(Path(folder) / "base")), seed, thoughts)
    result = toy.train(model, seed, steps, Path(folder) / f"training-{arm}", label=arm)
    model.save(Path(folder) / arm, overwrite=True, with_backbone=True)
    return {"train_loss": result.loss, **toy.measure(model, seed)}


def toy_table(folder: Path, arms: list[str], seed: int, thoughts: list[int], questions: int = 500) -> list[dict[str, Any]]:
    """Exact matches of every saved arm for every number of thoughts, and with the solution shown (`shown`)."""
    rows = []
    for arm in arms:
        model = toy_model(folder, arm, seed)
        for n in thoughts:
            rows.append({"arm": arm, "thoughts": n, "shown": False, **toy.measure(model, seed, questions, n)})
        if model.config.generator == "block":
            rows.append({"arm": arm, "thoughts": thoughts[-1], "shown": True, **toy.measure(model, seed, questions, thoughts[-1], True)})
    return rows


def headline(rows: list[dict[str, Any]], most: int) -> dict[str, dict[str, float]]:
    """{arm: numbers} of `toy_table`: exact matches with `most` thoughts, with fewer, with the solution shown, over the official arm."""
    told: dict[str, dict[str, float]] = {}
    for row in rows:
        whole = row["thoughts"] == most
        name = "solution shown" if row["shown"] else "exact" if whole else f"with {row['thoughts']} of {most}"
        told.setdefault(row["arm"], {})[name] = row["exact"]
        if whole and not row["shown"]:
            told[row["arm"]] |= {"loss": row["loss"], "variance": row["variance"]}
    if official := told.get("lta-official"):
        for arm, numbers in told.items():
            if arm.startswith("lta-") or arm == "lta":
                numbers["over official"] = numbers["exact"] - official["exact"]
    return told


def toy_model(folder: Path, arm: str, seed: int) -> ThoughtModel:
    """A saved arm, with its assistant where it has one."""
    model = load(Path(folder) / arm)
    if model.config.generator == "assistant":
        model.use_assistant(toy.small_assistant(seed))
    return model


def start(values: dict[str, Any]) -> ThoughtModel:
    """The untrained model that a train step's parameters describe; names of the published command are accepted, mended and noted."""
    large, small = (hub_name(values[name])[0] for name in ("large_model_id", "small_model_id"))
    settings = _settings(values, family_of(large))
    assistant, assistant_tokenizer = None, None
    if settings.generator == "assistant":
        if not small:
            raise SettingsError("generator = 'assistant' needs the small model; name it with small_model_id.")
        assistant, assistant_tokenizer = load_backbone(small, dtype=values["dtype"]), load_tokenizer(small)
    torch.manual_seed(values["seed"])
    base, tokenizer = load_backbone(large, dtype=values["dtype"]), load_tokenizer(large, pad=True, eos=True, chat=True)
    pack = Pack.read(values["pack"]) if values["pack"] else None
    model = model_class(values["method"]).start(base, tokenizer, settings, assistant, assistant_tokenizer, pack)
    if settings.num_scaling_times > 1:
        first = FAMILIES[settings.family].first_slot
        model.use_assistant(assistant, model.assistant_tokenizer, list(range(first, first + settings.num_scaling_times)))
    if values["params_file_name"]:
        load_weights(model, *(values[name] for name in ("params_file_name", "att_file_name")))
    return model


AS_NAMED = ("num_thought_tokens", "train_thoughts", "gold_steps", "focus_positions", "distinct_slots", "num_scaling_times", "nce")
AS_NAMED += ("mean_of_means", "tune_base_model", "tune_assistant_model")
AS_NAMED += ("sft_loss_weight", "contrastive_loss_weight", "kl_loss_weight")


def _settings(values: dict[str, Any], family: str) -> LtaSettings:
    generator = "assistant" if values["use_assistant_model"] else values["generator"]
    same = {name: values[name] for name in AS_NAMED}
    settings = LtaSettings.check(generator=generator, task=values["task_name"], family=family, eps=FAMILIES[family].eps, **same)
    if values["method"] == "softcot" and settings.shaped:
        raise SettingsError(
            "SoftCoT learns from cross-entropy alone: set contrastive_loss_weight and kl_loss_weight to 0, or run lta with "
            "use_assistant_model."
        )
    return settings


def prompts(model: ThoughtModel, data: Dataset, split: str, limit: int = 0) -> Kept[Counts]:
    """The examples that can be used as prompts, each with every number of thoughts it is trained with, and which were dropped and why."""
    s, kept = model.config, Kept()
    where = {"family": s.family, "task": s.task, "split": split, "pack": model.pack, "distinct": s.distinct_slots, "limit": limit}
    where |= {"tokenizer": model.tokenizer, "assistant_tokenizer": model.assistant_tokenizer, "solution": s.gold_steps != "off"}
    for example in data:
        try:
            if not shown_to_assistant(reasoning(example, s.task), s.task):
                raise DataError("no reasoning steps to learn from")
            kept.add(example.id, tuple(build(example, n, **where) for n in s.counts))
        except DataError as error:
            kept.add(example.id, None, str(error))
    return kept.checked()


def train(model: ThoughtModel, rows: list[Counts], settings: TrainSettings, folder: Path, validation: list[Counts] = ()) -> TrainResult:
    """Trains the model's own weights; states of a frozen assistant are computed once for all epochs."""
    collate, held_out = partial(_collate, model, _cached_states(model, rows)), [examples[-1] for examples in validation]

    def validate(trained: ThoughtModel) -> dict[str, float]:
        parts = [held_out[i : i + 16] for i in range(0, len(held_out), 16)]
        values = [loss(trained, batch_of(part, *_fillers(model)).to(model.device))[1]["sft"] for part in parts]
        return {"loss": float(torch.stack(values).mean())}

    lengths = [len(examples[-1].row) for examples in rows]
    return fit(model, rows, collate, loss, settings, folder, count=counter(model), validate=validate if held_out else None, lengths=lengths)


def _fillers(model: ThoughtModel) -> tuple[int, int]:
    return model.tokenizer.pad_token_id, model.tokenizer.convert_tokens_to_ids(FAMILIES[model.config.family].placeholder)


def _collate(model: ThoughtModel, states: dict[int, torch.Tensor], examples: list[Counts]) -> ThoughtBatch:
    rows = one_count(examples)
    batch = batch_of(rows, *_fillers(model))
    if states:
        batch.states = torch.nn.utils.rnn.pad_sequence([states[id(row)] for row in rows], batch_first=True)
    return batch


@torch.no_grad()
def _cached_states(model: ThoughtModel, examples: list[Counts], size: int = 32) -> dict[int, torch.Tensor]:
    """What a frozen assistant says of every row, by the row's id; {} for other generators and for several sets."""
    s, found = model.config, {}
    if s.generator != "assistant" or s.num_scaling_times > 1 or s.tune_assistant_model:
        return found
    for same in zip(*examples, strict=True):
        for group in (same[i : i + size] for i in range(0, len(same), size)):
            states = model.assistant_states(batch_of(group, *_fillers(model)).to(model.device)).cpu()
            used = [states.shape[1] if not s.shaped else len(row.slots) + 1 + len(row.steps) for row in group]
            found |= {id(row): part[:length] for row, part, length in zip(group, states, used, strict=True)}
    return found


def run(folder: str, values: dict[str, Any]) -> dict[str, float]:
    """A real training from a train step's parameters (plain values, so that several processes can share it)."""
    model, held_out = start(values), values["held_out"]
    data = dataset(values["task_name"], "train", values["data"], values["k_shot"], values["seed"])
    data = data.shuffled(values["seed"])
    rows = prompts(model, data, "train", max(0, values["max_len"])).rows
    batch = values["batch_size"] * values["gradient_accumulation_steps"] * values["processes"]
    settings = TrainSettings.check(
        steps=values["steps"] if not values["n_epochs"] else 0,
        epochs=values["n_epochs"],
        global_batch=batch,
        micro_batch=values["batch_size"],
        lr=values["learning_rate"],
        warmup_ratio=values["warmup_ratio"],
        seed=values["seed"],
        report_to=values["report_to"],
        sharding=values["sharding"],
        eval_every=200 if held_out else 0,
    )
    result = train(model, rows[held_out:], settings, Path(folder) / f"training-{values['method']}", rows[:held_out])
    on_main(lambda: str(model.save(Path(folder) / values["method"], overwrite=True, with_backbone=False)))
    return {"train_loss": result.loss, "steps": result.steps, "examples": len(rows) - held_out}


def published(values: dict[str, Any]) -> dict[str, Any]:
    """An evaluation's parameters with the names of the published command read: those of the models, the one number of thoughts."""
    where = [Path(values[name]).expanduser() for name in ("params_file_name", "att_file_name") if values[name]]
    if len({path.parent if path.suffix == ".bin" else path for path in where}) > 1 or (values["att_file_name"] and len(where) == 1):
        raise SettingsError(
            "params_file_name and att_file_name belong together: put projection.bin and TransformerBlock.bin into one folder."
        )
    given = {"large_model_id": values["base_model_id"], "small_model_id": values["assistant_model_id"]}
    given["thoughts"] = [values["num_thought_tokens"]] if values["num_thought_tokens"] else []
    return values | {name: value for name, value in given.items() if value}


def trained(folder: Path, values: dict[str, Any]) -> ThoughtModel:
    """The model of a train step, or the published weights in `params_file_name`, with its assistant where it has one."""
    large, small = (hub_name(values[name])[0] for name in ("large_model_id", "small_model_id"))
    if values["params_file_name"]:
        where = Path(values["params_file_name"])
        more = {"distinct_slots": values["method"] == "lta" and values["task_name"] != "strategyqa"}
        more |= {"assistant": small} if small else {}
        more |= {"pack": values["pack"]} if values["pack"] else {}
        return load(where.parent if where.is_file() else where, backbone=large, task=values["task_name"], **more)
    model = load(folder / values["method"], **({"pack": values["pack"]} if values["pack"] else {}))
    if model.config.generator == "assistant":
        name = model.config.assistant_id
        model.use_assistant(load_backbone(name, dtype="bfloat16"), load_tokenizer(name))
    return model
