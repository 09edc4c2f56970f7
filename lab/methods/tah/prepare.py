"""What training needs before it starts: a backbone, a model that labels, rows of tokens; made from a world, a benchmark or files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from lab.config import Settings
from lab.data.benchmarks import load_benchmark
from lab.data.examples import Example, read_records
from lab.errors import DataError, SettingsError
from lab.files import read_json, write_json
from lab.methods.tah import toy
from lab.methods.tah.data import ExampleSettings, Row, build_examples, choose_generation, split
from lab.methods.tah.labels import Labelling, encode_records, read_labelled, same_vocabulary
from lab.models.backbones import load_backbone
from lab.models.latent_model import LatentModel
from lab.models.layouts import load
from lab.models.tokenizers import load_tokenizer

SOURCE, BACKBONE = "source.json", "backbone"
SPLITS = ("train", "validation", "test")


class Preparation(Settings):
    """Which data and which models; a count of 0 means all there is.

    `benchmark`: a toy task, the name of a benchmark, or `records` for files in the layouts of `data.render`. `data`: "" for the
    hub, else a file or folder; `eval_data` a second file for `records`. `backbone`: hub id, folder, or a toy preset that is
    trained here for `base_steps`; `reference`: what labels, "" = the backbone itself; a toy preset is trained for `reference_steps`.
    """

    benchmark: str = "pointers"
    data: str = ""
    eval_data: str = ""
    backbone: str = "toy:qwen3"
    reference: str = ""
    train: int = Field(32000, ge=0)
    validation: int = Field(1000, ge=0)
    test: int = Field(1000, ge=0)
    base_steps: int = Field(600, ge=1)
    reference_steps: int = Field(900, ge=1)
    vocabulary: int = Field(1024, ge=260)
    window: int = Field(128, ge=8)
    seed: int = 0

    @property
    def is_toy_task(self) -> bool:
        """Whether the data is a world of ours."""
        return self.benchmark in toy.TASKS


@dataclass
class Source:
    """Rows by split, the model that labels them, and the model to train with its tokenizer (None where it has a name)."""

    rows: dict[str, list[Row]]
    reference: Any
    tokenizer: Any
    model: LatentModel | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write what later steps need beside the labels: the facts, and a toy's weights and tokenizer."""
        if self.model is not None:
            self.model.save(folder / BACKBONE, overwrite=True)
        write_json(folder / SOURCE, self.facts)


def prepare(folder: Path, how: Preparation, labelling: Labelling) -> Source:
    """Rows and models as `how` says; toys are trained under `folder`, those of an interrupted attempt are taken up.

    Raises DataError or SettingsError before anything is trained where data or names cannot be used.
    """
    return _toy_task(folder, how) if how.is_toy_task else _text(folder, how, labelling)


def _toy_task(folder: Path, how: Preparation) -> Source:
    counts = {"train": how.train, "validation": how.validation, "test": how.test}
    made = folder / BACKBONE
    model = load(made) if made.is_dir() else toy.world_base(how.benchmark, how.seed, how.base_steps, folder / "training-base")
    rows = {name: toy.split_rows(how.benchmark, name, count, how.seed) for name, count in counts.items()}
    facts = {"benchmark": how.benchmark, "backbone": BACKBONE, "align": "target", "prefilter": False}
    return Source(rows, model.backbone, model.tokenizer, model, facts)


def _text(folder: Path, how: Preparation, labelling: Labelling) -> Source:
    records = _records(how)
    made, reference, toys = None, None, how.backbone.startswith("toy:")
    if toys:
        if how.reference and not how.reference.startswith("toy:"):
            raise SettingsError(
                "Only a toy reference can share the tokenizer of a toy backbone; set reference to a toy preset or leave it empty."
            )
        texts = [f"{row['question']}\n{row['answer']}" for row in records["train"] if "question" in row and "answer" in row]
        tokenizer, small, large = toy.text_models(
            texts, how.backbone, how.reference, how.vocabulary, (how.base_steps, how.reference_steps), how.window, how.seed, folder
        )
        made, reference = LatentModel(small, tokenizer), large or small
    else:
        tokenizer = load_tokenizer(how.backbone, chat=True)
        name = how.reference or how.backbone
        if how.reference:
            same_vocabulary(tokenizer, load_tokenizer(how.reference))
        reference = load_backbone(name, dtype="auto")
    rows = {name: encode_records(tokenizer, part, labelling) for name, part in records.items()}
    facts = {"benchmark": how.benchmark, "backbone": BACKBONE if toys else how.backbone, "align": "token", "prefilter": True}
    return Source(rows, reference, tokenizer, made, facts)


def _records(how: Preparation) -> dict[str, list[Row]]:
    """Raw training records by split; evaluation records are halved into validation and test."""
    if how.benchmark == "records":
        if not how.data:
            raise SettingsError("benchmark = 'records' reads a file: set data to a .jsonl of {question, answer} or {conversations}.")
        train = [record for _, record in read_records(how.data)]
        rest = [record for _, record in read_records(how.eval_data)] if how.eval_data else None
        train, rest = (train, rest) if rest is not None else split(train)
    elif how.benchmark == "openr1_math":
        train, rest = split(list(_open_r1(how)))
    else:
        train, rest = ([_record(e) for e in load_benchmark(how.benchmark, part, how.data)] for part in ("train", "test"))
    half = (len(rest) + 1) // 2
    parts = {"train": train, "validation": rest[:half], "test": rest[half:]}
    counts = {"train": how.train, "validation": how.validation, "test": how.test}
    found = {name: part[: counts[name] or None] for name, part in parts.items()}
    if empty := [name for name, part in found.items() if not part]:
        raise DataError(f"There is nothing for {empty[0]}: {len(train)} training and {len(rest)} evaluation records were found.")
    return found


def _record(example: Example) -> Row:
    """A benchmark's example as a training record: its steps, then the answer in a box."""
    steps = "\n".join(example.steps)
    return {"question": example.question, "answer": f"{steps}\nThe answer is \\boxed{{{example.answer}}}.".lstrip()}


def _open_r1(how: Preparation) -> Iterator[Row]:
    """OpenR1-Math filtered as published: the shortest verified generation below 8,192 tokens of Qwen3-0.6B's tokenizer."""
    tokenizer = load_tokenizer("Qwen/Qwen3-0.6B" if how.backbone.startswith("toy:") else how.backbone)
    for example in load_benchmark("openr1_math", "train", how.data):
        record = {"problem": example.question, **example.extra}
        kept = choose_generation(record, lambda text: len(tokenizer(text, add_special_tokens=False).input_ids))
        if kept is not None:
            yield kept


class Labelled:
    """A finished label step: its rows, examples and the model to train."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.facts = read_json(self.folder / SOURCE)

    @property
    def backbone(self) -> str:
        """Name or folder of the model to train."""
        own = self.facts["backbone"]
        return str(self.folder / own) if own == BACKBONE else own

    def model(self) -> LatentModel:
        """A fresh copy of the model to train, in float32, with its tokenizer."""
        return load(self.backbone, dtype="float32")

    def tokenizer(self):
        """The tokenizer of the rows."""
        return load_tokenizer(self.backbone)

    def rows(self, name: str) -> list[Row]:
        """The labelled rows of a split."""
        return read_labelled(self.folder / name)

    def examples(self, name: str, max_iter: int = 2, **settings: Any) -> list[Row]:
        """Training examples of a split; rows without a hard token are dropped in training text only (a filtered evaluation flatters)."""
        how = {"align": self.facts["align"], "prefilter": self.facts["prefilter"] and name == "train", **settings}
        return build_examples(self.rows(name), ExampleSettings.check(**how), max_iter)

    def hard(self, name: str) -> list[Sequence[int]] | None:
        """Which positions the world itself calls hard, where it knows."""
        rows = self.rows(name)
        return [row["hard"] for row in rows] if rows and "hard" in rows[0] else None
