"""Questions and answers: benchmarks, prompts, the reading of answers, collation, and small synthetic worlds."""

from lab.data.answers import Score, score
from lab.data.benchmarks import BENCHMARKS, Benchmark, benchmark, load_benchmark
from lab.data.examples import Dataset, Example, fingerprint, read_records, write_jsonl

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Dataset",
    "Example",
    "Score",
    "benchmark",
    "fingerprint",
    "load_benchmark",
    "read_records",
    "score",
    "write_jsonl",
]
