"""Annotating a data set: process labels for the thoughts of sampled questions, file by file (`latenttts.md` 2.6)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lab import files
from lab.errors import SettingsError
from lab.latent.loop import Budget, Prompt
from lab.launch import share
from lab.models.latent_model import LatentModel
from lab.progress import Progress
from lab.sampling.annotate import annotate
from lab.sampling.pool import FACTS, Pool, judge, layout_of, number_of
from lab.sampling.records import Asked, read, write
from lab.sampling.sampler import Sampler, thinker


@dataclass(frozen=True)
class Labelling:
    """How labels are made.

    Attributes:
        rollouts: completions M of every prefix; up to 1, a sample's own verdict is the label of all its steps.
        drop_all_right, drop_all_wrong: leave out questions whose samples agree; the second needs rollouts, as published.
        answer: most tokens of a completion's answer. batch: completions at a time.
    """

    rollouts: int = 64
    drop_all_right: bool = True
    drop_all_wrong: bool = True
    answer: int = 64
    batch: int = 2048

    def __post_init__(self) -> None:
        if self.rollouts < 0 or self.answer < 1 or self.batch < 1:
            raise SettingsError(f"{self}: rollouts from 0, answer and batch from 1.")

    def drops(self, question: Asked) -> bool:
        """Whether a question is left out."""
        every, some = bool(question.corrects.all()), bool(question.corrects.any())
        return (self.drop_all_right and every) or (self.drop_all_wrong and self.rollouts > 0 and not some)


def label(
    model: LatentModel,
    pool: Pool,
    sampler: Sampler,
    how: Labelling,
    folder: Path | str,
    *,
    shard: tuple[int, int] = (0, 1),
    processes: int = 1,
) -> list[Asked]:
    """Labels the pool's questions into `folder`, one file for each of the pool's; files that are there are not made again.

    The completions are drawn by `sampler`, with keys of their own. `shard` and `processes` are those of `pool.sample`; where there is
    nothing to complete, one process does it. Returns what was kept by this and earlier calls.
    """
    folder = Path(folder)
    facts = {name: pool.facts.get(name) for name in ("model", "method", "n", "rule", "questions", "digest")}
    files.claim(folder / FACTS, {**facts, "sampler": sampler.model_dump(), "labelling": vars(how) | {"batch": 0}}, "samples")
    mine = [path for path in pool.folder.glob("*.safetensors") if number_of(path) % shard[1] == shard[0]]
    left = sorted((path for path in mine if not (folder / path.name).exists()), key=number_of)
    work = partial(_label_files, model, sampler, how, pool.facts.get("rule", "codi"), pool.latent, folder)
    with Progress(f"{how.rollouts} rollouts a thought", len(mine)) as progress:
        progress.start_at(len(mine) - len(left))
        share(work, left, processes if how.rollouts > 1 else 1, progress.advance, model)
    return Pool(folder).asked


def _label_files(
    model: LatentModel, sampler: Sampler, how: Labelling, rule: str, latent: int | None, folder: Path, paths: list[Path]
) -> Iterator[Path]:
    for path in paths:
        asked = list(read(path, latent))
        kept = [question for question in asked if not how.drops(question)]
        put_labels(model, kept, sampler, how, rule)
        numbers = {question.number for question in kept}
        gone = [question.number for question in asked if question.number not in numbers]
        yield write(folder / path.name, kept, layout_of(model), gone)


def put_labels(model: LatentModel, asked: Sequence[Asked], sampler: Sampler, how: Labelling, rule: str) -> None:
    """Gives every question its labels (N, T); samples of one length are completed together, `how.batch` completions at a time."""
    for question in asked:
        live = torch.arange(question.thoughts.shape[1]) < question.counts[:, None]
        question.labels = question.corrects[:, None].float() * live
    for rows, count in _groups(asked, how) if how.rollouts > 1 else ():
        found = _completed(model, rows, count, sampler, how, rule)
        for (question, at), labels in zip(rows, found, strict=True):
            question.labels[at, :count] = labels


Part = tuple[Asked, Tensor]  # a question and the numbers of some of its samples


def _groups(asked: Sequence[Asked], how: Labelling) -> Iterator[tuple[list[Part], int]]:
    """Questions whose samples made the same number of thoughts, as many together as a batch takes; ragged ones in parts of one length."""
    most = max(1, how.batch // how.rollouts)
    whole = [q for q in asked if bool((q.counts == q.counts[0]).all()) and int(q.counts[0])]
    for kind in sorted({(len(q.counts), int(q.counts[0])) for q in whole}):
        alike = [(q, torch.arange(kind[0])) for q in whole if (len(q.counts), int(q.counts[0])) == kind]
        size = max(1, most // kind[0])
        yield from ((alike[start : start + size], kind[1]) for start in range(0, len(alike), size))
    ragged = [q for q in asked if bool((q.counts != q.counts[0]).any())]
    for question, count in ((q, count) for q in ragged for count in sorted(set(q.counts.tolist()) - {0})):
        yield [(question, (question.counts == count).nonzero()[:, 0])], count


def _completed(model: LatentModel, rows: list[Part], count: int, sampler: Sampler, how: Labelling, rule: str) -> Tensor:
    fixed = None if model.method == "colar" else count
    policy = thinker(model, fixed, sampler)
    thoughts = torch.cat([question.thoughts[at, :count] for question, at in rows])

    def right(number: int, ids: list[int]) -> bool:
        return judge(model.tokenizer.decode(ids, skip_special_tokens=True), rows[number][0].facts.get("gold", ""), rule)[1]

    return annotate(
        policy.decoder,
        policy,
        Prompt.of_ids(policy.decoder, [question.prompt for question, _ in rows]),
        thoughts.to(model.device, model.backbone.dtype),
        right,
        rollouts=how.rollouts,
        seed=sampler.seed,
        budget=Budget(thoughts=64 if fixed is None else count, answer=how.answer),
        dropout=sampler.completing.masks(model, fixed),
        questions=torch.tensor([question.number for question, _ in rows]),
        numbers=rows[0][1],
    )


def mixed(asked: Sequence[Asked]) -> list[Asked]:
    """The questions of which some samples are right and some wrong."""
    return [question for question in asked if question.mixed]
