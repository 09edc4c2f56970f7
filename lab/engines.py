"""Where a pool's runs are executed: processes of this machine, or jobs of a cluster. An engine has slots and can make one attempt."""

import contextlib
import os
import queue
import subprocess
from pathlib import Path
from typing import Any, Protocol

from lab import kernels
from lab.errors import DeviceError, SettingsError


class Engine(Protocol):
    """Used as a context manager around a pool's work; `attempt` is called from `slots` threads."""

    slots: int

    def __enter__(self) -> "Engine": ...
    def __exit__(self, *_: object) -> None: ...
    def attempt(self, command: list[str], timeout_s: float | None) -> str:
        """Runs `command`, for `timeout_s` at most; returns "" or, in a sentence, what went wrong."""
        ...


class Local:
    """A process for each run: `jobs` at a time with their share of the cores, or one on each CUDA device of `devices`.

    Raises DeviceError for a device this machine does not have.
    """

    def __init__(self, jobs: int = 1, devices: list[str] | None = None) -> None:
        _check_devices(devices or [])
        self.slots = len(devices) if devices else jobs
        self._free: queue.Queue[str] = queue.Queue()
        for device in devices or [""] * jobs:
            self._free.put(device)
        self._threads = str(max(1, (os.cpu_count() or 1) // self.slots))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Local":
        self._stack.enter_context(kernels.server())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def attempt(self, command: list[str], timeout_s: float | None) -> str:
        device = self._free.get()
        try:
            chosen = {"CUDA_VISIBLE_DEVICES": device} if device else {}
            return run_command(command, {"OMP_NUM_THREADS": self._threads, **os.environ, **chosen}, timeout_s)
        finally:
            self._free.put(device)


class Cluster:
    """A job for each run, submitted through submitit: to Slurm, or (cluster="local") to processes, to try it without one.

    folder: for submitit's scripts and logs, on a disk that the nodes share. options: what a run asks for, as submitit names it
    (gpus_per_node, cpus_per_task, mem_gb, timeout_min, slurm_partition, …). Raises SettingsError for an option submitit does not
    know, DeviceError where there is no such cluster.
    """

    def __init__(self, folder: Path, jobs: int, options: dict[str, Any], cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError:
            raise SettingsError("The cluster engine needs submitit: pip install -e '.[slurm]'") from None
        self.slots = jobs
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**options)
        except RuntimeError as error:
            raise DeviceError(f"No {cluster} cluster can be reached from here: {error}.") from None
        except (NameError, AssertionError) as error:
            raise SettingsError(f"--option: {str(error).splitlines()[0]}") from None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def attempt(self, command: list[str], timeout_s: float | None) -> str:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        environment = {name: value for name, value in os.environ.items() if name != kernels.SOCKET}
        job = self._executor.submit(run_command, command, environment, timeout_s)
        try:
            return job.result()
        except (FailedJobError, UncompletedJobError) as error:
            return f"job {job.job_id}: {str(error).splitlines()[0]} (log: {job.paths.stderr})"


def run_command(command: list[str], environment: dict[str, str], timeout_s: float | None) -> str:
    """Runs `command` to its end or for `timeout_s`; returns "" or the first line of what it said was wrong."""
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout_s:g} s"
    if done.returncode == 0:
        return ""
    return (done.stderr.strip() or f"exit status {done.returncode}").removeprefix("lab: ").splitlines()[0]


def _check_devices(devices: list[str]) -> None:
    if not devices:
        return
    import torch

    there = [str(index) for index in range(torch.cuda.device_count())]
    if missing := [device for device in devices if device not in there]:
        raise DeviceError(f"CUDA device {missing[0]} was asked for; this machine has {', '.join(there) or 'none'}.")
