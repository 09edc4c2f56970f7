"""Kernels forked off the warm server compute on the device: nothing touched CUDA before the fork."""

import json

import pytest

from lab.pipeline import run_recipe
from lab.running import runs

WORK = ["import torch\n", "\n", "assert not torch.cuda.is_initialized()\n", "total = torch.ones(1024, device='cuda').sum().item()\n"]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("warm", [True, False])
def test_every_step_of_a_run_can_use_the_device(bench, monkeypatch, warm):
    if warm:
        monkeypatch.delenv("LAB_WARM", raising=False)
    else:
        monkeypatch.setenv("LAB_WARM", "0")
    for name in ("1_draw", "2_double"):
        path = bench / "notebooks" / "mini" / f"{name}.ipynb"
        notebook = json.loads(path.read_text())
        notebook["cells"][2]["source"] = [*WORK, *notebook["cells"][2]["source"]]
        notebook["cells"][-1]["source"] = ["assert total == 1024\n", *notebook["cells"][-1]["source"]]
        path.write_text(json.dumps(notebook))
    folder = run_recipe("mini", "toy")
    for record in runs.open_run(folder).steps():
        assert record.info["machine"]["device"].startswith("cuda (")
        assert record.info["peak_memory_mib"]["device"] > 0
