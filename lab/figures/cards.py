"""The pictures of the README and of the papers' cards, made from run folders alone: `papers/figures.yaml` says from which."""

import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from lab import figures
from lab.config import Settings
from lab.errors import RunError, SettingsError
from lab.figures.again import read
from lab.files import read_json
from lab.running.papers import load_yaml
from lab.running.provenance import home, outputs
from lab.running.records import StepRecord
from lab.running.runs import MANIFEST, Run
from lab.stats import mean_interval

WIDTH = 860  # CSS pixels of a view's picture


class Card(Settings):
    """A picture: its place without ending, the step of which runs it shows, and a figure or a view of that step.

    `by`: columns that tell the points of a figure apart; all the others become means over runs, with intervals of `mean`.
    """

    picture: str
    paper: str
    recipe: str
    step: str
    figure: str = ""
    view: str = ""
    by: list[str] = []
    size: str = "column"


def cards() -> list[Card]:
    """The pictures that papers/figures.yaml lists; SettingsError naming the line that is wrong."""
    return [Card.check(**line) for line in load_yaml(home() / "papers" / "figures.yaml") or []]


def make(card: Card, out: Path) -> list[Path]:
    """Draws a card's picture into `out` (PDF, SVG, PNG and CSV of a figure, PNG of a view); the paths, the PNG last.

    Raises RunError, with the command that makes them, where there are no such finished runs.
    """
    records = runs_of(card)
    name = card.picture.replace("/", "-")
    if card.view:
        return [photograph(_file(records[-1], "views", f"{card.view}.html"), out / f"{name}.png")]
    source = read_json(_file(records[-1], "figures", f"{card.figure}.json"))
    tables = [read(_file(record, "figures", f"{card.figure}.csv")) for record in records]
    table = over_seeds(tables, card.by) if len(tables) > 1 and card.by else tables[-1]
    paths = figures.save(getattr(figures, source["figure"])(table, size=card.size, **source["options"]), table, out, name)
    return sorted(paths, key=lambda path: path.suffix == ".png")


def make_all(wanted: Iterable[Card], out: Path) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """({picture: paths}, {picture: why not}): what `make` draws, and those whose runs or browser are not there."""
    made, missing = {}, {}
    for card in wanted:
        try:
            made[card.picture] = make(card, out)
        except (RunError, SettingsError) as error:
            missing[card.picture] = str(error)
    return made, missing


def place(card: Card, paths: Iterable[Path]) -> list[Path]:
    """Puts a picture's PNG, and the numbers of a figure, where the card shows it; the paths written."""
    target = home() / card.picture
    target.parent.mkdir(parents=True, exist_ok=True)
    kept = [path for path in paths if path.suffix in (".png", ".csv")]
    return [Path(shutil.copyfile(path, target.with_suffix(path.suffix))) for path in kept]


def runs_of(card: Card) -> list[StepRecord]:
    """The step in the newest finished run of the recipe, and in the runs beside it where that is one of a sweep."""
    found = sorted((outputs() / card.paper).glob(f"**/{MANIFEST}"), key=lambda path: path.stat().st_mtime)
    done = [Run(path.parent) for path in found]
    done = [run for run in done if run.manifest.get("recipe") == card.recipe and (run.folder / card.step).is_dir()]
    if not done:
        raise RunError(f"No run of {card.paper} shows {card.picture}; make one with: lab run {card.paper} --recipe {card.recipe}")
    sweep = done[-1].folder.parent
    together = [run for run in done if run.folder.parent == sweep] if sweep != outputs() / card.paper else done[-1:]
    return [run.step(card.step) for run in together]


def over_seeds(tables: Sequence[pd.DataFrame], by: Sequence[str]) -> pd.DataFrame:
    """Rows that agree in the columns `by`, of several runs' tables, as one: the mean of every number, low and high of `mean`, n runs."""
    together = pd.concat(tables, ignore_index=True)
    if missing := [name for name in by if name not in together]:
        raise SettingsError(f"papers/figures.yaml: the table has no column {missing[0]!r}; it has {', '.join(together)}.")
    return pd.DataFrame([_folded(part) for _, part in together.groupby(list(by), sort=False)])


def _folded(part: pd.DataFrame) -> dict[str, Any]:
    row = {name: values.mean() if values.dtype.kind == "f" else values.iloc[0] for name, values in part.items()}
    interval = mean_interval(part["mean"].tolist())
    return row | {"mean": interval.mean, "low": interval.low, "high": interval.high, "n_runs": interval.n}


def photograph(view: Path, picture: Path) -> Path:
    """A saved view as a browser shows it, light; SettingsError where playwright or Chromium is not installed."""
    way = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if way is None or find_spec("playwright") is None:
        raise SettingsError("A picture of a view needs a browser: pip install playwright, and apt-get install chromium.")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(1) as apart:  # playwright refuses the thread of a notebook, where an event loop runs
        apart.submit(_shoot, way, view.read_text("utf-8"), picture).result()
    return picture


def _shoot(browser_path: str, view: str, picture: Path) -> None:
    from playwright.sync_api import sync_playwright

    from lab.view.base import document

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 600}, device_scale_factor=2)
        page.set_content(document("view", view, "light"))
        page.locator(".lab-view").first.screenshot(path=picture)
        browser.close()


def _file(record: StepRecord, folder: str, name: str) -> Path:
    path = record.folder / folder / name
    if not path.exists():
        there = ", ".join(other.name for other in record.files(folder, "*")) or "nothing"
        raise RunError(f"{record.folder} has no {folder}/{name}; there is {there}.")
    return path
