"""A base, usually frozen, that reads thoughts made by a generator: LTA-Thinker, SoftCoT and the controls share this model.

Axes: R rows, n thoughts, K sets (SoftCoT++), L assistant columns, D width of the base, d width of the assistant.
"""

from collections.abc import Mapping
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lab.errors import CheckpointError, SettingsError
from lab.methods.lta.config import LtaSettings
from lab.methods.lta.data import ThoughtBatch, step_places
from lab.methods.lta.generators import AssistantGenerator, BlockGenerator, StaticGenerator
from lab.methods.lta.prompting import Pack, own_pack
from lab.models.decoder import Decoder, decoder_for, supported
from lab.models.latent_model import LatentModel
from lab.models.lora import GatedLora
from lab.models.step import Out

LORA = {"rank": 16, "alpha": 32, "dropout": 0.1, "targets": ("q", "v")}  # of both `tune_…` (`lta.md` 2.8)
SHAPE = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def check_tunable(model: nn.Module) -> None:
    """SettingsError where adapters cannot be added to `model`."""
    if not supported(model) or any(getattr(model.config, name, None) is None for name in SHAPE):
        raise SettingsError(f"A {model.config.model_type!r} model cannot be tuned here; leave tune_… off, or take a Llama or Qwen.")


class ThoughtParts(nn.Module):
    """What is trained: the generator and adapters; for SoftCoT++ also the initial vectors of the K sets (fixed rows, as published)."""

    def __init__(self, s: LtaSettings, config: Any, std: float):
        super().__init__()
        width, inner = config.hidden_size, getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        if s.generator == "block":
            self.generator = BlockGenerator(width, s.inner or inner, s.eps)
        elif s.generator == "assistant":
            self.generator = AssistantGenerator(s.assistant_width, width)
        elif s.generator == "static":
            self.generator = StaticGenerator(s.num_thought_tokens, width, std)
        if s.num_scaling_times > 1:
            self.register_buffer("starts", torch.zeros(s.num_scaling_times, s.assistant_width))
        if s.tune_base_model:
            self.base_lora = GatedLora(config, **LORA)
        if s.tune_assistant_model:
            self.assistant_lora = GatedLora(SimpleNamespace(**s.assistant_shape), **LORA)


class Tuned(Decoder):
    """A step through weights whose adapters are always open."""

    def __call__(self, *inputs: Any, **options: Any) -> Out:
        return super().__call__(*inputs, **options, lora_gate=True)


def stepper(model: nn.Module, lora: GatedLora | None):
    """The step over a model's weights, with the adapters where there are any."""
    return decoder_for(model) if lora is None else Tuned(model, lora)


class ThoughtModel(LatentModel):
    """Thoughts by a generator, injected into the base's prompt."""

    method = "lta"
    answers = ("pack",)

    def __init__(self, *args: Any, **rest: Any):
        super().__init__(*args, **rest)
        self.backbone.requires_grad_(False)
        self.assistant: nn.Module | None = None
        self.assistant_tokenizer: Any = None
        self.pack: Pack = own_pack()

    @classmethod
    def build(cls, backbone, tokenizer, settings: Mapping[str, Any], source: str = "") -> Self:
        s, std = LtaSettings.check(**settings), float(backbone.get_input_embeddings().weight.detach().float().std())
        if s.tune_base_model:
            check_tunable(backbone)
        return cls(backbone, tokenizer, s, ThoughtParts(s, backbone.config, std), source)

    @classmethod
    def start(cls, backbone, tokenizer, settings: LtaSettings, assistant=None, assistant_tokenizer=None, pack: Pack | None = None) -> Self:
        """A model to train.

        Args:
            assistant: the small causal language model of `generator="assistant"`; frozen.
            pack: prompt wording, None = lab's own; its hash stays with the checkpoint.
        """
        if settings.generator == "assistant":
            if assistant is None:
                raise SettingsError("generator = 'assistant' needs the small model; pass assistant=… (small_model_id in a recipe).")
            if settings.tune_assistant_model:
                check_tunable(assistant)
                settings = settings.but(assistant_shape={name: int(getattr(assistant.config, name)) for name in SHAPE})
            settings = settings.but(assistant_width=assistant.config.hidden_size, assistant_id=assistant.name_or_path)
        eos = -1 if tokenizer is None or tokenizer.eos_token_id is None else tokenizer.eos_token_id
        pack = pack or own_pack()
        settings = settings.but(eos_id=eos if settings.eos_id < 0 else settings.eos_id, pack="" if tokenizer is None else pack.hash)
        model = cls.build(backbone, tokenizer, settings.model_dump(mode="json"))
        model.use_assistant(assistant, assistant_tokenizer)
        model.pack = pack
        return model

    def opened(self, pack: "Pack | str" = "") -> None:
        """Takes the prompt wording to go on with: a `Pack`, its file, or "" for lab's own.

        Raises CheckpointError where the model was trained with another; "any" takes lab's own all the same.
        """
        self.pack = pack if isinstance(pack, Pack) else own_pack() if pack in ("", "any") else Pack.read(pack)
        if pack != "any" and self.config.pack not in ("", self.pack.hash):
            raise CheckpointError(
                f"The model was trained with prompt wording {self.config.pack}, this is {self.pack.hash}: its thoughts would stand in "
                "sentences they were not made for. Give the wording's file as pack=…, or pack='any' to read it in lab's own words."
            )

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
        self.__dict__.pop("assistant_decoder", None)
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
        return stepper(self.backbone, getattr(self.parts, "base_lora", None))

    @cached_property
    def assistant_decoder(self):
        """The step over the assistant's weights."""
        return stepper(self.assistant, getattr(self.parts, "assistant_lora", None))

    def train(self, mode: bool = True) -> Self:
        """Training mode for what is trained; frozen weights keep to their inference behaviour."""
        super().train(mode)
        for frozen in filter(None, (self.backbone, self.assistant)):
            frozen.eval()
        return self

    def assistant_states(self, batch: ThoughtBatch) -> Tensor:
        """The assistant's states at the thoughts' places: (R, n, d), or (R·K, n, d) for K sets; the same every epoch while it is frozen.

        Where LTA's losses ask for them, the states of the question and of the steps follow: (R, n + 1 + S, d).
        """
        s = self.config
        if self.assistant is None:
            raise SettingsError(f"This model needs its assistant ({s.assistant_id or 'the small model'}); call use_assistant.")
        with torch.set_grad_enabled(s.tune_assistant_model and torch.is_grad_enabled()):
            hides = s.gold_steps == "masked" and bool(batch.gold.any())
            seen = batch.assistant_valid & ~batch.gold if hides else batch.assistant_valid
            if s.num_scaling_times > 1:
                return self._states_of_sets(batch, seen)
            states = self._assistant_reads(batch, seen)
            row = torch.arange(len(batch), device=states.device)[:, None]
            if not s.shaped:
                return states[row, batch.slots]
            whole = self._assistant_reads(batch, batch.assistant_valid) if hides else states
            places, share = step_places(batch, s.focus_positions)
            steps = share.to(whole.dtype) @ whole[row, places]
            return torch.cat((states[row, batch.slots], states[row, batch.question[:, None]], steps), 1)

    def _assistant_reads(self, batch: ThoughtBatch, valid: Tensor) -> Tensor:
        """(R, L, d): columns that are not `valid` are not seen by the others and take no position."""
        decoder, pos = self.assistant_decoder, (valid.cumsum(1) - 1).clamp(min=0)
        return decoder(decoder.embed(batch.assistant), pos, decoder.grow(), valid=valid).last

    def _states_of_sets(self, batch: ThoughtBatch, seen: Tensor) -> Tensor:
        """(R·K, n, d): what stands before the thoughts, as far as it is `seen` (R, L), is read once for all sets."""
        decoder, sets, n = self.assistant_decoder, len(self.parts.starts), batch.slots.shape[1]
        before = torch.arange(int(batch.slots[:, 0].max()), device=batch.slots.device)
        valid = seen[:, : len(before)] & (before < batch.slots[:, :1])
        kv, pos = decoder.grow(), (valid.cumsum(1) - 1).clamp(min=0)
        decoder(decoder.embed(batch.assistant[:, : len(before)]), pos, kv, valid=valid)
        kv = kv.select(torch.arange(len(batch), device=pos.device).repeat_interleave(sets))
        x = self.parts.starts.to(decoder.table.weight.dtype).repeat(len(batch), 1)[:, None].expand(-1, n, -1)
        at = valid.sum(1, keepdim=True) + torch.arange(n, device=pos.device)
        return decoder(x, at.repeat_interleave(sets, 0), kv).last

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
            return self.parts.generator(states[:, :n])
        return self.look(batch, batch.slots)

    def shape(self, batch: ThoughtBatch) -> tuple[Tensor, Tensor, Tensor]:
        """What LTA's losses compare: thoughts (R, n, D), the question's vector (R, D), the steps' (R, S, D)."""
        n = batch.slots.shape[1]
        if self.config.generator == "assistant":
            made = self.parts.generator(self.assistant_states(batch) if batch.states is None else batch.states)
            return made[:, :n], made[:, n], made[:, n + 1 :]
        places, share = step_places(batch, self.config.focus_positions)
        made = self.look(batch, torch.cat((batch.slots, batch.question[:, None], places), 1))
        return made[:, :n], made[:, n], share @ made[:, n + 1 :]

    def look(self, batch: ThoughtBatch, at: Tensor) -> Tensor:
        """The block's vectors (R, q, D) at places `at` of what the assistant reads; gold steps hidden as the settings say."""
        seen = batch.hidden_steps(at) if self.config.gold_steps == "masked" else None
        return self.parts.generator(self.decoder.embed(batch.assistant), batch.assistant_valid, at, seen)

    def _static(self, n: int) -> Tensor:
        prompt = self.parts.generator.prompt
        if n > len(prompt):
            raise SettingsError(f"The soft prompt has {len(prompt)} vectors; ask for at most so many thoughts.")
        return prompt[:n]
