"""Samples of questions in files: thoughts, answers, verdicts and labels, in the layout of the LatentTTS annotation (`latenttts.md` 2.6).

One safetensors file holds some questions; `i.input_ids`, `i.latent_embeds`, `i.corrects`, `i.estimations` belong to question i, and a
dropped question leaves a scalar. What the official files lack (texts, ragged counts) stands in the file's metadata and in `i.counts`.
Axes: N samples, T thoughts, D width, L columns of ids.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.errors import DataError
from lab.files import write_bytes


@dataclass
class Asked:
    """One question with its N samples.

    Attributes:
        number: its place in the data set. prompt: ids read before the first thought.
        thoughts: (N, T, D) as fed; counts: (N,) thoughts of each; corrects: (N,) bool.
        labels: (N, T) share of right completions from each thought, or None.
        answers: found in each sample, None = nothing found. texts, ids: what was said.
        facts: id, question, gold, and what else is worth keeping; `columns` of the rows of ids in a file.
    """

    number: int
    prompt: list[int]
    thoughts: Tensor
    counts: Tensor
    corrects: Tensor
    labels: Tensor | None = None
    answers: list[str | None] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def mixed(self) -> bool:
        """Whether some samples are right and some wrong, so that choosing matters."""
        return bool(self.corrects.any()) and not bool(self.corrects.all())

    def first(self, n: int) -> "Asked":
        """With its first `n` samples only."""
        parts = {name: getattr(self, name)[:n] for name in ("thoughts", "counts", "corrects", "answers", "texts", "ids")}
        labels = None if self.labels is None else self.labels[:n]
        return Asked(self.number, self.prompt, labels=labels, facts=self.facts, **parts)


@dataclass(frozen=True)
class Layout:
    """How rows are written as ids: `latent` stands for a thought, `closing` follows the thoughts, `pad` fills up."""

    latent: int
    closing: tuple[int, ...] = ()
    pad: int = 0


def write(path: Path, asked: Sequence[Asked], layout: Layout, dropped: Iterable[int] = (), half: bool = False) -> Path:
    """`path`, holding these questions, and a mark for each of the `dropped` numbers; whole or not at all."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {f"{number}.input_ids": torch.zeros((), dtype=torch.long) for number in dropped}
    for question in asked:
        tensors |= {f"{question.number}.{name}": value for name, value in _tensors(question, layout, half).items()}
    about = {str(q.number): {"prompt": q.prompt, "answers": q.answers, "texts": q.texts, "ids": q.ids, **q.facts} for q in asked}
    return write_bytes(path, save(tensors, metadata={"questions": json.dumps(about)}))  # safetensors writes two entries in any order


def _tensors(question: Asked, layout: Layout, half: bool) -> dict[str, Tensor]:
    steps = question.thoughts.shape[1]
    live = torch.arange(steps) < question.counts[:, None]
    estimated = question.corrects[:, None].float() * live if question.labels is None else question.labels
    found = {"input_ids": _rows(question, layout), "estimations": estimated.float().contiguous(), "corrects": question.corrects}
    found["latent_embeds"] = question.thoughts.to(torch.float16 if half else question.thoughts.dtype).contiguous()
    return found if bool(live.all()) else found | {"counts": question.counts}


def _rows(question: Asked, layout: Layout) -> Tensor:
    """The rows as ids (N, L), cut behind the first row's end as the official files are (what was said is kept as `ids`)."""
    told = zip(question.counts.tolist(), question.ids or [[] for _ in question.counts], strict=True)
    rows = [[*question.prompt, *[layout.latent] * count, *layout.closing, *ids] for count, ids in told]
    ended = [len(row) for row, how in zip(rows, question.facts.get("finish") or ["stop"] * len(rows), strict=True) if how == "stop"]
    ragged = bool((question.counts != question.counts[0]).any())
    width = min(ended) + 1 if ended and not ragged else max(map(len, rows))
    return torch.tensor([(row + [layout.pad] * width)[:width] for row in rows])


def read(path: Path, latent: int | None = None) -> Iterator[Asked]:
    """The questions in a file, ours or an official one.

    Args:
        latent: the id that stands for a thought; needed for files of the official code, which do not say where prompts end.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = set(file.keys())
        about = json.loads((file.metadata() or {}).get("questions", "{}"))
        for number in sorted({int(name.split(".")[0]) for name in names}):
            if f"{number}.latent_embeds" in names:
                parts = {name: file.get_tensor(f"{number}.{name}") for name in PARTS if f"{number}.{name}" in names}
                yield _question(number, parts, dict(about.get(str(number), {})), latent, path)


PARTS = ("input_ids", "latent_embeds", "estimations", "corrects", "counts", "answers")


def _question(number: int, parts: dict[str, Tensor], about: dict[str, Any], latent: int | None, path: Path) -> Asked:
    thoughts = parts["latent_embeds"].float()
    counts = parts.get("counts", torch.full((len(thoughts),), thoughts.shape[1]))
    prompt = about.pop("prompt", None)
    if prompt is None:
        prompt = _prompt(parts["input_ids"][0].tolist(), latent, path)
    answers = about.pop("answers", None)
    if answers is None:
        answers = [str(value) for value in parts["answers"].tolist()] if "answers" in parts else [None] * len(thoughts)
    said = {"texts": about.pop("texts", []), "ids": about.pop("ids", [])}
    labels = parts.get("estimations")
    about["columns"] = parts["input_ids"].shape[1]
    return Asked(number, prompt, thoughts, counts, parts["corrects"].bool(), labels, answers, facts=about, **said)


def _prompt(row: list[int], latent: int | None, path: Path) -> list[int]:
    if latent is None or latent not in row:
        raise DataError(f"{path.name} does not say where its prompts end; pass latent=, the id that stands for a thought.")
    return row[: row.index(latent)]


def read_folder(folder: Path | str, latent: int | None = None) -> list[Asked]:
    """All questions in a folder of such files, in the order of their numbers; DataError if there is none or one twice."""
    found: dict[int, Asked] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        for question in read(path, latent):
            if question.number in found:
                raise DataError(f"Question {question.number} stands twice in {folder}.")
            found[question.number] = question
    if not found:
        raise DataError(f"{folder} holds no sampled questions.")
    return [found[number] for number in sorted(found)]


def dropped_in(folder: Path | str) -> list[int]:
    """Numbers of the questions that were left out because all or none of their samples were right."""
    from safetensors import safe_open

    gone = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            kinds = {(int(number), name) for number, name in (key.split(".", 1) for key in names)}
            gone += [number for number, name in kinds if name == "input_ids" and (number, "latent_embeds") not in kinds]
    return sorted(gone)
