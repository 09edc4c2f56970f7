"""Toys for the tour, one for each place a thought can stand: the newest demo run or, where there is none, a smaller one trained here."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab.ablation.subjects import RUNS, Subject, of_run, unanswered
from lab.errors import DataError, RunError, unknown
from lab.files import read_json, write_json
from lab.look import CANDIDATES, Look, first_look
from lab.running import papers
from lab.running.runs import latest, open_run

PLACES = {"extra positions": "coconut", "second passes": "tah", "in the prompt": "softcot"}
FACTS = "tour.json"


def toy(paper: str, folder: Path | str, *, fresh: bool = False, effort: float = 1.0, seed: int = 0) -> Subject:
    """A model of `paper` that thinks, with its test questions; `about` says where it comes from.

    Args:
        folder: where what is trained here lies, and is found again. fresh: do not look for a demo run.
        effort: of a training, as a share of its steps.
    """
    if paper not in TRAIN:
        raise unknown("paper of the tour", paper, TRAIN)
    if not fresh:
        try:
            return of_run(open_run(latest(paper, "toy", finished=True)))
        except RunError:
            pass
    where, asked = Path(folder) / paper, {"effort": effort, "seed": seed}
    if not (where / FACTS).is_file() or read_json(where / FACTS)["asked"] != asked:
        began = time.monotonic()
        model, values = TRAIN[paper](where, lambda steps: max(2, round(steps * effort)), seed)
        facts = {"asked": asked, "model": str(model.relative_to(where)), "values": values, "seconds": round(time.monotonic() - began)}
        write_json(where / FACTS, facts)
    facts = read_json(where / FACTS)
    found = RUNS[paper][1](where / facts["model"], facts["values"])
    return replace(found, name=paper, about=f"{paper}, trained for the tour in {facts['seconds']} s: {len(found.questions)} questions")


def ask(subject: Subject, prompt: str = "") -> Look:
    """The answer to a prompt of one's own, written as the toy's questions are; "" takes its first test question."""
    if subject.model.tokenizer is None:
        return _ask_digits(subject, prompt)
    return first_look(subject.model, prompt or subject.questions[0], **subject.options)


def _ask_digits(subject: Subject, prompt: str) -> Look:
    """Of the prefix toy, which reads ids: five digits, answered by digits; its thoughts with the nearest tokens."""
    import numpy as np

    from lab.data.worlds.instruct import InstructTask
    from lab.methods.lta.explore import thought_trace
    from lab.methods.lta.toy import WORLD, questions

    words, s, (question, *_) = WORLD.vocabulary, subject.model.config, subject.questions
    if prompt:
        if len(prompt.split()) != WORLD.digits or not set(prompt.split()) <= set("0123456789"):
            raise DataError(f"{prompt!r} is no question of this toy: it reads {WORLD.digits} digits, such as 4 7 1 9 2.")
        x = np.array([[words.index(word) for word in prompt.split()]])
        (made,) = questions(InstructTask(x, x, x[:, 0] < 0), s.num_thought_tokens, solution=False, distinct=s.distinct_slots)
        question = unanswered(made)
    (row,) = subject.model.generate([question], **subject.options).rows
    return Look(" ".join(words[token] for token in row.ids), thought_trace(subject.model, [question], CANDIDATES))


def _coconut(folder: Path, steps: Callable[[int], int], seed: int) -> tuple[Path, dict[str, Any]]:
    """Two permutations in turn, a stage for each."""
    from lab.data.source import Source
    from lab.methods.coconut import stages
    from lab.methods.coconut.config import CoconutSettings, Schedule
    from lab.train import TrainSettings

    values = {"benchmark": "permutations", "hops": 2, "train_problems": 64 * steps(50), "test_problems": 200, "seed": seed}
    stage = steps(8)
    source, settings = Source.check(**values), CoconutSettings.check(c_thought=1, max_latent_stage=2, epochs_per_stage=stage)
    schedule = Schedule.check(epochs=3 * stage, switch_at=0.98)
    optimizing = {"lr": 1e-3, "schedule": "constant", "decay_all": True, "save_every": 0, "eval_every": 25}
    how = TrainSettings.check(steps=1, global_batch=64, seed=seed, **optimizing)
    shape = {"layers": 1, "initializer_range": 0.1}
    stages.run_arm("coconut", source, source.train(), settings, schedule, how, folder, lambda **row: None, backbone="toy:gpt2", **shape)
    return folder / "coconut", values | {"max_new_tokens": 8}


def _tah(folder: Path, steps: Callable[[int], int], seed: int) -> tuple[Path, dict[str, Any]]:
    """Pointer chasing: a one-layer base, its hard tokens, second passes for them, and the decider."""
    from lab.methods.tah import plan, stages
    from lab.methods.tah.labels import Labelling
    from lab.methods.tah.prepare import Preparation

    one, two = ({p.step: p.values for p in papers.plan("tah", "toy", {"seed": str(seed)})}[name] for name in ("train1", "train2"))
    how = Preparation.check(train=64 * steps(300), validation=64, test=200, base_steps=steps(500), seed=seed)
    stages.label(folder / "label", how, Labelling())
    one, two = one | {"steps": steps(300)}, two | {"steps": steps(150)}
    shared = {"label": str(folder / "label"), "examples": plan.example_settings(one)}
    made = {"folder": str(folder / "train1"), "training": plan.training_settings(one), "tah": plan.model_settings(one)}
    stages.run_arm("tah", **made, **shared)
    decided = {"folder": str(folder / "train2"), "training": plan.training_settings(two), "decider": plan.decider_settings(two)}
    stages.run_step2(model=str(folder / "train1" / "tah"), cached=True, max_tokens=100_000, **decided, **shared)
    return folder / "train2" / "tah", {}


def _softcot(folder: Path, steps: Callable[[int], int], seed: int) -> tuple[Path, dict[str, Any]]:
    """Hidden instructions: a frozen base that obeys them, and thoughts that stand in for one."""
    from lab.methods.lta import stages

    stages.toy_base(folder, seed, steps(500))
    stages.toy_arm("softcot", str(folder), seed, steps(300), 4)
    return folder / "softcot", {"large_model_id": stages.TOY, "seed": seed, "questions": 200}


TRAIN = {"coconut": _coconut, "tah": _tah, "softcot": _softcot}
