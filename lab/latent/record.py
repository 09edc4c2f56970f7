"""From prompts to answers to a trace, for every method that thinks at extra positions.

`respond` runs a policy over prompts in batches of like length and returns `Responses`; results do not depend on the batch.
`Watched` keeps the state each thought was made of, so that thoughts can be read with the vocabulary head.
Axes: R rows, T thoughts, D width, V vocabulary, K candidates.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lab.errors import SettingsError
from lab.latent.draws import Draws, Keyed
from lab.latent.edit import Edit, Editing
from lab.latent.loop import FINISH, Budget, DropoutRegime, Prompt, Rollout, rollout
from lab.latent.policy import Policy, Rows
from lab.models.vocab import chunks
from lab.trace import Trace

NAN = float("nan")


class Watched:
    """A policy whose states are noted as `state`, (R, T + 1, D): the one each thought was made of, and the one after the last thought."""

    def __init__(self, policy: Policy):
        self._policy = policy

    def __getattr__(self, name: str):
        return getattr(self._policy, name)

    def halt(self, rows: Rows) -> Tensor | None:
        rows.note("state", rows.h)
        return self._policy.halt(rows)


@dataclass(frozen=True)
class Candidates:
    """The `k` likeliest tokens at each state: `ids` and `probs` (R, T + 1, K)."""

    ids: Tensor
    probs: Tensor


@torch.no_grad()
def read_states(decoder, states: Tensor, k: int) -> Candidates:
    """Top candidates of states (R, T, D) under the vocabulary head; NaN states give NaN probabilities."""
    flat = states.flatten(0, -2)
    width = decoder.table.weight.shape[0]
    parts = [
        torch.softmax(decoder.logits(flat[rows]).float(), -1).topk(min(k, width), -1) for rows in chunks(len(flat), width, flat.device)
    ]
    shape = (*states.shape[:-1], -1)
    return Candidates(torch.cat([p.indices for p in parts]).view(shape), torch.cat([p.values for p in parts]).view(shape))


@dataclass(frozen=True)
class Response:
    """One answer: question and sample number, ids of prompt and answer, log-probability of each, how it ended, text.

    Attributes:
        thoughts: how many were made; `capped`: they were ended by the budget. norms: L2 norm of each.
        similarity: cosine of each with the one before it, NaN for the first.
        top: (texts, probabilities) of the candidates at each state, where they were asked for.
        channels: what else the policy noted per thought, name -> numbers.
    """

    question: int
    sample: int
    prompt: list[int]
    ids: list[int]
    logprobs: list[float]
    finish: str
    text: str
    thoughts: int = 0
    capped: bool = False
    norms: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    top: list[tuple[list[str], list[float]]] = field(default_factory=list)
    channels: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Responses:
    """The answers to a list of questions, ordered by question and sample; `vectors` [i] (T, D) are the thoughts of row i if kept."""

    method: str
    rows: list[Response]
    tokenizer: Any = None
    vectors: list[Tensor] = field(default_factory=list)
    passes: int = 0

    @property
    def texts(self) -> list[str]:
        """The text of each answer."""
        return [row.text for row in self.rows]

    def trace(self, examples: Sequence[Any] = (), score: Callable[[str, str], Any] | None = None, **meta: Any) -> Trace:
        """The record that views read.

        Args:
            examples: what the questions were; gives prompt, gold answer and steps.
            score: (text, gold) -> something with `strict_answer` and `strict_correct`.
        """
        parts = {"samples": [], "tokens": [], "thoughts": []}
        first = min((row.question for row in self.rows), default=0)
        for row in self.rows:
            example = examples[row.question - first] if len(examples) else None
            parts["samples"].append(self._sample(row, example, score))
            parts["tokens"] += self._tokens(row)
            parts["thoughts"] += self._thoughts(row)
        return Trace.build(self.method, **parts, meta=meta)

    def _sample(self, row: Response, example: Any, score: Callable | None) -> dict[str, Any]:
        sample = {"question": row.question, "sample": row.sample, "text": row.text, "finish": row.finish, "latents": row.thoughts}
        sample |= {"prompt": self._text(row.prompt), "capped": float(row.capped)}
        if not hasattr(example, "answer"):
            return sample
        sample |= {"prompt": example.question, "gold": example.answer, "steps": list(example.steps)}
        if score is not None:
            found = score(row.text, example.answer)
            sample |= {"answer": found.strict_answer or "", "correct": bool(found.strict_correct)}
        return sample

    def _tokens(self, row: Response) -> Iterator[dict[str, Any]]:
        probs = [min(1.0, float(torch.tensor(value).exp())) for value in row.logprobs]
        pieces = [(i, self._text([i]), "prompt", NAN) for i in row.prompt]
        pieces += [(-1, f"[thought {step + 1}]", "thought", NAN) for step in range(row.thoughts)]
        pieces += [(i, self._text([i]), "answer", p) for i, p in zip(row.ids, probs or [NAN] * len(row.ids), strict=True)]
        for pos, (token, text, role, prob) in enumerate(pieces):
            key = {"question": row.question, "sample": row.sample, "pos": pos}
            yield key | {"id": token, "text": text, "role": role, "prob": prob, "iterations": 1}

    def _thoughts(self, row: Response) -> Iterator[dict[str, Any]]:
        for step in range(max(row.thoughts, len(row.top))):
            texts, probs = row.top[step] if row.top else ([], [])
            entry = {"question": row.question, "sample": row.sample, "step": step, "top_texts": texts, "top_probs": probs}
            entry["norm"] = row.norms[step] if step < len(row.norms) else NAN
            entry["similarity"] = row.similarity[step] if step < len(row.similarity) else NAN
            yield entry | {name: values[step] if step < len(values) else NAN for name, values in row.channels.items()}

    def _text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids)) if self.tokenizer is None else self.tokenizer.decode(ids)


@dataclass(frozen=True)
class Ask:
    """How to answer.

    Attributes:
        samples: answers a question. first, skip: number of the first question and of its first sample (draws are keyed by seed,
            question and sample).
        batch: most rows at a time. top: candidates to keep of each thought (0 = none). vectors: keep the thoughts themselves.
        channels: notes of the policy to keep per thought. dropout: a Monte Carlo dropout regime.
        wrap: from the method's policy to the one that runs (noise on its thoughts).
        sort: put prompts of like length into one batch; otherwise in the order given.
        draws: given ones of all rows, question-major, instead of those keyed by seed, question and sample.
        edit: changes thoughts as they are made.
    """

    samples: int = 1
    budget: Budget = Budget()
    seed: int = 0
    first: int = 0
    skip: int = 0
    batch: int = 64
    top: int = 0
    vectors: bool = False
    channels: tuple[str, ...] = ()
    dropout: DropoutRegime | None = None
    wrap: Callable[[Policy], Policy] | None = None
    sort: bool = True
    edit: Edit | None = None
    draws: Draws | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.batch < 1 or self.budget.answer < 1:
            raise SettingsError(
                f"samples = {self.samples}, batch = {self.batch}, answer budget = {self.budget.answer}: all must be at least 1."
            )


def respond(
    model,
    prompts: Sequence[Sequence[int]],
    policy: Callable[[list[int]], Policy],
    ask: Ask,
    prompt_of: Callable[[Any, list], Prompt] = Prompt.of_ids,
) -> Responses:
    """Answers to prompts (ids), the same whatever the batch.

    Args:
        model: with `decoder`, `tokenizer` and `method`.
        policy: from the numbers of a batch's questions (places in `prompts`) to the policy for them; a policy that needs a value
            per row repeats it `ask.samples` times.
        prompt_of: (decoder, prompts) -> what the loop reads.
    """
    found: list[tuple[Response, Tensor | None]] = []
    passes = 0
    lengths = [len(prompt) if ask.sort else 0 for prompt in prompts]
    for group in groups(lengths, max(1, ask.batch // ask.samples)):
        done, top = _run(model.decoder, policy(group), prompt_of(model.decoder, [prompts[i] for i in group]), group, ask)
        passes += done.passes
        found += _responses(model, prompts, group, done, top, ask)
    found.sort(key=lambda pair: (pair[0].question, pair[0].sample))
    vectors = [pair[1] for pair in found] if ask.vectors else []
    return Responses(model.method, [pair[0] for pair in found], model.tokenizer, vectors, passes)


def groups(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places of the prompts in batches of at most `size`, like lengths together."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _run(decoder, policy: Policy, prompt: Prompt, group: list[int], ask: Ask) -> tuple[Rollout, Candidates | None]:
    device = decoder.table.weight.device
    number = torch.tensor([ask.first + i for i in group for _ in range(ask.samples)], device=device)
    sample = torch.arange(ask.skip, ask.skip + ask.samples, device=device).repeat(len(group))
    draws, edit = Keyed.of(ask.seed, number, sample), None if ask.edit is None else Editing(ask.edit, number, sample)
    if ask.draws is not None:
        draws = ask.draws.select((number - ask.first) * ask.samples + sample - ask.skip)
    keep = ("thoughts", "logprob", *ask.channels, *(("state",) if ask.top else ()))
    policy = policy if ask.wrap is None else ask.wrap(policy)
    policy = Watched(policy) if ask.top else policy
    done = rollout(decoder, policy, prompt, ask.samples, draws, budget=ask.budget, dropout=ask.dropout, keep=keep, edit=edit)
    states = done.notes.get("state")
    return done, None if states is None else read_states(decoder, states, ask.top)


def _responses(
    model, prompts, group: list[int], done: Rollout, top: Candidates | None, ask: Ask
) -> Iterator[tuple[Response, Tensor | None]]:
    logprobs, counts, capped = done.notes["logprob"].tolist(), done.counts.tolist(), done.capped.tolist()
    thoughts = model.decoder.table.weight[:0].expand(len(counts), 0, -1) if done.thoughts is None else done.thoughts
    norms = thoughts.float().norm(dim=-1).tolist()
    similar = torch.nn.functional.cosine_similarity(thoughts[:, 1:].float(), thoughts[:, :-1].float(), dim=-1).tolist()
    for place, ids in enumerate(done.answers()):
        number, count = group[place // ask.samples], counts[place]
        yield (
            Response(
                question=ask.first + number,
                sample=ask.skip + place % ask.samples,
                prompt=list(prompts[number]),
                ids=ids,
                logprobs=logprobs[place][: len(ids)],
                finish=FINISH[int(done.finish[place])],
                text="" if model.tokenizer is None else model.tokenizer.decode(ids, skip_special_tokens=True),
                thoughts=count,
                capped=capped[place],
                norms=norms[place][:count],
                similarity=[NAN, *similar[place]][:count],
                top=[] if top is None else _candidates(model.tokenizer, top, place, count),
                channels={name: done.notes[name][place].tolist() for name in ask.channels if name in done.notes},
            ),
            thoughts[place, :count] if ask.vectors else None,
        )


def _candidates(tokenizer, top: Candidates, row: int, count: int) -> list[tuple[list[str], list[float]]]:
    """(texts, probabilities) at the states before and after each of the row's thoughts."""
    steps = zip(top.ids[row, : count + 1].tolist(), top.probs[row, : count + 1].tolist(), strict=True)
    return [([str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids], probs) for ids, probs in steps]
