"""The report and an executed notebook, opened from disk with the network off: both themes, desk and phone."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pandas as pd
import pytest

from lab import figures, report, steps, view
from lab.figures import cards
from lab.running.notebooks import execute
from lab.trace import Trace

HOSTILE = "<img src=x onerror=window.hacked=1><script>window.hacked=1</script>"
PARAMETERS = {"seed": 0, "count": 1, "data": "", "pause_s": 0.0, "more": False, "fail": False}


@pytest.fixture
def page(bench, tmp_path):
    step = steps.begin("mini", "draw", str(tmp_path / "run"), PARAMETERS)
    tokens = [{"question": 0, "pos": p, "id": p, "text": HOSTILE if p == 3 else f" word{p}", "iterations": 1 + p % 2} for p in range(40)]
    step.save_view(view.tokens(Trace.build("tah", tokens=tokens, samples=[{"question": 0}])), "tokens")
    table = pd.DataFrame({"iterations": [1, 2], "share": [0.9, 0.1]})
    step.save_figure(figures.iteration_histogram(table), "histogram", table)
    step.table("wide", [{f"column {index}": HOSTILE for index in range(12)}])
    for index in range(10):
        step.log(step=index, loss=1.0 / (index + 1))
    step.warn(HOSTILE)
    step.warn(f"evaluate did not finish: see /{'a-long-path/' * 20}evaluate.html#papermill-error-cell")
    step.finish(tah={"hard": 0.8}, note=HOSTILE)
    return report.write([step.run.folder], tmp_path / "report.html")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("size", "width"), [("desk", 1280), ("phone", 390)])
def test_the_report_reads_well_everywhere(page, tab, theme, size, width):
    one = tab(theme=theme, width=width)
    one.page.goto(page.as_uri())
    one.shot(f"report-{theme}-{size}")
    assert one.page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out sideways"
    background = one.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (theme == "light")
    assert one.page.evaluate("window.hacked") is None
    assert all(one.page.evaluate("[...document.images].map(image => image.naturalWidth)"))


def test_folded_parts_open_by_keyboard(page, tab):
    one = tab()
    one.page.goto(page.as_uri())
    summary = one.page.locator("summary", has_text="Manifest")
    summary.focus()
    one.page.keyboard.press("Enter")
    assert one.page.locator("details[open] pre").is_visible()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_an_executed_notebooks_page_follows_the_theme_without_a_network(bench, tmp_path, tab, theme, monkeypatch):
    monkeypatch.setenv("LAB_WARM", "0")
    source, output = bench / "notebooks" / "mini" / "1_draw.ipynb", tmp_path / "out" / "draw.ipynb"
    execute(source, output, {"run": str(tmp_path / "run"), "count": 2})
    one = tab(theme=theme)
    one.page.goto(output.with_suffix(".html").as_uri())
    one.shot(f"notebook-{theme}")
    assert one.page.get_by_text("drawing 2/2 100%").is_visible()
    red = int(one.page.evaluate("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    assert (red > 200) == (theme == "light")


@pytest.mark.usefixtures("chromium")
def test_a_view_is_photographed_where_an_event_loop_runs_as_in_a_notebook(tmp_path):
    (tmp_path / "view.html").write_text('<section class="lab-view">hello</section>')

    async def inside():
        return cards.photograph(tmp_path / "view.html", tmp_path / "view.png")

    with ThreadPoolExecutor(1) as notebook:
        assert notebook.submit(asyncio.run, inside()).result().stat().st_size > 1000
