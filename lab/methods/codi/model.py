"""A CODI model: a backbone (with LoRA while it trains), three more tokens, and the projection between thoughts."""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from lab.methods.codi.config import CodiSettings, lora_targets
from lab.methods.codi.data import question_text
from lab.models.backbones import grow
from lab.models.decoder import decoder_for
from lab.models.latent_model import LatentModel
from lab.models.peft_state import with_adapters
from lab.models.tokenizers import require


class Projection(nn.Sequential):
    """Dropout, linear, GELU, linear, layer norm, from a state (…, D) to the next input (…, D); module names as in the official files."""

    def __init__(self, width: int, inner: int, dropout: float = 0.0, norm: bool = True):
        super().__init__(nn.Dropout(dropout), nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        if norm:
            self.add_module("ln", nn.LayerNorm(width))

    def forward(self, h: Tensor) -> Tensor:
        """Computed in the projection's own precision, returned in that of `h`."""
        if torch.is_autocast_enabled(h.device.type):
            return super().forward(h)
        return super().forward(h.to(self[1].weight.dtype)).to(h.dtype)


class CodiParts(nn.Module):
    """CODI's own weights: `prj`, and with LoRA the vectors `marks` (2, D) of the tokens before and after the thoughts."""

    def __init__(self, width: int, s: CodiSettings):
        super().__init__()
        self.prj = Projection(width, s.prj_dim, s.prj_dropout, not s.prj_no_ln) if s.use_prj else nn.Identity()
        self.marks = nn.Parameter(torch.zeros(2, width)) if s.marks else None


class CodiModel(LatentModel):
    """Thoughts are projected hidden states (`distill.md` 2A.3)."""

    method = "codi"

    @classmethod
    def build(cls, backbone, tokenizer, settings: Mapping[str, Any], source: str = "") -> Self:
        s = CodiSettings.check(**settings)
        return cls(backbone, tokenizer, s, CodiParts(backbone.config.hidden_size, s), source)

    @classmethod
    def start(cls, backbone, tokenizer, settings: CodiSettings) -> Self:
        """A model to train: three rows are added (pad, begin and end of thought), LoRA is wrapped around the backbone if asked for."""
        require(tokenizer, eos=True)
        rows = backbone.get_input_embeddings().weight.shape[0]
        grow(backbone, rows + 3)
        if tokenizer.pad_token_id is None:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        s = settings.but(pad_id=rows, bot_id=rows + 1, eot_id=rows + 2, eos_id=tokenizer.eos_token_id)
        model = cls.build(with_lora(backbone, s), tokenizer, s.model_dump(mode="json"))
        model.take_marks()
        return model

    @property
    def config(self) -> CodiSettings:
        """The settings, checked."""
        return CodiSettings.check(**self.settings)

    @cached_property
    def decoder(self):
        """The step over the backbone's weights, adapters included."""
        return decoder_for(self.backbone)

    @property
    def has_lora(self) -> bool:
        """Whether the backbone still has adapters."""
        return hasattr(self.backbone, "merge_and_unload")

    def feedback(self, h: Tensor, step: int = 0) -> Tensor:
        """The next input (R, D) of a state (R, D)."""
        return self.parts.prj(h)

    @torch.no_grad()
    def take_marks(self) -> None:
        """Fills the marks from the embedding table."""
        if self.parts.marks is not None:
            self.parts.marks.copy_(self._mark_rows())

    @torch.no_grad()
    def put_marks(self) -> None:
        """Writes the marks into the embedding table, where inference and files read them."""
        if self.parts.marks is not None:
            self.decoder.table.weight[[self.config.bot_id, self.config.eot_id]] = self.parts.marks.to(self.decoder.table.weight)

    def _mark_rows(self) -> Tensor:
        return self.decoder.table.weight[[self.config.bot_id, self.config.eot_id]]

    def prompt(self, question: Any, written: bool = False) -> list[int]:
        """Ids to read before the first thought (or written word), for a text, an `Example`, or ids that are read as they are."""
        if isinstance(question, Sequence) and not isinstance(question, str):
            return [int(i) for i in question]
        s = self.config
        text = question_text(question if isinstance(question, str) else question.question, s)
        return [*self.tokenizer(text).input_ids, *([] if s.remove_eos else [s.eos_id]), *([] if written else [s.bot_id])]

    def merge(self) -> None:
        """Adds the adapters to the weights they adapt and drops them."""
        self.put_marks()
        if self.has_lora:
            self.backbone = self.backbone.merge_and_unload()
            self.__dict__.pop("decoder", None)

    def _write(self, folder, backbone_name: str) -> None:
        self.put_marks()
        if not self.has_lora:
            super()._write(folder, backbone_name)
            return
        merged = CodiModel(copy.deepcopy(self.backbone).merge_and_unload(), self.tokenizer, self.settings, self.parts)
        super(CodiModel, merged)._write(folder, "")


def with_lora(backbone, s: CodiSettings):
    """`backbone` wrapped by peft with the official targets, or itself where `lora_r` is 0."""
    return with_adapters(backbone, s.lora_r, s.lora_alpha, lora_targets(backbone.config.model_type), s.lora_dropout, task_type="CAUSAL_LM")
