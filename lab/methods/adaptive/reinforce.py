"""RL on the number of thoughts: rewards of length, answer and form, and the adaptive side of rollout and update (distill.md 2B.7).

A completion is CONTINUE · n, STOP, answer. Its log-probabilities are those of the two-way head and of the vocabulary; thoughts are
made again with gradient in the update, so the policy gradient trains them too. All samples of a prompt share one chain of thoughts.
Axes: Q prompts, N samples, R = Q·N rows, P prompt columns, C completion columns, T thoughts, A answer columns, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from lab.config import Settings
from lab.errors import SettingsError
from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt, Rollout, rollout
from lab.latent.plan import right
from lab.latent.sampling import Sampling
from lab.latent.tree import rollout_tree, unroll_tree
from lab.latent.unroll import Block
from lab.methods.adaptive.config import COLON, CONTINUE, MARKER, START, STOP
from lab.methods.adaptive.data import first_number
from lab.methods.adaptive.model import AdaptiveModel, Thinker, read_ids, scores
from lab.methods.adaptive.policy import Adaptive, in_order
from lab.training.acts import Acts, Completions, WithReference

TOLERANCE = 1e-6


# ---- rewards ----


class LengthReward(Settings):
    """Reward of the relative length among a prompt's correct completions.

    `penalty` for the longer ones where at least `requirement` of them are correct (a share up to 1, a count above, None = always),
    `reward` for the longer ones elsewhere (None = nothing, "same" = as much as the penalty).
    """

    penalty: float = 1e-4
    requirement: float | None = Field(1.0, gt=0)
    reward: float | Literal["same"] | None = 0.1

    @model_validator(mode="after")
    def _consistent(self) -> "LengthReward":
        if self.reward is not None and self.requirement is None:
            raise ValueError("a reward is paid below a requirement; set one")
        return self

    def coefficient(self, correct: int, samples: int) -> float:
        """c in c · (length − mean) / (max − min)."""
        needed = 0.0 if self.requirement is None else self.requirement * samples if self.requirement <= 1 else self.requirement
        if correct >= needed:
            return -self.penalty
        return self.penalty if self.reward == "same" else float(self.reward or 0.0)


def well_formed(text: str) -> bool:
    """Whether a completion (special tokens kept) is thoughts and then exactly one " The answer is:"; order and STOP are not checked."""
    before, *after = text.split(MARKER + COLON)
    for token in (START, CONTINUE, STOP):
        before = before.replace(token, "")
    return len(after) == 1 and not before.strip()


def answer_of(text: str) -> float | None:
    """The first number after the last " the answer is:" (any case), or None where there is none."""
    _, found, answer = text.lower().rpartition((MARKER + COLON).lower())
    return first_number(answer) if found else None


def is_correct(text: str, label: str) -> bool:
    """Whether the completion's number equals the label within 1e-6."""
    value, wanted = answer_of(text), first_number(label)
    return value is not None and wanted is not None and abs(value - wanted) < TOLERANCE


def relative_lengths(lengths: Sequence[int], correct: Sequence[bool], prompt_ids: Sequence[int], how: LengthReward) -> list[float]:
    """The length term of each completion; 0 for wrong ones and where all correct ones of a prompt are equally long."""
    groups: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompt_ids):
        groups.setdefault(prompt, []).append(place)
    out = [0.0] * len(lengths)
    for places in groups.values():
        good = [place for place in places if correct[place]]
        spread = max((lengths[i] for i in good), default=0) - min((lengths[i] for i in good), default=0)
        if spread:
            c, mean = how.coefficient(len(good), len(places)), sum(lengths[i] for i in good) / len(good)
            for i in good:
                out[i] = c * (lengths[i] - mean) / spread
    return out


def length_of(prompt: str, completion: str) -> int:
    """START, CONTINUE and STOP tokens in prompt and completion: n + 2 for n thoughts."""
    return sum((prompt + completion).count(token) for token in (START, CONTINUE, STOP))


def rewards_of(how: LengthReward, form_weight: float = 1.0, answer_weight: float = 1.0) -> dict[Callable[..., list[float]], float]:
    """Reward functions by weight: form (−1), answer (+1), relative length; and six that are only logged."""

    def form(written: list[str], **_: Any) -> list[float]:
        return [0.0 if well_formed(text) else -1.0 for text in written]

    def answer(written: list[str], label: list[str], **_: Any) -> list[float]:
        return [float(_good(text, gold)) for text, gold in zip(written, label, strict=True)]

    def relative_length(written: list[str], label: list[str], prompt_id: list[int], thoughts: list[int], **_: Any) -> list[float]:
        good = [_good(text, gold) for text, gold in zip(written, label, strict=True)]
        return relative_lengths([count + 2 for count in thoughts], good, prompt_id, how)

    def accuracy(written: list[str], label: list[str], **_: Any) -> list[float]:
        return [float(is_correct(text, gold)) for text, gold in zip(written, label, strict=True)]

    def well(written: list[str], **_: Any) -> list[float]:
        return [float(well_formed(text)) for text in written]

    def thought_length(thoughts: list[int], **_: Any) -> list[float]:
        return [float(count + 2) for count in thoughts]

    def share(name: str, test: Callable[[int, int], bool]) -> Callable[..., list[float]]:
        def of(written: list[str], label: list[str], prompt_id: list[int], **_: Any) -> list[float]:
            right: dict[int, list[bool]] = {}
            for text, gold, prompt in zip(written, label, prompt_id, strict=True):
                right.setdefault(prompt, []).append(_good(text, gold))
            return [float(test(sum(right[prompt]), len(right[prompt]))) for prompt in prompt_id]

        of.__name__ = name
        return of

    weights: dict[Callable[..., list[float]], float] = {form: form_weight, answer: answer_weight, relative_length: 1.0}
    shares = [
        share("all_correct", lambda k, n: k == n),
        share("some_correct", lambda k, n: 0 < k < n),
        share("none_correct", lambda k, n: k == 0),
    ]
    return weights | dict.fromkeys([well, accuracy, thought_length, *shares], 0.0)


def _good(text: str, label: str) -> bool:
    return well_formed(text) and is_correct(text, label)


# ---- rollout and update ----


class AdaptiveThinking(WithReference):
    """The adaptive side of `lab.rl`: stops are drawn, thoughts follow from the prompt, the update makes them again.

    Args:
        most: thoughts at which a row is stopped; that STOP is not the policy's own and is left out of the update.
        share: one chain of thoughts for all samples of a prompt; False runs each by itself (the same results).
        compat: the official completions, which nothing but `longest` ends: unused ids may be said, START begins another thought.
    """

    def __init__(self, model: AdaptiveModel, most: int, share: bool = True, compat: bool = False):
        if not model.config.latent:
            raise SettingsError("A text model makes no thoughts whose number could be learned; start from a latent one.")
        if most < 1:
            raise SettingsError(f"most = {most}: at least one thought must be allowed.")
        self.model, self.most, self.share, self.compat = model, most, share and not compat, compat
        self._bare = False  # the reference is the backbone without its adapters

    @property
    def thinker(self) -> Thinker:
        """The thinker that log-probabilities are taken from now."""
        active = self._active or self.model
        return active if isinstance(active, Thinker) else active.thinker

    def hold_reference(self) -> None:
        """Keeps the model as it is now as the reference: a copy, or where LoRA is fresh the backbone without it and the parts."""
        fresh = [not p.any() for name, p in self.model.backbone.named_parameters() if ".lora_B." in name]
        self._bare = "lora" in self.model.__dict__ and all(fresh)
        if self._bare:
            self._held = Thinker(self.model.thinker.decoder, copy.deepcopy(self.model.parts).eval(), self.model.config)
        else:
            super().hold_reference()

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, log-probabilities are those of `hold_reference`."""
        with super().reference(), self.model.adapters_off() if self._bare else nullcontext():
            yield

    def act(self, prompts: list[list[int]], samples: int, draws: Keyed, *, temperature: float, longest: int) -> Acts:
        """Completions of the prompts; see `lab.training.acts.Thinking`."""
        most = longest if self.compat else min(self.most, longest - 2)
        if most < 1:
            raise SettingsError(f"longest = {longest}: a completion needs room for a thought, STOP and an answer.")
        self.model.eval()
        thinker, eos = self.model.thinker, self.model.tokenizer.eos_token_id
        policy = Adaptive(thinker, [eos], sampling=Sampling(temperature=temperature), multi=self.compat)
        run, prompt = rollout_tree if self.share else rollout, Prompt.of_ids(thinker, prompts)
        budget, keep = Budget(thoughts=most, answer=longest if self.compat else longest - most - 1), _KEPT
        done = run(thinker, policy, prompt, samples, draws, budget=budget, keep=(*keep, "stop", "decided") if self.compat else keep)
        return self._official(done, eos, longest) if self.compat else self._acts(done, eos)

    def _official(self, done: Rollout, eos: int, longest: int) -> Acts:
        """Decisions and tokens in the order they came, cut after `longest`."""
        s, out = self.model.config, Acts([], [], [], {"written": [], "thoughts": []})
        decided, said, stops, before = (done.notes[name].tolist() for name in ("decision", "logprob", "stop", "decided"))
        for row, (answer, cut) in enumerate(zip(done.answers(), done.finish.tolist(), strict=True)):
            answer, kept = answer if cut else [*answer, eos], [stop for stop in stops[row] if stop == stop]
            told = before[row][: len(answer)]
            ids = in_order(answer, told, [s.stop if stop else s.go_on for stop in kept])[:longest]
            out.ids.append(ids)
            out.logprobs.append(in_order(said[row][: len(answer)], told, decided[row][: len(kept)])[:longest])
            out.own.append([True] * len(ids))
            out.extras["thoughts"].append(sum(i in (s.start, s.go_on, s.stop) for i in ids) - 1)  # the prompt's START is one of length_of
            out.extras["written"].append(self.model.tokenizer.decode([i for i in ids if i != eos]))
        return out

    def _acts(self, done: Rollout, eos: int) -> Acts:
        s, out = self.model.config, Acts([], [], [], {"written": [], "thoughts": []})
        decided, said = done.notes["decision"].tolist(), done.notes["logprob"].tolist()
        for row, (ids, n, capped, cut) in enumerate(
            zip(done.answers(), done.counts.tolist(), done.capped.tolist(), done.finish.tolist(), strict=True)
        ):
            answer = ids if cut else [*ids, eos]
            out.ids.append([s.go_on] * n + [s.stop] + answer)
            out.logprobs.append(decided[row][: n + 1] + said[row][: len(answer)])
            out.own.append([True] * n + [not capped] + [True] * len(answer))
            out.extras["thoughts"].append(n)
            out.extras["written"].append(CONTINUE * n + STOP + self.model.tokenizer.decode(ids, skip_special_tokens=True))
        return out

    def log_probs(self, batch: Completions, temperature: float) -> tuple[Tensor, Tensor]:
        """(R, C) log-probabilities and entropies; see `lab.training.acts.Thinking`. Prompts that are the same are read once."""
        if self.compat:
            return self._official_log_probs(batch, temperature)
        thinker, s = self.thinker, self.model.config
        thoughts = ((batch.ids == s.go_on) & batch.mask.bool()).sum(1)
        prompts, group = torch.unique(torch.cat((batch.prompt, batch.prompt_mask), 1), dim=0, return_inverse=True)
        ids, mask = prompts.chunk(2, 1)
        after = self._after(batch, thoughts.tolist()).to(ids.device)
        prompt = Block(thinker.embed(ids), None if bool(mask.all()) else mask.bool())
        decided, read = unroll_tree(thinker, prompt, group, thoughts, after.block(thinker), thinker.feedback, thinker.closes)
        return self._assemble(batch, thoughts, decided, read, temperature)

    def _official_log_probs(self, batch: Completions, temperature: float) -> tuple[Tensor, Tensor]:
        """From one reading of the whole rows, every head's choices unmasked."""
        ids, mask = torch.cat((batch.prompt, batch.ids), 1), torch.cat((batch.prompt_mask, batch.mask), 1)
        states = read_ids(self.thinker, ids, mask).last[:, batch.prompt.shape[1] - 1 : -1]
        logits = scores(self.thinker, ids[:, batch.prompt.shape[1] - 1 : -1], states).float()
        logs = torch.log_softmax(logits / temperature, -1)
        entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)
        return logs.gather(-1, batch.ids[..., None])[..., 0], entropy.detach()

    def _after(self, batch: Completions, thoughts: list[int]) -> Any:
        """END and the answer without its last token: what was read after the thoughts."""
        lengths = batch.mask.sum(1).tolist()
        rows = [
            [self.model.config.end, *row[n + 1 : length - 1]] for row, n, length in zip(batch.ids.tolist(), thoughts, lengths, strict=True)
        ]
        return right(rows)

    def _assemble(self, batch: Completions, thoughts: Tensor, decided: Tensor, read: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Puts decisions and words at their columns: CONTINUE and STOP from the two-way head, the rest from the vocabulary."""
        thinker, wide = self.thinker, batch.ids.shape[1]
        column = torch.arange(wide, device=batch.ids.device)
        choice = torch.log_softmax(thinker.decide(decided).float() / temperature, -1)
        at = column.clamp(max=choice.shape[1] - 1).expand_as(batch.ids)
        chosen = (column == thoughts[:, None]).long()
        picked = choice.gather(1, at[..., None].expand(-1, -1, 2))
        deciding = column <= thoughts[:, None]
        word, entropy = self._words(batch, thoughts, read, temperature, deciding)
        logps = torch.where(deciding, picked.gather(2, chosen[..., None])[..., 0], word)
        return logps, torch.where(deciding, -(picked.exp() * picked).sum(-1), entropy)

    def _words(self, batch: Completions, thoughts: Tensor, read: Tensor, temperature: float, deciding: Tensor) -> tuple[Tensor, Tensor]:
        """(R, C) log-probability and entropy of answer tokens, 0 elsewhere; the head runs where there is one and nowhere else."""
        rows, places = ((~deciding) & batch.mask.bool()).nonzero(as_tuple=True)
        states = read[rows, places - thoughts[rows] - 1]
        logits = self.thinker.logits(states).float()
        banned = torch.tensor([*self.model.config.unused, self.model.config.start], device=logits.device)
        logs = torch.log_softmax(logits.index_fill(-1, banned, -torch.inf) / temperature, -1)
        chosen = logs.gather(1, batch.ids[rows, places][:, None])[:, 0]
        entropy = -(logs.exp() * logs.masked_fill(logs == -torch.inf, 0.0)).sum(-1)
        zeros = logs.new_zeros(batch.ids.shape)
        return zeros.index_put((rows, places), chosen), zeros.index_put((rows, places), entropy.detach())


_KEPT = ("decision", "logprob")


def distribution(model: AdaptiveModel, prompt: Prompt, most: int) -> Tensor:
    """(Q, most + 1): the probability of each number of thoughts along the one chain of each prompt, the cap's share at the end."""
    thinker = model.thinker
    with torch.no_grad():
        counts = torch.full((prompt.x.shape[0],), most)
        end = thinker.embed(torch.full((len(counts), 1), model.config.end, device=prompt.x.device))
        group = torch.arange(len(counts), device=prompt.x.device)
        decided, _ = unroll_tree(thinker, Block(prompt.x, prompt.valid), group, counts.to(group), Block(end), thinker.feedback)
        stop = F.softmax(thinker.decide(decided).float(), -1)[..., 1]
    stop[:, -1] = 1.0
    going = torch.cat((torch.ones_like(stop[:, :1]), (1 - stop[:, :-1]).cumprod(1)), 1)
    return stop * going
