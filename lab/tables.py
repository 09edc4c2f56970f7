"""Headlines of runs as rows: arms and metrics flattened, the mean over seeds with its interval, text for a terminal."""

import html
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
SEED = "seed"


def arms(results: Mapping[str, Any], name: str = "") -> dict[str, dict[str, Any]]:
    """{arm: {metric: value}} of a headline: numbers stand for the unnamed arm, nested mappings name arms as in `easy/oracle`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in results.items():
        if isinstance(value, Mapping):
            found |= arms(value, f"{name}/{key}" if name else key)
        else:
            found.setdefault(name, {})[key] = value
    return found


def rows_of(runs: Iterable[tuple[Mapping[str, Any], Mapping[str, Mapping[str, Any]]]]) -> list[Row]:
    """One row per group of runs, step and arm. `runs` are (point, {step: headline}); points that differ in `seed` only are a group.

    A metric's cell is {"mean", "low", "high", "n"} with a 95 % t-interval over the runs (low and high None for a single run, or
    where all have the same count), or the common text. Limits that a single run recorded itself, as <metric>_low and <metric>_high
    (over questions), are its cell's; of several runs they are left out.
    """
    cells: dict[tuple, dict[str, list[Any]]] = {}
    for point, steps in runs:
        group = tuple(sorted((name, value) for name, value in point.items() if name != SEED))
        for step, headline in steps.items():
            for arm, metrics in arms(headline).items():
                row = cells.setdefault((group, step, arm), {})
                for metric, value in metrics.items():
                    row.setdefault(metric, []).append(value)
    return [
        {**dict(group), "step": step, "arm": arm, **_with_limits({metric: _cell(values) for metric, values in row.items()})}
        for (group, step, arm), row in cells.items()
    ]


def _with_limits(row: Row) -> Row:
    for name in [name for name in row if f"{name}_low" in row and f"{name}_high" in row]:
        low, high = (row.pop(f"{name}_{end}") for end in ("low", "high"))
        if row[name]["n"] == 1:
            row[name] |= {"low": low["mean"], "high": high["mean"]}
    return row


def _cell(values: list[Any]) -> Any:
    numbers = [_number(value) for value in values]
    if any(number is None for number in numbers):
        return ", ".join(dict.fromkeys(map(str, values)))
    if len(set(numbers)) == 1 and isinstance(numbers[0], int) or len(numbers) == 1:
        return {"mean": numbers[0], "low": None, "high": None, "n": len(numbers)}
    if not all(map(math.isfinite, numbers)):
        return {"mean": sum(numbers) / len(numbers), "low": None, "high": None, "n": len(numbers)}
    from lab.stats import mean_interval

    interval = mean_interval(numbers)
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else None
    return value


def cell_text(cell: Any) -> str:
    """`0.803 ± 0.030 (5)` for a mean over runs, `0.803 [0.773, 0.833]` for a run with limits of its own, `0.803` for a number alone."""
    if isinstance(cell, Mapping):
        if cell["low"] is None:
            return number_text(cell["mean"])
        if cell["n"] == 1:
            return f"{number_text(cell['mean'])} [{number_text(cell['low'])}, {number_text(cell['high'])}]"
        return f"{number_text(cell['mean'])} ± {number_text((cell['high'] - cell['low']) / 2)} ({cell['n']})"
    return number_text(cell)


def number_text(value: Any) -> str:
    """A number with three decimals, or three digits where it is tiny or huge, a dash if undefined; whole numbers and texts as they are."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value in ("nan", "inf", "-inf"):
        value = float(value)
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else str(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    return f"{value:.3f}"


def shown(rows: Iterable[Mapping[str, Any]]) -> "pd.DataFrame":
    """Rows of single measurements as a notebook shows them: text, <measure>_low and <measure>_high in the cell of their measure."""
    import pandas as pd

    cells = [_with_limits({name: _cell([value]) for name, value in row.items()}) for row in rows]
    return pd.DataFrame([{name.replace("_", " "): cell_text(cell) for name, cell in row.items()} for row in cells])


def columns(rows: list[Row]) -> list[str]:
    """Column names in order of appearance, those that are empty in every row left out."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return [name for name in names if any(row.get(name) not in ("", None) for row in rows)]


def split(rows: list[Row]) -> list[list[Row]]:
    """Rows in tables that fit together: one for each set of columns, in order of appearance; none for no rows."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault(tuple(sorted(row)), []).append(row)
    return list(tables.values())


def table_text(rows: list[Row]) -> str:
    """Rows as aligned text, one table below the other where columns differ."""
    return "\n\n".join(_aligned(table) for table in split(rows))


def _aligned(rows: list[Row]) -> str:
    names = columns(rows)
    lines = [names, *([cell_text(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(names))]
    numeric = [all(_right(row.get(name)) for row in rows) for name in names]
    placed = ["  ".join(_place(*cell) for cell in zip(line, widths, numeric, strict=True)).rstrip() for line in lines]
    return "\n".join([placed[0], "-" * max(map(len, placed)), *placed[1:]])


def _place(text: str, width: int, right: bool) -> str:
    return text.rjust(width) if right else text.ljust(width)


def table_html(rows: list[Row], caption: str = "") -> str:
    """Rows as an HTML table, escaped; one table below the other where columns differ."""
    return "".join(_html(table, caption) for table in split(rows))


def _html(rows: list[Row], caption: str) -> str:
    names = columns(rows)
    right = {name: ' class="n" style="text-align:right"' for name in names if all(_right(row.get(name)) for row in rows)}
    head = "".join(f'<th scope="col"{right.get(name, "")}>{html.escape(name.replace("_", " "))}</th>' for name in names)
    lines = ("".join(f"<td{right.get(name, '')}>{html.escape(cell_text(row.get(name)))}</td>" for name in names) for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    wide = " wide" if len(names) > 6 else ""
    return f'<div class="scroll{wide}" tabindex="0"><table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _right(value: Any) -> bool:
    return value is None or isinstance(value, Mapping | int | float) or value in ("nan", "inf", "-inf")
