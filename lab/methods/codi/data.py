"""Text → (teacher, student) rows (`distill.md` 2A.2, 6)."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lab.data.examples import Example
from lab.errors import SettingsError
from lab.latent.plan import IGNORE, Kept, Row
from lab.methods.codi.config import CodiSettings

PREFIX = "The answer is:"
CUT = 256  # tokens a piece may have

PairOfRows = tuple[Row, Row]


class Pieces(NamedTuple):
    """The three texts of an example, and why it cannot be used ("" if it can)."""

    question: str
    cot: str
    answer: str
    reason: str = ""


def question_text(question: str, s: CodiSettings, training: bool = False) -> str:
    """The question as it is read; the official code ends it with a line break in training only (`distill.md` 7, A8)."""
    text = question if s.raw_question else question.strip().replace("  ", " ")
    line_end = not s.data_name.startswith("icot") and (training or not s.compat)
    return text + "\n" if line_end else text


def pieces(example: Example, s: CodiSettings) -> Pieces:
    """Question, written reasoning and answer of an example in the form of its data set."""
    question, answer = question_text(example.question, s, training=True), str(example.answer).strip()
    if s.data_name.startswith("icot"):
        answer = answer.split(" ")[-1]
        if not answer[:1].isdigit():
            return Pieces(question, "", answer, "the answer is no number without a sign")
    if not answer or not question.strip():
        return Pieces(question, "", answer, "no question or no answer")
    return Pieces(question, _cot(example, s), answer)


def _cot(example: Example, s: CodiSettings) -> str:
    whole = example.extra.get("cot") or " ".join(example.steps)
    if s.data_name == "icot":
        steps = whole.split(" ")
        return " ".join(steps if s.include_last_cot else steps[:-1])
    if s.data_name == "icot-full":
        sentences = whole.split(". ")
        text = ". ".join(sentences if s.include_last_cot else sentences[:-1])
        return text + ".\n" if text else ""
    if s.data_name == "prontoqa":
        return "\n".join(example.steps[:-1]) + "\n"
    return whole.strip() + "\n"


def prepare(examples: Iterable[Example], tokenizer, s: CodiSettings, family: str = "") -> Kept[PairOfRows]:
    """Rows of all usable examples; the others are dropped, counted and named.

    Args:
        family: model type, which decides the target under compat = "codi".
    """
    kept: Kept[PairOfRows] = Kept()
    for example in examples:
        texts = pieces(example, s)
        row, reason = (None, texts.reason) if texts.reason else rows_of(texts, tokenizer, s, family)
        kept.add(example.id, row, reason)
    return kept.checked()


def rows_of(texts: Pieces, tokenizer, s: CodiSettings, family: str = "") -> tuple[PairOfRows | None, str]:
    """The teacher's and the student's row, or None and the reason."""
    question = list(tokenizer(texts.question).input_ids)
    cot = list(tokenizer(texts.cot, add_special_tokens=False).input_ids) if texts.cot else []
    written = f"{PREFIX} {texts.answer}"
    if len(question) + len(cot) + len(tokenizer(written, add_special_tokens=False).input_ids) > s.max_token_num:
        return None, f"longer than {s.max_token_num} tokens"
    if (PREFIX in texts.cot) or (PREFIX in texts.question) or (PREFIX in texts.answer):
        return None, f"{PREFIX!r} stands in it more than once"
    answer, target = answer_ids(written, tokenizer, s, family)
    if target is None:
        return None, "no token ends before the answer"
    if max(len(question), len(cot), len(answer)) > CUT:
        if not s.compat:
            return None, f"a part of it has more than {CUT} tokens"
        question, cot = question[:CUT], cot[:CUT]
    return pair(question, cot, answer, target, s), ""


def pair(question: Sequence[int], cot: Sequence[int], answer: Sequence[int], target: int, s: CodiSettings) -> PairOfRows:
    """Rows from ids; `target` is the place in `answer` whose states are compared."""
    end = [s.eos_id]
    question, cot = (tuple(question), tuple(cot)) if s.remove_eos else ((*question, *end), (*cot, *end))
    spoken = (*answer, *end)
    teacher = Row(question, cot + spoken, (IGNORE,) * len(question) + cot + spoken, target=len(cot) + target)
    labels = (IGNORE, IGNORE, *s.closing[1:], *spoken)
    return teacher, Row((s.bot_id,), (*s.closing, *spoken), labels, s.num_latent, target=len(s.closing) + target)


def answer_ids(written: str, tokenizer, s: CodiSettings, family: str = "") -> tuple[list[int], int | None]:
    """Ids of "The answer is: …" and the place of the token whose next prediction is the answer's first token.

    That is the last token that ends before the answer's first character (`distill.md` 7, A5). Under compat it is the last token of
    the prefix, or the one after it for Llama and Qwen, whatever stands there.
    """
    if s.compat:
        ids = list(tokenizer(written, add_special_tokens=False).input_ids)[:CUT]
        prefix = list(tokenizer(PREFIX, add_special_tokens=False).input_ids)
        place = next((i for i in range(len(ids)) if ids[i : i + len(prefix)] == prefix), None)
        return ids, None if place is None else place + len(prefix) - 1 + ("llama" in family or "qwen" in family)
    if not tokenizer.is_fast:
        raise SettingsError("This tokenizer gives no character offsets, which the target is found by; use its fast version.")
    encoded = tokenizer(written, add_special_tokens=False, return_offsets_mapping=True)
    begin = len(PREFIX) + 1
    before = [i for i, (_, end) in enumerate(encoded.offset_mapping) if end <= begin]
    return list(encoded.input_ids), before[-1] if before else None


def official_example(rows: PairOfRows, s: CodiSettings) -> dict[str, list[int]]:
    """The lists the official preprocessing stores for an example."""
    teacher, student = rows
    ref = [*teacher.prompt, *teacher.after]
    return {
        "encoder_input_ids": [*teacher.prompt, *student.prompt],
        "decoder_input_ids": list(student.after),
        "labels": list(student.after),
        "ref_input_ids": ref,
        "ref_labels": [IGNORE] * len(teacher.prompt) + list(teacher.after),
    }
