"""What the notebooks call to look: evaluation in both ways of counting thoughts, curves, answers by number of thoughts, pushing."""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lab.data.examples import Example
from lab.errors import SettingsError
from lab.latent.loop import Budget
from lab.latent.policy import Policy
from lab.latent.record import Ask, Responses, respond
from lab.latent.sampling import Sampling
from lab.methods.adaptive.checkpoint import CREATION
from lab.methods.adaptive.config import COLON, MARKER
from lab.methods.adaptive.data import Writer, first_number
from lab.methods.adaptive.model import AdaptiveModel, read_ids, scores
from lab.methods.adaptive.policy import generate, given_count
from lab.methods.adaptive.reinforce import TOLERANCE, answer_of
from lab.stats import proportion_interval
from lab.train import TrainResult

_ANSWER = re.compile(re.escape(MARKER + COLON), re.IGNORECASE)

# ---- evaluation ----


def evaluate(
    model: AdaptiveModel, data: Sequence[Example], thoughts: int | None = None, *, sampling: Sampling | None = None, **options: Any
) -> tuple[dict[str, float], Responses]:
    """Accuracy by the paper's rule and both ways of counting thoughts, with the answers (2B.6).

    `thoughts` is the mean number of latent steps, `length` the paper's count (START, STOP and tokens before the answer's last start),
    over answers of the right form; `capped` the share that had to be stopped.
    """
    found, forced = generate(model, data, thoughts=thoughts, sampling=sampling, **options), _forced(model, thoughts)
    every = [
        _scored(row, example, model, forced)
        for row, example in zip(found.rows, [e for e in data for _ in range(options.get("samples", 1))], strict=True)
    ]
    formed = [row for row in every if row["formed"]]
    lengths = [row["length"] for row in formed]
    return {
        **proportion_interval(sum(row["correct"] for row in every), len(every)).named("score"),
        "thoughts": statistics.fmean(row["thoughts"] for row in formed) if formed else float("nan"),
        "length": statistics.fmean(lengths) if lengths else float("nan"),
        "length_std": statistics.pstdev(lengths) if lengths else float("nan"),
        "length_min": min(lengths, default=float("nan")),
        "length_max": max(lengths, default=float("nan")),
        "bad_format": 1 - len(formed) / len(every),
        "cut_off": statistics.fmean(row["cut"] for row in every),
        "capped": statistics.fmean(row["capped"] for row in every),
        "questions": len(data),
    }, found


def _forced(model: AdaptiveModel, thoughts: int | None) -> bool:
    """Whether the answer's start is given, so that all that is written is the answer (the official count override)."""
    return model.config.latent and given_count(model.config, thoughts) is not None


def _scored(row: Any, example: Example, model: AdaptiveModel, forced: bool) -> dict[str, float]:
    value, gold = first_number(row.text) if forced else answer_of(row.text), first_number(example.answer)
    reasoning = [] if forced else _ANSWER.split(row.text)[:-1]
    written = _tokens("".join(part.strip() for part in reasoning), model)
    return {
        "correct": value is not None and gold is not None and abs(value - gold) < TOLERANCE,
        "formed": forced or bool(reasoning),
        "thoughts": row.thoughts,
        "length": written + (row.thoughts + 2 if model.config.latent else 0),
        "cut": row.finish == "length",
        "capped": row.capped,
    }


def _tokens(text: str, model: AdaptiveModel) -> int:
    """Tokens of a text; where a token is a whole word (a toy's tokenizer), of unknown ones too."""
    inner = getattr(model.tokenizer, "backend_tokenizer", None)
    if type(getattr(inner, "model", None)).__name__ == "WordLevel":
        return len(inner.pre_tokenizer.pre_tokenize_str(text))
    return len(Writer(model.tokenizer, model.config).piece(text))


def validator(data: Sequence[Example], thoughts: int | None = None, **options: Any) -> Callable[[AdaptiveModel], dict[str, float]]:
    """A function that `fit` calls to validate: the score and how long the model thinks."""
    kept = ("score", "thoughts", "length", "bad_format", "cut_off")

    def run(model: AdaptiveModel) -> dict[str, float]:
        table, _ = evaluate(model, data, thoughts, **options)
        return {name: table[name] for name in kept if table[name] == table[name]}

    return run


def by_count(model: AdaptiveModel, data: Sequence[Example], counts: Sequence[int], **options: Any) -> list[dict[str, float]]:
    """Accuracy with each given number of thoughts; `beyond` marks more than training showed."""
    most = model.config.most_trained
    return [
        {"thoughts": count, "score": evaluate(model, data, count, **options)[0]["score"], "beyond": bool(most and count > most)}
        for count in counts
    ]


def benchmark(
    model: AdaptiveModel, name: str, data: str, folder: Path, thoughts: int | None = None, processes: int = 1, **decoding: int
) -> Any:
    """A benchmark's test split, answered greedily and scored strictly (the paper's rule) and leniently; resumable by answer."""
    from lab.backends import Latent
    from lab.data import load_benchmark
    from lab.evaluate import Decoding
    from lab.evaluate import evaluate as answer

    options = {} if thoughts is None or not model.config.latent else {"thoughts": thoughts}
    rule = "adaptive-override" if _forced(model, thoughts) else "adaptive"
    how, asked = Decoding(**decoding), load_benchmark(name, "test", data)
    return answer(Latent(model, **options), asked, name, folder, how, rule=rule, label=name, processes=processes)


# ---- tables ----


def final(trained: TrainResult, checked: Mapping[str, float]) -> dict[str, float]:
    """The headline of one training."""
    return {**checked, "loss": trained.loss, "rollbacks": float(trained.rollbacks), "seconds": trained.seconds}


def shorter(results: Mapping[str, Mapping[str, float]]) -> float:
    """Thoughts after training as a share of those before (greedy)."""
    return results["after"]["thoughts"] / results["before"]["thoughts"] if "after" in results else float("nan")


def count_table(answers: Responses, problems: Sequence[Example]) -> list[dict[str, float]]:
    """gold_steps, thoughts, samples, share within each number of gold steps."""
    first = min(row.question for row in answers.rows)
    pairs = [(len(problems[row.question - first].steps), row.thoughts) for row in answers.rows]
    lengths = [steps for steps, _ in pairs]
    return [
        {"gold_steps": s, "thoughts": n, "samples": pairs.count((s, n)), "share": pairs.count((s, n)) / lengths.count(s)}
        for s, n in sorted(set(pairs))
    ]


def chances(problems: Sequence[Example], odds: torch.Tensor | None) -> list[dict[str, Any]]:
    """Rows of the probability of each number of thoughts, and its expectation."""
    if odds is None:
        return []
    rows = []
    for example, line in zip(problems, odds.tolist(), strict=True):
        mean = sum(count * p for count, p in enumerate(line))
        rows.append(
            {"question": example.question, "steps": len(example.steps), "expected": mean, **{str(n): p for n, p in enumerate(line)}}
        )
    return rows


def beside_teacher(model: AdaptiveModel, problems: Sequence[Example], answers: Responses, **options: Any) -> list[dict[str, Any]]:
    """The same model as teacher (it writes its reasoning, as in the other half of its training) and as student, with what each cost."""
    s, writer = model.config, Writer(model.tokenizer, model.config)
    banned = tuple(i for i in (*s.unused, s.start) if i >= 0)
    ask = Ask(budget=Budget(answer=options.pop("max_new_tokens", 64)), **options)
    prompts = [writer.prompt(example.question, think=False) for example in problems]
    written = respond(model, prompts, lambda group: Policy(model.thinker, (model.tokenizer.eos_token_id,), banned=banned), ask)
    first = min(row.question for row in answers.rows)
    students = {row.question - first: row for row in answers.rows if row.sample == 0}
    return [
        {"question": example.question, "gold": example.answer, "teacher": teacher.text, "teacher_tokens": len(teacher.ids)}
        | {"student": students[i].text, "thoughts": students[i].thoughts, "student_tokens": len(students[i].ids)}
        for i, (example, teacher) in enumerate(zip(problems, written.rows, strict=True))
    ]


# ---- checkpoints of a run ----


def save(model: AdaptiveModel, folder: Path, name: str) -> Path:
    """Our own format under `folder/name`."""
    return model.save(Path(folder) / name, overwrite=True)


def folder_of(step_folder: Path) -> Path:
    """The one checkpoint that a training step made for the steps after it: `model`, or what dir_name called it."""
    found = sorted(path.parent for path in Path(step_folder).glob("*/lab.json"))
    if not found:
        raise SettingsError(f"{step_folder} holds no checkpoint.")
    return next((path for path in found if path.name == "model"), found[0])


def models_of(step: Any, device: str = "cpu") -> dict[str, AdaptiveModel]:
    """The models of a run: every arm of train, then of rl where it took part; a step's own one last, under the step's name."""
    import lab

    found = {}
    for name in ("train", "rl"):
        paths = sorted(path.parent for path in step.input(name).glob("*/lab.json")) if step.has(name) else []
        for path in sorted(paths, key=lambda path: path.name == "model"):
            own = len(paths) == 1 or path.name == "model"
            found[name if own else f"{name}, {path.name}"] = lab.load(path, device=device)
    if not found:
        step.input("train")  # says how to make it
    return found


def newest(step: Any) -> Path:
    """The checkpoint of the last training step of a run."""
    return folder_of(step.input("rl" if step.has("rl") else "train"))


def is_adapter(checkpoint: str) -> bool:
    """Whether a checkpoint is a training checkpoint with an adapter."""
    return bool(checkpoint) and (Path(checkpoint) / CREATION).is_file()


def merge_gap(model: AdaptiveModel, seed: int = 0) -> float:
    """Merges `model` in place; the largest change of any logit on random questions (2B.8). SettingsError above 1e-3."""
    s, generator = model.config, torch.Generator().manual_seed(seed)
    words = torch.tensor([i for i in range(len(model.tokenizer)) if i not in (s.start, s.end, s.go_on, s.stop)])
    ids = words[torch.randint(len(words), (4, 16), generator=generator)]
    if s.latent:
        ids[:, 8:12] = torch.tensor([s.start, s.go_on, s.go_on, s.stop])
    with torch.no_grad():
        before = scores(model.thinker, ids, read_ids(model.thinker, ids).last)
        model.merge()
        after = scores(model.thinker, ids, read_ids(model.thinker, ids).last)
    finite = before.isfinite()
    gap = float((before - after)[finite].abs().max())
    if gap > 1e-3 and before.dtype == torch.float32:
        raise SettingsError(f"Merging changed a logit by {gap:.2g}; the model was not written.")
    return gap


def push(folder: Path, repo: str, private: bool, dry_run: bool) -> str:
    """Uploads a merged model to the hub; in a dry run (the default) only says what would be sent. Returns what happened."""
    files = ", ".join(path.name for path in sorted(Path(folder).iterdir()))
    if not repo:
        return f"Nothing to push to (repo is empty). {folder} holds {files}."
    if dry_run:
        return f"Dry run: would create {repo} ({'private' if private else 'public'}) and upload {files}. Set dry_run = False to do it."
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=str(folder))
    return f"Pushed {files} to {repo}."
