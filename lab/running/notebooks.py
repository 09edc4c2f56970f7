"""One notebook, executed headless through papermill: output kept cell by cell, failures pointed at, HTML that shows offline."""

import logging
import re
import signal
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from threading import Thread
from typing import Any

from lab.errors import RunError
from lab.files import make_folder, write_text, writing
from lab.running import kernels, memory

log = logging.getLogger(__name__)
GRACE_S = 5.0  # how long a kernel may take to stop before it is ended
PATIENCE_S = 60  # how long the last words of a cell that has ended may take: a machine at its limit needs more than the usual 4
START_S = 600  # how long a kernel may take to start
_DEAD, _UNBORN = ("Kernel died", "Kernel didn't respond"), "Kernel died before replying"  # there is no class of error for the last two
WIDGET = "application/vnd.jupyter.widget-view+json"


class CellFailed(RunError):
    """A cell of a notebook raised; `ename` and `evalue` are the kernel's, `cell` counts from 1 over all cells."""

    def __init__(self, notebook: Path, cell: int, ename: str, evalue: str) -> None:
        self.cell, self.ename, self.evalue = cell, ename, evalue
        first_line = evalue.strip().splitlines()[0] if evalue.strip() else ""
        super().__init__(f"{ename} in cell {cell}: {first_line} See {notebook.with_suffix('.html')}#papermill-error-cell")


def execute(notebook: Path, output: Path, parameters: dict[str, Any], on_cell: Callable[[int, int], None] | None = None) -> Path:
    """Runs `notebook` with `parameters` (checked by the caller) and returns `output`, written after every cell, with its HTML beside it.

    on_cell(done, total) is called as code cells start. What the kernel prints outside cells goes to `output` with the ending .log.
    Raises CellFailed if a cell raises, RunError if the kernel dies, KeyboardInterrupt if it was stopped; what ran before stays in `output`.
    """
    make_folder(output.parent)
    manager = kernels.manager_class(output.with_suffix(".log"))
    with writing(output):
        try:
            _interruptible(lambda: _papermill(notebook, output, parameters, on_cell, manager), manager)
        finally:
            if output.exists():
                seal(output)
                to_html(output)
    return output


def seal(notebook: Path) -> None:
    """Leaves an executed notebook as it should be opened: without the remains of live widgets, and trusted.

    A widget is dead without its kernel; the static twin in the same output works. The signature (as `jupyter trust` makes it) lets
    JupyterLab keep styles and scripts of outputs; it lies in this user's Jupyter data folder, so elsewhere the notebook is a stranger's.
    """
    import nbformat
    from nbformat.sign import NotebookNotary

    content = nbformat.read(notebook, 4)
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        for output in cell.get("outputs", []):
            if len(output.get("data", {})) > 1:
                output.data.pop(WIDGET, None)
    write_text(notebook, nbformat.writes(content) + "\n")
    try:
        NotebookNotary(log=_quiet()).sign(content)
    except OSError as error:
        log.warning("%s is not signed (%s): JupyterLab will ask before it shows styles and scripts of its outputs.", notebook, error)


def _interruptible(work: Callable[[], None], manager: Any) -> None:
    """Does `work` in a thread of its own, so that an interrupt finds this one waiting and not inside a library that may swallow it.

    The kernel is then told to stop, and ended if it does not.
    """
    outcome: Future[None] = Future()

    def thread() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # all of it is raised again by the thread that waits
            outcome.set_exception(error)

    try:
        Thread(target=thread, daemon=True).start()
        while not wait([outcome], timeout=0.5).done:
            pass
    except KeyboardInterrupt:
        manager.stop(signal.SIGINT)
        if not wait([outcome], timeout=GRACE_S).done:
            manager.stop(signal.SIGKILL)
            wait([outcome], timeout=PATIENCE_S if manager.group else GRACE_S)  # the notebook of one that ran is still being written
        raise
    outcome.result()


def _papermill(notebook: Path, output: Path, parameters: dict[str, Any], on_cell: Callable[[int, int], None] | None, manager: Any) -> None:
    import papermill
    from nbclient.exceptions import CellTimeoutError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # its warnings are about parameters, which lab.running.parameters has checked
    hooks = {"on_cell_start": _counter(notebook, on_cell)} if on_cell else {}
    given = {"kernel_name": "python3", "language": "python", "kernel_manager_class": manager, "progress_bar": False, **hooks}
    given |= {"iopub_timeout": PATIENCE_S, "start_timeout": START_S}
    kills = memory.kills()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _twice(lambda: papermill.execute_notebook(str(notebook), str(output), parameters, **given), manager)
    except PapermillExecutionError as error:
        raise CellFailed(output, error.cell_index + 1, error.ename, error.evalue) from None
    except CellTimeoutError:
        raise RunError(f"The kernel of {notebook.name} has not answered for {PATIENCE_S} seconds; its output is in {output}.") from None
    except RuntimeError as error:
        if not str(error).startswith(_DEAD):
            raise
        how = f"was {memory.why_killed(kills)}" if memory.kills() > kills else "died (killed, or out of memory)"
        raise RunError(f"The kernel of {notebook.name} {how}. Its output so far is in {output}.") from None


def _twice(start: Callable[[], Any], manager: Any) -> None:
    """Starts again where a kernel died before its first cell: another process may have taken a port that was meant for it."""
    try:
        start()
    except RuntimeError as error:
        if not str(error).startswith(_UNBORN) or manager.stopped:
            raise
        log.warning("A kernel died before its first cell; it is started again.")
        start()


def _counter(notebook: Path, on_cell: Callable[[int, int], None]) -> Callable[..., None]:
    import nbformat

    total = sum(cell.cell_type == "code" for cell in nbformat.read(notebook, 4).cells)
    started: list[int] = []

    def count(cell: Any, cell_index: int) -> None:
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", []):
            started.append(cell_index)
            on_cell(len(started) - 1, total)

    return count


def to_html(notebook: Path) -> Path:
    """The notebook (sealed before) as one HTML file that needs no network."""
    import nbformat
    from nbconvert import HTMLExporter

    content = nbformat.read(notebook, 4)
    content.metadata.setdefault("title", notebook.stem)
    exporter = HTMLExporter(log=_quiet(), exclude_input_prompt=True, exclude_output_prompt=True, sanitize_html=False)
    exporter.require_js_url = exporter.mathjax_url = exporter.jquery_url = exporter.mermaid_js_url = ""
    html, _ = exporter.from_notebook_node(content)
    return write_text(notebook.with_suffix(".html"), _offline(_both_themes(html, exporter.template_paths)))


def _both_themes(html: str, templates: list[str]) -> str:
    """`html` with JupyterLab's dark colours beside its light ones; views inside it follow the reader's system too."""
    dark = next(path.read_text() for folder in templates if (path := Path(folder) / "static" / "theme-dark.css").exists())
    style = f"<style>@media (prefers-color-scheme: dark) {{ {dark} }}</style></head>"
    return html.replace("</head>", style, 1).replace('data-jp-theme-light="true"', "").replace('data-jp-theme-name="JupyterLab Light"', "")


def _quiet() -> logging.Logger:
    logger = logging.getLogger(f"{__name__}.html")
    logger.setLevel(logging.ERROR)
    return logger


def _offline(html: str) -> str:
    """`html` without scripts and imports that would be fetched."""
    html = re.sub(r"<script\b[^>]*\bsrc=\"(?:https?:)?(?://[^\"]*)?\"[^>]*>\s*</script>", "", html)
    return re.sub(r"<script type=\"module\">(?:(?!</script>).)*\bimport\b(?:(?!</script>).)*</script>", "", html, flags=re.S)
