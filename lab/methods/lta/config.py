"""Settings of the methods that put an assistant's thoughts into a prompt: LTA-Thinker, SoftCoT, SoftCoT++ and their controls."""

from typing import Literal

from pydantic import Field, model_validator

from lab.config import Settings
from lab.errors import unknown

TASKS = ("gsm8k", "strategyqa", "math", "aqua", "du")


class Markers(Settings):
    """What stands around thoughts in a family's prompts (`lta.md` 2.2): placeholder, begin, end, the token that ends a turn, and the
    first of the distinct ids that stand for thoughts in the assistant's prompt; `eps` of the block's norms (2.7).
    """

    placeholder: str
    begin: str
    end: str
    turn_end: str
    first_slot: int
    eps: float = 1e-6


FAMILIES = {
    "llama": Markers(
        placeholder="<|end_of_text|>",
        begin="<|reserved_special_token_0|>",
        end="<|reserved_special_token_1|>",
        turn_end="<|eot_id|>",
        first_slot=128011,
        eps=1e-5,
    ),
    "qwen": Markers(placeholder="<|endoftext|>", begin="<|box_start|>", end="<|box_end|>", turn_end="<|im_end|>", first_slot=150001),
    "qwen3": Markers(placeholder="<|endoftext|>", begin="<think>", end="</think>", turn_end="<|im_end|>", first_slot=150001),
}


def family_of(name: str) -> str:
    """The family a model id or type belongs to, or is; SettingsError for one whose markers are not known."""
    if name in FAMILIES:
        return name
    lowered = name.lower().replace("-", "").replace("_", "")
    for family, words in (("llama", ("llama",)), ("qwen3", ("qwen3",)), ("qwen", ("qwen2.5", "qwen2"))):
        if any(word in lowered for word in words):
            return family
    raise unknown("prompt family for the model", name, FAMILIES)


class LtaSettings(Settings):
    """What a model must know about itself.

    `generator` makes the thoughts: `block` (LTA's default: a trainable block on the base's embeddings), `assistant` (a frozen small
    model and a projection, SoftCoT's way), or a control: `static` (a learned soft prompt), `unknown` (placeholder embeddings), `none`.
    """

    generator: Literal["block", "assistant", "static", "unknown", "none"] = "block"
    num_thought_tokens: int = Field(32, ge=0)
    train_thoughts: list[int] = []  # numbers of thoughts that training batches draw from; [] = num_thought_tokens alone (official)
    task: str = "gsm8k"
    family: str = "qwen3"
    gold_steps: Literal["masked", "visible", "off"] = "masked"  # whether thoughts may see the solution in training (official: visible)
    focus_positions: Literal["step_mean", "turn_end"] = "step_mean"  # turn_end is official, and without a gradient in block mode
    distinct_slots: bool = True  # a token id of its own for each thought (official: not for strategyqa)
    sft_loss_weight: float = Field(0.33, ge=0)
    contrastive_loss_weight: float = Field(0.33, ge=0)
    kl_loss_weight: float = Field(0.33, ge=0)
    mean_of_means: bool = False  # cross-entropy of an accumulated step: the mean of its micro-batches' means (official), not of all tokens
    inner: int = Field(0, ge=0)  # inner width of the block; 0 = the base's
    eps: float = Field(1e-6, gt=0)
    assistant_id: str = ""  # the small model, where one is used
    assistant_width: int = Field(0, ge=0)
    tune_base_model: bool = False  # adapters on the base's queries and values; the reported runs keep it frozen
    tune_assistant_model: bool = False  # the same for the assistant
    assistant_shape: dict[str, int] = {}  # of a tuned assistant, so that its adapters can be made before it is there
    num_scaling_times: int = Field(1, ge=1)  # SoftCoT++: sets of thoughts a question
    nce: bool = False  # SoftCoT++: draw the sets apart
    pack: str = ""  # hash of the prompt wording it was trained with
    eos_id: int = -1

    @model_validator(mode="after")
    def _something_to_read(self) -> "LtaSettings":
        if self.num_thought_tokens == 0 and self.generator != "none":
            raise ValueError(f"no thoughts for generator {self.generator!r}; give num_thought_tokens from 1 on, or generator: none")
        if self.tune_assistant_model and self.generator != "assistant":
            raise ValueError(f"tune_assistant_model needs generator: assistant; {self.generator!r} has no small model")
        if bad := [n for n in self.train_thoughts if not 1 <= n <= self.num_thought_tokens]:
            raise ValueError(f"train_thoughts holds {bad[0]}; give numbers from 1 to num_thought_tokens = {self.num_thought_tokens}")
        return self

    @property
    def shaped(self) -> bool:
        """Whether LTA's two losses shape what the generator makes (never the K sets of SoftCoT++)."""
        weighed = bool(self.kl_loss_weight or self.contrastive_loss_weight)
        return weighed and self.generator in ("block", "assistant") and self.num_scaling_times == 1

    @property
    def counts(self) -> list[int]:
        """The numbers of thoughts training batches draw from."""
        return [0] if self.generator == "none" else sorted(set(self.train_thoughts)) or [self.num_thought_tokens]
