"""Where a pool's runs are executed: processes of this machine, Slurm jobs, Ray tasks. An engine has slots and can make one attempt."""

import contextlib
import itertools
import math
import os
import queue
import signal
import socket
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import yaml

from lab.errors import DeviceError, SettingsError, unknown
from lab.running import kernels, memory

STOPPED = "stopped, to be taken up"
_GLANCE = 10  # seconds between two looks at what a run holds that was given no limit
_OF_THE_WORKER = ("CUDA_VISIBLE_DEVICES", "SLURM_", "RAY_")  # variables that a scheduler sets for a run


@dataclass(frozen=True)
class Needs:
    """What every run asks for: GPUs, cores (0: the engine's own share), memory in GiB (0: not asked), minutes (None: without end).

    One that takes more memory or time is stopped and has failed.
    """

    gpus: int = 0
    cpus: int = 0
    memory: float = 0.0
    minutes: float | None = None


class Engine(Protocol):
    """Used as a context manager around a pool's work; `attempt` is called from `slots` threads.

    Every engine raises, when it is made, SettingsError for an option it does not know and DeviceError for what it cannot give.
    """

    slots: int

    def __enter__(self) -> "Engine": ...
    def __exit__(self, *_: object) -> None: ...
    def attempt(self, command: list[str]) -> str:
        """Runs `command` to its end, or to the end of its time; returns "" or, in a sentence, what went wrong."""
        ...

    def stop(self) -> None:
        """Ends the attempts under way, each so that it can be taken up, and lets no other start."""
        ...


class Local:
    """A process for each run: `jobs` at a time with their share of the cores, or as many as `devices` (CUDA numbers; all) are for."""

    def __init__(self, jobs: int = 1, devices: list[str] | None = None, needs: Needs = Needs()) -> None:
        devices = _cuda_devices(devices or [], needs.gpus)
        each = max(1, needs.gpus)
        groups = [",".join(devices[i : i + each]) for i in range(0, len(devices) - each + 1, each)]
        self.slots, self.needs = len(groups) or jobs, needs
        _check_memory(self.slots * needs.memory)
        self._free: queue.Queue[str] = queue.Queue()
        for group in groups or [""] * jobs:
            self._free.put(group)
        self._threads = str(needs.cpus or max(1, (os.cpu_count() or 1) // self.slots))
        self._commands = Commands()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Local":
        self._stack.enter_context(kernels.server())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def attempt(self, command: list[str]) -> str:
        devices = self._free.get()
        try:
            chosen = {"CUDA_VISIBLE_DEVICES": devices} if devices else {}
            mine = {kernels.PARENT: str(os.getpid())}
            return self._commands.run(command, {"OMP_NUM_THREADS": self._threads, **os.environ, **chosen, **mine}, self.needs)
        finally:
            self._free.put(devices)

    def stop(self) -> None:
        self._commands.stop()


class Slurm:
    """A job for each run, through submitit; cluster="local" makes processes of them, to try it without Slurm.

    folder: for submitit's scripts and logs, on a disk that the nodes share. options: further ones as submitit names them
    (slurm_partition, slurm_constraint, …). A job that asks for what no node has is found by `sbatch --test-only`.
    """

    def __init__(self, folder: Path, jobs: int, needs: Needs = Needs(), options: dict[str, Any] | None = None, cluster: str = "slurm"):
        try:
            import submitit
        except ImportError:
            raise SettingsError("The Slurm engine needs submitit: pip install -e '.[slurm]'") from None
        self.slots, self.needs, self._jobs = jobs, needs, []
        self._stopped, self._lock = False, threading.Lock()
        asked = {"gpus_per_node": needs.gpus, "cpus_per_task": needs.cpus, "mem_gb": needs.memory}
        minutes = {"timeout_min": math.ceil(needs.minutes) + 1} if needs.minutes else {}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**{name: n for name, n in asked.items() if n}, **minutes, **(options or {}))
        except RuntimeError as error:
            raise DeviceError(f"No {cluster} cluster can be reached from here: {error}.") from None
        except (NameError, AssertionError) as error:
            raise SettingsError(f"--option: {str(error).splitlines()[0]}") from None
        if cluster == "slurm":
            self._check()

    def _check(self) -> None:
        script = self._executor._executor._make_submission_file_text("true", "check")  # what submitit would submit
        with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
            file.write(script)
            file.flush()
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
        if done.returncode:
            raise DeviceError(f"Slurm would not take the runs: {done.stderr.strip().splitlines()[-1]}")

    def __enter__(self) -> "Slurm":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def attempt(self, command: list[str]) -> str:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        with self._lock:
            if self._stopped:
                return STOPPED
            try:
                job = self._executor.submit(on_worker, command, _environment(self.needs), os.getcwd(), self.needs)
            except FailedJobError as error:
                return f"not submitted: {str(error).strip().splitlines()[-1]}"
            self._jobs.append(job)
        try:
            return job.result()
        except (FailedJobError, UncompletedJobError) as error:
            return f"job {job.job_id}: {str(error).splitlines()[0]} (log: {job.paths.stderr})"

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for job in self._jobs:
                if not job.done():
                    job.cancel()


class Ray:
    """A task for each run on a Ray cluster: the one this process is connected to, else that at `address`.

    address: as ray.init takes it ("auto": the one this machine belongs to; "local": a new one here). options: further ones as a Ray
    task takes them (resources, scheduling_strategy, …).
    """

    def __init__(self, jobs: int, needs: Needs = Needs(), address: str = "auto", options: dict[str, Any] | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise SettingsError("The Ray engine needs ray: pip install -e '.[ray]'") from None
        self.slots, self.needs, self._ray = jobs, needs, ray
        self._running, self._stopped, self._lock = set[Any](), False, threading.Lock()
        asked = {"num_gpus": needs.gpus, "num_cpus": needs.cpus or 1, "memory": int(needs.memory * 2**30)}
        try:
            self._task = ray.remote(on_worker).options(max_retries=0, **{name: n for name, n in asked.items() if n}, **(options or {}))
        except (ValueError, TypeError) as error:
            raise SettingsError(f"--option: {str(error).splitlines()[0]}") from None
        self._mine = not ray.is_initialized()
        if self._mine:
            self._connect(address)
        try:
            self._check({"GPU": needs.gpus, "CPU": needs.cpus or 1, "memory": asked["memory"], **(options or {}).get("resources", {})})
        except DeviceError:
            self.__exit__()
            raise

    def _connect(self, address: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports to nobody
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            if port.isdigit():  # Ray itself would try for minutes
                socket.create_connection((host, int(port)), 5).close()
            self._ray.init(address, log_to_driver=False, logging_level="ERROR")
        except (OSError, ValueError, RuntimeError) as error:
            raise DeviceError(f"No Ray cluster at {address!r} (ray start --head makes one): {str(error).splitlines()[0]}") from None

    def _check(self, wanted: dict[str, float]) -> None:
        """Ray itself would wait for ever for a node that has all of `wanted`."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        if not any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in nodes):
            asked = ", ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
            most = ", ".join(f"{max((node.get(name, 0) for node in nodes), default=0):g} {name}" for name in wanted if wanted[name])
            raise DeviceError(f"A run asks for {asked}; no node of the Ray cluster has that (the most there is: {most}).")

    def __enter__(self) -> "Ray":
        return self

    def __exit__(self, *_: object) -> None:
        if self._mine:
            self._ray.shutdown()

    def attempt(self, command: list[str]) -> str:
        with self._lock:
            if self._stopped:
                return STOPPED
            task = self._task.remote(command, _environment(self.needs), os.getcwd(), self.needs)
            self._running.add(task)
        try:
            return self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            return STOPPED if self._stopped else f"Ray task: {str(error).strip().splitlines()[0]}"
        finally:
            with self._lock:
                self._running.discard(task)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for task in self._running:
                self._ray.cancel(task)


ENGINES = ("local", "slurm", "ray")


def engine(
    name: str,
    folder: Path,
    jobs: int = 1,
    devices: list[str] | None = None,
    needs: Needs = Needs(),
    address: str = "auto",
    options: dict[str, str] | None = None,
) -> Engine:
    """The engine of that name; SettingsError for an unknown one, or for an option it has no use for. folder: see Slurm.

    options: texts, read as YAML.
    """
    if name not in ENGINES:
        raise unknown("engine", name, ENGINES)
    asked = {option: _value(option, text) for option, text in (options or {}).items()}
    if devices and name != "local":
        raise SettingsError(f"--devices are of this machine; on {name} runs ask for --gpus.")
    if name == "local":
        if asked:
            raise SettingsError(f"--option {next(iter(asked))}: the local engine takes none.")
        return Local(jobs, devices, needs)
    return Slurm(folder, jobs, needs, asked) if name == "slurm" else Ray(jobs, needs, address, asked)


def _value(option: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"--option {option}={text}: not a YAML value.") from None


class Commands:
    """Commands under way on this machine, which can be told to stop."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen] = set()
        self._stopped, self._lock = False, threading.Lock()

    def run(self, command: list[str], environment: dict[str, str], needs: Needs = Needs(), cwd: str | None = None) -> str:
        """Runs `command` with the memory and time it `needs` and no more; returns "" or what it said was wrong.

        Told to stop, it ends as with Ctrl-C.
        """
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with self._lock:
            if self._stopped:
                return STOPPED
            process = subprocess.Popen(command, env=environment, cwd=cwd, **pipes)
            self._running.add(process)
        kills = memory.kills()
        try:
            heard = _listen(process, needs)
        finally:
            _end(process)
            with self._lock:
                self._running.discard(process)
        if heard.excess or process.returncode == 0:
            return heard.excess
        if self._stopped:
            return STOPPED
        if process.returncode == -signal.SIGKILL:
            return memory.why_killed(kills, heard.gib)
        return _complaint(heard.said, process.returncode)

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


@dataclass
class _Heard:
    """Of a process: what it wrote to standard error, what it took too much of, the GiB it held when last looked at."""

    said: str = ""
    excess: str = ""
    gib: float = 0.0


def _listen(process: subprocess.Popen, needs: Needs) -> _Heard:
    """Returns when `process` has ended or takes more than it `needs`.

    It wakes every second, also because Ray cannot interrupt one who waits.
    """
    heard, end = _Heard(), time.monotonic() + (60 * needs.minutes if needs.minutes else math.inf)
    for second in itertools.count(1):
        with contextlib.suppress(subprocess.TimeoutExpired):
            heard.said = process.communicate(timeout=min(1.0, max(0.0, end - time.monotonic())))[1]
            break
        if needs.memory or second % _GLANCE == 0:
            heard.gib = memory.held_gib(process.pid)
        if time.monotonic() >= end:
            heard.excess = f"stopped after {60 * (needs.minutes or 0):g} s"
        elif heard.gib > (needs.memory or math.inf):
            heard.excess = f"took more than the {needs.memory:g} GiB it was given and was stopped"
        if heard.excess:
            break
    return heard


def _end(process: subprocess.Popen, seconds: float = 20.0) -> None:
    """Ends `process` if it still runs: as Ctrl-C does, then by force."""
    try:
        process.terminate()
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _complaint(said: str, status: int) -> str:
    lines = said.strip().splitlines()
    ours = [line.removeprefix("lab: ") for line in lines if line.startswith("lab: ")]
    return (ours or lines[-1:] or [f"ended by signal {-status}" if status < 0 else f"exit status {status}"])[-1]


def on_worker(command: list[str], environment: dict[str, str], cwd: str, needs: Needs) -> str:
    """`Commands.run` on another machine: the submitter's environment, with the devices this worker was given."""
    given = {name: value for name, value in os.environ.items() if name.startswith(_OF_THE_WORKER)}
    return Commands().run(command, {**environment, **given, kernels.PARENT: str(os.getpid())}, needs, cwd)


def _environment(needs: Needs) -> dict[str, str]:
    """What a run elsewhere is given of this process's variables."""
    left_out = (*_OF_THE_WORKER, kernels.SOCKET, kernels.PARENT)
    threads = {"OMP_NUM_THREADS": str(needs.cpus)} if needs.cpus else {}
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)} | threads


def _cuda_devices(devices: list[str], gpus: int) -> list[str]:
    """`devices`, or all where runs ask for GPUs and none is named."""
    if not devices and not gpus:
        return []
    import torch

    there = [str(index) for index in range(torch.cuda.device_count())]
    if missing := [device for device in devices if device not in there]:
        raise DeviceError(f"CUDA device {missing[0]} was asked for; this machine has {', '.join(there) or 'none'}.")
    if gpus > len(devices or there):
        raise DeviceError(f"A run asks for {gpus} GPUs; there are {len(devices or there)}.")
    return devices or there


def _check_memory(gib: float) -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if gib > there:
        raise DeviceError(f"The runs at a time ask for {gib:g} GiB of memory; this machine has {there:.0f}.")
