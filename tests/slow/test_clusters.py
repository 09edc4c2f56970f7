"""The cluster engines on real clusters: Ray with two CPUs, Slurm with one node, both on this machine and gone afterwards."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import psutil
import pytest

from lab import sweep
from lab.errors import DeviceError, SettingsError
from lab.running.engines import Needs, Ray, Slurm
from lab.running.records import results_of

pytestmark = pytest.mark.slow
POINTS = {"seed": "0", "fail": "false,true"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch, bench):
    monkeypatch.setenv("LAB_WARM", "0")


def check_that_a_failed_run_stands_alone(engine):
    result = sweep.run_sweep("mini", "toy-claims", POINTS, engine, retries=1)
    assert list(result.failed) == ["fail=true,seed=0"] and "asked to fail" in result.failed["fail=true,seed=0"]
    assert set(results_of(result.runs["fail=false,seed=0"])) == {"draw", "double"}


@pytest.fixture(scope="module")
def ray_address(tmp_path_factory):
    """The address of a cluster of two CPUs and no GPU, in processes of its own that end with it."""
    pytest.importorskip("ray", reason="the ray extra is not installed: pip install -e '.[ray]'")
    log = tmp_path_factory.mktemp("ray") / "ray.log"
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "60", "RAY_AUTH_MODE": "disabled"}.items():
            patch.setenv(name, value)
        for _ in range(4):  # on a busy machine a node gives up waiting for its own parts
            port = free_port()
            if stack.enter_context(ray_cluster(port, log)):
                break
        else:
            pytest.fail(log.read_text()[-2000:])
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def ray_cluster(port, log):
    """Whether a cluster came up; its processes are gone afterwards."""
    folder = tempfile.mkdtemp(prefix="ray")  # its sockets allow no long path
    least = ["--include-dashboard=false", "--no-monitor", "--include-log-monitor=false", "--block"]
    where = [f"--port={port}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2", "--num-gpus=0", *where, *least]
    with open(log, "w") as file:
        cluster = subprocess.Popen(command, start_new_session=True, stdout=file, stderr=file)
    try:
        while "Ray runtime started" not in log.read_text() and cluster.poll() is None:
            time.sleep(0.5)
        yield cluster.poll() is None
    finally:
        for process in psutil.process_iter(["cmdline"]):
            if any(folder in word for word in process.info["cmdline"] or []):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        cluster.wait()
        shutil.rmtree(folder, ignore_errors=True)


def until(true, seconds=180.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "the cluster never came up"
        time.sleep(0.5)


def test_runs_become_ray_tasks_and_what_no_node_has_is_an_error_at_once(ray_address):
    with pytest.raises(DeviceError, match="No Ray cluster at '127.0.0.1:1' .*refused"):
        Ray(1, address="127.0.0.1:1")
    with pytest.raises(DeviceError, match="asks for 1 GPU, 1 CPU; no node of the Ray cluster has that .* 0 GPU, 2 CPU"):
        Ray(1, Needs(gpus=1), ray_address)
    with pytest.raises(DeviceError, match="memory; no node"):
        Ray(1, Needs(memory=1e6), ray_address)
    with pytest.raises(SettingsError, match="--option"):
        Ray(1, address=ray_address, options={"num_gpu": 1})
    check_that_a_failed_run_stands_alone(Ray(2, Needs(cpus=1, minutes=10), ray_address))


def test_a_ray_task_sees_its_own_devices_and_can_be_stopped(ray_address):
    engine = Ray(2, Needs(cpus=1), ray_address)
    with engine:
        tell = "import os, sys; sys.exit('lab: ' + repr(os.environ.get('CUDA_VISIBLE_DEVICES')) + os.environ['OMP_NUM_THREADS'])"
        assert engine.attempt([sys.executable, "-c", tell]) in ("''1", "None1")
        threading.Timer(3, engine.stop).start()
        began = time.monotonic()
        assert engine.attempt([sys.executable, "-c", "import time; time.sleep(300)"]) == "stopped, to be taken up"
        assert engine.attempt([sys.executable, "-c", "pass"]) == "stopped, to be taken up" and time.monotonic() - began < 120


SLURM = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={other}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
MpiDefault=none
SwitchType=switch/none
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=3000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster of one node: munged, slurmctld and slurmd with a configuration of their own."""
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name)]:
        pytest.skip(f"{missing[0]} is not installed (Debian: apt-get install munge slurmctld slurmd slurm-client)")
    if os.geteuid() != 0:
        pytest.skip("a Slurm node of one's own needs root")
    folder = tmp_path / "slurm"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    key, log = folder / "munge.key", folder / "munge.log"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    config.write_text(SLURM.format(host=socket.gethostname().split(".")[0], port=free_port(), other=free_port(), folder=folder))
    monkeypatch.setenv("SLURM_CONF", str(config))
    files = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("socket", "pid-file", "seed-file")]
    try:
        subprocess.run(["munged", "--force", f"--key-file={key}", f"--log-file={log}", *files], check=True, capture_output=True)
        for command in (["slurmctld", "-i"], ["slurmd"]):
            subprocess.run(command, check=True, capture_output=True)
        until(lambda: "idle" in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout)
        yield folder
    finally:
        for path in (folder / "slurmctld.pid", folder / "slurmd.pid", folder / "munge.pid"):
            if path.exists():
                os.kill(int(path.read_text()), signal.SIGTERM)


def test_runs_become_slurm_jobs_and_what_no_node_has_is_an_error_at_once(slurm, tmp_path):
    with pytest.raises(DeviceError, match="Slurm would not take the runs: .*[Ii]nvalid generic resource"):
        Slurm(tmp_path / "jobs", 1, Needs(gpus=1))
    with pytest.raises(DeviceError, match="Slurm would not take the runs: "):
        Slurm(tmp_path / "jobs", 1, Needs(memory=64))
    with pytest.raises(SettingsError, match="--option"):
        Slurm(tmp_path / "jobs", 1, options={"gpus": 1})
    check_that_a_failed_run_stands_alone(Slurm(tmp_path / "jobs", 2, Needs(cpus=1, memory=1, minutes=5), {"slurm_partition": "main"}))
