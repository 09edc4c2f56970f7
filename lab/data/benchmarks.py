"""The benchmarks by name: where each is found on the hub, how its answers are read, and how a local copy is loaded."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from lab.data import records
from lab.data.examples import Dataset, Example, read_records
from lab.errors import DataError, SettingsError, unknown

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Benchmark:
    """What is known of a benchmark before its data is seen.

    `answer`: number | letter | latex | yesno | truefalse | sentence (decides the lenient rules); `strict`: the default strict
    rule; `fields`: our field name -> the hub's; `splits`: our split name -> the hub's; `subset` "*" means all of them;
    `stems`: other beginnings of official file names, `files`: whole ones by split; `letters`: the option letters that exist;
    `relative`: tolerance of GSM-Hard.
    """

    name: str
    answer: str
    strict: str
    hub: str = ""
    subset: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)
    stems: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    letters: str = records.LETTERS
    relative: float = 0.0


_TABLE = [
    Benchmark("gsm8k", "number", "tah-expr", "openai/gsm8k", "main", stems=("gsm",)),
    Benchmark("gsm8k_aug", "number", "codi", "whyNLP/gsm8k-aug", stems=("gsm", "gsm8k")),
    Benchmark("gsm8k_aug_nl", "number", "codi", "whyNLP/gsm8k-aug-nl", stems=("gsm", "gsm8k")),
    Benchmark("gsm_hard", "number", "codi", "reasoning-machines/gsm-hard", splits={"test": "train"}, relative=1e-6),
    Benchmark("multiarith", "number", "codi", "ChilleD/MultiArith"),
    Benchmark("svamp", "number", "codi", "ChilleD/SVAMP", fields={"question": "question_concat"}),
    Benchmark("math500", "latex", "tah-latex", "HuggingFaceH4/MATH-500", fields={"id": "unique_id"}),
    Benchmark("math", "latex", "tah-latex", "DigitalLearningGmbH/MATH-lighteval", files={"train": "math_gsmstyle", "test": "math500_gsm"}),
    Benchmark("openr1_math", "latex", "tah-latex", "open-r1/OpenR1-Math-220k", "default", fields={"id": "uuid"}),
    Benchmark("amc23", "number", "tah-latex", "math-ai/amc23"),
    Benchmark("aime24", "number", "tah-expr", "Maxwell-Jia/AIME_2024", splits={"test": "train"}),
    Benchmark("aime25", "number", "tah-expr", "yentinglin/aime_2025", splits={"test": "train"}),
    Benchmark("olympiadbench", "latex", "tah-latex", "realtreetune/olympiadbench"),
    Benchmark("minerva", "latex", "tah-latex", "math-ai/minervamath"),
    Benchmark("gpqa", "letter", "tah-string", "Idavidrein/gpqa", "gpqa_diamond", splits={"test": "train"}, letters="ABCD"),
    Benchmark("mmlu_stem", "letter", "tah-string", "TIGER-Lab/MMLU-STEM", letters="ABCD"),
    Benchmark("mmlu_redux", "letter", "tah-string", "edinburgh-dawg/mmlu-redux-2.0", "*", letters="ABCD"),
    Benchmark("arc_e", "letter", "tah-string", "allenai/ai2_arc", "ARC-Easy", letters="ABCDE"),
    Benchmark("arc_c", "letter", "tah-string", "allenai/ai2_arc", "ARC-Challenge", letters="ABCDE"),
    Benchmark("aqua", "letter", "lta-aqua", "deepmind/aqua_rat", "raw", letters="ABCDE"),
    Benchmark(
        "date_understanding",
        "letter",
        "lta-aqua",
        "tasksource/bigbench",
        "date_understanding",
        letters="ABCDEF",
        stems=("du",),
        files={"test": "date_understanding_gsm_style"},
    ),
    Benchmark("commonsenseqa", "letter", "codi-letters", "zen-E/CommonsenseQA-GPT4omini", splits={"test": "validation"}, letters="ABCDE"),
    Benchmark("strategyqa", "yesno", "lta-strategyqa", "ChilleD/StrategyQA"),
    Benchmark("prosqa", "sentence", "coconut"),
    Benchmark("prontoqa", "truefalse", "coconut"),
]
BENCHMARKS: dict[str, Benchmark] = {entry.name: entry for entry in _TABLE}
_EXECUTES_CODE = ("humaneval", "mbpp", "livecodebench")
_SPLIT_FILES = {"validation": ("validation", "valid", "val", "dev", "eval")}
_ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".txt")
_NO_AUG = "gsm8k_aug train: the 385,620 augmented examples are absent; GSM8K's own training questions stand in (not comparable)"
_PRONTOQA_ROWS = {"train": slice(0, 9000), "validation": slice(9000, 9200), "test": slice(9200, None)}


def benchmark(name: str) -> Benchmark:
    """The entry of `name`; SettingsError with the closest match, DataError for those that would run what a model wrote."""
    if name in _EXECUTES_CODE:
        raise DataError(f"{name} is not supported: scoring it would execute model-written code on this machine.")
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def load_benchmark(
    name: str,
    split: str = "test",
    data: Path | str = "",
    limit: int | None = None,
    *,
    start: int = 0,
    ids: Iterable[str] = (),
    shuffle_seed: int | None = None,
    show_options: bool = True,
) -> Dataset:
    """The examples of one split; a split that is missing is replaced by train, then test, as in TaH's evaluation, with a note.

    Args:
        data: "" loads from the hub; else a file (.jsonl, .jsonl.gz, .json list, .txt of GSM8K-Aug) or a folder that holds
            `<name>/<split>.jsonl`, `<split>.jsonl` or the official file names.
        limit, start, ids, shuffle_seed: shuffle first, then pick `ids`, then cut `[start, start + limit)`.
        show_options: put the lettered options of multiple-choice questions behind the question (the files keep them apart).
    Raises:
        SettingsError for an unknown name or an impossible range, DataError for data that is absent, empty or malformed.
    """
    entry = benchmark(name)
    if start < 0 or (limit is not None and limit < 1):
        raise SettingsError(f"start = {start}, limit = {limit}: start must be at least 0 and limit at least 1.")
    rows, source, notes = _local(entry, split, Path(data)) if data else _hub(entry, split)
    examples = _examples(entry, split, rows)
    if show_options and entry.answer == "letter":
        examples = tuple(replace(example, question=with_options(example)) for example in examples)
    dataset = Dataset(name, split, examples, source, tuple(notes))
    for note in notes:
        log.warning("%s", note)
    if shuffle_seed is not None:
        dataset = dataset.shuffled(shuffle_seed)
    if ids := list(ids):
        dataset = dataset.picked(ids)
    chosen = dataset[start : None if limit is None else start + limit]
    if not chosen:
        raise DataError(f"{name}/{split} from {source} has {len(dataset)} examples, none at or after {start}.")
    return chosen


def with_options(example: Example) -> str:
    """The question with its options behind it, one a line as `(A) …`; the question as it is where it has them or there are none."""
    lines = "\n".join(f"({letter}) {option}" for letter, option in zip(records.LETTERS, example.options, strict=False))
    return example.question if not lines or example.question.endswith(lines) else f"{example.question}\n{lines}"


def _examples(entry: Benchmark, split: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[Example, ...]:
    examples = tuple(_example(entry, split, index, place, record) for index, (place, record) in enumerate(rows))
    repeated = [name for name, count in Counter(example.id for example in examples).items() if count > 1]
    if repeated:
        raise DataError(f"{entry.name}/{split}: the id {repeated[0]!r} stands more than once; ids must be unique.")
    return examples


def _example(entry: Benchmark, split: str, index: int, place: str, record: Mapping[str, Any]) -> Example:
    try:
        found = records.parts(record)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{place} has no known shape ({type(error).__name__}: {error}).") from None
    for name in ("question", "answer"):
        if found.get(name) is None or not str(found[name]).strip():
            raise DataError(f"{place}: no {name!r} (or it is empty); the record has {', '.join(map(repr, record)) or 'no fields'}.")
    used = {"id", "question", "steps", "answer", "options"}
    extra = {key: value for key, value in record.items() if key not in used}
    answer = canonical(entry, found["answer"])
    if answer != found["answer"]:
        extra.setdefault("answer_raw", found["answer"])
    if "reply" in found:
        extra["reply"] = found["reply"]
    name = f"{entry.name}-{split}-{index:05d}" if found.get("id") is None else str(found["id"])
    return Example(name, str(found["question"]), tuple(found["steps"]), answer, tuple(found["options"]), extra)


def canonical(entry: Benchmark, answer: Any) -> str:
    """A gold answer in the layout's spelling: numbers without commas, ".0" or leading zeros; letters; yes/no; True/False."""
    text = str(answer).strip()
    if entry.answer == "number":
        return _number(text)
    if entry.answer == "letter":
        return text.strip("().").upper() if len(text.strip("().")) == 1 else text.rpartition("\n")[2].strip()
    if entry.answer in ("yesno", "truefalse"):
        value = {"true": 1, "yes": 1, "a": 1, "false": 0, "no": 0, "b": 0}.get(text.lower().rstrip("."))
        names = ("no", "yes") if entry.answer == "yesno" else ("False", "True")
        return text if value is None else names[value]
    return text


def _number(text: str) -> str:
    plain = text.replace(",", "")
    try:
        value = Decimal(plain)
        return str(int(value)) if value == value.to_integral_value() else plain
    except (InvalidOperation, OverflowError, ValueError):
        return text


def _local(entry: Benchmark, split: str, path: Path) -> tuple[list[tuple[str, Any]], str, list[str]]:
    if not path.exists():
        raise DataError(f"There is no file or folder {path} (data for {entry.name}).")
    file, notes = (path, []) if path.is_file() else _file_in(entry, split, path)
    rows = list(_rows(file, entry, split))
    if not rows:
        raise DataError(f"{file} holds no examples.")
    return rows, str(file), notes


def _file_in(entry: Benchmark, split: str, folder: Path) -> tuple[Path, list[str]]:
    """The file of `split` in `folder`, and what has to be said about it."""
    for wanted in _fallback(split):
        notes = [] if wanted == split else [f"{entry.name} has no {split!r} split in {folder}; {wanted!r} is used"]
        if file := _named(entry, wanted, folder):
            return file, notes
        if wanted == "train" and entry.name == "gsm8k_aug" and (file := _named(entry, "train_no_aug", folder)):
            return file, [*notes, _NO_AUG]
    if file := _first_of(folder, [entry.name]):
        return file, [] if split == "test" else [f"{file} does not name a split; it is used as {split!r}"]
    raise DataError(f"{folder} holds no {entry.name} data: {entry.name}/{split}.jsonl (or .jsonl.gz) is looked for.")


def _fallback(split: str) -> list[str]:
    """What stands in for a missing split: train, then test (TaH); for a missing test split validation comes first."""
    return list(dict.fromkeys([split, *(["validation"] if split == "test" else []), "train", "test"]))


def _named(entry: Benchmark, split: str, folder: Path) -> Path | None:
    for name in _SPLIT_FILES.get(split, (split,)):
        stems = [name, f"{name}_socratic", f"gsm_style_{name}", *(f"{stem}_{name}" for stem in (entry.name, *entry.stems))]
        stems += [entry.files[split]] if split in entry.files else []
        for base in (folder / entry.name, folder):
            if found := _first_of(base, stems):
                return found
    return None


def _first_of(folder: Path, stems: list[str]) -> Path | None:
    return next((file for stem in stems for end in _ENDINGS if (file := folder / (stem + end)).is_file()), None)


def _rows(file: Path, entry: Benchmark, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file.suffix == ".txt":
        for number, line in enumerate(_text(file).split("\n"), 1):
            if line.strip():
                yield f"{file}, line {number}", records.text_line(line, f"{file}, line {number}")
    elif file.suffix == ".json":
        yield from _json_rows(file, entry, split)
    else:
        yield from read_records(file)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error.reason}.") from None


def _json_rows(file: Path, entry: Benchmark, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The objects of a JSON list; of a ProntoQA generator's {"example1": …} those of COCONUT's split; of JSON Lines named .json all."""
    try:
        content = json.loads(_text(file))
    except json.JSONDecodeError:
        yield from read_records(file)
        return
    if isinstance(content, dict) and all(isinstance(value, dict) for value in content.values()):
        content = list(content.values())[_PRONTOQA_ROWS.get(split, slice(None))]
    if not isinstance(content, list):
        content = [content]
    for number, record in enumerate(content, 1):
        if not isinstance(record, dict):
            raise DataError(f"{file}, item {number} is not an object.")
        yield f"{file}, item {number}", record


def _hub(entry: Benchmark, split: str) -> tuple[list[tuple[str, Any]], str, list[str]]:
    if not entry.hub:
        raise DataError(f"{entry.name} is not on the hub: give its file or folder with data=PATH, or generate it (lab.data.worlds).")
    import datasets

    wanted = entry.splits.get(split, split)
    try:
        subsets = datasets.get_dataset_config_names(entry.hub) if entry.subset == "*" else [entry.subset or None]
        available = datasets.get_dataset_split_names(entry.hub, subsets[0])
        used = next((name for name in _fallback(wanted) if name in available), available[0])
        tables = [datasets.load_dataset(entry.hub, subset, split=used) for subset in subsets]
    except Exception as error:  # the hub client raises many kinds; each means the same to the reader
        raise DataError(f"Cannot load {entry.hub} from the hub ({type(error).__name__}: {error}); give data=PATH instead.") from error
    notes = [] if used == wanted else [f"{entry.name} has no {split!r} split on the hub; {used!r} is used"]
    rows = [(f"{entry.hub}/{used}, row {i}", _renamed(entry, row)) for i, row in enumerate(row for table in tables for row in table)]
    return rows, f"{entry.hub}/{used}", notes


def _renamed(entry: Benchmark, row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, **{ours: row[theirs] for ours, theirs in entry.fields.items() if theirs in row}}
