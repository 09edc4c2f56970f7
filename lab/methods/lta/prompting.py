"""Prompts with room for thoughts: what the base reads, what the assistant reads, and where the thoughts stand (`lta.md` 2.3–2.5).

The wording is data (a pack); where the thoughts are is found by searching for their markers in the tokenised text, never by counting
from an end. Axes: none; this is text and ids of one example.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from lab.data.examples import Example
from lab.errors import DataError, SettingsError, unknown
from lab.latent.plan import IGNORE, Row
from lab.methods.lta.config import FAMILIES, TASKS


@dataclass(frozen=True)
class Wording:
    """The texts of one (family, task, split): the base's user turn and answer, the assistant's user turn, step turns and lead-in."""

    base: str  # {question} {thoughts}
    open: str
    step: str  # {i} {text}
    close: str  # {answer} {question}
    ask: str  # {n} {question}
    lead: str  # {n} {slots}


@dataclass(frozen=True)
class Pack:
    """Prompt wordings by "family/task/split" (or "*" in place of any part), with a hash that checkpoints carry."""

    wordings: Mapping[str, Mapping[str, str]]

    @property
    def hash(self) -> str:
        """Twelve digits of the sha256 of the wordings."""
        return hashlib.sha256(json.dumps(self.wordings, sort_keys=True).encode()).hexdigest()[:12]

    def wording(self, family: str, task: str, split: str) -> Wording:
        """The texts for a case, the more special entry over the more general; SettingsError for an unknown task or a missing text."""
        if task not in TASKS:
            raise unknown("task", task, TASKS)
        found: dict[str, str] = {}
        for key in ("*/*/*", f"*/{task}/*", f"{family}/*/*", f"{family}/{task}/*", f"{family}/{task}/{split}"):
            found |= self.wordings.get(key, {})
        if lost := [name for name in Wording.__dataclass_fields__ if name not in found]:
            raise SettingsError(f"The prompt pack has no {lost[0]!r} for {family}/{task}/{split}.")
        return Wording(**{name: found[name] for name in Wording.__dataclass_fields__})

    @classmethod
    def read(cls, path: str) -> "Pack":
        """The pack in a JSON file {"family/task/split": {text: wording}}; DataError where it is none."""
        try:
            found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path!r} cannot be read as a prompt pack: {error}.") from None
        if not isinstance(found, dict) or not all(isinstance(texts, dict) for texts in found.values()):
            raise DataError(f'{path!r} is no prompt pack: write {{"family/task/split": {{…}}}} with texts as in lab/methods/lta/pack.json.')
        if odd := [name for texts in found.values() for name in texts if name not in Wording.__dataclass_fields__]:
            raise unknown("text of a prompt pack", odd[0], Wording.__dataclass_fields__, DataError)
        return cls(found)


@cache
def own_pack() -> Pack:
    """The pack in our own words."""
    return Pack(json.loads(resources.files("lab.methods.lta").joinpath("pack.json").read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Prompted:
    """One example as ids.

    Attributes:
        row: prefix | thoughts | after, with labels (all ignored at test).
        assistant: ids the thought generator reads. slots: where its thoughts are. question: its place of the question's turn end.
        steps: [start, stop) of each gold step's turn; `step_ends` their turn ends.
        answer: ids of the bare answer. skipped: places of `assistant` that a test prompt would not have.
    """

    row: Row
    assistant: tuple[int, ...]
    slots: tuple[int, ...]
    question: int
    steps: tuple[tuple[int, int], ...] = ()
    step_ends: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    skipped: tuple[int, ...] = field(default=())


def reasoning(example: Example, task: str) -> list[str]:
    """The gold reasoning as the base writes it, its last line the answer (`lta.md` 2.3)."""
    steps, answer = list(example.steps), example.extra.get("answer_raw", example.answer)
    if task == "strategyqa":
        facts = example.extra.get("facts") or steps
        return facts.split("\n") if isinstance(facts, str) else list(facts)
    if task == "du":
        return [*steps, str(answer)]
    if task == "aqua" and len(steps) < 2:
        steps.insert(1, f"The answer is:{answer}")
    return [*steps, f"#### {answer}"]


def answer_text(example: Example, task: str) -> str:
    """The answer as the base writes it."""
    return example.answer.capitalize() if task == "strategyqa" else example.answer


def shown_to_assistant(lines: Sequence[str], task: str) -> list[str]:
    """The part of the reasoning that the assistant's training prompt shows: never the line with the answer."""
    return list(lines) if task == "strategyqa" else list(lines[: -2 if task == "du" else -1])


def cleaned(text: str, task: str, family: str) -> str:
    """A step as a Qwen3 base writes it for arithmetic: without calculator notes and markers."""
    if family != "qwen3" or task not in ("gsm8k", "math"):
        return text
    return re.sub(r" <<.*?>>", "", text).replace("** ", "").replace("#### ", "")


def build(
    example: Example,
    n: int,
    *,
    tokenizer,
    family: str,
    task: str,
    split: str,
    pack: Pack | None = None,
    assistant_tokenizer=None,
    distinct: bool = True,
    limit: int = 0,
    solution: bool = True,
) -> Prompted:
    """The prompts of one example with `n` thoughts.

    Args:
        split: train and dev carry the solution, test does not.
        assistant_tokenizer: of the small model; None = the base's.
        distinct: a token id of its own for each thought of the assistant's prompt.
        limit: most tokens of the base's sequence, 0 = any; DataError where the thoughts would be cut off.
        solution: whether the assistant's prompt has the gold steps in training (SoftCoT's never has).
    """
    words, marks = (pack or own_pack()).wording(family, task, split), FAMILIES[family]
    reader = assistant_tokenizer or tokenizer
    span = marks.begin + marks.placeholder * n + marks.end if n else ""
    asked = _base_turns(example, words, family, task, split, span)
    ids = _ids(tokenizer, asked, family, split)
    learnt = len(_ids(tokenizer, asked[:1], family, "train")) if task == "strategyqa" and split != "test" else 0
    row = _row(ids, n, tokenizer, family, split, limit, learnt)
    lines = shown_to_assistant(reasoning(example, task), task) if solution and split != "test" else []
    turns, steps = _assistant_turns(example, words, family, task, lines, n, marks.placeholder)
    assistant, places, slots = _read(reader, turns, n, marks)
    if n and distinct:
        first = _first_slot(reader, marks.first_slot, n)
        assistant = [first + slots.index(i) if i in slots else token for i, token in enumerate(assistant)]
    spans = places[1 : 1 + len(steps)]
    bare = answer_text(example, task) if task == "strategyqa" else str(example.extra.get("answer_raw", example.answer))
    return Prompted(
        row,
        tuple(assistant),
        tuple(slots),
        places[0][1],
        tuple((start, stop) for start, stop, _ in spans),
        tuple(stop for _, stop, _ in spans),
        tuple(reader(bare).input_ids) if split != "test" else (),
        tuple(range(places[0][2], spans[-1][2])) if spans else (),
    )


def _base_turns(example: Example, words: Wording, family: str, task: str, split: str, span: str) -> list[dict[str, str]]:
    turns = [{"role": "user", "content": _fill(words.base, question=example.question, thoughts=span)}]
    if split == "test":
        return turns
    lines = [cleaned(line, task, family) for line in reasoning(example, task)]
    steps = "".join(_fill(words.step, i=i, text=line) for i, line in enumerate(lines, 1))
    ends = [_fill(part, question=example.question, answer=answer_text(example, task)) for part in (words.open, words.close)]
    return [*turns, {"role": "assistant", "content": ends[0] + steps + ends[1]}]


def _assistant_turns(example: Example, words: Wording, family: str, task: str, lines: list[str], n: int, placeholder: str):
    turns = [{"role": "user", "content": _fill(words.ask, n=n, question=example.question)}]
    role = "user" if family == "qwen3" and task in ("aqua", "du") else "assistant"
    steps = [{"role": role, "content": f"## Step {i}: {line}\n"} for i, line in enumerate(lines, 1)]
    return [*turns, *steps, {"role": "assistant", "content": _fill(words.lead, n=n, slots=placeholder * n)}], steps


def _fill(template: str, **values: Any) -> str:
    for name, value in values.items():
        template = template.replace("{" + name + "}", str(value))
    return template


def _ids(tokenizer, turns: list[dict[str, str]], family: str, split: str) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError("The tokenizer has no chat template, which these prompts need; use one of an instruction-tuned model.")
    options = {"add_generation_prompt": split == "test", "enable_thinking": False} if family == "qwen3" else {}
    return tokenizer(tokenizer.apply_chat_template(turns, tokenize=False, **options), add_special_tokens=False).input_ids


def _row(ids: list[int], n: int, tokenizer, family: str, split: str, limit: int, learnt: int) -> Row:
    """The base's sequence cut at the thoughts; supervised from place `learnt`, 0 = the second token after the thoughts, as published."""
    marks = FAMILIES[family]
    if n == 0:
        turn = tokenizer.convert_tokens_to_ids(marks.turn_end)
        cut = ids.index(turn) if turn in ids else len(ids) - 1
        start, stop = cut, cut
    else:
        begin, unknown_id, end = tokenizer.convert_tokens_to_ids([marks.begin, marks.placeholder, marks.end])
        wanted = [begin, *[unknown_id] * n, end]
        found = [i for i in range(len(ids) - n - 1) if ids[i : i + n + 2] == wanted]
        if len(found) != 1:
            raise DataError(
                f"The prompt holds {len(found)} places for {n} thoughts instead of one; does the tokenizer know {marks.begin!r}?"
            )
        start, stop = found[0] + 1, found[0] + 1 + n
    if limit and stop + 2 > limit:
        raise DataError(f"A limit of {limit} tokens cuts off the thoughts at {start}–{stop}; raise it or drop the example.")
    after = ids[stop:limit] if limit else ids[stop:]
    skipped = len(after) if split == "test" else max(0, learnt - stop) if learnt else 2
    labels = [IGNORE] * (start + skipped) + list(after[skipped:])
    return Row(tuple(ids[:start]), tuple(after), tuple(labels), thoughts=n)


def _read(tokenizer, turns: list[dict[str, str]], n: int, marks) -> tuple[list[int], list[tuple[int, int, int]], list[int]]:
    """The assistant's ids; (content start, turn end, after the turn) of each turn; the thoughts' places."""
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, at, places = [begin for begin, _ in coded.offset_mapping], 0, []
    for turn in turns:
        content = text.index(turn["content"].strip(), at)
        end = text.index(marks.turn_end, content + len(turn["content"].strip()))
        at = end + len(marks.turn_end)
        places.append(tuple(_token_at(starts, char) for char in (content, end, at)))
    unknown_id, stop = tokenizer.convert_tokens_to_ids(marks.placeholder), places[-1][1]
    slots = list(range(stop - n, stop))
    if any(coded.input_ids[slot] != unknown_id for slot in slots):
        raise DataError(f"The assistant's prompt does not end in {n} placeholders; does its tokenizer know {marks.placeholder!r}?")
    return list(coded.input_ids), places, slots


def _token_at(starts: list[int], char: int) -> int:
    return next((i for i, start in enumerate(starts) if start >= char), len(starts))


def _first_slot(tokenizer, wanted: int, n: int) -> int:
    """The first of `n` rarely used ids: the published ones where the vocabulary is that large, its last ordinary ones otherwise."""
    size = len(tokenizer)
    if wanted + n <= size:
        return wanted
    special = [i for i in tokenizer.all_special_ids if i >= size // 2]
    return min([size, *special]) - n
