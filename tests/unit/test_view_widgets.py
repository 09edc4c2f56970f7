"""Live forms without a browser. Run: pytest tests/unit/test_view_widgets.py"""

import asyncio
import json
import subprocess
import sys

import pytest

from lab import view
from lab.errors import DataError
from lab.trace import Trace

WIDGET = "application/vnd.jupyter.widget-view+json"


def decided():
    tokens = [
        {"question": q, "pos": p, "text": "abc"[p], "iterations": 1 + (p == 2), "decider_prob": p / 2, "prob": 0.5}
        for q in (0, 1)
        for p in range(3)
    ]
    return Trace.build("tah", tokens=tokens, meta={"threshold": 0.6, "max_iter": 2})


def test_the_bundle_holds_the_live_widget_and_the_same_picture_as_html_and_text():
    explorer = view.explore(decided())
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {WIDGET, "text/html", "text/plain"}
    assert bundle["text/html"] == explorer.view.html() and "ab" in bundle["text/plain"] and "c‹2›" in bundle["text/plain"]


def test_the_threshold_starts_where_it_was_recorded_and_decides_again():
    explorer = view.explore(decided())
    assert explorer.controls["threshold"].value == 0.6 and "recorded: 1.333" in explorer.picture.value
    before = explorer.picture.value
    explorer.controls["threshold"].value = 0.4
    assert explorer.picture.value != before and "1.667 passes a token" in explorer.picture.value
    assert explorer.view.trace.tokens["iterations"].tolist() == [1, 2, 2]


def test_sample_and_channel_are_picked():
    explorer = view.explore(decided(), "prob")
    assert explorer.controls["channel"].value == "prob" and 'data-c0="0.50"' in explorer.picture.value
    explorer.controls["channel"].value = "iterations"
    assert 'data-c0="2"' in explorer.picture.value and "prob" not in explorer.view.html().split("<form")[0].split("</style>")[-1]
    explorer.controls["sample"].value = (1, 0)
    assert "question <b>1</b>" in explorer.picture.value


def gates_trace(noise: float) -> Trace:
    rows = [(1.0, "thought"), (-1.0, "thought"), (-1.0, "answer")]
    tokens = [
        {"question": 0, "pos": p, "text": "x", "role": role, "gate_logit": l, "gate_noise": noise} for p, (l, role) in enumerate(rows)
    ]
    return Trace.build("dtt", tokens=[row | {"gate": float(row["gate_logit"] + noise > 0)} for row in tokens])


def test_gates_of_two_checkpoints_are_decided_again_together():
    explorer = view.explore_gates({"one": gates_trace(0.0), "two": gates_trace(-2.0)})
    assert explorer.values == {"temperature": 1.0, "gate_threshold": 0.5, "hard": True, "noise": True}
    means = lambda: explorer.view.summary.set_index(["run", "group"])["mean"].to_dict()  # noqa: E731
    assert means() == {("one", "inside"): 0.5, ("one", "outside"): 0.0, ("two", "inside"): 0.0, ("two", "outside"): 0.0}
    explorer.controls["noise"].value = False
    assert means()["two", "inside"] == 0.5
    explorer.controls["gate_threshold"].value = 0.2
    assert means()["one", "outside"] == 1.0
    assert not view.explore_gates(Trace.build("hrpo", tokens=[{"question": 0, "pos": 0, "text": "x", "gate": 0.5}])).controls


def said_with(right: dict[int, list[bool]]) -> list[dict]:
    """Rows as `answers_by_count` makes them: two questions of the same words."""
    same = {"question": "<i>1+1?", "steps": "2", "gold": "2"}
    return [same | {"thoughts": n, "said": f"said {n}", "right": hit, "beyond": n > 2} for n, hits in right.items() for hit in hits]


def test_a_slider_shows_answers_and_accuracy_of_each_number_of_thoughts():
    rows = said_with({0: [False, False], 2: [True, True], 3: [True, False]})
    explorer = view.explore_answers(rows)
    assert explorer.values == {"count": 2} and "accuracy 100.0%" in explorer.picture.value and "said 3" not in explorer.picture.value
    explorer.controls["count"].value = 3
    assert "accuracy 50.0%" in explorer.picture.value and "3 (beyond training)" in explorer.picture.value
    page, text = explorer.view.html(), str(explorer)
    assert page.count("said 0") == 2 and page.count("✓") == 3 and "<i>1" not in page and "50.0%" in text
    assert len(view.answers(rows, 3).table()) == 2
    assert "No answers" in view.explore_answers([]).picture.value


def test_controls_appear_only_for_what_was_recorded():
    plain = Trace.build("codi", tokens=[{"question": 0, "pos": 0, "text": "x", "prob": 0.5}])
    assert set(view.explore(plain).controls) == {"sample", "channel"}
    tokens = [{"question": 0, "pos": p, "text": "x", "gate_logit": logit, "gate": 0.7} for p, logit in enumerate([1.0, -1.0, -1.0])]
    explorer = view.explore(Trace.build("dtt", tokens=tokens))
    assert "At gate temperature 1.00: mean gate 0.423" in explorer.picture.value
    explorer.controls["temperature"].value = 0.5
    assert "mean gate 0.373" in explorer.picture.value
    explorer.controls["hard"].value = True
    assert "Hard gates at threshold 0.50: mean gate 0.333" in explorer.picture.value
    explorer.controls["gate_threshold"].value = 0.9
    assert "mean gate 0.000" in explorer.picture.value
    with pytest.raises(DataError, match="no tokens"):
        view.explore(Trace.build("tah"))


def test_fewer_thoughts_on_request():
    thoughts = [{"question": 0, "step": k, "top_texts": ["x"], "top_probs": [0.5]} for k in range(3)]
    explorer = view.explore_thoughts(Trace.build("codi", thoughts=thoughts))
    assert explorer.picture.value.count('class="cand') == 3
    explorer.controls["count"].value = 1
    assert explorer.picture.value.count('class="cand') == 1


def test_two_runs_are_compared_question_by_question():
    explorer = view.explore_pair(decided(), decided(), ("one", "two"))
    assert "one" in explorer.picture.value and "3 of 3 columns agree" in explorer.picture.value
    explorer.controls["question"].value = 1
    explorer.controls["channel"].value = "prob"
    assert "question <b>1</b>" in explorer.picture.value and "Mean probability" in explorer.picture.value
    other = Trace.build("tah", tokens=[{"question": 7, "pos": 0, "text": "x", "prob": 0.5}])
    with pytest.raises(DataError, match="share no question"):
        view.explore_pair(decided(), other)


def test_distributions_of_any_channel_split_as_one_likes():
    explorer = view.explore_histogram({"one": decided(), "two": decided()})
    assert explorer.controls["channel"].value == "iterations" and "one" in explorer.picture.value
    explorer.controls["channel"].value, explorer.controls["split"].value, explorer.controls["bins"].value = "decider_prob", "type", 4
    assert "one word" in explorer.picture.value and explorer.view.table()["value"].nunique() == 4
    with pytest.raises(DataError, match="share no channel"):
        view.explore_histogram(Trace.build("tah", tokens=[{"question": 0, "pos": 0, "text": "x"}]))


def test_who_got_what_wrong_of_any_two_runs():
    def judged(*right):
        return Trace.build("tah", samples=[{"question": q, "answer": str(q), "correct": one} for q, one in enumerate(right)])

    explorer = view.explore_versus({"a": judged(True, False), "b": judged(False, False), "c": judged(True, True)})
    assert "Only a is right" in explorer.picture.value and "Only b is right: none" in explorer.picture.value
    explorer.controls["second"].value = "c"
    assert "Only a is right: none" in explorer.picture.value and "Only c is right" in explorer.picture.value
    with pytest.raises(DataError, match="two runs or more"):
        view.explore_versus({"a": judged(True)})


def test_a_watched_training_follows_its_folder(tmp_path):
    def log(step):
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")

    async def session():
        log(1)
        watched = view.watch(tmp_path, seconds=0.01)
        assert "at step 1" in watched.picture.value
        log(2)
        for _ in range(200):
            await asyncio.sleep(0.01)
            if "at step 2" in watched.picture.value:
                break
        assert "at step 2" in watched.picture.value
        watched.stop()
        await asyncio.sleep(0)
        return watched

    watched = asyncio.run(session())
    log(3)
    watched.refresh()
    assert "at step 3" in watched.picture.value and "at step 3" in str(watched)


def test_views_import_neither_models_nor_widgets():
    code = "import sys; from lab import view; assert not {'torch', 'transformers', 'ipywidgets', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_questions_are_picked_by_how_they_begin():
    asked = [{"question": q, "sample": s, "prompt": f"<{q}> " + "long " * 20, "correct": True} for q in range(2) for s in range(2)]
    trace = Trace.build("tah", samples=asked, tokens=[row | {"pos": 0, "text": "a"} for row in asked])
    labels = [label for label, _ in view.explore(trace).controls["sample"].options]
    assert labels[3].startswith("1: <1> long") and labels[3].endswith("… · sample 1 ✓") and len(labels[3]) < 70
    assert [value for _, value in view.explore_runs({"a": trace}).controls["question"].options] == [0, 1]
    pair = view.explore_pair(trace, trace)
    assert pair._draw(**pair.values).html().count('name="channel"') == 0 and pair.view.channels is None
