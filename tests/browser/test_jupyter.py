"""The explorer in a real JupyterLab, and the notebook's HTML afterwards. Run: pytest tests/browser/test_jupyter.py"""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from lab.running import notebooks

CELL = """
from lab import view
from lab.trace import Trace

tokens = [
    {"question": 0, "pos": p, "text": f" w{p}", "role": "answer", "iterations": 1 + (p > 6), "decider_prob": p / 10} for p in range(10)
]
trace = Trace.build("tah", samples=[{"question": 0, "answer": "24"}], tokens=tokens, meta={"threshold": 0.6, "max_iter": 2})
view.explore(trace)
"""
NOTE = ".note"
TOUR = Path(__file__).parents[2] / "notebooks" / "tour.ipynb"


def written(path, code):
    """A notebook of one cell at `path`."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code.strip(), metadata={"tags": ["parameters"]})])
    book.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    path.parent.mkdir(exist_ok=True)
    nbformat.write(book, path)
    return path


@pytest.fixture
def notebook(tmp_path):
    return written(tmp_path / "work" / "demo.ipynb", CELL)


@pytest.fixture
def jupyter(notebook, tmp_path, monkeypatch):
    """The address of a JupyterLab on a free loopback port; its settings are the test's own, also for what the test executes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name in ("CONFIG", "DATA", "RUNTIME"):
        monkeypatch.setenv(f"JUPYTER_{name}_DIR", str(tmp_path / name.lower()))
    options = {"ip": "127.0.0.1", "port": port, "root_dir": notebook.parent, "open_browser": False, "allow_root": True}
    options |= {"port_retries": 0, "disable_check_xsrf": False}
    arguments = [f"--ServerApp.{name}={value}" for name, value in options.items()]
    arguments += [
        "--IdentityProvider.token=only-here",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    arguments.append("--LabApp.expose_app_in_browser=True")
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *arguments], stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api?token=only-here", server, tmp_path / "server.log")
        yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token=only-here"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


def _wait_for(address, server, log, seconds=300):
    for _ in range(seconds * 2):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"JupyterLab did not answer in {seconds} s:\n{log.read_text()}")


def run_all(page):
    """Run All Cells by its menu; again if a kernel that was still starting swallowed it."""
    page.locator(".jp-Notebook").wait_for(timeout=180_000)
    prompt = page.locator(".jp-CodeCell .jp-InputArea-prompt").first
    for _ in range(6):
        page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=120_000)
        page.locator(".jp-CodeCell .cm-content").first.click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        for _ in range(100):  # a second Run All on top of one that is only slow would draw everything twice
            if prompt.inner_text().strip() not in ("[ ]:", ""):
                return
            page.wait_for_timeout(200)
    raise AssertionError(f"the cell did not run: {prompt.inner_text()!r}")


def save(page, notebook):
    """Saves the open notebook, until what it shows lies on the disk: a save may begin before the output has reached the document."""
    for _ in range(40):
        page.evaluate("jupyterapp.commands.execute('docmanager:save')")
        if '"output_type"' in notebook.read_text():
            return
        page.wait_for_timeout(500)
    raise AssertionError(f"{notebook} was not saved with its output")


def test_the_explorer_lives_in_jupyterlab(tab, jupyter):
    one = tab(width=1200, offline=False)
    one.page.goto(jupyter)
    run_all(one.page)
    note = one.page.locator(".jp-OutputArea .note")
    note.wait_for(timeout=180_000)
    assert note.inner_text() == "At threshold 0.60: 1.300 passes a token (recorded: 1.300)."
    one.shot("jupyter-light")

    handle = one.page.locator(".noUi-handle").first
    handle.focus()
    for _ in range(30):
        handle.press("ArrowLeft")
    one.page.get_by_text("At threshold 0.30").wait_for(timeout=120_000)
    assert "1.600 passes a token" in note.inner_text()
    number = one.page.locator(".jp-OutputArea .t sub").nth(5)
    assert number.evaluate("element => getComputedStyle(element, '::before').content") == '"2"'

    one.page.get_by_role("button", name="continue probability").click()
    one.page.wait_for_function("document.querySelector('.jp-OutputArea .t sub').dataset.c0 === '0.00'", timeout=120_000)
    assert number.evaluate("element => getComputedStyle(element, '::before').content") == '"0.50"'
    one.page.locator(".jp-OutputArea .t").nth(2).focus()
    one.page.keyboard.press("ArrowRight")
    assert one.page.evaluate("document.activeElement.getAttribute('aria-label')").startswith('" w3"')

    one.page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    one.page.locator("body[data-jp-theme-light=false]").wait_for(state="attached", timeout=120_000)
    one.page.locator("#jupyterlab-splash").wait_for(state="detached", timeout=120_000)
    ground = one.page.locator(".jp-OutputArea .lab-view").evaluate("element => getComputedStyle(element).backgroundColor")
    one.shot("jupyter-dark")
    assert ground == "rgb(17, 17, 17)"


def test_a_watched_training_is_still_there_when_one_comes_back(tab, jupyter, notebook, tmp_path):
    folder = tmp_path / "train"
    folder.mkdir()

    def log(step):
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0 / step}) + "\n")

    log(1)
    watched = written(notebook.parent / "watched.ipynb", f"from lab import view\nview.watch({str(folder)!r}, seconds=0.5)")
    one = tab(width=1200, offline=False)
    one.page.goto(jupyter.replace(notebook.name, watched.name))
    run_all(one.page)
    one.page.get_by_text("at step 1, 1 lines logged").wait_for(timeout=180_000)
    log(2)
    one.page.get_by_text("at step 2, 2 lines logged").wait_for(timeout=120_000)
    save(one.page, watched)
    one.page.goto("about:blank")
    log(3)
    one.page.goto(jupyter.replace(notebook.name, watched.name))
    one.page.get_by_text("at step 3, 3 lines logged").wait_for(timeout=180_000)
    log(4)
    one.page.get_by_text("at step 4, 4 lines logged").wait_for(timeout=120_000)
    one.shot("jupyter-watched")


@pytest.fixture
def reopened(tab, jupyter, notebook, monkeypatch, tmp_path):
    """reopened(ours): the notebook, executed by us or by somebody else and opened in JupyterLab; its tab once the view is there."""

    def opened(ours):
        if not ours:
            monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "elsewhere"))
        notebooks.execute(notebook, notebook.parent / "done.ipynb", {})
        one = tab(width=1200, offline=False)
        one.page.goto(jupyter.replace(notebook.name, "done.ipynb"))
        one.page.locator(".jp-OutputArea .note").wait_for(timeout=180_000)
        return one

    return opened


def shown(one, place):
    """The number that stands under a token."""
    return one.page.locator(".jp-OutputArea .t sub").nth(place).evaluate("element => getComputedStyle(element, '::before').content")


def test_an_executed_notebook_opened_again_is_whole(reopened):
    """Signed when it was executed, so JupyterLab keeps style sheets and scripts of its outputs: the static twin works, nothing is dead."""
    one = reopened(ours=True)
    assert one.page.locator(".jp-OutputArea .note").inner_text() == "At threshold 0.60: 1.300 passes a token (recorded: 1.300)."
    assert one.page.locator(".jupyter-widgets").count() == 0 and shown(one, 9) == '"2"'
    one.page.locator(".jp-OutputArea .switch label").nth(1).click()
    assert shown(one, 5) == '"0.50"'
    one.page.locator(".jp-OutputArea .t").first.focus()
    one.page.keyboard.press("End")
    assert one.page.evaluate("document.activeElement.getAttribute('aria-label')").startswith('" w9"')
    one.shot("jupyter-reopened")


def test_a_strangers_notebook_is_readable_without_its_scripts(reopened):
    """JupyterLab drops style sheets and scripts of outputs that nobody here vouches for; texts, numbers and colours stay."""
    one = reopened(ours=False)
    tokens = one.page.locator(".jp-OutputArea .t")
    assert tokens.count() == 10 and tokens.nth(9).locator("sub").inner_text() == "2"
    assert tokens.nth(9).locator(".w").evaluate("element => getComputedStyle(element).backgroundColor") == "rgb(115, 202, 178)"
    one.shot("jupyter-stranger")


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The tour's notebook and parameters with which its toys are trained, hardly, in seconds, and once."""
    return TOUR, {"effort": 0.01, "run": str(tmp_path_factory.mktemp("toys"))}


def test_the_tour_lives_in_jupyterlab(tab, jupyter, notebook, tour):
    path, values = tour
    book = nbformat.read(path, 4)
    book.cells[1].source += "".join(f"\n{name} = {value!r}" for name, value in values.items())
    nbformat.write(book, notebook.parent / "tour.ipynb")
    one = tab(width=1300, offline=False)
    one.page.goto(jupyter.replace(notebook.name, "tour.ipynb"))
    run_all(one.page)
    one.page.locator(".jp-OutputArea .lab-view").nth(3).wait_for(state="attached", timeout=1_200_000)
    note, handles = one.page.locator(".jp-OutputArea .note").first, one.page.locator(".noUi-handle")
    for key, says in (("Home", "At threshold 0.00: 2.000 passes a token"), ("End", "At threshold 1.00: 1.000 passes a token")):
        handles.first.focus()
        handles.first.press(key)
        one.page.get_by_text(says).first.wait_for(timeout=120_000)
        assert note.inner_text().startswith(says)
    one.shot("tour-passes")

    one.page.get_by_role("button", name="continue probability").first.click()
    one.page.wait_for_function("document.querySelector('.jp-OutputArea .t sub').dataset.c0.includes('.')", timeout=120_000)
    one.page.locator(".jp-OutputArea .t").nth(2).focus()
    start = one.page.evaluate("document.activeElement.getAttribute('aria-label')")
    one.page.keyboard.press("ArrowRight")
    assert one.page.evaluate("document.activeElement.getAttribute('aria-label')") not in (start, None)

    steps = one.page.locator(".jp-OutputArea .lab-view").nth(1)
    whole = steps.inner_text()
    handles.nth(1).focus()
    handles.nth(1).press("Home")
    one.page.wait_for_function(
        "text => document.querySelectorAll('.jp-OutputArea .lab-view')[1].innerText.length < text.length", arg=whole, timeout=120_000
    )
    handles.nth(1).scroll_into_view_if_needed()
    one.shot("tour-thoughts")
    one.page.locator(".jp-OutputArea .lab-view").nth(3).scroll_into_view_if_needed()
    one.shot("tour-prompts")


def test_the_executed_tour_is_whole_without_a_network(tab, tour, tmp_path):
    path, values = tour
    done = notebooks.execute(path, tmp_path / "done.ipynb", values)
    for theme in ("light", "dark"):
        one = tab(theme=theme, width=1000)
        one.page.goto(done.with_suffix(".html").as_uri())
        views = one.page.locator(".lab-view")
        assert views.count() >= 4
        views.first.locator(".switch label").nth(1).click()
        views.first.locator(".t").first.focus()
        one.page.keyboard.press("End")
        assert one.page.evaluate("document.activeElement.getAttribute('aria-label')")
        one.shot(f"executed-tour-{theme}")


def test_the_executed_notebook_shows_the_same_picture_offline(tab, notebook, tmp_path):
    done = notebooks.execute(notebook, tmp_path / "done.ipynb", {})
    (output,) = [
        output
        for cell in json.loads(done.read_text())["cells"]
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    assert "w9‹2›" in "".join(output["data"]["text/plain"])
    one = tab(theme="light", width=1000)
    one.page.goto(done.with_suffix(".html").as_uri())
    assert one.page.locator(NOTE).inner_text() == "At threshold 0.60: 1.300 passes a token (recorded: 1.300)."
    one.page.locator(".switch label").nth(1).click()
    shown = "element => getComputedStyle(element, '::before').content"
    assert one.page.locator(".t sub").nth(5).evaluate(shown) == '"0.50"'
    one.page.locator(".t").first.focus()
    one.page.keyboard.press("End")
    assert one.page.evaluate("document.activeElement.getAttribute('aria-label')").startswith('" w9"')
    one.shot("executed-notebook")
