"""Adaptive thinking at inference: the two-way head goes on or stops, END is read, the vocabulary head answers (distill.md 2B.6)."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lab.errors import SettingsError
from lab.latent.draws import Stream
from lab.latent.loop import Budget
from lab.latent.policy import Phase, Policy, Rows
from lab.latent.record import Ask, Responses, respond
from lab.latent.sampling import Sampling, draw
from lab.methods.adaptive.config import COLON, MARKER, AdaptiveSettings
from lab.methods.adaptive.data import Writer
from lab.methods.adaptive.model import AdaptiveModel, Thinker

log = logging.getLogger(__name__)

CHANNELS = ("stop_prob",)


class Adaptive(Policy):
    """Stops when the head says so, or (`count`) after a given number of thoughts.

    Notes `stop_prob` (R, T + 1), `stop` (1 where it stopped) and `decision` (its log-probability) for each decision, in order.

    Args:
        thinker: the decoder with the method's reading of the special tokens.
        temperature: of the head; None = that of `sampling`. count: thoughts to make whatever the head says.
        forced: ids that every answer begins with. multi: START in an answer begins another thought, and
            unused ids may be said (official behaviour).
    """

    def __init__(
        self,
        thinker: Thinker,
        stops: Sequence[int],
        *,
        sampling: Sampling | None = None,
        temperature: float | None = None,
        count: int | Tensor | None = None,
        forced: Sequence[int] = (),
        multi: bool = False,
    ):
        s, sampling = thinker.s, sampling or Sampling()
        banned = () if multi else tuple(i for i in (*s.unused, s.start) if i >= 0)
        super().__init__(thinker, tuple(stops), sampling, banned, (s.end,), Phase.THINK)
        self.thinker, self.count, self.multi = thinker, count, multi
        self.forced = torch.tensor([*forced, -1], device=thinker.table.weight.device)
        self.temperature = sampling.temperature if temperature is None else temperature

    def halt(self, rows: Rows) -> Tensor:
        """(R,) bool; a tie goes on, as the smaller id wins in the official argmax."""
        choice = self.thinker.decide(rows.h).float()
        logs = torch.log_softmax(choice / (self.temperature or 1.0), -1)
        place, greedy = rows.thoughts + rows.closed, self.temperature == 0
        stop = choice[:, 1] > choice[:, 0] if greedy else rows.draws.uniform(place, Stream.STOP) < logs[:, 1].exp()
        if self.count is not None:
            count = self.count if isinstance(self.count, int) else self.count[rows.index]
            stop = torch.where(rows.closed == 0, rows.thoughts >= count, stop)
        rows.note("stop_prob", logs[:, 1].exp(), place)
        rows.note("stop", stop.float(), place)
        rows.note("decision", torch.where(stop, logs[:, 1], logs[:, 0]), place)
        return stop

    def thought(self, rows: Rows) -> Tensor:
        return self.thinker.feedback(rows.h)

    def read(self, token: Tensor, rows: Rows) -> Tensor:
        """Input of tokens; END, with the last thought in it where the model was trained so."""
        x = super().read(token, rows)
        if not self.thinker.s.add_latent_to_end:
            return x
        ending = (rows.phase == Phase.CLOSE) & (token == self.thinker.s.end)
        return torch.where(ending[:, None], self.thinker.closing(rows.h), x)

    def say(self, rows: Rows) -> Tensor:
        """(R,) the next token; the constant start of the answer where it is forced. Notes `logprob`."""
        if len(self.forced) == 1:
            return super().say(rows)
        logits = self.logits(rows)
        uniform = None if self.sampling.greedy else rows.draws.uniform(rows.said, Stream.TOKEN)
        token, logprob = draw(logits, self.sampling, uniform)
        forced = self.forced[rows.said.clamp(max=len(self.forced) - 1)]
        given = torch.log_softmax(logits.float(), -1).gather(1, forced.clamp(min=0)[:, None])[:, 0]
        rows.note("logprob", torch.where(forced >= 0, given, logprob))
        return torch.where(forced >= 0, forced, token)

    def resumes(self, token: Tensor, rows: Rows) -> Tensor | None:
        if not self.multi:
            return None
        rows.note("decided", (rows.thoughts + rows.closed).float())
        return token == self.thinker.s.start


def policy(model: AdaptiveModel, sampling: Sampling | None = None, *, count: int | None = None, multi: bool = False) -> Policy:
    """The policy of `model`: thinking, or plain for a text model.

    Args:
        count: the number of thoughts, instead of asking the head; the constant start of the answer is then forced.
    """
    s, stops = model.config, [model.tokenizer.eos_token_id]
    if not s.latent:
        return Policy(model.thinker, tuple(stops), sampling, tuple(s.unused))
    forced = [] if count is None else [*Writer(model.tokenizer, s).piece(MARKER), *Writer(model.tokenizer, s).piece(COLON)]
    return Adaptive(model.thinker, stops, sampling=sampling, count=count, forced=forced, multi=multi)


def generate(
    model: AdaptiveModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    thoughts: int | None = None,
    max_thoughts: int | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int = 64,
    compat: bool = False,
    **ask: Any,
) -> Responses:
    """Answers to texts, `Example`s or ids; see `lab.latent.record.Ask` for the other arguments.

    Args:
        thoughts: this many, whatever the head says (the official count override); None asks the head, or takes the count the
            model was trained with where its head never was.
        max_thoughts: where a row is stopped if the head does not; None = twice the largest count in training.
        compat: the official behaviour: no "Question: " before the question, several thoughts, unused ids allowed.
    """
    s = model.config
    if note := warning(model, thoughts):
        log.warning(note)
    count = given_count(s, thoughts)
    if count is not None and count < 0:
        raise SettingsError(f"thoughts = {count}: it must be 0 or more.")
    if count is not None and not s.latent:
        raise SettingsError("This model answers in text and makes no thoughts; leave `thoughts` out.")
    writer = Writer(model.tokenizer, s)
    prompts = [_prompt(writer, question, "" if compat else None) for question in questions]
    most = count if count is not None else s.cap if max_thoughts is None else max_thoughts
    most += max_new_tokens if compat else 0
    channels = (*CHANNELS, *ask.pop("channels", ()), *(("decision", "stop", "decided") if compat else ())) if s.latent else ()
    asked = Ask(samples=samples, budget=Budget(thoughts=max(1, most), answer=max_new_tokens), channels=channels, **ask)
    return respond(model, prompts, lambda group: policy(model, sampling, count=count, multi=compat), asked)


def given_count(s: AdaptiveSettings, thoughts: int | None) -> int | None:
    """The number of thoughts made whatever the head says (the answer's constant start is then forced), or None: the head decides."""
    return thoughts if thoughts is not None or s.head_trained is not False else s.fixed_count


def _prompt(writer: Writer, question: Any, prefix: str | None) -> list[int]:
    if not isinstance(question, str) and not hasattr(question, "question"):
        return [int(i) for i in question]
    return writer.prompt(question if isinstance(question, str) else question.question, prefix=prefix)


def official_ids(row: Any, model: AdaptiveModel) -> list[int]:
    """The ids the official code would have said for a response of `generate(compat=True)`: decisions and tokens in their order."""
    s, before = model.config, row.channels.get("decided", [])
    decided = [s.stop if stop else s.go_on for stop in row.channels["stop"] if stop == stop]
    return in_order(row.ids, before[: len(row.ids)], decided)  # the end token is decided about too, but not kept


def in_order(said: Sequence[Any], before: Sequence[float], decided: Sequence[Any]) -> list[Any]:
    """What belongs to tokens and what belongs to decisions in one row; `before` is how many decisions precede each token."""
    row, at = [], 0
    for one, count in zip(said, map(int, before), strict=True):
        row += [*decided[at:count], one]
        at = count
    return row + list(decided[at:])


def warning(model: AdaptiveModel, thoughts: int | None = None) -> str:
    """What a reader of results must know about the number of thoughts, or ""."""
    s = model.config
    if not s.latent:
        return ""
    if thoughts is None and s.head_trained is False and s.fixed_count is None:
        return "The stop head of this checkpoint was never trained: its number of thoughts is arbitrary. Set the number with thoughts=…."
    if thoughts is None and s.head_trained is False:
        return f"The stop head of this checkpoint was never trained, so it always makes {s.fixed_count} thoughts."
    if thoughts is not None and s.most_trained and thoughts > s.most_trained:
        return f"{thoughts} thoughts are more than the {s.most_trained} of training; such results are marked."
    return ""
