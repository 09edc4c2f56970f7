"""A COCONUT model: a backbone with three more tokens, nothing else."""

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

from lab.methods.coconut.config import END, LATENT, START, CoconutSettings
from lab.methods.coconut.data import prompt_of, question_ids
from lab.models.decoder import decoder_for
from lab.models.latent_model import LatentModel
from lab.models.tokenizers import add_tokens, require

log = logging.getLogger(__name__)


class CoconutModel(LatentModel):
    """Thoughts are hidden states after the final norm, fed back as they are (paper sec. 3; `coconut.md` 2.5)."""

    method = "coconut"

    @classmethod
    def start(cls, backbone, tokenizer, settings: CoconutSettings, like: str = "<<") -> Self:
        """A model to train: three new tokens in the official order, each row a copy of the row of `like` (or the mean of all rows)."""
        require(tokenizer, eos=True)
        values: dict[str, Any] = {"eos_id": tokenizer.eos_token_id}
        if settings.markers:
            known = like in tokenizer.get_vocab()
            if not known:
                log.info("The tokenizer has no token %r; the new tokens start from the mean of all rows.", like)
            ids = add_tokens(tokenizer, backbone, (START, END, LATENT), like=like if known else None, special=False)
            values |= dict(zip(("start_id", "end_id", "latent_id"), ids, strict=True))
        return cls(backbone, tokenizer, settings.but(**values))

    @property
    def config(self) -> CoconutSettings:
        """The settings, checked."""
        return CoconutSettings.check(**self.settings)

    def configure(self, **changes: Any) -> None:
        """Changes settings in place (the stage, or `thoughts` at inference)."""
        self.settings = self.config.but(**changes).model_dump(mode="json")

    @cached_property
    def decoder(self):
        """The step over the backbone's weights."""
        return decoder_for(self.backbone)

    def prompt(self, question: Any, thoughts: int | None = None) -> tuple[list[int], int]:
        """(ids to read, thoughts to make) for a text, an `Example`, or ids that are read as they are."""
        s = self.config if thoughts is None else self.config.but(thoughts=thoughts)
        steps = getattr(question, "steps", None)
        if isinstance(question, Sequence) and not isinstance(question, str):
            return [int(i) for i in question], prompt_of((), s.stage, None, s)[1]
        text = question if isinstance(question, str) else question.question
        return prompt_of(question_ids(text, self.tokenizer), s.stage, len(steps) if steps else None, s)

    @classmethod
    def build(cls, backbone, tokenizer, settings: Mapping[str, Any], source: str = "") -> Self:
        return cls(backbone, tokenizer, CoconutSettings.check(**settings), source=source)
