"""Problem sources and the tables that COCONUT's and CODI's notebooks show."""

import json
from types import SimpleNamespace

import pandas as pd
import pytest

from lab.data.source import Source, words_of
from lab.errors import DataError, SettingsError
from lab.latent.plan import IGNORE, Kept, Row, collate, collate_pairs
from lab.latent.tables import answers_by_count, at_steps, by_count, curve, found_results, parts
from lab.trace import Trace


@pytest.mark.parametrize("benchmark", ["permutations", "sums"])
def test_test_problems_never_stand_in_the_training_part(benchmark: str):
    source = Source(benchmark=benchmark, train_problems=300, test_problems=60, seed=1)
    held = {e.question for split in ("test", "validation") for e in source.held_out(split)}
    train = source.train()
    assert len(train) == 300 and not held & {e.question for e in train}
    assert train.examples == source.train().examples != Source(benchmark=benchmark, train_problems=300, test_problems=60).train().examples
    assert source.held_out().examples == Source(benchmark=benchmark, test_problems=60, seed=7).held_out().examples


def test_hops_set_the_length_and_words_the_vocabulary():
    source = Source(hops=2, train_problems=20, test_problems=5)
    problems = source.train()
    assert {len(e.steps) for e in problems} == {2} and source.kind == "sentence"
    words = words_of([problems], ["###", "Q"])
    assert words[:2] == ["###", "Q"] and len(words) == len(set(words)) and problems[0].answer in words
    with pytest.raises(SettingsError, match="trian_problems"):
        Source.check(trian_problems=3)


def test_accuracy_by_number_of_thoughts():
    problems = [SimpleNamespace(question=f"q{i}", steps=("s",), answer=str(i)) for i in range(4)]

    def generate(questions, thoughts, **options):
        assert options == {"batch": 3}
        return SimpleNamespace(rows=[SimpleNamespace(text=e.answer if i < thoughts else "no") for i, e in enumerate(questions)])

    score = lambda text, gold: SimpleNamespace(strict_correct=text == gold)  # noqa: E731
    rows = answers_by_count(SimpleNamespace(generate=generate), problems, [0, 2, 5], score, trained=2, batch=3)
    table = by_count(rows)
    assert [row["mean"] for row in table] == [0.0, 0.5, 1.0] and [row["beyond"] for row in table] == [False, False, True]
    assert all(row["low"] <= row["mean"] <= row["high"] for row in table)


def test_gold_results_among_candidates():
    samples = [{"question": 0, "sample": 0, "steps": ["<<1+1=2>>", "<<2*3=6>>"]}]
    thoughts = [
        {"question": 0, "sample": 0, "step": 0, "top_texts": [" 2", "x"], "top_probs": [0.5, 0.1]},
        {"question": 0, "sample": 0, "step": 1, "top_texts": ["x", "6"], "top_probs": [0.5, 0.1]},
    ]
    table = found_results(Trace.build("codi", samples=samples, thoughts=thoughts))
    assert [(row["place"], row["top1"], row["top5"]) for row in table] == [("0", 1, 1), ("1", 0, 1), ("all", 0.5, 1)]
    assert found_results(Trace.build("codi", samples=samples)) == []


def test_curves_and_parts_come_from_the_log(tmp_path):
    rows = [
        {"step": 1, "arm": "a", "ce": 2.0, "distill": 0.5},
        {"step": 2, "arm": "a", "eval_score": 0.3},
        {"step": 1, "arm": "b", "ce": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert curve(tmp_path, "eval_score").to_dict("records") == [{"arm": "a", "step": 2, "mean": 0.3}]
    assert parts(tmp_path, ("ce", "distill"), "a").value.tolist() == [2.0, 0.5]
    assert curve(tmp_path, "ce", without=["a"]).to_dict("records") == [{"arm": "b", "step": 1, "mean": 1.0}]


def test_what_a_rollback_made_again_is_discarded(tmp_path):
    steps = [10, 20, 30, 40, 30, 40, 50]  # after 40 the training went back to 20
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": step, "ce": 1.0}) + "\n" for step in steps))
    assert parts(tmp_path, ["ce"])["discarded"].tolist() == [False, False, True, True, False, False, False]


def test_learning_curves_become_rows_of_a_sweep():
    curves = pd.DataFrame({"arm": ["a", "a", "b"], "step": [10, 20, 10], "mean": [0.1, 0.5, 0.2]})
    assert at_steps(curves, "exact") == {"a, step 10": {"exact": 0.1}, "a, step 20": {"exact": 0.5}, "b, step 10": {"exact": 0.2}}
    assert at_steps(curves[:2], "exact") == {}


def test_what_was_dropped_is_counted_and_named():
    kept: Kept[int] = Kept()
    kept.add("a", 1)
    for name in ("b", "c"):
        kept.add(name, None, "too long")
    assert len(kept) == 1 and kept.note() == "2 of 3 examples were dropped: 2 (too long; first: b)."


def test_plans_align_thoughts_and_find_the_predicting_state():
    rows = [Row((1, 2, 3), (4, 5), (IGNORE, IGNORE, 3, 4, 5), 2), Row((6,), (7, 8, 9), (IGNORE, 7, IGNORE, 9), 1)]
    plan = collate(rows)
    assert plan.prompt.ids.tolist() == [[1, 2, 3], [0, 0, 6]] and plan.prompt.valid.tolist() == [[True] * 3, [False, False, True]]
    assert plan.after.ids.tolist() == [[4, 5, 0], [7, 8, 9]] and plan.counts.tolist() == [2, 1]
    assert plan.labelled == 5 and plan.rows_of_predictions.tolist() == [0, 1, 0, 1, 0]
    assert plan.prompt_labels.at.tolist() == [1] and plan.lead_labels.ids.tolist() == [4, 7] and plan.after_labels.ids.tolist() == [5, 9]


def test_rows_that_do_not_line_up_are_refused():
    with pytest.raises(DataError, match="without rows"):
        collate([])
    with pytest.raises(DataError, match="one label for each"):
        collate([Row((1,), (2,), (IGNORE,))])
    student = [Row((1,) * n, (2,), (IGNORE,) * (n + 1)) for n in (1, 2)]
    with pytest.raises(DataError, match="same number"):
        collate_pairs([(student[0], row) for row in student])


def test_single_token_answers_are_read_leniently_too():
    source = Source(benchmark="permutations")
    found = source.score("### s3", "s3", "coconut")
    assert found.strict_correct and found.lenient_correct
    assert not source.score("### s2", "s3", "coconut").lenient_correct and not source.score("", "s3", "coconut").lenient_correct
    assert source.score("so s3", "s3", "coconut").lenient_correct
    assert Source(benchmark="sums").score("The answer is: 3", "3", "codi").strict_correct
