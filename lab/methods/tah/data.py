"""From raw records to training examples with iteration labels (spec 6.1 to 6.3)."""

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from lab.config import Settings
from lab.errors import DataError, SettingsError
from lab.latent.plan import IGNORE

log = logging.getLogger(__name__)

QUESTIONS, ANSWERS = ("problem", "question"), ("output", "solution", "generation", "answer")
Row = dict[str, Any]


def render(record: Row) -> tuple[list[dict[str, str]], dict[str, bool]] | None:
    """Chat messages and template arguments of a training record, or None where it lacks a question or an answer.

    `conversations` keep their last user and assistant turn (which must hold `<think>…</think>`) and are rendered with
    thinking; question/answer records take the first field that is not empty, without.
    """
    pair = _conversation(record) if "conversations" in record else _plain(record)
    if pair is None:
        return None
    question, answer = pair
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    messages = [*system, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages, {"tokenize": False, "add_generation_prompt": False, "enable_thinking": "conversations" in record}


def _conversation(record: Row) -> tuple[str, str] | None:
    turns = {"user": "", "assistant": ""}
    for turn in record["conversations"]:
        role = {"human": "user", "gpt": "assistant"}.get(turn.get("from"), turn.get("from"))
        if role in turns:
            turns[role] = turn.get("value") or ""
    before, opened, rest = turns["assistant"].partition("<think>")
    thought, closed, response = rest.partition("</think>")
    if not (turns["user"] and opened and closed):
        return None
    thought, response = thought.strip(), response.strip()
    return turns["user"], f"{thought}\n</think>\n\n{response}" if thought else response


def _plain(record: Row) -> tuple[str, str] | None:
    question, answer = (next((record[name] for name in names if record.get(name)), "") for names in (QUESTIONS, ANSWERS))
    return (question, answer) if question and answer else None


def assistant_mask(ids: Sequence[int], start: int) -> list[int]:
    """1 from the first `start` token (Qwen3's `<think>`) to the end, 0 before; all 0 without one."""
    first = next((index for index, token in enumerate(ids) if token == start), len(ids))
    return [0] * first + [1] * (len(ids) - first)


def encode(tokenizer, record: Row, think: str = "<think>") -> tuple[list[int], list[int]] | None:
    """Token ids and assistant mask of a record rendered with the chat template, or None where it must be dropped.

    A tokenizer that knows `think` is treated as in the paper; any other gets the mask of what the template adds after
    the generation prompt. Raises DataError where the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "The tokenizer has no chat template; give it one (tokenizer.chat_template) or choose an instruction-tuned tokenizer."
        )
    rendered = render(record)
    if rendered is None:
        return None
    messages, options = rendered
    ids = tokenizer(tokenizer.apply_chat_template(messages, **options), add_special_tokens=False)["input_ids"]
    start = tokenizer.convert_tokens_to_ids(think)
    if start is not None and start != tokenizer.unk_token_id and start in ids:
        return ids, assistant_mask(ids, start)
    prompt = tokenizer.apply_chat_template(messages[:-1], **{**options, "add_generation_prompt": True})
    length = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return ids, [0] * length + [1] * (len(ids) - length)


def mismatches(best: Sequence[int], tokens: Sequence[int], data_ids: Sequence[int]) -> list[int]:
    """1 where the prediction at a position is not the next token of the same sample; 0 at each sample's last position."""
    following = zip(best, tokens[1:], data_ids, data_ids[1:], strict=False)
    found = [int(guess != token) if here == there else 0 for guess, token, here, there in following]
    return [*found, 0][: len(tokens)]


class LabelStrategy(Settings):
    """Which positions count as hard (old `iter_count_strategy`); ratios are shares of a record's supervised tokens."""

    name: Literal["mismatch", "nonmismatch", "random", "top_entropy", "top_ce", "ds_divergence", "divergent", "all", "maxiter", "copy"] = (
        "mismatch"
    )
    random_token_ratio: float = Field(0.1, ge=0, le=1)
    top_entropy_ratio: float = Field(0.1, ge=0, le=1)
    top_ce_ratio: float = Field(0.1, ge=0, le=1)
    top_ds_ratio: float = Field(0.1, ge=0, le=1)


RANKED = {
    "top_entropy": ("entropy", "top_entropy_ratio"),
    "top_ce": ("cross_entropy", "top_ce_ratio"),
    "ds_divergence": ("ds_divergence", "top_ds_ratio"),
}


def hard_marks(row: Row, strategy: LabelStrategy, max_iter: int = 2, seed: int = 0) -> list[int]:
    """The mismatch column that `strategy` makes of a labelled row: 0 easy, 1 hard, larger = extra passes already counted."""
    mask, name = row["mask"], strategy.name
    supervised = [index for index, own in enumerate(mask) if own]
    if name in ("mismatch", "copy"):
        return list(row["mismatch"])
    if name == "nonmismatch":
        return [int(not value) for value in row["mismatch"]]
    if name in ("all", "maxiter"):
        return [1 if name == "all" else max(max_iter - 1, 1)] * len(mask)
    if name == "divergent":
        return list(_column(row, "divergent"))
    if name == "random":
        chosen = random.Random(f"{seed}-{row.get('data_id', 0)}").sample(supervised, int(len(supervised) * strategy.random_token_ratio))
    else:
        column, ratio = RANKED[name]
        values = _column(row, column)
        chosen = sorted(supervised, key=lambda index: -values[index])[: int(len(supervised) * getattr(strategy, ratio))]
    marked = set(chosen)
    return [int(index in marked) for index in range(len(mask))]


def _column(row: Row, name: str) -> Sequence:
    if name not in row:
        raise DataError(f"The labelled data has no column {name!r}; it has {', '.join(sorted(row))}. Label it again with that column.")
    return row[name]


def binned_counts(marks: Sequence[int], cross_entropy: Sequence[float], max_iter: int) -> list[int]:
    """Extra passes of hard tokens by the rank of their cross-entropy, in max_iter − 1 equal bins: the hardest get the most."""
    hard = sorted((index for index, mark in enumerate(marks) if mark), key=lambda index: -cross_entropy[index])
    extra, bins = [0] * len(marks), max_iter - 1
    for rank, index in enumerate(hard):
        extra[index] = bins - rank * bins // len(hard)
    return extra


def build_example(
    input_ids: Sequence[int],
    prompt_mask: Sequence[int],
    mismatch_mask: Sequence[int] | None,
    max_iter: int = 2,
    max_length: int | None = None,
    truncate: bool = True,
    query_iter_count: int = 1,
    seed: int = 0,
    align: str = "token",
) -> dict[str, list[int]] | None:
    """One training example, or None where nothing is supervised or it is too long and may not be cut.

    Args:
        prompt_mask: 1 where the token is supervised. mismatch_mask: 1 = hard (a count drawn from 2 … max_iter by `seed`);
            any value above 1 means the column holds extra passes already (count = value + 1).
        query_iter_count: the count of prompt positions.
        align: a position may count as hard where its own token is supervised ("token", as published), or where the token it
            predicts is ("target").
    """
    length = len(input_ids) if max_length is None else min(max_length, len(input_ids))
    if length < len(input_ids) and not truncate:
        return None
    ids, mask = list(input_ids[:length]), list(prompt_mask[:length])
    marks = [0] * length if mismatch_mask is None else list(mismatch_mask[:length])
    if not any(mask):
        return None
    draw, counted = random.Random(seed), max(marks, default=0) > 1
    hard = [mark + 1 if counted else draw.randint(2, max(max_iter, 2)) if mark else 1 for mark in marks]
    counted_at = mask if align == "token" else [*mask[1:], 0]
    counts = [min(count, max_iter) if own else query_iter_count for count, own in zip(hard, counted_at, strict=True)]
    labels = [token if own else IGNORE for token, own in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "attention_mask": [1] * length, "labels": labels, "iter_count_labels": counts}


def keeps(row: Row, max_length: int | None = None) -> bool:
    """Whether a labelled row has a supervised token and a supervised mismatch inside the window (the paper's prefilter)."""
    mask, marks = row["mask"][:max_length], row["mismatch"][:max_length]
    return any(mask) and any(own and mark for own, mark in zip(mask, marks, strict=True))


class ExampleSettings(Settings):
    """How labelled rows become examples (the `data` section of the published recipes)."""

    max_length: int | None = Field(None, ge=1)
    max_length_action: Literal["cutoff", "filter"] = "cutoff"
    query_iter_count: int = Field(1, ge=1)
    strategy: LabelStrategy = LabelStrategy()
    cross_entropy_bins: bool = True
    prefilter: bool = True
    align: Literal["token", "target"] = "token"
    seed: int = 0


def build_examples(rows: Iterable[Row], settings: ExampleSettings, max_iter: int = 2) -> list[dict[str, list[int]]]:
    """Training examples of labelled rows; what is dropped is counted in the log. Raises DataError if no hard token is left."""
    kept, dropped, hard = [], 0, 0
    for number, row in enumerate(rows):
        example = _example(row, settings, max_iter, number)
        if example is None:
            dropped += 1
            continue
        kept.append(example)
        hard += sum(count > 1 for count in example["iter_count_labels"])
    log.info("%d examples, %d dropped (nothing supervised, nothing hard or too long), %d hard tokens.", len(kept), dropped, hard)
    if not hard and max_iter > 1:
        hint = "there is nothing to think about twice. Use another reference model or strategy."
        raise DataError(f"Not a single hard token in {len(kept) + dropped} labelled rows: {hint}")
    return kept


def _example(row: Row, settings: ExampleSettings, max_iter: int, number: int) -> dict[str, list[int]] | None:
    seed = hash((settings.seed, number))
    marks = hard_marks(row, settings.strategy, max_iter, settings.seed)
    where = row["mask"] if settings.align == "token" else [*row["mask"][1:], 0]
    if settings.prefilter and not keeps({"mask": where, "mismatch": marks}, settings.max_length):
        return None
    if max_iter > 2 and settings.cross_entropy_bins and "cross_entropy" in row and max(marks, default=0) == 1:
        own = [mark and keep for mark, keep in zip(marks, where, strict=True)]
        marks = binned_counts(own, row["cross_entropy"], max_iter)
    truncate = settings.max_length_action == "cutoff"
    window = (max_iter, settings.max_length, truncate, settings.query_iter_count)
    return build_example(row["real_token"], row["mask"], marks, *window, seed, settings.align)


PADS = {"attention_mask": 0, "labels": IGNORE, "iter_count_labels": IGNORE}


def collate(examples: Sequence[dict[str, Sequence[int]]], pad_id: int = 0, side: str = "right") -> dict[str, Tensor]:
    """Examples padded to the longest: ids with `pad_id`, masks with 0, labels and iteration labels with -100, on `side`."""
    width = max(len(example["input_ids"]) for example in examples)
    batch = {}
    for name in examples[0]:
        fill = PADS.get(name, pad_id)
        pads = [[fill] * (width - len(example[name])) for example in examples]
        rows = zip(pads, examples, strict=True)
        batch[name] = torch.tensor([[*pad, *e[name]] if side == "left" else [*e[name], *pad] for pad, e in rows])
    return batch


def shard_range(total: int, shards: int, index: int) -> tuple[int, int]:
    """[start, end) of shard `index` when `total` records are split into near-equal `shards`, the first ones longer by one."""
    if not 0 <= index < shards:
        raise SettingsError(f"Shard {index} does not exist; there are {shards}, counted from 0.")
    size, longer = divmod(total, shards)
    start = index * size + min(index, longer)
    return start, start + size + (index < longer)


def choose_generation(record: Row, count_tokens: Callable[[str], int], limit: int = 8192) -> Row | None:
    """The shortest verified generation of an OpenR1-Math record as {question, generation, num_tokens}, or None (spec 6.2).

    math-verify's verdict decides; where it accepts none, or is missing, the judge model's does.
    """
    generations = record.get("generations") or []
    verdicts = [record.get(name) or [] for name in ("correctness_math_verify", "correctness_llama")]
    valid = next((good for good in ([g for g, ok in zip(generations, verdict, strict=False) if ok] for verdict in verdicts) if good), [])
    sized = sorted((count_tokens(text), index) for index, text in enumerate(valid))
    if not sized or sized[0][0] >= limit or not record.get("problem"):
        return None
    return {"question": record["problem"], "generation": valid[sized[0][1]], "num_tokens": sized[0][0]}


def split(records: Sequence[Row], train_share: float = 0.99, seed: int = 42) -> tuple[list[Row], list[Row]]:
    """Shuffled records in two parts, train first."""
    order = list(records)
    random.Random(seed).shuffle(order)
    cut = int(len(order) * train_share)
    return order[:cut], order[cut:]
