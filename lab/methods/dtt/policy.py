"""Gated models at inference: what is read is the token just said, or the state that said it (`dtt.md` 2.3, 2.6)."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lab.errors import SettingsError, TrainingError
from lab.latent.draws import Stream
from lab.latent.edit import Mix
from lab.latent.loop import Budget
from lab.latent.policy import Policy, Rows
from lab.latent.record import Ask, Response, Responses, respond
from lab.latent.sampling import Sampling
from lab.methods.dtt.config import BOT, EOT, MARKER
from lab.methods.dtt.gate import noise_of, residual
from lab.methods.dtt.model import SparseGatedModel
from lab.methods.dtt.reward import find_span

RECORDED = ("gate", "gate_logit", "gate_noise")


class Marker:
    """Finds a run of `count` equal characters in what rows write, token by token, wherever tokens are cut.

    `table` (V, 4): characters before the first and after the last other one, length of a token made of nothing else, and 1
    where the token holds the whole run.
    """

    def __init__(self, tokenizer, device, text: str = MARKER):
        if tokenizer is None:
            raise SettingsError(f"HRPO's gate ends at {text!r}: it needs the model's tokenizer.")
        self.count, char = len(text), text[0]
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        rows = [self._of(piece or "", char, text) for piece in pieces]
        self.table = torch.tensor(rows, device=device)

    @staticmethod
    def _of(piece: str, char: str, text: str) -> tuple[int, int, int, int]:
        lead, tail = len(piece) - len(piece.lstrip(char)), len(piece) - len(piece.rstrip(char))
        return lead, tail, len(piece) if lead == len(piece) else 0, int(text in piece)

    def step(self, token: Tensor, run: Tensor) -> tuple[Tensor, Tensor]:
        """(rows in which the run is complete with this token, the run each row's text now ends with)."""
        lead, tail, whole, has = self.table[token.clamp(max=len(self.table) - 1)].unbind(-1)
        return (has > 0) | (lead > 0) & (run + lead >= self.count), torch.where(whole > 0, run + whole, tail)


class GatedPolicy(Policy):
    """Tokens are said as usual; the gate decides what is read of them.

    Notes `state`, `noise` (uniform numbers), `gate`, `gate_logit`, `gate_noise` (what is added to the logit) and `open`.

    Args:
        drawn: gates are drawn; False takes the likelier side.
    """

    def __init__(self, model: SparseGatedModel, sampling: Sampling | None = None, drawn: bool = True):
        s = model.config
        super().__init__(model.decoder, (s.eos_id,) if s.eos_id >= 0 else (), sampling)
        self.gate, self.s, self.drawn = model.gate, s, drawn
        self.marker = Marker(model.tokenizer, model.device) if s.gate == "hrpo" else None
        self.open = self.run = self.inside = self._logits = self._mixed = None

    def begin(self, rows: Rows) -> None:
        self.open, self.run = torch.ones_like(rows.pos, dtype=torch.bool), torch.zeros_like(rows.pos)
        self.inside = torch.full_like(self.open, self.s.bot_in_prompt or self.marker is not None)

    def logits(self, rows: Rows) -> Tensor:
        self._logits = super().logits(rows)
        return self._logits

    def read(self, token: Tensor, rows: Rows) -> Tensor:
        embedding, state = self.decoder.embed(token), self._state(rows)
        uniform = rows.draws.uniform(rows.said, Stream.GATE) if self.drawn and self.s.gate == "dtt" else None
        mixed, open_ = self.gate(embedding, state, uniform), self._still_open(token, rows)
        self._mixed = (embedding, mixed, open_)
        for name, value in (("state", state), ("noise", uniform), ("gate_logit", mixed.logit), ("open", open_)):
            if value is not None:
                rows.note(name, value)
        if uniform is not None and rows.wants("gate_noise"):
            rows.note("gate_noise", noise_of(uniform, self.s.noise))
        rows.note("gate", mixed.gate if self.marker is None else mixed.gate * open_)
        return mixed.x if self.marker is None else torch.where(open_[:, None], mixed.x, embedding)

    def mixed(self, token: Tensor, rows: Rows) -> Mix:
        """Thoughts are what open gates let in between [bot] and [eot], of HRPO before the marker."""
        embedding, mixed, open_ = self._mixed
        inside = self.inside[rows.index] & (token != self.s.eot_id)
        self.inside[rows.index] = inside | (token == self.s.bot_id)
        return Mix(inside & open_ & (mixed.gate > 0), self.gate.without(embedding, mixed), embedding)

    def _state(self, rows: Rows) -> Tensor:
        if self.marker is None:
            return rows.h
        return residual(self._logits, self.decoder.table.weight, self.s.residual_temperature, self.s.residual_topk)

    def _still_open(self, token: Tensor, rows: Rows) -> Tensor:
        """(R,) bool: whether this token may be mixed; HRPO's span ends with the marker."""
        if self.marker is None:
            return self.open[rows.index]
        found, self.run[rows.index] = self.marker.step(token, self.run[rows.index])
        self.open[rows.index] &= ~found
        return self.open[rows.index]


class GatedResponses(Responses):
    """Answers whose tokens carry their gate, its logit and its noise; between [bot] and [eot], themselves special, they are thoughts."""

    def _tokens(self, row: Response):
        gates = {name: row.channels.get(name, []) for name in RECORDED}
        roles, first = self._roles(row), len(row.prompt)
        for token in super()._tokens(row):
            place = token["pos"] - first
            role = roles.get(place, token["role"])
            read = {name: values[place] for name, values in gates.items() if 0 <= place < len(values)}
            yield token | {"role": role} | {name: read.get(name, float("nan")) for name in gates}

    def _roles(self, row: Response) -> dict[int, str]:
        """Place in the answer -> role, of everything from [bot] to [eot]."""
        vocabulary = {} if self.tokenizer is None else self.tokenizer.get_vocab()
        bot, eot = vocabulary.get(BOT, -1), vocabulary.get(EOT, -1)
        span = find_span(row.ids, bot, eot, in_prompt=bool(row.prompt) and row.prompt[-1] == bot)
        inside = range(span.bot + 1, span.eot) if span else ()
        marks = {place: "special" for place, token in enumerate(row.ids) if token in (bot, eot)}
        return dict.fromkeys(inside, "thought") | marks


def generate(
    model: SparseGatedModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    drawn: bool = False,
    **ask: Any,
) -> GatedResponses:
    """Answers to texts, `Example`s or ids; see `lab.latent.record.Ask` for the other arguments.

    Args:
        drawn: gates are drawn, as in training; by default the likelier side is taken, so that greedy answers are reproducible.
    """
    prompts = [model.prompt(question) for question in questions]
    model.check_prompts(prompts, max_new_tokens)
    policy = GatedPolicy(model, sampling, drawn)
    channels = tuple(dict.fromkeys((*RECORDED, *ask.pop("channels", ()))))
    asked = Ask(samples=samples, budget=Budget(answer=max_new_tokens), channels=channels, **ask)
    done = respond(model, prompts, lambda group: policy, asked)
    check_gates([value for row in done.rows for value in row.channels.get("gate", [])[: len(row.ids)]])
    rows = [_with_marks(row, model) for row in done.rows]
    return GatedResponses(**{f.name: getattr(done, f.name) for f in fields(done)} | {"rows": rows})


def _with_marks(row: Response, model: SparseGatedModel) -> Response:
    """The same with [bot] and [eot] written out in its text."""
    return row if model.tokenizer is None else replace(row, text=model.tokenizer.decode(row.ids))


def check_gates(values: Sequence[float] | Tensor) -> None:
    """TrainingError where a gate is not a number."""
    found = torch.as_tensor(values)
    if bool(found.isnan().any()):
        raise TrainingError(
            f"{int(found.isnan().sum())} gates are NaN: the states or the gate's weights have diverged. Load an earlier checkpoint, "
            "and lower the gate's learning rate."
        )
