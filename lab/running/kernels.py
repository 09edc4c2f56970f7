"""Kernels that start warm: one process imports the heavy packages, and every kernel is forked off it.

A fresh kernel spends seconds importing torch and transformers; a forked one starts in a tenth of a second and shares their memory.
The server holds no device and no thread pool when it forks; a kernel ends with the connection that asked for it, so nothing
survives a killed `lab run`. Used on Linux only, and not when LAB_WARM=0; elsewhere kernels start fresh, with the same results.
`python benchmarks/notebooks.py` measures it: a step that does nothing but import costs 0.09 of the bare imports (fresh kernel: 0.82).
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lab.errors import RunError
from lab.running.memory import name_of_kernels

PRELOAD = ("ipykernel.kernelapp", "IPython.display", "ipywidgets", "pandas", "torch", "transformers.trainer", "matplotlib.pyplot")
SOCKET = "LAB_WARM"
PARENT = "LAB_PARENT"  # the process that a run must not outlive
_GONE = "The process that starts kernels has ended (its words are above); LAB_WARM=0 starts them without it."
INLINE = "module://matplotlib_inline.backend_inline"


@contextlib.contextmanager
def server() -> Iterator[None]:
    """Within it `manager_class()` gives warm kernels; a server that an outer command has started already is used."""
    if os.environ.get(SOCKET) is not None or sys.platform != "linux":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="lab-warm-") as folder:
        path = f"{folder}/socket"
        environment = {**os.environ, "MPLBACKEND": INLINE, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        process = subprocess.Popen([sys.executable, "-m", "lab.running.kernels", path], stdin=subprocess.PIPE, env=environment)
        os.environ[SOCKET] = path
        try:
            yield
        finally:
            os.environ.pop(SOCKET, None)
            process.kill()
            process.wait()


def manager_class(log_file: Path) -> Any:
    """A kernel manager, for one kernel, that forks it off the server if there is one; `stop(signal)` may be called from any thread.

    What the kernel prints outside cells goes to `log_file`.
    """
    path = os.environ.get(SOCKET, "0")
    from jupyter_client import AsyncKernelManager
    from jupyter_client.provisioning import LocalProvisioner

    class Forked(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
            self.process = ForkedProcess(path, cmd, kwargs.get("cwd") or os.getcwd(), kwargs["env"], log_file)
            self.pid = self.pgid = self.process.pid
            return self.connection_info

    class Manager(AsyncKernelManager):
        group = 0  # the kernel's processes, once they run
        stopped = False  # whether somebody asked for its end

        @classmethod
        def stop(cls, number: int) -> None:
            cls.stopped = True
            if cls.group:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(cls.group, number)

        async def _async_pre_start_kernel(self, **kwargs: Any) -> Any:
            if self.provisioner is None and path != "0":
                self.provisioner = Forked(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
            return await super()._async_pre_start_kernel(**{"env": dict(os.environ), **kwargs})

        async def _async_launch_kernel(self, kernel_cmd: list[str], **kwargs: Any) -> None:
            with open(log_file, "ab") as file:
                await super()._async_launch_kernel(kernel_cmd, **{"stdout": file, "stderr": file, **kwargs})
            type(self).group = self.provisioner.pid
            if self.stopped:
                self.stop(signal.SIGKILL)

    return Manager


class ForkedProcess:
    """The part of Popen that a kernel provisioner uses, for a kernel that is the server's child."""

    stdin = stdout = stderr = None

    def __init__(self, path: str, argv: list[str], cwd: str, env: dict[str, str], log_file: Path) -> None:
        self.returncode: int | None = None
        self._socket = _connect(path)
        request = {"argv": argv, "cwd": str(cwd), "env": env, "log": str(log_file), "name": name_of_kernels(os.getpid())}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        self._lines = self._socket.makefile("r")
        answer = self._lines.readline()
        if not answer:
            raise RunError(_GONE)
        self.pid = int(answer)

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        if self.returncode is None and select.select([self._socket], [], [], 0)[0]:
            self.returncode = int(self._lines.readline() or -signal.SIGKILL)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, once there is one."""
        select.select([self._socket], [], [], timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("kernel", timeout or 0)
        return status

    def send_signal(self, signum: int) -> None:
        """Signals the kernel's process group."""
        if self.poll() is None:
            os.killpg(self.pid, signum)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)


def _connect(path: str, seconds: float = 60.0) -> socket.socket:
    end = time.monotonic() + seconds
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            return connection
        except OSError as error:
            connection.close()
            if isinstance(error, ConnectionRefusedError) or time.monotonic() > end:
                raise RunError(_GONE) from None
            time.sleep(0.05)


def serve(path: str) -> None:
    """Imports the packages, then forks a kernel for each connection until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen(64)
    os.rename(f"{path}.new", path)  # there only once it listens
    for name in PRELOAD:
        import_module(name)
    children: dict[socket.socket, int] = {}
    while True:
        ready, _, _ = select.select([sys.stdin, listener, *children], [], [], 0.1)
        if sys.stdin in ready:
            break
        if listener in ready:
            _start(listener, children)
        _end({connection for connection in ready if connection in children}, children)
    _end(set(children), children)
    shutil.rmtree(Path(path).parent, ignore_errors=True)  # whoever made it was killed


def _start(listener: socket.socket, children: dict[socket.socket, int]) -> None:
    connection, _ = listener.accept()
    try:
        request = json.loads(connection.makefile("r").readline())
    except (OSError, ValueError):  # who asked is gone
        connection.close()
        return
    pid = os.fork()
    if pid == 0:
        for other in [listener, connection, *children]:
            other.close()
        _kernel(request)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)
    children[connection] = pid
    with contextlib.suppress(OSError):
        connection.sendall(f"{pid}\n".encode())


def _end(gone: set[socket.socket], children: dict[socket.socket, int]) -> None:
    """Kills the kernels whose connection has `gone` and reports those that ended by themselves."""
    for connection in gone:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(children[connection], signal.SIGKILL)
    for connection, pid in list(children.items()):
        ended, status = os.waitpid(pid, 0 if connection in gone else os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError):
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()
            del children[connection]


def _kernel(request: dict[str, Any]) -> None:
    """Becomes the kernel; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        end_with_parent(signal.SIGKILL)
        ctypes.CDLL(None).prctl(15, request["name"].encode())  # PR_SET_NAME
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(request["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        for number, source in enumerate([os.open(os.devnull, os.O_RDONLY), output, output]):
            os.dup2(source, number)
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"], MPLBACKEND=INLINE, JPY_PARENT_PID=str(os.getppid()))
        _settle_torch_and_draws()
        arguments = request["argv"]
        sys.argv = ["ipykernel_launcher", *arguments[arguments.index("-f") :]]
        sys.path[0] = ""
        from ipykernel.kernelapp import launch_new_instance

        launch_new_instance()
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def end_with_parent(number: int) -> None:
    """Has Linux send this process the signal `number` when the one that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def _settle_torch_and_draws() -> None:
    """Threads as the environment asks (torch has read it long ago), and draws that no other kernel shares."""
    import random

    import numpy
    import torch

    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    random.seed()
    numpy.random.seed()


if __name__ == "__main__":
    serve(sys.argv[1])
