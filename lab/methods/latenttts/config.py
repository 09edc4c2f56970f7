"""Settings of a latent reward model and of its training (`latenttts.md` 2.7, 3)."""

from typing import Literal

from pydantic import Field

from lab.config import Settings


class RewardSettings(Settings):
    """What a reward model must know about itself.

    Attributes:
        generator: the method whose thoughts it reads; fingerprint: of the very model ("" for released files, which do not say).
        loss: what it was trained with: `ce` contrasts the samples of a question, `bce` judges each alone; scores differ (`LatentRM.worth`).
        projector_width: inner width of a CODI generator's projection, 0 = none.
    """

    generator: str = "coconut"
    fingerprint: str = ""
    loss: Literal["ce", "bce"] = "ce"
    projector_width: int = Field(0, ge=0)


class RewardTraining(Settings):
    """Beside `TrainSettings`: how evaluation chooses the weights.

    Attributes:
        official_loss: divide by the padded length of the whole row, as the released code (`latenttts.md` 7.13).
        evals_per_epoch: validations in one pass over the questions. patience: of them without a better score end training, 0 = never.
    """

    official_loss: bool = False
    evals_per_epoch: int = Field(4, ge=1)
    patience: int = Field(0, ge=0)
