"""Saved views opened from disk, network off. Run: pytest tests/browser/test_views.py"""

import json
import math

import pytest

from lab import view
from lab.trace import Trace

HOSTILE = [
    "<script>window.hacked=1</script>",
    "</span></section>",
    "\"'><img src=x onerror=window.hacked=1>",
    "\u202egnp",
    "\ud800",
    "&lt;",
    "-->",
]


def decided():
    words = "How many clips did Natalia sell ? In May she sold 24 .".replace(" ", "| ").split("|")
    roles = ["prompt"] * 7 + ["answer"] * (len(words) - 7)
    tokens = [
        {"question": 0, "pos": p, "id": p, "text": word, "role": role, "iterations": 1 + (p % 4 == 0), "decider_prob": p / len(words)}
        | {"prob": p / 20 if role == "answer" else math.nan, "entropy": 0.1 * p}
        for p, (word, role) in enumerate(zip(words, roles, strict=True))
    ]
    samples = [{"question": 0, "answer": "24", "gold": "24", "correct": True}]
    return Trace.build("tah", samples=samples, tokens=tokens, meta={"threshold": 0.9, "max_iter": 2})


def thinking():
    rows = [("Q", "prompt"), ("<bot>", "special"), ("", "thought"), ("", "thought"), ("<eot>", "special"), ("36", "answer")]
    tokens = [{"question": 0, "pos": p, "text": text, "role": role, "gate": p / 6} for p, (text, role) in enumerate(rows)]
    thoughts = [{"question": 0, "step": k, "stop_prob": k / 2, "top_texts": ["36", "<b>"], "top_probs": [0.7, 0.2]} for k in (0, 1)]
    samples = [
        {"question": 0, "sample": s, "answer": str(s), "gold": "1", "correct": s == 1, "score": -s, "steps": ["<<6*6=36>>"]}
        for s in range(12)
    ]
    return Trace.build("codi", samples=samples, tokens=tokens, thoughts=thoughts)


@pytest.fixture
def views(tmp_path):
    lines = [{"step": s, "loss": 3 - s / 10} for s in (*range(20), *range(10, 30))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "tokens": view.tokens(decided()),
        "thoughts": view.thoughts(thinking()),
        "histogram": view.histogram(thinking()),
        "samples": view.samples(thinking()),
        "compare": view.compare(decided(), decided()),
        "runs": view.histogram({"one": thinking(), "two": thinking()}, "gate"),
        "versus": view.versus(thinking(), thinking()),
        "training": view.training(tmp_path),
    }


def opened(tab, shown, tmp_path, **options):
    one = tab(**options)
    one.page.goto(shown.save(tmp_path / "view.html").as_uri())
    return one


def painted(page, place):
    return page.locator(".t .w").nth(place).evaluate("element => getComputedStyle(element).backgroundColor")


def popover(page, place):
    return page.locator(".t").nth(place).evaluate("element => getComputedStyle(element, '::after').content")


@pytest.mark.parametrize("width", [1000, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_view_opens_in_both_themes_at_both_widths(tab, views, tmp_path, theme, width):
    for name, shown in views.items():
        one = opened(tab, shown, tmp_path, theme=theme, width=width)
        one.shot(f"{name}-{theme}-{width}")
        overflow = one.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow <= 0, f"{name} is wider than the page"
        ground = one.page.locator(".lab-view").evaluate("element => getComputedStyle(element).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(15, 19, 24)"}[theme]


def test_a_forced_theme_wins_over_the_system(tab, views, tmp_path):
    one = tab(theme="light")
    one.page.goto(views["tokens"].save(tmp_path / "view.html", theme="dark").as_uri())
    assert one.page.locator("html").evaluate("element => getComputedStyle(element).backgroundColor") == "rgb(15, 19, 24)"


@pytest.mark.parametrize("script", [True, False])
def test_channels_switch_by_mouse_and_by_keyboard_with_and_without_script(tab, views, tmp_path, script):
    one = opened(tab, views["tokens"], tmp_path, script=script)
    labels = one.page.locator(".switch label")
    assert labels.all_inner_texts() == ["passes", "continue probability", "probability", "entropy"]
    below = one.page.locator(".t sub").nth(8)
    shown = "element => getComputedStyle(element, '::before').content"
    assert below.evaluate(shown) == '"2"'
    by_passes = painted(one.page, 8)
    labels.nth(2).click()
    assert below.evaluate(shown) == '"0.40"' and painted(one.page, 8) != by_passes
    assert one.page.get_by_text("undefined · 7").is_visible()
    one.page.locator(".switch input").nth(2).press("ArrowRight")
    assert one.page.locator(".switch input").nth(3).is_checked() and below.evaluate(shown) == '"0.80"'


def test_arrow_keys_move_the_focus_and_show_the_numbers(tab, views, tmp_path):
    one = opened(tab, views["tokens"], tmp_path)
    assert popover(one.page, 0) == "none"
    one.page.locator(".switch input").first.focus()
    one.page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label').split(' · ')[0]"
    assert one.page.evaluate(focused) == '"How"' and "position 0" in popover(one.page, 0)
    for key, expected in {"ArrowRight": '" many"', "End": '" ."', "ArrowLeft": '" 24"', "Home": '"How"', "ArrowDown": '" sold"'}.items():
        one.page.keyboard.press(key)
        assert one.page.evaluate(focused) == expected
    assert "continue probability 0.7692" in one.page.evaluate("document.activeElement.getAttribute('aria-label')")
    one.shot("tokens-focused")
    assert one.page.evaluate("document.querySelectorAll('.t[tabindex=\"0\"]').length") == 1


def test_without_script_every_token_is_a_tab_stop_and_hover_shows_numbers(tab, views, tmp_path):
    one = opened(tab, views["tokens"], tmp_path, script=False)
    one.page.locator(".t").nth(3).hover()
    assert "position 3" in popover(one.page, 3)
    one.page.locator(".t").nth(1).focus()
    one.page.keyboard.press("Tab")
    assert one.page.locator(".t").nth(2).evaluate("element => element === document.activeElement")


def test_hostile_text_is_shown_and_not_obeyed(tab, tmp_path):
    trace = Trace.build(
        "tah",
        samples=[{"question": "<img src=x onerror=window.hacked=1>", "answer": HOSTILE[0], "text": HOSTILE[2], "correct": False}],
        tokens=[
            {"question": "<img src=x onerror=window.hacked=1>", "pos": p, "text": text, "iterations": 2} for p, text in enumerate(HOSTILE)
        ],
    )
    for shown in (view.tokens(trace), view.samples(trace), view.compare(trace, trace), *hostile_views(tmp_path)):
        one = opened(tab, shown, tmp_path)
        assert one.page.evaluate("window.hacked") is None and one.page.locator("img").count() == 0
        assert one.page.locator(".lab-view").count() == 1 and one.page.locator("script").count() == bool(shown.script)
    one = opened(tab, view.tokens(trace), tmp_path)
    assert one.page.locator(".t .w").first.inner_text() == HOSTILE[0]
    assert one.page.locator(".t").nth(3).inner_text().startswith("U+202E")
    assert one.page.locator(".t").nth(3).evaluate("element => getComputedStyle(element).direction") == "ltr"
    one.shot("hostile")


def hostile_views(folder):
    """Views whose candidates, steps, answers, names, labels and events are hostile."""
    lines = [{"arm": HOSTILE[0], "step": s, "loss": 1.0 / (s + 1), HOSTILE[2]: 1.0} for s in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "divergence.jsonl").write_text(json.dumps({"kind": HOSTILE[0], "step": 1, "why": HOSTILE[2]}) + "\n")
    samples = [{"question": HOSTILE[2], "gold": HOSTILE[1], "answer": HOSTILE[0], "correct": False, "steps": [HOSTILE[0]]}]
    thoughts = [{"question": HOSTILE[2], "step": 0, "top_texts": HOSTILE, "top_probs": [0.1] * len(HOSTILE)}]
    tokens = [{"question": HOSTILE[2], "pos": 0, "text": HOSTILE[0], "role": "thought", "gate": 0.5}]
    trace = Trace.build("codi", samples=samples, thoughts=thoughts, tokens=tokens)
    right = Trace.build("cot", samples=[samples[0] | {"correct": True}])
    named = {HOSTILE[0]: trace, HOSTILE[2]: trace}
    yield from (view.thoughts(trace, candidates=9), view.histogram(named, "gate"), view.versus(trace, right, (HOSTILE[0], HOSTILE[2])))
    yield view.training(folder)


CONTRAST = """
() => {
  const light = (c) => { const s = c / 255; return s <= 0.04045 ? s / 12.92 : ((s + 0.055) / 1.055) ** 2.4; };
  const level = (rgb) => 0.2126 * light(rgb[0]) + 0.7152 * light(rgb[1]) + 0.0722 * light(rgb[2]);
  const pixel = (colour) => {
    const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
    const context = canvas.getContext('2d'); context.fillStyle = colour; context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) { const c = pixel(getComputedStyle(e).backgroundColor); if (c[3] > 0) return c; }
    return [255, 255, 255];
  };
  const ratio = (a, b) => { const [x, y] = [level(a), level(b)].sort((p, q) => q - p); return (x + 0.05) / (y + 0.05); };
  return [...document.querySelectorAll('.t .w, .cand .w, td, th, figcaption, header b, .role, .switch span, summary')]
    .filter((e) => e.offsetParent && e.textContent.trim())
    .map((e) => [ratio(pixel(getComputedStyle(e).color), ground(e)), e.textContent.trim().slice(0, 20)])
    .filter(([r]) => r < 4.5);
}
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_every_fill_in_every_channel(tab, views, tmp_path, theme):
    for name, shown in views.items():
        one = opened(tab, shown, tmp_path, theme=theme)
        for label in one.page.locator(".switch label").all() or [None]:
            if label is not None and label.is_visible():
                label.click()
            assert one.page.evaluate(CONTRAST) == [], name


def test_lines_are_told_apart_without_colour_and_described_in_words(tab, views, tmp_path):
    one = opened(tab, views["runs"], tmp_path)
    dashes = one.page.locator("svg[role=img] path").evaluate_all("paths => paths.map(path => getComputedStyle(path).strokeDasharray)")
    keys = one.page.locator("svg.key path").evaluate_all("paths => paths.map(path => getComputedStyle(path).strokeDasharray)")
    assert len(set(dashes)) == len(dashes) == 4 and keys == dashes
    assert "one inside" in one.page.locator("svg[role=img]").get_attribute("aria-label")


def test_everything_has_a_name_for_screen_readers_and_a_place_for_the_keyboard(tab, views, tmp_path):
    for name, shown in views.items():
        one = opened(tab, shown, tmp_path)
        unnamed = "svg:not([aria-label]):not([aria-hidden]), input:not(label input), button:empty, section:not([aria-label])"
        assert one.page.locator(f".lab-view {unnamed}".replace(", ", ", .lab-view ")).count() == 0, name
        wide = "boxes => boxes.every(box => box.tabIndex === 0)"
        assert one.page.locator(".scroll").evaluate_all(wide), f"{name}: what scrolls must be reachable by keyboard"


def test_tables_sort_by_any_column(tab, views, tmp_path):
    one = opened(tab, views["samples"], tmp_path)
    button = one.page.get_by_role("button", name="score")
    column = "() => [...document.querySelectorAll('.sortable tbody tr')].map(row => row.cells[1].dataset.v)"
    button.focus()
    one.page.keyboard.press("Enter")
    assert one.page.evaluate(column) == [str(s) for s in range(11, -1, -1)]
    button.click()
    assert one.page.evaluate(column) == [str(s) for s in range(12)]
    assert one.page.locator("th[aria-sort=descending]").inner_text() == "score"


def test_right_to_left_reads_from_the_right_and_arrows_follow(tab, tmp_path):
    words = ["שלום", " עולם", " טוב"]
    trace = Trace.build("tah", tokens=[{"question": 0, "pos": p, "text": word, "prob": 0.5} for p, word in enumerate(words)])
    one = opened(tab, view.tokens(trace), tmp_path)
    left = [one.page.locator(".t").nth(place).bounding_box()["x"] for place in range(3)]
    assert left == sorted(left, reverse=True)
    one.page.locator(".t").first.focus()
    one.page.keyboard.press("ArrowLeft")
    assert one.page.locator(".t").nth(1).evaluate("element => element === document.activeElement")


def test_folded_tokens_open_and_are_skipped_by_keys_until_then(tab, tmp_path):
    trace = Trace.build("tah", tokens=[{"question": 0, "pos": p, "text": f" {p}", "prob": 0.5} for p in range(30)])
    one = opened(tab, view.tokens(trace, fold=10), tmp_path)
    one.page.locator(".t").first.focus()
    one.page.keyboard.press("End")
    place = "[...document.querySelectorAll('.t')].indexOf(document.activeElement)"
    assert one.page.evaluate(place) == 9
    one.page.get_by_text("20 more tokens").click()
    one.page.locator(".t").first.focus()
    one.page.keyboard.press("End")
    assert one.page.evaluate(place) == 29
