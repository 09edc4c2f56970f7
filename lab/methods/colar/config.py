"""Settings of CoLaR (`colar.md` 2.1, 3)."""

from typing import Literal

from pydantic import Field

from lab.config import Settings

SEPARATOR = "###"


class ColarSettings(Settings):
    """What a model must know about itself."""

    max_compression_factor: int = Field(5, ge=1)
    sqrt_mean: bool = True  # merged embedding = sum / √count, which keeps a token's variance; False = mean
    latent_loss: Literal["mse", "nll"] = "mse"  # mse drives the head's deviation to 0: use nll before RL
    ce_weight: float = Field(1.0, ge=0)
    embed_modeling_weight: float = Field(1.0, ge=0)
    entropy_weight: float = 0.0  # added to the loss, so a positive weight reduces the entropy
    pred_embed_forward_weight: float = Field(0.0, ge=0)
    replace_r_with_auto_prob: float = Field(0.0, ge=0, le=1)
    lp_intermediate_size: int = Field(0, ge=0)  # width of the latent head; 0 = the backbone's
    lp_deterministic: bool = False  # no deviation: the head predicts a point
    embeds_std: float = Field(0.0, ge=0)  # 0 = measured on the embedding table when the model is made
    lora_r: int = Field(128, ge=0)  # 0 = train the backbone
    lora_alpha: float = Field(32, gt=0)
    official_padding: bool = False  # as the released code: empty last groups, and pads that predict the separator
    sep_id: int = -1
    pad_id: int = -1
    eos_id: int = -1
