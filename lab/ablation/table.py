"""One table of what every intervention costs a model: accuracy with its interval, and the paired difference to its own thoughts."""

from collections.abc import Sequence
from typing import Any

from lab.ablation.interventions import INTERVENTIONS, Observed, Patched, Replaced, Thoughts, without
from lab.ablation.subjects import Subject
from lab.errors import SettingsError, unknown
from lab.latent.edit import Edit
from lab.latent.record import Response
from lab.progress import progress
from lab.stats import mean_interval, paired_difference, proportion_interval

INTERLEAVED = ("dtt", "tah")  # thoughts stand between words, so that what is said decides how many follow
AT_ONCE = ("lta", "softcot")  # thoughts do not depend on each other
OWN = "as they are"


def ablate(
    subject: Subject,
    *,
    interventions: Sequence[str] = tuple(INTERVENTIONS),
    each: int = 0,
    layers: Sequence[int] | None = (),
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Rows {intervention, kind, accuracy, low, high, difference, difference_low, difference_high, other, changed, questions}.

    `difference` is paired with the same answers under the model's own thoughts; `other` is the share of answers that are right for the
    question the thoughts came from, where that has another answer; `changed` the share of answers that differ at all.

    Args:
        interventions: names from `INTERVENTIONS`; those of kind `vector`.
        each: leave out each of the first `each` thoughts, with the later ones made anew and as they were (kind `thought`).
        layers: hidden states (indices as a decoder's `taps`; None = all) to patch at the thoughts' columns, from the question's donor
            into the clean run (kind `corrupted into clean`) and the reverse (`clean into corrupted`).
        options: of the model's `generate`, over the subject's own; `samples` answers a question.
    Raises SettingsError where the model made no thoughts, for an unknown intervention, or for a layer it does not have.
    """
    for name in interventions:
        if name not in INTERVENTIONS:
            raise unknown("intervention", name, INTERVENTIONS)
    run = _Run(subject, _layers(subject, layers), {"seed": seed, **subject.options, **options})
    own = run.own
    edits: list[tuple[str, str, Edit]] = [(n, "vector", Replaced(own, *INTERVENTIONS[n], seed=seed)) for n in interventions]
    for step in range(min(each, own.vectors.shape[1])):
        edits.append((f"without thought {step + 1}", "thought", Replaced(own, without(step))))
        if subject.model.method not in (*INTERLEAVED, *AT_ONCE) and step + 1 < own.vectors.shape[1]:
            edits.append((f"without {step + 1}, rest kept", "thought", Replaced(own, without(step, frozen=True))))
    rows = [run.row(OWN, "own", run.answers, run.answers)]
    for name, kind, edit in progress(edits, label="interventions"):
        rows.append(run.row(name, kind, run.ask(edit), run.answers, run.donor if name == "another question's" else None))
    for layer in progress(run.layers, label="layers") if run.layers else ():
        rows += run.patched(layer)
    return rows


def _layers(subject: Subject, layers: Sequence[int] | None) -> list[int]:
    there = range(subject.model.backbone.config.num_hidden_layers + 1)
    if wrong := [layer for layer in layers or () if layer not in there]:
        raise SettingsError(f"layers = {wrong}: this model has hidden states 0 to {there[-1]}.")
    return list(there if layers is None else layers)


class _Run:
    """A subject that has answered once by itself."""

    def __init__(self, subject: Subject, layers: list[int], options: dict[str, Any]):
        self.subject, self.layers, self.options = subject, layers, options
        seen, fixed = Observed(layers), subject.model.method not in INTERLEAVED
        self.answers = self.ask(seen)
        count, sets = len(subject.questions), subject.model.settings.get("num_scaling_times", 1)  # SoftCoT++: prompts a question
        samples = -(-options.get("samples", 1) // sets)
        own = seen.thoughts(count * sets * samples, samples, sets * samples, fixed)
        if own is None:
            raise SettingsError(
                f"The model ({subject.model.method}) made no thoughts on these questions, so there is nothing to replace: "
                "it is no model that thinks, or this one did not."
            )
        self.own: Thoughts = own
        self.each = len(self.answers) // count
        self.donor = (own.donors[:: own.each] // own.each).tolist()

    def ask(self, edit: Edit, questions: Sequence[Any] | None = None) -> list[Response]:
        asked = self.subject.questions if questions is None else questions
        return self.subject.model.generate(asked, edit=edit, **self.options).rows

    def patched(self, layer: int) -> list[dict[str, Any]]:
        """Both directions for one layer; the corrupted run of a question is that of its donor."""
        own, donor, clean = self.own, self.donor, list(range(len(self.donor)))
        corrupted = own.taken(own.donors)
        into_clean = self.ask(Patched(corrupted, layer, own))
        reverse = self.ask(Patched(own, layer, corrupted), [self.subject.questions[number] for number in donor])
        untouched = [row for number in donor for row in self.answers[number * self.each : (number + 1) * self.each]]
        ways = (
            ("corrupted into clean", into_clean, self.answers, donor, clean),
            ("clean into corrupted", reverse, untouched, clean, donor),
        )
        return [self.row(f"layer {layer}, {way}", way, found, before, source, asked, layer) for way, found, before, source, asked in ways]

    def row(
        self,
        name: str,
        kind: str,
        answers: list[Response],
        own: list[Response],
        source: list[int] | None = None,
        asked: list[int] | None = None,
        layer: int = -1,
    ) -> dict[str, Any]:
        """A row of the table; `asked` and `source`: the numbers of the questions asked, and of those that the thoughts came from."""
        asked = list(range(len(self.donor))) if asked is None else asked
        right, before = self._right(answers, asked), self._right(own, asked)
        interval = proportion_interval(sum(right), len(right)) if self.each == 1 else mean_interval(self._by_question(right))
        change = paired_difference(self._by_question(right), self._by_question(before))
        return {
            "intervention": name,
            "kind": kind,
            "layer": layer,
            "accuracy": interval.mean,
            "low": interval.low,
            "high": interval.high,
            "difference": change.mean,
            "difference_low": change.low,
            "difference_high": change.high,
            "other": float("nan") if source is None else self._other(answers, asked, source),
            "changed": sum(a.ids != b.ids for a, b in zip(answers, own, strict=True)) / len(own),
            "questions": len(self.subject.questions),
        }

    def _right(self, answers: list[Response], numbers: list[int]) -> list[bool]:
        gold = [self.subject.gold[number] for number in numbers for _ in range(self.each)]
        return [bool(self.subject.right(row, answer)) for row, answer in zip(answers, gold, strict=True)]

    def _by_question(self, right: list[bool]) -> list[float]:
        return [sum(right[first : first + self.each]) / self.each for first in range(0, len(right), self.each)]

    def _other(self, answers: list[Response], asked: list[int], source: list[int]) -> float:
        """Share of answers that are right for `source`, where its answer is not that of the question asked."""
        gold, found = self.subject.gold, self._by_question(self._right(answers, source))
        differing = [hit for hit, a, b in zip(found, asked, source, strict=True) if gold[a] != gold[b]]
        return sum(differing) / len(differing) if differing else float("nan")
