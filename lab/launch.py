"""One training over one or several processes, started from a notebook or a script.

Processes are started by torch's elastic launcher (torchrun): where one dies the others are stopped, and the environment is what
accelerate and the Trainer read. On a CPU `accelerate launch` would silently run one process; here the number is checked.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from lab import errors, files
from lab.errors import DeviceError, LabError, SettingsError

Value = TypeVar("Value")

_ASKED, _RESULT, _ERROR = "asked.json", "result.json", "error.json"


def world_size() -> int:
    """How many processes train together (1 outside a launch)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 for the one that writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def on_main(call: Callable[[], Value]) -> Value:
    """What `call()` returns or raises on rank 0, on every rank; others wait for it."""
    if world_size() == 1:
        return call()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = call()
        except (LabError, OSError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def launch(
    function: Callable[..., Any] | str,
    processes: int = 1,
    *,
    nodes: int = 1,
    node_rank: int = 0,
    address: str = "",
    show: Callable[[str], Any] | None = None,
    **arguments: Any,
) -> Any:
    """What `function(**arguments)` returns on rank 0 of `nodes` × `processes` processes; here and now if that is one.

    Args:
        function: importable, or its `module:name`; it runs in every process, after the process group is made.
        nodes, node_rank, address: for several machines, each of which makes this call; address is host:port of node 0.
        show: takes each line the processes write (default: standard output, which a notebook cell shows).
        arguments: as JSON holds them; so is the result.

    Raises the function's own LabError; DeviceError if devices or processes are missing or one died. An interrupt stops all of them.
    """
    if processes * nodes == 1:
        return (function if callable(function) else _function(function))(**arguments)
    _check_devices(processes)
    if nodes > 1 and not address:
        raise SettingsError(f"{nodes} nodes need the address (host:port) of node 0.")
    asked = {"function": _name(function), "arguments": _as_json(arguments), "processes": processes * nodes}
    with tempfile.TemporaryDirectory(prefix="lab-launch-") as folder:
        files.write_json(Path(folder) / _ASKED, asked)
        place = ["--standalone"] if nodes == 1 else [f"--nnodes={nodes}", f"--node-rank={node_rank}", *_master(address)]
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", *place, "-m", "lab.launch", folder]
        code = _stream(command, show or _write)
        return _outcome(Path(folder), code, node_rank)


def _check_devices(processes: int) -> None:
    import torch

    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise DeviceError(f"{processes} processes asked for, but this machine has {torch.cuda.device_count()} GPU(s).")


def _master(address: str) -> list[str]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise SettingsError(f"address = {address!r} is not host:port.")
    return [f"--master-addr={host}", f"--master-port={port}"]


def _name(function: Callable[..., Any] | str) -> str:
    name = function if isinstance(function, str) else f"{function.__module__}:{function.__qualname__}"
    if name.startswith("__main__") or "<" in name:
        raise SettingsError(f"{name} cannot be found by other processes; put the function into a module and import it.")
    return name


def _function(name: str) -> Callable[..., Any]:
    module, _, path = name.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _as_json(arguments: dict[str, Any]) -> dict[str, Any]:
    for name, value in arguments.items():
        try:
            same = json.loads(json.dumps(value)) == value
        except TypeError:
            same = False
        if not same:
            raise SettingsError(f"The argument {name} = {value!r} cannot be handed to other processes; give numbers, text, lists, dicts.")
    return arguments


def _stream(command: list[str], show: Callable[[str], Any]) -> int:
    """The exit status of `command`, whose lines go to `show`; its whole process group ends with this call."""
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
    )
    try:
        for line in process.stdout:
            show(line)
        return process.wait()
    finally:
        stop_group(process)


def stop_group(process: subprocess.Popen, patience: float = 10.0) -> None:
    """Ends a process started with a session of its own and everything it started: asked first, then forced."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(patience)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _write(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


def _outcome(folder: Path, code: int, node_rank: int) -> Any:
    if (folder / _ERROR).exists():
        error = files.read_json(folder / _ERROR)
        raise getattr(errors, error["kind"], LabError)(error["message"])
    if code:
        raise DeviceError(f"A process of the launch died (exit status {code}) and the others were stopped; its last lines say why.")
    return files.read_json(folder / _RESULT) if node_rank == 0 else None


def _work(folder: Path) -> None:
    """One process of a launch."""
    asked = files.read_json(folder / _ASKED)
    try:
        _join(asked["processes"])
        result = _function(asked["function"])(**asked["arguments"])
        if rank() == 0:
            files.write_json(folder / _RESULT, result)
        dist.barrier()
        dist.destroy_process_group()
    except LabError as error:
        files.write_json(folder / _ERROR, {"kind": type(error).__name__, "message": str(error)})
        sys.exit(3)


def _join(processes: int) -> None:
    """Makes the process group, and checks that it is as large as asked."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_world_size() != processes:
        raise DeviceError(f"{processes} processes were asked for, {dist.get_world_size()} came.")


if __name__ == "__main__":
    from lab.launch import _work as work  # the module under its own name, so that everyone sees one copy

    work(Path(sys.argv[1]))
