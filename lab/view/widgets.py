"""Live forms of the views: sliders and pickers over a recorded trace, with the static picture in the same output.

Every widget's mime bundle carries the live widget, the view's HTML and its text: an executed notebook, its HTML export and
a terminal show the same picture.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ipywidgets

from lab.errors import DataError, RunError
from lab.trace import Trace
from lab.view.answers import answers
from lab.view.base import View, plain, resource
from lab.view.channels import Channel, names
from lab.view.compare import compare
from lab.view.decide import passes_at, with_gates, with_threshold
from lab.view.histogram import histogram
from lab.view.samples import samples, versus
from lab.view.summaries import SPLITS
from lab.view.thoughts import thoughts
from lab.view.tokens import Tokens
from lab.view.training import training

BEGINNING = 40  # characters of a prompt in a picker


class Explorer(ipywidgets.VBox):
    """Controls above a picture that is drawn anew when one of them moves.

    draw(**values) makes the live view from the controls' values; `twin(**values)` the static one (the same by default).
    """

    def __init__(
        self, controls: Mapping[str, ipywidgets.Widget], draw: Callable[..., View], twin: Callable[..., View] | None = None
    ) -> None:
        self.controls, self._draw, self._twin = dict(controls), draw, twin or draw
        self.picture = ipywidgets.HTML(layout={"width": "auto", "margin": "4px 0 0"})
        row = ipywidgets.Box(
            [_labelled(name, control) for name, control in self.controls.items()], layout={"flex_flow": "row wrap", "align_items": "center"}
        )
        super().__init__([row, self.picture, *_scripts(self._draw(**self.values))])
        for control in self.controls.values():
            control.observe(self.refresh, names="value")
        self.refresh()

    @property
    def values(self) -> dict[str, Any]:
        """What the controls say now."""
        return {name: control.value for name, control in self.controls.items()}

    @property
    def view(self) -> View:
        """The static view of the present state; `explorer.view.save("x.html")` keeps it."""
        return self._twin(**self.values)

    def refresh(self, _: Any = None) -> None:
        """Draws the picture for the present values."""
        self.picture.value = self._draw(**self.values).html()

    def __repr__(self) -> str:
        return str(self.view)

    def _repr_mimebundle_(self, **options: Any) -> dict[str, Any]:
        view = self.view
        return super()._repr_mimebundle_(**options) | {"text/html": view.html(), "text/plain": str(view)}


def explore(trace: Trace, channel: str = "") -> Explorer:
    """A live token view: pick a sample and a channel; move the decider's threshold or the gate's where they were recorded.

    The sliders decide again on the recorded numbers of the recorded text; nothing is generated. Raises DataError without tokens.
    """
    if trace.tokens.empty:
        raise DataError("Nothing to explore: the trace has no tokens.")
    there = names(trace.tokens)
    controls = {"sample": _sample_picker(trace), "channel": _channel_picker(there, channel)}
    if "decider_prob" in there or trace.passes["decider_prob"].notna().any():
        controls["threshold"] = _slider("threshold", float(trace.meta.get("threshold", 0.5)), 0.0, 1.0, 0.01)
    if "gate_logit" in there:
        controls |= _gate_controls([trace])

    def live(channel: str, **values: Any) -> View:
        part, note = _redecided(trace, **values)
        return Tokens(part, channel, [channel] if channel else None, note=note)

    def static(channel: str, **values: Any) -> View:
        part, note = _redecided(trace, **values)
        return Tokens(part, channel, note=note)

    return Explorer(controls, live, static)


def explore_answers(rows: Sequence[Mapping[str, Any]]) -> Explorer:
    """A slider for the number of thoughts, with the answers it leads to and their accuracy (rows as `view.answers` takes them).

    The static picture is the table of all numbers. Nothing is generated.
    """
    whole = answers(rows)
    if not rows:
        return Explorer({}, lambda: whole)
    best = max(whole.accuracy, key=whole.accuracy.__getitem__)
    count = ipywidgets.SelectionSlider(options=list(whole.accuracy), value=best, description="thoughts")
    return Explorer({"count": count}, lambda count: answers(rows, count), lambda count: whole)


def explore_gates(runs: Trace | Mapping[str, Trace]) -> Explorer:
    """Live histograms of gates inside and outside thinking spans, of one trace or of several by name, decided again as the controls say.

    Temperature, threshold and noise act on the recorded logits of the recorded text; gates without logits (HRPO's) are shown as they were.
    """
    named = {runs.method: runs} if isinstance(runs, Trace) else dict(runs)
    logits = bool(named) and all("gate_logit" in names(trace.tokens) for trace in named.values())

    def draw(**values: Any) -> View:
        return histogram({name: _gates(trace, **values) if values else trace for name, trace in named.items()}, "gate")

    return Explorer(_gate_controls(list(named.values())) if logits else {}, draw)


def explore_thoughts(trace: Trace) -> Explorer:
    """A live thought view: pick a sample and how many of its thoughts to show; raises DataError where there are none."""
    if trace.thoughts.empty:
        raise DataError("Nothing to explore: the trace has no thoughts.")
    most = int(trace.thoughts.groupby(["question", "sample"]).size().max())
    count = ipywidgets.IntSlider(most, 1, most, description="thoughts")
    return Explorer({"sample": _sample_picker(trace), "count": count}, lambda sample, count: thoughts(trace.select(*sample), steps=count))


def explore_runs(traces: Mapping[str, Trace], sort: str = "-score") -> Explorer:
    """A live table of samples: a slider chooses among recorded runs (noise, dropout, …), another control the question.

    Nothing is generated. Raises DataError without a run.
    """
    if not traces:
        raise DataError("Nothing to explore: no run was recorded.")
    questions = list(dict.fromkeys(question for trace in traces.values() for question in trace.samples["question"]))
    run = ipywidgets.SelectionSlider(options=list(traces), description="run", layout={"width": "28em"})
    question = _question_picker(questions, traces.values())
    return Explorer({"run": run, "question": question}, lambda run, question: samples(traces[run], sort, question=question))


def explore_pair(first: Trace, second: Trace, titles: tuple[str, str] | None = None) -> Explorer:
    """Two runs side by side, live: pick a question both answered and the channel; raises DataError where they share none."""
    shared = [question for question in dict.fromkeys(first.samples["question"]) if question in set(second.samples["question"])]
    if not shared:
        raise DataError("The two traces share no question: nothing to compare.")
    question = _question_picker(shared, [first])
    channel = _channel_picker([name for name in names(first.tokens) if name in names(second.tokens)], "")
    controls = {"question": question, "channel": channel}

    def draw(question: Any, channel: str, channels: Sequence[str] | None = None) -> View:
        return compare(first, second, channel, question=question, names=titles, channels=channels)

    return Explorer(controls, lambda question, channel: draw(question, channel, [channel] if channel else None), draw)


def explore_histogram(runs: Trace | Mapping[str, Trace]) -> Explorer:
    """Live distributions of any channel of one trace or several by name: pick channel, split and the number of bins."""
    named = {runs.method: runs} if isinstance(runs, Trace) else dict(runs)
    there = [name for name in names(next(iter(named.values())).tokens) if all(name in names(one.tokens) for one in named.values())]
    if not there:
        raise DataError("Nothing to explore: the runs share no channel with values.")
    shown = histogram(named, there[0])
    split = ipywidgets.ToggleButtons(options=SPLITS, value=shown.split)
    split.style.button_width = "auto"
    bins = ipywidgets.IntSlider(10, 2, 40, description="bins")
    controls = {"channel": _channel_picker(there, ""), "split": split, "bins": bins}
    return Explorer(controls, lambda channel, split, bins: histogram(named, channel, split, bins))


def explore_versus(traces: Mapping[str, Trace]) -> Explorer:
    """Who got what wrong, live: pick two of the runs; raises DataError with fewer than two."""
    if len(traces) < 2:
        raise DataError("Give two runs or more to compare.")
    runs = list(traces)
    first, second = (
        ipywidgets.Dropdown(options=runs, value=runs[place], description=name) for place, name in enumerate(("run", "against"))
    )
    return Explorer({"first": first, "second": second}, lambda first, second: versus(traces[first], traces[second], (first, second)))


class Watch(Explorer):
    """The training view of a folder, read again every `seconds`, whoever writes it; `stop()` ends the watching."""

    def __init__(self, folder: Path, seconds: float = 5.0) -> None:
        self._again = ipywidgets.Button(description="read again", icon="refresh")
        self._again.on_click(self.refresh)
        self.seconds, self._task = seconds, None
        super().__init__({}, lambda: training(folder))
        self.children = (self._again, self.picture)
        try:
            self._task = asyncio.get_running_loop().create_task(self._keep_reading())
        except RuntimeError:
            self._task = None  # outside a kernel nothing runs between calls; the button and refresh() still work

    async def _keep_reading(self) -> None:
        while True:
            await asyncio.sleep(self.seconds)
            with suppress(RunError):  # a folder that is being renamed, or gone: the last picture stays
                self.refresh()

    def stop(self) -> None:
        """Ends the watching; the picture stays."""
        if self._task:
            self._task.cancel()


def watch(folder: str | Path, seconds: float = 5.0) -> Watch:
    """The losses of a training that writes `folder` (a run's step), live: close the browser, come back, show it again."""
    return Watch(Path(folder), seconds)


def _scripts(view: View) -> list[ipywidgets.Widget]:
    """An invisible output that runs a view's script (arrow keys) in the page: HTML that a widget sets does not run its own."""
    if not view.script:
        return []
    data = {"text/html": f"<script>{resource(view.script)}</script>", "text/plain": ""}
    output = {"output_type": "display_data", "data": data, "metadata": {}}
    return [ipywidgets.Output(outputs=(output,), layout={"height": "0", "overflow": "hidden", "margin": "0"})]


def _redecided(trace: Trace, sample: tuple[Any, int], threshold: float | None = None, **gate: Any) -> tuple[Trace, str]:
    """(the sample decided again, a sentence on what that changed)."""
    part, notes = trace.select(*sample), []
    if threshold is not None:
        again, recorded = passes_at(part, threshold), part.tokens["iterations"]
        part = with_threshold(part, threshold)
        notes.append(f"At threshold {threshold:.2f}: {again['iterations'].mean():.3f} passes a token (recorded: {recorded.mean():.3f}).")
        if again["open"].any():
            notes.append(f"Lower bounds, as the recorded run stopped there: {int(again['open'].sum())}.")
    if gate:
        part = _gates(part, **gate)
        kind = f"Hard gates at threshold {gate['gate_threshold']:.2f}" if gate["hard"] else f"At gate temperature {gate['temperature']:.2f}"
        notes.append(f"{kind}: mean gate {part.tokens['gate'].mean():.3f}.")
    return part, " ".join(notes)


def _gate_controls(traces: Sequence[Trace]) -> dict[str, ipywidgets.Widget]:
    """Controls of `_gates` that begin as the gates were recorded."""
    gates = [gate for trace in traces if "gate" in trace.tokens for gate in trace.tokens["gate"].dropna()]
    found: dict[str, ipywidgets.Widget] = {
        "temperature": _slider("temperature", float(traces[0].meta.get("gate_temperature", 1.0)), 0.05, 3.0, 0.05),
        "gate_threshold": _slider("gate threshold", 0.5, 0.0, 1.0, 0.01),
        "hard": _checkbox("hard gates", bool(gates) and set(gates) <= {0.0, 1.0}),
    }
    noisy = all("gate_noise" in names(trace.tokens) for trace in traces)
    return found | ({"noise": _checkbox("recorded noise", True)} if noisy else {})


def _gates(trace: Trace, temperature: float, gate_threshold: float, hard: bool, noise: bool = False) -> Trace:
    return with_gates(trace, temperature, gate_threshold if hard else None, noise)


def _labelled(name: str, control: ipywidgets.Widget) -> ipywidgets.Widget:
    """A row of buttons with its name before it, as the other controls have theirs."""
    return ipywidgets.HBox([ipywidgets.Label(name), control]) if isinstance(control, ipywidgets.ToggleButtons) else control


def _sample_picker(trace: Trace) -> ipywidgets.Dropdown:
    signs = {True: " ✓", False: " ✗"}
    rows = trace.samples[["question", "sample", "correct", "prompt"]].to_dict("records")
    several = bool(trace.samples["question"].duplicated().any())
    names = [_asked(row) + f" · sample {row['sample']}" * several + _sign(row["correct"], signs) for row in rows]
    options = [(name, (row["question"], row["sample"])) for name, row in zip(names, rows, strict=True)]
    return ipywidgets.Dropdown(options=options, description="show", layout={"width": "28em"})


def _question_picker(questions: Sequence[Any], traces: Iterable[Trace]) -> ipywidgets.Dropdown:
    rows = {row["question"]: row for trace in traces for row in trace.samples[["question", "prompt"]].to_dict("records")}
    return ipywidgets.Dropdown(options=[(_asked(rows[name]), name) for name in questions], description="question", layout={"width": "28em"})


def _asked(row: Mapping[str, Any]) -> str:
    """A question's name and how it begins."""
    prompt = " ".join(plain(row["prompt"]).split())
    return f"{row['question']}: {prompt[:BEGINNING]}{'…' * (len(prompt) > BEGINNING)}" if prompt else str(row["question"])


def _sign(correct: Any, signs: dict[bool, str]) -> str:
    return signs[bool(correct)] if correct in (True, False) else ""


def _channel_picker(there: list[str], channel: str) -> ipywidgets.ToggleButtons:
    picker = ipywidgets.ToggleButtons(options=[(Channel(name).label, name) for name in there] or [("text", "")])
    if channel:
        picker.value = channel
    picker.style.button_width = "auto"
    return picker


def _checkbox(name: str, value: bool) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(value, description=name, indent=False, layout={"width": "auto"})


def _slider(name: str, value: float, low: float, high: float, step: float) -> ipywidgets.FloatSlider:
    return ipywidgets.FloatSlider(
        value, min=low, max=high, step=step, description=name, readout_format=".2f", style={"description_width": "initial"}
    )
