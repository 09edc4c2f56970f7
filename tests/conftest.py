"""What all tests share: one thread, no network, outputs of their own, and the tier of a test from the folder it lies in."""

import os
import shutil
import signal
import sys
from pathlib import Path

import hypothesis
import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job of a shell: tests interrupt runs and launches
    signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "agg"})
hypothesis.settings.register_profile("steady", deadline=None, derandomize=True)  # the same examples everywhere, however slow it is
hypothesis.settings.load_profile("steady")
TIERS = {"slow": "slow", "browser": "browser", "gpu": "gpu"}
BENCH = Path(__file__).parent / "fixtures" / "bench"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in TIERS:
            item.add_marker(TIERS[folder])


@pytest.fixture(autouse=True)
def one_thread():
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def outputs(tmp_path, monkeypatch):
    """Runs made by a test go to its own folder."""
    monkeypatch.setenv("LAB_OUTPUTS", str(tmp_path / "outputs"))
    return tmp_path / "outputs"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A home of its own with the `mini` paper: two steps and an optional one, no model."""
    home = tmp_path / "home"
    shutil.copytree(BENCH, home)
    monkeypatch.setenv("LAB_HOME", str(home))
    return home


@pytest.fixture
def gpu():
    """A CUDA device, or a skip with the reason."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda")
