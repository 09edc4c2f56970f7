"""Are the thoughts doing anything? Tables over several runs, in Markdown: python benchmarks/ablations.py RUN…

A row is a run (a paper's key takes its newest toy run), or a step or a model in one; a column an intervention: accuracy, and in brackets
the share of answers to the question that the thoughts came from. Bold: the paired 95 % interval of the difference excludes 0.
"""

import argparse
import os
import re

os.environ.setdefault("OMP_NUM_THREADS", "1")

from lab.ablation import ablate, subject_of
from lab.running import papers

TABLES = (("own", "vector"), ("own", "thought"), ("own", "corrupted into clean"))


def cell(row: dict) -> str:
    clear = row["difference_high"] < 0 or row["difference_low"] > 0
    text = f"**{row['accuracy']:.2f}**" if clear else f"{row['accuracy']:.2f}"
    return text + (f" ({row['other']:.2f})" if row["other"] == row["other"] else "")


def measured(name: str, questions: int, each: int) -> tuple[str, list[dict]]:
    """The name of a run and its rows; of patched hidden states those of the corrupted run in the clean one are shown."""
    subject = subject_of(**({"paper": name} if name in papers.papers() else {"model": name})).first(questions)
    rows = ablate(subject, each=each, layers=None)
    return subject.name, [{**row, "column": row["intervention"].removesuffix(", corrupted into clean")} for row in rows]


def table(found: list[tuple[str, list[dict]]], kinds: tuple[str, ...]) -> str:
    """One Markdown table of these kinds of rows; thoughts and layers in the order of their numbers."""
    names = dict.fromkeys(row["column"] for _, rows in found for row in rows if row["kind"] in kinds)
    order = sorted(names, key=lambda name: int((re.findall(r"\d+", name) or [-1])[0]))
    lines = ["| toy run | " + " | ".join(order) + " |", "|---" * (len(order) + 1) + "|"]
    for name, rows in found:
        cells = {row["column"]: cell(row) for row in rows}
        lines.append(f"| {name} | " + " | ".join(cells.get(column, "–") for column in order) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--questions", type=int, default=300, help="to ask each model, 0 = all")
    parser.add_argument("--each", type=int, default=3, help="thoughts to leave out one by one")
    given = parser.parse_args()
    found = [measured(name, given.questions, given.each) for name in given.runs]
    print("\n\n".join(table(found, kinds) for kinds in TABLES))


if __name__ == "__main__":
    main()
