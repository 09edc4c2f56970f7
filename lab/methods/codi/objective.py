"""CODI's three losses: teacher, student, and the student's states drawn to the teacher's (`distill.md` 2A.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lab.latent.distill import (
    Passes,
    at_column,
    distillation,
    over_processes,
    plan_cross_entropy,
    read_on,
    read_question,
    read_teacher,
    run_pair,
    scale_of,
)
from lab.latent.plan import Pair
from lab.latent.unroll import Block, Unrolled, unroll
from lab.launch import world_size
from lab.methods.codi.config import CodiSettings
from lab.methods.codi.model import CodiModel


def taps_of(model: CodiModel, s: CodiSettings) -> tuple[int, ...]:
    """The hidden states that are compared: after every block, and the embedding output where asked for."""
    return tuple(range(0 if s.align_embedding else 1, model.backbone.config.num_hidden_layers + 1))


def run(model: CodiModel, batch: Pair) -> Passes:
    """Question once, teacher once, each thought once, with gradient; the official way under compat."""
    s = model.config
    return official(model, batch) if s.compat else run_pair(_Marked(model), batch, model.feedback, taps_of(model, s))


def loss(model: CodiModel, batch: Pair, scale: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum, and its parts `ce`, `ref_ce` and `distill`, weighted and with gradient, for `lab.train.fit`.

    Beside them, only recorded: the teacher's smallest spread over the layers (a target that collapses gives a perfect distill loss).

    Args:
        scale: (N,) the teacher's deviation by layer, where it was measured over more rows than these.
    """
    s = model.config
    if not needs_teacher(s):
        value = plan_cross_entropy(model.decoder, batch.student, student_alone(model, batch))
        return value, {"ce": value}
    done = run(model, batch)
    student, teacher = at_column(done.student.taps, batch.student.target), at_column(done.teacher.taps, batch.teacher.target)
    if s.teacher_pass == "separate":
        teacher = second_teacher(model, batch, s)
    parts = {
        "ce": plan_cross_entropy(model.decoder, batch.student, done.student),
        "ref_ce": s.ref_loss_factor * plan_cross_entropy(model.decoder, batch.teacher, done.teacher, None),
        "distill": s.distill_loss_factor * alignment(student, teacher, s, scale),
    }
    spread = scale_of(teacher, "layerwise_std").min() if len(batch) > 1 else teacher.new_zeros(())
    return sum(parts.values()), {**parts, "teacher/std_min": spread}


@dataclass
class Objective:
    """`loss` for `lab.train.fit`: the teacher's deviation is that of the whole batch, whatever the micro-batches and processes."""

    feeds_back: bool = True
    _scale: Tensor | None = None

    def __call__(self, model: CodiModel, batch: Pair) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(model, batch, self._scale)

    @torch.no_grad()
    def prepare(self, model: CodiModel, batches: list[Pair]) -> None:
        """Reads the teacher of all micro-batches once more where there are several; the official code takes each one's own."""
        s, self._scale = model.config, None
        if s.compat or not (s.distill_loss_factor and s.distill_loss_div_std) or (len(batches) == 1 and world_size() == 1):
            return
        states = torch.cat([second_teacher(model, batch, s) for batch in batches], 1)
        self._scale = scale_of(over_processes(states), "layerwise_std")


def alignment(student: Tensor, teacher: Tensor, s: CodiSettings, scale: Tensor | None = None) -> Tensor:
    """Distance of states (N, R, D), averaged over layers; squared errors are divided twice by the teacher's deviation."""
    size, squared = "none" if not s.distill_loss_div_std else "layerwise_std" if scale is None else scale, s.distill_loss_type == "l2"
    return distillation(student, teacher, "mse" if squared else "smooth_l1", size, power=2 if squared else 1)


def counts(batch: Pair, s: CodiSettings | None = None) -> dict[str, int]:
    """What each part is a mean over; under compat micro-batches weigh by their rows alone, as the official code averages them."""
    found = {"ce": batch.student.labelled, "ref_ce": batch.teacher.labelled, "distill": len(batch)}
    if s is not None and s.compat:
        found = dict.fromkeys(found, len(batch))
    return found if s is None or needs_teacher(s) else {"ce": found["ce"]}


def needs_teacher(s: CodiSettings) -> bool:
    """Whether any loss looks at the written continuation."""
    return s.ref_loss_factor > 0 or s.distill_loss_factor > 0


def student_alone(model: CodiModel, batch: Pair) -> Unrolled:
    """Question, thoughts and answer without a teacher beside them."""
    decoder, student = _Marked(model), batch.student
    kv = read_question(decoder, batch)[1]
    return unroll(decoder, student.prompt.block(decoder), student.counts, student.after.block(decoder), model.feedback, kv=kv)


@torch.no_grad()
def second_teacher(model: CodiModel, batch: Pair, s: CodiSettings) -> Tensor:
    """The targets (N, R, D) from a pass of their own, with its own dropout, as the official code makes them."""
    return at_column(read_teacher(model.decoder, batch, taps_of(model, s)).taps, batch.teacher.target)


class _Marked:
    """The decoder with the marks' own vectors in place of their rows of the table."""

    def __init__(self, model: CodiModel):
        self._decoder, self._marks, self._s = model.decoder, model.parts.marks, model.config

    def __getattr__(self, name: str):
        return getattr(self._decoder, name)

    def __call__(self, *args, **kwargs):
        return self._decoder(*args, **kwargs)

    def embed(self, ids: Tensor) -> Tensor:
        x = self._decoder.embed(ids)
        if self._marks is None:
            return x
        for mark, token in zip(self._marks, (self._s.bot_id, self._s.eot_id), strict=True):
            x = torch.where((ids == token)[..., None], mark.to(x.dtype), x)
        return x


def official(model: CodiModel, batch: Pair) -> Passes:
    """As the official code: pads of the question are hidden from it alone, thoughts and answer see them, and positions count them."""
    decoder, s, taps = model.decoder, model.config, taps_of(model, model.config)
    states, kv, start = read_question(decoder, batch)
    teacher = read_on(decoder, states, batch.teacher.after.block(decoder), kv, start, taps)
    return Passes(teacher, _official_student(model, batch, s, taps), states[:, -1])


def _official_student(model: CodiModel, batch: Pair, s: CodiSettings, taps: tuple[int, ...]) -> Unrolled:
    decoder, kv, mask = model.decoder, model.decoder.grow(), _with_bot(batch)
    x = torch.cat((decoder.embed(batch.question.ids), decoder.embed(batch.student.prompt.ids)), 1)
    outs = [decoder(x, _columns(kv, x), kv, valid=mask)]
    kv.valid, inputs = torch.ones_like(kv.valid), []
    for _ in range(s.num_latent):
        inputs.append(model.feedback(outs[-1].last[:, -1])[:, None])
        outs.append(decoder(inputs[-1], _columns(kv, x[:, :1]), kv))
    if s.fix_attn_mask:
        kv.valid = torch.cat((mask, kv.valid[:, mask.shape[1] :]), 1)
    after: Block = batch.student.after.block(decoder)
    out = decoder(after.x, _columns(kv, after.x), kv, valid=after.valid, taps=taps)
    states = torch.cat([o.last for o in outs[1:]], 1) if inputs else outs[0].last[:, :0]
    none = states[:, :0]
    fed = torch.cat(inputs, 1) if inputs else none
    return Unrolled(outs[0].last, states, fed, out.last, batch.student.counts, {tap: (none, none, out.taps[tap]) for tap in taps}, kv)


def _with_bot(batch: Pair) -> Tensor:
    asked = batch.question
    mask = torch.ones_like(asked.ids, dtype=torch.bool) if asked.valid is None else asked.valid
    return torch.cat((mask, torch.ones_like(batch.student.prompt.ids, dtype=torch.bool)), 1)


def _columns(kv, x: Tensor) -> Tensor:
    return torch.arange(kv.columns, kv.columns + x.shape[1], device=x.device).expand(x.shape[:2])
