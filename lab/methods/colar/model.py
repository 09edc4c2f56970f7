"""A CoLaR model: a backbone and a Gaussian head that predicts the next merged embedding (`colar.md` 2.1).

The head works in standardised units: its target is an embedding divided by `embeds_std`, a sample is multiplied by it.
"""

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from lab.errors import DataError
from lab.methods.colar.config import SEPARATOR, ColarSettings
from lab.methods.colar.data import question_text, speed_text
from lab.models.backbones import grow
from lab.models.decoder import decoder_for
from lab.models.latent_model import LatentModel
from lab.models.peft_state import with_adapters
from lab.models.tokenizers import require


class LatentHead(nn.Module):
    """States (…, D) to a Gaussian over the next thought in standardised units: mean and deviation (…, D), in float32."""

    def __init__(self, width: int, inner: int, deterministic: bool = False):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, inner), nn.LayerNorm(inner))
        self.mean = nn.Linear(inner, width)
        self.log_std = None if deterministic else nn.Linear(inner, width)

    def forward(self, h: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        with torch.autocast(h.device.type, enabled=False):
            inner = self.fc(h.to(self.mean.weight.dtype))
            mean = self.mean(inner)
            return mean, torch.full_like(mean, 1e-9) if self.log_std is None else self.log_std(inner).exp() * temperature


class ColarParts(nn.Module):
    """CoLaR's own weights: the latent head."""

    def __init__(self, width: int, s: ColarSettings):
        super().__init__()
        self.head = LatentHead(width, s.lp_intermediate_size or width, s.lp_deterministic)


class ColarModel(LatentModel):
    """Thoughts are samples (or means) of the latent head, in the scale of the embeddings."""

    method = "colar"

    @classmethod
    def build(cls, backbone, tokenizer, settings: Mapping[str, Any], source: str = "") -> Self:
        s = ColarSettings.check(**settings)
        return cls(backbone, tokenizer, s, ColarParts(backbone.config.hidden_size, s), source)

    @classmethod
    def start(cls, backbone, tokenizer, settings: ColarSettings) -> Self:
        """A model to train: a pad row is added if the tokenizer has none, `embeds_std` is measured, LoRA is wrapped around if asked for."""
        require(tokenizer, eos=True)
        if tokenizer.pad_token_id is None:
            tokenizer.add_special_tokens({"pad_token": "[PAD]"})
        if len(tokenizer) > backbone.get_input_embeddings().weight.shape[0]:
            grow(backbone, len(tokenizer))
        std = settings.embeds_std or float(backbone.get_input_embeddings().weight.detach().float().std())
        ids = {"sep_id": separator_id(tokenizer), "pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
        s = settings.but(embeds_std=std, **ids)
        return cls.build(with_lora(backbone, s), tokenizer, s.model_dump(mode="json"))

    def adapt(self, s: ColarSettings) -> None:
        """Freezes the backbone under new adapters as `s` says, so that a saved model (whose adapters are merged) can be trained further."""
        if s.lora_r and not hasattr(self.backbone, "merge_and_unload"):
            self.backbone, self.settings = with_lora(self.backbone, s), {**self.settings, "lora_r": s.lora_r, "lora_alpha": s.lora_alpha}
            self.__dict__.pop("decoder", None)

    def _write(self, folder, backbone_name: str) -> None:
        if not hasattr(self.backbone, "merge_and_unload"):
            super()._write(folder, backbone_name)
            return
        whole = ColarModel(copy.deepcopy(self.backbone).merge_and_unload(), self.tokenizer, {**self.settings, "lora_r": 0}, self.parts)
        whole._write(folder, "")

    @property
    def config(self) -> ColarSettings:
        """The settings, checked."""
        return ColarSettings.check(**self.settings)

    @cached_property
    def decoder(self):
        """The step over the backbone's weights, adapters included."""
        return decoder_for(self.backbone)

    def measure(self) -> float:
        """Sets `embeds_std` to the deviation of the embedding table as it is now, and returns it."""
        std = float(self.backbone.get_input_embeddings().weight.detach().float().std())
        self.settings = self.config.but(embeds_std=std).model_dump(mode="json")
        return std

    def prompt(self, question: Any, speed: int | str) -> list[int]:
        """Ids of a question with its speed, without the separator, for a text, an `Example`, or ids that are read as they are."""
        if not isinstance(question, str) and not hasattr(question, "question"):
            return [int(i) for i in question]
        text = question_text(question if isinstance(question, str) else question.question) + speed_text(speed)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def thought(self, h: Tensor, eps: Tensor | None, temperature: float = 1.0) -> Tensor:
        """The next input (R, D) from states (R, D): a sample with standard normal draws `eps` (R, D), or the mean where it is None."""
        mean, std = self.parts.head(h, temperature)
        z = mean if eps is None else mean + std * eps
        return (z * self.config.embeds_std).to(h.dtype)


def separator_id(tokenizer) -> int:
    """The id of `###`; DataError where the tokenizer has no single token for it."""
    ids = tokenizer(SEPARATOR, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise DataError(f"The tokenizer writes {SEPARATOR!r} as {len(ids)} tokens, CoLaR needs one; add it with tokenizer.add_tokens.")
    return ids[0]


def with_lora(backbone, s: ColarSettings):
    """`backbone` frozen but for adapters on the query and value projections, or itself where `lora_r` is 0."""
    return with_adapters(backbone, s.lora_r, s.lora_alpha, ["q_proj", "v_proj"], task_type="CAUSAL_LM")
