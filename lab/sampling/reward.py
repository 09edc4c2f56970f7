"""LatentRM: a reward model that reads a question and its thoughts and scores every thought (`latenttts.md` 2.7).

It is a copy of the generator's transformer with a one-number head. Scores depend on prompt and thoughts only, so end and
answer tokens are never read: a question's prompt is read once for its N samples, L + N·T positions instead of N·(L + T + A).
Axes: Q questions, N samples, R = Q·N rows (question-major), T thoughts, D width.
"""

from functools import cached_property

import torch
from torch import Tensor, nn

from lab.errors import CheckpointError, SettingsError
from lab.latent.loop import Prompt, read_prompt
from lab.models.inference import inference


class LatentRM(nn.Module):
    """Scores thoughts.

    Args:
        model: the causal language model whose transformer is used (its vocabulary head is not).
        projector: a CODI generator's projection, applied before the head; None for the others.
        classifier: the head; None = a new one.
        loss: what it was trained with, which decides what a step is worth.
    """

    def __init__(self, model: nn.Module, projector: nn.Module | None = None, classifier: nn.Linear | None = None, loss: str = "ce"):
        super().__init__()
        self.model, self.projector, self.loss = model, projector, loss
        self.classifier = new_head(model.config) if classifier is None else classifier

    @cached_property
    def decoder(self):
        """The step over this model's transformer."""
        from lab.models.decoder import decoder_for

        return decoder_for(self.model)

    def score(self, h: Tensor) -> Tensor:
        """Logits of hidden states after the final norm, (…, D) -> (…)."""
        return self.classifier(h if self.projector is None else self.projector(h))[..., 0]

    def worth(self, logits: Tensor) -> Tensor:
        """What a step adds to the score of its trajectory, by its logit: that itself, or its log-sigmoid for a `bce` model."""
        return torch.nn.functional.logsigmoid(logits) if self.loss == "bce" else logits

    def forward(self, prompt: Prompt, thoughts: Tensor, counts: Tensor | None = None) -> Tensor:
        """Logits (Q·N, T) of every thought, with gradient; `thoughts` (Q·N, T, D); columns from `counts` on are padding."""
        decoder, n = self.decoder, self._samples(prompt, thoughts)
        kv, pos = decoder.grow(), prompt.pos
        decoder(self.own(prompt).x, pos, kv, valid=prompt.valid)
        kv = kv.select(torch.arange(len(pos), device=pos.device).repeat_interleave(n))
        return self._read(decoder, kv, (pos[:, -1] + 1).repeat_interleave(n), thoughts, counts)

    @inference
    def rate(self, prompt: Prompt, thoughts: Tensor, counts: Tensor | None = None) -> Tensor:
        """The same logits without gradient, the prompt's keys kept once for all samples."""
        decoder, n = self.decoder, self._samples(prompt, thoughts)
        kv, _, pos = read_prompt(decoder, self.own(prompt))
        kv = kv.fan_out(n, thoughts.shape[1], n * prompt.x.numel() >= 300_000)
        return self._read(decoder, kv, pos.repeat_interleave(n), thoughts, counts)

    @inference
    def rate_padded(self, prompt: Prompt, thoughts: Tensor, tails: Tensor) -> Tensor:
        """The logits (Q·N, T) as the released scorer has them: all rows padded together on the left, pads counted as positions.

        Args:
            tails: (Q·N,) how many tokens follow each row's thoughts (end and answer), which decide its pads.
        """
        decoder, kv, rows = self.decoder, self.decoder.grow(), self.own(prompt).repeat(self._samples(prompt, thoughts))
        length = rows.pos[:, -1] + tails
        pos = rows.pos + (length.max() - length)[:, None]
        decoder(rows.x, pos, kv, valid=rows.valid)
        return self._read(decoder, kv, pos[:, -1] + 1, thoughts, None)

    def own(self, prompt: Prompt) -> Prompt:
        """The prompt in this model's own embeddings; raises SettingsError where it was not made of token ids."""
        if prompt.ids is None:
            raise SettingsError("A reward model reads the prompt itself: make the Prompt from token ids.")
        return Prompt(self.model.get_input_embeddings()(prompt.ids), prompt.valid, prompt.ids)

    def _read(self, decoder, kv, start: Tensor, thoughts: Tensor, counts: Tensor | None) -> Tensor:
        steps = torch.arange(thoughts.shape[1], device=thoughts.device)
        valid = None if counts is None or bool((counts == len(steps)).all()) else steps < counts[:, None]
        return self.score(decoder(thoughts, start[:, None] + steps, kv, valid=valid).last)

    @staticmethod
    def _samples(prompt: Prompt, thoughts: Tensor) -> int:
        questions = prompt.x.shape[0]
        if len(thoughts) % questions:
            raise SettingsError(f"{len(thoughts)} rows of thoughts cannot belong to {questions} questions in equal numbers.")
        if thoughts.shape[-1] != prompt.x.shape[-1]:
            raise CheckpointError(
                f"Thoughts of width {thoughts.shape[-1]} for a reward model of width {prompt.x.shape[-1]}: "
                "it was trained on another backbone."
            )
        return len(thoughts) // questions


def new_head(config) -> nn.Linear:
    """The untrained head of a model of `config`: normal weights of its initialiser's width, zero bias."""
    head = nn.Linear(config.hidden_size, 1)
    nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(head.bias)
    return head


def step_loss(logits: Tensor, labels: Tensor, kind: str = "ce", official_length: int | None = None) -> Tensor:
    """The training loss of step scores.

    `ce` contrasts the samples of a question at each step: minus the label-weighted log-softmax over the samples, averaged
    over the (question, step) pairs that carry any label (the released code divides by questions times the padded
    sequence length instead: `official_length`). `bce` is the mean binary cross-entropy of every label.

    Args:
        logits, labels: (Q, N, T); labels in [0, 1], NaN = no label.
        official_length: the padded length to divide by, for parity.
    """
    known = ~labels.isnan()
    if kind == "bce":
        return torch.nn.functional.binary_cross_entropy_with_logits(logits[known], labels[known])
    if kind != "ce":
        raise SettingsError(f"Unknown LatentRM loss {kind!r}. Known: ce, bce.")
    weight = labels.masked_fill(~known, 0.0)
    log_share = torch.log_softmax(logits.masked_fill(~known, -1e30), dim=1)
    summed = -(weight * log_share).sum()
    if official_length is not None:
        return summed / (len(logits) * official_length)
    return summed / (weight.sum(1) > 0).sum().clamp(min=1)
