"""A base, usually frozen, that reads thoughts made by a generator: LTA-Thinker, SoftCoT and the controls share this model.

Axes: R rows, n thoughts, K sets (SoftCoT++), L assistant columns, D width of the base, d width of the assistant.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from lab.errors import CheckpointError, SettingsError
from lab.methods.lta.config import LtaSettings
from lab.methods.lta.data import ThoughtBatch
from lab.methods.lta.generators import AssistantGenerator, BlockGenerator, StaticGenerator
from lab.methods.lta.prompting import Pack, own_pack
from lab.models.decoder import decoder_for
from lab.models.latent_model import LatentModel


class ThoughtParts(nn.Module):
    """What is trained: the generator, and for SoftCoT++ the initial vectors of the K sets (fixed rows in the published code)."""

    def __init__(self, s: LtaSettings, width: int, inner: int, std: float):
        super().__init__()
        if s.generator == "block":
            self.generator = BlockGenerator(width, s.inner or inner, s.eps)
        elif s.generator == "assistant":
            self.generator = AssistantGenerator(s.assistant_width, width)
        elif s.generator == "static":
            self.generator = StaticGenerator(s.num_thought_tokens, width, std)
        if s.num_scaling_times > 1:
            self.register_buffer("starts", torch.zeros(s.num_scaling_times, s.assistant_width))


class ThoughtModel(LatentModel):
    """Thoughts by a generator, injected into the base's prompt."""

    method = "lta"

    def __init__(self, *args: Any, **rest: Any):
        super().__init__(*args, **rest)
        self.backbone.requires_grad_(False)
        self.assistant: nn.Module | None = None
        self.assistant_tokenizer: Any = None
        self.pack: Pack = own_pack()

    @classmethod
    def build(cls, backbone, tokenizer, settings: Mapping[str, Any], source: str = "") -> Self:
        s, config = LtaSettings.check(**settings), backbone.config
        std = float(backbone.get_input_embeddings().weight.detach().float().std())
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return cls(backbone, tokenizer, s, ThoughtParts(s, config.hidden_size, inner, std), source)

    @classmethod
    def start(cls, backbone, tokenizer, settings: LtaSettings, assistant=None, assistant_tokenizer=None) -> Self:
        """A model to train.

        Args:
            assistant: the small causal language model of `generator="assistant"`; frozen.
        """
        if settings.generator == "assistant":
            if assistant is None:
                raise SettingsError("generator = 'assistant' needs the small model; pass assistant=… (small_model_id in a recipe).")
            settings = settings.but(assistant_width=assistant.config.hidden_size, assistant_id=assistant.name_or_path)
        eos = -1 if tokenizer is None or tokenizer.eos_token_id is None else tokenizer.eos_token_id
        settings = settings.but(eos_id=eos if settings.eos_id < 0 else settings.eos_id)
        model = cls.build(backbone, tokenizer, settings.model_dump(mode="json"))
        model.use_assistant(assistant, assistant_tokenizer)
        return model

    def use_assistant(self, assistant, tokenizer=None, start_ids: list[int] | None = None) -> None:
        """Sets the frozen small model; CheckpointError where its width is not the projection's.

        Args:
            start_ids: SoftCoT++: the K rows of its embedding table the sets begin with; None = the ones stored.
        """
        if assistant is None:
            return
        if self.config.generator == "assistant" and assistant.config.hidden_size != self.config.assistant_width:
            raise CheckpointError(
                f"The projection reads states of width {self.config.assistant_width}, this assistant has {assistant.config.hidden_size}."
            )
        self.assistant, self.assistant_tokenizer = assistant.eval().requires_grad_(False), tokenizer
        if start_ids is not None:
            with torch.no_grad():
                self.parts.starts.copy_(assistant.get_input_embeddings().weight[torch.tensor(start_ids)])

    @property
    def config(self) -> LtaSettings:
        """The settings, checked."""
        return LtaSettings.check(**self.settings)

    @cached_property
    def decoder(self):
        """The step over the base's weights."""
        return decoder_for(self.backbone)

    def train(self, mode: bool = True) -> Self:
        """Training mode for what is trained; the frozen base keeps to its inference behaviour."""
        super().train(mode)
        self.backbone.eval()
        return self

    def assistant_states(self, batch: ThoughtBatch) -> Tensor:
        """(R, n, d), or (R·K, n, d) for K sets: the frozen assistant's states at the thoughts' places; the same every epoch."""
        if self.assistant is None:
            raise SettingsError(f"This model needs its assistant ({self.config.assistant_id or 'the small model'}); call use_assistant.")
        decoder, sets = decoder_for(self.assistant), self.config.num_scaling_times
        pos = (batch.assistant_valid.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            x = decoder.embed(batch.assistant)
            rows, at = torch.arange(len(x), device=x.device)[:, None], batch.slots
            if sets > 1:
                x = x.repeat_interleave(sets, 0)
                pos, at = pos.repeat_interleave(sets, 0), at.repeat_interleave(sets, 0)
                rows = torch.arange(len(x), device=x.device)[:, None]
                x[rows, at] = self.parts.starts.repeat(len(batch), 1)[:, None].to(x.dtype)
            valid = batch.assistant_valid.repeat_interleave(sets, 0)
            return decoder(x, pos, decoder.grow(), valid=valid).last[rows, at]

    def make(self, batch: ThoughtBatch) -> Tensor | None:
        """Thoughts (R, n, D) (or (R·K, n, D)) of a batch; None for none."""
        kind, n = self.config.generator, batch.slots.shape[1]
        if kind == "none" or n == 0:
            return None
        if kind == "unknown":
            return self.decoder.embed(batch.placeholders)
        if kind == "static":
            return self._static(n).expand(len(batch), -1, -1)
        if kind == "assistant":
            states = batch.states if batch.states is not None else self.assistant_states(batch)
            return self.parts.generator(states)
        return self.look(batch, batch.slots)

    def look(self, batch: ThoughtBatch, at: Tensor) -> Tensor:
        """The block's vectors (R, q, D) at places `at` of what the assistant reads; gold steps hidden as the settings say."""
        seen = batch.hidden_steps(at) if self.config.gold_steps == "masked" else None
        return self.parts.generator(self.decoder.embed(batch.assistant), batch.assistant_valid, at, seen)

    def _static(self, n: int) -> Tensor:
        prompt = self.parts.generator.prompt
        if n > len(prompt):
            raise SettingsError(f"The soft prompt has {len(prompt)} vectors; ask for at most so many thoughts.")
        return prompt[:n]
