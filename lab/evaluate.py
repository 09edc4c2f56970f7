"""Evaluation that a kill cannot hurt: every answer is written down when it is given, scored strictly and leniently, counted once.

Results lie in `samples.jsonl` (append-only, one line per question and sample), `evaluation_stats.csv` and `detailed_results.csv`, with
the column names of TaH's evaluation (tah.md 6.4) and ours beside them.
"""

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from pydantic import Field

from lab import files
from lab.data.examples import Example
from lab.errors import DataError, RunError, SettingsError, unknown
from lab.latent.sampling import Sampling
from lab.progress import Progress
from lab.stats import Interval, mean_interval, proportion_interval

SAMPLES, FACTS = "samples.jsonl", "evaluation.json"
SHARD = "part-{}.jsonl"  # what one of several processes has answered


class Decoding(Sampling):
    """How answers are generated. Draws are keyed by seed, question and sample, so `batch` changes the speed only."""

    max_new_tokens: int = Field(256, ge=1)
    seed: int = 0
    batch: int = Field(32, ge=1)

    @property
    def sampling(self) -> Sampling:
        """The filters alone."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})


@dataclass(frozen=True)
class Request:
    """One answer wanted: the `sample`-th to the question that stands at place `number` of the benchmark."""

    number: int
    sample: int
    example: Example

    @property
    def key(self) -> tuple[str, int]:
        return self.example.id, self.sample


@dataclass(frozen=True)
class Output:
    """One answer given. `finish`: stop | length (cut at the limit). `passes`: body passes spent on thoughts and answer; `thoughts`: how
    many there were, `capped`: the share of them (0 or 1) that the budget ended; NaN if unknown."""

    text: str
    tokens: int
    finish: str
    passes: float = math.nan
    prompt_tokens: int = 0
    seconds: float = 0.0
    thoughts: float = math.nan
    capped: float = math.nan


class Generator(Protocol):
    """Answers requests, in any order, as soon as each is done; `facts` identify what answers (a resumed evaluation must have the same)."""

    facts: dict[str, Any]

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Iterator[tuple[Request, Output]]: ...


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation came to. The interval is Wilson's for one sample a question, else Student's over the questions' means."""

    benchmark: str
    rule: str
    questions: int
    samples: int
    strict: Interval
    lenient: Interval
    unparsed: int  # outputs in which the strict rule found no answer
    unparsed_lenient: int
    truncated: int  # outputs cut at the limit …
    truncated_correct: int  # … and strictly right all the same
    output_tokens: float
    passes: float  # per output, thoughts included
    notes: tuple[str, ...] = ()
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)

    def row(self) -> dict[str, Any]:
        """One flat table row."""
        plain = ("benchmark", "rule", "questions", "samples", "unparsed", "unparsed_lenient", "truncated", "truncated_correct")
        flat = {name: getattr(self, name) for name in plain}
        for name in ("strict", "lenient"):
            interval = getattr(self, name)
            flat |= {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}
        return flat | {"output_tokens": self.output_tokens, "passes": self.passes, "passes_per_token": self.passes_per_token}

    @property
    def passes_per_token(self) -> float:
        """Body passes per output token."""
        return self.passes / self.output_tokens if self.output_tokens else math.nan


def evaluate(
    generator: Generator,
    examples: Sequence[Example],
    benchmark: str,
    folder: Path | str,
    decoding: Decoding | None = None,
    *,
    rule: str = "",
    repeat: int = 1,
    data_range: tuple[int, int] | None = None,
    ids: Iterable[str] = (),
    scorer: Callable[[str, Example], Any] | None = None,
    label: str = "",
    processes: int = 1,
) -> Evaluation:
    """Answers and scores the chosen questions, `repeat` samples each; what `folder` holds already is not asked again.

    Args:
        processes: share the questions, each with a copy of the generator and a device of its own; the result is that of one.
        rule: the strict rule (default: the benchmark's own). data_range: places [start, end) of `examples`.
        ids: of the examples wanted, with or without `<benchmark>_`. scorer: (text, example) -> a score, instead of `lab.data`'s.
    Raises:
        SettingsError, DataError for a choice that is empty or contradictory; RunError if `folder` holds another evaluation.
    """
    folder, decoding = Path(folder), decoding or Decoding()
    chosen = _chosen(examples, benchmark, data_range, list(ids))
    if repeat < 1:
        raise SettingsError(f"repeat = {repeat}: at least one sample of each question is needed.")
    rule, score = (rule, scorer) if scorer else _scorer(benchmark, rule)
    facts = {"benchmark": benchmark, "rule": rule, "decoding": decoding.model_dump(exclude={"batch"}), "generator": generator.facts}
    with files.lock(folder / ".lock", f"An evaluation in {folder} is running already"):
        files.claim(folder / FACTS, facts, "an evaluation")  # more samples or other questions may join
        wanted = {_name(benchmark, r): r for number, example in chosen for r in (Request(number, i, example) for i in range(repeat))}

        def keep(request: Request, output: Output) -> None:
            files.append_line(folder / SAMPLES, _line(benchmark, request, output, score(output.text, request.example)))

        with Progress(label or benchmark, len(wanted)) as progress:
            _answer(generator, wanted, decoding, folder, keep, processes, progress)
        result = _summary(folder, benchmark, rule, wanted, _notes(examples))
        _write_tables(folder, result)
    return result


def _name(benchmark: str, request: Request) -> tuple[str, int]:
    return f"{benchmark}_{request.example.id}", request.sample


def _answer(
    generator: Generator,
    wanted: Mapping[tuple[str, int], Request],
    decoding: Decoding,
    folder: Path,
    keep: Callable[[Request, Output], None],
    processes: int,
    progress: Progress,
) -> None:
    """Asks what has not been answered before and keeps each answer when it is given."""
    pending = _pending(folder, wanted, keep)
    progress.start_at(len(wanted) - len(pending))
    if processes > 1 and len({request.number for request in pending}) > 1:
        _answer_together(generator, pending, decoding, folder, processes, progress)
        _pending(folder, wanted, keep)
        return
    for request, output in generator.generate(pending, decoding):
        keep(request, output)
        progress.advance()


def _pending(folder: Path, wanted: Mapping[tuple[str, int], Request], keep: Callable[[Request, Output], None]) -> list[Request]:
    """What is still to be asked, after keeping what several processes have left behind."""
    done = {_key(row) for row in files.read_lines(folder / SAMPLES)}
    for path in sorted(folder.glob(SHARD.format("*"))):
        for row in files.read_lines(path):
            key = (row.pop("id"), row.pop("sample"))
            if key in wanted and key not in done:
                keep(wanted[key], Output(**{name: math.nan if value is None else value for name, value in row.items()}))
                done.add(key)
        path.unlink()
    return [request for key, request in wanted.items() if key not in done]


def _answer_together(
    generator: Generator, pending: list[Request], decoding: Decoding, folder: Path, processes: int, progress: Progress
) -> None:
    """Leaves the outputs in one file for each of at most `processes` processes, which answer consecutive questions."""
    from lab.launch import share

    by_question: dict[int, list[Request]] = {}
    for request in pending:
        by_question.setdefault(request.number, []).append(request)
    work = partial(_answer_part, generator, decoding, folder, files.read_json(folder / FACTS)["benchmark"])
    share(work, list(by_question.values()), processes, progress.advance, getattr(generator, "model", None))


def _answer_part(generator: Any, decoding: Decoding, folder: Path, benchmark: str, part: list[list[Request]]) -> Iterator[Request]:
    """What one process does."""
    from lab.launch import rank

    for request, output in generator.generate(sum(part, []), decoding):
        name, sample = _name(benchmark, request)
        files.append_line(folder / SHARD.format(rank()), {"id": name, "sample": sample, **vars(output)})
        yield request


def _chosen(examples: Sequence[Example], benchmark: str, data_range: tuple[int, int] | None, ids: list[str]) -> list[tuple[int, Example]]:
    numbered = list(enumerate(examples))
    if data_range is not None and ids:
        raise SettingsError("Give data_range or ids, not both.")
    if ids:
        by_id = {example.id: (number, example) for number, example in numbered}
        missing = [name for name in ids if name.removeprefix(f"{benchmark}_") not in by_id]
        if missing:
            raise unknown(f"{benchmark} id", missing[0], by_id, DataError)
        return [by_id[name.removeprefix(f"{benchmark}_")] for name in ids]
    start, end = data_range or (0, len(numbered))
    if not 0 <= start < min(end, len(numbered)):
        raise SettingsError(f"data_range [{start}, {end}) chooses none of the {len(numbered)} questions.")
    return numbered[start:end]


def _scorer(benchmark: str, rule: str) -> tuple[str, Callable[[str, Example], Any]]:
    """(the strict rule, the benchmark's own by default; what scores by it); SettingsError for an unknown one."""
    from lab.data import BENCHMARKS
    from lab.data import benchmark as entry_of
    from lab.data.answers import KINDS, RULES, score

    kind = benchmark in KINDS and benchmark not in BENCHMARKS
    rule = rule or (KINDS[benchmark] if kind else entry_of(benchmark).strict)
    if rule not in RULES:
        raise unknown("strict rule", rule, RULES)
    return rule, lambda text, example: score(text, example.answer, benchmark, rule)


def _notes(examples: Sequence[Example]) -> tuple[str, ...]:
    return tuple(getattr(examples, "notes", ()))


def _key(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["id"], row["sample"]


def _line(benchmark: str, request: Request, output: Output, score: Any) -> dict[str, Any]:
    return {
        "id": f"{benchmark}_{request.example.id}",
        "sample": request.sample,
        "problem": request.example.question,
        "output": output.text,
        "correct_answer": request.example.answer,
        "predicted_answer": score.strict_answer,
        "is_correct": bool(score.strict_correct),
        "lenient_answer": score.lenient_answer,
        "lenient_correct": bool(score.lenient_correct),
        "input_tokens": output.prompt_tokens,
        "output_tokens": output.tokens,
        "finish": output.finish,
        "passes": output.passes,
        "thoughts": output.thoughts,
        "capped": output.capped,
        "processing_time": round(output.seconds, 4),
    }


def read_samples(folder: Path | str) -> list[dict[str, Any]]:
    """The scored outputs in `folder`, ordered by question as first met, then by sample."""
    rows = files.read_lines(Path(folder) / SAMPLES)
    place = {name: index for index, name in enumerate(dict.fromkeys(row["id"] for row in rows))}
    return sorted(rows, key=lambda row: (place[row["id"]], row["sample"]))


def _summary(folder: Path, benchmark: str, rule: str, wanted: Mapping[tuple[str, int], Request], notes: tuple[str, ...]) -> Evaluation:
    place = {key: number for number, key in enumerate(wanted)}
    rows = sorted((row for row in read_samples(folder) if _key(row) in wanted), key=lambda row: place[_key(row)])
    twice = [key for key, count in Counter(map(_key, rows)).items() if count > 1]
    if twice or len(rows) != len(wanted):
        raise RunError(
            f"{folder / SAMPLES} has {len(rows)} of {len(wanted)} samples{f', {twice[0]} twice' if twice else ''}; run it again."
        )
    cut = [row for row in rows if row["finish"] == "length"]
    return Evaluation(
        benchmark=benchmark,
        rule=rule,
        questions=len({row["id"] for row in rows}),
        samples=len(rows),
        strict=_accuracy(rows, "is_correct"),
        lenient=_accuracy(rows, "lenient_correct"),
        unparsed=sum(row["predicted_answer"] is None for row in rows),
        unparsed_lenient=sum(row["lenient_answer"] is None for row in rows),
        truncated=len(cut),
        truncated_correct=sum(row["is_correct"] for row in cut),
        output_tokens=fmean(row["output_tokens"] for row in rows),
        passes=fmean(float(row["passes"]) for row in rows),
        notes=notes,
        rows=rows,
    )


def _accuracy(rows: list[dict[str, Any]], name: str) -> Interval:
    """Over questions: samples of one question are not independent."""
    by_question = _grouped(rows)
    if len(by_question) == len(rows):
        return proportion_interval(sum(row[name] for row in rows), len(rows))
    return mean_interval([fmean(row[name] for row in group) for group in by_question.values()])


def _grouped(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return groups


def _write_tables(folder: Path, result: Evaluation) -> None:
    stats = [_stats_row(name, group) for name, group in _grouped(result.rows).items()]
    files.write_text(folder / "evaluation_stats.csv", _csv([*stats, _stats_row("total", result.rows)]))
    files.write_text(folder / "detailed_results.csv", _csv([_detail(row) for row in result.rows]))


def _stats_row(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    right = sum(row["is_correct"] for row in rows)
    return {
        "problem_id": name,
        "accuracy": right / len(rows),
        "correct_count": right,
        "total_samples": len(rows),
        "avg_output_length": fmean(row["output_tokens"] for row in rows),
        "lenient_accuracy": fmean(row["lenient_correct"] for row in rows),
        "truncated_count": sum(row["finish"] == "length" for row in rows),
        "avg_passes": fmean(float(row["passes"]) for row in rows),
    }


def _detail(row: dict[str, Any]) -> dict[str, Any]:
    same = ("correct_answer", "predicted_answer", "is_correct", "input_tokens", "output_tokens", "processing_time")
    ours = ("lenient_answer", "lenient_correct", "finish", "passes")
    names = {"problem_id": row["id"], "sample_idx": row["sample"], "has_answer": row["predicted_answer"] is not None}
    return names | {name: row[name] for name in (*same, *ours)}


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
