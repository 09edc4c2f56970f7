"""What each method does with a common start and a number of optimizer steps: its own rows, its own training, its own answers.

Every function here gets the same backbone (a copy), tokenizer, problems and optimizer, calls the method's own training, and hands back
a model and the options it answers with. `lab.compare` measures them.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab.data.examples import Dataset, Example
from lab.errors import unknown
from lab.latent.plan import IGNORE, Row
from lab.train import TrainSettings
from lab.training.meter import Meter

LEARNED = 0.98  # share of exact held-out rows at which COCONUT's stage ends


@dataclass
class Start:
    """What every method begins with.

    Attributes:
        body, tokenizer: a backbone that reasons in writing, as `question steps ### answer`; never changed, see `copy`.
        train, validation: problems. thoughts: how many a question gets where the method takes a number; written steps before it.
        how: the optimizer; `steps` is set by the budget. folder: for logs and checkpoints. meter: counts what training reads.
    """

    body: Any
    tokenizer: Any
    train: Dataset
    validation: Dataset
    thoughts: int
    how: TrainSettings
    folder: Path
    meter: Meter = field(default_factory=Meter)

    def copy(self) -> tuple[Any, Any]:
        """(backbone, tokenizer) to train."""
        return copy.deepcopy(self.body), copy.deepcopy(self.tokenizer)

    def settings(self, steps: int) -> TrainSettings:
        """The common optimizer for `steps` steps."""
        return self.how.but(steps=steps, warmup_steps=min(self.how.warmup_steps, steps // 2))

    def first(self, rows: int) -> Dataset:
        """As many training problems, from the start again where there are fewer."""
        return self.train.but(self.train[index % len(self.train)] for index in range(rows))


@dataclass(frozen=True)
class Trained:
    """A trained model, the options of its `generate`, the soft tokens it reads with every prompt.

    `arm` is the name that the method's own reported.yaml has for it, "" = that of the method.
    """

    model: Any
    options: dict[str, Any] = field(default_factory=dict)
    prompted: int = 0
    arm: str = ""


def untrained(start: Start, steps: int) -> Trained:
    """What all begin with, as it is: it writes."""
    from lab.methods.coconut.config import CoconutSettings

    return Trained(_coconut_model(start, CoconutSettings(mode="cot")))


def no_cot(start: Start, steps: int) -> Trained:
    """The answer at once."""
    return _written(start, steps, "no_cot")


def cot(start: Start, steps: int) -> Trained:
    """Every step in writing: the start, trained on."""
    return _written(start, steps, "cot")


def _written(start: Start, steps: int, mode: str) -> Trained:
    from lab.methods.coconut.config import CoconutSettings, Schedule

    model = _coconut_model(start, CoconutSettings(mode=mode))
    _coconut(start, model, Schedule(epochs=1, reset_optimizer="never"), steps, mode)
    return Trained(model)


def coconut(start: Start, steps: int) -> Trained:
    """One more written step replaced by thoughts at each stage, nothing written at the end.

    A stage ends when it is learned and may take half of the steps that are left; the last one has the rest.
    """
    from lab.methods.coconut.config import CoconutSettings, Schedule

    last = max(len(example.steps) for example in start.train)
    s = CoconutSettings(c_thought=max(1, start.thoughts // last), epochs_per_stage=1, max_latent_stage=last)
    model, left = _coconut_model(start, s), steps
    for stage in range(1, last + 1):
        ends = stage < last
        schedule = Schedule(epochs=stage + 1, resume=stage, switch_at=LEARNED if ends else 0.0)
        left -= _coconut(start, model, schedule, max(1, left // 2 if ends else left), f"coconut-{stage}")
    return Trained(model)


def _coconut_model(start: Start, s: Any) -> Any:
    from lab.methods.coconut.model import CoconutModel

    return CoconutModel.start(*start.copy(), s)


def _coconut(start: Start, model: Any, schedule: Any, steps: int, name: str) -> int:
    """Trains a COCONUT model (or its written controls) through a schedule of one epoch; the steps it took."""
    from lab.methods.coconut.data import tokenize
    from lab.methods.coconut.train import train

    rows, held = (tokenize(part, model.tokenizer) for part in (start.first(steps * start.how.global_batch), start.validation))
    how = start.settings(steps).but(eval_every=25 if schedule.switch_at else 0)
    with start.meter:
        found = train(model, rows, held, schedule, how, start.folder / name)
    return sum(part.steps for part in found)


def codi(start: Start, steps: int) -> Trained:
    """Teacher and student in one step, the student's thoughts drawn to where the writing leads."""
    from lab.methods.codi.config import CodiSettings
    from lab.methods.codi.data import prepare
    from lab.methods.codi.model import CodiModel
    from lab.methods.codi.train import train

    width = start.body.config.hidden_size
    s = CodiSettings(num_latent=start.thoughts, prj_dim=width, distill_loss_factor=5.0, include_last_cot=True, lora_r=0)
    model = CodiModel.start(*start.copy(), s)
    rows = prepare(map(_without_last, start.train), model.tokenizer, model.config).rows
    with start.meter:
        train(model, rows, start.settings(steps), start.folder / "codi")
    return Trained(model)


def _without_last(example: Example) -> Example:
    """The example with all but the last step, which says the answer: a teacher who has read it copies, and shows nothing of how."""
    return replace(example, steps=example.steps[:-1], extra={})


def adaptive(start: Start, steps: int) -> Trained:
    """A fixed number of thoughts through the recurrent filter (Latent-6 of the paper with another number), CODI's distance."""
    from lab.methods.adaptive.config import AdaptiveSettings, Distil
    from lab.methods.adaptive.model import AdaptiveModel
    from lab.methods.adaptive.stages import train_sft

    model = AdaptiveModel.start(*start.copy(), AdaptiveSettings(), multiple=1)
    distil = Distil(bias=start.thoughts, weight_codi=5.0, distance="smooth_l1", scale="layerwise_std", sentences=True)
    distil = distil.but(mask_thought_labels=True, remove_last_step=True)
    with start.meter:
        train_sft(model, start.train, distil, start.settings(steps), start.folder / "adaptive")
    return Trained(model, {"thoughts": start.thoughts}, arm="train")


def colar(start: Start, steps: int) -> Trained:
    """Reasoning merged by 1 to as much as leaves `thoughts` groups; answers at the largest speed, greedily."""
    from lab.methods.colar.config import ColarSettings
    from lab.methods.colar.model import ColarModel
    from lab.methods.colar.stages import decoding
    from lab.methods.colar.train import prepare, train

    body, tokenizer = start.copy()
    tokens = len(tokenizer("\n".join(start.train[0].steps), add_special_tokens=False).input_ids)
    speed = max(1, tokens // start.thoughts)
    model = ColarModel.start(body, tokenizer, ColarSettings(max_compression_factor=speed, lora_r=0))
    rows = prepare(start.train, model)
    with start.meter:
        train(model, rows.rows, start.settings(steps), start.folder / "colar")
    greedy = {name: value for name, value in decoding(greedy=True).items() if name != "sampling"}
    return Trained(model, {**greedy, "speed": speed}, arm=f"speed {speed}")


def dtt(start: Start, steps: int) -> Trained:
    """The supervised half: `[bot] steps [eot] answer`, then the same with random gates open. Gates learn to open by GRPO only."""
    from lab.methods.dtt.config import GatedSettings
    from lab.methods.dtt.data import collate, prepare
    from lab.methods.dtt.model import SparseGatedModel
    from lab.methods.dtt.objective import gated_warm_up, targets, warm_up
    from lab.train import fit

    model = SparseGatedModel.start(*start.copy(), GatedSettings())
    rows, batch = prepare(start.train, model.tokenizer, model.config).rows, partial(collate, s=model.config)
    half = max(1, steps // 2)
    start.meter.watch(model.stem)
    with start.meter:
        fit(model, rows, batch, warm_up, start.settings(half), start.folder / "dtt-warm", count=targets, label="dtt")
        model.fit_projection([batch(rows[at : at + 64]) for at in range(0, min(512, len(rows)), 64)])
        fit(model, rows, batch, gated_warm_up(), start.settings(half), start.folder / "dtt-gated", count=targets, label="dtt, gated")
    return Trained(model)


def tah(start: Start, steps: int) -> Trained:
    """Written reasoning whose hard tokens, those the start gets wrong, are read twice; the decider learns in the last quarter."""
    from lab.methods.tah.config import TahConfig
    from lab.methods.tah.data import ExampleSettings, build_examples
    from lab.methods.tah.labels import statistics
    from lab.methods.tah.training import build_arm, choose_threshold, train_model, train_step2, with_mlp

    how, folder = ExampleSettings(align="target", prefilter=False), start.folder
    config = TahConfig(input_updater_kwargs={"topk": 20}, adapter_kwargs={"r": 8, "lora_alpha": 16.0, "lora_dropout": 0.0})
    body, tokenizer = start.copy()
    last = body.config.num_hidden_layers
    decider = {"topk": 20, "hidden_states_layer_nums": [0, last], "hidden_dims": [32, 32], "expansion_factor": 2, "pos_weight": 5.4}
    rows, held = (_masked(part, tokenizer) for part in (start.train, start.validation))
    with start.meter:
        examples = build_examples(statistics(body, rows), how)
        held_out = build_examples(statistics(body, held), how)
        first = max(1, steps * 3 // 4)
        model = build_arm("tah", body, config, tokenizer)
        train_model(model, examples, start.settings(first), folder / "tah-1", label="tah")
        deep = with_mlp(model, **decider)
        second = start.settings(max(1, steps - first)).but(global_batch=16 * start.how.global_batch)
        train_step2(deep, examples, second, folder / "tah-2", max_tokens=100_000)
        choose_threshold(deep, held_out, "accuracy", 0.0)
    return Trained(deep)


def _masked(problems: Sequence[Example], tokenizer: Any) -> list[dict[str, Any]]:
    """Rows of ids with the written part marked, in the form the start knows."""
    from lab.methods.coconut.data import tokenize

    rows = []
    for number, row in enumerate(tokenize(problems, tokenizer)):
        written = [*(token for step in row.steps for token in step), *row.answer]
        mask = [0] * len(row.question) + [1] * len(written)
        rows.append({"data_id": number, "real_token": [*row.question, *written], "mask": mask})
    return rows


def softcot(start: Start, steps: int) -> Trained:
    """The frozen start writes; a projection of the states of a frozen assistant, here the start itself, is read before it does."""
    alone = {"sft_loss_weight": 1.0, "contrastive_loss_weight": 0.0, "kl_loss_weight": 0.0}
    return _prefix(start, steps, "softcot", generator="assistant", gold_steps="off", distinct_slots=False, **alone)


def lta(start: Start, steps: int) -> Trained:
    """The frozen start writes; a trainable block makes what it reads before, with alignment and focus losses."""
    return _prefix(start, steps, "lta", generator="block")


def _prefix(start: Start, steps: int, name: str, **kind: Any) -> Trained:
    from lab.methods.lta.config import LtaSettings
    from lab.methods.lta.data import batch_of
    from lab.methods.lta.model import ThoughtModel
    from lab.methods.lta.objective import counter, loss
    from lab.methods.softcot.model import SoftcotModel
    from lab.train import fit

    s = LtaSettings(num_thought_tokens=start.thoughts, **kind)
    body, tokenizer = start.copy()
    torch.manual_seed(start.how.seed)
    maker = SoftcotModel if name == "softcot" else ThoughtModel
    model = maker.start(body, tokenizer, s, copy.deepcopy(start.body) if s.generator == "assistant" else None)
    ask = partial(_asked, tokenizer=tokenizer, n=start.thoughts)
    rows = [ask(example, solution=s.gold_steps != "off") for example in start.train]
    with start.meter:
        fit(model, rows, batch_of, loss, start.settings(steps), start.folder / name, count=counter(model), label=name)
    return Trained(_Asking(model, ask), {}, start.thoughts)


class _Asking:
    """A model that is asked examples, and reads them as prompts with room for thoughts."""

    def __init__(self, model: Any, ask: Callable[[Example], Any]):
        self._model, self._ask = model, ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, questions: Sequence[Example], samples: int = 1, **options: Any) -> Any:
        """As the model's own."""
        return self._model.generate([self._ask(example) for example in questions], samples, **options)


def _asked(example: Example, tokenizer: Any, n: int, solution: bool | None = None) -> Any:
    """An example in the form the start knows, with `n` thoughts before the question, which must not be torn apart: a toy counts places.

    `solution`: whether the thoughts' generator is shown the steps; None is a test prompt.
    """
    from lab.methods.coconut.data import tokenize
    from lab.methods.lta.prompting import Prompted

    row, pad = tokenize([example], tokenizer)[0], tokenizer.pad_token_id
    written = () if solution is None else (*(token for step in row.steps for token in step), *row.answer)
    spans, flat = [], list(row.question)
    for step in row.steps if solution else ():
        spans.append((len(flat), len(flat) + len(step)))
        flat += step
    slots = tuple(range(len(flat), len(flat) + n))
    lead = tuple(tokenizer(":", add_special_tokens=False).input_ids)
    base = Row(lead, (*row.question, *written), (IGNORE,) * (len(lead) + len(row.question)) + written, thoughts=n)
    shown = tuple(range(len(row.question), len(flat)))
    ends = tuple(stop - 1 for _, stop in spans)
    answer = row.answer if solution is not None else ()
    return Prompted(base, (*flat, *[pad] * n), slots, len(row.question) - 1, tuple(spans), ends, answer, shown)


ENTRANTS: dict[str, Callable[[Start, int], Trained]] = {"start": untrained}
ENTRANTS |= {entrant.__name__: entrant for entrant in (no_cot, cot, coconut, codi, adaptive, colar, tah, dtt, softcot, lta)}


def entrant(name: str) -> Callable[[Start, int], Trained]:
    """The function of that name; SettingsError with the closest match for an unknown one."""
    if name not in ENTRANTS:
        raise unknown("method to compare", name, ENTRANTS)
    return ENTRANTS[name]
