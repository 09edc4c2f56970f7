"""One question with its reference reasoning and answer, a named list of them, and their JSON Lines form."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, overload

from lab import files
from lab.errors import DataError


@dataclass(frozen=True, slots=True)
class Example:
    """A question, its reference steps (may be empty) and its gold answer (never empty); `options` in the order A, B, C, …"""

    id: str
    question: str
    steps: tuple[str, ...] = ()
    answer: str = ""
    options: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def record(self) -> dict[str, Any]:
        """The example as one flat JSON object: extras beside the five fields, `options` only where there are any."""
        fields = asdict(self)
        fields |= fields.pop("extra")
        return fields if self.options else {name: value for name, value in fields.items() if name != "options"}


@dataclass(frozen=True)
class Dataset(Sequence[Example]):
    """Examples of one benchmark split; `notes` are sentences that every table made from it must show."""

    name: str
    split: str
    examples: tuple[Example, ...]
    source: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Example | Self:
        return self.but(self.examples[index]) if isinstance(index, slice) else self.examples[index]

    def but(self, examples: Iterable[Example], *notes: str) -> Self:
        """The same data set with other `examples` and with `notes` added."""
        return type(self)(self.name, self.split, tuple(examples), self.source, self.notes + notes)

    def shuffled(self, seed: int) -> Self:
        """A permutation that depends on `seed` and on the number of examples only (numpy's PCG64, as `datasets.shuffle`)."""
        import numpy as np

        order = np.random.default_rng(seed).permutation(len(self))
        return self.but(self.examples[i] for i in order)

    def picked(self, ids: Iterable[str]) -> Self:
        """The examples with these ids, in the order of `ids`; DataError names the first that is absent."""
        by_id = {example.id: example for example in self.examples}
        wanted = list(ids)
        for name in wanted:
            if name not in by_id:
                raise DataError(f"{self.name}/{self.split} has no example {name!r}; its ids look like {next(iter(by_id), '')!r}.")
        return self.but(by_id[name] for name in wanted)

    @property
    def fingerprint(self) -> str:
        """sha256 over the examples in order (not over name, source or notes)."""
        return fingerprint(self.examples)


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 hex digest of `examples` in order; independent of how they were stored."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(example.record(), sort_keys=True, ensure_ascii=False, default=str).encode() + b"\n")
    return digest.hexdigest()


def read_records(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) for each line of a .jsonl or .jsonl.gz file; `place` is "file, line n" for later messages.

    Lines end at "\\n" only (U+2028 and U+0085 occur inside strings); blank lines are passed over. DataError for a file that is
    absent, cut off, empty or not UTF-8, and for a line that is no JSON object.
    """
    path = Path(path)
    number = 0
    for number, line in _numbered_lines(path):
        place = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(f"{place} is not UTF-8: {error.reason}.") from None
        except ValueError as error:
            raise DataError(f"{place} is not JSON: {error}.") from None
        if not isinstance(record, dict):
            raise DataError(f"{place} is a JSON {type(record).__name__}, not an object.")
        yield place, record
    if not number:
        raise DataError(f"{path} is empty: one JSON object a line is needed.")


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"There is no file {path}.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is cut off or not a gzip file ({error}); fetch it again.") from None
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from None


def write_jsonl(path: Path | str, examples: Iterable[Example]) -> Path:
    """Writes one object a line, whole or not at all; a name ending in .gz is compressed, with the same bytes for the same data."""
    text = "".join(json.dumps(example.record(), ensure_ascii=False) + "\n" for example in examples)
    content = text.encode()
    return files.write_bytes(Path(path), gzip.compress(content, mtime=0) if str(path).endswith(".gz") else content)
