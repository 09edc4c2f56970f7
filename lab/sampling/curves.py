"""What N samples are worth as N grows: mean, vote, weighted vote, coverage and best-of-N, each with its interval over questions.

Mixed questions (some samples right, some wrong) are the only ones where choosing matters; they are reported apart.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from lab import files
from lab.launch import share
from lab.methods.latenttts.model import RewardModel
from lab.progress import Progress
from lab.sampling.pool import Pool, number_of
from lab.sampling.records import Asked, read
from lab.sampling.votes import best, official_ks, pass_at_k, vote
from lab.stats import Interval, mean_interval, paired_difference, proportion_interval

Scores = dict[int, Sequence[float]]  # question number -> one score a sample


def powers(n: int) -> list[int]:
    """1, 2, 4, … up to `n`, and `n` itself."""
    return sorted({*(1 << i for i in range(n.bit_length()) if 1 << i <= n), n})


def curves(pool: Pool, ns: Iterable[int] = (), scores: Scores | None = None, official: bool = False) -> list[dict]:
    """Rows {subset, measure, n, mean, low, high, questions} for every N, over all questions and over the mixed ones.

    Args:
        ns: the N wanted; () = powers of two. scores: of every sample of every question, for best-of-N and the weighted vote.
        official: unreadable answers take part in votes.
    """
    full = {question.number: question.mixed for question in pool.asked}
    rows = []
    for n in ns or powers(pool.n):
        values = {q.number: measures(q, None if scores is None else scores[q.number][:n], official) for q in pool.first(n)}
        for subset, numbers in {"all": list(full), "mixed": [number for number, mixed in full.items() if mixed]}.items():
            rows += _rows(subset, n, [values[number] for number in numbers])
    return rows


def _rows(subset: str, n: int, values: list[dict[str, float]]) -> list[dict]:
    made = []
    for name in values[0] if values else ():
        interval = _interval([value[name] for value in values])
        made.append(
            {"subset": subset, "measure": name, "n": n, "mean": interval.mean, "low": interval.low, "high": interval.high}
            | {"questions": interval.n}
        )
    return made


def _interval(values: list[float]) -> Interval:
    return proportion_interval(int(sum(values)), len(values)) if set(values) <= {0.0, 1.0} else mean_interval(values)


def measures(question: Asked, scores: Sequence[float] | None = None, official: bool = False) -> dict[str, float]:
    """{measure: 0 to 1} of one question with all its samples."""
    right = question.corrects.tolist()
    found = {"mean": sum(right) / len(right), "vote": voted(question, None, official), "coverage": float(any(right))}
    if scores is not None:
        found |= {"weighted vote": voted(question, shares(scores), official), "best of N": float(right[best(right, scores)])}
    return found


def voted(question: Asked, weights: Sequence[float] | None = None, official: bool = False) -> float:
    """1.0 if the answer that wins the vote is right."""
    winner = vote(question.answers, weights, official)
    if winner is None:
        return 0.0
    return float(question.corrects[question.answers.index(winner)])


def shares(scores: Sequence[float]) -> list[float]:
    """Weights of a score-weighted vote: the softmax of the samples' scores."""
    import torch

    return torch.softmax(torch.as_tensor(scores, dtype=torch.float64), 0).tolist()


def passes(pool: Pool, ks: Iterable[int] = ()) -> list[dict]:
    """Rows {measure: pass@k, n: k, mean, low, high}: the unbiased estimate from all N samples; () = the k the released scripts print."""
    rows = []
    for k in ks or official_ks(pool.n):
        interval = mean_interval([pass_at_k(pool.n, int(q.corrects.sum()), k) for q in pool.asked])
        rows.append({"subset": "all", "measure": "pass@k", "n": k, "mean": interval.mean, "low": interval.low, "high": interval.high})
    return rows


def against_vote(pool: Pool, scores: Scores, n: int = 0) -> Interval:
    """Best-of-N minus vote on the mixed questions, paired: the only place where a reward model can help."""
    mixed = {question.number for question in pool.asked if question.mixed}
    chosen = [question for question in pool.first(n or pool.n) if question.number in mixed]
    found = [measures(question, scores[question.number][: n or pool.n]) for question in chosen]
    return paired_difference([row["best of N"] for row in found], [row["vote"] for row in found])


def scored(pool: Pool, reward: RewardModel, processes: int = 1) -> Scores:
    """One score a sample: the sum of its step scores, NaN steps left out; `processes` share the recorded files."""
    paths = sorted(pool.folder.glob("*.safetensors"), key=number_of)
    with TemporaryDirectory() as folder, Progress("scores", len(paths)) as progress:
        share(partial(_score_files, reward, pool.latent, Path(folder)), paths, processes, progress.advance, reward)
        return {number: scores for path in paths for number, scores in files.read_json(Path(folder) / path.name)}


def _score_files(reward: RewardModel, latent: int | None, folder: Path, paths: list[Path]) -> Iterator[Path]:
    for path in paths:
        asked = list(read(path, latent))
        scores = [[q.number, steps.nansum(-1).tolist()] for q, steps in zip(asked, reward.score(asked), strict=True)]
        yield files.write_json(folder / path.name, scores)
