"""Run: pytest tests/unit/test_view_tokens.py"""

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from lab import view
from lab.errors import DataError, SettingsError
from lab.trace import Trace
from lab.view import palette
from lab.view.base import columns, direction, plain, text_bar, visible
from lab.view.channels import Channel, channel
from lab.view.decide import passes_at, with_gates, with_threshold

HOSTILE = [
    "<script>alert(1)</script>",
    "</span></section>",
    "\"'><img src=x onerror=alert(1)>",
    "\u202egnp",
    "\x1b[31m",
    "\x00",
    "\ud800",
    "&lt;",
    "-->",
]


class Seen(HTMLParser):
    """Tags, attributes and text of a page, as a browser would separate them."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.data, self.open = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("input", "br", "meta", "img", "i"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "i":
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.data.append(data)


def make(texts, **columns):
    rows = [{"question": 0, "pos": place, "text": text, "role": "answer"} for place, text in enumerate(texts)]
    return Trace.build("tah", tokens=[row | {name: values[place] for name, values in columns.items()} for place, row in enumerate(rows)])


def labels(page):
    return [value for name, value in Seen(page).attributes if name == "aria-label" and "position" in value]


@pytest.mark.parametrize("theme", ["auto", "light", "dark"])
def test_hostile_text_stays_text(theme):
    trace = make(HOSTILE, iterations=[2.0] * len(HOSTILE))
    seen = Seen(view.tokens(trace).page(theme))
    assert seen.tags.count("script") == 1 and "img" not in seen.tags and seen.tags.count("section") == 1
    assert "<script>alert(1)</script>" in "".join(seen.data).replace("·", " ")
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert "\u202e" not in "".join(seen.data) and "U+202E" in "".join(seen.data)


def test_hostile_text_cannot_drive_a_terminal():
    drawn = view.tokens(make(HOSTILE, iterations=[2.0] * len(HOSTILE))).text(color=False)
    assert "\x1b" not in drawn and "\x00" not in drawn and "\u202e" not in drawn and "U+001B[31m" in drawn


def test_saved_page_reaches_for_nothing_outside(tmp_path):
    page = view.tokens(make(["a"], prob=[0.5])).save(tmp_path / "sub" / "v.html").read_text("utf-8")
    assert not re.search(r"https?://|//cdn|@import|url\(", page)


def test_every_channel_with_values_can_be_chosen_and_is_written_out():
    trace = make(["a", "b"], iterations=[1.0, 2.0], prob=[0.25, float("nan")], surprise=[3.0, 40.0])
    page = view.tokens(trace, "prob").html()
    seen = Seen(page)
    assert [value for name, value in seen.attributes if name == "value"] == ["c0", "c1", "c2"]
    assert [label.split("\n")[1] for label in labels(page)] == [
        "passes 1 · probability 0.25 · surprise 3",
        "passes 2 · probability undefined · surprise 40",
    ]
    assert re.search(r'value="c1" checked', page) and page.count("checked>") == 1
    assert "undefined · 1" in page


def test_unknown_or_empty_channel_is_an_error_with_the_closest():
    with pytest.raises(SettingsError, match="Did you mean 'prob'"):
        view.tokens(make(["a"], prob=[0.5]), "probs")
    with pytest.raises(SettingsError, match="gate"):
        view.tokens(make(["a"], prob=[0.5]), "gate")
    with pytest.raises(SettingsError, match="theme"):
        view.tokens(make(["a"], prob=[0.5])).html("sepia")


def test_playground_colours_are_those_of_the_seed():
    drawn = view.tokens(make(["a", " b", *"cdefg"], iterations=[1, 2, 3, 4, 5, 6, 9])).text(color=True).splitlines()[-1]
    assert drawn == "a\x1b[32m b\x1b[0m\x1b[34mc\x1b[0m\x1b[31md\x1b[0m\x1b[35me\x1b[0m\x1b[33mf\x1b[0m\x1b[36mg\x1b[0m"
    plain_form = view.tokens(make(["a", " b", *"cdefg"], iterations=[1, 2, 3, 4, 5, 6, 9])).text(color=False).splitlines()
    assert plain_form[-1] == "a b‹2›c‹3›d‹4›e‹5›f‹6›g‹9›" and plain_form[0].startswith("passes per token  1: 1 tokens")


def test_terminal_lines_fit_and_wide_characters_count_twice():
    drawn = view.tokens(make(["漢字"] * 40, iterations=[1] * 40)).text(width=31, color=False).splitlines()[2:]
    assert all(columns(line) <= 31 for line in drawn) and sum(line.count("漢字") for line in drawn) == 40


def test_values_beyond_the_scale_are_marked():
    scale = Channel("entropy", 0.0, 2.0)
    assert scale.short(3.0) == "▲3.00" and scale.short(-1.0) == "▼-1.00" and scale.short(float("nan")) == "–"
    assert "above the scale's 2" in scale.long(3.0) and scale.strength(3.0) == 1 and scale.strength(float("inf")) == 1
    trace = make(["x"] * 300, entropy=[1.0] * 299 + [90.0])
    assert channel(trace.tokens, "entropy").high == pytest.approx(1.0)
    assert "▲90.0" in view.tokens(trace).html() and "beyond the scale · 1" in view.tokens(trace).html()
    assert channel(trace.tokens, "entropy", clip=(0, 5)).high == 5


def test_ink_stays_readable_on_every_fill():
    for theme, colours in palette.THEMES.items():
        for hue in palette.HUES.values():
            assert palette.contrast(colours["ink"], palette.mix(hue, palette.STRENGTH[theme], colours["bg"])) >= 4.5
        assert palette.contrast(colours["soft"], colours["bg"]) >= 4.5


def test_tokens_without_any_white_space_are_set_apart_except_where_a_script_has_none():
    toy = view.tokens(make(["BOS", "b→g", "A", "c"], iterations=[1, 1, 2, 1]))
    assert toy.text(color=False).splitlines()[-1].split() == ["BOS", "b→g", "A‹2›", "c"] and "lab-strip apart" in toy.html()
    assert "lab-strip apart" not in view.tokens(make(["漢", "字", "仮", "名"], prob=[0.5] * 4)).html()


def test_the_first_channel_is_one_that_differs():
    assert view.tokens(make(["a", "b"], iterations=[1, 1], prob=[0.2, 0.4])).scales[0].name == "prob"
    assert view.tokens(make(["a", "b"], iterations=[1, 1], prob=[0.2, 0.2])).scales[0].name == "iterations"


def test_whitespace_and_empty_tokens_are_visible():
    assert visible(" ") == '<i class="ws"> </i>' and 'class="nl"' in visible("\n") and "⇥" in visible("\t") and "∅" in visible("")
    assert plain("a\tb\u200d\u2066") == "a⇥b\u200dU+2066"
    assert text_bar(0.5, 4) == "██  " and text_bar(float("nan"), 4) == "    "


def test_right_to_left_text_sets_the_direction():
    assert direction("שלום 12") == "rtl" and direction("12 שלום abcdef") == "ltr"
    assert 'dir="rtl"' in view.tokens(make(["שלום", " עולם"], prob=[0.1, 0.2])).html()


def test_spans_are_marked_and_brackets_join_their_thoughts():
    roles = ["prompt", "prompt", "special", "thought", "thought", "special", "answer", "special"]
    rows = [{"question": 0, "pos": p, "text": "" if r == "thought" else "x", "role": r, "gate": 0.5} for p, r in enumerate(roles)]
    thoughts = [{"question": 0, "step": s, "top_texts": ["<b>9"], "top_probs": [0.75]} for s in (0, 1)]
    page = view.tokens(Trace.build("codi", tokens=rows, thoughts=thoughts)).html()
    assert re.findall(r'class="role">(\w+)<small>(\d+)', page) == [("prompt", "2"), ("thoughts", "4"), ("answer", "2")]
    assert [label.split("\n")[-1] for label in labels(page) if "continuous" in label] == [
        'thought 0: "<b>9" 0.75',
        'thought 1: "<b>9" 0.75',
    ]


def test_the_state_before_the_first_thought_is_not_taken_for_it():
    tokens = [{"question": 0, "pos": p, "id": -1, "text": f"[thought {p + 1}]", "role": "thought", "gate": p} for p in (0, 1)]
    thoughts = [{"question": 0, "step": s, "top_texts": [name], "top_probs": [0.5]} for s, name in enumerate(("before", "one", "two"))]
    page = view.tokens(Trace.build("codi", tokens=tokens, thoughts=thoughts)).html()
    assert [label.split("\n")[-1] for label in labels(page)] == ['thought 1: "one" 0.5', 'thought 2: "two" 0.5']


def test_long_spans_fold_and_many_samples_are_counted():
    page = view.tokens(make(["x"] * 50, prob=[0.5] * 50), fold=20).html()
    assert "<summary>30 more tokens</summary>" in page and len(labels(page)) == 50
    many = Trace.build("tah", tokens=[{"question": q, "pos": 0, "text": "x", "prob": 0.5} for q in range(5)])
    assert "2 more samples" in view.tokens(many).html() and view.tokens(many)._repr_html_().count("<article") == 3
    assert len(view.tokens(many, question=[0, 3]).table()) == 2
    crossed = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    trace = Trace.build("tah", tokens=[{"question": q, "sample": s, "pos": 0, "text": "x", "prob": 0.5} for q, s in crossed])
    assert view.tokens(trace, limit=3).table()[["question", "sample"]].values.tolist() == [[0, 0], [0, 1], [1, 0]]


def test_an_empty_trace_says_so():
    assert "No tokens" in view.tokens(Trace.build("tah")).html() and "No tokens" in view.tokens(Trace.build("tah")).text()


def test_in_a_notebook_the_bundle_holds_html_and_text():
    bundle = view.tokens(make(["a"], iterations=[2]))._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain"} and "a‹2›" in bundle["text/plain"]


def test_two_runs_are_aligned_by_token():
    ours, theirs = make(list("abcde"), prob=[0.5] * 5), make(list("abXde"), prob=[0.9] * 5)
    drawn = view.compare(ours, theirs, names=("one", "two"))
    assert drawn.table()["same"].tolist() == [True, True, False, True, True]
    assert "4 of 5 columns agree" in drawn.html() and "one 0.5, two 0.9" in drawn.html()
    shorter = view.compare(ours, make(list("abde"), prob=[0.9] * 4))
    assert shorter.table()["text_b"].tolist()[:2] == ["a", "b"] and len(shorter.pairs) == 5 and shorter.pairs[2][1] is None
    assert " _ " in shorter.text() + " "
    with pytest.raises(DataError, match="no such sample"):
        view.compare(ours, theirs, question=7)


def recorded():
    probabilities = [[0.95, 0.2], [0.6], [0.1], [0.99, 0.97, 0.3]]  # recorded at threshold 0.9, at most 4 passes
    tokens = [{"question": 0, "pos": p, "text": "x", "iterations": len(row), "decider_prob": row[0]} for p, row in enumerate(probabilities)]
    passes = [
        {"question": 0, "pos": p, "depth": d + 1, "decider_prob": prob} for p, row in enumerate(probabilities) for d, prob in enumerate(row)
    ]
    return Trace.build(
        "tah", tokens=tokens + [{"question": 0, "pos": 9, "text": "p", "iterations": 1}], passes=passes, meta={"max_iter": 4}
    )


def test_deciding_again_at_the_recorded_threshold_gives_the_recorded_counts():
    trace = recorded()
    again = passes_at(trace, 0.9)
    assert again["iterations"].tolist() == trace.tokens["iterations"].tolist() and not again["open"].any()


def test_a_lower_threshold_asks_for_more_and_says_where_the_record_ends():
    again = passes_at(recorded(), 0.5)
    assert again["iterations"].tolist() == [2, 2, 1, 3, 1] and again["open"].tolist() == [False, True, False, False, False]
    lower = passes_at(recorded(), 0.15)
    assert lower["iterations"].tolist() == [3, 2, 1, 4, 1] and lower["open"].tolist() == [True, True, False, False, False]
    assert (passes_at(recorded(), 1.0)["iterations"] == 1).all()
    counts = [passes_at(recorded(), threshold)["iterations"].sum() for threshold in np.linspace(0, 1, 21)]
    assert counts == sorted(counts, reverse=True)
    with pytest.raises(SettingsError, match="no decider"):
        with_threshold(make(["a"], prob=[0.5]), 0.5)


def test_gates_follow_the_temperature():
    trace = make(["a", "b", "c"], gate_logit=[-2.0, 0.0, 2.0])
    assert with_gates(trace, 1.0).tokens["gate"].tolist() == pytest.approx([0.1192, 0.5, 0.8808], abs=1e-4)
    assert with_gates(trace, 0.01).tokens["gate"].tolist() == pytest.approx([0, 0.5, 1])
    assert with_gates(trace, 1.0, threshold=0.5).tokens["gate"].tolist() == [0, 0, 1]
    assert with_gates(trace, 1.0, threshold=0.9).tokens["gate"].tolist() == [0, 0, 0]
    assert with_gates(trace, 0.5, threshold=0.9).tokens["gate"].tolist() == [0, 0, 1]
    noisy = make(["a", "b", "c"], gate_logit=[-2.0, 0.0, 2.0], gate_noise=[3.0, -1.0, float("nan")])
    assert with_gates(noisy, 1.0, 0.5, noisy=True).tokens["gate"].tolist()[:2] == [1, 0]
    assert with_gates(noisy, 1.0, 0.5, noisy=True).tokens["gate"].isna().tolist() == [False, False, True]
    with pytest.raises(SettingsError, match="gate_noise"):
        with_gates(trace, noisy=True)
    with pytest.raises(SettingsError, match="gate_logit"):
        with_gates(make(["a"], gate=[0.5]), 1.0)


def test_a_channel_that_cannot_be_switched_is_named_all_the_same():
    tokens = [{"question": 0, "pos": p, "text": "a", "role": "answer", "gate": p / 2} for p in range(3)]
    assert "<p>gate</p>" in view.tokens(Trace.build("dtt", tokens=tokens)).html()


def test_text_without_any_channel_is_shown_alone():
    trace = Trace.build("lta", tokens=[{"question": 0, "pos": p, "text": f" w{p}", "role": "prompt"} for p in range(3)])
    for drawn in (view.tokens(trace), view.compare(trace, trace)):
        assert "w2" in drawn.html() and "w2" in drawn.text() and "‹›;" not in drawn.text() and "Colour" not in drawn.title
    assert view.tokens(trace).title == "lta: tokens"


def test_several_newlines_end_one_line():
    tokens = [{"question": 0, "pos": p, "text": t, "role": "answer", "gate": 0.5} for p, t in enumerate(["a", *3 * "\n", "b\n", "c"])]
    assert view.tokens(Trace.build("dtt", tokens=tokens)).html().count("<br>") == 2
