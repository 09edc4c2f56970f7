"""Beam search over a data set: every question once for each (beams, candidates), recorded so that a kill costs one batch."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lab import files
from lab.errors import SettingsError
from lab.latent.draws import Keyed
from lab.latent.loop import Budget, Prompt
from lab.launch import rank, share
from lab.methods.latenttts.model import RewardModel
from lab.models.latent_model import LatentModel
from lab.progress import Progress
from lab.sampling.beam import Beam, BeamResult, beam_search
from lab.sampling.pool import judge
from lab.sampling.records import Asked
from lab.sampling.sampler import Sampler, fixed_count, thinker
from lab.stats import proportion_interval


def search(
    model: LatentModel,
    reward: RewardModel,
    asked: Sequence[Asked],
    sampler: Sampler,
    beams: int,
    candidates: int,
    folder: Path | str,
    *,
    rule: str,
    thoughts: int = 0,
    answer: int = 64,
    batch: int = 256,
    processes: int = 1,
) -> list[dict[str, Any]]:
    """One line a question: number, answer, correct, text, and the tree (`nodes`); kept in `folder`/beams-<B>x<C>.jsonl.

    Args:
        asked: the questions, with prompt and gold answer; their samples are not used.
        batch: candidates at a time. processes: share the questions, each with copies of the models and a device of its own.
    Raises: SettingsError for a model that decides itself how many thoughts it makes, and for a sampler that leaves thoughts as they are;
        CheckpointError for a foreign reward model.
    """
    if sampler.by == "own":
        raise SettingsError("Beam search chooses among thoughts, and by='own' makes them all alike; sample by noise or dropout.")
    count = fixed_count(model, thoughts)
    if count is None:
        raise SettingsError("Beam search compares thoughts of equal number; this model stops when it likes. Give thoughts=…, or vote.")
    reward.check_for(model)
    path = files.make_folder(Path(folder)) / f"beams-{beams}x{candidates}.jsonl"
    done = {line["number"] for line in _gathered(path)}
    left = [question for question in asked if question.number not in done]
    settings = Beam(beams=beams, candidates=candidates, thoughts=count)
    with Progress(f"beams {beams} x {candidates}", len(asked)) as progress:
        progress.start_at(len(asked) - len(left))
        work = partial(_search, model, reward, sampler, settings, answer, batch, rule, path)
        share(work, left, processes, progress.advance, model, reward)
    return sorted(_gathered(path), key=lambda line: line["number"])


def _search(
    model, reward: RewardModel, sampler: Sampler, settings: Beam, answer: int, batch: int, rule: str, path: Path, part: list[Asked]
) -> Iterator[int]:
    """Writes the lines of one process into a file of its own, those of questions of similar length together."""
    part, size = sorted(part, key=lambda question: len(question.prompt)), max(1, batch // (settings.beams * settings.candidates))
    for start in range(0, len(part), size):
        group = part[start : start + size]
        found = _run(model, reward, group, sampler, settings, answer)
        for place, question in enumerate(group):
            files.append_line(path.with_suffix(f".part-{rank()}"), _line(model, question, found, place, rule))
            yield question.number


def _gathered(path: Path) -> list[dict[str, Any]]:
    """The lines of a search, after what processes have left behind has joined them."""
    done = {line["number"] for line in files.read_lines(path)}
    for part in sorted(path.parent.glob(f"{path.stem}.part-*")):
        for line in files.read_lines(part):
            if line["number"] not in done:
                files.append_line(path, line)
        part.unlink()
    return files.read_lines(path)


def _run(model, reward: RewardModel, group: Sequence[Asked], sampler: Sampler, settings: Beam, answer: int) -> BeamResult:
    policy = thinker(model, settings.thoughts, sampler.but(temperature=0.0))
    each = settings.beams * settings.candidates
    number = torch.tensor([question.number for question in group], device=model.device).repeat_interleave(each)
    draws = Keyed.of(sampler.seed, number, torch.arange(each, device=model.device).repeat(len(group)))
    prompt = Prompt.of_ids(policy.decoder, [question.prompt for question in group])
    budget, masks = Budget(thoughts=settings.thoughts, answer=answer), sampler.masks(model, settings.thoughts)
    return beam_search(policy.decoder, policy, reward.scorer, prompt, draws, settings, budget, masks)


def _line(model, question: Asked, found: BeamResult, place: int, rule: str) -> dict[str, Any]:
    text = model.tokenizer.decode(found.rollout.answers()[place], skip_special_tokens=True)
    answer, right = judge(text, question.facts.get("gold", ""), rule)
    nodes = [
        {"step": step, "beam": int(beam), "candidate": int(candidate), "score": round(float(score), 5)}
        for step in range(len(found.kept))
        for (beam, candidate), score in zip(found.kept[step, place].tolist(), found.kept_scores[step, place].tolist(), strict=True)
    ]
    return {"number": question.number, "text": text, "answer": answer, "correct": right, "nodes": nodes}


def accuracy(lines: Sequence[dict[str, Any]], beams: int, candidates: int, numbers: set[int] | None = None) -> dict[str, Any]:
    """A row for the figure of curves: accuracy of a search that spent beams x candidates thoughts a step."""
    kept = [line["correct"] for line in lines if numbers is None or line["number"] in numbers]
    interval = proportion_interval(sum(kept), len(kept))
    row = {"subset": "all" if numbers is None else "mixed", "measure": f"beam search, {beams} kept", "n": beams * candidates}
    return row | {"mean": interval.mean, "low": interval.low, "high": interval.high, "questions": interval.n}


def tree_trace(line: dict[str, Any], question: Asked) -> Any:
    """The search of one question as a trace whose samples are its survivors, each under the one it grew from."""
    from lab.trace import Trace

    steps = 1 + max(node["step"] for node in line["nodes"])
    beams = len(line["nodes"]) // steps
    rows = []
    about = {"question": question.number, "prompt": question.facts.get("question", ""), "gold": question.facts.get("gold", "")}
    for place, node in enumerate(line["nodes"]):
        parent = (node["step"] - 1) * beams + node["beam"] if node["step"] else -1
        rows.append({**about, "sample": place, "parent": parent, "score": node["score"], "text": f"after thought {node['step'] + 1}"})
    best = (steps - 1) * beams
    rows[best] |= {"answer": line["answer"] or "", "correct": line["correct"], "text": line["text"]}
    return Trace.build("latenttts", samples=rows)
