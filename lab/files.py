"""Files that survive a kill: whole or absent writes, line logs without torn lines, locks that die with their holder."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from lab.errors import BusyError, RunError

_REASONS = {
    errno.ENOSPC: "no space is left on the disk; free some, then continue with --resume",
    errno.EDQUOT: "the disk quota is used up; free some, then continue with --resume",
    errno.EROFS: "the file system is read-only; choose another folder (--run, or LAB_OUTPUTS)",
    errno.EACCES: "permission is denied; choose another folder (--run, or LAB_OUTPUTS) or change its owner",
    errno.EPERM: "permission is denied; choose another folder (--run, or LAB_OUTPUTS) or change its owner",
    errno.ENOTDIR: "a part of that path is a file, not a folder",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError while writing at `path` into a BusyError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, error.strerror or str(error))
        raise BusyError(f"Cannot write {path}: {reason}.") from error


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers of numpy and torch unwrapped, paths as text, sets in order, undefined floats as "nan", "inf"."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(plain, value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return str(value)


def make_folder(path: Path) -> Path:
    """`path`, created with its parents if absent; RunError where that is impossible."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def write_bytes(path: Path, content: bytes) -> Path:
    """Puts `content` at `path` whole or not at all."""
    make_folder(path.parent)
    with writing(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
    return path


def write_text(path: Path, text: str) -> Path:
    """Puts `text` at `path` whole or not at all."""
    return write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> Path:
    """Puts `value` (see `plain`) at `path` whole or not at all."""
    return write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def sketch_json(path: Path, value: Any) -> None:
    """Puts a passing state at `path`, for others to show: no flush to disk, and a full disk is left for the work itself to report."""
    with contextlib.suppress(OSError):
        draft = path.with_name(f"{path.name}.new")
        draft.write_text(json.dumps(plain(value)))
        draft.replace(path)


def read_json(path: Path) -> Any:
    """What `write_json` stored; RunError naming the file if it is damaged or cannot be read."""
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise RunError(f"Cannot read {path}: {error}; delete it or start a new run.") from None


def claim(path: Path, facts: dict[str, Any], what: str) -> None:
    """Writes down at `path` what its folder holds; RunError where it says already that the folder holds another (`what`: "samples")."""
    facts = plain(facts)
    if not path.exists():
        write_json(path, facts)
        return
    before = read_json(path)
    if changed := [name for name in facts if before.get(name) != facts[name]]:
        raise RunError(f"{path.parent} holds {what} with another {', '.join(changed)}; choose another folder.")


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds one JSON line; a line torn by an earlier kill is cut off first."""
    line = json.dumps(plain(record), ensure_ascii=False).encode() + b"\n"
    with writing(path), open(path, "ab+") as file:
        _cut_torn_line(file)
        file.write(line)


def _cut_torn_line(file: Any) -> None:
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(max(0, end - 1_000_000))
        start, tail = file.tell(), file.read()
        file.truncate(start + tail.rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON Lines log; none if it is absent, without a torn last line."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines if line.strip()]


def lock(path: Path, refusal: str) -> TextIO:
    """An exclusive lock that ends with this process (or when closed); RunError with `refusal` and the holder if it is taken."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - stays open as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise BusyError(f"{refusal} ({holder}).") from None
    with writing(path):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    return file


def digest(*parts: Any) -> str:
    """A short content hash of JSON-like values."""
    text = json.dumps(plain(parts), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_digest(path: Path, whole_below: int = 1 << 28) -> str:
    """A short content hash of a file or of a folder's files; a file over `whole_below` bytes counts by size, head and tail."""
    if path.is_dir():
        return digest([(str(item.relative_to(path)), file_digest(item)) for item in sorted(path.rglob("*")) if item.is_file()])
    size, sha = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as file:
        if size <= whole_below:
            for block in iter(lambda: file.read(1 << 20), b""):
                sha.update(block)
        else:
            sha.update(str(size).encode() + file.read(1 << 20))
            file.seek(-(1 << 20), os.SEEK_END)
            sha.update(file.read())
    return sha.hexdigest()[:16]
