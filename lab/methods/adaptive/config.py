"""What defines an adaptive model (its tokens, filter and head), and how it is distilled (distill.md 2B)."""

import zlib
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from lab.config import Settings
from lab.errors import CheckpointError

START, END, CONTINUE, STOP = TOKENS = ("<START>", "<END>", "<|CONTINUE|>", "<|STOP|>")
PREFIX, MARKER, COLON = "Question: ", " The answer is", ":"
Filter = Literal["MLP", "linear", "linear_ln", "linear_ECF", "SRE", "none"]
SETTINGS_KEY = "_inserted_LatentThinkingModelSettings"


class AdaptiveSettings(Settings):
    """An adaptive model. `start`, `end`, `go_on`, `stop` are the ids of its four special tokens; a text model has none (-1).

    `special`: "" = their vectors are rows of the embedding; tied | untied = they are modules of their own beside a frozen
    embedding (how LoRA trains them). `head_trained`: None where the files do not say. `most_trained`: the largest number of
    thoughts in training, 0 = unknown. `prefix` stood before every question in training.
    """

    filter: Filter = "MLP"
    start: int = -1
    end: int = -1
    go_on: int = -1
    stop: int = -1
    unused: list[int] = []
    special: Literal["", "tied", "untied"] = ""
    detach_head: bool = False
    head_temperature: float | None = Field(None, gt=0)
    add_latent_to_end: bool = False
    head_trained: bool | None = None
    most_trained: int = 0
    fixed_count: int | None = None  # the number of thoughts to use where the head was never trained
    prefix: str = PREFIX

    @property
    def latent(self) -> bool:
        """Whether the model thinks at all; the CoT and no-CoT models do not."""
        return self.start >= 0

    @property
    def silent(self) -> list[int]:
        """Ids the vocabulary head never predicts: they belong to the stop head, or are never said."""
        return [self.end, self.go_on, self.stop] if self.latent else []

    @property
    def cap(self) -> int:
        """Thoughts after which a row is stopped: twice what training showed at most, 20 where that is unknown (2B pitfall B6)."""
        return 2 * self.most_trained or 20


_OFFICIAL = {
    "recurrent_filter_mode": "filter",
    "start_token_id": "start",
    "end_token_id": "end",
    "continue_token_id": "go_on",
    "stop_token_id": "stop",
    "unused_token_ids": "unused",
    "detach_binary_head_inputs": "detach_head",
    "add_latent_to_end": "add_latent_to_end",
    "binary_head_temp": "head_temperature",
}
_NO_EFFECT = ("debug_mode", "_generation_mode", "disable_checkpointing_cache_update", "disable_forward_input_embeds")
_IGNORED = (*_NO_EFFECT, "disable_input_past_key_values", "lora_mode")


def from_official(values: Mapping[str, Any], special: str = "") -> AdaptiveSettings:
    """Settings from the dict that the official config carries; missing keys take defaults, unknown ones are an error."""
    if odd := sorted(set(values) - set(_OFFICIAL) - set(_IGNORED)):
        raise CheckpointError(f"{SETTINGS_KEY} holds {', '.join(map(repr, odd))}, which no known version of the method has.")
    known = {ours: values[theirs] for theirs, ours in _OFFICIAL.items() if theirs in values}
    if "filter" in known:
        known["filter"] = known["filter"] or "none"
    if known.get("head_temperature") is not None:
        known["head_temperature"] = float(known["head_temperature"])
    return AdaptiveSettings.check(**known, special=special)


def to_official(s: AdaptiveSettings) -> dict[str, Any]:
    """The dict of the official config; the reverse of `from_official`."""
    told = {theirs: getattr(s, ours) for theirs, ours in _OFFICIAL.items()}
    told["recurrent_filter_mode"] = None if s.filter == "none" else s.filter
    switches = {"disable_checkpointing_cache_update": True, "disable_forward_input_embeds": True, "disable_input_past_key_values": False}
    return dict(sorted({**told, **switches, "lora_mode": bool(s.special), "debug_mode": False}.items()))


class Distil(Settings):
    """What SFT learns from: which data, how many thoughts, which losses (2B.3, 2B.4).

    The number of thoughts is `factor` · steps + `bias`, then at least `least`, then at most `most`; `jitter` adds 0 to that many
    at random (not in the paper: it gives the stop head something to choose from in toy worlds). `weight_codi` compares
    teacher and student at the target token, `weight_mean` the mean of the written reasoning with the mean of the thoughts.
    `blocks` keeps the transformer blocks a..b (0-based, inclusive). `compat` follows the official code where it differs from
    its own description: losses are means of micro-batches, rows without written reasoning count as zeros in the mean loss.
    """

    mode: Literal["cot", "no cot", "latent"] = "latent"
    sentences: bool = False  # steps are sentences (gsm8k-aug-nl), not equations
    remove_last_step: bool = False
    remove_negative: bool = False
    factor: int = 0
    bias: int = 0
    least: int = 0
    most: int | None = None
    jitter: int = Field(0, ge=0)
    mask_thought_labels: bool = False
    shift_target: bool = False
    longest: int = 512
    weight_codi: float = Field(0.0, ge=0)
    weight_mean: float = Field(0.0, ge=0)
    distance: Literal["", "smooth_l1", "mean_l2"] = ""
    scale: Literal["", "layerwise_std", "layerwise_avg_l2", "std", "avg_l2", "none"] = ""
    blocks: list[int] | None = Field(None, min_length=2, max_length=2)
    compat: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "Distil":
        weighted = self.weight_codi > 0 or self.weight_mean > 0
        if weighted and self.mode != "latent":
            raise ValueError(f"a latent loss needs thoughts (mode latent, not {self.mode})")
        if weighted != bool(self.distance) or weighted != bool(self.scale):
            raise ValueError("a latent loss needs a distance and a scale, and neither makes sense without one")
        if self.blocks and not 0 <= self.blocks[0] <= self.blocks[1]:
            raise ValueError(f"blocks = {self.blocks}: first and last block, counted from 0")
        return self

    def thoughts(self, steps: int, key: str = "") -> int:
        """Thoughts for a problem of `steps` written steps (before any is removed); `key` decides the jitter."""
        extra = zlib.crc32(key.encode()) % (self.jitter + 1) if self.jitter else 0
        count = max(self.factor * steps + self.bias + extra, self.least)
        return count if self.most is None else min(count, self.most)

    def layers(self, blocks: int) -> tuple[int, ...]:
        """The hidden states compared, as taps of the decoder: after each kept block, never the embedding."""
        first, last = self.blocks or (0, blocks - 1)
        return tuple(range(first + 1, min(last, blocks - 1) + 2))
