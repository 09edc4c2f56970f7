"""The micro-task of thoughts in a prompt: a base that obeys instructions, and questions that hide theirs (`lta.md` 9).

The base sorts, reverses, copies or raises digits as an instruction token says, which stands among filler tokens. Then the
instruction is missing: sort where the digits contain a 7, reverse otherwise. Thoughts in the fillers' places must say so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lab.data.worlds.instruct import Instruct, InstructTask
from lab.latent.plan import IGNORE, Row
from lab.latent.prefix import read_with_thoughts
from lab.methods.lta.config import LtaSettings
from lab.methods.lta.data import ThoughtBatch, batch_of, one_count
from lab.methods.lta.model import ThoughtModel
from lab.methods.lta.objective import counter, loss
from lab.methods.lta.prompting import Prompted
from lab.models.backbones import load_backbone
from lab.models.decoder import decoder_for
from lab.train import TrainSettings, fit

WORLD = Instruct()
BOS, SEP, EOS, FIRST_FILLER = 0, 1, 2, 19
SORT, REVERSE, SEVEN, NONE = 13, 14, 17, 18
SIZES = {"layers": 3, "hidden": 64, "intermediate": 256, "heads": 4, "kv_heads": 4}

SFT_ONLY = {"contrastive_loss_weight": 0.0, "kl_loss_weight": 0.0, "sft_loss_weight": 1.0}
OFFICIAL = {"generator": "block", "gold_steps": "visible", "focus_positions": "turn_end"}
REPAIRED = {"generator": "block", "gold_steps": "masked", "focus_positions": "step_mean"}
ARMS: dict[str, dict[str, Any]] = {
    "static": {"generator": "static"},
    "softcot": SFT_ONLY | {"generator": "assistant", "gold_steps": "off", "distinct_slots": False},
    "lta-official": OFFICIAL,
    "lta": REPAIRED,
    "lta-sft-only": REPAIRED | SFT_ONLY,
    # one repair each, beside lta-official; lta-one-id is what was published for StrategyQA
    "lta-masked": OFFICIAL | {"gold_steps": "masked"},
    "lta-off": OFFICIAL | {"gold_steps": "off"},
    "lta-focus": OFFICIAL | {"focus_positions": "step_mean"},
    "lta-one-id": OFFICIAL | {"distinct_slots": False},
    "lta-counts": REPAIRED | {"train_thoughts": [1, 2, 4]},
}


def pretrain(seed: int, steps: int, folder: Path, rows: int = 128, lr: float = 2e-3):
    """A base that does what its instruction says, trained on fresh batches, and its last loss."""
    base = load_backbone("toy:qwen3", vocab_size=len(WORLD.vocabulary), seed=seed, **SIZES)
    settings = TrainSettings.check(
        steps=steps, global_batch=rows, order="as_given", lr=lr, warmup_steps=100, seed=seed, save_every=0, betas=[0.9, 0.98]
    )
    result = fit(base, range(steps * rows), partial(_corpus, seed), _base_loss, settings, folder, count=len_of, label="base")
    return base, result.loss


@dataclass
class Corpus:
    """A batch of the base corpus: ids and targets (R, T)."""

    ids: Tensor
    targets: Tensor

    def to(self, device) -> "Corpus":
        return Corpus(self.ids.to(device), self.targets.to(device))


def _corpus(seed: int, rows: Sequence[int]) -> Corpus:
    ids, targets = WORLD.batch(len(rows), np.random.default_rng((seed, rows[0])))
    return Corpus(torch.from_numpy(ids), torch.from_numpy(targets))


def len_of(batch: Corpus) -> int:
    """Targets of a batch."""
    return int((batch.targets != IGNORE).sum())


def _base_loss(base, batch: Corpus) -> tuple[Tensor, dict[str, Tensor]]:
    decoder, known = decoder_for(base), batch.targets != IGNORE
    pos = torch.arange(batch.ids.shape[1], device=batch.ids.device).expand_as(batch.ids)
    h = decoder(decoder.embed(batch.ids), pos, decoder.grow()).last
    value = F.cross_entropy(decoder.logits(h[known]), batch.targets[known])
    return value, {"ce": value}


def questions(task: InstructTask, n: int, *, solution: bool, distinct: bool = True) -> list[Prompted]:
    """The instances of `task` with `n` thoughts; with the solution in the assistant's prompt where asked for."""
    return [
        _prompted(x, y, bool(seven), n, solution, distinct)
        for x, y, seven in zip(task.x.tolist(), task.y.tolist(), task.seven, strict=True)
    ]


def _prompted(x: list[int], y: list[int], seven: bool, n: int, solution: bool, distinct: bool) -> Prompted:
    after = [*x, SEP, *y]
    labels = [IGNORE] * (2 + len(x)) + y
    asked = [BOS, *x, SEP]
    steps = [[SEVEN if seven else NONE, SEP], [SORT if seven else REVERSE, SEP]] if solution else []
    slots = [FIRST_FILLER + (i if distinct else 0) for i in range(n)]
    flat, start = [token for step in steps for token in step], len(asked)
    spans = tuple((start + 2 * i, start + 2 * i + 1) for i in range(len(steps)))
    assistant = (*asked, *flat, *slots)
    row = Row((BOS,), tuple(after), tuple(labels), thoughts=n)
    places = tuple(range(start + len(flat), len(assistant)))
    ends = tuple(stop for _, stop in spans)
    return Prompted(row, assistant, places, start - 1, spans, ends, tuple(y), tuple(range(start, start + len(flat))))


def start(arm: str, base, seed: int, n: int = 4) -> ThoughtModel:
    """The untrained model of an arm on a base; the assistant of `softcot` is a small model of random weights."""
    torch.manual_seed(seed)
    settings = LtaSettings.check(num_thought_tokens=n, inner=256, eos_id=EOS, **ARMS[arm])
    assistant = small_assistant(seed) if settings.generator == "assistant" else None
    return ThoughtModel.start(base, None, settings, assistant)


def small_assistant(seed: int):
    """A two-layer model of random weights, the frozen assistant of `softcot`."""
    return load_backbone("toy:qwen3", vocab_size=len(WORLD.vocabulary), seed=1000 + seed, **SIZES | {"layers": 2})


def train(model: ThoughtModel, seed: int, steps: int, folder: Path, rows: int = 64, lr: float = 1e-3, label: str = "thoughts"):
    """Trains an arm on fresh questions; the result of `fit`."""
    s = model.config
    task = WORLD.task(steps * rows, np.random.default_rng((seed, 1)))
    examples = list(zip(*(questions(task, n, solution=s.gold_steps != "off", distinct=s.distinct_slots) for n in s.counts), strict=True))
    settings = TrainSettings.check(
        steps=steps, global_batch=rows, order="as_given", lr=lr, warmup_steps=40, seed=seed, save_every=0, schedule="linear"
    )

    def collate(rows: list[tuple[Prompted, ...]]) -> ThoughtBatch:
        return batch_of(one_count(rows), BOS, FIRST_FILLER)

    return fit(model, examples, collate, loss, settings, folder, count=counter(model), label=label)


@torch.no_grad()
def measure(model: ThoughtModel, seed: int, rows: int = 500, n: int = 0, solution: bool = False) -> dict[str, float]:
    """Exact matches on fresh questions, loss, and the variance of the thoughts over questions.

    Args:
        n: thoughts to read, 0 = as trained. solution: show the solution to the assistant (to see what a leak would give).
    """
    model.eval()
    s, task = model.config, WORLD.task(rows, np.random.default_rng((seed, 2)))
    batch = batch_of(questions(task, n or s.num_thought_tokens, solution=solution, distinct=s.distinct_slots), BOS, FIRST_FILLER)
    right, value = exact(model, batch)
    made = model.make(batch)
    variance = 0.0 if made is None or len(made) < 2 else float(made.float().var(0).mean())
    return {"exact": right, "loss": value, "variance": variance, "questions": rows}


@torch.no_grad()
def exact(model: ThoughtModel, batch: ThoughtBatch) -> tuple[float, float]:
    """Share of rows whose every answer token is the most likely one after the right ones before it, and the mean cross-entropy."""
    states, targets = batch.plan.predictions(read_with_thoughts(model.decoder, batch.plan, model.make(batch)))
    logits = model.decoder.logits(states)
    hits = (logits.argmax(-1) == targets).view(len(batch), -1).all(1)
    return float(hits.float().mean()), float(F.cross_entropy(logits.float(), targets))
