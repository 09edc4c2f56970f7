"""Settings of a gated model (`dtt.md` 2.1, 2.6)."""

from typing import Literal

from pydantic import Field, model_validator

from lab.config import Settings

BOT, EOT, MARKER = "[bot]", "[eot]", "####"
Noise = Literal["logistic", "gumbel", "none"]


class GatedSettings(Settings):
    """What a gated model must know about itself."""

    gate: Literal["dtt", "hrpo"] = "dtt"
    noise: Noise = "logistic"  # gumbel as published: a closed-leaning link that opens with 1 - exp(-exp(l)), not sigmoid(l)
    hard: bool = True  # 0 or 1 with a straight-through gradient; False = the sigmoid itself
    temperature: float = Field(1.0, gt=0)  # tau; of a hard gate it scales the gradient only
    bias: float = -3.0  # of the gate at the start: 5 % open
    forced: Literal["", "closed", "open"] = ""  # a control: every gate 0, or 1
    bot_in_prompt: bool = False
    r_min: float = Field(0.99, ge=0, le=1)  # HRPO: a of a fully open r lies between these at the start
    r_max: float = Field(0.999, ge=0, le=1)
    residual_topk: int = Field(50, ge=1)  # HRPO: tokens mixed into the residual
    residual_temperature: float = Field(0.5, gt=0)  # HRPO: of that mixture
    bot_id: int = -1
    eot_id: int = -1
    eos_id: int = -1

    @model_validator(mode="after")
    def _consistent(self) -> "GatedSettings":
        if self.r_min > self.r_max:
            raise ValueError(f"r_min = {self.r_min} is above r_max = {self.r_max}")
        return self


class LoraSettings(Settings):
    """Adapters; `rank` 0 trains the whole backbone. Empty `targets` = attention and feed-forward of the architecture."""

    rank: int = Field(0, ge=0)
    alpha: float = Field(0.0, ge=0)  # 0 = twice the rank
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: list[str] = []
    token_rows: bool = True  # the rows of [bot] and [eot] learn as well
