"""The tasks of the published code by its names, and the options of date understanding in a new order."""

import re
from dataclasses import replace

import numpy as np

from lab.data.benchmarks import load_benchmark, with_options
from lab.data.examples import Dataset, Example
from lab.data.records import LETTERS
from lab.errors import DataError, unknown

BENCHMARKS = {"gsm8k": "gsm8k", "strategyqa": "strategyqa", "math": "math", "aqua": "aqua", "du": "date_understanding"}


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
