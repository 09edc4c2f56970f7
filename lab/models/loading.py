"""Strict reading of weights: every missing, unexpected or mis-shaped tensor is named, and no file can run code.

`read_state` opens `.safetensors`, torch files and sharded folders; `rename` applies a layout's alias rules; `load_exact` fills a module.
"""

import json
import pickle
import re
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lab.errors import CheckpointError

State = dict[str, Tensor]
Shapes = Mapping[str, Iterable[int]]
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


class Difference(NamedTuple):
    """What a state lacks, has too much, and has in another shape ((key, found, wanted) each)."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]


# ---- reading -------------------------------------------------------------------------------------------------------


def read_state(path: Path | str, *, bare: str = "weight") -> State:
    """The tensors of a weight file, of a sharded index, or of a folder with one of `WEIGHT_FILES`, on the CPU in their saved dtypes.

    A torch file may also hold {"state_dict": …}, or one bare tensor, which is returned under the name `bare`. What a wrapped model puts
    before all its names (`module.`) is left out.

    Raises:
        CheckpointError: no weights there, a damaged file, a file that needs code, or content other than named tensors.
    """
    return _unwrapped(_read_file(weight_file(Path(path)), bare))


def _unwrapped(names: dict[str, Any]) -> dict[str, Any]:
    """The entries without the prefix that DistributedDataParallel or torch.compile put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if names and all(name.startswith(prefix) for name in names):
            names = part(names, prefix)
    return names


def _read_file(path: Path, bare: str) -> State:
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    content = read_torch(path)
    if isinstance(content, Tensor):
        return {bare: content}
    content = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    if not tensors or len(tensors) < len(content):
        raise CheckpointError(f"{str(path)!r} does not hold a state dict (names and tensors, nothing else).")
    return tensors


def weight_file(path: Path) -> Path:
    """`path` itself if it is a file, else the weight file in that folder; CheckpointError if there is none."""
    if path.is_file():
        return path
    found = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"No weights in {str(path)!r}: expected one of {', '.join(WEIGHT_FILES)}.")
    return found


def read_torch(path: Path | str) -> Any:
    """The content of a torch file, read with `weights_only=True`: plain values, containers, dtypes and tensors, never code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {str(path)!r}.") from None
    except pickle.UnpicklingError as error:
        raise _unsafe(path, error) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, struct.error) as error:
        raise _damaged(path, error) from error


def tensor_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Names, as `read_state` gives them, and shapes in a weight file or folder; of safetensors only the headers are read."""
    path = weight_file(Path(path))
    if path.name.endswith(".safetensors.index.json"):
        shapes = {}
        for shard in _shards(path):
            shapes |= _header(path.parent / shard)
        return _unwrapped(shapes)
    if path.suffix == ".safetensors":
        return _unwrapped(_header(path))
    return {key: tuple(value.shape) for key, value in read_state(path).items()}


def read_json(path: Path | str) -> Any:
    """The parsed JSON file; CheckpointError naming the file and line if it is absent or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {str(path)!r}.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON: {error.msg} in line {error.lineno}.") from error
    except (UnicodeDecodeError, OSError) as error:
        raise _damaged(path, error) from error


# ---- names ---------------------------------------------------------------------------------------------------------


def rename(state: State, rules: Mapping[str, str | None], *, what: str = "the checkpoint") -> State:
    """`state` under new names: the first rule (regular expression → replacement, None = leave out) that matches a key's start applies.

    Two keys may become one only if their tensors are equal (aliases of a tied weight); CheckpointError otherwise.
    """
    result: State = {}
    for key, value in state.items():
        name = _renamed(key, rules)
        if name is None:
            continue
        if name in result and not same_tensor(result[name], value):
            raise CheckpointError(f"{what} holds two different tensors for {name!r} (the second is {key!r}).")
        result[name] = value
    return result


def part(state: State, prefix: str) -> State:
    """The entries whose name starts with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def same_tensor(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and values (NaN equals NaN)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first, second) or bool(torch.allclose(first, second, rtol=0, atol=0, equal_nan=True))


# ---- loading -------------------------------------------------------------------------------------------------------


def missing_unexpected(wanted: Shapes, state: State) -> Difference:
    """How `state` differs from the `wanted` names and shapes."""
    wanted = {key: tuple(shape) for key, shape in wanted.items()}
    both = sorted(wanted.keys() & state.keys())
    misshaped = [(key, tuple(state[key].shape), wanted[key]) for key in both if tuple(state[key].shape) != wanted[key]]
    return Difference(sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys()), misshaped)


def check_state(
    wanted: Shapes, state: State, *, what: str, allow_missing: Collection[str] = (), allow_unexpected: Collection[str] = ()
) -> Difference:
    """The difference of `state` from the `wanted` shapes, all of it allowed; CheckpointError naming what is not.

    Args:
        what: how to call the weights in the message.
        allow_missing, allow_unexpected: names, or patterns with `*`, that may be absent or left over.
    """
    found = missing_unexpected(wanted, state)
    missing, unexpected = _outside(found.missing, allow_missing), _outside(found.unexpected, allow_unexpected)
    check_complete(what, missing, unexpected, found.misshaped)
    return found


def load_exact(
    module: nn.Module,
    state: State,
    *,
    what: str = "",
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
) -> list[str]:
    """Fill `module` from `state`, converting dtypes, and return the allowed names that were missing (they keep their values).

    A tied weight may stand under any of its names, under all of them only if equal. Raises CheckpointError, with nothing changed,
    for anything missing, unexpected or mis-shaped that is not allowed (see `check_state`).
    """
    what = what or type(module).__name__
    state, own = dict(state), module.state_dict(keep_vars=True)
    for names in _tied(own):
        _share_alias(names, state, what)
    found = check_state(
        {key: value.shape for key, value in own.items()}, state, what=what, allow_missing=allow_missing, allow_unexpected=allow_unexpected
    )
    with torch.no_grad():
        for key, target in own.items():
            if key in state:
                target.copy_(state[key])
    return found.missing


def check_complete(what: str, missing: Collection[str], unexpected: Collection[str], misshaped: Iterable[tuple]) -> None:
    """Raise CheckpointError unless all three are empty; `misshaped` holds (key, shape found, shape wanted)."""
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({_some(missing)})")
    if unexpected:
        problems.append(f"{len(unexpected)} unexpected ({_some(unexpected)})")
    if misshaped := [f"{key}: found {tuple(found)}, wanted {tuple(wanted)}" for key, found, wanted in misshaped]:
        problems.append(f"{len(misshaped)} of another shape ({_some(misshaped)})")
    if problems:
        hint = "Check that it is the file meant, whole, and for this model and these settings."
        raise CheckpointError(f"The weights of {what!r} do not fit: {'; '.join(problems)}. {hint}")


def _outside(names: list[str], allowed: Collection[str]) -> list[str]:
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in allowed)]


def _tied(own: Mapping[str, Tensor]) -> list[list[str]]:
    groups: dict[tuple, list[str]] = {}
    for key, value in own.items():
        groups.setdefault((id(value), value.data_ptr(), tuple(value.shape)), []).append(key)
    return [names for names in groups.values() if len(names) > 1]


def _share_alias(names: list[str], state: State, what: str) -> None:
    given = [name for name in names if name in state]
    if any(not same_tensor(state[given[0]], state[name]) for name in given[1:]):
        raise CheckpointError(f"The weights of {what!r} hold different tensors for {', '.join(given)}, which this model ties together.")
    for name in names if given else ():
        state[name] = state[given[0]]


def _renamed(key: str, rules: Mapping[str, str | None]) -> str | None:
    for pattern, replacement in rules.items():
        if match := re.match(pattern, key):
            return None if replacement is None else match.expand(replacement) + key[match.end() :]
    return key


def _some(names: Collection[str], count: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")


# ---- files ---------------------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> State:
    from safetensors.torch import load_file

    return _opened(path, lambda: load_file(path))


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    def shapes() -> dict[str, tuple[int, ...]]:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a dict

    return _opened(path, shapes)


def _opened(path: Path, read: Callable[[], Any]) -> Any:
    from safetensors import SafetensorError

    try:
        return read()
    except FileNotFoundError:
        raise CheckpointError(f"There is no file {str(path)!r}.") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_shards(index: Path) -> State:
    state: State = {}
    for shard, keys in _shards(index).items():
        found = _read_file(index.parent / shard, "weight")
        check_complete(shard, set(keys) - set(found), set(found) - set(keys), ())
        state |= found
    return state


def _shards(index: Path) -> dict[str, list[str]]:
    """Shard file → keys, as the index says; a shard outside the folder is refused."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{str(index)!r} is not an index of shards: it has no weight_map of file names.")
    shards: dict[str, list[str]] = {}
    for key, name in weight_map.items():
        if Path(name).name != name:
            raise CheckpointError(f"{str(index)!r} points outside its folder ({name!r}).")
        shards.setdefault(name, []).append(key)
    return shards


def _unsafe(path: Path | str, error: Exception) -> CheckpointError:
    wanted = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
    other = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
    reason = f"reading it would run code ({wanted[1]})" if wanted else f"it is no plain torch file ({other[1] if other else 'unknown'})"
    return CheckpointError(
        f"{str(path)!r} was not opened: {reason}. Save its state dict alone, or better as safetensors, with the program that wrote it."
    )


def _damaged(path: Path | str, error: Exception) -> CheckpointError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return CheckpointError(f"Cannot read {str(path)!r}, it may be truncated or of another format: {reason[:200]}. Fetch it again.")
