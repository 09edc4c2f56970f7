"""What can answer an evaluation in this process: any model of ours, or plain transformers generation."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lab.errors import SettingsError
from lab.evaluate import Decoding, Output, Request
from lab.latent.draws import Keyed, Stream
from lab.latent.sampling import draw
from lab.models.latent_model import LatentModel
from lab.models.tokenizers import stop_ids

Answered = Iterator[tuple[Request, Output]]


class Latent:
    """Answers of a `LatentModel` of any method, through its own `generate`; `options` are the method's."""

    def __init__(self, model: LatentModel, **options: Any):
        self.model, self.options = model, options
        self.facts = {"backend": model.method, "model": model.source, "settings": model.settings, "options": options}

    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Answered:
        """Outputs, a batch at a time; the questions of a batch are answered from the first to the last sample wanted of any."""
        for group in runs(requests, decoding.batch):
            began, wanted = time.monotonic(), [request.sample for request in group]
            skip, samples = min(wanted), max(wanted) + 1 - min(wanted)
            questions = {request.number: request.example for request in group}
            first = min(questions)
            result = self.model.generate(
                list(questions.values()),
                samples,
                sampling=decoding.sampling,
                max_new_tokens=decoding.max_new_tokens,
                seed=decoding.seed,
                first=first,
                skip=skip,
                batch=decoding.batch,
                **self.options,
            )
            each = (time.monotonic() - began) / (len(questions) * samples)
            found = outputs(result.trace(), first, each)
            yield from ((request, found[request.number - first, request.sample]) for request in group)


def runs(requests: Sequence[Request], batch: int) -> Iterator[list[Request]]:
    """Requests in groups of consecutive questions with about `batch` answers each, all samples of a question together."""
    group: list[Request] = []
    for request in sorted(requests, key=lambda request: (request.number, request.sample)):
        new = group and request.number != group[-1].number
        if new and (len(group) >= batch or request.number != group[-1].number + 1):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def outputs(trace: Any, first: int = 0, seconds: float = 0.0) -> dict[tuple[int, int], Output]:
    """{(question − first, sample): output} of a trace: answer tokens, and the passes over everything after the prompt."""
    spoken = trace.tokens[trace.tokens.role != "prompt"]
    keys = ["question", "sample"]
    answered = spoken[spoken.role == "answer"].groupby(keys).size()
    passes = spoken.iterations.fillna(1).groupby([spoken.question, spoken["sample"]]).sum()
    read = trace.tokens[trace.tokens.role == "prompt"].groupby(keys).size()
    found = {}
    for row in trace.samples.itertuples():
        key = (row.question, row.sample)
        tokens, spent = int(answered.get(key, 0)), float(passes.get(key, 0.0))
        made, capped = float(getattr(row, "latents", math.nan)), float(getattr(row, "capped", math.nan))
        found[int(row.question) - first, int(row.sample)] = Output(
            row.text, tokens, row.finish or "stop", spent, int(read.get(key, 0)), seconds, made, capped
        )
    return found


class HF:
    """Answers by transformers' own `generate`: prompts of like length batched, padded on the left, tokens drawn from keyed draws.

    It agrees token for token with method `none`; it is here for any architecture, and as the measure of the others.
    """

    def __init__(self, model: Any, tokenizer: Any, *, thinking: bool | None = None):
        self.reader = LatentModel(model, tokenizer)
        self.model, self.thinking = model, thinking
        self.facts = {"backend": "hf", "model": model.name_or_path, "thinking": thinking}
        if tokenizer is None:
            raise SettingsError("The hf backend needs a tokenizer; save one beside the model.")

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], decoding: Decoding) -> Answered:
        """Outputs, a batch at a time."""
        asked = [(self.reader.prompt_ids(request.example, thinking=self.thinking), request) for request in requests]
        asked.sort(key=lambda pair: len(pair[0]))
        for start in range(0, len(asked), decoding.batch):
            yield from self._batch(asked[start : start + decoding.batch], decoding)

    def _batch(self, asked: list[tuple[list[int], Request]], decoding: Decoding) -> Answered:
        from transformers import GenerationConfig

        began, stops = time.monotonic(), stop_ids(self.reader.tokenizer, self.model)
        ids, mask = _left([prompt for prompt, _ in asked], self.model.device)
        config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens, do_sample=False, repetition_penalty=1.0, eos_token_id=stops or None, pad_token_id=0
        )
        chooser = [] if decoding.greedy else [_Chooser([request for _, request in asked], decoding, ids.shape[1], ids.device)]
        said = self.model.eval().generate(ids, attention_mask=mask, generation_config=config, logits_processor=chooser)[:, ids.shape[1] :]
        each = (time.monotonic() - began) / len(asked)
        for (prompt, request), row in zip(asked, said.tolist(), strict=True):
            end = next((place for place, token in enumerate(row) if token in stops), None)
            answer, finish = (row, "length") if end is None else (row[:end], "stop")
            text = self.reader.tokenizer.decode(answer, skip_special_tokens=True)
            yield request, Output(text, len(answer), finish, float(len(answer)), len(prompt), each)


class _Chooser:
    """A logits processor that draws each row's token itself and leaves greedy search no other choice."""

    def __init__(self, requests: Sequence[Request], decoding: Decoding, prompt: int, device: torch.device):
        number, sample = (torch.tensor([getattr(r, name) for r in requests], device=device) for name in ("number", "sample"))
        self.draws, self.how, self.prompt = Keyed.of(decoding.seed, number, sample), decoding.sampling, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = torch.full((len(scores),), input_ids.shape[1] - self.prompt, device=scores.device)
        token, _ = draw(scores, self.how, self.draws.uniform(step, Stream.TOKEN))
        return torch.full_like(scores, -math.inf).scatter_(-1, token[:, None], 0.0)


def _left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask
