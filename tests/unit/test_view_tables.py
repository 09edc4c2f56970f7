"""Thoughts, distributions, samples, training. Run: pytest tests/unit/test_view_tables.py"""

import json
import re

import numpy as np
import pytest

from lab import view
from lab.errors import DataError, RunError, SettingsError
from lab.trace import Trace
from lab.view import summaries
from lab.view.svg import Line, chart, sparkline
from lab.view.thoughts import gold_values, is_gold

GOLD = ["<<16-3-4=9>>", "<<9*2=18>>", "18.50"]


def thinking(vectors=None):
    tops = [(["9", " *"], [0.7, 0.1]), (["x", " 18"], [0.5, 0.2]), (["<b>", "18.5"], [0.9, 0.05])]
    thoughts = [
        {"question": 0, "step": k, "stop_prob": k / 10, "norm": 2.0, "top_texts": texts, "top_probs": probs}
        | ({"vector": vectors[k]} if vectors else {})
        for k, (texts, probs) in enumerate(tops)
    ]
    return Trace.build("codi", samples=[{"question": 0, "steps": GOLD, "answer": "18", "gold": "18", "correct": True}], thoughts=thoughts)


def test_gold_intermediates_are_the_results_of_the_steps():
    gold = gold_values({"steps": GOLD})
    assert gold == {"9", "18", "18.5"}
    assert is_gold(" 18", gold) and is_gold("18.0", gold) and is_gold("18.50", gold) and not is_gold("8", gold)
    assert is_gold("1,200", gold_values({"steps": ["<<600*2=1200>>"]})) and not is_gold("", gold_values({"steps": ["="]}))


def test_a_step_in_words_has_its_last_word_as_result():
    assert gold_values({"steps": ("op3 5", "Every a is a wumpus.")}) == {"op3 5", "5", "every a is a wumpus", "wumpus"}


def test_gold_is_marked_by_sign_and_counted_per_step():
    drawn = view.thoughts(thinking())
    assert drawn.table()["gold"].tolist() == [True, False, False, True, False, True]
    assert drawn.found()[["top1", "any"]].values.tolist() == [[1, 1], [0, 1], [0, 1]]
    assert (
        drawn.html().count('class="cand gold"') == 3
        and "&lt;b&gt;" in drawn.html()
        and "<b>" not in drawn.table()["text"].iloc[:4].tolist()
    )
    page = drawn._block(drawn.trace.samples.to_dict("records")[0])  # thoughts are columns, candidates rows
    assert re.findall(r'scope="col">(\w+)', page) == ["thought", "0", "1", "2"] and 'scope="row">rank 1<' in page
    assert "9✓ 0.70" in drawn.text(color=False) and "\x1b" not in drawn.text(color=False)


def test_probabilities_have_two_decimals_and_none_is_said_to_be_nothing():
    trace = Trace.build("codi", thoughts=[{"question": 0, "step": 0, "stop_prob": 3e-7, "top_texts": ["a", "b"], "top_probs": [0.3, 1e-5]}])
    page = view.thoughts(trace).html()
    assert "<small>0.30</small>" in page and "<small>&lt;0.01</small>" in page and "<b>&lt;0.01</b>" in page


def test_fewer_candidates_and_steps_are_shown_on_request():
    assert view.thoughts(thinking(), candidates=1).html().count('class="cand') == 3
    assert view.thoughts(thinking(), candidates=1).found()["any"].tolist() == [1, 0, 0]
    assert set(view.thoughts(thinking(), steps=2).table()["step"]) == {0, 1}


def test_similarity_is_the_cosine_with_the_thought_before():
    rows = view.thoughts(thinking([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])).rows
    assert np.allclose(rows["similarity"], [np.nan, np.sqrt(0.5), np.nan], equal_nan=True)


def test_thoughts_without_candidates_are_not_said_to_have_found_nothing():
    trace = thinking()
    trace.thoughts[["top_texts", "top_probs"]] = [((), ())] * len(trace.thoughts)
    assert "gold at rank 1" in view.thoughts(thinking()).html() and "gold at rank 1" not in view.thoughts(trace).html()


def test_traces_without_thoughts_or_samples_say_so():
    empty = Trace.build("codi")
    assert "No thoughts" in view.thoughts(empty).html() and "No samples" in view.samples(empty).html()


def gated():
    roles = ["prompt", "special", "thought", "thought", "special", "answer"]
    gates = [np.nan, 0.05, 0.9, 1.0, 0.8, 0.0]
    texts = ["Q", "[bot]", "12", "+", "[eot]", " 12x"]
    return Trace.build(
        "dtt",
        tokens=[
            {"question": 0, "pos": p, "text": texts[p], "role": role, "gate": gates[p], "iterations": 1 + p % 2}
            for p, role in enumerate(roles)
        ],
    )


def test_inside_is_after_bot_up_to_and_including_eot():
    assert summaries.groups(gated(), "span").tolist() == ["outside", "outside", "inside", "inside", "inside", "outside"]
    assert summaries.groups(gated(), "type").tolist() == ["word", "special", "number", "punctuation", "special", "mixed"]
    with pytest.raises(SettingsError, match="Did you mean 'span'"):
        summaries.groups(gated(), "spam")


def test_shares_add_up_in_every_group_and_outliers_fall_into_the_end_bins():
    counts = summaries.histogram_counts(gated(), "gate", bins=4)
    assert counts.groupby("span")["share"].sum().tolist() == [1, 1] and counts.groupby("span")["tokens"].sum().tolist() == [3, 2]
    assert summaries.histogram_counts(gated(), "gate", bins=2, limits=(0.4, 0.6))["tokens"].sum() == 5
    assert summaries.iteration_counts(gated())["share"].tolist() == [0.5, 0.5]
    with pytest.raises(DataError, match="entropy"):
        summaries.histogram_counts(gated(), "entropy")


def test_histogram_shows_each_run_and_group_with_numbers():
    drawn = view.histogram(gated())
    assert drawn.channel == "gate" and set(drawn.table()["series"]) == {"inside", "outside"}
    assert "66.7%" in drawn.html() and "█" in drawn.text(color=False)
    two = view.histogram({"<one>": gated(), "two": gated()}, "iterations", split="none")
    assert set(two.table()["series"]) == {"<one>", "two"} and "&lt;one&gt;" in two.html() and "<one>" not in two.html()
    with pytest.raises(SettingsError, match="entropy"):
        view.histogram(gated(), "entropy")


def test_thoughts_by_gold_steps_and_hard_tokens_are_counted():
    assert summaries.thought_counts(thinking()).to_dict("records") == [{"gold_steps": 3, "thoughts": 3, "samples": 1, "share": 1.0}]
    counted = thinking()
    counted = Trace.build("codi", samples=counted.samples.assign(latents=2), thoughts=counted.thoughts)
    assert summaries.thought_counts(counted)["thoughts"].tolist() == [2]
    tokens = [{"question": 0, "pos": p, "text": "ab"[p % 2], "hard": p % 2, "ce": p} for p in range(4)]
    table = summaries.hard_tokens(Trace.build("tah", tokens=tokens))
    assert table.to_dict("list") == {"text": ["b", "a"], "tokens": [2, 2], "hard_share": [1.0, 0.0], "ce": [2.0, 1.0]}
    with pytest.raises(SettingsError, match="hard"):
        summaries.hard_tokens(thinking())


def answered(right="1", answers=("1", "2", "1", ""), **columns):
    rows = [
        {"question": "q", "sample": s, "answer": a, "gold": right, "correct": a == right, "score": s / 2} for s, a in enumerate(answers)
    ]
    return Trace.build("tah", samples=[row | {name: values[place] for name, values in columns.items()} for place, row in enumerate(rows)])


def test_votes_totals_and_order():
    drawn = view.samples(answered(), "-score")
    assert drawn.rows["votes"].tolist() == [2, 1, 2, 0] and drawn.rows["voted"].tolist() == [True, False, True, False]
    assert drawn.table()["sample"].tolist() == [3, 2, 1, 0]
    assert drawn.state() == (
        "4 samples of 1 question: 2 correct (50.0%); of the questions, 1 of 1 (100.0%) right by majority vote, "
        "1 of 1 (100.0%) with any sample right."
    )
    with pytest.raises(SettingsError, match="Did you mean 'score'"):
        view.samples(answered(), "scores")


def test_a_table_shows_what_was_asked_and_no_votes_where_nobody_voted():
    one = Trace.build("tah", samples=[{"question": q, "prompt": f"<q{q}>", "answer": "1", "correct": True} for q in range(2)])
    page = view.samples(one).html()
    assert "&lt;q1&gt;" in page and ">votes<" not in page and ">sample<" not in page
    assert "2 samples of 2 questions: 2 correct (100.0%)." in page
    voted = view.samples(answered(prompt=["how many?"] * 4)).html()
    assert ">votes<" in voted and voted.count("how many?") == 1 and ">prompt<" not in voted


def test_hostile_answers_stay_text_in_every_table():
    trace = answered("<i>", ("<i>", "<script>", "</td>", "x"), text=["<script>" * 20] * 4)
    page = view.samples(trace).html() + view.versus(trace, answered("<i>", ("x", "<script>", "<i>", "x"))).html()
    assert page.count("<script>") == 1 and "<i>" not in page.split("</style>", 1)[1].replace("<i></i>", "") and "&lt;/td&gt;" in page


def test_beams_hang_under_their_parents_and_loops_end():
    page = view.samples(answered(parent=[-1, 0, 1, 3])).html()
    nested = page[page.index('class="tree"') :]
    assert "4 beams of 1 question" in page
    assert nested.index("sample 0") < nested.index("sample 1") < nested.index("sample 2") and nested.count('<ul class="tree">') == 2
    assert view.samples(answered(parent=[1, 0, -1, -1])).html().count("<li") == 2


def test_what_an_answer_grew_from_stands_out_of_a_search():
    rows = [("", -1), ("", -1), ("7", 0), ("", 1), ("", 0)]
    beams = [{"question": "q", "sample": s, "answer": answer, "parent": parent} for s, (answer, parent) in enumerate(rows)]
    page = view.samples(Trace.build("latenttts", samples=beams)).html()
    assert re.findall(r'<li class="(\w+)">sample (\d)', page) == [("kept", "0"), ("kept", "2"), ("soft", "4"), ("soft", "1"), ("soft", "3")]


def test_who_got_what_wrong():
    drawn = view.versus(answered(), answered("1", ("2", "2", "1", "1")), names=("A", "B"))
    assert drawn.counts() == {(True, True): 1, (True, False): 1, (False, True): 1, (False, False): 1}
    assert "q/0: 1 against 2 (gold 1)" in drawn.text() and "only A 1" in drawn.text()
    with pytest.raises(DataError, match="share no judged sample"):
        view.versus(answered(), Trace.build("tah", samples=[{"question": "other", "correct": True}]))


def training_folder(folder):
    lines = [{"step": s, "loss": 4.0 - s, "time": 1.0} for s in range(4)] + [{"step": s, "loss": 2.0 - s / 2, "lr": 0.1} for s in (2, 3)]
    lines += [{"step": 3, "accuracy": 0.5, "split": "val"}, {"note": "no step"}, {"step": 4, "loss": float("nan")}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    event = {
        "kind": "rollback",
        "step": 3,
        "onset": 3,
        "resumed": 1,
        "rule": "spike",
        "attempt": 2,
        "clip": 1.0,
        "lr_scale": 0.7,
        "float32": False,
    }
    (folder / "divergence.jsonl").write_text(json.dumps(event) + "\n")
    return folder


def test_a_training_is_read_while_it_is_written(tmp_path):
    drawn = view.training(training_folder(tmp_path))
    loss = drawn.frame[drawn.frame["metric"] == "loss"]
    assert loss["discarded"].tolist() == [False, False, True, True, False, False, False]
    assert drawn.table().set_index("metric")["step"].to_dict() == {"loss": 4, "lr": 3, "accuracy": 3}
    assert "2 of them discarded" in drawn.html() and 'class="faint"' in drawn.html() and "1 not finite" in drawn.html()
    assert (
        "back to step 1 with clip 1.0, learning rate × 0.7 (attempt 2)" in drawn.text()
        and "accuracy" in drawn.text()
        and "×" in drawn.text()
    )


def test_a_second_part_that_begins_anew_is_no_rollback(tmp_path):
    lines = [{"step": s, "loss": 1.0, "seconds": 2.0} for s in (5, 10, 15, 5, 10, 10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = view.training(tmp_path)
    assert not drawn.frame["discarded"].any() and drawn.frame["label"].tolist() == [""] * 3 + ["part 2"] * 3
    assert drawn.names == ["loss"] and "discarded" not in drawn.text()


def test_a_step_is_found_while_it_runs_and_after_it_was_renamed(tmp_path):
    partial = tmp_path / ".train1.partial"
    partial.mkdir()
    training_folder(partial)
    running = view.training(tmp_path / "train1")
    partial.rename(tmp_path / "train1")
    finished = view.training(partial)
    assert running.title == finished.title == "train1: training" and running.text() == finished.text()


def test_an_empty_or_absent_training_says_so(tmp_path):
    assert "Nothing was logged yet" in view.training(tmp_path).html() and "nothing was logged" in view.training(tmp_path).text()
    with pytest.raises(RunError, match="No folder"):
        view.training(tmp_path / "none")


def test_charts_survive_one_point_and_no_finite_value():
    assert "<circle" in chart("loss", [Line("a", "blue", [1], [2.0])])
    assert "no finite value" in chart("<loss>", [Line("a", "blue", [1], [float("nan")])]) and "&lt;loss&gt;" in chart("<loss>", [])
    assert sparkline([0, 1, float("nan"), 1]) == "▁█×█" and sparkline([]) == ""
