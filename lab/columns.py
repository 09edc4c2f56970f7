"""Columns of a trace: seven kinds of values, made regular or refused with their place, and packed as plain arrays."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from lab.errors import DataError


def guess(values: list[Any]) -> str:
    """The kind of a column that no schema names."""
    for value in values:
        if isinstance(value, str):
            return "text"
        if isinstance(value, list | tuple | np.ndarray) and len(value):
            return "texts" if isinstance(value[0], str) else "floats"
        if isinstance(value, bool | np.bool_):
            return "bool"
    return "floats" if any(isinstance(value, list | tuple | np.ndarray) for value in values) else "float"


def absent(place: str, kind: str, count: int, needed: bool) -> pd.Series:
    """A column of `count` undefined values; DataError where every row needs one."""
    if needed and count:
        raise DataError(f"{place} is missing: every row needs it.")
    values = [0] * count if place.endswith(".sample") else [None] * count
    return coerced(place, values, kind)


def coerced(place: str, values: list[Any], kind: str) -> pd.Series:
    """`values` as a column of this kind; DataError naming `place` and row for one that is none."""
    try:
        return COERCE[kind](values)
    except (TypeError, ValueError) as error:
        row = _first_bad(values, kind)
        raise DataError(f"{place}, row {row}: {values[row]!r} is not {_MEANING[kind]} ({error}).") from None


def _first_bad(values: list[Any], kind: str) -> int:
    for row, value in enumerate(values):
        try:
            COERCE[kind]([value])
        except (TypeError, ValueError):
            return row
    return 0


def _undefined(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and value != value)


def _key(values: list[Any]) -> pd.Series:
    if any(_undefined(value) or isinstance(value, list) for value in values):
        raise ValueError("a question is named by a number or a string")
    if all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values):
        return pd.Series(values, dtype=np.int64)
    names = _text(values)
    "".join(names).encode()  # a name that is no Unicode text (UnicodeEncodeError is a ValueError) could not be sorted or grouped
    return names


def _int(values: list[Any]) -> pd.Series:
    whole = [-1 if _undefined(value) else int(value) for value in values]
    if any(not _undefined(value) and value != number for value, number in zip(values, whole, strict=True)):
        raise ValueError("whole numbers only")
    return pd.Series(whole, dtype=np.int64)


def _float(values: list[Any]) -> pd.Series:
    if any(isinstance(value, str) for value in values):
        raise ValueError("text where a number belongs")
    return pd.Series([np.nan if _undefined(value) else float(value) for value in values], dtype=np.float64)


def _bool(values: list[Any]) -> pd.Series:
    return pd.Series([pd.NA if _undefined(value) else value for value in values], dtype="boolean")


def _text(values: list[Any]) -> pd.Series:
    return pd.Series(["" if _undefined(value) else str(value) for value in values], dtype=object)


def _lists(values: list[Any], convert: Any) -> pd.Series:
    if any(isinstance(value, str | bytes) for value in values):
        raise ValueError("a list belongs here")
    return pd.Series([[] if _undefined(value) else [convert(item) for item in value] for value in values], dtype=object)


COERCE = {"key": _key, "int": _int, "float": _float, "bool": _bool, "text": _text}
COERCE |= {"texts": lambda values: _lists(values, str), "floats": lambda values: _lists(values, float)}
_MEANING = {"key": "a question", "int": "a whole number", "float": "a number", "bool": "true or false", "text": "a text"}
_MEANING |= {"texts": "a list of texts", "floats": "a list of numbers"}


def pack(place: str, kind: str, values: list[Any]) -> dict[str, np.ndarray]:
    """A column as plain arrays of the smallest exact type, named `place` and `place`#…"""
    if kind in ("texts", "floats"):
        flat = [item for value in values for item in value]
        return {f"{place}#count": _small(map(len, values))} | pack(place, kind[:-1], flat)
    if kind == "text":
        index: dict[str, int] = {}
        codes = _small(index.setdefault(value, len(index)) for value in values)
        encoded = [text.encode("utf-8", "surrogatepass") for text in index]
        return {place: codes, f"{place}#length": _small(map(len, encoded)), f"{place}#bytes": np.frombuffer(b"".join(encoded), np.uint8)}
    if kind == "bool":
        return {place: np.array([-1 if value is pd.NA else int(value) for value in values], np.int8)}
    return {place: _small_float(values) if kind == "float" else _small(values)}


def _small(values: Iterable[int]) -> np.ndarray:
    whole = np.fromiter(values, np.int64)
    low, high = (int(whole.min()), int(whole.max())) if whole.size else (0, 0)
    return whole.astype(np.promote_types(np.min_scalar_type(min(low, -1)), np.min_scalar_type(max(high, 0))))


def _small_float(values: list[float]) -> np.ndarray:
    exact = np.array(values, np.float64)
    with np.errstate(over="ignore"):
        half = exact.astype(np.float32)
    return half if np.array_equal(half.astype(np.float64), exact, equal_nan=True) else exact


def unpack(place: str, kind: str, arrays: Mapping[str, np.ndarray]) -> list[Any]:
    """The values of a packed column; ValueError or KeyError where the arrays do not fit together."""
    if kind in ("texts", "floats"):
        return list(_split(unpack(place, kind[:-1], arrays), arrays[f"{place}#count"]))
    if kind == "text":
        texts = [
            bytes(part).decode("utf-8", "surrogatepass") for part in _split(arrays[f"{place}#bytes"].tobytes(), arrays[f"{place}#length"])
        ]
        return [texts[code] for code in arrays[place].tolist()]
    values = arrays[place].tolist()
    return [None if value < 0 else bool(value) for value in values] if kind == "bool" else values


def _split(flat: Sequence[Any], counts: np.ndarray) -> Iterator[Sequence[Any]]:
    ends = np.cumsum(counts.astype(np.int64))
    if (counts < 0).any() or (ends[-1] if ends.size else 0) != len(flat):
        raise ValueError("a list column does not add up")
    for end, count in zip(ends.tolist(), counts.tolist(), strict=True):
        yield flat[end - count : end]
