"""Generation with Think-at-Hard: what is decided about each token, and the answers with a record of every pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lab.errors import DataError, SettingsError, unknown
from lab.latent.depth import DeepRollout, Look, PassRecord, Start, deep_rollout, record
from lab.latent.draws import Keyed
from lab.latent.edit import Edit, Editing
from lab.latent.record import Response, Responses
from lab.latent.sampling import Sampling
from lab.methods.tah.config import AlwaysSettings, OracleSettings
from lab.methods.tah.deciders import AlwaysDecider, Decider, NeverDecider, OracleDecider, Seen
from lab.methods.tah.model import TahModel
from lab.methods.tah.passes import Batch
from lab.methods.tah.reference import Reference
from lab.models.inference import inference
from lab.models.tokenizers import stop_ids
from lab.models.vocab import token_statistics
from lab.trace import Trace

OFFICIAL = Sampling(temperature=0.6, top_p=0.95, top_k=20)
POLICIES = ("decider", "never", "always", "oracle")
FINISH = {0: "stop", 1: "length"}


def decider_for_policy(model: TahModel, policy: str, reference: Reference | None = None) -> Decider:
    """The decider of one of `POLICIES`: the model's own, none, every token, or a reference model's disagreement."""
    if policy == "decider":
        return model.active_decider()
    if policy == "never":
        return NeverDecider(model.tah.max_iter)
    if policy == "always":
        return AlwaysDecider(AlwaysSettings(max_iter=model.tah.max_iter))
    if policy == "oracle":
        if reference is None:
            raise SettingsError(
                "The oracle policy asks a reference model which tokens are wrong; hand one over as reference=Reference(backbone)."
            )
        return OracleDecider(OracleSettings(max_iter=model.tah.max_iter), reference)
    raise unknown("policy", policy, POLICIES)


class TahDepth:
    """The decisions of a model under one decider, for `deep_rollout`."""

    def __init__(self, model: TahModel, decider: Decider):
        self.decider, self.table, self.updater = decider, model.table, model.tah.updater()
        self.depths, self.taps, self.gated = min(model.tah.max_iter, decider.max_iter), decider.taps, model.lora is not None
        if isinstance(decider, NeverDecider):
            self.depths = 1
        self.additive, self.reference = model.tah.output_updater == "AdditiveLogitsUpdater", getattr(decider, "reference", None)

    def look(self, logits: Tensor, taps: dict[int, Tensor], depth: Tensor, rows: Tensor | None) -> Look:
        seen = Seen(1, len(logits), device=logits.device)
        top = ids = None
        if self.decider.topk:
            top, ids = logits.topk(min(max(self.decider.topk, self.updater.topk), logits.shape[-1]), dim=-1)
            seen.top = top[:, : self.decider.topk]
        if self.taps:
            seen.hidden = torch.stack([taps[layer] for layer in self.taps], dim=1)
        if self.decider.guesses:
            seen.guess, seen.wanted = logits.argmax(-1), self.reference.wanted if rows is None else self.reference.wanted[rows]
        again, logit = self.decider(seen)
        if self.decider.guesses:
            again = again & (depth == 0)
        return Look(again, logit.sigmoid() if self.decider.topk else again.float(), logits, top, ids)

    def update(self, look: Look, which: Tensor, h: Tensor) -> Tensor:
        if self.updater.use_hidden_states:
            return h
        k = min(self.updater.topk, look.logits.shape[-1])
        top, ids = look.logits[which].topk(k, dim=-1) if look.top is None else (look.top[which, :k], look.ids[which, :k])
        share = top.float().softmax(-1).to(self.table.dtype)
        return F.embedding_bag(ids, self.table, per_sample_weights=share, mode="sum")

    def combine(self, total: Tensor, h: Tensor, deep: Tensor) -> Tensor:
        return torch.where(deep[:, None], total + h, h) if self.additive else h

    def said(self, token: Tensor, pos: Tensor, ready: Tensor) -> None:
        if self.reference is not None:
            self.reference.step(token, pos, ready)

    def select(self, rows: Tensor) -> None:
        if self.reference is not None:
            self.reference.select(rows)


@torch.no_grad()
def read_prompts(
    model: TahModel,
    decider: Decider,
    prompts: Sequence[Sequence[int]],
    copies: int = 1,
    room: int = 64,
    candidates: int = 0,
    edit: Editing | None = None,
) -> Start:
    """The cache after the prompts, each row repeated `copies` times, with the passes spent on every prompt token."""
    if not prompts or not all(len(row) for row in prompts):
        raise DataError("Nothing to read: a prompt without a single token. Give each question some text.")
    device, width = model.table.device, max(map(len, prompts))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in prompts], device=device)
    lengths = torch.tensor([len(row) for row in prompts], device=device)
    valid = torch.arange(width, device=device) < lengths[:, None]
    reference = getattr(decider, "reference", None)
    wanted = None if reference is None else reference.start(ids, valid, copies, room)
    kv = model.decoder.slots(len(prompts), width + room)
    own = None if edit is None else edit.of_prompts(copies)
    done = model.run(Batch.of(ids, valid, None, None, wanted), decider, keep_stages=candidates > 0, kv=kv, edit=own)
    rows = torch.arange(len(prompts), device=device).repeat_interleave(copies)
    if edit is not None:
        edit.made = own.made[rows]
    prob = done.logit.sigmoid() if decider.topk else done.again.float()
    if isinstance(decider, NeverDecider):
        prob = torch.full_like(prob, torch.nan)
    passes = [
        _stage(model, active[rows], total[rows], prob[rows], depth, candidates) for depth, (active, total) in enumerate(done.stages, 1)
    ]
    kv = kv.fan_out(copies, room, share=False) if copies > 1 else kv
    ce = torch.full(ids.shape, torch.nan, device=device)
    if candidates and width > 1:
        inside = valid[:, 1:]
        ce[:, 1:][inside] = token_statistics(done.total[:, :-1][inside], model.head, ids[:, 1:][inside]).cross_entropy
    return Start(kv, done.total[rows, lengths[rows] - 1], lengths[rows] - 1, (done.iterations * valid)[rows], prob[rows], ce[rows], passes)


def _stage(model: TahModel, active: Tensor, total: Tensor, prob: Tensor, depth: int, candidates: int) -> PassRecord:
    row, pos = active.nonzero(as_tuple=True)
    asked = prob[active].float() if depth == 1 else torch.full_like(row, torch.nan, dtype=torch.float32)
    return record(row, pos, torch.full_like(row, depth), asked, model.decoder.logits(total[active]), candidates)


@inference
def decode(
    model: TahModel,
    prompts: Sequence[Sequence[int]],
    *,
    decider: Decider | None = None,
    copies: int = 1,
    draws: Keyed | None = None,
    max_new_tokens: int = 256,
    stops: Sequence[int] = (),
    sampling: Sampling | None = None,
    forced: Tensor | None = None,
    keep_logits: bool = False,
    candidates: int = 0,
    edit: Editing | None = None,
) -> DeepRollout:
    """What `copies` rows of each prompt (token ids of any lengths) say; see `deep_rollout` for the arguments and the result."""
    decider = model.active_decider() if decider is None else decider
    room = min(max_new_tokens if forced is None else forced.shape[1], 256) * 9 // 8 + 2
    start = read_prompts(model, decider, prompts, copies, room, candidates, edit)
    start.kv.rule = model.rule
    sampling = sampling or Sampling()
    if draws is None and not sampling.greedy:
        row = torch.arange(len(start.pos), device=start.pos.device)
        draws = Keyed.of(0, row // copies, row % copies)
    options = {"budget": max_new_tokens, "stops": stops, "sampling": sampling, "forced": forced, "edit": edit}
    return deep_rollout(model.decoder, TahDepth(model, decider), start, draws, keep_logits=keep_logits, candidates=candidates, **options)


@dataclass(frozen=True)
class DeepAnswer(Response):
    """An answer with the passes its tokens took: `iterations`, `probs`, `ce` per position of prompt and answer, `passes` for the trace."""

    iterations: list[int] = field(default_factory=list)
    probs: list[float] = field(default_factory=list)
    ce: list[float] = field(default_factory=list)
    passes: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class DeepAnswers(Responses):
    """The answers of a Think-at-Hard model."""

    threshold: float = float("nan")

    @property
    def passes_per_token(self) -> float:
        """Mean passes over all tokens that were read."""
        counts = [count for row in self.rows for count in row.iterations if count > 0]
        return sum(counts) / max(len(counts), 1)

    def trace(self, examples: Sequence[Any] = (), score: Callable[[str, str], Any] | None = None, **meta: Any) -> Trace:
        """The record that views read: tokens with iterations and decider probability, passes with their best tokens."""
        plain = super().trace(examples, score)
        tokens = plain.tokens.assign(
            iterations=[float("nan") if count == 0 else float(count) for row in self.rows for count in row.iterations],
            decider_prob=[value for row in self.rows for value in row.probs],
            ce=[value for row in self.rows for value in row.ce],
            entropy=[value for row in self.rows for value in _entropy(row)],
        )
        passes = [{k: v for k, v in entry.items() if k != "entropy"} for row in self.rows for entry in row.passes]
        meta |= {"threshold": self.threshold} if self.threshold == self.threshold else {}
        return Trace.build("tah", samples=plain.samples, tokens=tokens, passes=passes, meta=meta)


def _entropy(row: DeepAnswer) -> Iterator[float]:
    last = {entry["pos"]: entry["entropy"] for entry in row.passes}
    return (last.get(pos, float("nan")) for pos in range(len(row.iterations)))


def generate(
    model: TahModel,
    questions: Sequence[Any],
    samples: int = 1,
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
    first: int = 0,
    skip: int = 0,
    batch: int = 64,
    thinking: bool | None = None,
    policy: str = "decider",
    reference: Reference | None = None,
    candidates: int = 0,
    edit: Edit | None = None,
) -> DeepAnswers:
    """Answers with selective second passes; they do not depend on `batch` or on the other questions.

    Args:
        sampling: greedy where None; `OFFICIAL` holds the released settings.
        first, skip: number of the first question and of its first sample (draws are keyed by seed, question and sample).
        policy: one of `POLICIES`. candidates: best tokens to keep for every pass, for the trace; 0 = none.
        edit: changes what further passes read.
    """
    if samples < 1 or max_new_tokens < 1:
        raise SettingsError(f"samples = {samples} and max_new_tokens = {max_new_tokens}: both must be at least 1.")
    prompts = [model.prompt_ids(question, thinking=thinking) for question in questions]
    decider = decider_for_policy(model, policy, reference)
    stops = () if model.tokenizer is None else tuple(stop_ids(model.tokenizer, model.backbone))
    rows: list[DeepAnswer] = []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    size = max(1, batch // samples)
    for group in (order[start : start + size] for start in range(0, len(order), size)):
        number = torch.tensor([first + i for i in group for _ in range(samples)], device=model.device)
        sample = torch.arange(skip, skip + samples, device=model.device).repeat(len(group))
        draws, editing = Keyed.of(seed, number, sample), None if edit is None else Editing(edit, number, sample)
        options = {"max_new_tokens": max_new_tokens, "stops": stops, "sampling": sampling, "candidates": candidates}
        done = decode(model, [prompts[i] for i in group], decider=decider, copies=samples, draws=draws, edit=editing, **options)
        rows += _answers(model, prompts, group, samples, (first, skip), done)
    threshold = getattr(decider, "effective_threshold", float("nan"))
    rows.sort(key=lambda row: (row.question, row.sample))
    return DeepAnswers(model.method, rows, model.tokenizer, threshold=threshold)


def _answers(
    model: TahModel, prompts: list[list[int]], group: list[int], samples: int, first: tuple[int, int], done: DeepRollout
) -> Iterator[DeepAnswer]:
    passes = _pass_rows(model, done)
    for place, ids in enumerate(done.answers()):
        prompt, sample = prompts[group[place // samples]], first[1] + place % samples
        question, length = first[0] + group[place // samples], len(prompt) + len(ids)
        text = "" if model.tokenizer is None else model.tokenizer.decode(ids)
        own = [{"question": question, "sample": sample, **entry} for entry in passes.get(place, ()) if entry["pos"] < length]
        said = (done.logprob[place, : len(ids)].tolist(), FINISH[int(done.finish[place])], text)
        columns = {"iterations": done.iterations, "probs": done.prob, "ce": done.ce}
        read = {name: column[place, :length].tolist() for name, column in columns.items()}
        yield DeepAnswer(question, sample, prompt, ids, *said, **read, passes=own)


def _pass_rows(model: TahModel, done: DeepRollout) -> dict[int, list[dict[str, Any]]]:
    """Entries of the trace's pass table by row."""
    found: dict[int, list[dict[str, Any]]] = {}
    for step in done.passes:
        columns = (step.row, step.pos, step.depth, step.prob, step.entropy, step.ids, step.share)
        for row, pos, depth, prob, entropy, ids, share in zip(*(column.tolist() for column in columns), strict=True):
            texts = [str(i) if model.tokenizer is None else model.tokenizer.decode([i]) for i in ids]
            entry = {"pos": pos, "depth": depth, "decider_prob": prob, "entropy": entropy, "top_texts": texts, "top_probs": share}
            found.setdefault(row, []).append(entry)
    return found
