"""Figures drawn again from run folders alone: the function and options a step recorded, and the numbers beside the picture."""

import logging
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lab import figures
from lab.errors import DataError
from lab.files import read_json
from lab.running.runs import open_run

log = logging.getLogger(__name__)


def read(path: Path) -> pd.DataFrame:
    """The numbers beside a picture; a token or a name "NA" stays a text, and only what is empty is undefined."""
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def redraw(folders: Iterable[Path], out: Path, size: str = "column") -> list[Path]:
    """Writes every figure that `lab.figures` drew in the runs as <run>-<step>-<name>.{pdf,svg,png,csv} into `out`; returns the paths.

    Left out, and logged, is what cannot be drawn from its table. Raises RunError if a folder is no run, SettingsError for an unknown size.
    """
    written: list[Path] = []
    for folder in folders:
        for record in open_run(folder).steps():
            for path in record.files("figures", "*.json"):
                source, table = read_json(path), read(path.with_suffix(".csv"))
                try:
                    picture = getattr(figures, source["figure"])(table, size=size, **source["options"])
                except DataError as error:
                    log.warning("Left out %s: %s", path.with_suffix(""), error)
                    continue
                written += figures.save(picture, table, out, f"{record.folder.parent.name}-{record.name}-{path.stem}")
    return written
