"""Papers on disk: pipelines, recipes, sweeps, and what each step of a recipe is given. Nothing here starts a kernel."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lab.config import Settings
from lab.errors import SettingsError, unknown
from lab.running.parameters import Parameter, check_values, parameters_of
from lab.running.provenance import home

OWN = ("run",)  # parameters that the workbench itself sets, never a recipe


class StepSpec(Settings):
    """One line of a pipeline: a notebook, the steps whose results it reads, and the parameter values under which it takes part."""

    step: str
    notebook: str
    needs: list[str] = []
    when: dict[str, Any] = {}

    @property
    def path(self) -> Path:
        """Where the notebook lies."""
        return home() / "notebooks" / self.notebook


class Pipeline(Settings):
    """The steps of one paper, in an order that respects `needs`."""

    paper: str
    title: str
    about: str = ""  # one or two sentences for the report
    result: str = ""  # the step whose headline is the paper's result
    steps: list[StepSpec]

    def spec(self, step: str) -> StepSpec:
        """The line of `step`; SettingsError with the closest match if there is none."""
        for spec in self.steps:
            if spec.step == step:
                return spec
        raise unknown(f"step of {self.paper}", step, [spec.step for spec in self.steps])

    def parameters(self) -> dict[str, Parameter]:
        """Every parameter of the pipeline's notebooks by name; the first notebook that has it speaks for it."""
        found: dict[str, Parameter] = {}
        for spec in self.steps:
            found = {**parameters_of(spec.path), **found}
        return {name: parameter for name, parameter in found.items() if name not in OWN}


class Setting(Settings):
    """Under what a number was measured, as far as its source says; "" = it does not."""

    backbone: str = ""
    dataset: str = ""
    split: str = ""
    decoding: str = ""
    note: str = ""

    @property
    def stated(self) -> bool:
        """Whether the source says anything that can be compared."""
        return bool(self.backbone or self.dataset)


class Reported(Settings):
    """Numbers as a paper or its repository gives them, with the place they were seen.

    A value is named by its data set (`gsm8k: 34.1` is an accuracy, `gsm8k_tokens` another measure) or by its measure. `arm` is the one
    of our results that it stands beside, `scale` what an accuracy of 1 is in the paper's unit.
    """

    claim: str
    setting: Setting = Setting()
    arm: str = ""
    scale: float = 1.0
    values: dict[Any, Any] = {}
    source: str


class Planned(Settings):
    """A step as it will run: its line of the pipeline and the value of every parameter."""

    spec: StepSpec
    given: dict[str, Any]  # differences from the notebook's defaults
    values: dict[str, Any]  # everything, `run` left out

    @property
    def step(self) -> str:
        return self.spec.step


def papers() -> list[str]:
    """Keys of all papers that have a pipeline."""
    return sorted(path.parent.name for path in (home() / "papers").glob("*/pipeline.yaml"))


def folder(paper: str) -> Path:
    """`papers/<key>`; SettingsError with the closest match for an unknown key."""
    if paper not in papers():
        raise unknown("paper", paper, papers())
    return home() / "papers" / paper


def pipeline(paper: str) -> Pipeline:
    """The checked pipeline of a paper, its steps ordered by `needs`."""
    path = folder(paper) / "pipeline.yaml"
    content = read_yaml(path)
    lines = content.pop("steps", None)
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise SettingsError(f"{path}: `steps` must be a list of lines with `step` and `notebook`.")
    try:
        steps = [StepSpec.check(**line) for line in lines]
        return Pipeline.check(paper=paper, steps=_ordered(steps), **content)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None


def _ordered(steps: list[StepSpec]) -> list[StepSpec]:
    names = [spec.step for spec in steps]
    for spec in steps:
        for need in spec.needs:
            if need not in names:
                raise unknown(f"step needed by {spec.step}", need, names)
        if names.count(spec.step) > 1:
            raise SettingsError(f"step {spec.step!r} stands there twice.")
    done: list[StepSpec] = []
    while len(done) < len(steps):
        ready = [spec for spec in steps if spec not in done and set(spec.needs) <= {other.step for other in done}]
        if not ready:
            raise SettingsError("`needs` go round in a circle.")
        done.append(ready[0])
    return done


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; SettingsError naming file and line if it is not one."""
    content = load_yaml(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: must hold `name: value` lines.")
    return content


def load_yaml(path: Path) -> Any:
    """What a YAML file holds; SettingsError naming file and line if it is not YAML."""
    try:
        return yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise SettingsError(f"There is no file {path}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise SettingsError(f"{path}, line {line}: not valid YAML ({getattr(error, 'problem', error)}).") from None


def recipes(paper: str) -> list[str]:
    """Names of a paper's recipes; `<recipe>-<step>.yaml` beside `<recipe>.yaml` is part of that recipe."""
    stems = {path.stem for path in (folder(paper) / "recipes").glob("*.yaml")}
    steps = [spec.step for spec in pipeline(paper).steps]
    parts = {f"{stem}-{step}" for stem in stems for step in steps}
    return sorted(stems - parts)


def plan(paper: str, recipe: str, overrides: Mapping[str, str] | Iterable[str] = ()) -> list[Planned]:
    """What `lab run` will do: every step that takes part, with its checked values.

    `overrides` are texts, `name=value` or `step.name=value`, or a mapping of such names to text; YAML literals.
    Raises SettingsError for an unknown recipe, step or parameter (closest match named) or a wrong type.
    """
    pipe, here = pipeline(paper), folder(paper) / "recipes"
    if recipe not in recipes(paper):
        raise unknown(f"recipe of {paper}", recipe, recipes(paper))
    shared = _shared(pipe, here / f"{recipe}.yaml")
    extra = {spec.step: _own(spec, here / f"{recipe}-{spec.step}.yaml") for spec in pipe.steps}
    for step, values in _overrides(pipe, overrides).items():
        extra[step] |= values
    planned = [_planned(spec, {**_known(spec, shared), **extra[spec.step]}) for spec in pipe.steps]
    return _taking_part(planned)


def _shared(pipe: Pipeline, path: Path) -> dict[str, Any]:
    known, values = pipe.parameters(), read_yaml(path)
    try:
        for name, value in values.items():
            if name not in known:
                raise unknown(f"parameter of the {pipe.paper} pipeline", name, known)
            known[name].check(value)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    return values


def _own(spec: StepSpec, path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = read_yaml(path)
        for name in OWN:
            if name in values:
                raise SettingsError(f"{name} is set by the workbench, not by a recipe.")
        return check_values(spec.path, values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None


def _known(spec: StepSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    known = parameters_of(spec.path)
    return {name: known[name].check(value) for name, value in values.items() if name in known}


def _overrides(pipe: Pipeline, overrides: Mapping[str, str] | Iterable[str]) -> dict[str, dict[str, Any]]:
    texts = overrides if isinstance(overrides, Mapping) else dict(split_override(item) for item in overrides)
    found: dict[str, dict[str, Any]] = {spec.step: {} for spec in pipe.steps}
    for name, text in sorted(texts.items(), key=lambda item: "." in item[0]):
        step, dot, bare = name.rpartition(".")
        targets = [pipe.spec(step)] if dot else pipe.steps
        known = {spec.step: parameters_of(spec.path) for spec in targets}
        if bare in OWN:
            raise SettingsError("The run folder is chosen with --run, not with -p run=….")
        if not any(bare in names for names in known.values()):
            raise unknown(f"parameter of {step or pipe.paper}", bare, {name for names in known.values() for name in names})
        for spec in targets:
            if bare in known[spec.step]:
                found[spec.step][bare] = known[spec.step][bare].parse(text)
    return found


def split_override(item: str) -> tuple[str, str]:
    """("name", "value") of a `name=value` text."""
    name, sign, value = item.partition("=")
    if not sign or not name.strip():
        raise SettingsError(f"-p {item!r}: write name=value.")
    return name.strip(), value.strip()


def _planned(spec: StepSpec, given: dict[str, Any]) -> Planned:
    defaults = {name: parameter.default for name, parameter in parameters_of(spec.path).items() if name not in OWN}
    return Planned(spec=spec, given=given, values={**defaults, **given})


def _taking_part(planned: list[Planned]) -> list[Planned]:
    everywhere: dict[str, Any] = {}
    for step in planned:
        everywhere = {**step.values, **everywhere}
    kept: list[Planned] = []
    for step in planned:
        values = {**everywhere, **step.values}
        for name in step.spec.when:
            if name not in values:
                raise unknown(f"parameter in `when` of {step.step}", name, values)
        if all(values[name] == wanted for name, wanted in step.spec.when.items()):
            kept.append(step)
    return kept


def reported(paper: str) -> list[Reported]:
    """What `papers/<key>/reported.yaml` quotes from the paper; [] where there is no such file."""
    path = folder(paper) / "reported.yaml"
    lines = (load_yaml(path) or []) if path.exists() else []
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise SettingsError(f"{path}: must hold a list of lines with `claim`, `setting`, `values` and `source`.")
    try:
        return [Reported.check(**line) for line in lines]
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None


def result_of(paper: str, headlines: Mapping[str, Any]) -> dict[str, Any]:
    """Of {step: headline}, the step that holds the paper's result (`result` in its pipeline.yaml); all where none is named or there yet."""
    wanted = pipeline(paper).result if paper in papers() else ""
    return {wanted: headlines[wanted]} if wanted in headlines else dict(headlines)


def sweeps(paper: str) -> dict[str, dict[str, list[Any]]]:
    """{recipe: {parameter: values}}: the grids of `papers/<key>/sweeps.yaml` that `lab sweep` runs when no grid is given."""
    path = folder(paper) / "sweeps.yaml"
    return read_yaml(path) if path.exists() else {}
