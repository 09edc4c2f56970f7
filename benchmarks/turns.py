"""What the benchmarks of feedback methods share: CPU times of two sides that take turns, and the table of their ratios."""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from statistics import median

import torch

Row = tuple[str, str, str, float, float, float]  # work, size, case, ratio, milliseconds of ours and of the other side


def compare(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """(ratio of medians, milliseconds of ours, of the other side), the sides taking turns after one unmeasured call each."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, work in zip(times, (ours, other), strict=True):
            begin = time.process_time()
            work()
            if number:
                side.append(time.process_time() - begin)
    a, b = (median(side) for side in times)
    return a / b, 1e3 * a, 1e3 * b


def ids(*shape: int, top: int = 250) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(10, top, shape)


def main(about: str, works: Iterable[Callable[[str, int], Iterable[Row]]], bounds: Mapping[tuple[str, str], float]) -> None:
    """The command line of a benchmark: every work at every size, one line a ratio, its bound beside it."""
    named = {work.__name__: work for work in works}
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", default=["mid", "tiny"])
    parser.add_argument("--work", nargs="+", default=list(named), choices=list(named))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'work':16}{'size':6}{'case':24}{'ratio':>7}{'bound':>7}{'ours ms':>10}{'other ms':>10}")
    for work in chosen.work:
        for size in chosen.sizes:
            for kind, of, case, ratio, mine, theirs in named[work](size, chosen.rounds):
                bound = bounds.get((kind, of), float("nan"))
                print(f"{kind:16}{of:6}{case:24}{ratio:7.2f}{bound:7.2f}{mine:10.1f}{theirs:10.1f}", flush=True)
