"""Questions and answers: benchmarks, prompts, the reading of answers, collation, and small synthetic worlds."""

from lab.data.benchmarks import BENCHMARKS, Benchmark, benchmark, load_benchmark
from lab.data.examples import Dataset, Example, fingerprint, read_records, write_jsonl

__all__ = ["BENCHMARKS", "Benchmark", "Dataset", "Example", "benchmark", "fingerprint", "load_benchmark", "read_records", "write_jsonl"]
