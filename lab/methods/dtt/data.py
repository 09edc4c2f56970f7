"""Text → ids: prompt and `[bot] steps [eot] answer` (`dtt.md` 2.2); HRPO writes steps and `#### answer`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

from lab.data.examples import Example
from lab.errors import DataError
from lab.latent.plan import Kept, left, right
from lab.methods.dtt.config import MARKER, GatedSettings
from lab.methods.dtt.reward import find_span

HRPO_SYSTEM = f"Reason step by step about the question. Then write {MARKER} and the final answer, once and at the very end."


class WrittenRow(NamedTuple):
    """An example as ids: its prompt, and what is to be written, end token included."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]


@dataclass
class Written:
    """A batch: prompts (R, P) padded left and targets (R, C) padded right, with masks; `inside` (R, C): columns whose gate should open."""

    prompt: Tensor
    prompt_mask: Tensor
    ids: Tensor
    mask: Tensor
    inside: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device) -> "Written":
        return Written(*(getattr(self, field.name).to(device) for field in fields(self)))


def prompt_ids(question: str, tokenizer, s: GatedSettings) -> list[int]:
    """Ids of a question and a line end (with [bot] where the settings put it into the prompt); HRPO's in the chat template."""
    if s.gate == "hrpo" and tokenizer.chat_template:
        turns = [{"role": "system", "content": HRPO_SYSTEM}, {"role": "user", "content": question}]
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])
    return [*tokenizer(question + "\n").input_ids, *([s.bot_id] if s.bot_in_prompt else [])]


def target_ids(example: Example, tokenizer, s: GatedSettings) -> list[int]:
    """What a supervised example writes; `extra["before"]` stands before [bot] (the toy's announcement of slow reasoning)."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    steps = "\n".join(example.steps)
    if s.gate == "hrpo":
        return [*ids(f"{steps}\n{MARKER} {example.answer}"), s.eos_id]
    before = [*ids(example.extra.get("before", "")), *([] if s.bot_in_prompt else [s.bot_id])]
    return [*before, *ids(steps), s.eot_id, *ids(example.answer), s.eos_id]


def prepare(examples: Iterable[Example], tokenizer, s: GatedSettings, max_prompt_length: int = 512) -> Kept[WrittenRow]:
    """The usable examples; those without question or answer or with a longer prompt are dropped and counted."""
    kept = Kept()
    for example in examples:
        reason = "" if example.question.strip() and example.answer.strip() else "no question or no answer"
        prompt = () if reason else tuple(prompt_ids(example.question, tokenizer, s))
        if len(prompt) > max_prompt_length:
            reason = f"the prompt is longer than {max_prompt_length} tokens"
        kept.add(example.id, None if reason else WrittenRow(prompt, tuple(target_ids(example, tokenizer, s))), reason)
    return kept.checked()


def collate(rows: Sequence[WrittenRow], s: GatedSettings) -> Written:
    """The batch of `rows`."""
    if not rows:
        raise DataError("A batch without rows.")
    prompt, target = left([row.prompt for row in rows]), right([row.target for row in rows])
    masks = [torch.ones_like(side.ids) if side.valid is None else side.valid.long() for side in (prompt, target)]
    spans = inside([row.target for row in rows], target.ids.shape[1], s)
    return Written(prompt.ids, masks[0], target.ids, masks[1], spans)


def inside(rows: Sequence[Sequence[int]], width: int, s: GatedSettings) -> Tensor:
    """(R, width) bool: columns whose gate belongs to the reasoning: after [bot], up to and with [eot]."""
    found = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        span = find_span(row, s.bot_id, s.eot_id, s.bot_in_prompt)
        if span is not None:
            found[index, span.bot + 1 : span.eot + 1] = True
    return found
