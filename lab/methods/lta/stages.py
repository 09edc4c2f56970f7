"""The steps of LTA's and SoftCoT's pipelines as one call each; a notebook calls them and shows what they return."""

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.backends import Latent
from lab.data.benchmarks import load_benchmark, with_options
from lab.data.examples import Dataset, Example
from lab.data.records import LETTERS
from lab.errors import DataError, SettingsError, unknown
from lab.evaluate import Decoding, Evaluation, evaluate, read_samples
from lab.latent.plan import Kept
from lab.launch import on_main
from lab.methods.lta import toy
from lab.methods.lta.checkpoint import load_weights
from lab.methods.lta.config import FAMILIES, LtaSettings, family_of
from lab.methods.lta.data import ThoughtBatch, batch_of, one_count
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.objective import counter, loss
from lab.methods.lta.policy import make_all, prompted
from lab.methods.lta.prompting import Pack, Prompted, build, reasoning, shown_to_assistant
from lab.models.backbones import load_backbone
from lab.models.layouts import load
from lab.models.tokenizers import load_tokenizer
from lab.sampling.votes import settled, vote
from lab.trace import Trace
from lab.train import TrainResult, TrainSettings, fit

TOY = "toy"
RENAMED = {"Qwen/Qwen3-8B-Instruct": "Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B-Instruct": "Qwen/Qwen3-0.6B"}
RULES = {"gsm8k": "lta-gsm8k", "strategyqa": "lta-strategyqa", "math": "lta-math", "aqua": "lta-aqua", "du": "lta-aqua"}
BENCHMARKS = {"gsm8k": "gsm8k", "strategyqa": "strategyqa", "math": "math", "aqua": "aqua", "du": "date_understanding"}

Counts = tuple[Prompted, ...]  # one example with each number of thoughts


def hub_name(name: str) -> tuple[str, str]:
    """The hub id to use for `name`, and a note where the published command names one that does not exist."""
    real = RENAMED.get(name, name)
    return real, "" if real == name else f"{name} does not exist on the hub; {real} is the model the published script uses."


def toy_base(folder: Path, seed: int, steps: int) -> float:
    """Trains the micro-task's base into `folder`/base; its last loss."""
    base, value = toy.pretrain(seed, steps, Path(folder) / "training-base")
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
    family, assistant, generator = family_of(large), None, values["generator"]
    if values["use_assistant_model"]:
        generator = "assistant"
    if generator == "assistant":
        if not small:
            raise SettingsError("generator = 'assistant' needs the small model; name it with small_model_id.")
        assistant = load_backbone(small, dtype=values["dtype"])
    names = ("num_thought_tokens", "train_thoughts", "gold_steps", "focus_positions", "distinct_slots", "num_scaling_times", "nce")
    names += ("mean_of_means", "tune_base_model", "tune_assistant_model")
    weights = ("sft_loss_weight", "contrastive_loss_weight", "kl_loss_weight")
    settings = LtaSettings.check(
        generator=generator,
        task=values["task_name"],
        family=family,
        eps=FAMILIES[family].eps,
        **{name: values[name] for name in (*names, *weights)},
    )
    if values["method"] == "softcot" and settings.shaped:
        raise SettingsError(
            "SoftCoT learns from cross-entropy alone: set contrastive_loss_weight and kl_loss_weight to 0, or run lta with "
            "use_assistant_model."
        )
    torch.manual_seed(values["seed"])
    tokenizer = load_tokenizer(large, pad=True, eos=True, chat=True)
    kind = ThoughtModel
    if values["method"] == "softcot":
        from lab.methods.softcot.model import SoftcotModel as kind
    base = load_backbone(large, dtype=values["dtype"])
    pack = Pack.read(values["pack"]) if values["pack"] else None
    model = kind.start(base, tokenizer, settings, assistant, None if assistant is None else load_tokenizer(small), pack)
    if settings.num_scaling_times > 1:
        first = FAMILIES[family].first_slot
        model.use_assistant(assistant, model.assistant_tokenizer, list(range(first, first + settings.num_scaling_times)))
    if values["params_file_name"]:
        load_weights(model, *(values[name] for name in ("params_file_name", "att_file_name")))
    return model


def prompts(model: ThoughtModel, data: Dataset, split: str, limit: int = 0) -> Kept[Counts]:
    """The examples that can be used as prompts, each with every number of thoughts it is trained with, and which were dropped and why."""
    s, kept = model.config, Kept()
    where = {"family": s.family, "task": s.task, "split": split, "pack": model.pack, "distinct": s.distinct_slots, "limit": limit}
    where |= {"tokenizer": model.tokenizer, "assistant_tokenizer": model.assistant_tokenizer}
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
    return {"train_loss": result.loss, "steps": float(result.steps), "examples": float(len(rows) - held_out)}


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


def inputs(model: ThoughtModel, data: Dataset) -> list[dict[str, str]]:
    """What the base and the thought generator read for each question, as text."""
    reader, rows = model.assistant_tokenizer or model.tokenizer, [prompted(model, example) for example in data]
    base = [model.tokenizer.decode(r.row.prompt) + "[thought]" * r.row.thoughts + model.tokenizer.decode(r.row.after) for r in rows]
    return [{"base reads": text, "generator reads": reader.decode(row.assistant)} for text, row in zip(base, rows, strict=True)]


def explored(folder: Path, values: dict[str, Any]) -> dict[str, ThoughtModel]:
    """The models to look at, by arm."""
    if values["large_model_id"] != TOY:
        return {values["method"]: trained(folder, values)}
    return {arm: toy_model(folder, arm, values["seed"]) for arm in values["arms"]}


def asked(model: ThoughtModel, values: dict[str, Any]) -> list[Prompted]:
    """Test questions for a model: fresh ones of the micro-task, or a benchmark's."""
    count = values["questions"]
    if values["large_model_id"] == TOY:
        task = toy.WORLD.task(count, np.random.default_rng((values["seed"], 2)))
        return toy.questions(task, model.config.num_thought_tokens, solution=False, distinct=model.config.distinct_slots)
    data = dataset(values["task_name"], "test", values["data"], count, values["seed"])
    return [prompted(model, example) for example in data]


def spread_rows(models: dict[str, ThoughtModel], asked: dict[str, list[Prompted]]) -> list[dict[str, Any]]:
    """By arm: variance of the thoughts over questions, mean cosine between different places, mean norm."""
    rows = []
    for arm, model in models.items():
        found = similarity(model, asked[arm])
        n = len(found["norm"])
        between = float((found["cosine"].sum() - n) / (n * (n - 1))) if n > 1 else 1.0
        rows.append({"arm": arm, "variance": float(found["variance"].mean()), "cosine": between, "norm": float(found["norm"].mean())})
    return rows


def thought_trace(model: ThoughtModel, rows: list[Prompted], k: int) -> Trace:
    """A trace of the thoughts alone: norms and nearest tokens, so that the thoughts view can show them."""
    name = (lambda ids: " ".join(toy.WORLD.vocabulary[i] for i in ids)) if model.tokenizer is None else model.tokenizer.decode
    samples, thoughts = [], []
    for number, row in enumerate(rows):
        made = make_all(model, [row])[0].detach().float()
        samples.append({"question": number, "sample": 0, "prompt": name([*row.row.prompt, *row.row.after]), "text": ""})
        for place, near in enumerate(nearest_tokens(model, row, k)):
            top = {"top_texts": [text for text, _ in near], "top_probs": [value for _, value in near]}
            thoughts.append({"question": number, "sample": 0, "step": place, "norm": float(made[place].norm()), **top})
    return Trace.build(model.method, samples=samples, thoughts=thoughts)


def answer(model: ThoughtModel, data: Dataset, folder: Path, values: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Answers a benchmark with every number of `thoughts`: rows of a table, and the answers of the last one.

    With `stop_early` a question gets no further answers once they cannot change the vote; accuracy is then that of the answers all
    questions got.
    """
    decoding = Decoding.check(**{name: values[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens", "seed")})
    repeat, table, rows = values["num_return_sequences"] * model.config.num_scaling_times, [], []
    decoding = decoding.but(batch=values["batch_size"] * repeat)
    for n in values["thoughts"]:
        asked = {"benchmark": BENCHMARKS[values["task_name"]], "folder": folder / f"{n}", "decoding": decoding}
        asked |= {"rule": RULES[values["task_name"]], "label": f"{n} thoughts", "processes": values["processes"]}
        result, rows = _answered(Latent(model, thoughts=n), data, asked, repeat, values["stop_early"])
        found = {f"vote_{name}": value for name, value in voted(rows, values["vote"] == "official").items()}
        table.append({"thoughts": n, **result.row(), **found, "majority": majority_baseline(data), "answers": len(rows)})
    return table, rows


def _answered(generator: Latent, data: Dataset, asked: dict[str, Any], repeat: int, stop_early: bool) -> tuple[Evaluation, list[dict]]:
    if not stop_early or repeat < 3:
        result = evaluate(generator, data, repeat=repeat, **asked)
        return result, result.rows
    result = evaluate(generator, data, repeat=repeat // 2 + 1, **asked)
    if left := [name for name, rows in by_question(result.rows).items() if not _decided(rows, repeat)]:
        evaluate(generator, data, repeat=repeat, ids=left, **asked)
    return result, read_samples(asked["folder"])


def _decided(rows: list[dict[str, Any]], repeat: int) -> bool:
    return all(settled([row[name] for row in rows], repeat) for name in ("predicted_answer", "lenient_answer"))


def by_question(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The answers of an evaluation by the id of their question."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def voted(rows: list[dict[str, Any]], official: bool = False) -> dict[str, float]:
    """Accuracy of the vote over the answers to each question, strictly and leniently read."""
    found, groups = {}, by_question(rows).values()
    for name, right in (("predicted_answer", "is_correct"), ("lenient_answer", "lenient_correct")):
        hits = [_vote_is_right(group, name, right, official) for group in groups]
        found[name.replace("predicted", "strict").replace("_answer", "")] = float(np.mean(hits))
    return found


def _vote_is_right(group: list[dict[str, Any]], name: str, right: str, official: bool) -> bool:
    winner = vote([row[name] for row in group], official=official, once=True)
    return any(row[right] for row in group if row[name] == winner)


def majority_baseline(data: Dataset) -> float:
    """Accuracy of always giving the most frequent answer (date understanding ships nearly all answers as A)."""
    return max(Counter(example.answer for example in data).values()) / len(data)


def shuffled_options(data: Dataset, seed: int) -> Dataset:
    """Multiple-choice questions (loaded without options in their text) with the options in a new order, and the letters mended."""
    rng, made = np.random.default_rng(seed), []
    for example in map(_parted, data):
        order = rng.permutation(len(example.options)).tolist()
        options = tuple(example.options[i] for i in order)
        moved = replace(example, options=options, answer=LETTERS[order.index(LETTERS.index(example.answer))])
        made.append(replace(moved, question=with_options(moved)))
    return data.but(made, f"Options shuffled with seed {seed}.")


OPTION = re.compile(r"^\s*\(?([A-J])\s*[).:]\s*(\S.*?)\s*$", re.M)


def _parted(example: Example) -> Example:
    """The example with its options apart from the question, where they stand behind it as lettered lines (the published file)."""
    found = list(OPTION.finditer(example.question)) if not example.options else []
    if found and "".join(match[1] for match in found) == LETTERS[: len(found)]:
        return replace(example, question=example.question[: found[0].start()].rstrip(), options=tuple(match[2] for match in found))
    if len(example.options) < 2 or example.answer not in LETTERS[: len(example.options)]:
        raise DataError(f"{example.id} has no lettered options that could be shuffled, or its answer {example.answer!r} is none of them.")
    return example


def dataset(task: str, split: str, data: str, limit: int, seed: int) -> Dataset:
    """The questions of a task; date understanding with shuffled options and for evaluation only. ASDiv-Aug is left out (its licence)."""
    if task == "asdiv-aug":
        raise DataError("ASDiv-Aug may not be used commercially and is not shipped; give its file as data= with task_name=gsm8k.")
    if task not in BENCHMARKS:
        raise unknown("task", task, BENCHMARKS)
    if task == "du" and split == "train":
        raise DataError("Date understanding has no training split; train on gsm8k and evaluate on du.")
    if task != "du":
        return load_benchmark(BENCHMARKS[task], split, data, limit=limit or None)
    return shuffled_options(load_benchmark(BENCHMARKS[task], split, data, limit=limit or None, show_options=False), seed)


@torch.no_grad()
def similarity(model: ThoughtModel, rows: list[Any]) -> dict[str, np.ndarray]:
    """How thoughts relate: cosine between places (n, n) averaged over questions, variance over questions by place (n,), norms (n,)."""
    made = make_all(model, [prompted(model, row) for row in rows]).float()
    unit = torch.nn.functional.normalize(made, dim=-1)
    return {
        "cosine": (unit @ unit.transpose(1, 2)).mean(0).numpy(),
        "variance": made.var(0).mean(-1).numpy(),
        "norm": made.norm(dim=-1).mean(0).numpy(),
    }


@torch.no_grad()
def nearest_tokens(model: ThoughtModel, row: Any, k: int = 5) -> list[list[tuple[str, float]]]:
    """For each thought of a question, the tokens whose embeddings are most like it, with the cosine."""
    made = make_all(model, [prompted(model, row)])[0].float()
    table = torch.nn.functional.normalize(model.decoder.table.weight.float(), dim=-1)
    top = (torch.nn.functional.normalize(made, dim=-1) @ table.T).topk(k, -1)
    name = (lambda i: toy.WORLD.vocabulary[i]) if model.tokenizer is None else (lambda i: model.tokenizer.decode([i]))
    return [
        [(name(i), v) for i, v in zip(ids, values, strict=True)]
        for ids, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]
