"""Settings of SoftCoT: those of LTA-Thinker with an assistant that makes the thoughts (`softcot.md` 2)."""

from typing import Literal

from lab.methods.lta.config import LtaSettings


class SoftcotSettings(LtaSettings):
    """SoftCoT's defaults: an assistant, one shared placeholder id, no gold steps and no further losses."""

    generator: Literal["assistant"] = "assistant"
    gold_steps: Literal["off"] = "off"
    distinct_slots: bool = False
