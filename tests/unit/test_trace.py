"""Run: pytest tests/unit/test_trace.py"""

import json
import math
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.errors import DataError
from lab.trace import KEYS, SCHEMA, Trace

anything = st.text(st.characters(codec=None), max_size=8)
number = st.floats(width=64)
probability = st.one_of(st.none(), st.just(math.nan), st.floats(0, 1))
key = st.fixed_dictionaries({"question": st.one_of(st.integers(0, 3), st.text(max_size=4)), "sample": st.integers(0, 2)})


def top(draw):
    texts = draw(st.lists(anything, max_size=3))
    return {"top_texts": texts, "top_probs": [draw(st.floats(0, 1)) for _ in texts]}


@st.composite
def rows(draw, name):
    columns = {
        "samples": {
            "prompt": anything,
            "answer": anything,
            "steps": st.lists(anything, max_size=2),
            "correct": st.sampled_from([True, False, None]),
            "score": number,
        },
        "tokens": {
            "pos": st.integers(0, 5),
            "id": st.integers(-1, 2**40),
            "text": anything,
            "prob": probability,
            "entropy": number,
            "surprise": number,
            "kind": anything,
        },
        "thoughts": {"step": st.integers(0, 3), "norm": number, "stop_prob": probability, "vector": st.lists(number, max_size=3)},
        "passes": {"pos": st.integers(0, 2), "depth": st.integers(1, 3), "decider_prob": probability},
    }[name]
    made = [
        draw(key) | draw(st.fixed_dictionaries(columns)) | (top(draw) if name in ("thoughts", "passes") else {})
        for _ in range(draw(st.integers(0, 4)))
    ]
    return list({tuple(str(row[column]) for column in KEYS[name]): row for row in made}.values())


@st.composite
def traces(draw):
    return Trace.build(
        "tah", **{name: draw(rows(name)) for name in SCHEMA}, meta=draw(st.dictionaries(st.text(max_size=4), st.integers(), max_size=2))
    )


@settings(max_examples=40, deadline=None)
@given(traces())
def test_saved_and_loaded_is_the_same(tmp_path_factory, trace):
    path = trace.save(tmp_path_factory.mktemp("trace") / "t.npz")
    back = Trace.load(path)
    assert back == trace
    for name in SCHEMA:
        ours, theirs = getattr(trace, name), getattr(back, name)
        assert list(ours.columns) == list(theirs.columns) and list(ours.dtypes) == list(theirs.dtypes)
        assert repr(ours.to_dict("list")) == repr(theirs.to_dict("list"))


@settings(max_examples=15, deadline=None)
@given(traces())
def test_selecting_each_question_and_joining_gives_every_row_back(trace):
    parts = [trace.select(question=question) for question in dict.fromkeys(trace.samples["question"])]
    if parts:
        joined = Trace.concat(parts)
        for name in SCHEMA:
            order = KEYS[name]
            ours, theirs = (repr(t.sort_values(order).to_dict("list")) for t in (getattr(trace, name), getattr(joined, name)))
            assert ours == theirs


def small():
    return Trace.build(
        "tah",
        samples=[{"question": 0, "sample": 0, "correct": True}, {"question": 0, "sample": 1, "correct": False}],
        tokens=[{"question": 0, "sample": s, "pos": p, "text": "ab"[p], "role": "answer", "prob": 0.5} for s in (0, 1) for p in (0, 1)],
        passes=[{"question": 0, "sample": 0, "pos": 1, "depth": 1, "decider_prob": 0.9, "top_texts": ["x"], "top_probs": [1.0]}],
    )


def test_missing_columns_are_undefined_not_zero():
    trace = small()
    assert trace.tokens["gate"].isna().all() and trace.samples["score"].isna().all()
    assert (trace.samples["parent"] == -1).all() and (trace.samples["answer"] == "").all()
    assert trace.samples["correct"].mean() == 0.5


def test_a_sample_only_tokens_mention_gets_a_row():
    trace = Trace.build("coconut", tokens=[{"question": "q7", "pos": 0, "text": "x"}], samples=[{"question": "q1", "sample": 0}])
    assert trace.samples[["question", "sample"]].values.tolist() == [["q1", 0], ["q7", 0]]


def test_select_takes_one_or_several():
    trace = small()
    assert len(trace.select(sample=1).tokens) == 2 and len(trace.select(question=0, sample=[0, 1]).tokens) == 4
    assert len(trace.select(question="0").tokens) == 4 and len(trace.select(question=9).samples) == 0
    assert trace.select(sample=1).passes.empty


def test_concat_keeps_what_all_agree_on_and_refuses_the_rest():
    one, two = (Trace.build("tah", samples=[{"question": q}], meta={"threshold": 0.9, "batch": q}) for q in (0, 1))
    assert Trace.concat([one, two]).meta == {"threshold": 0.9}
    with pytest.raises(DataError, match="two rows for question 0, sample 0"):
        Trace.concat([one, one])
    with pytest.raises(DataError, match="codi, tah"):
        Trace.concat([one, Trace.build("codi")])


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"tokens": [{"question": 0, "pos": 0, "prob": 1.5}]}, "tokens.prob, row 0: 1.5 is not a probability"),
        ({"tokens": [{"question": 0, "pos": 0}, {"question": 0, "pos": 1, "prob": "high"}]}, "tokens.prob, row 1: 'high' is not a number"),
        ({"tokens": [{"question": 0, "pos": 0.5}]}, "tokens.pos, row 0: 0.5 is not a whole number"),
        ({"tokens": [{"question": 0, "pos": 0, "role": "user"}]}, "tokens.role, row 0: 'user' is none of prompt"),
        ({"tokens": [{"question": 0}]}, "tokens.pos is missing"),
        ({"tokens": [{"pos": 0}]}, "tokens.question is missing"),
        ({"tokens": [{"question": 0, "pos": 3}] * 2}, "tokens: two rows for question 0, sample 0, pos 3"),
        ({"thoughts": [{"question": 0, "step": 0, "top_texts": ["a"], "top_probs": []}]}, "differ in length"),
        ({"thoughts": [{"question": 0, "step": 0, "top_texts": "abc"}]}, "thoughts.top_texts, row 0: 'abc' is not a list"),
        ({"samples": [{"question": 0, "correct": "yes"}]}, "samples.correct, row 0: 'yes' is not true or false"),
        ({"samples": [{"question": None}]}, "samples.question, row 0"),
        ({"samples": [{"question": 1}, {"question": "\ud800"}]}, "samples.question, row 1"),
        ({"meta": {"when": object()}}, "plain JSON"),
    ],
)
def test_bad_rows_are_refused_with_their_place(tables, message):
    with pytest.raises(DataError) as caught:
        Trace.build("tah", **tables)
    assert message in str(caught.value)


def test_damaged_foreign_and_newer_files_are_refused(tmp_path):
    path = small().save(tmp_path / "t.npz")
    with pytest.raises(DataError, match="No trace at"):
        Trace.load(tmp_path / "none.npz")
    for name, content in {
        "cut": path.read_bytes()[:-200],
        "empty": b"",
        "text": b"hello",
        "flip": path.read_bytes().replace(b"\x00", b"\x07", 40),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="not a readable trace"):
            Trace.load(tmp_path / name)
    np.savez(tmp_path / "pickle.npz", header=np.array([{"a": 1}], object))
    with pytest.raises(DataError, match="allow_pickle"):
        Trace.load(tmp_path / "pickle.npz")
    np.savez(tmp_path / "new.npz", header=np.frombuffer(json.dumps({"format": "lab-trace", "version": 99}).encode(), np.uint8))
    with pytest.raises(DataError, match="version 99"):
        Trace.load(tmp_path / "new.npz")


def test_a_table_that_does_not_add_up_is_refused(tmp_path):
    path = small().save(tmp_path / "t.npz")
    with np.load(path) as file:
        arrays = dict(file)
    arrays["tokens/prob"] = arrays["tokens/prob"][:-1]
    np.savez(path, **arrays)
    with pytest.raises(DataError, match="differ in length"):
        Trace.load(path)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = small().save(tmp_path / "t.npz")
    monkeypatch.setattr(np, "savez_compressed", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        Trace.build("tah").save(path)
    assert Trace.load(path) == small() and [file.name for file in tmp_path.iterdir()] == ["t.npz"]


def test_it_is_small_on_disk_and_uses_no_pickle(tmp_path):
    noise = np.random.default_rng(0).random(5000).astype(np.float32)
    words = [f" w{i % 300}" for i in range(5000)]
    tokens = [{"question": 0, "pos": i, "id": i % 300, "text": words[i], "role": "answer", "prob": noise[i]} for i in range(5000)]
    path = Trace.build("tah", tokens=tokens).save(tmp_path / "t.npz")
    assert path.stat().st_size < 12 * 5000
    for name in zipfile.ZipFile(path).namelist():
        assert np.load(path, allow_pickle=False)[name.removesuffix(".npy")].dtype.kind in "iuf"
