"""What an ablation is made on: a model, the questions it is asked, and what judges its answers; of any run of this lab, or any model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.data.examples import Example
from lab.errors import RunError, SettingsError, unknown
from lab.latent.record import Response
from lab.models.latent_model import MANIFEST, LatentModel
from lab.running.runs import MANIFEST as RUN
from lab.running.runs import Run, latest, open_run


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        questions: what `generate` is asked. gold: the answer to each, as `right` (answer, gold) wants it; equal ones are the same answer.
        options: of `generate`. name: the paper of its run, else its method. about: a line that says what this is.
    """

    model: LatentModel
    questions: Sequence[Any]
    gold: Sequence[Any]
    right: Callable[[Response, Any], bool]
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    about: str = ""

    def first(self, count: int) -> "Subject":
        """The same with the first `count` questions only; 0 = all."""
        return replace(self, questions=self.questions[: count or None], gold=self.gold[: count or None])


def subject_of(
    model: str = "", paper: str = "coconut", *, arm: str = "", benchmark: str = "gsm8k", data: str = "", seed: int = 0, **options: Any
) -> Subject:
    """The subject of a name.

    Args:
        model: a run folder, or a step or a model in one: asked and judged as that run's evaluation does; else anything `lab.load` opens,
            asked `benchmark`; "" = the newest toy run of `paper`, made where there is none.
        arm: of a run with several; "" = its method's own. data: folder with the benchmark. seed: of a run that is made.
        options: of `generate`.
    """
    path = Path(model).expanduser() if model else _toy_run(paper, seed)
    run = next((place for place in (path, *path.parents) if (place / RUN).is_file()), None) if path.exists() else None
    if run is not None:
        inside = path.resolve().relative_to(run.resolve())
        found = of_run(open_run(run), arm or (inside.name if (path / MANIFEST).is_file() else ""), inside)
        return replace(found, options={**found.options, **options})
    return of_benchmark(model, benchmark, data, **options)


def _toy_run(paper: str, seed: int) -> Path:
    import lab

    try:
        return latest(paper, "toy", finished=True)
    except RunError:
        return lab.run(paper, "toy", {"seed": str(seed)})


def of_benchmark(model: str | LatentModel, benchmark: str, data: str = "", **options: Any) -> Subject:
    """A model asked a benchmark's test questions, leniently judged."""
    import lab
    from lab.data.answers import score

    asked = lab.load_benchmark(benchmark, "test", data)
    loaded = model if isinstance(model, LatentModel) else lab.load(model)
    right = lambda row, gold: bool(score(row.text, gold, benchmark).lenient_correct)  # noqa: E731
    return Subject(
        loaded, list(asked), [e.answer for e in asked], right, options, loaded.method, f"{loaded.method}, {loaded.source}: {benchmark}"
    )


def of_run(run: Run, arm: str = "", inside: Path = Path()) -> Subject:
    """The model of a finished run with the questions and the judge of its evaluation.

    Args:
        inside: the step or the model in the run folder to take; the method's last training where it names none.
    """
    paper = run.manifest["paper"]
    if paper not in RUNS:
        raise unknown("paper", paper, RUNS)
    place, ask, last = RUNS[paper]
    record = run.step(last)
    if record is None:
        raise RunError(f"{run.folder} has no finished step {last!r}, which says what its models are asked; finish it with --resume.")
    values = record.info["parameters"]
    folder = run.folder / inside
    if not (folder / MANIFEST).is_file():
        folder = place(run.folder, inside, arm)
    if not (folder / MANIFEST).is_file():
        there = sorted(str(path.parent.relative_to(run.folder)) for path in run.folder.glob(f"[!.]*/**/{MANIFEST}"))
        raise unknown("model in this run", str(folder.relative_to(run.folder)), there)
    found = ask(folder, values)
    return replace(found, name=paper, about=f"{paper}, {folder}: {len(found.questions)} questions")


def _of_examples(
    folder: Path, examples: Sequence[Example], judge: Callable[[LatentModel, str, str], bool], options: Mapping[str, Any]
) -> Subject:
    """Questions in words, judged by text."""
    from lab.models.layouts import load

    model = load(folder)
    return Subject(model, list(examples), [example.answer for example in examples], lambda row, gold: judge(model, row.text, gold), options)


def _feedback(paper: str) -> Callable[[Path, dict[str, Any]], Subject]:
    def ask(folder: Path, values: dict[str, Any]) -> Subject:
        from lab.data.source import Source

        source = Source.check(**{name: values[name] for name in Source.model_fields if name in values})
        return _of_examples(
            folder,
            source.held_out(),
            lambda model, text, gold: bool(source.score(text, gold, paper).strict_correct),
            {"max_new_tokens": values["max_new_tokens"]},
        )

    return ask


def _adaptive(folder: Path, values: dict[str, Any]) -> Subject:
    from lab.methods.adaptive import options, stages
    from lab.methods.adaptive.data import first_number
    from lab.methods.adaptive.reinforce import TOLERANCE, answer_of

    def right(model: Any, text: str, gold: str) -> bool:
        value, wanted = answer_of(text), first_number(gold)
        return value is not None and wanted is not None and abs(value - wanted) < TOLERANCE

    val = options.resolve_val(values["val_config_options"])
    names = ("world", "data", "train_problems", "test_problems", "seed")
    asked = stages.Source(*(values[name] for name in names)).held_out(val["data_name"], val["split"])
    given = {} if val["latent_thought_count_override"] is None else {"thoughts": val["latent_thought_count_override"]}
    return _of_examples(folder, asked, right, {"max_new_tokens": values["max_new_tokens"], **given})


def _colar(folder: Path, values: dict[str, Any]) -> Subject:
    from lab.data.answers import strict
    from lab.methods.colar import stages

    asked = stages.questions(values["benchmark"], "test", values["test_questions"], values["seed"], values["data"])
    options = {**stages.decoding(True), "speed": values["speeds"][0], **{k: values[k] for k in ("thoughts", "max_new_tokens")}}
    return _of_examples(folder, asked, lambda model, text, gold: strict(text, gold, values["rule"])[1], options)


def _dtt(folder: Path, values: dict[str, Any]) -> Subject:
    from lab.methods.dtt import stages
    from lab.methods.dtt.evaluate import judge

    def right(model: Any, text: str, gold: str) -> bool:
        how = (values["benchmark"], model.config.gate, model.config.bot_in_prompt)
        return bool(judge(text, Example("", "", (), gold), *how).strict_correct)

    asked = stages.examples(values["benchmark"], "test", values["questions"], values["seed"], values["data"])
    return _of_examples(folder, asked, right, {"max_new_tokens": values["max_new_tokens"]})


def _latenttts(folder: Path, values: dict[str, Any]) -> Subject:
    from lab.methods.latenttts import stages
    from lab.sampling.pool import RULES, judge

    asked = stages.questions(values["benchmark"], "test", values["questions"], values["seed"], values["data"])
    options = {"max_new_tokens": values["max_new_tokens"]}
    return _of_examples(folder, asked, lambda model, text, gold: judge(text, gold, RULES.get(model.method, "codi"))[1], options)


def _tah(folder: Path, values: dict[str, Any]) -> Subject:
    """The toy's first question of each test row that needs a second look; the answer is one token."""
    from lab.methods.tah.prepare import Labelled
    from lab.models.layouts import load

    rows = Labelled(next(place / "label" for place in folder.parents if (place / "label").is_dir())).rows("test")
    if "hard" not in rows[0]:
        raise SettingsError("This run's test rows are texts, not questions with answers of a token; name a model and a benchmark.")
    places = [(row["real_token"], row["mask"].index(1), row["hard"].index(1)) for row in rows if 1 in row["hard"]]
    asked = [[*ids[: first - 1], ids[hard]] for ids, first, hard in places]
    gold = [ids[hard + 1] for ids, _, hard in places]
    return Subject(load(folder), asked, gold, lambda row, answer: row.ids == [answer], {"max_new_tokens": 1})


def unanswered(prompted: Any) -> Any:
    """A toy's question with its answer, `lab.methods.lta.prompting.Prompted`, without the answer."""
    row, length = prompted.row, len(prompted.answer)
    return replace(prompted, row=replace(row, after=row.after[:-length], labels=row.labels[:-length]))


def _lta(folder: Path, values: dict[str, Any]) -> Subject:
    from lab.methods.lta import explore, stages

    if values["large_model_id"] != stages.TOY:
        raise SettingsError("This run is not the toy's; name its model and a benchmark.")
    model = stages.toy_model(folder.parent, folder.name, values["seed"])
    return of_hidden_instructions(model, explore.asked(model, values))


def of_hidden_instructions(model: LatentModel, found: Sequence[Any]) -> Subject:
    """LTA-Thinker's micro-task; the answer to each question in `found` is a whole row of digits."""
    from lab.latent.sampling import Sampling

    options = {"max_new_tokens": len(found[0].answer), "sampling": Sampling()}
    gold = [prompted.answer for prompted in found]
    return Subject(model, [unanswered(prompted) for prompted in found], gold, lambda row, answer: tuple(row.ids) == answer, options)


def _arm(own: str) -> Callable[[Path, Path, str], Path]:
    return lambda run, inside, arm: run / (inside if inside.parts else "train") / (arm or own)


def _newest(*steps: str) -> Callable[[Path, Path, str], Path]:
    """The last of `steps` that took part; a model is directly in it, or in its one folder that holds one."""

    def place(run: Path, inside: Path, arm: str) -> Path:
        step = run / (inside if inside.parts else next((name for name in reversed(steps) if (run / name).is_dir()), steps[0]))
        return step / arm if arm else next((path.parent for path in sorted(step.glob(f"*/{MANIFEST}"))), step)

    return place


# paper: where the model lies in a run, what asks it, and the step whose parameters say how
RUNS: dict[str, tuple[Callable[[Path, Path, str], Path], Callable[[Path, dict[str, Any]], Subject], str]] = {
    "coconut": (_arm("coconut"), _feedback("coconut"), "evaluate"),
    "codi": (_arm("codi"), _feedback("codi"), "evaluate"),
    "adaptive": (_newest("train", "rl"), _adaptive, "evaluate"),
    "colar": (_newest("train", "rl"), _colar, "evaluate"),
    "dtt": (_arm("pathwise"), _dtt, "evaluate"),
    "tah": (_newest("train1", "train2"), _tah, "evaluate"),
    "lta": (_arm("lta"), _lta, "evaluate"),
    "softcot": (_arm("softcot"), _lta, "evaluate"),
    "latenttts": (_newest("annotate"), _latenttts, "sample"),
}
