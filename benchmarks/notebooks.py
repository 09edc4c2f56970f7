"""What a notebook step costs over its own work: a pipeline of steps that only import what training notebooks import.

    python benchmarks/notebooks.py [--steps 4] [--rounds 3] [--seeds 4]

Compares kernels forked off one warm process with fresh kernels, alternating; also the same imports in a bare interpreter (the floor
of a fresh process). Prints medians of the wall time per later step (the first one waits for the imports either way). Then a sweep over
seeds, one run at a time, against papermill started by hand for each notebook: CPU time, which a busy machine does not stretch.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from uuid import uuid4

from lab.pipeline import run_recipe
from lab.running.runs import open_run
from lab.sweep import run_sweep

IMPORTS = "import torch\nfrom transformers import AutoModelForCausalLM, Trainer\nimport matplotlib.pyplot\nimport lab\n"


def cell(source: str, *tags: str) -> dict:
    return {
        "cell_type": "code",
        "metadata": {"tags": list(tags)},
        "source": source,
        "outputs": [],
        "execution_count": None,
        "id": uuid4().hex[:8],
    }


def make_home(home: Path, steps: int) -> None:
    """A paper `bare` whose steps import and finish."""
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    lines = []
    for number in range(steps):
        parameters = cell('run: str = ""\nseed: int = 0', "parameters")
        cells = [parameters, cell(f"{IMPORTS}step = lab.begin('bare', 's{number}', run)"), cell("step.finish(x=1)")]
        path = home / "notebooks" / "bare" / f"{number}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
        lines.append(f"  - {{step: s{number}, notebook: bare/{number}.ipynb}}\n")
    recipes = home / "papers" / "bare" / "recipes"
    recipes.mkdir(parents=True)
    (recipes / "toy.yaml").write_text("")
    (recipes.parent / "pipeline.yaml").write_text("title: bare\nsteps:\n" + "".join(lines))


def later_steps(warm: bool) -> list[float]:
    """Wall seconds of every step but the first."""
    os.environ.pop("LAB_WARM", None)
    if not warm:
        os.environ["LAB_WARM"] = "0"
    steps = open_run(run_recipe("bare", "toy")).manifest["steps"]
    return [facts["wall_s"] for name, facts in sorted(steps.items())][1:]


def bare_imports() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)
    return time.perf_counter() - began


def cpu_seconds() -> float:
    """Of this process and all that it has waited for."""
    mine, below = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return mine.ru_utime + mine.ru_stime + below.ru_utime + below.ru_stime


def swept(seeds: int, folder: Path) -> float:
    began = cpu_seconds()
    result = run_sweep("bare", "toy", {"seed": ",".join(map(str, range(seeds)))}, folder=folder / "swept")
    assert not result.failed
    return cpu_seconds() - began


def by_hand(seeds: int, steps: int, home: Path, folder: Path) -> float:
    """What a person would type: papermill for every notebook and seed."""
    began = cpu_seconds()
    for seed, number in itertools.product(range(seeds), range(steps)):
        source, run = home / "notebooks" / "bare" / f"{number}.ipynb", folder / f"hand-{seed}"
        values = ["-p", "seed", str(seed), "-p", "run", str(run)]
        command = [sys.executable, "-m", "papermill", str(source), str(folder / "out.ipynb"), *values, "--no-progress-bar"]
        subprocess.run(command, check=True, capture_output=True)
    return cpu_seconds() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=4)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_home(Path(folder), wanted.steps)
        os.environ.update(LAB_HOME=folder, LAB_OUTPUTS=f"{folder}/outputs")
        times: dict[str, list[float]] = {"imports alone": [], "fresh kernel": [], "warm kernel": []}
        for _ in range(wanted.rounds):
            times["imports alone"].append(bare_imports())
            times["fresh kernel"] += later_steps(warm=False)
            times["warm kernel"] += later_steps(warm=True)
        os.environ.pop("LAB_WARM", None)
        hand, sweep = by_hand(wanted.seeds, wanted.steps, Path(folder), Path(folder)), swept(wanted.seeds, Path(folder))
    for name, seconds in times.items() if wanted.rounds else ():
        floor = statistics.median(times["imports alone"])
        print(f"{name:14} {statistics.median(seconds):6.2f} s a step   {statistics.median(seconds) / floor:5.2f} of the imports alone")
    print(f"sweep {sweep:.1f} s against {hand:.1f} s by hand: {sweep / hand:.2f}")


if __name__ == "__main__":
    main()
