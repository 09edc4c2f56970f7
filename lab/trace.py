"""The record of a run that every view reads: four tables, one file, no pickle.

`samples` has a row per generated text, `tokens` a row per token, `thoughts` a row per latent thought, `passes` a row per
forward pass of a token (depth 1 is the first pass; its `decider_prob` is the probability of going on to depth 2).
NaN is "not defined here". `top_texts` / `top_probs` are lists, best candidate first. `SCHEMA` names the columns every trace has;
any further column is kept: numbers become a float channel, strings a text, lists a list.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from lab.columns import COERCE, absent, coerced, guess, pack, unpack
from lab.errors import DataError

FORMAT, VERSION = "lab-trace", 1
KEYS = {
    "samples": ["question", "sample"],
    "tokens": ["question", "sample", "pos"],
    "thoughts": ["question", "sample", "step"],
    "passes": ["question", "sample", "pos", "depth"],
}
SCHEMA = {
    "samples": {"question": "key", "sample": "int", "prompt": "text", "text": "text", "answer": "text", "gold": "text", "steps": "texts"}
    | {"correct": "bool", "score": "float", "finish": "text", "parent": "int"},
    "tokens": {"question": "key", "sample": "int", "pos": "int", "id": "int", "text": "text", "role": "text"}
    | dict.fromkeys(["prob", "entropy", "ce", "iterations", "decider_prob", "gate", "score"], "float"),
    "thoughts": {"question": "key", "sample": "int", "step": "int", "norm": "float", "stop_prob": "float", "score": "float"}
    | {"top_texts": "texts", "top_probs": "floats"},
    "passes": {"question": "key", "sample": "int", "pos": "int", "depth": "int", "decider_prob": "float"}
    | {"top_texts": "texts", "top_probs": "floats"},
}
ROLES = ("prompt", "thought", "answer", "special")
PROBABILITIES = ("prob", "decider_prob", "stop_prob")

Table = pd.DataFrame | Iterable[Mapping[str, Any]]


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """Four checked tables and a small JSON `meta`; made by `Trace.build`, read by every view.

    `samples.steps` lists a question's gold intermediate results, `samples.parent` the sample it grew from (-1: none),
    `tokens.role` is one of `ROLES`. `tokens.iterations` counts the passes spent on reading that token.
    """

    method: str
    meta: dict[str, Any] = field(default_factory=dict)
    samples: pd.DataFrame = field(default_factory=pd.DataFrame)
    tokens: pd.DataFrame = field(default_factory=pd.DataFrame)
    thoughts: pd.DataFrame = field(default_factory=pd.DataFrame)
    passes: pd.DataFrame = field(default_factory=pd.DataFrame)

    def __post_init__(self) -> None:
        for name in SCHEMA:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        object.__setattr__(self, "meta", _json_meta(self.meta))
        _check_samples(self)

    @classmethod
    def build(
        cls,
        method: str,
        *,
        samples: Table = (),
        tokens: Table = (),
        thoughts: Table = (),
        passes: Table = (),
        meta: Mapping[str, Any] | None = None,
    ) -> Self:
        """A trace of tables given as DataFrames or as lists of dicts, one dict a row; missing columns are filled with "undefined".

        A (question, sample) that only the other tables mention gets an empty row in `samples`; `sample` is 0 where absent.
        Raises DataError naming table, column and row for a wrong type, a repeated key, an unknown role, or a probability outside [0, 1].
        """
        given = {"samples": samples, "tokens": tokens, "thoughts": thoughts, "passes": passes}
        frames = {name: _checked(name, _frame(table)) for name, table in given.items()}
        return cls(method, dict(meta or {}), **_with_all_samples(frames))

    @classmethod
    def concat(cls, traces: Sequence[Self]) -> Self:
        """One trace with the rows of all `traces` (same method, no (question, sample) twice) and the meta entries they agree on."""
        if not traces:
            raise DataError("No traces to join: give at least one.")
        methods = sorted({trace.method for trace in traces})
        if len(methods) > 1:
            raise DataError(f"Traces of different methods cannot be joined: {', '.join(methods)}. Show them side by side instead.")
        first, rest = traces[0].meta, [trace.meta for trace in traces[1:]]
        meta = {key: value for key, value in first.items() if all(key in other and other[key] == value for other in rest)}
        return cls(methods[0], meta, **{name: _joined([getattr(trace, name) for trace in traces]) for name in SCHEMA})

    def select(self, question: Any = None, sample: int | Sequence[int] | None = None) -> Self:
        """The part of the trace that belongs to these questions and samples (one value, several, or None for all); may be empty."""
        tables = {name: getattr(self, name) for name in SCHEMA}
        for column, wanted in (("question", question), ("sample", sample)):
            if wanted is not None:
                several = (
                    wanted if isinstance(wanted, Sequence | set | np.ndarray | pd.Series) and not isinstance(wanted, str) else [wanted]
                )
                tables = {name: table[_among(table[column], {str(value) for value in several})] for name, table in tables.items()}
        return self._with(**{name: table.reset_index(drop=True) for name, table in tables.items()})

    def _with(self, **tables: pd.DataFrame) -> Self:
        """A trace with fewer rows; what was checked as a whole need not be checked again."""
        part = object.__new__(type(self))
        for name, value in {"method": self.method, "meta": dict(self.meta), **tables}.items():
            object.__setattr__(part, name, value)
        return part

    def save(self, path: str | os.PathLike[str]) -> Path:
        """The path written: one compressed npz (zip of plain arrays), complete or not there at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                np.savez_compressed(file, **_pack_trace(self))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """The trace saved at `path`; never runs code from it. Raises DataError for a missing, damaged, foreign or newer file."""
        path = Path(path)
        if not path.is_file():
            raise DataError(f"No trace at {path}.")
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            header = json.loads(arrays["header"].tobytes())
            _check_header(path, header)
            tables = {name: _unpack_table(name, columns, arrays) for name, columns in header["tables"].items()}
            return cls(header["method"], header["meta"], **tables)
        except (OSError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path} is not a readable trace file ({type(error).__name__}: {error}). Make it again.") from None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Trace):
            return NotImplemented
        mine, theirs = _pack_trace(self), _pack_trace(other)
        return mine.keys() == theirs.keys() and all(
            np.array_equal(mine[key], theirs[key], equal_nan=mine[key].dtype.kind == "f") for key in mine
        )

    __hash__ = None

    def __repr__(self) -> str:
        return f"Trace({self.method}: " + ", ".join(f"{len(getattr(self, name))} {name}" for name in SCHEMA) + ")"


# -- tables: what goes in is made regular, or refused with its place -------------------------------------------------------


def _frame(table: Table) -> pd.DataFrame:
    return table if isinstance(table, pd.DataFrame) else pd.DataFrame(list(table), dtype=object)


def _checked(name: str, table: pd.DataFrame) -> pd.DataFrame:
    columns = {}
    for column, kind in SCHEMA[name].items():
        if column in table:
            columns[column] = coerced(f"{name}.{column}", table[column].tolist(), kind)
        else:
            columns[column] = absent(f"{name}.{column}", kind, len(table), needed=column in KEYS[name] and column != "sample")
    for column in table:
        if column not in columns:
            values = table[column].tolist()
            columns[str(column)] = coerced(f"{name}.{column}", values, guess(values))
    checked = pd.DataFrame(columns)
    _check_values(name, checked)
    return checked


def _check_values(name: str, table: pd.DataFrame) -> None:
    repeated = table.duplicated(KEYS[name])
    if repeated.any():
        key = {column: table[column][repeated.idxmax()] for column in KEYS[name]}
        raise DataError(f"{name}: two rows for " + ", ".join(f"{column} {value}" for column, value in key.items()) + ".")
    for column in table.columns.intersection(PROBABILITIES):
        bad = (table[column] < -1e-6) | (table[column] > 1 + 1e-6)
        if bad.any():
            raise DataError(f"{name}.{column}, row {bad.idxmax()}: {table[column][bad.idxmax()]} is not a probability.")
    if "role" in table:
        bad = ~table["role"].isin([*ROLES, ""])
        if bad.any():
            raise DataError(f"{name}.role, row {bad.idxmax()}: {table['role'][bad.idxmax()]!r} is none of {', '.join(ROLES)}.")
    if "top_texts" in table:
        bad = table["top_texts"].map(len) != table["top_probs"].map(len)
        if len(bad) and bad.any():
            raise DataError(f"{name}, row {bad.idxmax()}: top_texts and top_probs differ in length.")


def _check_samples(trace: Trace) -> None:
    known = _sample_keys(trace.samples)
    for name in ("tokens", "thoughts", "passes"):
        lost = sorted(_sample_keys(getattr(trace, name)) - known, key=str)
        if lost:
            raise DataError(f"{name}: question {lost[0][0]} sample {lost[0][1]} has no row in samples. Use Trace.build, which adds it.")


def _among(values: pd.Series, names: set[str]) -> np.ndarray:
    """Which rows' question or sample is among `names`, written as texts."""
    if values.dtype.kind == "i":
        return values.isin([int(name) for name in names if name.lstrip("-").isdecimal()]).to_numpy()
    return np.array([value in names for value in values.tolist()], bool)


def _sample_keys(table: pd.DataFrame) -> set[tuple[str, int]]:
    return {(str(question), sample) for question, sample in zip(table["question"].tolist(), table["sample"].tolist(), strict=True)}


def _with_all_samples(frames: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    seen, new = _sample_keys(frames["samples"]), []
    for name in ("tokens", "thoughts", "passes"):
        for question, sample in zip(frames[name]["question"].tolist(), frames[name]["sample"].tolist(), strict=True):
            if (str(question), sample) not in seen:
                seen.add((str(question), sample))
                new.append({"question": question, "sample": sample})
    return frames | {"samples": _joined([frames["samples"], _checked("samples", _frame(new))])}


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    filled = [table for table in tables if len(table)]
    return pd.concat(filled, ignore_index=True) if filled else tables[0]


def _json_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(meta), sort_keys=True))
    except (TypeError, ValueError) as error:
        raise DataError(f"A trace's meta holds plain JSON values only: {error}.") from None


# -- disk: every column becomes plain arrays of the smallest exact type ------------------------------------------------------


def _pack_trace(trace: Trace) -> dict[str, np.ndarray]:
    tables, arrays = {}, {}
    for name in SCHEMA:
        table = getattr(trace, name)
        tables[name] = {column: _kind(name, column, table[column]) for column in table}
        for column, kind in tables[name].items():
            arrays |= pack(f"{name}/{column}", kind, table[column].tolist())
    header = {"format": FORMAT, "version": VERSION, "method": trace.method, "meta": trace.meta, "tables": tables}
    return {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)} | arrays


def _kind(table: str, column: str, values: pd.Series) -> str:
    kind = SCHEMA[table].get(column, "")
    if kind == "key" or not kind:
        return {"i": "int", "f": "float", "b": "bool"}.get(values.dtype.kind) or guess(values.tolist() or [""])
    return kind


def _check_header(path: Path, header: Any) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DataError(f"{path} is not a trace file of this package.")
    if header["version"] > VERSION:
        raise DataError(f"{path} is trace version {header['version']}; this package reads up to {VERSION}. Update it.")


def _unpack_table(name: str, columns: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    if name not in SCHEMA:
        raise ValueError(f"unknown table {name!r}")
    data = {column: COERCE[kind](unpack(f"{name}/{column}", kind, arrays)) for column, kind in columns.items()}
    if len({len(values) for values in data.values()}) > 1:
        raise ValueError(f"columns of {name} differ in length")
    return pd.DataFrame(data)
