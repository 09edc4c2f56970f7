"""N samples of every question of a data set, recorded once: draws are keyed, so every smaller N is the first N of them.

A kill loses at most one file of questions; several calls share a folder by `shard`, several processes a call.
Nothing here depends on the batch.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab import files
from lab.data.examples import Example
from lab.errors import DataError, SettingsError
from lab.launch import share
from lab.models.latent_model import LatentModel
from lab.progress import Progress
from lab.sampling.records import Asked, Layout, read_folder, write
from lab.sampling.sampler import RULES, Sampler, fingerprint, fixed_count, placeholder, thinker

log = logging.getLogger(__name__)

FACTS = "sampling.json"


def sample(
    model: LatentModel,
    examples: Sequence[Example],
    sampler: Sampler,
    n: int,
    folder: Path | str,
    *,
    rule: str = "",
    thoughts: int = 0,
    batch: int = 256,
    chunk: int = 32,
    shard: tuple[int, int] = (0, 1),
    processes: int = 1,
    half: bool = False,
    **budget: Any,
) -> "Pool":
    """Samples every question `n` times into `folder`; what is there already is not done again.

    Args:
        rule: how answers are found and judged (see `lab.data.answers.RULES`); "" = the method's own.
        thoughts: of each sample, 0 = what the model was trained with. budget: `max_new_tokens` and other options of `generate`.
        batch: samples at a time. chunk: questions a file. shard: (i, of): this call does every of-th file, from the i-th.
        processes: share these files, each with a copy of the model and a device of its own. half: keep thoughts in half precision.
    Raises: SettingsError for impossible choices, RunError where `folder` holds other samples; both before any work.
    """
    folder, rule = Path(folder), rule or RULES.get(model.method, "codi")
    _check(n, examples, shard)
    if n > 1 and sampler.by == "own" and not sampler.temperature and model.method not in ("colar", "dtt"):
        raise SettingsError(f"A {model.method} model's own randomness is in its words: give a temperature above 0, or noise or dropout.")
    options = {**sampler.options(model, thoughts), "batch": max(batch, n), "vectors": True, **budget}
    files.claim(folder / FACTS, _facts(model, examples, sampler, n, rule, thoughts, chunk, budget), "samples")
    numbers = range(shard[0], math.ceil(len(examples) / chunk), shard[1])
    left = [folder / f"{number}_on{shard[0]}.safetensors" for number in numbers if not list(folder.glob(f"{number}_on*.safetensors"))]
    with Progress(f"{n} samples, {sampler.label}", len(numbers)) as progress:
        progress.start_at(len(numbers) - len(left))
        share(partial(_fill, model, examples, n, options, chunk, rule, half), left, processes, progress.advance, model)
    pool = Pool(folder)
    pool.tell_capped()
    return pool


def _fill(
    model: LatentModel, examples: Sequence[Example], n: int, options: dict[str, Any], chunk: int, rule: str, half: bool, paths: list[Path]
) -> Iterator[Path]:
    layout = layout_of(model)
    for path in paths:
        first = number_of(path) * chunk
        found = model.generate(examples[first : first + chunk], n, first=first, **options)
        yield write(path, questions_of(found, examples, rule, n), layout, half=half)


def number_of(path: Path) -> int:
    """The place of a file among those of a data set."""
    return int(path.name.split("_")[0])


def _check(n: int, examples: Sequence[Example], shard: tuple[int, int]) -> None:
    if n < 1 or not len(examples):
        raise SettingsError(f"{n} samples of {len(examples)} questions: both must be at least 1.")
    if not 0 <= shard[0] < shard[1]:
        raise SettingsError(f"shard {shard}: give (i, of) with 0 <= i < of.")


def _facts(model: LatentModel, examples, sampler: Sampler, n: int, rule: str, thoughts: int, chunk: int, budget: dict) -> dict[str, Any]:
    asked = files.digest([[example.question, example.answer] for example in examples])
    facts = {"model": fingerprint(model), "method": model.method, "sampler": sampler.model_dump(), "n": n, "rule": rule}
    return facts | {"thoughts": thoughts, "chunk": chunk, "questions": len(examples), "digest": asked, "budget": budget}


def layout_of(model: LatentModel) -> Layout:
    """How a model's rows are written as ids."""
    try:
        closing = tuple(thinker(model, fixed_count(model) or 1).closing)
    except SettingsError:
        closing = ()
    return Layout(placeholder(model), closing, max(0, getattr(model.config, "eos_id", 0)))


def questions_of(found: Any, examples: Sequence[Example], rule: str, n: int) -> list[Asked]:
    """The rows of a generation as questions with judged samples."""
    made = []
    for start in range(0, len(found.rows), n):
        rows, vectors = found.rows[start : start + n], found.vectors[start : start + n]
        example = examples[rows[0].question]
        judged = [judge(row.text, example.answer, rule) for row in rows]
        counts = torch.tensor([row.thoughts for row in rows])
        thoughts = torch.nn.utils.rnn.pad_sequence([vector.cpu() for vector in vectors], batch_first=True)
        facts = {"id": example.id, "question": example.question, "gold": example.answer, "steps": list(example.steps)}
        facts |= {"finish": [row.finish for row in rows], "capped": [row.capped for row in rows]}
        asked = Asked(rows[0].question, rows[0].prompt, thoughts, counts, torch.tensor([right for _, right in judged]), facts=facts)
        asked.answers, asked.texts, asked.ids = [a for a, _ in judged], [row.text for row in rows], [row.ids for row in rows]
        made.append(asked)
    return made


def judge(text: str, gold: str, rule: str) -> tuple[str | None, bool]:
    """(answer, right) by a rule; an answer that is no number at all counts as none."""
    from lab.data.answers import strict

    answer, right = strict(text, gold, rule)
    return (None if answer in ("inf", "nan") else answer), right


class Pool:
    """The samples in a folder."""

    def __init__(self, folder: Path | str, latent: int | None = None):
        self.folder, self.latent = Path(folder), latent
        self.facts: dict[str, Any] = files.read_json(self.folder / FACTS) if (self.folder / FACTS).exists() else {}
        self._asked: list[Asked] | None = None

    @property
    def asked(self) -> list[Asked]:
        """The questions, in order."""
        if self._asked is None:
            self._asked = read_folder(self.folder, self.latent)
        return self._asked

    @property
    def n(self) -> int:
        """Samples a question."""
        return int(self.facts.get("n") or len(self.asked[0].corrects))

    @property
    def complete(self) -> bool:
        """Whether every question has been sampled."""
        return len(self.asked) == self.facts.get("questions", len(self.asked))

    def tell_capped(self) -> None:
        """Warns where samples were closed by the budget of thoughts; they are kept, and marked `capped`."""
        closed = sum(sum(question.facts.get("capped", ())) for question in self.asked)
        if closed:
            log.warning(
                "%d of %d samples in %s were still thinking when their budget of thoughts was spent; their answers follow all the same. "
                "Give thoughts=… a larger number to let them end by themselves.",
                closed, sum(len(question.corrects) for question in self.asked), self.folder,
            )  # fmt: skip

    def first(self, n: int) -> list[Asked]:
        """Every question with its first `n` samples; SettingsError where fewer were recorded."""
        if not 1 <= n <= self.n:
            raise SettingsError(f"N = {n}, but {self.folder} holds {self.n} samples a question; sample again with n={n}, or ask for fewer.")
        return [question.first(n) for question in self.asked]

    def trace(self, numbers: Sequence[int] | None = None, score: Callable[[Asked], torch.Tensor] | None = None, n: int = 0) -> Any:
        """The record that views read, of some questions (all by default) and their first `n` samples.

        Args:
            score: from a question to (N, T) step scores; their sum becomes the sample's score.
        """
        from lab.trace import Trace

        parts: dict[str, list[dict[str, Any]]] = {"samples": [], "thoughts": []}
        for question in self.first(n or self.n):
            if numbers is None or question.number in numbers:
                scores = None if score is None else score(question)
                parts["samples"] += _samples(question, scores)
                parts["thoughts"] += _thoughts(question, scores)
        return Trace.build(self.facts.get("method", "latenttts"), **parts, meta={"sampler": self.facts.get("sampler", {})})


def _samples(question: Asked, scores: torch.Tensor | None) -> list[dict[str, Any]]:
    about = question.facts
    shared = {"question": question.number, "prompt": about.get("question", ""), "gold": about.get("gold", "")}
    shared["steps"] = about.get("steps", [])
    sums = [float("nan")] * len(question.corrects) if scores is None else scores.nansum(-1).tolist()
    texts = question.texts or [""] * len(sums)
    told = zip(question.answers, texts, question.corrects.tolist(), sums, strict=True)
    rows = [{"answer": a or "", "text": t, "correct": c, "score": s} for a, t, c, s in told]
    finish = about.get("finish", [""] * len(rows))
    return [shared | row | {"sample": i, "finish": finish[i]} for i, row in enumerate(rows)]


def _thoughts(question: Asked, scores: torch.Tensor | None) -> list[dict[str, Any]]:
    rows = []
    for i, count in enumerate(question.counts.tolist()):
        norms = question.thoughts[i, :count].norm(dim=-1).tolist()
        for step, norm in enumerate(norms):
            value = float("nan") if scores is None else float(scores[i, step])
            rows.append({"question": question.number, "sample": i, "step": step, "norm": norm, "score": value})
    return rows


class Evaluated(Pool):
    """The answers of an evaluation of any method (`lab.evaluate` with repeat=N), for votes and coverage; it holds no thoughts.

    Raises DataError where the questions have different numbers of samples.
    """

    def __init__(self, folder: Path | str):
        from lab.evaluate import read_samples

        super().__init__(folder)
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in read_samples(folder):
            groups.setdefault(row["id"], []).append(row)
        sizes = {len(rows) for rows in groups.values()}
        if len(sizes) != 1:
            raise DataError(f"{folder} has {sorted(sizes) or 'no'} samples a question; run the evaluation to its end.")
        self._asked = [_evaluated(number, rows) for number, rows in enumerate(groups.values())]
        self.facts = {"n": sizes.pop(), "questions": len(groups)}


def _evaluated(number: int, rows: list[dict[str, Any]]) -> Asked:
    count, right = len(rows), torch.tensor([row["is_correct"] for row in rows])
    facts = {"id": rows[0]["id"], "question": rows[0]["problem"], "gold": rows[0]["correct_answer"]}
    asked = Asked(number, [], torch.zeros(count, 0, 1), torch.zeros(count, dtype=torch.long), right, facts=facts)
    asked.answers, asked.texts = [row["predicted_answer"] for row in rows], [row["output"] for row in rows]
    return asked
