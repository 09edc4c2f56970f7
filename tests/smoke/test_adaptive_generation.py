"""Adaptive inference: the official tokens, caps, batch invariance, sampling of the number of thoughts, and evaluation."""

import re
from types import SimpleNamespace

import pytest
import torch
from adaptive_fixture import lora_model, numbers

from lab.data.answers import strict
from lab.data.examples import Example
from lab.errors import SettingsError
from lab.latent.loop import Budget, Prompt, rollout
from lab.latent.policy import Phase
from lab.latent.record import Response
from lab.latent.sampling import Sampling
from lab.methods.adaptive import report, toy
from lab.methods.adaptive.config import AdaptiveSettings
from lab.methods.adaptive.model import read_ids, scores
from lab.methods.adaptive.policy import Adaptive, generate, official_ids, warning

QUESTIONS = [row["question"] for row in numbers("tokenized")["rows"]]


@pytest.fixture(scope="module")
def model():
    return lora_model()


@pytest.mark.parametrize("batch", [5, 1])
def test_a_given_count_says_the_official_tokens(model, batch):
    found = generate(model, QUESTIONS, thoughts=6, compat=True, max_new_tokens=30, batch=batch)
    for row, wanted in zip(found.rows, numbers("generation")["override6"]["new_tokens"], strict=True):
        said = official_ids(row, model)
        assert said[:7] == [model.config.go_on] * 6 + [model.config.stop]
        assert said[11:35] == wanted  # after the four tokens of the forced " The answer is:"


def test_thoughts_that_begin_in_mid_answer_are_the_official_ones(model):
    asked, wanted = (numbers("generation")["plain"][name] for name in ("input_ids", "new_tokens"))
    policy = Adaptive(model.thinker, [1], multi=True)
    policy.start = Phase.ANSWER
    prompt = Prompt.of_ids(model.thinker, asked)
    done = rollout(model.thinker, policy, prompt, budget=Budget(thoughts=99, answer=24), keep=("logprob", "stop", "decided"))
    for place, ids in enumerate(done.answers()):

        class Row:
            channels = {name: done.notes[name][place].tolist() for name in ("stop", "decided") if name in done.notes}

        Row.ids = ids
        assert official_ids(Row, model)[:24] == wanted[place]


def test_the_default_never_says_start_or_an_unused_id_and_stops_at_the_cap(model):
    found = generate(model, QUESTIONS, samples=3, sampling=Sampling(temperature=2.0), max_thoughts=1, max_new_tokens=40)
    never = {*model.config.unused, model.config.start, model.config.end, model.config.go_on, model.config.stop}
    assert not any(never & set(row.ids) for row in found.rows)
    assert max(row.thoughts for row in found.rows) <= 1
    assert any(row.capped for row in found.rows) and all(row.thoughts == 1 for row in found.rows if row.capped)
    assert len({row.thoughts for row in found.rows}) > 1


def test_a_batch_equals_single_rows_and_more_samples_contain_fewer(model):
    how = dict(sampling=Sampling(temperature=1.0), max_thoughts=5, max_new_tokens=8, seed=3)
    eight = generate(model, QUESTIONS, samples=8, batch=40, **how)
    two = generate(model, QUESTIONS, samples=2, batch=1, **how)
    by_key = {(row.question, row.sample): row for row in eight.rows}
    for row in two.rows:
        other = by_key[row.question, row.sample]
        assert (row.ids, row.thoughts) == (other.ids, other.thoughts)
        made = slice(0, row.thoughts + 1)
        assert row.channels["stop_prob"][made] == pytest.approx(other.channels["stop_prob"][made], abs=1e-5)


def test_recorded_probabilities_are_those_of_one_uncached_pass(model):
    s = model.config
    found = generate(model, QUESTIONS[:2], sampling=Sampling(temperature=1.0), max_thoughts=5, max_new_tokens=6, channels=("decision",))
    for row in found.rows:
        ids = [*row.prompt, *[s.go_on] * row.thoughts, s.stop, *row.ids]
        with torch.no_grad():
            logits = scores(model.thinker, torch.tensor([ids]), read_ids(model.thinker, torch.tensor([ids])).last)[0]
        banned = torch.tensor([*s.unused, s.start])
        words = logits.index_fill(-1, banned, -torch.inf)
        at = len(row.prompt) + row.thoughts
        logs = torch.log_softmax(words[at : at + len(row.ids)], -1)
        told = logs[torch.arange(len(row.ids)), torch.tensor(row.ids)]
        assert row.logprobs == pytest.approx(told.tolist(), abs=1e-4)
        decided = torch.log_softmax(logits[len(row.prompt) - 1 : at + 1], -1)
        wanted = [float(decided[i, s.go_on]) for i in range(row.thoughts)]
        assert row.channels["decision"][: row.thoughts] == pytest.approx(wanted, abs=1e-4)
        if not row.capped:
            assert row.channels["decision"][row.thoughts] == pytest.approx(float(decided[row.thoughts, s.stop]), abs=1e-4)


def test_an_untrained_head_is_warned_about_and_its_count_taken_from_training():
    model = lora_model()
    assert warning(model) == ""
    model.but(head_trained=False)
    assert "never trained" in warning(model) and warning(model, thoughts=3) == ""
    model.but(fixed_count=2, most_trained=2)
    assert {row.thoughts for row in generate(model, QUESTIONS[:2], max_new_tokens=6).rows} == {2}
    assert "more than the 2" in warning(model, thoughts=3)
    with pytest.raises(SettingsError, match="0 or more"):
        generate(model, QUESTIONS[:1], thoughts=-1)


def scripted(monkeypatch, texts):
    """Makes every evaluation find these outputs, written with their special tokens."""
    rows = [
        Response(i, 0, [], [], [], "eos", re.sub(r"<\|[^|]*\|>", "", text), thoughts=text.count("<|CONTINUE|>"))
        for i, text in enumerate(texts)
    ]
    monkeypatch.setattr(report, "generate", lambda *args, **options: SimpleNamespace(rows=rows))


def test_answers_are_read_as_the_official_evaluation_reads_them(monkeypatch, model):
    case = numbers("eval_parsing")["latent"]
    out, texts = case["out"], [re.sub(r"<\|[^|]*\|>", "", text) for text in case["texts"]]
    assert [strict(text, case["label"], "adaptive")[1] for text in texts].count(True) == out["n_correct"]
    scripted(monkeypatch, case["texts"])
    table, _ = report.evaluate(model, [Example(str(i), "How many?", (), case["label"]) for i in range(len(texts))])
    official = {"score": "score", "length": "n_avg_reasoning_tokens", "length_std": "n_reasoning_tokens_std", "bad_format": "bad_format_p"}
    official |= {"length_min": "min_reasoning_tokens", "length_max": "max_reasoning_tokens"}
    for ours, theirs in official.items():
        assert table[ours] == pytest.approx(out[theirs]), ours


def test_with_a_given_count_all_that_is_written_is_the_answer(monkeypatch, model):
    scripted(monkeypatch, ["<|CONTINUE|><|CONTINUE|><|STOP|> The answer is: 5. The answer is: 7"])
    for thoughts, wanted, length in ((2, 1.0, 4), (None, 0.0, 6)):
        table, _ = report.evaluate(model, [Example("a", "How many?", (), "5")], thoughts)
        assert (table["score"], table["length"], table["bad_format"]) == (wanted, length, 0)


def test_the_trace_holds_stop_probabilities_and_candidates(model):
    trace = generate(model, QUESTIONS[:2], top=3, max_thoughts=3, max_new_tokens=4).trace()
    assert trace.method == "adaptive" and trace.thoughts.stop_prob.between(0, 1).any()
    assert all(len(texts) == 3 for texts in trace.thoughts.top_texts if len(texts))


def test_reasoning_is_counted_also_where_words_run_together():
    toy_model = SimpleNamespace(tokenizer=toy.tokenizer(), config=AdaptiveSettings(filter="none"))
    assert [report._tokens(text, toy_model) for text in ("", "<<2>><<7>>", " op1 Q 5", "op12 Q")] == [0, 2, 3, 2]
