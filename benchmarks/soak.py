"""Kills, interrupts and faults again and again, at other random moments each time, and how many were survived.

    python benchmarks/soak.py [--rounds 5] [--first 1] [-k EXPRESSION]

A round runs tests/slow/test_kills.py and tests/slow/test_interrupts.py with LAB_SOAK_SEED set to its number. Prints a line a round
and the sums; exits with 1 if any test failed.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

HOME = Path(__file__).parents[1]
TESTS = ("tests/slow/test_kills.py", "tests/slow/test_interrupts.py")


def one_round(number: int, chosen: str) -> Counter[str]:
    """{what was counted: how often}: tests passed, failed and skipped, and what the tests themselves recorded."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", chosen, f"--junitxml={page}", "-o", "junit_family=xunit1"]
        done = subprocess.run(command, cwd=HOME, env={**os.environ, "LAB_SOAK_SEED": str(number)}, capture_output=True, text=True)
        if not page.exists():
            sys.exit(done.stdout + done.stderr)
        cases = list(ElementTree.parse(page).iter("testcase"))
    counted: Counter[str] = Counter()
    for case in cases:
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        counted[outcome] += 1
        if outcome in ("failure", "error"):
            print(f"  seed {number}: {case.get('name')}: {case.find(outcome).get('message', '').splitlines()[0]}")
        counted.update({item.get("name"): int(item.get("value")) for item in case.iter("property")})
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1, help="seed of the first round")
    parser.add_argument("-k", default="", help="which tests, as pytest takes it")
    wanted = parser.parse_args()
    total: Counter[str] = Counter()
    for number in range(wanted.first, wanted.first + wanted.rounds):
        began = time.monotonic()
        counted = one_round(number, wanted.k)
        total += counted
        print(f"seed {number}: {_text(counted)} in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{wanted.rounds} rounds: {_text(total)}")
    sys.exit(bool(total["failure"] + total["error"]))


def _text(counted: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counted.items())


if __name__ == "__main__":
    main()
