"""The papers' numbers against ours: side by side where the setting is the same, with the list of what differs where it is not."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from lab.running import papers
from lab.running.records import results_of
from lab.running.runs import Run
from lab.tables import Row, cell_text, number_text, rows_of

KEYS = ("backbone", "dataset", "split", "decoding")
_BACKBONES = ("backbone", "model_path_or_repo", "large_model_id", "model")
_DATASETS = ("world", "benchmarks", "benchmark", "val_config_options", "task_name")
_TEMPERATURES = ("eval_temperature", "temperature")


def compared(paper: str, ours: Mapping[str, str], results: Mapping[str, Mapping[str, Any]], only: Iterable[str] = ()) -> list[Row]:
    """One row a number of the paper: claim, measure, paper, ours ("" where data set or arm are others), what differs, source.

    Args:
        ours: our setting, see `setting_of`. results: {arm: {metric: number or cell}} of the step that holds the result.
        only: numbers that stand beside one of these arms; empty = all.
    """
    arms = set(only)
    lines = [line for line in papers.reported(paper) if not arms or line.arm in arms]
    return [_row(line, name, value, ours, results) for line in lines for name, value in line.values.items()]


def of_runs(runs: Iterable[Run]) -> list[Row]:
    """The same for runs of one paper that differ in their seed only; [] where the paper quotes nothing."""
    runs = list(runs)
    paper = runs[0].manifest["paper"]
    if paper not in papers.papers() or not papers.reported(paper):
        return []
    rows = rows_of([({}, papers.result_of(paper, results_of(run.folder))) for run in runs])
    return compared(paper, setting_of(runs[0]), {row["arm"]: row for row in rows})


def setting_of(run: Run) -> dict[str, str]:
    """backbone, dataset, split and decoding of a run, from the parameters its steps recorded; "" where none of them says."""
    given: dict[str, Any] = {}
    for record in run.steps():
        given |= {name: value for name, value in record.info["parameters"].items() if value not in ("", [], None)}
    return of_parameters(given)


def of_parameters(given: Mapping[str, Any]) -> dict[str, str]:
    """The same from parameters under the names that notebooks give them."""
    dataset = next((given[name] for name in _DATASETS if given.get(name)), "")
    named = ", ".join(dataset) if isinstance(dataset, list) else re.sub(r"-(test|val)\b.*", "", dataset)
    backbone = str(next((given[name] for name in _BACKBONES if given.get(name)), ""))
    return {"backbone": backbone, "dataset": named, "split": "test", "decoding": _decoding(given)}


def _decoding(given: Mapping[str, Any]) -> str:
    temperature = next((given[name] for name in _TEMPERATURES if name in given), None)
    if temperature is None:
        return ""
    drawn = [f"temperature {temperature:g}"]
    drawn += [f"{name} {given[name]:g}" for name in ("top_p", "top_k") if given.get(name) and given[name] != 1.0]
    return ", ".join(drawn) if temperature else "greedy"


def _row(line: papers.Reported, name: Any, value: Any, ours: Mapping[str, str], results: Mapping[str, Mapping[str, Any]]) -> Row:
    dataset, metric = _measured(str(name), line.setting.dataset)
    theirs = {key: getattr(line.setting, key) for key in KEYS} | {"dataset": dataset}
    differs = {key: f"{key}: {theirs[key]}, here {ours[key] or 'not recorded'}" for key in KEYS if not _equal(theirs[key], ours[key])}
    found = results.get(line.arm, {}).get(metric) if line.arm and dataset and not {"dataset", "split"} & set(differs) else None
    return {
        "claim": line.claim,
        "measure": " ".join(filter(None, [dataset, metric])),
        "paper": number_text(value),
        "ours": "" if found is None else cell_text(_scaled(found, line.scale if metric == "accuracy" else 1.0)),
        "what differs": "; ".join(differs.values()) or ("nothing it states" if line.setting.stated else "the source does not say"),
        "note": line.setting.note,
        "source": line.source,
    }


def _measured(name: str, dataset: str) -> tuple[str, str]:
    """(data set, metric) of a value's name: `gsm8k`, `gsm8k_tokens`, `accuracy`."""
    from lab.data.benchmarks import BENCHMARKS

    known = max((key for key in BENCHMARKS if name == key or name.startswith(f"{key}_")), key=len, default="")
    return (known, name.removeprefix(known).strip("_") or "accuracy") if known else (dataset, name)


def _equal(theirs: str, ours: str) -> bool:
    """Whether a stated setting is ours, by its last part (`openai-community/gpt2` is `gpt2`) and by letters and digits alone."""
    plain = [re.sub(r"[^a-z0-9.]", "", text.rsplit("/", 1)[-1].lower()) for text in (theirs, ours)]
    return not theirs or plain[0] == plain[1]


def _scaled(cell: Any, scale: float) -> Any:
    if not isinstance(cell, Mapping):
        return cell * scale
    return cell | {name: None if cell[name] is None else cell[name] * scale for name in ("mean", "low", "high")}
