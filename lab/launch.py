"""One training over one or several processes, started from a notebook or a script.

Processes are started by torch's elastic launcher (torchrun): where one dies the others are stopped, and the environment is what
accelerate and the Trainer read. On a CPU `accelerate launch` would silently run one process; here the number is checked.

Several machines: the notebook runs on the first, with LAB_NODES and LAB_ADDRESS (host:port of that machine) set; on each other one,
`python -m lab.launch --address host:port --nodes N --node-rank K --processes P` takes part in every training until it is interrupted.
What is to be done reaches them over the process group; only checkpoints need a folder that all machines see.
"""

import argparse
import atexit
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lab import errors, files
from lab.errors import DeviceError, LabError, OutOfMemory, SettingsError
from lab.running import kernels, memory

Value = TypeVar("Value")

_ASKED, _RESULT, _ERROR = "asked.pt", "result.pt", "error.json"
_ROW = "\x1erow "  # begins a line that is a row for the parent's `on_row`, not text to show
_TORCHRUN = "from lab.running.kernels import end_with_parent; end_with_parent(15); from torch.distributed.run import main; main()"
_KILLED = "Signal 9 (SIGKILL)"  # how torchrun tells of it


def world_size() -> int:
    """How many processes train together (1 outside a launch)."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0 for the one that writes files."""
    return dist.get_rank() if world_size() > 1 else 0


def check_world(asked: int, found: int | None = None) -> None:
    """DeviceError unless as many processes came as were asked for (or one, which is how every launch begins)."""
    found = world_size() if found is None else found
    if found != asked:
        raise DeviceError(f"{asked} processes were asked for, {found} came; start the training through lab (processes={asked}).")


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
    function: Callable[..., Any],
    processes: int = 1,
    *,
    nodes: int = 0,
    address: str = "",
    show: Callable[[str], Any] | None = None,
    on_row: Callable[[dict[str, Any]], Any] | None = None,
    **arguments: Any,
) -> Any:
    """What `function(**arguments)` returns on rank 0 of `nodes` × `processes` processes; here and now if that is one.

    Args:
        function: runs in every process, after the process group is made; anything dill can copy, as its arguments and its result.
        nodes, address: machines and host:port of this one, to which the others come (see the module); default LAB_NODES, LAB_ADDRESS.
        show: takes each line the processes write (default: standard output, which a notebook cell shows).
        on_row: gets what the processes give to `send_row`.

    Raises the function's own LabError; DeviceError if devices or processes are missing or one died (OutOfMemory if it was ended for want
    of memory). An interrupt stops all of them, as does the end of this process.
    """
    nodes, address = nodes or machines(), address or os.environ.get("LAB_ADDRESS", "")
    if processes * nodes == 1:
        return function(**arguments)
    check_devices(processes)
    with tempfile.TemporaryDirectory(prefix="lab-launch-") as folder:
        _save((processes * nodes, function, arguments), Path(folder) / _ASKED)
        lines = _Lines(show or _write, on_row)
        code = _stream([*_torchrun(processes, nodes, 0, address), folder], lines)
        return _outcome(Path(folder), lines.death(code) if code else None)


def send_row(row: dict[str, Any]) -> None:
    """Hands a (short) row from any process of a launch to its `on_row`."""
    _write(f"{_ROW}{json.dumps(files.plain(row))}\n")


def share(work: Callable[[list[Any]], Iterable[Any]], items: Sequence[Any], processes: int, done: Callable[[], Any], *models: Any) -> None:
    """Runs `work` on consecutive parts of `items` in at most `processes` processes of this machine; here if that is one.

    Args:
        work: gets its part and yields whenever something is finished and kept (in files), upon which `done()` is called here.
        models: used by `work`; where they are on a GPU, each process moves its copies to a device of its own.
    """
    count = min(processes, len(items))
    if count < 2:
        for _ in work(list(items)):
            done()
        return
    edges = [len(items) * i // count for i in range(count + 1)]
    parts = [list(items[first:last]) for first, last in pairwise(edges)]
    moved = [model for model in models if getattr(getattr(model, "device", None), "type", "cpu") == "cuda"]
    launch(_share, count, nodes=1, on_row=lambda row: done(), work=work, parts=parts, moved=moved)


def _share(work: Callable[[list[Any]], Iterable[Any]], parts: list[list[Any]], moved: list[Any]) -> None:
    """One process's part, on its own device."""
    for model in moved:
        model.to(torch.device("cuda", torch.cuda.current_device()))
    for _ in work(parts[rank()]):
        send_row({})


def join(address: str, nodes: int, node_rank: int, processes: int = 1) -> int:
    """Takes part, as machine `node_rank` of `nodes`, in one launch of the machine at `address`; its exit status."""
    if not 0 < node_rank < nodes:
        raise SettingsError(f"node_rank = {node_rank}: the machines beside the first are 1 to {nodes - 1}.")
    check_devices(processes)
    return _stream(_torchrun(processes, nodes, node_rank, address), _write)


def check_devices(processes: int) -> None:
    """DeviceError where there are GPUs, but fewer than `processes`."""
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise DeviceError(f"{processes} processes asked for, but this machine has {torch.cuda.device_count()} GPU(s).")


def machines() -> int:
    """How many machines every launch is over (LAB_NODES; default 1)."""
    text = os.environ.get("LAB_NODES", "1")
    if not text.isdigit() or int(text) < 1:
        raise SettingsError(f"LAB_NODES = {text!r} is not a number of machines.")
    return int(text)


def _torchrun(processes: int, nodes: int, node_rank: int, address: str) -> list[str]:
    command = [sys.executable, "-c", _TORCHRUN, f"--nproc-per-node={processes}"]
    if nodes == 1:
        return [*command, "--standalone", "-m", "lab.launch"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise SettingsError(f"{nodes} machines need the address host:port of the first (LAB_ADDRESS), not {address!r}.")
    place = [f"--nnodes={nodes}", f"--node-rank={node_rank}", f"--master-addr={host}", f"--master-port={port}"]
    return [*command, *place, "-m", "lab.launch"]


def _save(value: Any, path: Path) -> None:
    """Copies live objects for other processes of this launch; they are read back by `_read` within the same call."""
    import dill

    try:
        torch.save(value, path, pickle_module=dill)
    except (TypeError, AttributeError, dill.PicklingError) as error:
        raise SettingsError(f"Something cannot be handed to other processes: {error}.") from None


def _read(path: Path) -> Any:
    import dill

    # our own objects, written a moment ago into a folder that only this user can open
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=dill)


class _Lines:
    """Sorts what the processes write: text goes to `show`, rows to `on_row`; knows how one of them died."""

    def __init__(self, show: Callable[[str], Any], on_row: Callable[[dict[str, Any]], Any] | None) -> None:
        self.show, self.on_row = show, on_row
        self._killed, self._kills = False, memory.kills()

    def __call__(self, line: str) -> None:
        text, mark, row = line.partition(_ROW)  # another process may have written without ending its line
        if text:
            self._killed |= _KILLED in text
            self.show(text)
        if mark and self.on_row is not None:
            self.on_row(json.loads(row))

    def death(self, code: int) -> DeviceError:
        """Of a launch that ended with `code`, not 0."""
        how = f"was {memory.why_killed(self._kills)}" if self._killed else f"died (exit status {code}); its last lines say why"
        kind = OutOfMemory if self._killed and memory.kills() > self._kills else DeviceError
        return kind(f"A process of the launch {how}. The others were stopped.")


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


def _outcome(folder: Path, death: DeviceError | None) -> Any:
    if (folder / _ERROR).exists() and not isinstance(death, OutOfMemory):  # which leaves the others with errors of their own
        error = files.read_json(folder / _ERROR)
        raise getattr(errors, error["kind"], LabError)(error["message"])
    if death:
        raise death
    return _read(folder / _RESULT)


def _work(folder: Path | None) -> None:
    """One process of a launch; `folder` is where the machine that asked has put the work, None on the other machines."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stdout)
    logging.getLogger("lab").setLevel(logging.INFO if os.environ["RANK"] == "0" else logging.ERROR)
    try:
        _join()
        world, function, arguments = _asked(folder)
        check_world(world)
        result = function(**arguments)
        if rank() == 0:
            _save(result, folder / _RESULT)
        dist.barrier()
        dist.destroy_process_group()
    except LabError as error:
        kept = {"kind": type(error).__name__, "message": str(error)}
        if folder is not None:
            files.write_json(folder / _ERROR, kept)
        logging.getLogger("lab").error("%s", error)
        sys.exit(3)


def _asked(folder: Path | None) -> tuple[int, Callable[..., Any], dict[str, Any]]:
    """How many processes shall do what with which arguments, from this machine's folder or over the process group."""
    if int(os.environ["GROUP_WORLD_SIZE"]) == 1:
        return _read(folder / _ASKED)
    told = [(folder / _ASKED).read_bytes() if rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    with tempfile.NamedTemporaryFile(prefix="lab-launch-") as file:
        file.write(told[0])
        file.flush()
        return _read(Path(file.name))


def _join() -> None:
    """Makes the process group."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    patience = timedelta(days=1)  # for a validation or the slowest share of an evaluation; that a process died is known at once
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=patience)


def _leave() -> None:
    """Ends this process without taking Python down, which gloo's threads, still letting go of tensors, do not always survive."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _main() -> None:
    parser = argparse.ArgumentParser("python -m lab.launch", description="Take part in another machine's trainings, one by one.")
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)  # given by torchrun on the first machine
    parser.add_argument("--address", help="host:port of the first machine")
    for name, default, text in (("nodes", 2, "machines in all"), ("node-rank", 1, "number of this one"), ("processes", 1, "on this one")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    asked = parser.parse_args()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        kernels.end_with_parent(signal.SIGKILL)
        _work(asked.folder)
        _leave()
    if not asked.address:
        parser.error("--address is needed")
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            join(asked.address, asked.nodes, asked.node_rank, asked.processes)


if __name__ == "__main__":
    from lab.launch import _main as main  # the module under its own name, so that everyone sees one copy

    main()
