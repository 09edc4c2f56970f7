"""A latent reward model behind the door of every method: a copy of a generator's transformer with a one-number head."""

import copy
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from lab.errors import CheckpointError, SettingsError
from lab.latent.loop import Prompt
from lab.methods.codi.model import Projection
from lab.methods.latenttts.config import RewardSettings
from lab.models.latent_model import LatentModel
from lab.sampling.records import Asked
from lab.sampling.reward import LatentRM, new_head
from lab.sampling.sampler import fingerprint


class RewardParts(nn.Module):
    """The head, and a CODI generator's projection."""

    def __init__(self, config: Any, s: RewardSettings):
        super().__init__()
        self.classifier = new_head(config)
        self.projector = Projection(config.hidden_size, s.projector_width) if s.projector_width else None


class RewardModel(LatentModel):
    """Scores thoughts, one number each (`latenttts.md` 2.7); it answers nothing."""

    method = "latenttts"

    @classmethod
    def build(cls, backbone, tokenizer, settings: Mapping[str, Any], source: str = "") -> Self:
        s = RewardSettings.check(**settings)
        return cls(backbone, tokenizer, s, RewardParts(backbone.config, s), source)

    @classmethod
    def start(cls, generator: LatentModel, loss: str = "ce", seed: int = 0) -> Self:
        """A model to train: a copy of the generator's weights under a new head."""
        projector = getattr(generator.parts, "prj", None)
        width = projector[1].out_features if isinstance(projector, Projection) else 0
        s = RewardSettings.check(generator=generator.method, fingerprint=fingerprint(generator), loss=loss, projector_width=width)
        backbone = copy.deepcopy(generator.backbone)
        if hasattr(backbone, "merge_and_unload"):
            backbone = backbone.merge_and_unload()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls.build(backbone.requires_grad_(True), generator.tokenizer, s.model_dump(mode="json"))
        if width:
            model.parts.projector.load_state_dict(projector.state_dict())
        return model.to(generator.device)

    def train(self, mode: bool = True) -> Self:
        """Dropout stays off while it learns, as published (`latenttts.md` 2.7)."""
        return super().train(False)

    @property
    def config(self) -> RewardSettings:
        """The settings, checked."""
        return RewardSettings.check(**self.settings)

    @cached_property
    def scorer(self) -> LatentRM:
        """The model as beam search and training use it; it shares the weights."""
        return LatentRM(self.backbone, self.parts.projector, self.parts.classifier, self.config.loss)

    def generate(self, questions: Sequence[Any], samples: int = 1, **options: Any) -> Any:
        raise SettingsError("A reward model scores thoughts and answers nothing; generate with the model it was trained for.")

    def step_by_transformers(self) -> None:
        super().step_by_transformers()
        self.scorer.__dict__["decoder"] = self.decoder

    def check_for(self, generator: LatentModel) -> None:
        """Raises CheckpointError where this model was trained on thoughts of another one."""
        s, own = self.config, self.backbone.get_input_embeddings().weight.shape
        theirs = generator.backbone.get_input_embeddings().weight.shape
        if own != theirs or s.generator != generator.method:
            raise CheckpointError(
                f"The reward model reads {s.generator} thoughts of width {own[1]} ({own[0]} tokens), the generator is {generator.method} "
                f"with width {theirs[1]} ({theirs[0]} tokens): it was trained on another backbone. Train one for this generator."
            )
        if s.fingerprint and s.fingerprint != fingerprint(generator):
            raise CheckpointError(
                "The reward model was trained on the thoughts of a generator of this shape with other weights; its scores would mean "
                "nothing. Use that generator, or train a reward model for this one."
            )

    @torch.no_grad()
    def score(self, asked: Sequence[Asked], batch: int = 1024, official_padding: bool = False) -> list[Tensor]:
        """(N, T) step scores of every question, NaN after a sample's last thought; prompts are read once.

        Args:
            batch: samples at a time. official_padding: as the released scorer, whose scores depend on the padding and so on `batch`
                (`latenttts.md` 7.2); SettingsError unless all questions have equally many samples of equally many thoughts, and answers.
        """
        if not official_padding or not asked:
            return [self._score(question, batch) for question in asked]
        full = all(len(q.ids) == len(q.counts) and bool((q.counts == q.thoughts.shape[1]).all()) for q in asked)
        if not full or len({q.thoughts.shape for q in asked}) > 1:
            raise SettingsError("official_padding needs equally many samples of equally many thoughts from every question, with answers.")
        size = max(1, batch // max(len(question.counts) for question in asked))
        return [scores for i in range(0, len(asked), size) for scores in self._padded(asked[i : i + size])]

    def _score(self, question: Asked, batch: int) -> Tensor:
        thoughts, counts = question.thoughts.to(self.device, self.backbone.dtype), question.counts.to(self.device)
        prompt = Prompt.of_ids(self.scorer.decoder, [question.prompt])
        rows = [self.scorer.rate(prompt, thoughts[i : i + batch], counts[i : i + batch]) for i in range(0, len(thoughts), batch)]
        logits = self.scorer.worth(torch.cat(rows))
        dead = torch.arange(logits.shape[1], device=logits.device) >= counts[:, None]
        return logits.masked_fill(dead, torch.nan).float().cpu()

    def _padded(self, asked: Sequence[Asked]) -> Sequence[Tensor]:
        thoughts = torch.cat([question.thoughts for question in asked]).to(self.device, self.backbone.dtype)
        prompt = Prompt.of_ids(self.scorer.decoder, [question.prompt for question in asked])
        tails = torch.tensor([1 + len(ids) for question in asked for ids in question.ids], device=self.device)
        return self.scorer.worth(self.scorer.rate_padded(prompt, thoughts, tails)).float().cpu().chunk(len(asked))
