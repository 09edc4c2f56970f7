"""What a recipe's trainings will need, before anything is downloaded: parameters, memory, steps, and time from one measured step.

Parameters and activations are counted from shapes alone. Time is that of one and of two layers of the same shape, measured here, forward
and back, and scaled to all layers, tokens and steps, with the update's beside it. All of it is an estimate (`benchmarks/estimate.py`): rows
are taken at their benchmark's mean length, and the method's own small weights are counted but not timed.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lab.errors import SettingsError
from lab.machine import free_memory
from lab.training.probe import Key, activations, configured, passed, update_seconds

Values = Mapping[str, Any]
GIB = 1 << 30
_MADE = (6400, 16)
ROWS = {  # benchmark: (training rows, mean tokens of question, reasoning and answer)
    **{
        "gsm8k": (7473, 180),
        "gsm8k_aug": (385_620, 100),
        "gsm8k_aug_nl": (385_620, 180),
        "math": (7500, 280),
        "openr1_math": (90_000, 4000),
    },
    **{"prosqa": (17_886, 420), "prontoqa": (9000, 300), "commonsenseqa": (8096, 130), "strategyqa": (1603, 90), "aqua": (97_467, 160)},
}


@dataclass(frozen=True)
class Training:
    """One training of a recipe, as its step's parameters describe it; a method's `plan.trainings` makes them with `of`.

    Attributes:
        shape: of a toy backbone. method, settings: give the method's own weights; or parts makes them from the configuration.
        lora: (rank, linears) of adapters; then the backbone is frozen, as it is where `frozen`.
        rows: of a global batch; micro: of them at a time in a process. tokens: of a row. steps: optimizer steps, all arms.
        passes: how often the body reads a row's tokens with gradient. thoughts: further passes over one token a row.
        said: share of a row's tokens whose words are predicted; the vocabulary head reads no others. Thoughts are never said.
        decoded: tokens that each row of a rollout generates before its update.
    """

    step: str
    backbone: str
    rows: int
    tokens: int
    steps: int
    micro: int = 0
    shape: dict[str, Any] = field(default_factory=dict)
    method: str = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    lora: tuple[int, tuple[str, ...]] = (0, ())
    parts: Callable[[Any], Any] | None = None
    frozen: bool = False
    pruned: int = 0
    passes: float = 1.0
    thoughts: int = 0
    said: float = 1.0
    decoded: int = 0
    bf16: bool = False
    processes: int = 1
    sharding: str = "ddp"


def of(step: str, v: Values, backbone: str, batch: int, benchmark: str, *, steps: int = 0, epochs: float = 0.0, **own: Any) -> Training:
    """A training from a step's parameters `v`, where they carry the usual names (micro_batch, bf16, processes, sharding)."""
    rows, tokens = ROWS.get(benchmark, _MADE)
    rows = own.pop("examples", 0) or rows
    same = {name: v[name] for name in ("bf16", "processes", "sharding") if name in v}
    how = {"micro": v.get("micro_batch", 0), "tokens": tokens, "steps": steps or math.ceil(epochs * rows / batch)}
    if backbone.startswith("toy:") and "vocab_size" not in own.get("shape", {}):
        own["shape"] = {"vocab_size": 64, **own.get("shape", {})}
    return Training(step, backbone, batch, **{**how, **same, **own})


def trainings(paper: str, settings: Mapping[str, Values]) -> list[Training]:
    """The trainings of planned steps ({step: parameters}); [] for a paper that has no plan of them."""
    try:
        plan = importlib.import_module(f"lab.methods.{paper}.plan")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("lab.methods"):
            raise
        return []
    return list(getattr(plan, "trainings", lambda settings: [])(settings))


def estimate(paper: str, recipe: str, overrides: Mapping[str, str] | None = None, *, measure: bool = True) -> list[dict[str, Any]]:
    """A row for each training of a recipe (see `row`). Raises SettingsError for what cannot be planned."""
    from lab.running import papers

    settings = {planned.step: planned.values for planned in papers.plan(paper, recipe, overrides or {})}
    return [row(training, measure=measure) for training in trainings(paper, settings)]


def row(t: Training, *, measure: bool = True) -> dict[str, Any]:
    """Parameters, GiB of memory by kind on each device, steps and tokens; with `measure` also seconds a step and hours in all.

    `fits`: whether the memory is free here now; None where the shape of the backbone is not known on this machine.
    """
    found: dict[str, Any] = {"step": t.step, "backbone": t.backbone, "steps": t.steps, "tokens": t.steps * t.rows * t.tokens, "fits": None}
    try:
        total, learning = counts(t)
    except SettingsError as error:
        return found | {"note": str(error)}
    memory = _memory(t, total, learning)
    free, device = free_memory()
    needed = sum(memory.values())
    found |= {"parameters": total, "learning": learning, **{f"{name} GiB": size / GIB for name, size in memory.items()}}
    found |= {"all GiB": needed / GIB, "free GiB": free / GIB, "device": device, "fits": needed < free}
    if measure:
        seconds = _seconds(t)
        found |= {"seconds a step": seconds, "hours": seconds * t.steps / 3600}
    return found


# ---- parameters ----


def counts(t: Training) -> tuple[int, int]:
    """(parameters in all, parameters that learn)."""
    import torch

    from lab.models.backbones import parameter_count
    from lab.models.plan import planned_model

    model = planned_model(_config(t), "none" if t.parts else t.method, t.settings)
    body = parameter_count(model.backbone)
    with torch.device("meta"):
        parts = parameter_count(t.parts(_config(t))) if t.parts else parameter_count(model) - body
    adapters = _adapters(t)
    if adapters or t.frozen:
        return body + parts + adapters, parts + adapters
    return body + parts, body + parts


def _config(t: Training) -> Any:
    return configured(_key(t))


def _adapters(t: Training) -> int:
    from lab.models.lora import linear_shapes

    (rank, names), config, width = t.lora, _config(t), _config(t).hidden_size
    if not rank:
        return 0
    if config.model_type == "gpt2":  # its fused query-key-value, output, and both halves of the feed-forward part
        pairs = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    else:
        pairs = [shape for name, shape in linear_shapes(config).items() if name in (names or (name,))]
    return config.num_hidden_layers * rank * sum(map(sum, pairs))


# ---- memory ----


def _memory(t: Training, total: int, learning: int) -> dict[str, float]:
    """Bytes on each device. What learns, its gradients and moments are in float32; what is frozen is as wide as the autocast."""
    shares = 1 if t.sharding == "ddp" else t.processes
    wide = 2 if t.bf16 else 4
    whole = activations(_key(t), _micro(t), t.tokens, t.bf16, t.frozen, t.said)
    one = activations(_key(t), _micro(t), 1, t.bf16, t.frozen, 0.0)
    logits = 4 * _micro(t) * t.tokens * t.said * _config(t).vocab_size  # the loss holds two more of them on its way back
    return {
        "weights": 4 * learning + wide * (total - learning),
        "gradients": 4 * learning,
        "optimizer": (12 if t.sharding.startswith("zero") else 8) * learning / shares,  # ZeRO also copies the weights
        "activations": t.passes * whole + t.thoughts * one + 2 * logits,
    }


def _micro(t: Training) -> int:
    share = math.ceil(t.rows / t.processes)
    return min(t.micro or share, share)


def _key(t: Training) -> Key:
    return t.backbone, t.pruned, tuple(sorted(t.shape.items()))


# ---- time ----


def _seconds(t: Training) -> float:
    """Seconds of an optimizer step: passes over rows and thoughts and a rollout's decoding, shared by the processes, and the update.

    In a frozen backbone, what learns costs as much as its share of the weights says.
    """
    rows, (total, learning) = _micro(t), counts(t)
    batches, frozen = math.ceil(t.rows / t.processes / rows), bool(t.frozen or t.lora[0])
    whole = t.passes * passed(_key(t), rows, t.tokens, t.bf16, frozen, t.said)
    thought = passed(_key(t), rows, 1, t.bf16, frozen, 0.0) if t.thoughts else 0.0
    word = passed(_key(t), rows, 1, t.bf16, frozen) / 3 if t.decoded else 0.0  # forward only
    beside = 1.5 * learning / total if frozen else 0.0
    update = update_seconds() * learning / (t.processes if t.sharding == "fsdp" else 1)
    return batches * (1 + beside) * (whole + t.thoughts * thought + t.decoded * word) + update


# ---- in words ----


def text(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows of `estimate` for a terminal."""
    return "\n\n".join("\n".join(_lines(row)) for row in rows) or "No training in this recipe."


def _lines(row: Mapping[str, Any]) -> list[str]:
    lines = [f"{row['step']}: {row['backbone']}, {row['steps']:,} steps, {row['tokens']:,} tokens"]
    if "note" in row:
        return [*lines, f"  {row['note']}"]
    lines.append(f"  {row['parameters']:,} parameters, {row['learning']:,} learn")
    parts = ", ".join(f"{name} {row[f'{name} GiB']:.3g}" for name in ("weights", "gradients", "optimizer", "activations"))
    verdict = "fits" if row["fits"] else "does NOT fit: a smaller micro_batch, more processes with sharding fsdp, or a larger device"
    lines.append(f"  about {row['all GiB']:.3g} GiB a device ({parts}); {row['free GiB']:.3g} GiB free on {row['device']}: {verdict}")
    if "hours" in row:
        lines.append(f"  about {row['seconds a step']:,.3g} s a step here, {_long(row['hours'])} in all (from one and two layers, scaled)")
    return lines


def _long(hours: float) -> str:
    return f"{hours / 24:,.0f} days" if hours > 48 else f"{hours:.1f} hours" if hours > 1.5 else f"{hours * 60:.1f} minutes"
