"""The strict rules against answers taken from the official implementations."""

import json
import threading
import time
from pathlib import Path

import pytest

from lab.data import score
from lab.data.answers import RULES, official, official_math, strict
from lab.errors import SettingsError
from lab.sampling.votes import vote

FIXTURES = Path(__file__).parents[1] / "fixtures"


def fixture(name):
    return json.loads((FIXTURES / name).read_text())


def test_tah_graders():
    for case in fixture("tah/answer_checks.json")["cases"]:
        predicted = official_math.tah(case["output"], case["mode"])
        assert (str(predicted) if predicted else "No extracted answer") == case["predicted"], case
        assert strict(case["output"], case["gold"], f"tah-{case['mode']}")[1] == case["correct"], case


def test_tah_graders_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(strict("\\boxed{\\frac{36}{2}}", "18", "tah-expr")))
    thread.start()
    thread.join()
    assert results == [("\\frac{36}{2}", True)]


def test_the_limit_is_of_work_and_not_of_time(monkeypatch):
    def work(seconds):
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        return "done"

    monkeypatch.setattr(official_math, "LIMIT_S", 0.1)
    assert official_math.within_limit(lambda: (time.sleep(0.3), "slept")) == (None, "slept")
    assert official_math.within_limit(work, 0.01) == "done" and official_math.within_limit(work, 30) is None


def test_tah_modes_of_the_published_table():
    modes = fixture("tah/answer_checks.json")["dataset_to_mode"]
    from lab.data import BENCHMARKS

    assert {name: BENCHMARKS[name].strict for name in modes if name in BENCHMARKS} == {
        name: f"tah-{mode}" for name, mode in modes.items() if name in BENCHMARKS
    }


@pytest.mark.parametrize(("rule", "key"), [("codi", "gsm8k"), ("codi", "train.py"), ("codi-bool", "strategy")])
def test_codi(rule, key):
    data = fixture("codi/answers.json")
    for text, wanted in zip(data["strings"], data["extracted"][key][::2], strict=True):
        unread = wanted == "inf" or str(wanted).startswith("RAISES")
        assert RULES[rule].extract(text) == (None if unread else wanted), text


def test_codi_letters():
    assert strict("so The answer is: B", "B", "codi-letters") == ("B", True)
    assert strict("The answer is: Z", "C", "codi-letters") == (None, False)
    assert strict("no", "inf", "codi") == (None, False)


def test_adaptive():
    data = fixture("adaptive/eval_parsing.json")["latent"]
    found = [strict(text, data["label"], "adaptive") for text in data["texts"]]
    assert [answer is None for answer, _ in found].count(True) == 2  # one of bad format, one with nothing behind the phrase
    assert [correct for i, (_, correct) in enumerate(found) if i != 3] == data["out"]["correct_list"]
    assert strict("10", "10", "adaptive-override") == ("10", True)


@pytest.mark.parametrize("backbone", ["coconut", "codi", "colar"])
def test_latenttts(backbone):
    for case in fixture("latenttts/extraction.json"):
        wanted = None if case[backbone] == "inf" else case[backbone]
        assert RULES[f"latenttts-{backbone}"].extract(case["text"]) == wanted, case


def test_coconut():
    for case in fixture("coconut/curriculum.json")["extraction"]:
        assert official.coconut(case["text"]) == case["answer"] and official.coconut_steps(case["text"]) == case["cot"]
    assert strict("18", "18", "coconut") == (None, False)
    assert strict("q\n### 1,000", "1,000", "coconut") == ("1000", True)


def test_colar():
    for case in fixture("colar/meta.json")["answers"]:
        assert official.colar(case["output"]) == case["extracted"]
        assert strict(case["output"], case["gt"], "colar")[1] == bool(case["acc"]), case
    assert not strict("Answer:nan", "nan", "colar")[1] and strict("Answer:inf", "infinity", "colar")[1], "compared as floats where both are"


def test_lta():
    rules = {"gsm8k": "lta-gsm8k", "aqua": "lta-aqua", "du": "lta-aqua", "strategyqa": "lta-strategyqa", "math": "lta-math"}
    data = fixture("lta/answers.json")
    for case in data["extract"]:
        found = RULES[rules[case["task"]]].extract(case["text"])
        assert (found, type(found).__name__) == (case["value"], case["type"]), case
    for case in data["ground_truth"]:
        assert RULES[rules[case["task"]]].gold(case["answer_field"]) == case["value"], case
    assert strict("\\boxed{\\sqrt2}", "\\sqrt{2}", "lta-math")[1]
    assert strict("no", "yes", "lta-strategyqa") == ("False", False)
    asked = [strict(text, "18", "lta-gsm8k")[0] for text in ("is 7", "is 18", "is 7", "is 18.0", "is $18.00")]
    assert vote(asked, official=True, once=True) == "18", "18 and 18.0 are one answer to the published counting"


def test_hrpo():
    data = fixture("dtt/hrpo_cases.json")
    for case in data["extract"]:
        assert official.hrpo(case["text"]) == case["extract_from_response"]
        assert (official.hrpo_gsm8k(case["text"]) or "") == case["gsm8k"], case
        assert official.hrpo_qa(case["text"]) == case["qa"]
    for case in data["qa"]:
        assert official.hrpo_qa(case["text"]) == case["out"]
    for case in data["math"]:
        assert strict(f"so #### {case['text']}", case["out"], "hrpo-math") == (case["out"], True), case
    assert strict("#### $\\frac1{72}$", "\\frac{1}{72}", "hrpo-math")[1] and strict("\\boxed{5\\text{ cm}}", "5", "hrpo-math")[1]
    assert strict("#### nothing", "5", "hrpo-math") == (None, False)
    assert strict("so #### $\\frac{1}2$", "1/2", "hrpo-math")[1] is False, "the usual clean-up leaves a half-braced fraction alone"
    assert strict("so #### 5,000", "7,000", "hrpo-gsm8k")[1], "the official rule cuts at commas: a false positive kept for parity"


def test_dtt():
    assert strict("[bot] s1 [eot] Tom is a lempus. ", "Tom is a lempus.", "dtt") == ("Tom is a lempus.", True)
    assert strict("Tom is a lempus.", "Tom is a lempus.", "dtt") == (None, False)


def test_score_puts_both_rules_side_by_side():
    found = score("<think>7</think>So it is \\boxed{18 dollars}", "18", "gsm8k")
    assert (found.strict_correct, found.lenient_answer, found.lenient_correct) == (False, "18", True)
    assert score("(B)", "B", "gpqa", "lta-aqua").strict_correct and not score("(B)", "B", "gpqa").strict_correct
    nothing = score("", "18", "number")
    assert (nothing.strict_answer, nothing.strict_correct, nothing.lenient_answer, nothing.lenient_correct) == (None, False, None, False)
    with pytest.raises(SettingsError, match="Did you mean 'lta-math'"):
        score("1", "1", "gsm8k", "lta-mat")
    with pytest.raises(SettingsError, match="benchmark"):
        score("1", "1", "gsm9k")


ODD = ["", " ", "\n", "####", "\\boxed{", "the answer is:", "no idea", "<|im_end|>", "{" * 50, "\\frac{", "1/0 #### 1/0", "9" * 5000]


@pytest.mark.parametrize("rule", sorted(RULES))
def test_no_rule_raises_on_odd_outputs(rule):
    for text in ODD:
        answer, correct = strict(text, "18", rule)
        assert not correct and (answer is None or isinstance(answer, str)), text
