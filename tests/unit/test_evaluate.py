"""An evaluation survives kills, counts apart what must be counted apart, and asks only for what is missing."""

import csv
import json
import math
from types import SimpleNamespace

import pytest

from lab.data.examples import Example
from lab.errors import DataError, RunError, SettingsError
from lab.evaluate import Decoding, Output, evaluate, read_samples

EXAMPLES = [Example(id=f"q{i}", question=f"What is {i} + {i}?", answer=str(2 * i)) for i in range(6)]


def score(text, example):
    """Strict: the last word after `####`; lenient: the last word."""
    words = text.split()
    strict = words[-1] if "####" in text else None
    lenient = words[-1] if words and words[-1].isdigit() else None
    return SimpleNamespace(
        strict_answer=strict, strict_correct=strict == example.answer, lenient_answer=lenient, lenient_correct=lenient == example.answer
    )


class Killed(Exception):
    pass


class Oracle:
    """Right on every question; says so strictly only for even samples; q3 is cut; stops dead after `lives` answers."""

    facts = {"backend": "oracle"}

    def __init__(self, lives=10**9):
        self.lives, self.asked = lives, []

    def generate(self, requests, decoding):
        for request in requests:
            if self.lives == 0:
                raise Killed
            self.lives -= 1
            self.asked.append(request.key)
            answer = request.example.answer
            text = f"so #### {answer}" if request.sample % 2 == 0 else f"so {answer}"
            yield request, Output(text, len(text), "length" if request.example.id == "q3" else "stop", passes=2.0 * len(text))


def run(folder, generator=None, examples=EXAMPLES, **options):
    options = {"scorer": score, **options}
    return evaluate(generator or Oracle(), examples, "sums", folder, **options)


def test_strict_and_lenient_side_by_side(tmp_path):
    result = run(tmp_path, repeat=2)
    assert (result.questions, result.samples) == (6, 12)
    assert result.strict.mean == 0.5 and result.lenient.mean == 1.0
    assert (result.unparsed, result.unparsed_lenient) == (6, 0)
    assert (result.truncated, result.truncated_correct) == (2, 1)
    assert result.passes_per_token == 2.0
    assert result.strict.n == 6, "the interval is over questions: samples of one question are not independent"


def test_one_sample_has_wilsons_interval(tmp_path):
    result = run(tmp_path)
    assert result.strict.mean == 1.0 and result.strict.low == pytest.approx(6 / (6 + 1.959964**2), abs=1e-4)


@pytest.mark.parametrize("lives", [0, 1, 5, 11])
def test_a_kill_loses_nothing_and_doubles_nothing(tmp_path, lives):
    with pytest.raises(Killed):
        run(tmp_path / "killed", Oracle(lives), repeat=2)
    rest = Oracle()
    again = run(tmp_path / "killed", rest, repeat=2)
    assert len(rest.asked) == 12 - lives
    whole = run(tmp_path / "whole", repeat=2)
    assert again.row() == whole.row()
    for name in ("evaluation_stats.csv", "detailed_results.csv", "samples.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_torn_last_line_is_asked_again(tmp_path):
    run(tmp_path)
    path = tmp_path / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    again = Oracle()
    assert run(tmp_path, again).samples == 6
    assert again.asked == [("q5", 0)]
    assert len(path.read_text().splitlines()) == 6


def test_more_samples_and_other_questions_join(tmp_path):
    run(tmp_path, data_range=(0, 3))
    second = Oracle()
    result = run(tmp_path, second, data_range=(2, 5), repeat=2)
    assert second.asked == [("q2", 1), ("q3", 0), ("q3", 1), ("q4", 0), ("q4", 1)]
    assert (result.questions, result.samples) == (3, 6), "only what was chosen counts"
    chosen = run(tmp_path, ids=["sums_q0", "q4"])
    assert [row["id"] for row in chosen.rows] == ["sums_q0", "sums_q4"]


def test_the_official_tables(tmp_path):
    run(tmp_path, repeat=2)
    stats = list(csv.DictReader((tmp_path / "evaluation_stats.csv").open()))
    assert list(stats[0])[:5] == ["problem_id", "accuracy", "correct_count", "total_samples", "avg_output_length"]
    assert [row["problem_id"] for row in stats] == [f"sums_q{i}" for i in range(6)] + ["total"]
    assert (stats[-1]["correct_count"], stats[-1]["total_samples"], float(stats[-1]["accuracy"])) == ("6", "12", 0.5)
    detail = list(csv.DictReader((tmp_path / "detailed_results.csv").open()))
    assert {"problem_id", "sample_idx", "correct_answer", "predicted_answer", "has_answer", "is_correct"} <= set(detail[0])
    assert {"input_tokens", "output_tokens", "processing_time"} <= set(detail[0])
    line = json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[1])
    assert {"problem", "output", "correct_answer", "predicted_answer", "is_correct", "id", "sample"} <= set(line)
    assert (line["id"], line["sample"], line["predicted_answer"], line["is_correct"]) == ("sums_q0", 1, None, False)


def test_unknown_passes_stay_unknown(tmp_path):
    class Silent(Oracle):
        def generate(self, requests, decoding):
            yield from ((request, Output("#### 1", 2, "stop")) for request in requests)

    result = run(tmp_path, Silent())
    assert math.isnan(result.passes) and math.isnan(result.passes_per_token) and len(read_samples(tmp_path)) == 6


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"data_range": (0, 2), "ids": ["q1"]}, SettingsError, "not both"),
        ({"data_range": (6, 9)}, SettingsError, "none of the 6"),
        ({"data_range": (3, 3)}, SettingsError, "none of the 6"),
        ({"examples": []}, SettingsError, "none of the 0"),
        ({"ids": ["q9"]}, DataError, "Unknown sums id 'q9'"),
        ({"repeat": 0}, SettingsError, "at least one sample"),
    ],
)
def test_impossible_choices(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        run(tmp_path, **options)
    assert not (tmp_path / "samples.jsonl").exists()


def test_another_evaluation_in_the_folder_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(RunError, match="another decoding"):
        run(tmp_path, decoding=Decoding(temperature=0.6))
    run(tmp_path, decoding=Decoding(batch=1))

    class Other(Oracle):
        facts = {"backend": "other"}

    with pytest.raises(RunError, match="another generator"):
        run(tmp_path, Other())


class Says(Oracle):
    """The same text to every question."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def generate(self, requests, decoding):
        yield from ((request, Output(self.text, 3, "stop")) for request in requests)


def test_the_rules_of_a_benchmark(tmp_path):
    """GSM8K: the official rule takes the last number, the lenient one honours the marker and drops the currency."""
    gold = [Example(id="0", question="How much?", answer="1200")]
    result = evaluate(Says("The answer is $1,200. Not 7 or 8"), gold, "gsm8k", tmp_path / "a", rule="codi")
    assert (result.rule, result.strict.mean, result.lenient.mean) == ("codi", 0.0, 1.0)
    assert evaluate(Says(""), gold, "gsm8k", tmp_path / "b").rule == "tah-expr"
    assert evaluate(Says("1200"), gold, "number", tmp_path / "c").lenient.mean == 1.0
    empty = evaluate(Says("I do not know"), gold, "gsm8k", tmp_path / "d")
    assert (empty.unparsed, empty.unparsed_lenient, empty.strict.mean) == (1, 1, 0.0)


def test_names_are_checked_before_anything_is_asked(tmp_path):
    with pytest.raises(SettingsError, match="Did you mean 'tah-expr'"):
        evaluate(Oracle(), EXAMPLES, "gsm8k", tmp_path / "x", rule="tah-exp")
    with pytest.raises(SettingsError, match="Did you mean 'gsm8k'"):
        evaluate(Oracle(), EXAMPLES, "gsm8", tmp_path / "x")
    with pytest.raises(DataError, match="execute model-written code"):
        evaluate(Oracle(), EXAMPLES, "humaneval", tmp_path / "x")
    assert not (tmp_path / "x").exists()
