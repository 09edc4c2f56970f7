"""The three rewards, each a function of its own: correctness, token efficiency, gate sparsity (`dtt.md` 2.4); HRPO's (2.6).

They score one completion's ids, counted from its first one; `rewards_of` makes what the trainer calls.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from lab.config import Settings
from lab.data.answers.official import hrpo_gsm8k
from lab.methods.dtt.config import MARKER, GatedSettings

Reward = Callable[..., list[float]]


class RewardSettings(Settings):
    """Weights of the parts."""

    lambda_penalty: float = Field(0.01, ge=0)  # for each reasoning token
    lambda_warmup: int = Field(0, ge=0)  # updates in which lambda_penalty rises to its value, so that reasoning is learned before it is cut
    gate_penalty_coeff: float = Field(0.05, ge=0)
    malformed: float = -0.5  # correctness without [bot] … [eot]; the seed document says 0


class Span(NamedTuple):
    """Places of [bot] (-1 where it is the prompt's last token) and [eot]."""

    bot: int
    eot: int

    @property
    def tokens(self) -> int:
        """Reasoning tokens between the two."""
        return self.eot - self.bot - 1


def find_span(ids: Sequence[int], bot: int, eot: int, in_prompt: bool = False) -> Span | None:
    """The first [bot] that has an [eot] after it, and that [eot]; None where there is none."""
    begin = -1 if in_prompt else next((place for place, token in enumerate(ids) if token == bot), None)
    if begin is None:
        return None
    end = next((place for place, token in enumerate(ids) if token == eot and place > begin), None)
    return None if end is None else Span(begin, end)


def correctness(ids: Sequence[int], span: Span | None, gold: str, decode: Callable[[list[int]], str], malformed: float = -0.5) -> float:
    """1 where the text after [eot] is the gold answer, 0 where not, `malformed` without a span."""
    if span is None:
        return malformed
    return float(decode(list(ids[span.eot + 1 :])).strip() == gold.strip())


def token_efficiency(span: Span | None) -> float:
    """Minus the number of reasoning tokens."""
    return -float(span.tokens) if span else 0.0


def gate_sparsity(gates: Sequence[float], span: Span | None, length: int) -> float:
    """Minus the mean squared distance of the gates from 1 after [bot] up to [eot], and from 0 elsewhere.

    Args:
        gates: of the first tokens; the last one written has none. length: tokens written.
    """
    if not gates:
        return -float(length > 0)
    errors = [(1 - g) ** 2 if span and span.bot < place <= span.eot else g**2 for place, g in enumerate(gates)]
    return -sum(errors) / len(errors)


def total(
    ids: Sequence[int], gates: Sequence[float], gold: str, decode: Callable[[list[int]], str], bot: int, eot: int, how: RewardSettings
):
    """The published sum for one completion."""
    span = find_span(ids, bot, eot)
    parts = (correctness(ids, span, gold, decode, how.malformed), token_efficiency(span), gate_sparsity(gates, span, len(ids)))
    return parts[0] + how.lambda_penalty * parts[1] + how.gate_penalty_coeff * parts[2]


def hrpo_reward(text: str, gold: str) -> float:
    """1 where the answer after `####` is the gold one and `####` stands there once."""
    return float(text.count(MARKER) == 1 and hrpo_gsm8k(text) == hrpo_gsm8k(gold))


def rewards_of(tokenizer, s: GatedSettings, how: RewardSettings) -> dict[Reward, float]:
    """Reward functions by weight, as `lab.rl.reinforce` takes them; they need a column `answer`."""

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True)

    def spans(rows: Sequence[Sequence[int]]) -> list[Span | None]:
        return [find_span(row, s.bot_id, s.eot_id, s.bot_in_prompt) for row in rows]

    def of_correctness(completion_ids: list, answer: list[str], **_: Any) -> list[float]:
        if s.gate == "hrpo":
            return [hrpo_reward(decode(row), gold) for row, gold in zip(completion_ids, answer, strict=True)]
        found = zip(completion_ids, spans(completion_ids), answer, strict=True)
        return [correctness(row, span, gold, decode, how.malformed) for row, span, gold in found]

    def of_tokens(completion_ids: list, trainer_state: Any = None, **_: Any) -> list[float]:
        risen = min(1.0, (trainer_state.global_step + 1) / how.lambda_warmup) if how.lambda_warmup else 1.0
        return [risen * token_efficiency(span) for span in spans(completion_ids)]

    def of_gates(completion_ids: list, gates: list[list[float]], **_: Any) -> list[float]:
        return [gate_sparsity(g, span, len(row)) for row, g, span in zip(completion_ids, gates, spans(completion_ids), strict=True)]

    named = {"correctness": of_correctness, "token_efficiency": of_tokens, "gate_sparsity": of_gates}
    for name, function in named.items():
        function.__name__ = name
    weights = (1.0, how.lambda_penalty, how.gate_penalty_coeff)
    return dict(zip(named.values(), weights, strict=True)) if s.gate == "dtt" else {of_correctness: 1.0}
