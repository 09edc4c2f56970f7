"""Settings of CODI (`distill.md` 2A, 3.1)."""

from typing import Any, Literal

from pydantic import Field, model_validator

from lab.config import Settings

Format = Literal["icot", "icot-full", "commonsense", "strategy", "prontoqa"]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
}


class CodiSettings(Settings):
    """What a CODI model is and how its losses are weighed; the official argument names where there are any.

    `compat` = "codi" reproduces the official code where it is wrong: question pads are attended by thoughts and answer, positions
    count them, pieces are cut at 256 tokens, the target is found by model name (`distill.md` 7, A1–A8).
    """

    num_latent: int = Field(6, ge=0)
    use_prj: bool = True
    prj_dim: int = Field(768, ge=1)
    prj_dropout: float = Field(0.0, ge=0, lt=1)
    prj_no_ln: bool = False
    distill_loss_type: Literal["smooth_l1", "l2"] = "smooth_l1"
    distill_loss_div_std: bool = True
    distill_loss_factor: float = Field(1.0, ge=0)
    ref_loss_factor: float = Field(1.0, ge=0)
    align_embedding: bool = True  # the embedding output is one of the compared layers
    teacher_pass: Literal["shared", "separate"] = "shared"  # separate: a second pass (other dropout) gives the targets
    data_name: Format = "icot"
    raw_question: bool = False  # read as it is (LatentTTS), not stripped with double spaces made one
    remove_eos: bool = True
    include_last_cot: bool = False
    max_token_num: int = Field(1000, ge=1)
    lora_r: int = Field(128, ge=0)  # 0 = train everything
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.1, ge=0, lt=1)
    train_marks: bool = True  # with LoRA, also the two vectors that open and close the thoughts
    compat: Literal["", "codi"] = ""
    fix_attn_mask: bool = False  # the official half fix: pads hidden from the answer, not from the thoughts
    pad_id: int = -1
    bot_id: int = -1
    eot_id: int = -1
    eos_id: int = -1

    @model_validator(mode="after")
    def _consistent(self) -> "CodiSettings":
        if self.fix_attn_mask and not self.compat:
            raise ValueError("fix_attn_mask belongs to compat = 'codi'; masks are right without it")
        return self

    @property
    def closing(self) -> tuple[int, ...]:
        """Tokens read between the last thought and the answer."""
        return (self.eot_id,) if self.remove_eos else (self.eot_id, self.eos_id)

    @property
    def marks(self) -> bool:
        """Whether the two marks are parameters of their own."""
        return self.lora_r > 0 and self.train_marks and not self.compat

    def effective_weight(self, layers: int) -> float:
        """The weight one block's distance has in the loss, `layers` blocks and the embedding output if that is aligned too."""
        return self.distill_loss_factor / (layers + self.align_embedding)


def lora_targets(model_type: str) -> list[str]:
    """Modules that get adapters, by architecture (`distill.md` 2A.1)."""
    return TARGETS.get(model_type, TARGETS[""])


def inferred(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    """What a checkpoint's shapes tell: projection width and form, LoRA rank, ids of the three added rows."""
    found: dict[str, Any] = {"use_prj": "prj.1.weight" in shapes}
    if found["use_prj"]:
        found |= {"prj_dim": shapes["prj.1.weight"][0], "prj_no_ln": "prj.ln.weight" not in shapes}
    rank = next((shape[0] for key, shape in shapes.items() if ".lora_A." in key), 0)
    tables = (key for key in shapes if key.startswith(prefix) and key.endswith(("embed_tokens.weight", "wte.weight")))
    table = shapes[next(tables)][0]
    return found | {"lora_r": rank, "pad_id": table - 3, "bot_id": table - 2, "eot_id": table - 1}
