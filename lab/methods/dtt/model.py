"""`SparseGatedModel`: a backbone whose forward can read hidden states through a gate, with LoRA and its own token rows.

Axes: R rows, t columns, D width.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lab.errors import DataError, SettingsError
from lab.methods.dtt.config import BOT, EOT, GatedSettings, LoraSettings
from lab.methods.dtt.gate import ResidualGate, SparseGate
from lab.models.decoder import decoder_for
from lab.models.latent_model import LatentModel
from lab.models.peft_state import with_adapters
from lab.models.step import unwrap
from lab.models.tokenizers import add_tokens, require

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"]}
LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class SparseGatedModel(LatentModel):
    """At every written position: the embedding of the token just said, or a projection of the state that said it."""

    method = "dtt"

    @classmethod
    def build(cls, backbone, tokenizer, settings: Mapping[str, Any], source: str = "") -> Self:
        s = GatedSettings.check(**settings)
        width = backbone.config.hidden_size
        spread = getattr(backbone.config, "initializer_range", 0.02)
        gate = SparseGate(width, s) if s.gate == "dtt" else ResidualGate(width, s, spread)
        model = cls(backbone, tokenizer, s, gate.to(backbone.device), source)
        gate.attach(model.stem)
        return model

    @classmethod
    def start(cls, backbone, tokenizer, settings: GatedSettings) -> Self:
        """A model to train; DTT's two tokens are added to tokenizer and embedding, as the mean of the rows there are."""
        require(tokenizer, eos=True)
        ids = {"eos_id": tokenizer.eos_token_id}
        if settings.gate == "dtt":
            ids |= dict(zip(("bot_id", "eot_id"), add_tokens(tokenizer, backbone, (BOT, EOT)), strict=True))
        return cls.build(backbone, tokenizer, settings.but(**ids).model_dump(mode="json"))

    @property
    def config(self) -> GatedSettings:
        """The settings, checked."""
        return GatedSettings.check(**self.settings)

    @property
    def gate(self) -> SparseGate | ResidualGate:
        """The gate that stands in the backbone's forward."""
        return self.parts

    @property
    def stem(self) -> nn.Module:
        """The transformer under the head, whose forward the gate stands in."""
        base = unwrap(self.backbone)
        return getattr(base, base.base_model_prefix)

    @cached_property
    def decoder(self):
        """The step over the backbone's weights, adapters included."""
        return decoder_for(self.backbone)

    def forward(self, ids: Tensor, mask: Tensor, **gated: Tensor) -> Tensor:
        """(R, t, D) states after the final norm of ids (R, t), padded where `mask` is 0; `gated` as in `Gate.enter`."""
        pos = (mask.long().cumsum(1) - 1).clamp(min=0)
        return self.stem(input_ids=ids, attention_mask=mask.long(), position_ids=pos, use_cache=False, **gated).last_hidden_state

    def prompt(self, question: Any) -> list[int]:
        """Ids of a question (a text or an `Example`) and its line end, with [bot] if the settings say so; ids are read as they are."""
        from lab.methods.dtt.data import prompt_ids

        if not isinstance(question, str) and not hasattr(question, "question"):
            return [int(i) for i in question]
        if self.tokenizer is None:
            raise SettingsError("This model has no tokenizer, so it reads token ids only; load it with tokenizer=… to read text.")
        return prompt_ids(question if isinstance(question, str) else question.question, self.tokenizer, self.config)

    def check_prompts(self, prompts: Sequence[Sequence[int]], longest: int) -> None:
        """DataError where a prompt and `longest` further ids do not fit into the model's positions."""
        room = getattr(unwrap(self.backbone).config, "max_position_embeddings", None)
        most = max(map(len, prompts), default=0)
        if room and most + longest > room:
            raise DataError(
                f"The longest prompt has {most} tokens; with {longest} written ones it does not fit into the model's {room} positions. "
                "Drop long questions (max_prompt_length) or allow fewer tokens (longest)."
            )

    # ---- adapters ----
    def add_lora(self, s: LoraSettings) -> None:
        """Freezes the backbone but for adapters and, where asked for, the rows of [bot] and [eot], in table and tied head alike."""
        targets = s.targets or TARGETS.get(self.backbone.config.model_type, LLAMA_TARGETS)
        own = [i for i in (self.config.bot_id, self.config.eot_id) if i >= 0] if s.token_rows else []
        rows = {table_name(self.backbone): own} if own else None
        alpha = s.alpha or 2 * s.rank
        self.backbone = with_adapters(self.backbone, s.rank, alpha, targets, s.dropout, trainable_token_indices=rows)
        _no_bias()
        self.__dict__.pop("decoder", None)

    @property
    def has_lora(self) -> bool:
        """Whether adapters are in the backbone."""
        return hasattr(self.backbone, "peft_config")

    @contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the backbone computes as before adapters were trained."""
        with self.backbone.disable_adapter() if self.has_lora else nullcontext():
            yield

    def merge(self) -> Self:
        """Folds adapters and trained rows into the backbone."""
        if self.has_lora:
            self.backbone = self.backbone.merge_and_unload()
            self.__dict__.pop("decoder", None)
        return self

    def _write(self, folder: Path, backbone_name: str) -> None:
        """Our own format holds no adapters: they are folded in first, in a copy."""
        whole = copy.deepcopy(self).merge() if self.has_lora else self
        LatentModel._write(whole, folder, "" if self.has_lora else backbone_name)

    def __deepcopy__(self, memo: dict) -> "SparseGatedModel":
        self.gate.seen = None
        copied = type(self)(
            copy.deepcopy(self.backbone, memo), self.tokenizer, dict(self.settings), copy.deepcopy(self.parts, memo), self.source
        )
        return copied.train(self.training)

    # ---- the projection's start ----
    @torch.no_grad()
    def fit_projection(self, batches: Sequence[Any], ridge: float = 1e-2) -> float:
        """Sets the projection to the ridge regression from a state to the embedding of the token that follows it (`dtt.md` 7).

        Args:
            batches: with `prompt`, `prompt_mask`, `ids`, `mask` as in `lab.training.acts.Completions`.

        Returns the share of the embeddings' variance that it explains.
        """
        states, targets = (torch.cat(part) for part in zip(*(self._pairs(batch) for batch in batches), strict=True))
        scale = ridge * states.pow(2).mean() * len(states)
        gram = states.T @ states + scale * torch.eye(states.shape[1], device=states.device)
        weight = torch.linalg.solve(gram, states.T @ targets)
        self.gate.projection.weight.copy_(weight.T)
        return float(1 - (targets - states @ weight).pow(2).sum() / (targets - targets.mean(0)).pow(2).sum())

    def _pairs(self, batch: Any) -> tuple[Tensor, Tensor]:
        wide = batch.prompt.shape[1]
        h = self(torch.cat((batch.prompt, batch.ids), 1)[:, :-1], torch.cat((batch.prompt_mask, batch.mask), 1)[:, :-1])
        keep = batch.mask.bool()
        return h[:, wide - 1 :][keep].float(), self.decoder.embed(batch.ids)[keep].float()

    @torch.no_grad()
    def match_norms(self, batches: Sequence[Any]) -> None:
        """Scales the projection so that what it makes of states is as long, on average, as the embeddings of the tokens said."""
        states, targets = (torch.cat(part) for part in zip(*(self._pairs(batch) for batch in batches), strict=True))
        made = self.gate.projection(states)
        self.gate.projection.weight.mul_(targets.norm(dim=-1).mean() / made.norm(dim=-1).mean())


def table_name(backbone) -> str:
    """The module name of the input embedding, as peft wants it."""
    table = backbone.get_input_embeddings()
    return next(name for name, module in backbone.named_modules() if module is table).rpartition(".")[2]


def _no_bias() -> None:
    """TRL's fused head asks the output layer for a bias, which peft's wrapper of trained token rows does not have (`dtt.md` 2.7)."""
    from peft.utils.other import TrainableTokensWrapper

    if not hasattr(TrainableTokensWrapper, "bias"):
        TrainableTokensWrapper.bias = property(lambda wrapper: None)
