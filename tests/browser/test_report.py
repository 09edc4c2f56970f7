"""The report of a run, opened from disk with the network off. Run: pytest tests/browser/test_report.py"""

import pandas as pd
import pytest

from lab import figures, report, runs, view
from lab.trace import Trace

PARAMETERS = {"count": 1, "data": "", "pause_s": 0.0, "more": False, "fail": False}


@pytest.fixture
def page(bench, tmp_path):
    """A report with two token views (which share their style and script), a figure and a training."""
    folder = tmp_path / "run"
    runs.Run.open(folder, "mini", recipe="toy", overrides={}).close()
    step = runs.begin("mini", "draw", str(folder), {"seed": 0, **PARAMETERS})
    shares = pd.DataFrame({"iterations": [1, 2], "share": [0.9, 0.1]})
    step.save_figure(figures.iteration_histogram(shares), "histogram", shares)
    for name in ("first", "second"):
        tokens = [
            {"question": name, "pos": p, "text": f" {name}{p}", "role": "answer", "iterations": 1 + p % 2, "prob": p / 9} for p in range(9)
        ]
        step.save_view(view.tokens(Trace.build("tah", tokens=tokens)), name)
    for index in range(5):
        step.log(step=index, loss=1.0 / (index + 1))
    step.finish(tah={"accuracy": 0.8})
    return report.write([folder], tmp_path / "report.html")


@pytest.mark.parametrize(("theme", "width"), [("light", 1000), ("dark", 390)])
def test_the_report_works_offline_in_both_themes(tab, page, theme, width):
    one = tab(theme=theme, width=width)
    one.page.goto(page.as_uri())
    strips, shown = one.page.locator(".lab-strip"), "element => getComputedStyle(element, '::before').content"
    assert strips.count() == 2 and one.page.get_by_role("img").count() >= 1

    second = strips.nth(1).locator(".t")
    one.page.locator(".lab-view form").nth(1).get_by_text("probability", exact=True).click()
    assert second.nth(3).locator("s").evaluate(shown) == '"0.33"'
    assert strips.nth(0).locator("s").nth(3).evaluate(shown) == '"2"'

    second.first.focus()
    one.page.keyboard.press("ArrowRight")
    assert second.nth(1).evaluate("element => element === document.activeElement")
    assert one.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    one.shot(f"report-{theme}-{width}")
